// Hearing from the server: one EventSource per page, and a mark that says whether it is connected.

/**
 * Listen to the event stream.
 * @param {{run?: string, cursor?: string, onEvents: (message: any) => void, onOverview: (overview: any) => void}} options
 * @returns {EventSource}
 */
export function listen({ run, cursor, onEvents, onOverview }) {
  const query = run ? `?${new URLSearchParams({ run, cursor: cursor ?? "" })}` : "";
  const source = new EventSource(`/events/stream${query}`);
  const mark = /** @type {HTMLElement} */ (document.getElementById("live"));
  const show = (/** @type {string} */ state, /** @type {string} */ text) => {
    mark.dataset.state = state;
    mark.textContent = text;
  };
  source.addEventListener("open", () => show("on", "live"));
  source.addEventListener("error", () => show("off", "offline, retrying"));
  source.addEventListener("events", (event) => onEvents(JSON.parse(event.data)));
  source.addEventListener("overview", (event) => onOverview(JSON.parse(event.data)));
  window.addEventListener("pagehide", () => source.close());
  return source;
}
