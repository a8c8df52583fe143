"""Agreement beyond chance for labels without an order: Cohen's kappa for two raters, Fleiss' for any number."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trivium.preferences.agreement import Estimate, bootstrap

Floats = NDArray[np.float64]


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable], *, seed: int = 0) -> Estimate | None:
    """Return Cohen's kappa of two raters' labels of the same items (Cohen 1960), bootstrapped by item.

    kappa = (p_o - p_e) / (1 - p_e): the share of equal labels, beyond what each rater's own habits would give. None
    where both use one label throughout. Raises ValueError unless there are as many labels of each.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} labels of the first rater, {len(second)} of the second")
    codes = {label: code for code, label in enumerate(dict.fromkeys([*first, *second]))}
    tables = np.zeros((len(first), len(codes), len(codes)))
    for item, (a, b) in enumerate(zip(first, second, strict=True)):
        tables[item, codes[a], codes[b]] = 1
    return bootstrap(tables, _cohen, seed=seed)


def _cohen(table: Floats) -> float:
    n = table.sum()
    expected = float((table.sum(axis=0) * table.sum(axis=1)).sum()) / n**2
    return float((np.trace(table) / n - expected) / (1 - expected)) if expected < 1 else float("nan")


def fleiss_kappa(counts: Floats, *, seed: int = 0) -> Estimate | None:
    """Return Fleiss' kappa of counts [items, labels]: how many raters gave each item each label (Fleiss 1971).

    Items may have different numbers of raters, at least two (others are left out); with equal numbers it is Fleiss'
    own. The chance level comes from how often each label was given in all. None where only one label was.
    """
    kept = counts[counts.sum(axis=1) >= 2]
    raters = kept.sum(axis=1, keepdims=True)
    # Of each item: the share of equal pairs of raters, its labels as shares, and 1. Their sums are all that is needed.
    equal = (kept * (kept - 1)).sum(axis=1, keepdims=True) / np.maximum(raters * (raters - 1), 1)
    return bootstrap(np.hstack([equal, kept / np.maximum(raters, 1), np.ones_like(equal)]), _fleiss, seed=seed)


def _fleiss(sums: Floats) -> float:
    items = sums[-1]
    observed, expected = sums[0] / items, float(((sums[1:-1] / items) ** 2).sum())
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def label_counts(labels: Sequence[Mapping[str, Hashable]]) -> Floats:
    """Return counts [items, labels] for `fleiss_kappa` from one mapping per item, annotator to label."""
    codes = {label: code for code, label in enumerate(dict.fromkeys(v for item in labels for v in item.values()))}
    counts = np.zeros((len(labels), len(codes)))
    for row, item in zip(counts, labels, strict=True):
        for label in item.values():
            row[codes[label]] += 1
    return counts
