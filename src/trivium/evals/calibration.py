"""Is a forecast as often right as it says? The error of stated confidences, and the temperature that mends them.

A forecast is a lead: the log-odds, in nats, that the first of two wins. Its confidence is `sigmoid(|lead| / T)`, at
least one half, and it is right where the one in the lead won. So it does not matter which of the two is the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trivium.preferences.agreement import Estimate, bootstrap

Floats = NDArray[np.float64]

BINS = 10
"""Bins of equal width over confidences from one half to one."""
COLDEST, HOTTEST = 1 / 64, 64.0
"""The range of temperatures: where every pair is right the best would be 0, and below chance infinity."""


def confidences(leads: Floats, temperature: Floats | float = 1.0) -> Floats:
    """Return the stated probability that the one in the lead wins, in [0.5, 1]."""
    return np.asarray(1 / (1 + np.exp(-np.abs(leads) / temperature)))


def rights(leads: Floats) -> Floats:
    """Return 1 where the chosen one leads (`lead` > 0), 0 where it trails, 1/2 where neither does."""
    return (1 + np.sign(leads)) / 2


def negative_log_likelihood(leads: Floats, temperature: Floats | float = 1.0) -> float:
    """Return the mean of `-log sigmoid(lead / T)` in nats; leads are of the chosen over the rejected."""
    return float(np.logaddexp(0, -leads / temperature).mean()) if len(leads) else float("nan")


def fit_temperature(leads: Floats) -> float:
    """Return the temperature under which leads of the chosen over the rejected are likeliest; 1 where there are none.

    Minimises the mean of `softplus(-lead / T)`, which is convex in 1/T, by bisection of its slope (Guo et al. 2017,
    arXiv 1706.04599, section 4.2, for two classes). Kept within COLDEST and HOTTEST.
    """
    if not len(leads) or not np.any(leads):
        return 1.0
    low, high = np.log(1 / HOTTEST), np.log(1 / COLDEST)
    for _ in range(60):
        middle = (low + high) / 2
        slope = -(leads / (1 + np.exp(np.clip(np.exp(middle) * leads, -700, 700)))).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float(np.exp(-(low + high) / 2))


def cross_fitted(leads: Floats, prompts: Sequence[int], seed: int) -> Floats:
    """Return a temperature per pair, fitted on the half of the prompts that the pair is not in.

    So no pair is judged with a temperature that has seen it, nor its prompt, and every pair is judged.
    """
    ids, index = np.unique(np.asarray(prompts), return_inverse=True)
    side = np.zeros(len(ids), dtype=bool)
    side[np.random.default_rng([seed, 0x7E]).permutation(len(ids))[: len(ids) // 2]] = True
    half = side[index]
    found = np.ones(len(leads))
    for inside in (half, ~half):
        found[inside] = fit_temperature(leads[~inside])
    return found


def reliability(stated: Floats, right: Floats) -> Floats:
    """Return, for each bin of stated confidence, [pairs, sum of confidences, sum of right ones]: [BINS, 3]."""
    place = np.clip(((stated - 0.5) * 2 * BINS).astype(int), 0, BINS - 1)
    table = np.zeros((BINS, 3))
    np.add.at(table, place, np.stack([np.ones_like(stated), stated, right], axis=1))
    return table


def error_of(table: Floats) -> float:
    """Return the expected calibration error of a reliability table; NaN for an empty one.

    `sum over bins of |right - stated| / pairs`: how far the share of right ones is from the mean confidence, bins
    weighed by their pairs (Naeini et al. 2015). Worked: ten pairs stated at 0.9, seven right: 0.2.
    """
    pairs = table[:, 0].sum()
    return float(np.abs(table[:, 2] - table[:, 1]).sum() / pairs) if pairs else float("nan")


def calibration_error(
    leads: Floats, prompts: Sequence[int], temperature: Floats | float = 1.0, *, seed: int = 0
) -> Estimate | None:
    """Return the expected calibration error with its bootstrap interval over prompts; None without pairs.

    Noise never cancels in it, and a resample has more: few pairs make it large and its interval high (it is widened to
    hold the value itself). Compare it with `honest_error`.
    """
    stated, right = confidences(leads, temperature), rights(leads)
    names = np.asarray(prompts)
    tables = [reliability(stated[names == name], right[names == name]) for name in np.unique(names)]
    found = bootstrap(np.array(tables), error_of, seed=seed)
    return found and dataclasses.replace(found, low=min(found.low, found.value), high=max(found.high, found.value))


def honest_error(leads: Floats, temperature: Floats | float = 1.0, *, seed: int = 0, draws: int = 200) -> float:
    """Return the mean error that perfectly honest forecasts of these confidences would show, NaN without pairs.

    The outcomes are drawn from the confidences themselves, so all that is left is the noise of so few pairs.
    """
    if not len(leads):
        return float("nan")
    stated = confidences(leads, temperature)
    rng = np.random.default_rng([seed, 0xECE])
    drawn = rng.random((draws, len(stated))) < stated
    return float(np.mean([error_of(reliability(stated, won.astype(np.float64))) for won in drawn]))


def as_rows(table: Floats) -> list[dict[str, Any]]:
    """Return the filled bins of a reliability table for a manifest: pairs, mean confidence, share right."""
    return [
        {"pairs": int(pairs), "confidence": round(stated / pairs, 4), "right": round(right / pairs, 4)}
        for pairs, stated, right in table.tolist()
        if pairs
    ]
