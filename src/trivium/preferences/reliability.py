"""How reliable each annotator is, from votes alone: nobody knows the right answers.

Dawid and Skene: the truth of each item and the errors of each annotator are estimated in turn, each from the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trivium.preferences.comparisons import derive
from trivium.records import Ranking

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FEWEST = 20
"""Pairs shared with others below which an annotator's reliability is not told apart from the others'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Votes:
    """What Dawid and Skene's model found in votes.

    `truth` [items, classes] is how likely each class is; `confusion` [annotators, classes, classes] how often an
    annotator says the second where the first is true; `prior` [classes]. `log_likelihood` in nats; `converged` where
    it rose by less than the tolerance in the last of `iterations`.
    """

    truth: Floats
    confusion: Floats
    prior: Floats
    log_likelihood: float
    iterations: int
    converged: bool

    @property
    def accuracy(self) -> Floats:
        """How often each annotator says what is true, [annotators], classes weighted as they occur."""
        return np.asarray(np.einsum("c,acc->a", self.prior, self.confusion))


def dawid_skene(
    votes: Ints,
    num_classes: int,
    *,
    one_coin: bool = False,
    smoothing: float = 0.0,
    tolerance: float = 1e-9,
    most_iterations: int = 2000,
) -> Votes:
    """Return the maximum-likelihood truth and confusion matrices of votes [annotators, items], -1 for a missing one.

    EM from the share of votes that each class got (Dawid and Skene 1979, section 3): no randomness, so equal votes
    give equal results. `one_coin`: one accuracy an annotator, errors spread evenly, classes equally likely; right
    where the classes are two sides of a pair, whose names mean nothing. `smoothing` counts are added to every cell of a
    confusion matrix: 0 is maximum likelihood. With a single vote an item has no witness against its annotator: such
    items are for the caller to leave out.
    """
    annotators, items = votes.shape
    said = (votes[:, :, None] == np.arange(num_classes)).astype(np.float64)
    shares = said.sum(axis=0)
    truth = np.where(shares.sum(axis=1, keepdims=True) > 0, shares, 1.0)
    truth = truth / truth.sum(axis=1, keepdims=True)
    before, number, converged = -np.inf, 0, False
    while number < most_iterations and not converged:
        number += 1
        prior = np.full(num_classes, 1 / num_classes) if one_coin else truth.mean(axis=0)
        counts = np.einsum("ic,aik->ack", truth, said) + smoothing
        confusion = _confusion(counts, one_coin)
        with np.errstate(divide="ignore"):
            logs = np.log(confusion)
            joint = np.log(prior)[None, :] + np.zeros((items, 1))
        for a in range(annotators):
            given = votes[a] >= 0
            joint[given] += logs[a][:, votes[a][given]].T
        top = joint.max(axis=1, keepdims=True)
        evidence = top + np.log(np.exp(joint - top).sum(axis=1, keepdims=True))
        truth, likelihood = np.exp(joint - evidence), float(evidence.sum())
        converged = likelihood - before < tolerance * (1 + abs(likelihood))
        before = likelihood
    return Votes(
        truth=truth, confusion=confusion, prior=prior, log_likelihood=before, iterations=number, converged=converged
    )


def _confusion(counts: Floats, one_coin: bool) -> Floats:
    """Return counts [annotators, true, said] as rows of chances; a class nobody is thought to be in stays even."""
    classes = counts.shape[1]
    if one_coin:
        right, total = np.einsum("acc->a", counts), counts.sum(axis=(1, 2))
        p = np.where(total > 0, right / np.maximum(total, 1e-300), 1 / classes)
        spread = (1 - p) / max(classes - 1, 1)
        eye = np.eye(classes)
        return np.asarray(p[:, None, None] * eye + spread[:, None, None] * (1 - eye))
    sums = counts.sum(axis=2, keepdims=True)
    return np.asarray(np.where(sums > 0, counts / np.maximum(sums, 1e-300), 1 / classes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """How often an annotator's decided pairs are right, as far as the others' votes tell; from `pairs` shared ones.

    `accuracy` is 0.5 for a coin. `weight` is what their rankings should count for in training.
    """

    accuracy: float
    pairs: int
    weight: float


def pair_votes(rankings: Iterable[Ranking]) -> tuple[list[str], Ints]:
    """Return annotators and their votes [annotators, pairs] on pairs that at least two decided: 0 first, 1 second.

    A pair is two responses to one prompt in the order of their ids; -1 where an annotator ties them or did not see
    them. Of two votes of one annotator the last counts.
    """
    found: dict[tuple[str, str, str], dict[str, int]] = defaultdict(dict)
    names = set()
    for ranking in rankings:
        names.add(ranking.annotator)
        for chosen, rejected in derive(ranking):
            first, second = sorted((chosen, rejected))
            found[ranking.prompt_id, first, second][ranking.annotator] = int(chosen == second)
    annotators = sorted(names)
    shared = [by for _, by in sorted(found.items()) if len(by) >= 2]
    votes = np.full((len(annotators), len(shared)), -1, dtype=np.int64)
    for column, by in enumerate(shared):
        for name, vote in by.items():
            votes[annotators.index(name), column] = vote
    return annotators, votes


def reliability(rankings: Iterable[Ranking]) -> dict[str, Reliability]:
    """Return every annotator's reliability, by name, from the pairs that several annotators decided.

    The accuracy p is Dawid and Skene's with one coin an annotator. The weight is max(0, 2p - 1), the share of the
    signal that gets through the annotator's errors, times what makes the mean over all rankings 1, so that the learning
    rate keeps its meaning. It is the weight under which votes of equal noise are combined best while they are close to
    coins. Who errs more often than a coin gets 0, not a negative weight: a contrary person is to be talked to, not
    turned round. With two annotators nobody can say which of them errs: both get the same. Annotators with fewer than
    FEWEST shared pairs get the accuracy of all.
    """
    given = list(rankings)
    annotators, votes = pair_votes(given)
    counts = (votes >= 0).sum(axis=1)
    # One half of a vote for and against: nobody is perfect for having been agreed with three times.
    accuracy = dawid_skene(votes, 2, one_coin=True, smoothing=0.5).accuracy if votes.size else np.full(len(counts), 0.5)
    known = counts >= FEWEST
    pooled = float(np.average(accuracy[known], weights=counts[known])) if known.any() else 1.0
    accuracy = np.where(known, accuracy, pooled)
    raw = np.maximum(0.0, 2 * accuracy - 1)
    times = np.array([sum(r.annotator == name for r in given) for name in annotators], dtype=np.float64)
    mean = float(raw @ times) / max(float(times.sum()), 1.0)
    weights = raw / mean if mean > 0 else np.ones_like(raw)
    return {
        name: Reliability(accuracy=float(p), pairs=int(n), weight=float(w))
        for name, p, n, w in zip(annotators, accuracy, counts, weights, strict=True)
    }
