// One stage's page: what it does, its curves as they grow, samples along the way, specimens, results, and the fine print.

import { Curve, drawIntervals, onColoursChanged } from "./charts.js";
import { costFigures, el, figureList, runAddress, short, statusMark } from "./dom.js";
import { listen } from "./live.js";
import { Samples } from "./samples.js";
import { specimenSection } from "./specimens.js";

/** @param {any} results @returns {HTMLElement[]} */
export function resultSections(results) {
  /** @type {Map<string, any[]>} */
  const groups = new Map();
  for (const result of results) {
    const key = `${result.task} · ${result.metric}`;
    groups.set(key, [...(groups.get(key) ?? []), result]);
  }
  return [...groups].map(([key, rows]) => {
    const plot = el("div", { class: "plot" });
    const table = el(
      "table", {},
      el("thead", {}, el("tr", {}, ...["stage", "value", "95% interval", "items"].map((text) => el("th", { text, scope: "col" })))),
      el("tbody", {}, ...rows.map((r) => el("tr", {}, el("th", { text: r.checkpoint || r.table || "", scope: "row" }), el("td", { text: short(r.value) }),
        el("td", { text: r.low === null || r.high === null ? "none" : `${short(r.low)} to ${short(r.high)}` }), el("td", { text: r.n || "" })))),
    );
    const section = el("section", { class: "panel result" }, el("h3", { text: key }), plot, el("details", {}, el("summary", { text: "numbers" }), table));
    const drawNow = () => drawIntervals(plot, rows.map((r) => ({ label: `${r.checkpoint || r.table || ""}  ${short(r.value)}`, value: r.value, low: r.low, high: r.high })));
    queueMicrotask(drawNow);
    onColoursChanged(drawNow);
    return section;
  });
}

/** @param {Record<string, number>} counts @returns {HTMLElement} */
function bars(counts) {
  const rows = Object.entries(counts).sort((a, b) => b[1] - a[1]);
  const most = Math.max(...rows.map((r) => r[1]), 1);
  return el("div", { class: "bars" }, ...rows.flatMap(([name, n]) => {
    const bar = el("span", { class: "bar" });
    bar.style.setProperty("width", `${(100 * n) / most}%`);
    return [el("span", { text: name }), el("span", { class: "track" }, bar), el("span", { class: "count", text: short(n) })];
  }));
}

/** @param {any} value @returns {boolean} */
const isCounts = (value) => value && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length > 0 && Object.values(value).every((v) => typeof v === "number");

/** Summaries are small and of any shape: counts become bars, plain values figures, the rest is shown as stored. @param {any} summary @returns {HTMLElement[]} */
function summarySections(summary, prefix = "") {
  const sections = [];
  const plain = Object.entries(summary).filter(([, v]) => v === null || typeof v !== "object");
  if (plain.length) sections.push(figureList(plain.map(([k, v]) => [k.replaceAll("_", " "), short(v)])));
  for (const [key, value] of Object.entries(summary)) {
    if (value === null || typeof value !== "object") continue;
    const title = `${prefix}${key}`.replaceAll("_", " ");
    if (isCounts(value)) sections.push(el("div", {}, el("h4", { text: title }), bars(/** @type {any} */ (value))));
    else if (!Array.isArray(value) && !prefix) sections.push(...summarySections(value, `${key}, `));
    else sections.push(el("details", {}, el("summary", { text: title }), el("pre", { class: "text", text: JSON.stringify(value, null, 1) })));
  }
  return sections;
}

/** @param {string} title @param {any} data */
const folded = (title, data) => el("details", { class: "panel" }, el("summary", { text: title }), el("pre", { class: "text", text: typeof data === "string" ? data : JSON.stringify(data, null, 1) }));

/** @param {any} run @returns {HTMLElement} */
function relatives(run) {
  const link = (/** @type {any} */ r, /** @type {string} */ text) => (r.run_id ? el("a", { href: runAddress(r.run_id), text }) : el("span", { text }));
  const row = (/** @type {string} */ name, /** @type {HTMLElement[]} */ links) => (links.length ? el("div", {}, el("dt", { text: name }), el("dd", {}, ...links.flatMap((a, i) => (i ? [", ", a] : [a])))) : null);
  return el("dl", { class: "figures" },
    row("made from", run.made_from.map((/** @type {any} */ r) => link(r, `${r.label} (${r.field})`))),
    row("used by", run.used_by.map((/** @type {any} */ r) => link(r, r.table))),
    row("other runs of this stage", run.others.map((/** @type {any} */ r) => link(r, `${r.run_id} (${r.status})`))),
  );
}

/** @param {any} run @returns {HTMLElement[]} */
function papers(run) {
  const files = run.artifacts.map((/** @type {any} */ a) => `${a.path}  ${a.bytes} bytes  sha256 ${a.sha256}`).join("\n");
  const { config, inputs, seed, settings, code, host, fingerprint, started_at, finished_at } = run;
  return [folded("Configuration, as it was resolved", config), files ? folded("Files it left", files) : null,
    folded("Where it comes from", { run_id: run.run_id, fingerprint, seed, settings, inputs, code, host, started_at, finished_at })].filter((x) => x !== null);
}

/** @param {HTMLElement} main */
export async function runPage(main) {
  const id = document.body.dataset.run ?? "";
  const address = `/api/runs/${encodeURIComponent(id)}`;
  /** @type {Map<string, Curve>} */
  let curves = new Map();
  /** @type {Map<string, Samples>} */
  let samples = new Map();
  let run = await (await fetch(address)).json();
  let seen = `${run.status}${run.finished_at}`;
  const closer = el("div");
  let shownSpecimens = "";

  /** Specimens are few and come rarely: they are drawn anew when there are more of them. */
  const drawSpecimens = () => {
    const kinds = Object.entries(run.specimens);
    const counts = kinds.map(([name, kind]) => `${name} ${/** @type {any} */ (kind).rows.length}`).join();
    if (counts === shownSpecimens) return;
    shownSpecimens = counts;
    closer.replaceChildren(el("h2", { text: "A closer look" }), el("div", { class: "stack" }, ...kinds.map(([name, kind]) => specimenSection(name, /** @type {any} */ (kind)))));
  };
  setInterval(async () => {
    if (run.status !== "running" || document.hidden) return;
    run.specimens = (await (await fetch(address)).json()).specimens;
    drawSpecimens();
  }, 10_000);

  const draw = () => {
    curves = new Map(Object.entries(run.curves).map(([name, curve]) => [name, new Curve(name, /** @type {any} */ (curve))]));
    samples = new Map(Object.entries(run.samples).map(([name, rows]) => [name, new Samples(name, /** @type {any} */ (rows))]));
    const open = document.querySelectorAll("details[open]").length;
    const scrolled = window.scrollY;
    shownSpecimens = "";
    drawSpecimens();
    const section = (/** @type {string} */ title, /** @type {(HTMLElement|null)[]} */ nodes, kind = "stack") => (nodes.length ? [el("h2", { text: title }), el("div", { class: kind }, ...nodes)] : []);
    main.replaceChildren(
      el("p", { class: "hint" }, el("a", { href: "/", text: "Pipeline" }), ` / ${run.table}`),
      el("div", { class: "title" }, el("h1", { text: run.title }), statusMark(run.status, run.quiet_s)),
      el("p", { class: "lead", text: run.about }),
      run.watch ? el("p", { class: "watch" }, el("strong", { text: "Watch: " }), run.watch) : "",
      run.message ? el("p", { class: "message", text: run.message }) : "",
      figureList(costFigures(run.cost)), relatives(run),
      ...section("Curves", [...curves.values()].map((c) => c.node), "curves"),
      ...section("Measured", resultSections(run.results), "grid"),
      ...section("In numbers", summarySections(run.summary)),
      ...section("Samples along the way", [...samples.values()].map((s) => s.node)),
      closer,
      ...section("The fine print", papers(run)),
    );
    if (open) for (const details of document.querySelectorAll("details")) details.open = true;
    for (const curve of curves.values()) curve.draw();
    window.scrollTo(0, scrolled);
  };
  const reload = async () => {
    run = await (await fetch(address)).json();
    draw();
  };
  draw();
  onColoursChanged(() => curves.forEach((curve) => curve.draw()));

  listen({
    run: id, cursor: run.cursor,
    onOverview: (overview) => {
      const now = overview.lineage.nodes.find((/** @type {any} */ n) => n.run_id === id);
      if (now && `${now.status}${now.finished_at}` !== seen) {
        seen = `${now.status}${now.finished_at}`;
        reload();
      }
    },
    onEvents: ({ cut, events: all }) => {
      const events = all.filter((/** @type {any} */ e) => e.kind !== "notice"); // for the log's reader: no curve, no sample
      // A log that was cut, or a name that is new, changes the page's shape: draw all of it again.
      const known = events.every((/** @type {any} */ e) => (e.kind === "metric" ? curves : samples).has(e.name));
      if (cut || !known) return void reload();
      const grown = new Map();
      for (const event of events) {
        if (event.kind === "metric") grown.set(event.name, [...(grown.get(event.name) ?? []), [event.step, event.value]]);
        else samples.get(event.name)?.append(event);
      }
      for (const [name, points] of grown) curves.get(name)?.append(points);
    },
  });
}
