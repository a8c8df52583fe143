// Specimens: the few items of a run that are kept to be looked at, each kind drawn in its own way.

import { el, short } from "./dom.js";

/** @param {any} value @returns {string} */
const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 1));

/** A prompt is a text, a list of messages, or an object that holds them. @param {any} prompt @returns {string} */
function promptText(prompt) {
  const messages = Array.isArray(prompt) ? prompt : prompt?.messages;
  if (!Array.isArray(messages)) return asText(prompt ?? "");
  return messages.map((m) => (m?.role ? `${m.role}: ${m.content}` : asText(m))).join("\n");
}

/** @param {string} name @param {any} value @param {string} [kind] */
const field = (name, value, kind = "") => el("div", { class: `field ${kind}` }, el("h4", { text: name }), el("p", { class: "text", text: asText(value ?? "") }));

/** @param {any} v */
function dropped(v) {
  return [el("p", {}, el("span", { class: "reason", text: asText(v.reason) }), el("span", { class: "hint", text: v.source ? ` from ${v.source}` : "" })), el("p", { class: "text", text: asText(v.text ?? "") })];
}

/** @param {any} v */
function maskedConversation(v) {
  const line = el("p", { class: "tokens" });
  v.tokens.forEach((/** @type {string} */ token, /** @type {number} */ i) => {
    line.append(el("span", { class: v.trained[i] ? "token trained" : "token", text: token, title: v.trained[i] ? "trained" : "read only" }));
  });
  return [line];
}

/** @param {any} v */
function ranking(v) {
  const list = el("ol", { class: "ranks" });
  for (const group of v.groups) {
    const texts = Array.isArray(group) ? group : [group];
    list.append(el("li", {}, ...texts.map((text) => el("p", { class: "text", text: asText(text) })), texts.length > 1 ? el("span", { class: "hint", text: "a tie" }) : null));
  }
  const who = el("p", { class: "hint" }, "ranked by ", el("strong", { text: asText(v.annotator ?? "?") }), " ", el("span", { class: `kind ${v.kind}`, text: asText(v.kind ?? "") }));
  return [field("prompt", promptText(v.prompt)), list, who];
}

/** @param {any} v */
function tokens(v) {
  const line = el("p", { class: "tokens split" }, ...v.tokens.map((/** @type {string} */ token) => el("span", { class: "token", text: token })));
  return [line, el("p", { class: "hint", text: `${v.tokens.length} tokens` })];
}

/** One question with every model's answer. @param {any} v */
function generation(v) {
  const passed = v.passed ?? {};
  const answers = Object.entries(v.outputs).map(([name, text]) => {
    const verdict = name in passed ? (passed[name] ? "passed" : "failed") : "";
    const head = el("h4", { text: name }, " ", verdict ? el("span", { class: verdict, text: verdict === "passed" ? "✓ passes" : "✗ does not pass" }) : null);
    return el("div", { class: "field" }, head, el("p", { class: "text", text: asText(text) }));
  });
  return [v.task ? el("p", { class: "hint", text: v.task }) : null, field("prompt", promptText(v.prompt)), el("div", { class: "answers" }, ...answers)];
}

/** @param {any} v */
function revision(v) {
  return [field("prompt", promptText(v.prompt)), field("first answer", v.response, "before"), field("critique", v.critique), field("rewritten", v.revision, "after")];
}

/** All answers to one prompt, best first. @param {any} v */
function candidates(v) {
  const list = el("ol", { class: "ranks" });
  for (const answer of v.answers) {
    const said = el("span", { class: answer.picked ? "passed" : "hint", text: `score ${short(answer.score)}${answer.picked ? ", picked" : ""}` });
    list.append(el("li", {}, el("p", { class: "text", text: asText(answer.text) }), said));
  }
  return [field("prompt", promptText(v.prompt)), list];
}

const SIGNALS = {
  advantages: "Advantage: green tokens led to more reward than expected and become more likely; red ones less.",
  kl: "KL: where the policy and the reference disagree, in nats. Green: now more likely than before; red: less.",
  logprobs: "Log-probability under the policy, in nats: the stronger the colour, the more surprising the token was.",
  values: "Value: what the value model expected from here on.",
};

/** @param {any} v */
function rollout(v) {
  const names = Object.keys(SIGNALS).filter((name) => Array.isArray(v[name]) && v[name].length);
  const line = el("p", { class: "tokens" });
  const hint = el("p", { class: "hint" });
  const facts = (/** @type {number} */ i) => ["logprobs", "ref_logprobs", "kl", "advantages", "values"].filter((n) => Array.isArray(v[n])).map((n) => `${n} ${short(v[n][i])}`).join("\n");
  const nodes = v.tokens.map((/** @type {string} */ token, /** @type {number} */ i) => el("span", { class: "token", text: token, title: facts(i) }));
  line.append(...nodes);
  const paint = (/** @type {string} */ name) => {
    const most = Math.max(...v[name].map((/** @type {number|null} */ x) => Math.abs(x ?? 0)), 1e-9);
    nodes.forEach((/** @type {HTMLElement} */ node, /** @type {number} */ i) => {
      const x = (v[name][i] ?? 0) / most;
      node.style.setProperty("--strength", `${Math.round(Math.abs(x) * 70)}%`);
      node.dataset.sign = name === "logprobs" ? "neutral" : x < 0 ? "minus" : "plus";
    });
    hint.textContent = `${/** @type {any} */ (SIGNALS)[name]} Largest here: ${short(most)}.`;
    for (const button of bar.children) button.setAttribute("aria-pressed", String(/** @type {HTMLElement} */ (button).dataset.signal === name));
  };
  const bar = el("div", { class: "choices", role: "group", "aria-label": "What the colour shows" }, ...names.map((name) => el("button", { type: "button", data: { signal: name }, text: name, on: { click: () => paint(name) } })));
  if (names.length) paint(names[0]);
  return [field("prompt", promptText(v.prompt)), bar, line, hint, el("p", {}, "score ", el("strong", { text: short(v.score) }))];
}

/** @type {Record<string, [(v: any) => (HTMLElement|null)[], string[]]>} */
const KINDS = {
  dropped: [dropped, ["reason"]],
  masked_conversation: [maskedConversation, ["tokens", "trained"]],
  ranking: [ranking, ["groups"]],
  generation: [generation, ["outputs"]],
  tokens: [tokens, ["tokens"]],
  revision: [revision, ["revision"]],
  rollout: [rollout, ["tokens"]],
  candidates: [candidates, ["answers"]],
};

const TITLES = {
  dropped: "Dropped documents", masked_conversation: "What is trained", ranking: "Ranked groups", revision: "Revisions",
  rollout: "Rollouts", generation: "Answers side by side", candidates: "Best of many", tokens: "Text as tokens",
};

/**
 * Return one specimen; an unknown kind, or one that lacks what its kind needs, is shown as it is stored.
 * @param {string} name
 * @param {any} value
 * @returns {HTMLElement}
 */
export function specimen(name, value) {
  const [draw, needs] = KINDS[name] ?? [null, []];
  const body = draw && value && needs.every((key) => value[key] !== undefined) ? draw(value) : [generic(value)];
  return el("article", { class: `specimen ${KINDS[name] ? name : ""}` }, ...body);
}

/** @param {any} value @returns {HTMLElement} */
function generic(value) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return el("p", { class: "text", text: asText(value) });
  return el("div", {}, ...Object.entries(value).map(([key, item]) => field(key, item)));
}

/**
 * Return the section of one kind of specimens: one at a time, with buttons to turn the pages.
 * @param {string} name
 * @param {{about: string, rows: {step: number, value: any}[]}} kind
 * @returns {HTMLElement}
 */
export function specimenSection(name, kind) {
  let at = 0;
  const place = el("span", { class: "place" });
  const holder = el("div");
  const show = (/** @type {number} */ next) => {
    at = (next + kind.rows.length) % kind.rows.length;
    place.textContent = `${at + 1} of ${kind.rows.length}${kind.rows[at].step ? `, step ${kind.rows[at].step}` : ""}`;
    holder.replaceChildren(specimen(name, kind.rows[at].value));
  };
  const turn = (/** @type {string} */ label, /** @type {string} */ text, /** @type {number} */ by) => el("button", { type: "button", "aria-label": label, text, on: { click: () => show(at + by) } });
  const arrows = kind.rows.length > 1 ? [turn("previous", "←", -1), turn("next", "→", 1)] : [null, null];
  const pager = el("div", { class: "pager" }, arrows[0], place, arrows[1]);
  const title = /** @type {any} */ (TITLES)[name] ?? name.replaceAll("_", " ");
  const section = el("section", { class: "panel", data: { specimens: name } }, el("div", { class: "panel-head" }, el("h3", { text: title }), pager), el("p", { class: "hint", text: kind.about }), holder);
  show(0);
  return section;
}
