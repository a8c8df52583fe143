/** How this browser likes the page: the checkboxes of the help dialog, remembered where that helps. */

/** @param {string} id @returns {any} */
const at = (id) => document.getElementById(id);

export const settings = { shortcuts: true, fast: false, formatted: true };
/** @typedef {keyof typeof settings} Name */

/** Tie the checkboxes to the settings. @param {(name: Name) => void} changed called after each change */
export function bind(changed) {
  for (const name of /** @type {Name[]} */ (Object.keys(settings))) {
    // Whether single keys are shortcuts is asked afresh each time: who needs them off says so before they do harm.
    const kept = name === "shortcuts" ? null : localStorage.getItem(`trivium-${name}`);
    if (kept) settings[name] = kept === "yes";
    at(name).checked = settings[name];
    at(name).addEventListener("change", () => {
      settings[name] = at(name).checked;
      if (name !== "shortcuts") localStorage.setItem(`trivium-${name}`, settings[name] ? "yes" : "no");
      changed(name);
    });
  }
}
