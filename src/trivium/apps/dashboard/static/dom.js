// Building pages from data: only text nodes and attributes, never markup, so that no text of a run can become code.

/**
 * Return a new element. `props`: `class`, `text`, `on` (listeners by event), `data` (dataset), and any attribute.
 * @param {string} tag
 * @param {Record<string, any>} [props]
 * @param {...(Node|string|null|undefined)} children
 * @returns {HTMLElement}
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = String(value);
    else if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "data") Object.assign(node.dataset, value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/**
 * Return a new SVG element with attributes and children.
 * @param {string} tag
 * @param {Record<string, any>} [attributes]
 * @param {...Node} children
 * @returns {SVGElement}
 */
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}

/** @param {string} run_id @returns {string} */
export const runAddress = (run_id) => `/runs/${encodeURIComponent(run_id)}`;

/**
 * Return a number as a person would write it: 1234567 -> 1.23M, 0.000123 -> 1.23e-4.
 * @param {any} value
 * @returns {string}
 */
export function short(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  for (const [unit, mark] of /** @type {[number, string][]} */ ([[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])) {
    if (size >= unit) return `${(value / (mark === "k" ? 1e3 : unit)).toPrecision(3)}${mark}`;
  }
  if (Number.isInteger(value)) return String(value);
  return size < 1e-3 && size > 0 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

/** @param {number} seconds @returns {string} */
export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

/**
 * Return the cost of a run as short labelled figures; what was not measured is left out.
 * @param {any} cost
 * @returns {[string, string][]}
 */
export function costFigures(cost) {
  /** @type {[string, string][]} */
  const figures = [];
  if (cost.seconds) figures.push(["time", duration(cost.seconds)]);
  if (cost.tokens) figures.push(["tokens", short(cost.tokens)]);
  if (cost.flops) figures.push(["FLOPs", short(cost.flops)]);
  if (cost.peak_memory_bytes) figures.push(["peak memory", `${Math.round(cost.peak_memory_bytes / 2 ** 20)} MiB`]);
  if (cost.energy_joules) figures.push(["energy", `${short(cost.energy_joules)} J`]);
  return figures;
}

const STATUS = {
  done: "done", running: "running", stopped: "stopped", waiting: "waiting for people", failed: "failed", outside: "from elsewhere",
  missing: "not run",
};

/**
 * Return the mark of a status. A running run that has been silent for long is said to be so.
 * @param {string} status
 * @param {number|null} [quiet_s]
 * @returns {HTMLElement}
 */
export function statusMark(status, quiet_s = null) {
  const silent = status === "running" && quiet_s !== null && quiet_s > 120;
  const text = silent ? `running? silent for ${duration(quiet_s)}` : /** @type {any} */ (STATUS)[status] ?? status;
  return el("span", { class: `status ${silent ? "silent" : status}`, text });
}

/**
 * Return a description list of labelled figures.
 * @param {[string, string][]} figures
 */
export function figureList(figures) {
  return el("dl", { class: "figures" }, ...figures.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: value }))));
}
