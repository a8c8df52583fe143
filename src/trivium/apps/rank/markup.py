"""Markdown as a tree of a few harmless elements, never as HTML.

What a model wrote goes to the page as data: the page makes elements of its own from the names it knows and puts the
words in as text. There is no HTML to be sanitised, so nothing a sanitiser could miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from mdit_py_plugins.dollarmath import dollarmath_plugin

Node = str | dict[str, Any]
"""Text, or `{"tag", "children"}`; a link has `href`, an ordered list its `start`."""

MAX_CHARS = 50_000
"""Longer texts are shown as they are: nobody reads the formatting of a flood, and a parser should not have to."""

TAGS = {
    "paragraph": "p",
    "heading": "h",
    "bullet_list": "ul",
    "ordered_list": "ol",
    "list_item": "li",
    "blockquote": "blockquote",
    "em": "em",
    "strong": "strong",
    "s": "s",
    "table": "table",
    "thead": "thead",
    "tbody": "tbody",
    "tr": "tr",
    "th": "th",
    "td": "td",
}
"""What each kind of node becomes; kinds that are not here are shown as their text."""

_PARSER = (
    MarkdownIt("commonmark", {"html": False})
    .enable(["table", "strikethrough"])
    .use(dollarmath_plugin, allow_labels=False, double_inline=True)
)


def tree(text: str) -> list[Node] | None:
    """Return a text's Markdown as nodes, None where it is too long to be formatted."""
    if len(text) > MAX_CHARS:
        return None
    return _nodes(SyntaxTreeNode(_PARSER.parse(text)).children)


def _nodes(children: Sequence[SyntaxTreeNode]) -> list[Node]:
    found: list[Node] = []
    for child in children:
        found += _node(child)
    return found


def _node(node: SyntaxTreeNode) -> list[Node]:
    kind = node.type
    if kind == "inline":
        return _nodes(node.children)
    if kind == "text":
        return [node.content]
    if kind in ("softbreak", "hardbreak"):
        return [{"tag": "br", "children": []}]
    if kind == "hr":
        return [{"tag": "hr", "children": []}]
    if kind in ("fence", "code_block"):
        return [{"tag": "pre", "children": [node.content.removesuffix("\n")]}]
    if kind == "code_inline":
        return [{"tag": "code", "children": [node.content]}]
    if kind in ("math_inline", "math_inline_double", "math_block"):
        sign = "$" if kind == "math_inline" else "$$"
        return [{"tag": "math", "children": [f"{sign}{node.content.strip()}{sign}"]}]
    if kind == "image":  # fetched from nowhere: who shows it would be told that, and when, it was looked at
        return [f"![{node.content}]({node.attrs.get('src', '')})"]
    if kind == "link":
        return _link(node)
    if kind in TAGS:
        made: dict[str, Any] = {"tag": TAGS[kind], "children": _nodes(node.children)}
        if kind == "ordered_list":
            made["start"] = int(node.attrs.get("start", 1))
        return [made]
    return _nodes(node.children) if node.children else [node.content]


def _link(node: SyntaxTreeNode) -> list[Node]:
    href = str(node.attrs.get("href", ""))
    children = _nodes(node.children)
    try:
        safe = urlsplit(href).scheme in ("http", "https")
    except ValueError:
        safe = False
    return [{"tag": "a", "href": href, "children": children}] if safe else ["[", *children, f"]({href})"]
