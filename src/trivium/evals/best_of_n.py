"""Best-of-n: sample n completions, keep the one that a reward scores highest; a policy without any training.

From N samples a prompt, what the best of n < N is like follows for every n at once and without drawing again: the
average over all subsets of n is a weighted mean of the samples in order of their score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def kl_bound(n: int) -> float:
    """Return `log n - (n - 1) / n` (nats), what KL(best-of-n || policy) is at most (Stiennon et al. 2020).

    Exact where no two completions score alike, which repeated ones do (Beirami et al. 2024, arXiv 2401.01879). Worked:
    0.193 for 2, 3.175 for 64.
    """
    return math.log(n) - (n - 1) / n


def rank_weights(num: int, n: int) -> Floats:
    """Return how probably the sample of each rank (0 worst) is the best of n drawn from `num`: float64 [num], sum 1.

    `C(rank, n - 1) / C(num, n)`: the other n - 1 come from those below it. Worked: of 4, the best of 2 has weights 0,
    1/6, 2/6, 3/6. Raises ValueError for an n outside 1 to `num`.
    """
    if not 1 <= n <= num:
        raise ValueError(f"the best of {n} cannot be drawn from {num} samples")
    return np.array([math.comb(rank, n - 1) / math.comb(num, n) for rank in range(num)], dtype=np.float64)


def sample_weights(scores: Floats, n: int) -> Floats:
    """Return how probably each sample is the best of n drawn from its row, [P, N]; equal scores share alike.

    `scores` [P, N]: N samples of each of P prompts. So `(sample_weights(scores, n) * values).sum(1)` is, of each
    prompt, the unbiased estimate of what the best of n by score has for a value (the pass@k of Chen et al. 2021, with a
    reward in place of a test). Worked: scores 2 5 5 1, n = 2: weights 1/6 5/12 5/12 0.
    """
    order = np.argsort(scores, axis=1, kind="stable")
    by_rank = rank_weights(scores.shape[1], n)
    weights = np.empty_like(scores, dtype=np.float64)
    for row, (places, values) in enumerate(zip(order, scores, strict=True)):
        _, block, counts = np.unique(values[places], return_inverse=True, return_counts=True)
        weights[row, places] = (np.bincount(block, by_rank) / counts)[block]
    return weights


def best_of_kl(scores: Floats, probabilities: Floats, n: int) -> Floats:
    """Return the estimated KL(best-of-n || policy) of each prompt in nats, [P], from N samples of the policy.

    Let each completion have a stretch of the line from 0 to 1 as long as its probability, in order of score. The best
    of n falls at v with density `n v^(n-1)`, whose KL to the uniform one is `kl_bound(n)`; what it is within the
    stretch of one score is no choice between completions, and is taken off (the chain rule). Within the upper share x
    of what lies up to its end that is, with a = 1 - x,

        log(n x / (1 - a^n)) - (n - 1) / n - (n - 1) a^n log a / (1 - a^n),

    0 for a rare completion and `kl_bound(n)` for the only one. `probabilities` [P, N] are the policy's own, of all that
    scores like the sample (`level_probabilities`); where the stretch ends is the share of samples that score no higher.
    """
    num = scores.shape[1]
    ends = (scores[:, None, :] <= scores[:, :, None]).mean(2) if num else scores
    x = np.clip(probabilities / np.maximum(ends, probabilities), 0.0, 1.0)
    return np.asarray(kl_bound(n) - (sample_weights(scores, n) * _within(x, n)).sum(1), dtype=np.float64)


def _within(x: Floats, n: int) -> Floats:
    """Return the KL within a stretch that is the upper share x of all up to its end; by its series where that is small.

    There the formula is a small difference of large terms: `((n - 1) x)^2 / 24` is good to the third order.
    """
    small = np.square((n - 1) * x) / 24
    log_a = np.log1p(-np.minimum(x, 1 - 1e-16))
    power = np.exp(n * log_a)
    rest = -np.expm1(n * log_a)
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = np.log(n * x / rest) - (n - 1) / n - (n - 1) * power * log_a / rest
    return np.where(n * x < 1e-3, small, exact)


def level_probabilities(
    ids: Sequence[Sequence[int]], scores: Sequence[float], logprobs: Sequence[float]
) -> list[float]:
    """Return the policy's probability of all sampled completions that score like each one, of one prompt.

    `ids` tells completions apart, so that a repeated one counts once; `logprobs` are summed over the completion (nats).
    """
    distinct: dict[float, dict[tuple[int, ...], float]] = {}
    for one, score, logprob in zip(ids, scores, logprobs, strict=True):
        distinct.setdefault(score, {})[tuple(one)] = math.exp(logprob)
    return [min(1.0, sum(distinct[score].values())) for score in scores]


def win_shares(ours: Floats, theirs: Floats) -> Floats:
    """Return the share of opponents that each completion beats, ties as half: grades [P, N] against [P, M], to [P, N].

    With M samples of the reference a prompt, the mean is the win rate against one of them, with less noise.
    """
    a, b = ours[:, :, None], theirs[:, None, :]
    return np.asarray(((a > b) + 0.5 * (a == b)).mean(2), dtype=np.float64)
