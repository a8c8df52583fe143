// Where every page starts: the server says in <body> which view this is.

import { el } from "./dom.js";
import { listen } from "./live.js";
import { overviewPage } from "./overview.js";
import { resultSections, runPage } from "./run.js";

/** @param {HTMLElement} main */
async function resultsPage(main) {
  const draw = (/** @type {any} */ overview) => {
    const sections = resultSections(overview.results);
    const empty = el("p", { class: "lead", text: "Nothing has been measured yet; the evaluate stage fills this page." });
    const lead = el("p", { class: "lead", text: "What each stage measured on held-out questions. A dot is the figure, its line the 95% interval." });
    main.replaceChildren(el("h1", { text: "Results" }), sections.length ? lead : empty, el("div", { class: "grid" }, ...sections));
  };
  draw(await (await fetch("/api/overview")).json());
  listen({ onOverview: draw, onEvents: () => {} });
}

const pages = { overview: overviewPage, run: runPage, results: resultsPage };
const main = /** @type {HTMLElement} */ (document.getElementById("main"));
const view = /** @type {keyof typeof pages} */ (document.body.dataset.view);
pages[view](main).catch((error) => {
  main.replaceChildren(el("p", { class: "message", text: `This page could not be drawn: ${error.message}` }));
});
