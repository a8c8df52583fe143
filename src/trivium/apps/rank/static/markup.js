/** Formatted text from the server's tree: elements of a fixed list, words as text, nothing parsed as HTML. */

const TAGS = new Set([
  "p", "ul", "ol", "li", "blockquote", "em", "strong", "s", "table", "thead", "tbody", "tr", "th", "td", "br", "hr", "pre", "code",
]);

/** @typedef {string | {tag: string, children: Tree[], href?: string, start?: number}} Tree */

/** @param {Tree} node @returns {Node} */
function build(node) {
  if (typeof node === "string") return document.createTextNode(node);
  if (node.tag === "a") return link(node);
  if (node.tag === "math" || node.tag === "h") {
    // Headings are the response's own, not the page's: they must not enter its outline.
    const made = document.createElement(node.tag === "math" ? "code" : "p");
    made.className = node.tag === "math" ? "math" : "heading";
    made.append(...node.children.map(build));
    return made;
  }
  if (!TAGS.has(node.tag)) {
    const words = document.createElement("span");
    words.append(...node.children.map(build));
    return words;
  }
  const made = document.createElement(node.tag);
  if (node.start !== undefined) made.setAttribute("start", String(node.start));
  if (node.tag === "pre") made.tabIndex = 0; // it may scroll sideways, also for a keyboard
  made.append(...node.children.map(build));
  return made;
}

/** @param {{children: Tree[], href?: string}} node */
function link(node) {
  const made = document.createElement("a");
  const href = node.href ?? "";
  if (/^https?:\/\//i.test(href)) {
    made.href = href;
    made.rel = "noopener noreferrer nofollow";
    made.target = "_blank";
    made.title = href;
  }
  made.append(...node.children.map(build));
  return made;
}

/**
 * Put a text into an element, formatted where there is a tree and formatting is wanted.
 * @param {HTMLElement} place @param {string} text @param {Tree[] | null | undefined} tree @param {boolean} formatted
 */
export function fill(place, text, tree, formatted) {
  place.classList.toggle("formatted", Boolean(tree && formatted));
  if (tree && formatted) place.replaceChildren(...tree.map(build));
  else place.textContent = text;
}
