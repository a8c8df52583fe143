/** The lead's page: how a collection stands, who judged how, what is disputed. All words go in as text. */
import { Refusal, fetchReview, fetchSession, newKey, post } from "./api.js";
import { fill } from "./markup.js";

/** @param {string} id @returns {any} */
const at = (id) => document.getElementById(id);

let lead = "lead";

/** @param {string} tag @param {string} [className] @param {string} [text] */
function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

/** @param {number | null | undefined} value @param {number} [digits] */
const number = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
/** @param {number | null | undefined} value */
const percent = (value) => (value === null || value === undefined ? "–" : `${Math.round(100 * value)}%`);
/** @param {{value: number, low: number, high: number} | null} e @param {(x: number) => string} shown */
const estimate = (e, shown) => (e ? `${shown(e.value)} [${shown(e.low)}, ${shown(e.high)}]` : "–");

/** @param {any} found */
function drawState(found) {
  const { progress, agreement, retest, bias } = found;
  const tiles = [
    ["tasks done", `${progress.done} of ${progress.tasks}`],
    ["rankings", String(progress.rankings)],
    ["skipped", String(progress.skips)],
    ["seconds a task", number(progress.mean_seconds, 0)],
    ["pairs agreed on", estimate(agreement.pairwise, percent)],
    ["Krippendorff's alpha", estimate(agreement.alpha, number)],
    ["the same after a while", estimate(retest.pairwise, percent)],
    ["first place on the screen wins", estimate(bias.position, percent)],
    ["the longer one wins", estimate(bias.length, percent)],
  ];
  at("state").replaceChildren(
    ...tiles.map(([name, value]) => {
      const tile = element("div");
      tile.append(element("dt", "", name), element("dd", "", value));
      return tile;
    }),
  );
}

const QUESTIONS = {
  position: "prefers a place on the screen",
  length: "prefers by length",
  agreement: "agrees with the others less than they do among themselves",
  drift: "has changed over time",
};

/** @param {any[]} findings */
function drawFindings(findings) {
  const alarms = findings.filter((each) => each.alarm);
  at("findings").replaceChildren(
    ...alarms.map((each) => {
      const who = each.annotator ?? "everybody together";
      const what = QUESTIONS[/** @type {keyof typeof QUESTIONS} */ (each.question)] ?? `leans to ${each.question}`;
      return element("li", "", `${who} ${what} (p = ${each.p_adjusted.toPrecision(2)}, ${each.n} judgements)`);
    }),
  );
  const asked = findings.length === 1 ? "1 question" : `${findings.length} questions`;
  if (!alarms.length) at("findings").append(element("li", "quiet", `Nothing stands out in ${asked}.`));
}

const COLUMNS = /** @type {[string, (each: any) => string][]} */ ([
  ["rankings", (each) => String(each.rankings)],
  ["seconds each", (each) => number(each.mean_seconds, 0)],
  ["agrees with others", (each) => number(each.agreement_with_others)],
  ["reliability", (each) => percent(each.reliability?.accuracy)],
  ["known answers right", (each) => percent(each.known_right)],
  ["too fast", (each) => percent(each.too_fast?.value)],
]);

/** @param {any[]} people */
function drawPeople(people) {
  const head = element("tr");
  head.append(element("th", "", "annotator"), ...COLUMNS.map(([name]) => element("th", "number", name)));
  head.querySelectorAll("th").forEach((cell) => cell.setAttribute("scope", "col"));
  const rows = people.map((each) => {
    const row = element("tr");
    const name = element("th", "", each.annotator);
    name.setAttribute("scope", "row");
    row.append(name, ...COLUMNS.map(([, value]) => element("td", "number", value(each))));
    return row;
  });
  at("people").replaceChildren(head, ...rows);
}

/** @param {number[][]} groups */
const written = (groups) => groups.map((group) => group.map((place) => place + 1).join(" = ")).join(" > ");

/** Read an order such as "2 > 1 = 3". @param {string} text @param {number} count @returns {number[][] | null} */
function readOrder(text, count) {
  const groups = text.split(">").map((group) => group.split("=").map((place) => Number(place.trim()) - 1));
  const named = groups.flat();
  const whole = named.length === count && new Set(named).size === count;
  return whole && named.every((place) => Number.isInteger(place) && place >= 0 && place < count) ? groups : null;
}

/** @param {any} item @param {number} index */
function dispute(item, index) {
  const made = element("details", "dispute");
  const last = item.messages[item.messages.length - 1].content;
  made.append(element("summary", "", `${last.slice(0, 120)} (agreement ${number(item.agreement)})`));
  const answers = element("div", "answers");
  item.responses.forEach((/** @type {any} */ response, /** @type {number} */ place) => {
    const box = element("div");
    const words = element("div", "text");
    words.dir = "auto";
    words.tabIndex = 0;
    fill(words, response.text, response.tree, true);
    box.append(element("h3", "", `Response ${place + 1}`), words);
    answers.append(box);
  });
  const orders = element("ul", "orders");
  orders.append(...item.rankings.map((/** @type {any} */ each) => element("li", "", `${each.annotator}: ${written(each.groups)}`)));
  const form = element("form");
  const label = element("label", "", "Your order, best first ");
  const input = document.createElement("input");
  input.id = `order-${index}`;
  input.placeholder = "2 > 1 = 3";
  label.setAttribute("for", input.id);
  const button = element("button", "main", "Decide");
  form.append(label, input, button);
  const key = newKey();
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const groups = readOrder(input.value, item.responses.length);
    if (!groups) return say(`Write each of 1 to ${item.responses.length} once, with > between better and worse and = for a tie.`, true);
    try {
      await post("/api/adjudicate", { task: item.task, lead, groups, key });
      say(`Decided: ${written(groups)}. It counts in the place of the annotators' rankings.`);
      made.classList.add("decided");
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      say(`Not saved: ${error.message}`, true);
    }
  });
  made.append(answers, orders, form);
  return made;
}

/** @param {string} text @param {boolean} [bad] */
function say(text, bad = false) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", bad);
}

/** @param {string} name */
async function draw(name) {
  try {
    const found = await fetchReview(name);
    at("collection").replaceChildren(
      ...found.collections.map((/** @type {string} */ each) => {
        const option = document.createElement("option");
        option.value = each;
        option.textContent = each;
        option.selected = each === found.collection;
        return option;
      }),
    );
    at("export").href = `/api/export?${new URLSearchParams({ name: found.collection })}`;
    drawState(found);
    drawFindings(found.findings);
    drawPeople(found.annotators);
    at("disputed").replaceChildren(...found.disputed.map(dispute));
    if (!found.disputed.length) at("disputed").append(element("p", "quiet", "None."));
    at("flags").replaceChildren(
      ...found.flags.map((/** @type {any} */ each) =>
        element("li", "", `${each.annotator}: ${each.text.slice(0, 200)}${each.reason ? ` (${each.reason})` : ""}`),
      ),
    );
    if (!found.flags.length) at("flags").append(element("li", "quiet", "Nothing."));
    at("content").hidden = false;
    at("trouble").hidden = true;
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    at("trouble-text").textContent = error.message;
    at("trouble").hidden = false;
    at("content").hidden = true;
  }
}

at("collection").addEventListener("change", () => draw(at("collection").value));
fetchSession()
  .then((session) => {
    lead = session.person?.name ?? localStorage.getItem("trivium-annotator") ?? "lead";
    return draw("");
  })
  .catch((error) => say(error.message, true));
