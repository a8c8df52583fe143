// The pipeline at a glance: a card per stage, the lineage, and what each stage measured.

import { sparkline } from "./charts.js";
import { costFigures, el, figureList, runAddress, short, statusMark } from "./dom.js";
import { lineageGraph } from "./lineage.js";
import { listen } from "./live.js";

/** @param {any} overview @returns {HTMLElement[]} */
function cards(overview) {
  return overview.stages.map((/** @type {any} */ stage, /** @type {number} */ i) => {
    const { name, about, points } = stage.headline;
    const newest = points.at(-1);
    const curve = el("div", { class: "card-curve" });
    if (newest) {
      curve.append(sparkline(points), el("span", { title: about, class: "card-value" }, el("strong", { text: short(newest[1]) }), ` ${name}`));
    }
    const facts = Object.entries(stage.facts).map(([key, value]) => `${short(value)} ${key.replaceAll("_", " ")}`).join(" · ");
    return el(
      "a", { class: `card ${stage.status}`, href: runAddress(stage.run_id), data: { run: stage.run_id } },
      el("div", { class: "card-head" }, el("span", { class: "number", text: i + 1 }), el("h3", { text: stage.title }), statusMark(stage.status, stage.quiet_s)),
      el("p", { class: "hint table", text: stage.table }),
      curve,
      el("p", { class: "card-live", text: stage.status === "running" && stage.step ? `step ${stage.step}` : "" }),
      facts ? el("p", { class: "hint", text: facts }) : null,
      stage.message ? el("p", { class: "message", text: stage.message }) : null,
      figureList(costFigures(stage.cost)),
    );
  });
}

/** @param {HTMLElement} main @param {any} overview */
function draw(main, overview) {
  const running = overview.stages.filter((/** @type {any} */ s) => s.status === "running").length;
  const done = overview.stages.filter((/** @type {any} */ s) => s.status === "done").length;
  const intro = overview.stages.length
    ? `${done} of ${overview.stages.length} stages done${running ? `, ${running} running now` : ""}. Every number here was measured on this run; click a stage to see it work.`
    : "No stage has run in this workspace yet. Start one with `trivium run recipes/tiny.toml`; it appears here as it works.";
  const sections = [el("h1", { text: "From raw text to an aligned model" }), el("p", { class: "lead", text: intro })];
  if (overview.stages.length) sections.push(el("div", { class: "cards" }, ...cards(overview)));
  if (overview.missing.length && overview.stages.length) {
    const names = overview.missing.map((/** @type {any} */ m) => el("li", { text: m.title, title: m.about }));
    sections.push(el("p", { class: "hint missing-head", text: "Not run in this workspace:" }), el("ul", { class: "missing" }, ...names));
  }
  if (overview.lineage.nodes.length > 1) {
    const narrow = window.innerWidth < 760;
    sections.push(el("h2", { text: "What was made from what" }), el("div", { class: "scroll" }, lineageGraph(overview.lineage, narrow)));
  }
  if (overview.older) sections.push(el("p", { class: "hint", text: `${overview.older} earlier runs are kept; each stage's page links to its own.` }));
  main.replaceChildren(...sections);
}

/** @param {HTMLElement} main */
export async function overviewPage(main) {
  draw(main, await (await fetch("/api/overview")).json());
  listen({
    onOverview: (overview) => draw(main, overview),
    onEvents: ({ run_id, events }) => {
      const metrics = events.filter((/** @type {any} */ e) => e.kind === "metric");
      const card = main.querySelector(`[data-run="${CSS.escape(run_id)}"] .card-live`);
      if (!card || !metrics.length) return;
      const step = metrics.at(-1).step;
      const newest = metrics.filter((/** @type {any} */ m) => m.step === step).slice(0, 3);
      card.textContent = `step ${step}: ${newest.map((/** @type {any} */ m) => `${m.name} ${short(m.value)}`).join(", ")}`;
    },
  });
}
