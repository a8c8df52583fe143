// The chat page: one message goes to every column, and each column answers in its own conversation.
// Texts of models and of people enter the page as text only, never as markup.

import { ask } from "./stream.js";

/** @typedef {{id: string, trivium: {kind: string, stage: string, run_id: string, context: number}}} Model */

/** @template {HTMLElement} T @param {string} id @returns {T} */
const byId = (id) => /** @type {T} */ (document.getElementById(id));

/** @param {string} tag @param {string} [kind] @param {string} [text] */
function make(tag, kind = "", text = "") {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text) node.textContent = text;
  return node;
}

const FIRST_COLUMNS = 4;

const STAGES = {
  pretrain: "has only read text; it continues it",
  sft: "was shown ideal answers",
  dpo: "learnt from rankings, directly",
  ppo: "learnt from rankings, by reward",
  grpo: "learnt from checked answers",
  rejection_sampling: "learnt from its own best answers",
  constitutional_ai: "learnt from written principles",
};

/** One model's conversation. */
class Column {
  /** @param {Model[]} models @param {string} chosen */
  constructor(models, chosen) {
    this.models = models;
    /** @type {{role: string, content: string}[]} */
    this.messages = [];
    /** @type {AbortController|null} */
    this.running = null;
    this.select = /** @type {HTMLSelectElement} */ (make("select"));
    this.select.setAttribute("aria-label", "Model of this column");
    for (const model of models) this.select.append(new Option(model.id, model.id, false, model.id === chosen));
    this.select.addEventListener("change", () => this.reset());
    this.close = make("button", "quiet", "×");
    this.close.setAttribute("aria-label", "Remove this column");
    this.about = make("p", "about");
    this.log = make("div", "log");
    this.log.setAttribute("role", "log");
    this.node = make("section", "column");
    const head = make("div", "column-head");
    head.append(this.select, this.close);
    this.node.append(head, this.about, this.log);
    this.reset();
  }

  /** Begin a new conversation with the model chosen. */
  reset() {
    this.stop();
    this.messages = [];
    this.log.replaceChildren();
    this.node.dataset.model = this.select.value;
    const model = this.models.find((m) => m.id === this.select.value);
    const words = /** @type {any} */ (STAGES)[model?.trivium.stage ?? ""] ?? "";
    this.about.textContent = model?.trivium.kind === "base" ? `base model: ${words}, so it is asked as “Question: … Answer:”` : words || "chat model";
  }

  stop() {
    this.running?.abort();
  }

  /**
   * Ask this column's model; resolves when the answer has ended, however it did.
   * @param {string} text
   * @param {{temperature: number, maxTokens: number|null, system: string}} settings
   */
  async send(text, settings) {
    this.messages.push({ role: "user", content: text });
    this.log.append(make("p", "said user", text));
    const bubble = make("p", "said assistant waiting");
    const note = make("p", "note");
    this.log.append(bubble, note);
    const messages = settings.system ? [{ role: "system", content: settings.system }, ...this.messages] : [...this.messages];
    const running = new AbortController();
    this.running = running;
    const began = performance.now();
    let answer = "";
    let failed = false;
    try {
      const end = await ask({
        model: this.select.value, messages, temperature: settings.temperature, maxTokens: settings.maxTokens, signal: running.signal,
        onText: (piece) => {
          answer += piece;
          bubble.textContent = answer.trimStart();
          bubble.classList.remove("waiting");
          this.follow();
        },
      });
      const seconds = (performance.now() - began) / 1000;
      note.textContent = `${end.tokens} tokens, ${seconds.toFixed(1)} s${end.reason === "length" ? ", cut at its longest" : ""}`;
    } catch (error) {
      const stopped = running.signal.aborted;
      note.textContent = stopped ? "stopped" : String(/** @type {Error} */ (error).message);
      note.classList.toggle("failed", !stopped);
      failed = !answer;
    } finally {
      bubble.classList.remove("waiting");
      if (!answer) bubble.textContent = failed ? "" : "(an empty answer)";
      bubble.classList.toggle("empty", !answer);
      // A turn that came to nothing is not part of the conversation that goes on.
      if (failed) this.messages.pop();
      else this.messages.push({ role: "assistant", content: answer.trim() });
      bubble.dataset.ended = "true";
      if (this.running === running) this.running = null;
      this.follow();
    }
  }

  /** Keep the newest text in sight, unless the reader has scrolled up. */
  follow() {
    const { scrollHeight, scrollTop, clientHeight } = this.log;
    if (scrollHeight - scrollTop - clientHeight < 120) this.log.scrollTop = scrollHeight;
  }
}

async function start() {
  const place = byId("columns");
  /** @type {Column[]} */
  let columns = [];
  /** @type {{data: Model[]}} */
  const { data: models } = await (await fetch("/v1/models")).json();
  const prompt = /** @type {HTMLTextAreaElement} */ (byId("prompt"));
  const [send, stop] = [byId("send"), byId("stop")];

  const add = (/** @type {string} */ chosen) => {
    const column = new Column(models, chosen);
    column.close.addEventListener("click", () => {
      if (columns.length === 1) return;
      column.stop();
      columns = columns.filter((c) => c !== column);
      column.node.remove();
    });
    columns.push(column);
    place.append(column.node);
    return column;
  };
  for (const model of models.slice(0, FIRST_COLUMNS)) add(model.id);

  const settings = () => ({
    temperature: Number(/** @type {HTMLInputElement} */ (byId("temperature")).value),
    // Left empty, the server takes what the context leaves.
    maxTokens: Math.max(0, Math.round(Number(/** @type {HTMLInputElement} */ (byId("max-tokens")).value))) || null,
    system: /** @type {HTMLTextAreaElement} */ (byId("system")).value.trim(),
  });
  const grow = () => {
    prompt.style.height = "auto";
    prompt.style.height = `${Math.min(prompt.scrollHeight + 2, 160)}px`;
  };
  const submit = async () => {
    const text = prompt.value.trim();
    if (!text || columns.some((c) => c.running)) return;
    prompt.value = "";
    grow();
    send.hidden = true;
    stop.hidden = false;
    await Promise.all(columns.map((column) => column.send(text, settings())));
    send.hidden = false;
    stop.hidden = true;
  };

  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  prompt.addEventListener("input", grow);
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  stop.addEventListener("click", () => columns.forEach((c) => c.stop()));
  byId("fresh").addEventListener("click", () => {
    columns.forEach((c) => c.reset());
    prompt.focus();
  });
  byId("add").addEventListener("click", () => {
    const shown = new Set(columns.map((c) => c.select.value));
    add((models.find((m) => !shown.has(m.id)) ?? models[0]).id).node.scrollIntoView({ inline: "end" });
  });
  byId("temperature").addEventListener("input", () => {
    byId("temperature-value").textContent = String(settings().temperature);
  });
}

start().catch((error) => byId("columns").append(make("p", "note failed", `The page could not start: ${error.message}`)));
