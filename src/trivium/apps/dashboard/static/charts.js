// Curves. Sparklines are a few lines of SVG; full charts are Plotly's, served from the installed Python package.

import { el, short, svg } from "./dom.js";

/** @typedef {[number, number|null]} Point */

/**
 * Return the value of a CSS custom property of the page.
 * @param {string} name
 */
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/**
 * Return a small line without axes.
 * @param {Point[]} points
 * @returns {SVGElement}
 */
export function sparkline(points) {
  const known = points.filter((p) => p[1] !== null);
  const xs = known.map((p) => p[0]);
  const ys = known.map((p) => /** @type {number} */ (p[1]));
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const path = known.map(([x, y]) => {
    const px = 2 + (116 * (x - x0)) / (x1 - x0 || 1);
    const py = 30 - (28 * (/** @type {number} */ (y) - y0)) / (y1 - y0 || 1);
    return `${px.toFixed(1)},${py.toFixed(1)}`;
  });
  const line = svg("polyline", { points: path.join(" "), fill: "none", stroke: "currentColor", "stroke-width": 1.75 });
  return svg("svg", { viewBox: "0 0 120 32", class: "sparkline", "aria-hidden": "true" }, line);
}

/** @returns {any} */
const plotly = () => /** @type {any} */ (window).Plotly;

/** @returns {Record<string, any>} */
function layout() {
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
  return {
    margin: { l: 44, r: 10, t: 8, b: 34 }, height: 210, showlegend: false, hovermode: "x",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: css("--soft") },
    xaxis: { ...axis, title: { text: "step", standoff: 6 } }, yaxis: { ...axis },
  };
}

const OPTIONS = { displayModeBar: false, responsive: true, doubleClick: "reset" };

/** One metric: its name, its newest value, what it means, and the curve, which grows by `append`. */
export class Curve {
  /**
   * @param {string} name
   * @param {{about: string, points: Point[]}} curve
   */
  constructor(name, curve) {
    this.points = curve.points;
    this.value = el("output", { class: "newest" });
    this.plot = el("div", { class: "plot", role: "img", "aria-label": `${name} over steps` });
    const head = el("div", { class: "curve-head" }, el("h3", { text: name }), this.value);
    this.node = el("section", { class: "curve", data: { metric: name } }, head, this.plot, el("p", { class: "hint", text: curve.about }));
  }

  /** Draw the curve, or draw it anew after the colours changed; the node must be in the page. */
  draw() {
    this.say();
    if (!plotly()) {
      this.plot.replaceChildren(this.points.length ? sparkline(this.points) : "");
      return;
    }
    plotly().react(this.plot, [this.trace()], layout(), OPTIONS);
  }

  /** @returns {Record<string, any>} */
  trace() {
    const few = this.points.length < 40;
    return {
      x: this.points.map((p) => p[0]), y: this.points.map((p) => p[1]), type: "scatter",
      mode: few ? "lines+markers" : "lines", line: { color: css("--accent"), width: 2 }, marker: { size: 5 },
      hovertemplate: "%{y:.4g}<extra></extra>",
    };
  }

  /** @param {Point[]} points */
  append(points) {
    this.points.push(...points);
    this.draw();
  }

  /** Show the newest value beside the name, and say so when values were not finite. */
  say() {
    const last = this.points.at(-1);
    const broken = this.points.filter((p) => p[1] === null).length;
    this.value.textContent = last ? `${short(last[1])} at ${last[0]}${broken ? ` · ${broken} not finite` : ""}` : "";
    this.node.dataset.points = String(this.points.length);
  }
}

/**
 * Draw figures with their 95% intervals, one row per stage.
 * @param {HTMLElement} node
 * @param {{label: string, value: number, low: number|null, high: number|null}[]} rows
 */
export function drawIntervals(node, rows) {
  if (!plotly()) return;
  const shape = layout();
  const reversed = [...rows].reverse();
  const trace = {
    type: "scatter", mode: "markers", x: reversed.map((r) => r.value), y: reversed.map((r) => r.label),
    marker: { size: 9, color: css("--accent") },
    error_x: {
      type: "data", symmetric: false, color: css("--accent"), thickness: 1.75, width: 5,
      array: reversed.map((r) => (r.high === null ? 0 : r.high - r.value)),
      arrayminus: reversed.map((r) => (r.low === null ? 0 : r.value - r.low)),
    },
    hovertemplate: "%{x:.4g}<extra></extra>",
  };
  const look = { ...shape, height: 58 + 26 * rows.length, hovermode: "closest", margin: { ...shape.margin, l: 110 }, xaxis: { ...shape.xaxis, title: { text: "" } } };
  plotly().react(node, [trace], look, OPTIONS);
}

/** @param {() => void} redraw */
export function onColoursChanged(redraw) {
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}
