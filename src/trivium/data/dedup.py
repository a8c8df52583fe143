"""Duplicates: exact ones after normalising, and near ones by MinHash.

Two documents are exact duplicates when they agree after NFKC, case folding and with any white space as one space. Near
duplicates share most of their five-word sequences; the share (Jaccard similarity) is estimated from 128 minima of
hashes (Broder 1997), and candidates are found by banding: 32 bands of 4 minima miss a pair of similarity 0.7 once in
six thousand times.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 5
NUM_HASHES = 128
NUM_BANDS = 32

_WORD = re.compile(r"\w+")
_BASE = 0x9E3779B97F4A7C15


def normalise(text: str) -> str:
    """Return the text in NFKC, case-folded, with every stretch of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def content_key(text: str) -> bytes:
    """Return the 128-bit hash of the normalised text: equal for exact duplicates."""
    return hashlib.blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def split_words(text: str) -> list[str]:
    """Return the words of the normalised text, without punctuation."""
    return _WORD.findall(normalise(text))


def word_hashes(text: str) -> NDArray[np.uint64]:
    """Return one 64-bit hash for each word of `split_words`: uint64 [words]."""
    return np.array([_word_hash(word) for word in split_words(text)], dtype=np.uint64)


@functools.lru_cache(maxsize=2**18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def ngram_hashes(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Return one hash for each run of `n` words (order counts): uint64 [words - n + 1], empty where there is none."""
    count = len(words) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        total = total * np.uint64(_BASE) + words[offset : offset + count]
    # Mixed once more, since neighbouring runs differ by a linear step only.
    total ^= total >> np.uint64(31)
    return total * np.uint64(0xBF58476D1CE4E5B9)


class NearDuplicates:
    """Finds earlier documents that are nearly the same; `add` them one after another.

    Groups are transitive (a ~ b, b ~ c puts all three together) and serve to keep near duplicates on one side of a
    split; whether a document is *dropped* is decided by its own similarity to one that was kept.
    """

    def __init__(self, threshold: float, shingle_words: int = SHINGLE_WORDS) -> None:
        """Take documents of at least this estimated similarity as near duplicates; it counts runs of so many words."""
        self.threshold, self.shingle_words = threshold, shingle_words
        rng = np.random.default_rng(20210917)  # part of the method, not of a run
        self._factors = rng.integers(0, 2**63, size=(NUM_HASHES, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offsets = rng.integers(0, 2**63, size=(NUM_HASHES, 1), dtype=np.uint64)
        self._signatures: list[NDArray[np.uint32]] = []
        self._bands: dict[Hashable, list[int]] = {}
        self._parents: list[int] = []

    def add(self, text: str) -> tuple[int, list[tuple[int, float]]]:
        """Return this document's number and the (number, similarity) of earlier ones at or above the threshold."""
        number = len(self._signatures)
        signature = self.signature(text)
        rows = signature.reshape(NUM_BANDS, -1)
        keys = [(band, rows[band].tobytes()) for band in range(NUM_BANDS)]
        candidates = sorted({other for key in keys for other in self._bands.get(key, ())})
        found = [(other, float(np.mean(self._signatures[other] == signature))) for other in candidates]
        similar = [(other, similarity) for other, similarity in found if similarity >= self.threshold]
        self._signatures.append(signature)
        self._parents.append(number)
        for key in keys:
            self._bands.setdefault(key, []).append(number)
        for other, _ in similar:
            self._parents[self.group(other)] = self.group(number)
        return number, similar

    def group(self, number: int) -> int:
        """Return a number that all members of the document's group share, for now (adding may merge groups)."""
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number

    def signature(self, text: str) -> NDArray[np.uint32]:
        """Return the 128 minima of a text: uint32 [128]; equal places estimate the Jaccard similarity."""
        words = word_hashes(text)
        hashes = ngram_hashes(words, min(self.shingle_words, max(len(words), 1)))
        if not len(hashes):
            # Texts without any word are alike only if they are the same text.
            hashes = np.frombuffer(content_key(text), dtype=np.uint64)
        minima = [np.full(NUM_HASHES, 2**64 - 1, dtype=np.uint64)]
        for start in range(0, len(hashes), 4096):  # bounds the [128, n] table in memory
            minima.append((hashes[start : start + 4096] * self._factors + self._offsets).min(axis=1))
        lowest: NDArray[np.uint64] = np.minimum.reduce(minima)
        return (lowest >> np.uint64(32)).astype(np.uint32)


def similarity(first: str, second: str) -> float:
    """Return the exact Jaccard similarity of two texts' five-word sequences (1.0 for two texts too short for any)."""
    one, two = (set(ngram_hashes(word_hashes(text), SHINGLE_WORDS).tolist()) for text in (first, second))
    return len(one & two) / len(one | two) if one | two else 1.0


def assign_sides(groups: Sequence[int], ids: Sequence[str], heldout_frac: float) -> list[bool]:
    """Return, for each document, whether it is held out: by the hash of its group's smallest id, so never by row.

    Adding documents elsewhere moves none. At least one group is held out where there are two or more.
    """
    smallest: dict[int, str] = {}
    for group, name in zip(groups, ids, strict=True):
        smallest[group] = min(name, smallest.get(group, name))
    draws = {group: _fraction(name) for group, name in smallest.items()}
    held = {group for group, draw in draws.items() if draw < heldout_frac}
    if not held and len(draws) > 1:
        held = {min(draws, key=lambda group: draws[group])}
    if len(held) == len(draws) > 1:
        held.remove(max(draws, key=lambda group: draws[group]))
    return [group in held for group in groups]


def _fraction(name: str) -> float:
    """Return a number in [0, 1) that depends on nothing but the name.

    Not on the seed either: a document held out in one run is never trained on in another.
    """
    digest = hashlib.blake2b(f"heldout {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
