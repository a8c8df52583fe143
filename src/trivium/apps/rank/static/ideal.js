/** Where an ideal response starts: from nothing, or from one of the responses, whose edit is then preferred to it. */

/** @param {string} id @returns {any} */
const at = (id) => document.getElementById(id);
/** @type {string[]} */
let texts = [];

/** Offer the responses as beginnings. @param {string[]} responses */
export function offerTexts(responses) {
  texts = responses;
  const names = ["nothing", ...responses.map((_, index) => `response ${index + 1}`)];
  at("start-from").replaceChildren(
    ...names.map((name, index) => {
      const option = document.createElement("option");
      option.value = index ? String(index - 1) : "";
      option.textContent = name;
      return option;
    }),
  );
}

at("start-from").addEventListener("change", () => {
  const from = at("start-from").value;
  // What was written by hand is not thrown away.
  if (from && (!at("ideal").value.trim() || texts.includes(at("ideal").value))) at("ideal").value = texts[Number(from)];
});
