"""Methods of different strength side by side at the same KL: what would each have gained, had it gone as far?

A method at several strengths is a curve of gain over KL. Between its points the gain is read off along the square root
of KL, in which rewards grow about linearly at first (Gao et al. 2023, arXiv 2210.10760, section 3.1); beyond them
nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trivium.evals.stats import RESAMPLES

Floats = NDArray[np.float64]


def at_kl(kls: Sequence[float] | Floats, gains: Sequence[float] | Floats, target: float, start: float) -> float:
    """Return the gain at KL = `target`, linear in sqrt(KL) between points; NaN beyond the one furthest from the start.

    `start` is the gain at KL 0: that of the reference itself. An estimated KL slightly below 0 counts as 0. Worked:
    points (1, 0.7) and (4, 0.9), start 0.5: 0.6 at 0.25, 0.8 at 2.25, NaN at 5.
    """
    rows = np.asarray(kls, dtype=np.float64)[None], np.asarray(gains, dtype=np.float64)[None]
    return float(_at_kl(*rows, target, start)[0])


def _at_kl(kls: Floats, gains: Floats, target: float, start: float) -> Floats:
    """Return `at_kl` of each row, [R], from points [R, S]."""
    order = np.argsort(kls, axis=1, kind="stable")
    x = np.sqrt(np.maximum(np.take_along_axis(kls, order, 1), 0.0))
    x = np.concatenate([np.zeros((len(x), 1)), x], 1)
    y = np.concatenate([np.full((len(x), 1), start), np.take_along_axis(gains, order, 1)], 1)
    goal, rows = float(np.sqrt(target)), np.arange(len(x))
    above = np.clip((x < goal).sum(1), 1, x.shape[1] - 1)
    x0, x1, y0, y1 = x[rows, above - 1], x[rows, above], y[rows, above - 1], y[rows, above]
    share = (goal - x0) / np.maximum(x1 - x0, 1e-12)  # two points at one KL: nothing lies between
    return np.where(goal > x[:, -1], np.nan, y0 + share * (y1 - y0))


def at_equal_kl(kls: Floats, gains: Floats, target: float, start: float, seed: int) -> tuple[float, float, float]:
    """Return the gain at KL = `target` with its 95% bootstrap interval over prompts.

    `kls` and `gains` [S, P]: of S strengths on the same P prompts, which are drawn together, KL and gain of all
    strengths with them. NaN where the curve does not reach the target, and for ends of which more than a twentieth of
    the resamples does not.
    """
    return _with_ends(at_kl(kls.mean(1), gains.mean(1), target, start), resampled(kls, gains, target, start, seed))


def difference_at_equal_kl(
    ours: tuple[Floats, Floats], theirs: tuple[Floats, Floats], target: float, start: float, seed: int
) -> tuple[float, float, float]:
    """Return the first method's gain less the second's at KL = `target`, with its 95% interval over their prompts.

    Each is (kls, gains) as in `at_equal_kl`, on the same prompts: a prompt that is easy for both cancels out.
    """
    points = [at_kl(kls.mean(1), gains.mean(1), target, start) for kls, gains in (ours, theirs)]
    draws = [resampled(kls, gains, target, start, seed) for kls, gains in (ours, theirs)]
    return _with_ends(points[0] - points[1], draws[0] - draws[1])


def resampled(kls: Floats, gains: Floats, target: float, start: float, seed: int) -> Floats:
    """Return the gain at KL = `target` in each bootstrap resample of the prompts, [RESAMPLES]; the seed draws them."""
    num = kls.shape[1]
    drawn = np.random.default_rng([seed, 97]).multinomial(num, np.full(num, 1 / num), size=RESAMPLES)
    x, y = drawn @ kls.T / num, drawn @ gains.T / num
    return _at_kl(x, y, target, start)


def _with_ends(point: float, draws: Floats) -> tuple[float, float, float]:
    known = draws[~np.isnan(draws)]
    if np.isnan(point) or len(known) < 0.95 * len(draws):
        return point, float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return point, float(low), float(high)
