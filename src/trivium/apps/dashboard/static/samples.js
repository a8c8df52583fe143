// Samples along the way: what a run showed at each step, with a slider over the steps.

import { el, short } from "./dom.js";

/** @param {any} value @returns {HTMLElement} */
function sample(value) {
  if (value === null || typeof value !== "object" || typeof value.text !== "string") {
    return el("p", { class: "text", text: typeof value === "string" ? value : JSON.stringify(value, null, 1) });
  }
  const { prompt, text, ...facts } = value;
  const more = Object.entries(facts).map(([name, fact]) => `${name.replaceAll("_", " ")} ${typeof fact === "object" ? JSON.stringify(fact) : short(fact)}`);
  return el("div", { class: "field" }, prompt ? el("h4", { text: typeof prompt === "string" ? prompt : JSON.stringify(prompt) }) : null,
    el("p", { class: "text", text }), more.length ? el("p", { class: "hint", text: more.join(" · ") }) : null);
}

/** The samples of one name; the slider stays at the newest step until it is moved. */
export class Samples {
  /** @param {string} name @param {{step: number, value: any}[]} rows */
  constructor(name, rows) {
    /** @type {Map<number, any[]>} */
    this.bySteps = new Map();
    this.slider = /** @type {HTMLInputElement} */ (el("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": `step of the sample ${name}`, on: { input: () => this.show() } }));
    this.place = el("output", { class: "place" });
    this.body = el("div", { class: "samples" });
    this.node = el("section", { class: "panel", data: { samples: name } }, el("div", { class: "panel-head" }, el("h3", { text: name }), this.place), this.slider, this.body);
    for (const row of rows) this.take(row);
    this.slider.value = this.slider.max;
    this.show();
  }

  /** @param {{step: number, value: any}} row */
  take({ step, value }) {
    this.bySteps.set(step, [...(this.bySteps.get(step) ?? []), value]);
    this.slider.max = String(this.bySteps.size - 1);
    this.slider.hidden = this.bySteps.size < 2;
  }

  /** @param {{step: number, value: any}} row */
  append(row) {
    const atEnd = this.slider.value === this.slider.max;
    this.take(row);
    if (atEnd) this.slider.value = this.slider.max;
    this.show();
  }

  show() {
    const at = Number(this.slider.value);
    const [step, values] = [...this.bySteps][at];
    this.place.textContent = `step ${step} (${at + 1} of ${this.bySteps.size})`;
    this.body.replaceChildren(...values.map(sample));
  }
}
