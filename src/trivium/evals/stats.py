"""How sure a measured figure is: 95% intervals for shares, means, win rates and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
"""The normal distribution's 97.5th percentile: two-sided 95%."""

RESAMPLES = 2000
"""Bootstrap resamples: the ends of an interval are then good to about 0.002 of a share."""


def wilson_interval(successes: float, n: float) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a share; (0, 1) when nothing was counted.

    `successes` may be fractional (a tie as half). Unlike the normal interval it never leaves [0, 1] and is honest at
    0 and n (Wilson 1927). Worked: 8 of 10 gives 0.490 to 0.943.
    """
    if n <= 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(max(share * (1 - share), 0.0) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (mean, low, high) of a sample, the ends by the normal approximation; NaN ends for fewer than two."""
    if not values:
        return math.nan, math.nan, math.nan
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if len(sample) < 2:
        return mean, math.nan, math.nan
    half = Z * float(sample.std(ddof=1)) / math.sqrt(len(sample))
    return mean, mean - half, mean + half


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], seed: int) -> tuple[float, float, float]:
    """Return sum(numerators) / sum(denominators) with its 95% bootstrap interval over the items (documents, say).

    For figures such as bits per byte, where each item weighs by its size and a mean of ratios would not be the ratio.
    """
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if not len(top) or not bottom.sum():
        return math.nan, math.nan, math.nan
    rows = _resamples(len(top), seed)
    low, high = _ends(top[rows].sum(1) / np.maximum(bottom[rows].sum(1), 1e-12))
    return float(top.sum() / bottom.sum()), low, high


def paired_bootstrap(ours: Sequence[float], theirs: Sequence[float], seed: int) -> tuple[float, float, float]:
    """Return the mean difference `ours - theirs` over the same items, with its 95% bootstrap interval.

    Resampling items and not answers keeps what both share (an item's difficulty) out of the interval. Raises
    ValueError for unequal lengths.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"paired figures need the same items: {len(ours)} and {len(theirs)}")
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    if not len(difference):
        return math.nan, math.nan, math.nan
    low, high = _ends(difference[_resamples(len(difference), seed)].mean(1))
    return float(difference.mean()), low, high


def unpaired_bootstrap(ours: Sequence[float], theirs: Sequence[float], seed: int) -> tuple[float, float, float]:
    """Return the difference of two samples' means with its 95% bootstrap interval; NaN where one is empty."""
    if not len(ours) or not len(theirs):
        return math.nan, math.nan, math.nan
    first, second = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    means = first[_resamples(len(first), seed)].mean(1) - second[_resamples(len(second), seed + 1)].mean(1)
    return float(first.mean() - second.mean()), *_ends(means)


def correlation_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Return Pearson's correlation with its 95% interval (Fisher's z); NaN for fewer than four items or no spread."""
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(x) < 4 or not x.std() or not y.std():
        return math.nan, math.nan, math.nan
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1 + 1e-9, 1 - 1e-9))
    half = Z / math.sqrt(len(x) - 3)
    return r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def win_interval(ours: Sequence[float], theirs: Sequence[float], seed: int) -> tuple[float, float, float]:
    """Return the share of prompts that `ours` wins, ties as half, with its 95% bootstrap interval over the prompts.

    Where every prompt ended alike the bootstrap would claim certainty, so the interval is Wilson's. Raises ValueError
    for unequal lengths.
    """
    outcomes = [win_of(a, b) for a, b in zip(ours, theirs, strict=True)]
    if len(set(outcomes)) <= 1:
        share = outcomes[0] if outcomes else math.nan
        return (share, *wilson_interval(sum(outcomes), len(outcomes)))
    return paired_bootstrap(outcomes, [0.0] * len(outcomes), seed)


def win_of(ours: float, theirs: float) -> float:
    """Return 1 for a win, 0 for a loss, 1/2 for a tie."""
    return 0.5 if ours == theirs else float(ours > theirs)


def _resamples(n: int, seed: int) -> NDArray[np.int64]:
    """Return the items of each resample, [RESAMPLES, n]."""
    return np.random.default_rng([seed, 95]).integers(0, n, size=(RESAMPLES, n))


def _ends(figures: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(figures, [0.025, 0.975])
    return float(low), float(high)
