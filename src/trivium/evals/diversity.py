"""How varied a set of prompts is: many copies of one question teach one answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trivium.data.dedup import NUM_BANDS, NearDuplicates

MAX_CLUSTERED = 20_000
"""More prompts than this are clustered by an even sample, so that measuring them takes seconds."""


def prompt_diversity(texts: Sequence[str]) -> dict[str, float]:
    """Return distinct-1 to distinct-3, and how many clusters the prompts form.

    `distinct_n`: different n-grams over all n-grams, in 0 to 1 (Li et al. 2016, arXiv 1510.03055). `clusters`: groups
    of prompts that share at least half of their words (`cluster_sizes`), `effective_clusters` their number where they
    were equally large (the exponential of the entropy of their sizes, a Hill number: 10 clusters of which one holds
    nearly all count for little more than 1), `largest_cluster_frac` the share of the largest. All 0 without prompts.
    """
    words = [text.lower().split() for text in texts]
    figures = {}
    for size in (1, 2, 3):
        grams = [tuple(text[i : i + size]) for text in words for i in range(len(text) - size + 1)]
        figures[f"distinct_{size}"] = len(set(grams)) / max(1, len(grams))
    sizes = cluster_sizes(texts)
    shares = sizes / max(1, int(sizes.sum()))
    return figures | {
        "clusters": float(len(sizes)),
        "effective_clusters": float(np.exp(-(shares * np.log(shares)).sum())) if len(sizes) else 0.0,
        "largest_cluster_frac": float(shares.max(initial=0.0)),
    }


def cluster_sizes(texts: Sequence[str], similarity: float = 0.5) -> NDArray[np.int64]:
    """Return the sizes of the clusters of texts, largest first: int64 [clusters].

    Two texts belong together when their words, as sets, have a Jaccard similarity of at least `similarity`, as
    estimated by MinHash (data/dedup.py); so "What is 2 + 3?" and "What is 4 + 3?" do. Membership is transitive.
    Candidates are found by banding and each is compared with the first of its band, not with all, which keeps this
    linear: of pairs just at 0.5 one in ten is missed, unless a third text links them.
    """
    if len(texts) > MAX_CLUSTERED:
        texts = [texts[int(i)] for i in np.linspace(0, len(texts) - 1, MAX_CLUSTERED)]
    if not texts:
        return np.empty(0, dtype=np.int64)
    hasher = NearDuplicates(similarity, shingle_words=1)
    unique, counts = np.unique(np.array([hasher.signature(text) for text in texts]), axis=0, return_counts=True)
    parents = list(range(len(unique)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for band in np.split(unique, NUM_BANDS, axis=1):
        _, first, groups = np.unique(band, axis=0, return_index=True, return_inverse=True)
        leaders = first[groups.reshape(-1)]
        near = (unique == unique[leaders]).mean(axis=1) >= similarity
        linked = np.flatnonzero(near & (leaders != np.arange(len(unique))))
        for number, leader in zip(linked.tolist(), leaders[linked].tolist(), strict=True):
            parents[root(number)] = root(leader)
    sizes = np.zeros(len(unique), dtype=np.int64)
    for number, count in enumerate(counts.tolist()):
        sizes[root(number)] += count
    return np.sort(sizes[sizes > 0])[::-1]
