/**
 * The order as it grows: plain data, no page. Responses are places on the screen, counted from 0.
 * An undo returns to the state before, whatever the step was.
 */
export class Ranking {
  /** @param {number} count how many responses there are */
  constructor(count) {
    this.count = count;
    /** @type {number[][]} best group first; a tie shares a group */
    this.groups = [];
    /** Whether the next response joins the last group. */
    this.tied = false;
    this.noneAcceptable = false;
    /** @type {{groups: number[][], tied: boolean, noneAcceptable: boolean}[]} */
    this.past = [];
  }

  remember() {
    this.past.push({
      groups: this.groups.map((group) => [...group]),
      tied: this.tied,
      noneAcceptable: this.noneAcceptable,
    });
  }

  /** @returns {number[]} the responses that have no place yet */
  left() {
    const placed = new Set(this.groups.flat());
    return [...Array(this.count).keys()].filter((index) => !placed.has(index));
  }

  /**
   * @param {number} index
   * @returns {number} the rank of a response, counted from 1 (after a tie of two for 1 comes 3), or 0
   */
  rank(index) {
    let before = 0;
    for (const group of this.groups) {
      if (group.includes(index)) return before + 1;
      before += group.length;
    }
    return 0;
  }

  /**
   * Place a response next, or take it back if it has a place.
   * @param {number} index
   */
  toggle(index) {
    this.remember();
    if (this.rank(index)) {
      this.groups = this.groups.map((group) => group.filter((other) => other !== index)).filter((group) => group.length);
      this.tied = false;
      return;
    }
    const last = this.groups.at(-1);
    if (this.tied && last) last.push(index);
    else this.groups.push([index]);
    this.tied = false;
  }

  /**
   * Put a response right before another one that has a place, or in the next place if that one has none.
   * @param {number} index @param {number} other
   */
  moveBefore(index, other) {
    if (index === other) return;
    this.remember();
    const rest = this.groups.map((group) => group.filter((each) => each !== index)).filter((group) => group.length);
    const place = rest.findIndex((group) => group.includes(other));
    rest.splice(place < 0 ? rest.length : place, 0, [index]);
    this.groups = rest;
    this.tied = false;
  }

  /** Let the next response tie with the one before, or no longer. @returns {boolean} whether that can be */
  tie() {
    if (!this.groups.length || !this.left().length) return false;
    this.remember();
    this.tied = !this.tied;
    return true;
  }

  none() {
    this.remember();
    this.noneAcceptable = !this.noneAcceptable;
  }

  /** @returns {boolean} whether there was anything to undo */
  undo() {
    const before = this.past.pop();
    if (!before) return false;
    Object.assign(this, before);
    return true;
  }

  /** @returns {number[][] | null} the whole order, with a single response left over placed last; null if more are left */
  complete() {
    const left = this.left();
    if (left.length > 1 || !this.groups.length) return null;
    if (!left.length) return this.groups;
    if (this.tied) return [...this.groups.slice(0, -1), [...this.groups[this.groups.length - 1], left[0]]];
    return [...this.groups, left];
  }
}
