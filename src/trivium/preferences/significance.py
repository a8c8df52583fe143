"""Chance or not: the tests that the measures of judgements share, each a few lines of numpy.

A p-value here answers one question alone. Who asks several of the same judgements corrects them with `holm`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Side = Literal["both", "below", "above"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """An effect with its test: `z` is the effect over its standard error, `p` how often chance alone goes as far."""

    effect: float
    z: float
    p: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Logistic:
    """A logistic regression: coefficients with cluster-robust covariance, and whether Newton's method arrived."""

    coefficients: Floats
    covariance: Floats
    converged: bool

    def tested(self, index: int, n: int) -> Tested:
        """Return one coefficient with its Wald test; p is NaN where the fit did not converge."""
        z = float(self.coefficients[index] / np.sqrt(self.covariance[index, index])) if self.converged else math.nan
        return Tested(effect=float(self.coefficients[index]), z=z, p=p_value(z), n=n)


def normal_tail(z: float) -> float:
    """Return how often a standard normal number exceeds z."""
    return 0.5 * math.erfc(z / math.sqrt(2))


def p_value(z: float, side: Side = "both") -> float:
    """Return the p-value of a standard normal statistic: of |z|, or of values as low (`below`) or high as z."""
    if side == "both":
        return 2 * normal_tail(abs(z))
    return normal_tail(z if side == "above" else -z)


def normal_of_student(t: float, degrees: int) -> float:
    """Return the standard normal number that is as rare as Student's t with so many degrees of freedom.

    Wallace 1959: right to 2% of the tail's chance from ten degrees of freedom on, at the p-values that alarms need.
    """
    if math.isinf(t) or math.isnan(t):
        return t
    size = (8 * degrees + 1) / (8 * degrees + 3) * math.sqrt(degrees * math.log1p(t * t / degrees))
    return math.copysign(size, t)


def chi_squared_tail(x: float, degrees: int) -> float:
    """Return how often chi-squared with so many degrees of freedom exceeds x.

    By the recurrence Q(k) = Q(k - 2) + (x/2)^(k/2 - 1) e^(-x/2) / Gamma(k/2) (Abramowitz and Stegun 26.4.8).
    """
    if x <= 0:
        return 1.0
    tail = math.erfc(math.sqrt(x / 2)) if degrees % 2 else math.exp(-x / 2)
    for k in range(3 if degrees % 2 else 4, degrees + 1, 2):
        tail += math.exp((k / 2 - 1) * math.log(x / 2) - x / 2 - math.lgamma(k / 2))
    return tail


def holm(p_values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """Return the p-values corrected for being asked together (Holm 1979, with his weights in section 5).

    Rejecting those at most alpha makes any false alarm, among all of them, at most alpha likely, however the tests
    depend on each other. A question of twice the weight gets twice the share of alpha. Worked: 0.01, 0.04, 0.03 become
    0.03, 0.06, 0.06.
    """
    shares = [1.0] * len(p_values) if weights is None else list(weights)
    adjusted = [0.0] * len(p_values)
    left, worst = sum(shares), 0.0
    for index in sorted(range(len(p_values)), key=lambda i: p_values[i] / shares[i]):
        worst = max(worst, min(1.0, p_values[index] * left / shares[index]))
        adjusted[index] = worst
        left -= shares[index]
    return adjusted


def mean_test(values: Floats, clusters: Ints, *, side: Side = "both") -> Tested:
    """Return the mean of the values against 0, where values of one cluster (a prompt) are no independent witnesses."""
    mean, n = (float(values.mean()), len(values)) if len(values) else (math.nan, 0)
    return _over_error(mean, (values - mean) / max(n, 1), clusters, n, side)


def contrast(values: Floats, mine: NDArray[np.bool_], clusters: Ints, *, side: Side = "both") -> Tested:
    """Return the mean of the values that are `mine` less the mean of the others, clustered.

    The variance is the sandwich over clusters, C / (C - 1) times the sum of squared cluster totals of influence (Liang
    and Zeger 1986). Where a cluster holds values of both sides, what they share cancels: within a prompt this is a
    paired test, between prompts one of two samples, and no choice has to be made.
    """
    n = int(mine.sum())
    if not 0 < n < len(values):
        return Tested(effect=math.nan, z=math.nan, p=math.nan, n=n)
    here, there = float(values[mine].mean()), float(values[~mine].mean())
    influence = np.where(mine, (values - here) / n, -(values - there) / (len(values) - n))
    return _over_error(here - there, influence, clusters, n, side)


def _over_error(effect: float, influence: Floats, clusters: Ints, n: int, side: Side) -> Tested:
    _, index = np.unique(clusters, return_inverse=True)
    totals = np.bincount(index, weights=influence) if len(influence) else np.zeros(0)
    count = len(totals)
    variance = float((totals**2).sum()) * count / (count - 1) if count > 1 else 0.0
    # No variance at all: all values alike. A mean that is off is then beyond doubt, one that is not says nothing.
    z = effect / math.sqrt(variance) if variance > 1e-24 else (math.nan if abs(effect) < 1e-12 else math.inf * effect)
    # The variance is itself estimated, from so many clusters.
    return Tested(effect=effect, z=z, p=p_value(normal_of_student(z, max(count - 1, 1)), side), n=n)


def trend(values: Floats) -> Tested:
    """Return how values in order of time rise or fall: Pearson's correlation with their number, by permutation.

    If time does not matter, all orders of the values are equally likely; the correlation then has mean 0 and variance
    1 / (n - 1) exactly (Hoeffding 1951), and is close to normal.
    """
    n = len(values)
    time = np.arange(n) - (n - 1) / 2
    centred = values - values.mean() if n else values
    length = math.sqrt(float(time @ time) * float(centred @ centred))
    r = float(time @ centred) / length if length > 0 else math.nan
    z = r * math.sqrt(max(n - 1, 0))
    return Tested(effect=r, z=z, p=p_value(z), n=n)


def logistic(features: Floats, outcome: Floats, clusters: Ints, *, steps: int = 50) -> Logistic:
    """Return P(outcome = 1) = sigmoid(features @ coefficients) fitted by Newton's method; no constant is added.

    `features` [n, d], `outcome` [n] of 0 and 1. The covariance is the cluster sandwich with C / (C - 1). Not converged
    where a feature separates the outcomes without exception (the coefficient is then infinite), or says nothing.
    """
    beta = np.zeros(features.shape[1])
    converged = False
    hessian = np.eye(len(beta))
    for _ in range(steps):
        chance = 1 / (1 + np.exp(-np.clip(features @ beta, -500, 500)))
        hessian = (features * (chance * (1 - chance))[:, None]).T @ features
        if np.linalg.matrix_rank(hessian) < len(beta):
            break
        step = np.linalg.solve(hessian, features.T @ (outcome - chance))
        beta = beta + step
        if np.abs(step).max() < 1e-10:
            converged = bool(np.abs(beta).max() < 100)
            break
    if not converged:
        return Logistic(coefficients=beta, covariance=np.full(hessian.shape, math.nan), converged=False)
    chance = 1 / (1 + np.exp(-(features @ beta)))
    inverse = np.linalg.inv((features * (chance * (1 - chance))[:, None]).T @ features)
    _, index = np.unique(clusters, return_inverse=True)
    count = int(index.max()) + 1
    scores = np.zeros((count, len(beta)))
    np.add.at(scores, index, features * (outcome - chance)[:, None])
    return Logistic(
        coefficients=beta,
        covariance=inverse @ (scores.T @ scores) @ inverse * (count / max(count - 1, 1)),
        converged=True,
    )
