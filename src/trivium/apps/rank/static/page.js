/** The ranking page. All text from prompts, models and people goes in by textContent. */
import { Door } from "./account.js";
import { Refusal, fetchTask, newKey, post } from "./api.js";
import { draggable, target } from "./drag.js";
import { offerTexts } from "./ideal.js";
import { onFlag, openFlag } from "./flag.js";
import { fill } from "./markup.js";
import { drawProgress } from "./progress.js";
import { Ranking } from "./ranking.js";
import { bind, settings } from "./settings.js";

/** @param {string} id @returns {any} */
const at = (id) => document.getElementById(id);
const ORDINALS = ["", "1st", "2nd", "3rd"];
const ordinal = (/** @type {number} */ rank) => ORDINALS[rank] ?? `${rank}th`;
const SPEAKERS = { user: "User", assistant: "Assistant", system: "Instructions", tool: "Tool" };

const SHUT =
  "The first questions had known answers, and too many of yours differ. Please talk to whoever invited you.";

let annotator = "";
/** @typedef {import("./markup.js").Tree[] | null} Markup */
/** @type {{id: string, messages: {role: string, content: string, tree: Markup}[], responses: {text: string, tree: Markup, cut_off: boolean}[], instructions: {text: string, tree: Markup} | null} | null} */
let task = null;
let ranking = new Ranking(0);
let key = "";
let busy = false;
let seconds = 0;

/** @param {string} tag @param {string} [className] @param {string} [text] */
function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

/** @param {string} text @param {boolean} [bad] */
function say(text, bad = false) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", bad);
}

/** @param {"work" | "done" | "trouble" | "door"} which */
function show(which) {
  for (const id of ["work", "done", "trouble", "door"]) at(id).hidden = id !== which;
  at("clock").parentElement.hidden = which !== "work";
  at("bar").parentElement.hidden = which === "door";
}

/** @param {Error} error */
function inTrouble(error) {
  at("trouble-text").textContent = error.message;
  show("trouble");
}

function drawTask() {
  if (!task) return;
  at("conversation").replaceChildren(
    ...task.messages.map((message) => {
      const item = element("li", `turn ${message.role}`);
      const words = element("div", "text");
      fill(words, message.content, message.tree, settings.formatted);
      words.dir = "auto";
      item.append(element("span", "speaker", SPEAKERS[message.role] ?? message.role), words);
      return item;
    }),
  );
  at("responses").replaceChildren(...task.responses.map(card));
  offerTexts(task.responses.map((each) => each.text));
  const told = task.instructions;
  at("instructions").hidden = !told;
  if (told) fill(at("instructions-text"), told.text, told.tree, settings.formatted);
}

/** @param {{text: string, tree: Markup, cut_off: boolean}} response @param {number} index */
function card(response, index) {
  const made = element("article", "card");
  made.id = `response-${index + 1}`;
  const title = element("h3", "", `Response ${index + 1}`);
  title.id = `title-${index + 1}`;
  made.setAttribute("aria-labelledby", title.id);
  const badge = element("span", "badge");
  const head = element("header");
  head.append(element("kbd", "", String(index + 1)), title, badge);
  const words = element("div", "text");
  fill(words, response.text, response.tree, settings.formatted);
  words.dir = "auto";
  words.id = `text-${index + 1}`;
  if (!response.text.trim()) words.append(element("em", "quiet", "(empty)"));
  const button = element("button", "place");
  button.setAttribute("type", "button");
  button.setAttribute("aria-describedby", words.id);
  button.addEventListener("click", (event) => {
    event.stopPropagation();
    // After a click of the mouse, Enter must submit and not press this button again.
    if (event.detail) button.blur();
    place(index);
  });
  // The whole card is a target for the mouse, unless somebody is selecting text to read along, or follows a link.
  made.addEventListener("click", (event) => {
    if (event.target instanceof Element && event.target.closest("a")) return;
    if (getSelection()?.isCollapsed ?? true) place(index);
  });
  head.append(button);
  draggable(made, head, index, move);
  made.append(head, words);
  if (response.cut_off) made.append(element("p", "cut quiet", "cut off at the length limit"));
  return made;
}

function drawRanking() {
  const left = ranking.left();
  const whole = ranking.complete();
  document.querySelectorAll(".card").forEach((card, index) => {
    const rank = ranking.rank(index);
    const last = !rank && whole !== null;
    const tied = ranking.groups.some((group) => group.length > 1 && group.includes(index));
    card.classList.toggle("placed", rank > 0);
    card.classList.toggle("first", rank === 1);
    const badge = card.querySelector(".badge");
    if (badge) badge.textContent = rank ? `${ordinal(rank)}${tied ? " (tie)" : ""}` : last ? "last" : "";
    const button = card.querySelector(".place");
    if (!button) return;
    button.setAttribute("aria-pressed", String(rank > 0));
    const next = ranking.groups.flat().length + 1;
    const action = rank ? "Take back" : ranking.tied ? "Tie with the one before" : `Place ${ordinal(next)}`;
    button.textContent = action;
    button.setAttribute("aria-label", `${action}: response ${index + 1}`);
  });
  drawOrder(left, whole);
  at("tie").setAttribute("aria-pressed", String(ranking.tied));
  at("tie").disabled = !ranking.groups.length || !left.length;
  at("undo").disabled = !ranking.past.length;
  at("none").setAttribute("aria-pressed", String(ranking.noneAcceptable));
  at("submit").disabled = busy || !(whole || (ranking.noneAcceptable && !ranking.groups.length));
}

/** @param {number[]} left @param {number[][] | null} whole */
function drawOrder(left, whole) {
  /** @type {Node[]} */
  const parts = [];
  ranking.groups.forEach((group, number) => {
    if (number) parts.push(element("span", "than", ">"));
    group.forEach((index, place) => {
      if (place) parts.push(element("span", "than", "="));
      parts.push(element("span", "chip", String(index + 1)));
    });
  });
  if (whole && left.length) {
    parts.push(element("span", "than", ranking.tied ? "=" : ">"), element("span", "chip ghost", String(left[0] + 1)));
  } else if (left.length) {
    if (ranking.groups.length) parts.push(element("span", "than", ranking.tied ? "=" : ">"));
    parts.push(...left.map(() => element("span", "chip open", "·")));
  }
  if (ranking.noneAcceptable) parts.push(element("span", "verdict", "none acceptable"));
  at("order").replaceChildren(...parts);
}

function sayWhatIsLeft() {
  const left = ranking.left().length;
  if (ranking.noneAcceptable && !ranking.groups.length) return "Enter submits “none acceptable”.";
  if (ranking.complete()) return left ? "The last one takes the last place. Enter submits." : "All placed. Enter submits.";
  if (ranking.noneAcceptable) return `Place the ${left} left over, or undo the order: with “none” it is optional.`;
  return ranking.groups.length ? `${left} left.` : "Pick the best response first.";
}

/** @param {number} index */
function place(index) {
  if (!task || busy || index >= task.responses.length) return;
  ranking.toggle(index);
  drawRanking();
  const rank = ranking.rank(index);
  if (settings.fast && task.responses.length === 2 && rank === 1 && ranking.groups.length === 1) return void submit();
  say(`Response ${index + 1} ${rank ? `placed ${ordinal(rank)}` : "taken back"}. ${sayWhatIsLeft()}`);
}

/** @param {number} index @param {number} other the response it comes right before, or -1 for the next place */
function move(index, other) {
  if (!task || busy || index >= task.responses.length) return;
  ranking.moveBefore(index, other);
  drawRanking();
  say(`Response ${index + 1} placed ${ordinal(ranking.rank(index))}. ${sayWhatIsLeft()}`);
}

function tie() {
  if (busy) return;
  const possible = ranking.tie();
  drawRanking();
  if (!possible) say(ranking.groups.length ? "All are placed; undo first." : "A tie needs a response before it.");
  else say(ranking.tied ? "The next response ties with the one before." : `No tie. ${sayWhatIsLeft()}`);
}

function undo() {
  if (busy) return;
  const undone = ranking.undo();
  drawRanking();
  say(undone ? `Undone. ${sayWhatIsLeft()}` : "There is nothing to undo.");
}

function none() {
  if (busy) return;
  ranking.none();
  drawRanking();
  say(sayWhatIsLeft());
}

/** Send, with everything held still meanwhile. @param {() => Promise<unknown>} send */
async function hold(send) {
  if (busy || !task) return false;
  busy = true;
  drawRanking();
  try {
    await send();
    return true;
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    say(`Not saved: ${error.message}`, true);
    return false;
  } finally {
    busy = false;
    drawRanking();
  }
}

async function submit() {
  const current = task;
  const whole = ranking.complete();
  if (!current || busy) return;
  if (!whole && !(ranking.noneAcceptable && !ranking.groups.length)) {
    say(sayWhatIsLeft(), true);
    return;
  }
  const sent = await hold(() =>
    post("/api/rank", {
      task: current.id,
      annotator,
      groups: whole ?? [],
      none_acceptable: ranking.noneAcceptable,
      rationale: at("rationale").value,
      seconds: Math.round(seconds * 10) / 10,
      key,
    }),
  );
  if (sent) await next("Saved.");
}

async function saveIdeal() {
  const current = task;
  const response = at("ideal").value;
  if (!current) return;
  if (!response.trim()) {
    say("The ideal response is empty.", true);
    return;
  }
  const from = at("start-from").value;
  const edited = from && response !== current.responses[Number(from)].text ? { edited: Number(from) } : {};
  const sent = await hold(() => post("/api/demonstration", { task: current.id, annotator, response, ...edited }));
  if (!sent) return;
  at("ideal").value = "";
  at("demonstrate").open = false;
  at("prompt-title").focus({ preventScroll: true });
  say("Ideal response saved. Thank you.");
}

/** Fetch and show the next task. @param {string} [news] */
async function next(news = "") {
  let answer;
  try {
    answer = await fetchTask(annotator);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    return inTrouble(error);
  }
  task = answer.task;
  ranking = new Ranking(task ? task.responses.length : 0);
  key = newKey();
  seconds = 0;
  at("clock").textContent = "0:00";
  drawProgress(answer.progress);
  if (answer.shut) at("done-text").textContent = SHUT;
  for (const id of ["rationale", "ideal"]) at(id).value = "";
  for (const id of ["why", "demonstrate"]) at(id).open = false;
  show(task ? "work" : "done");
  if (task) {
    drawTask();
    drawRanking();
    say(`${news} ${sayWhatIsLeft()}`.trim());
  }
  scrollTo(0, 0);
  at(task ? "prompt-title" : "done-title").focus({ preventScroll: true });
}

/** @param {string} name */
function enter(name) {
  annotator = name;
  if (!door.account) localStorage.setItem("trivium-annotator", name);
  at("who").textContent = name;
  at("who").hidden = false;
  next();
}

function askName() {
  at("name").value = annotator;
  at("name-dialog").showModal();
  at("name").select();
}

function openDemonstration() {
  at("demonstrate").open = true;
  at("ideal").focus();
}

/** @type {Record<string, () => unknown>} */
const KEYS = {
  "=": tie, t: tie, Backspace: undo, n: none, s: () => at("skip-dialog").showModal(), d: openDemonstration,
  i: () => at("instructions").toggleAttribute("open"), f: () => openFlag(task?.responses.length ?? 0),
  "?": () => at("help-dialog").showModal(), Enter: submit,
};

document.addEventListener("keydown", (event) => {
  const target = /** @type {HTMLElement} */ (event.target);
  if (target.id === "ideal" && event.key === "Enter" && (event.ctrlKey || event.metaKey)) saveIdeal();
  if (event.key === "Escape" && ["ideal", "rationale"].includes(target.id)) at("prompt-title").focus();
  if (!task || at("work").hidden || !settings.shortcuts || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.querySelector("dialog[open]") || target.matches("input, textarea, select")) return;
  if (event.key === "Enter" && target.closest("button, summary, a")) return;
  const digit = /^[1-9]$/.test(event.key) ? Number(event.key) : 0;
  const action = digit ? () => place(digit - 1) : KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

// While the task is read its place is kept; a closed or forgotten page lets it go.
setInterval(() => {
  if (!document.hidden && task) post("/api/keep", { task: task.id, annotator }).catch(() => {});
}, 300_000);

setInterval(() => {
  if (document.hidden || !task) return;
  seconds += 0.5;
  const whole = Math.floor(seconds);
  at("clock").textContent = `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}, 500);

/** @type {[string, () => unknown][]} */
const BUTTONS = [
  ["undo", undo], ["tie", tie], ["none", none], ["submit", submit], ["save-ideal", saveIdeal], ["who", () => door.openAccount() || askName()], ["join", () => door.join()], ["sign-out", () => door.signOut()],
  ["skip", KEYS.s], ["flag", KEYS.f], ["help-open", KEYS["?"]], ["again", () => next()], ["retry", () => next()],
];
for (const [id, action] of BUTTONS) {
  at(id).addEventListener("click", (/** @type {MouseEvent} */ event) => {
    if (event.detail) at(id).blur();
    action();
  });
}
document.querySelectorAll("[data-close]").forEach((button) => {
  button.addEventListener("click", () => button.closest("dialog")?.close());
});
target(at("order"), (index) => move(index, -1));
bind((name) => {
  if (name !== "formatted") return;
  drawTask();
  drawRanking();
});
at("name-dialog").addEventListener("cancel", (/** @type {Event} */ event) => { if (!annotator) event.preventDefault(); });
at("name-dialog").addEventListener("close", () => { if (!annotator) askName(); });
at("name-dialog").querySelector("form").addEventListener("submit", () => enter(at("name").value.trim() || "annotator"));
onFlag(async (response, reason) => {
  const current = task;
  if (!current || !(await hold(() => post("/api/flag", { task: current.id, annotator, response, reason })))) return;
  say(`Response ${response + 1} is flagged as harmful. The ranking is still yours to give.`);
});
at("skip-dialog").querySelector("form").addEventListener("submit", async () => {
  const current = task;
  const chosen = at("skip-dialog").querySelector("input[name=reason]:checked");
  const note = at("skip-note").value.trim();
  at("skip-note").value = "";
  const reason = note ? `${chosen.value}: ${note}` : chosen.value;
  if (current && (await hold(() => post("/api/skip", { task: current.id, annotator, reason })))) await next("Skipped.");
});

const door = new Door(enter, () => show("door"));
door
  .open()
  .then((closed) => {
    if (closed) return;
    const known = document.body.dataset.annotator || localStorage.getItem("trivium-annotator") || "";
    if (known) enter(known);
    else askName();
  })
  .catch(inTrouble);
