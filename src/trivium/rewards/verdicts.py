"""What a judge said about two responses, and what follows from it when both orders were asked.

A judge leans to a place, so every pair is asked in both orders. In a *hard* reading both orders must name the same
response, else it is a tie. In a *soft* one the probabilities of the two orders are averaged, so that a judge who only
likes a place comes out near one half. An answer that cannot be read is neither: the pair stays unjudged.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Literal

Verdict = Literal["A", "B", "tie"]

Choice = tuple[float, float]
"""The probabilities that a model gives to the letters A and B as its answer; together at most 1, and often less."""

LEAST_MASS = 0.01
"""What A and B together must have of the probability for an answer to be one: below, the model does not play along."""

_VERDICT = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
_MEANINGS: dict[str, Verdict] = {"A": "A", "B": "B", "C": "tie", "TIE": "tie"}
_ALONE = re.compile(r"\W*(A|B|C|tie)\W*", re.IGNORECASE)


def parse_verdict(reply: object) -> Verdict | None:
    """Return what a reply says: `[[A]]`, `[[B]]`, `[[C]]` anywhere in it, or the letter alone; else None.

    A reply that names two different verdicts, or none, is malformed; nothing is guessed from its prose.
    """
    if not isinstance(reply, str):
        return None
    alone = _ALONE.fullmatch(reply.strip())
    named = {found.upper() for found in _VERDICT.findall(reply)} or ({alone[1].upper()} if alone else set())
    if len(named) != 1:
        return None
    return _MEANINGS[named.pop()]


def chance_of_a(choice: Sequence[float] | None) -> float | None:
    """Return the probability of A against B, or None where the answer failed or hardly is one of the two.

    Worked: letters of 0.3 and 0.1 give 3/4, although the rest of the answers (0.6) is something else.
    """
    if choice is None or not sum(choice) >= LEAST_MASS:  # a NaN is refused, too
        return None
    return choice[0] / (choice[0] + choice[1])


def both_orders(forward: Sequence[float] | None, backward: Sequence[float] | None) -> tuple[float, float] | None:
    """Return (outcome, probability) of the first response against the second, or None where an answer failed.

    `forward` was asked with the first response as A, `backward` with it as B. The outcome is 1, -1, or 0 where the
    orders disagree; the probability is the mean over both (Bai et al. 2022, section 4.1, read letters alike).

    Worked: 0.9 for A in one order and 0.7 for A in the other is a liking for A: outcome 0, probability 0.6.
    """
    first, second = chance_of_a(forward), chance_of_a(backward)
    if first is None or second is None:
        return None
    second = 1.0 - second
    outcome = 1.0 if first > 0.5 < second else -1.0 if first < 0.5 > second else 0.0
    return outcome, (first + second) / 2


def grouped(count: int, outcome: Mapping[tuple[int, int], float | None]) -> list[list[int]]:
    """Return groups of the indices 0..count-1, best first, by their share of wins over the others (a tie is half).

    `outcome` of each pair (i, j), i < j: 1 where i won, -1 where j did, 0 for a tie, None where the comparison failed.
    Equal shares make a group. Indices whose comparison failed are put into one group, so that no failed answer can
    turn into a preference; where nothing else is left, all share one group, which says nothing.
    """
    cluster = _clusters(count, [pair for pair, result in outcome.items() if result is None])
    points: dict[int, list[float]] = {name: [] for name in cluster}
    for (i, j), result in outcome.items():
        if result is not None and cluster[i] != cluster[j]:
            points[cluster[i]].append((1 + result) / 2)
            points[cluster[j]].append((1 - result) / 2)
    share = [sum(points[name]) / max(len(points[name]), 1) for name in cluster]
    return [[i for i in range(count) if share[i] == s] for s in sorted(set(share), reverse=True)]


def pairs_of(count: int) -> list[tuple[int, int]]:
    """Return every pair (i, j), i < j, of so many indices."""
    return list(itertools.combinations(range(count), 2))


def _clusters(count: int, failed: list[tuple[int, int]]) -> list[int]:
    """Return a cluster name per index; the two indices of a failed pair get the same."""
    cluster = list(range(count))
    for i, j in failed:
        old, new = cluster[j], cluster[i]
        cluster = [new if name == old else name for name in cluster]
    return cluster
