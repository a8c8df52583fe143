"""Rankings as numbers: one row per judgement, ready for the tests of bias and reliability."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trivium.preferences.agreement import midranks
from trivium.records import Ranking

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Judgements as rows, in the order given.

    `who` [R] is a place in `annotators`; `items` [R] numbers the sets of responses that were judged, `prompts` [R] the
    prompts. `scores[r]` [K] holds the response's midranks turned round and centred: 0 on average, higher is better.
    `names[r]` are the responses in that order, `places[r]` their centred places on the screen, earlier is higher
    (None: not recorded).
    """

    annotators: tuple[str, ...]
    who: Ints
    items: Ints
    prompts: Ints
    names: tuple[tuple[str, ...], ...]
    scores: tuple[Floats, ...]
    places: tuple[Floats | None, ...]

    def __len__(self) -> int:
        """Return the number of judgements."""
        return len(self.who)

    @cached_property
    def rows_of(self) -> list[list[int]]:
        """The rows of each item, one list an item."""
        found: dict[int, list[int]] = defaultdict(list)
        for row, item in enumerate(self.items.tolist()):
            found[item].append(row)
        return [found[item] for item in range(len(found))]

    def mine(self, annotator: str) -> NDArray[np.bool_]:
        """Return which rows are the annotator's."""
        return np.asarray(self.who == self.annotators.index(annotator))

    @cached_property
    def agreements(self) -> tuple[Ints, Floats]:
        """The pairs of judgements of one item by different annotators, int [P, 2], and their rank correlation [P].

        For a pair of responses it is 1 for the same verdict, -1 for the opposite, 0 where one is a tie.
        """
        pairs: list[tuple[int, int]] = []
        values: list[float] = []
        for rows in self.rows_of:
            stack = np.array([self.scores[row] for row in rows])
            lengths = np.sqrt((stack**2).sum(axis=1))
            # A single tie has length 0 and correlates with nothing.
            stack = stack / np.where(lengths > 0, lengths, 1.0)[:, None]
            gram = (stack @ stack.T).tolist()
            for (a, first), (b, second) in itertools.combinations(enumerate(rows), 2):
                if self.who[first] != self.who[second]:
                    pairs.append((first, second))
                    values.append(gram[a][b])
        return np.array(pairs, dtype=np.int64).reshape(-1, 2), np.array(values, dtype=np.float64)

    @cached_property
    def residuals(self) -> list[Floats]:
        """Each judgement's scores less what the others' scores of the same responses foretell of them.

        The forecast is one slope, fitted over all judgements, times the mean of the others; without others it is 0.
        What it takes away is the responses' quality, which is only noise to a test of the screen.
        """
        others = [np.zeros_like(scores) for scores in self.scores]
        for rows in self.rows_of:
            who = self.who[rows]
            stack = np.array([self.scores[row] for row in rows])
            rest = (who[:, None] != who[None, :]).astype(np.float64)
            means = rest @ stack / np.maximum(rest.sum(axis=1, keepdims=True), 1)
            for row, mean in zip(rows, means, strict=True):
                others[row] = mean
        own = sum(float(s @ o) for s, o in zip(self.scores, others, strict=True))
        room = sum(float(o @ o) for o in others)
        slope = own / room if room > 0 else 0.0
        return [s - slope * o for s, o in zip(self.scores, others, strict=True)]

    @cached_property
    def placings(self) -> Floats:
        """What a test of the screen adds up, [R, 3], NaN where no order was recorded or all is one tie.

        Of each judgement: sum(place * residual score), the variance of that over all orders on the screen,
        |place|^2 |residual|^2 / (K - 1), and the plain correlation of place and score.
        """
        found = np.full((len(self), 3), np.nan)
        for row, (places, scores, left) in enumerate(zip(self.places, self.scores, self.residuals, strict=True)):
            if places is not None and np.any(scores):
                width = float(places @ places)
                variance = width * float(left @ left) / (len(places) - 1)
                found[row] = places @ left, variance, cosine(places, scores)
        return found


def sheet_of(rankings: Iterable[Ranking]) -> Sheet:
    """Return the judgements as rows; those of fewer than two responses are left out.

    An annotator is a name and a kind, written `name` where all are of one kind and `name (kind)` otherwise.
    """
    kept = [(ranking, midranks(ranking)) for ranking in rankings]
    kept = [(ranking, ranks) for ranking, ranks in kept if len(ranks) >= 2]
    several = len({ranking.kind for ranking, _ in kept}) > 1
    people = [f"{r.annotator} ({r.kind})" if several else r.annotator for r, _ in kept]
    annotators = tuple(sorted(set(people)))
    number = {name: place for place, name in enumerate(annotators)}
    items: dict[tuple[str, ...], int] = {}
    prompts: dict[str, int] = {}
    names, scores, item_of, prompt_of = [], [], [], []
    places: list[Floats | None] = []
    for ranking, ranks in kept:
        own = tuple(sorted(ranks))
        names.append(own)
        middle = (len(own) + 1) / 2
        scores.append(np.array([middle - ranks[name] for name in own]))
        shown = {name: place for place, name in enumerate(ranking.order_shown)}
        complete = all(name in shown for name in own)
        # Among those judged alone: what else was on the screen does not matter here.
        order = np.argsort(np.argsort([shown[name] for name in own])) if complete else None
        places.append(None if order is None else np.asarray(middle - 1 - order, dtype=np.float64))
        prompt_of.append(prompts.setdefault(ranking.prompt_id, len(prompts)))
        item_of.append(items.setdefault((ranking.prompt_id, *own), len(items)))
    return Sheet(
        annotators=annotators,
        who=np.array([number[name] for name in people], dtype=np.int64),
        items=np.array(item_of, dtype=np.int64),
        prompts=np.array(prompt_of, dtype=np.int64),
        names=tuple(names),
        scores=tuple(scores),
        places=tuple(places),
    )


def cosine(first: Floats, second: Floats) -> float:
    """Return the correlation of two centred vectors, 0 where one of them is all zero (a single tie says nothing)."""
    length = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / length if length > 0 else 0.0


def leanings(sheet: Sheet, numbers: Mapping[str, float]) -> Floats:
    """Return, per judgement, the rank correlation of what was preferred with a number of the responses (Spearman).

    1: the higher the number the better placed; NaN where all numbers of the responses are alike. For a pair it is 1,
    -1, or 0 for a tie.
    """
    found = np.full(len(sheet), np.nan)
    for rows in sheet.rows_of:
        values = np.array([numbers[name] for name in sheet.names[rows[0]]], dtype=np.float64)
        order = np.sign(values[:, None] - values[None, :]).sum(axis=1) / 2
        if order.any():
            for row in rows:
                found[row] = cosine(sheet.scores[row], order)
    return found
