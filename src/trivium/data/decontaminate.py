"""Decontamination: no test item may stand in the training text.

A document is contaminated when it shares a run of thirteen words with a test item (GPT-3, arXiv:2005.14165, appendix
C), case, white space and punctuation aside. An item's text shorter than that, but of at least eight words, must occur
whole. Shorter ones ("Paris") would flag everything and are not looked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trivium.data.dedup import ngram_hashes, split_words, word_hashes

NGRAM_WORDS = 13
MIN_WORDS = 8


class Contamination:
    """Knows the word sequences of test items and finds them in documents."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Take the texts of all test items (`item_texts` finds them in rows of any schema)."""
        collected: dict[int, set[int]] = defaultdict(set)
        for text in texts:
            words = word_hashes(text)
            if len(words) >= MIN_WORDS:
                n = min(len(words), NGRAM_WORDS)
                collected[n].update(ngram_hashes(words, n).tolist())
        self._known: dict[int, NDArray[np.uint64]] = {
            n: np.array(sorted(hashes), dtype=np.uint64) for n, hashes in sorted(collected.items())
        }

    def __bool__(self) -> bool:
        """Tell whether there is anything to look for."""
        return bool(self._known)

    def find(self, text: str) -> str | None:
        """Return the first shared run of words (as normalised words of the document), or None."""
        words = word_hashes(text)
        for n, known in self._known.items():
            grams = ngram_hashes(words, n)
            places = np.minimum(np.searchsorted(known, grams), len(known) - 1)
            hits = np.flatnonzero(known[places] == grams)
            if len(hits):
                return " ".join(split_words(text)[int(hits[0]) : int(hits[0]) + n])
        return None


def item_texts(row: Any) -> Iterator[str]:
    """Yield every text in a test item, whatever its schema: questions, choices, answers, contexts, messages."""
    if isinstance(row, str):
        yield row
    elif isinstance(row, Mapping):
        for key, value in row.items():
            if key not in ("id", "source", "license", "meta"):
                yield from item_texts(value)
    elif isinstance(row, list | tuple):
        for value in row:
            yield from item_texts(value)
