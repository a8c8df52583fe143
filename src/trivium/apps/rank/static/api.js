/** A refusal of the server, in a sentence for people. */
export class Refusal extends Error {
  /** @param {string} message @param {string} code @param {number} status */
  constructor(message, code, status) {
    super(message);
    this.code = code;
    this.status = status;
  }
}

let token = "";

/** @param {string} path @param {RequestInit} [options] @returns {Promise<any>} */
async function call(path, options) {
  let answer;
  try {
    answer = await fetch(path, { credentials: "same-origin", ...options });
  } catch {
    throw new Refusal("The server does not answer. Is “trivium rank” still running?", "offline", 0);
  }
  const data = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const error = data.error ?? { message: `The server answered ${answer.status}.`, code: "http" };
    throw new Refusal(error.message, error.code, answer.status);
  }
  return data;
}

/** @param {string} annotator */
export function fetchTask(annotator) {
  return call(`/api/task?${new URLSearchParams({ annotator })}`);
}

/** @param {string} name of a collection; empty for the newest */
export function fetchReview(name) {
  return call(`/api/review?${new URLSearchParams(name ? { name } : {})}`);
}

/** @returns {Promise<{token: string, accounts: boolean, person: {name: string, role: string} | null}>} who is there */
export async function fetchSession() {
  const session = await call("/api/session");
  token = session.token;
  return session;
}

/** Post JSON; a token that a restarted server no longer knows is renewed once. @param {string} path @param {object} body */
export async function post(path, body) {
  for (let attempt = 0; ; attempt += 1) {
    if (!token) token = (await call("/api/session")).token;
    try {
      return await call(path, {
        method: "POST",
        headers: { "content-type": "application/json", "x-csrf-token": token },
        body: JSON.stringify(body),
      });
    } catch (error) {
      if (!(error instanceof Refusal) || error.code !== "token" || attempt) throw error;
      token = "";
    }
  }
}

/** @returns {string} a key under which a retried request is stored once */
export function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
