/** The door of a page with accounts: an invitation's link opens it once, a session keeps it open. */
import { Refusal, fetchSession, post } from "./api.js";

/** @param {string} id @returns {any} */
const at = (id) => document.getElementById(id);

export class Door {
  /**
   * @param {(name: string) => void} enter what to do once somebody is in
   * @param {() => void} show brings the door's section to the front
   */
  constructor(enter, show) {
    this.enter = enter;
    this.show = show;
    /** @type {{name: string, role: string} | null} who is signed in, where the page has accounts */
    this.account = null;
    // Behind the #, which a browser sends to no server and writes into no log.
    this.invitation = new URLSearchParams(location.hash.slice(1)).get("invitation") ?? "";
  }

  /** Let in who is signed in, or stand closed; false on a page without accounts. */
  async open() {
    const session = await fetchSession();
    this.account = session.person;
    at("review-link").hidden = session.accounts && (this.account?.role ?? "annotator") === "annotator";
    if (!session.accounts) return false;
    if (this.account) {
      this.enter(this.account.name);
      return true;
    }
    at("who").hidden = true;
    if (this.invitation) {
      at("door-title").textContent = "You are invited";
      at("door-text").textContent =
        "Your judgements will be stored under your name. This link works once; in this browser you stay signed in.";
    }
    at("join").hidden = !this.invitation;
    this.show();
    return true;
  }

  async join() {
    try {
      this.account = await post("/api/join", { token: this.invitation });
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      at("door-title").textContent = "This link does not work";
      at("door-text").textContent = error.message;
      at("join").hidden = true;
      return;
    }
    // The token is used up, and has no business in the address bar or the history.
    history.replaceState(null, "", location.pathname);
    this.enter(this.account.name);
  }

  async signOut() {
    await post("/api/leave", {});
    location.reload();
  }

  /** Show whose account this is; false where there are none. */
  openAccount() {
    if (!this.account) return false;
    at("account-text").textContent =
      `You are signed in as ${this.account.name} (${this.account.role}). Your judgements are stored under this name.`;
    at("account-dialog").showModal();
    return true;
  }
}
