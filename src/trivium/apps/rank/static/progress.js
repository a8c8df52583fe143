/** How far an annotator is, how fast, and how long the rest will take at that pace. */

/** @param {string} id @returns {any} */
const at = (id) => document.getElementById(id);

/** @param {number} total */
function duration(total) {
  const minutes = Math.round(total / 60);
  if (minutes < 1) return "under a minute";
  return minutes < 90 ? `${minutes} min` : `${Math.round(minutes / 6) / 10} h`;
}

/** @param {{done: number, left: number, skipped: number, mean_seconds: number}} progress */
export function drawProgress(progress) {
  at("bar").max = Math.max(1, progress.done + progress.left);
  at("bar").value = progress.done;
  const parts = [`${progress.done} done`, `${progress.left} to go`];
  if (progress.left && progress.mean_seconds) parts.push(`about ${duration(progress.left * progress.mean_seconds)}`);
  at("progress-text").textContent = parts.join(" · ");
  at("done-text").textContent =
    `You have ranked ${progress.done} and skipped ${progress.skipped}. Thank you. ` +
    "When new responses have been collected, they appear here.";
}
