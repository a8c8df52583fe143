// Which run was made from which: a small layered graph, drawn left to right, or downwards where there is little room.

import { runAddress, svg } from "./dom.js";

/**
 * Return each node's layer: one more than the deepest of those it was made from.
 * @param {number} count
 * @param {{from: number, to: number}[]} edges
 * @returns {number[]}
 */
function layers(count, edges) {
  const depth = new Array(count).fill(0);
  // Runs cannot be made from themselves, so `count` rounds always suffice.
  for (let round = 0; round < count; round += 1) {
    for (const { from, to } of edges) depth[to] = Math.max(depth[to], depth[from] + 1);
  }
  return depth;
}

/**
 * Return the graph of runs and what they were made from.
 * @param {{nodes: any[], edges: {from: number, to: number, field: string}[]}} lineage
 * @param {boolean} narrow
 * @returns {SVGElement}
 */
export function lineageGraph(lineage, narrow) {
  const depth = layers(lineage.nodes.length, lineage.edges);
  const [wide, high] = narrow ? [116, 44] : [138, 44];
  const [gapX, gapY] = narrow ? [10, 34] : [32, 16];
  /** @type {number[]} */
  const filled = [];
  const places = lineage.nodes.map((_, i) => {
    const row = (filled[depth[i]] = (filled[depth[i]] ?? -1) + 1);
    const [column, line] = narrow ? [row, depth[i]] : [depth[i], row];
    return { x: 2 + column * (wide + gapX), y: 2 + line * (high + gapY) };
  });
  const width = Math.max(...places.map((p) => p.x)) + wide + 2;
  const height = Math.max(...places.map((p) => p.y)) + high + 2;
  const graph = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "lineage", role: "img", "aria-label": "Which run was made from which" });
  for (const { from, to, field } of lineage.edges) graph.append(edge(places[from], places[to], wide, high, narrow, field));
  lineage.nodes.forEach((node, i) => graph.append(box(node, places[i], wide, high)));
  return graph;
}

/**
 * @param {{x: number, y: number}} a
 * @param {{x: number, y: number}} b
 * @param {number} wide
 * @param {number} high
 * @param {boolean} narrow
 * @param {string} field
 */
function edge(a, b, wide, high, narrow, field) {
  const [x1, y1, x2, y2] = narrow ? [a.x + wide / 2, a.y + high, b.x + wide / 2, b.y] : [a.x + wide, a.y + high / 2, b.x, b.y + high / 2];
  const bend = narrow ? `${x1},${(y1 + y2) / 2} ${x2},${(y1 + y2) / 2}` : `${(x1 + x2) / 2},${y1} ${(x1 + x2) / 2},${y2}`;
  const title = svg("title");
  title.textContent = field;
  return svg("path", { d: `M${x1},${y1} C${bend} ${x2},${y2}`, class: "edge" }, title);
}

/**
 * @param {any} node
 * @param {{x: number, y: number}} place
 * @param {number} wide
 * @param {number} high
 */
function box(node, place, wide, high) {
  const text = svg("text", { x: place.x + 22, y: place.y + high / 2 + 4 });
  const most = Math.floor((wide - 26) / 7.4);
  text.textContent = node.table.length > most ? `${node.table.slice(0, most - 1)}…` : node.table;
  const title = svg("title");
  title.textContent = node.run_id || `${node.table} (from elsewhere)`;
  const dot = svg("circle", { cx: place.x + 12, cy: place.y + high / 2, r: 4, class: `dot ${node.status}` });
  const group = svg("g", { class: "node" }, title, svg("rect", { x: place.x, y: place.y, width: wide, height: high, rx: 8 }), dot, text);
  return node.run_id ? svg("a", { href: runAddress(node.run_id) }, group) : group;
}
