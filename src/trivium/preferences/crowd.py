"""Responses and annotators on one scale: Bradley and Terry's model with the annotators' skill.

An annotator k who compares i with j says "i" with probability eta_k p + (1 - eta_k) (1 - p), p = sigmoid(s_i - s_j):
with chance eta_k they say what the scores say, else the contrary. eta is 1 for the model itself, 0.5 for a coin, below
for somebody who has the scale upside down (Chen, Bennett, Collins-Thompson and Horvitz 2013, equation 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trivium.preferences.comparisons import derive
from trivium.records import Ranking

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
START = 0.9
"""Every annotator's skill at the start. Above one half, or all scores could come out upside down with all skills."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrowdScores:
    """Scores in nats by response, skills in (0, 1) by annotator, the penalised log-likelihood, whether EM arrived."""

    scores: dict[str, float]
    skills: dict[str, float]
    log_likelihood: float
    iterations: int
    converged: bool


def crowd_bradley_terry(
    pairs: Sequence[tuple[str, str, str]],
    *,
    penalty: float = 0.1,
    skilled: bool = True,
    tolerance: float = 1e-9,
    most_iterations: int = 500,
) -> CrowdScores:
    """Return the scores and skills of greatest penalised likelihood of (annotator, chosen, rejected) pairs.

    EM: whether a verdict was meant is the hidden part; given that, the scores are a Bradley-Terry fit with fractional
    wins (Newton's method, one system for each set of responses that comparisons connect) and a skill is a mean. The
    penalty is `penalty * sum(s^2)`, which also fixes the zero, and one pseudo-verdict each for and against a skill of
    0.5 (a Beta(2, 2) prior, so none reaches 0 or 1). Left out of the paper: its active learning, and its virtual
    node, whose place the penalty takes. `skilled=False` fixes all skills at 1: Bradley and Terry's model alone.
    """
    annotators = {name: place for place, name in enumerate(sorted({who for who, _, _ in pairs}))}
    things = {name: place for place, name in enumerate(sorted({name for _, a, b in pairs for name in (a, b)}))}
    who = np.array([annotators[a] for a, _, _ in pairs], dtype=np.int64)
    won = np.array([things[chosen] for _, chosen, _ in pairs], dtype=np.int64)
    lost = np.array([things[rejected] for _, _, rejected in pairs], dtype=np.int64)
    systems = _connected(len(things), won, lost)
    scores = np.zeros(len(things))
    skills = np.full(len(annotators), START if skilled else 1.0)
    told = np.bincount(who, minlength=len(skills))
    before, number, converged = -np.inf, 0, False
    while number < most_iterations and not converged:
        number += 1
        p = _sigmoid(scores[won] - scores[lost])
        right, wrong = skills[who] * p, (1 - skills[who]) * (1 - p)
        meant = right / (right + wrong)
        if skilled:
            skills = (np.bincount(who, weights=meant, minlength=len(skills)) + 1) / (told + 2)
        scores = _fit(scores, meant, won, lost, systems, penalty)
        now = _objective(scores, skills, who, won, lost, penalty, skilled)
        converged = now - before < tolerance * (1 + abs(now))
        before = now
    return CrowdScores(
        scores={name: float(scores[place]) for name, place in things.items()},
        skills={name: float(skills[place]) for name, place in annotators.items()},
        log_likelihood=before,
        iterations=number,
        converged=converged,
    )


def voted_pairs(rankings: Iterable[Ranking]) -> list[tuple[str, str, str]]:
    """Return (annotator, chosen, rejected) of every decided pair of the rankings, in their order."""
    return [(ranking.annotator, *pair) for ranking in rankings for pair in derive(ranking)]


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -500, 500))))


def _objective(
    scores: Floats, skills: Floats, who: Ints, won: Ints, lost: Ints, penalty: float, skilled: bool
) -> float:
    p = _sigmoid(scores[won] - scores[lost])
    likelihood = float(np.log(skills[who] * p + (1 - skills[who]) * (1 - p)).sum()) - penalty * float(scores @ scores)
    return likelihood + (float(np.log(skills * (1 - skills)).sum()) if skilled else 0.0)


def _connected(count: int, won: Ints, lost: Ints) -> list[Ints]:
    """Return the sets of things that comparisons connect, as arrays [sets, size], one for each size."""
    root = list(range(count))

    def find(thing: int) -> int:
        while root[thing] != thing:
            root[thing] = root[root[thing]]
            thing = root[thing]
        return thing

    for a, b in zip(won.tolist(), lost.tolist(), strict=True):
        root[find(a)] = find(b)
    members: dict[int, list[int]] = {}
    for thing in range(count):
        members.setdefault(find(thing), []).append(thing)
    by_size: dict[int, list[list[int]]] = {}
    for found in members.values():
        by_size.setdefault(len(found), []).append(found)
    return [np.array(found, dtype=np.int64) for _, found in sorted(by_size.items())]


def _fit(scores: Floats, meant: Floats, won: Ints, lost: Ints, systems: list[Ints], penalty: float) -> Floats:
    """Return scores of greatest sum(meant log p + (1 - meant) log(1 - p)) - penalty |s|^2, by Newton's method."""
    for _ in range(100):
        p = _sigmoid(scores[won] - scores[lost])
        pull, curve = meant - p, p * (1 - p)
        size = len(scores)
        gradient = np.bincount(won, pull, size) - np.bincount(lost, pull, size) - 2 * penalty * scores
        step = np.zeros(size)
        for members in systems:
            step[members] = _solve(members, gradient, curve, won, lost, penalty)
        # The objective is concave and its curvature at most a quarter: half a Newton step where a whole one is long.
        longest = float(np.abs(step).max()) if size else 0.0
        scores = scores + step * min(1.0, 2.0 / max(longest, 1e-300))
        if longest < 1e-11:
            break
    return scores


def _solve(members: Ints, gradient: Floats, curve: Floats, won: Ints, lost: Ints, penalty: float) -> Floats:
    """Return Newton's step for sets of equal size at once, [sets, size]."""
    sets, size = members.shape
    place = np.full(int(max(won.max(), lost.max(), members.max())) + 1, -1, dtype=np.int64)
    place[members] = np.arange(sets * size).reshape(sets, size)
    inside = place[won] >= 0
    a, b, weight = place[won[inside]], place[lost[inside]], curve[inside]
    hessian = np.zeros((sets, size, size))
    for one, two, sign in ((a, a, 1), (b, b, 1), (a, b, -1), (b, a, -1)):
        np.add.at(hessian, (one // size, one % size, two % size), sign * weight)
    hessian += 2 * penalty * np.eye(size)
    return np.asarray(np.linalg.solve(hessian, gradient[members][:, :, None])[:, :, 0])
