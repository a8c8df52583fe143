"""Questions with known answers: how well an annotator does on them, and whether a newcomer may go on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from trivium.preferences.store import Store, Task
from trivium.records import AnnotatorKind

Groups = Sequence[Sequence[str]]
"""Names, best group first; a tie shares a group."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How an annotator stands with the questions that newcomers answer first; `passed` is None while some are left."""

    asked: int
    answered: int
    right: float
    """Share of the known pairs that were put right, a tie counting half; 1 where nothing was asked."""
    pass_mark: float
    passed: bool | None


def pairs_right(given: Groups, known: Groups) -> tuple[float, int]:
    """Return how many pairs of the known order the given one has right, and how many there are.

    Where the known answer is a tie nothing can be wrong; a tie in the given one is half right. Worked: known a > b > c,
    given b > a = c: a-b is wrong, a-c half, b-c right, so 1.5 of 3.
    """
    place = {name: rank for rank, group in enumerate(given) for name in group}
    right, total = 0.0, 0
    for better, worse in itertools.combinations(known, 2):
        for one, other in itertools.product(better, worse):
            total += 1
            if one in place and other in place:
                right += 1.0 if place[one] < place[other] else 0.5 if place[one] == place[other] else 0.0
    return right, total


def standing(store: Store, annotator: str, collection: str, kind: AnnotatorKind = "human") -> Standing:
    """Return how an annotator stands with a collection's qualification."""
    return _standing(store, annotator, collection, kind, store.questions(collection, "qualify"))


def shut_out(store: Store, annotator: str, collection: str | None, kind: AnnotatorKind = "human") -> frozenset[str]:
    """Return the collections (of the one asked about, or of all) of which this annotator failed the qualification."""
    found = store.questions(collection, "qualify")
    names = {task.collection for task in found}
    every = {
        name: _standing(store, annotator, name, kind, [t for t in found if t.collection == name]) for name in names
    }
    return frozenset(name for name, each in every.items() if each.passed is False)


def _standing(store: Store, annotator: str, collection: str, kind: AnnotatorKind, asked: Sequence[Task]) -> Standing:
    rows = store.ranking_rows(collection, [kind], purposes=("qualify",)) if asked else []
    answers = {row["task_id"]: row["groups"] for row in rows if row["annotator"] == annotator}
    scores = [pairs_right(answers[task.id], task.gold) for task in asked if task.id in answers]
    total = sum(number for _, number in scores)
    right = sum(score for score, _ in scores) / total if total else 1.0
    pass_mark = store.description(collection)[1] if asked else 0.0
    passed = right >= pass_mark if len(answers) == len(asked) else None
    return Standing(asked=len(asked), answered=len(answers), right=right, pass_mark=pass_mark, passed=passed)
