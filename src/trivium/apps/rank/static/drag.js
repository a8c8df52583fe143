/** Ranking by dragging: a card by its head onto another card (right before it), or onto the order at the foot. */

/**
 * @param {HTMLElement} card @param {HTMLElement} handle @param {number} index
 * @param {(index: number, other: number) => void} moved
 */
export function draggable(card, handle, index, moved) {
  handle.draggable = true;
  handle.addEventListener("dragstart", (event) => {
    event.dataTransfer?.setData("text/plain", String(index));
    event.dataTransfer?.setDragImage(card, 20, 20);
    card.classList.add("dragged");
  });
  handle.addEventListener("dragend", () => card.classList.remove("dragged"));
  target(card, (from) => moved(from, index));
}

/** Let cards be dropped on an element. @param {HTMLElement} place @param {(index: number) => void} dropped */
export function target(place, dropped) {
  place.addEventListener("dragover", (event) => {
    event.preventDefault(); // which is how a browser is told that something may be dropped here
    place.classList.add("over");
  });
  place.addEventListener("dragleave", () => place.classList.remove("over"));
  place.addEventListener("drop", (event) => {
    event.preventDefault();
    place.classList.remove("over");
    const text = event.dataTransfer?.getData("text/plain") ?? "";
    if (/^[0-9]$/.test(text)) dropped(Number(text));
  });
}
