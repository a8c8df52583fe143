"""How annotators go about it: contradictions in a circle, drift over time, answers given too fast."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from trivium.preferences.agreement import Estimate, bootstrap, ratio
from trivium.preferences.comparisons import derive
from trivium.preferences.sheet import Floats, Sheet, sheet_of
from trivium.preferences.significance import Tested, contrast, trend
from trivium.records import Ranking

FASTEST = 100.0
"""Characters a second that nobody reads: four times the 238 words a minute of silent reading (Brysbaert 2019)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Triads:
    """Of the triads of which all three pairs are decided, how many go round in a circle (a over b over c over a).

    `expected` is what coins would give: 2 of the 8 ways to decide three pairs are circles, a quarter.
    """

    circular: int
    decided: int
    expected: float


def circular_triads(pairs: Iterable[tuple[str, str]]) -> Triads:
    """Return the circles among (chosen, rejected) pairs of one annotator and prompt (Kendall and Babington Smith 1940).

    A pair named twice counts by its majority, and not at all where that is even. Of n things with all pairs decided
    the number is n (n - 1) (2n - 1) / 12 - sum(wins^2) / 2.
    """
    lead: dict[tuple[str, str], int] = defaultdict(int)
    for chosen, rejected in pairs:
        lead[chosen, rejected] += 1
        lead[rejected, chosen] -= 1
    names = sorted({name for pair in lead for name in pair})
    index = {name: place for place, name in enumerate(names)}
    beats = np.zeros((len(names), len(names)), dtype=np.int64)
    for (a, b), margin in lead.items():
        beats[index[a], index[b]] = margin > 0
    # Each circle is found from each of its three members; each decided triad from the six orders of its members.
    circular = int(np.trace(beats @ beats @ beats)) // 3
    tied = beats + beats.T
    decided = int(np.trace(tied @ tied @ tied)) // 6
    return Triads(circular=circular, decided=decided, expected=decided / 4)


def intransitivity(rankings: Iterable[Ranking]) -> dict[str, Triads]:
    """Return each annotator's circular triads, over all prompts of which they judged several pairs.

    Only pairs that were asked one by one count: one ranking of three or more responses cannot contradict itself.
    """
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for ranking in rankings:
        if sum(map(len, ranking.groups)) == 2:
            pairs[ranking.annotator, ranking.prompt_id] += derive(ranking)
    found: dict[str, list[Triads]] = defaultdict(list)
    for (annotator, _), own in sorted(pairs.items()):
        found[annotator].append(circular_triads(own))
    return {
        annotator: Triads(
            circular=sum(t.circular for t in each),
            decided=sum(t.decided for t in each),
            expected=sum(t.expected for t in each),
        )
        for annotator, each in found.items()
    }


def consistence(num_circular: int, num_things: int) -> float:
    """Return Kendall's coefficient of consistence of n things, all pairs decided: 1 without circles, 0 with most."""
    n = num_things
    most = (n**3 - n) / 24 if n % 2 else (n**3 - 4 * n) / 24
    return 1 - num_circular / most if most else float("nan")


def with_others(sheet: Sheet, annotator: str) -> tuple[list[int], Floats]:
    """Return the annotator's rows that others judged too, in the order given, and their mean agreement with them."""
    pairs, values = sheet.agreements
    number = sheet.annotators.index(annotator)
    found: dict[int, list[float]] = defaultdict(list)
    for (a, b), value in zip(pairs.tolist(), values.tolist(), strict=True):
        for row in (a, b):
            if sheet.who[row] == number:
                found[row].append(value)
    rows = sorted(found)
    return rows, np.array([np.mean(found[row]) for row in rows])


def drift(sheet: Sheet, annotator: str) -> Tested:
    """Return how the annotator's agreement with others changes over their judgements, which are in order of time.

    The effect is a correlation: -1 falls, 1 rises. A change may be fatigue, or learning.
    """
    return trend(with_others(sheet, annotator)[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Haste:
    """An annotator's share of answers too fast to have been read, and how these agree with others beside the rest."""

    share: Estimate
    characters_per_s: float
    cost: Tested


def haste(rankings: Iterable[Ranking], lengths: Mapping[str, int], *, seed: int = 0) -> dict[str, Haste]:
    """Return, per annotator whose times were recorded, the answers that came before the texts could be read.

    Too fast is more than `FASTEST` characters of responses a second. `characters_per_s` is the median pace. `cost` is
    the agreement with others on those answers less that on the annotator's other answers (its p is one-sided: below).
    """
    timed = [r for r in rankings if r.seconds > 0 and r.groups]
    sheet = sheet_of(timed)
    kept = [r for r in timed if sum(len(group) for group in r.groups) >= 2]
    pace = np.array([sum(lengths[n] for n in names) / r.seconds for names, r in zip(sheet.names, kept, strict=True)])
    found = {}
    for annotator in sheet.annotators:
        mine = sheet.mine(annotator)
        tables = [[np.sum(pace[mine & (sheet.prompts == p)] > FASTEST), np.sum(mine & (sheet.prompts == p))]
                  for p in np.unique(sheet.prompts[mine])]  # fmt: skip
        share = bootstrap(np.array(tables, dtype=np.float64), ratio, seed=seed)
        rows, values = with_others(sheet, annotator)
        cost = contrast(values, pace[rows] > FASTEST, sheet.prompts[rows], side="below")
        if share:
            found[annotator] = Haste(share=share, characters_per_s=float(np.median(pace[mine])), cost=cost)
    return found


def majority_pairs(rankings: Iterable[Ranking]) -> list[tuple[str, str]]:
    """Return (chosen, rejected) of each pair that more annotators decide one way than the other."""
    lead: dict[tuple[str, str], int] = defaultdict(int)
    for ranking in rankings:
        for chosen, rejected in derive(ranking):
            lead[chosen, rejected] += 1
            lead[rejected, chosen] -= 1
    return [pair for pair, margin in sorted(lead.items()) if margin > 0]
