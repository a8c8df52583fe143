"""How varied a set of prompts is: many copies of one question teach one answer."""

from __future__ import annotations

from collections.abc import Sequence


def prompt_diversity(texts: Sequence[str]) -> dict[str, float]:
    """Return distinct-1 and distinct-2: different n-grams over all n-grams, in 0 to 1 (Li et al. 2016, 1510.03055)."""
    words = [text.lower().split() for text in texts]
    figures = {}
    for size in (1, 2):
        grams = [tuple(text[i : i + size]) for text in words for i in range(len(text) - size + 1)]
        figures[f"distinct_{size}"] = len(set(grams)) / max(1, len(grams))
    return figures
