/** The dialog that flags a response as harmful. */

/** @param {string} id @returns {any} */
const at = (id) => document.getElementById(id);

/** @param {number} count how many responses there are */
export function openFlag(count) {
  if (!count) return;
  const options = Array.from({ length: count }, (_, index) => {
    const option = document.createElement("option");
    option.value = String(index);
    option.textContent = `Response ${index + 1}`;
    return option;
  });
  at("flag-which").replaceChildren(...options);
  at("flag-dialog").showModal();
}

/** @param {(response: number, reason: string) => void} flagged */
export function onFlag(flagged) {
  at("flag-dialog").querySelector("form").addEventListener("submit", () => {
    const reason = at("flag-note").value.trim();
    at("flag-note").value = "";
    flagged(Number(at("flag-which").value), reason);
  });
}
