"""A reward model beside its annotators: pairs ordered right, how length sways that, and what length alone would do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trivium.data.collate import PreferenceGroup
from trivium.evals import calibration
from trivium.evals.stats import wilson_interval
from trivium.preferences.agreement import Estimate, bootstrap, ratio

Floats = NDArray[np.float64]
MATCHED = 0.1
"""Two responses are of matched length when they differ by at most this fraction of the longer one."""
LENGTH_BINS = (("much shorter", -1.0, -0.5), ("shorter", -0.5, -MATCHED), ("matched", -MATCHED, MATCHED),
               ("longer", MATCHED, 0.5), ("much longer", 0.5, 1.0))  # fmt: skip
"""What the chosen response is beside the rejected one, and from where to where (the ends of `matched` are its own)."""


class Figure(NamedTuple):
    """A share (or difference, or correlation) with its 95% interval, from `n` pairs."""

    value: float
    low: float
    high: float
    n: int


NOTHING = Figure(float("nan"), float("nan"), float("nan"), 0)
"""The figure of no pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPairs:
    """The pairs that annotators decided, as a reward model scored them; `[P]` each.

    `leads`: score of the chosen minus score of the rejected. `chosen`, `rejected`: their lengths in tokens. `prompts`:
    a number for each prompt, because pairs of one prompt are no independent witnesses. `within`: per completion that
    was scored, [N, 3]: prompt, score and length.
    """

    leads: Floats
    chosen: Floats
    rejected: Floats
    prompts: NDArray[np.int64]
    within: Floats

    @property
    def difference(self) -> Floats:
        """How much longer the chosen one is, as a fraction of the longer of the two: in [-1, 1]."""
        return (self.chosen - self.rejected) / np.maximum(np.maximum(self.chosen, self.rejected), 1)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.leads)


def scored_pairs(groups: Sequence[PreferenceGroup], scores: Sequence[float]) -> ScoredPairs:
    """Return the strict pairs of ranked groups; `scores` are those of all their completions, in order.

    Raises ValueError when there are not as many scores as completions.
    """
    names: dict[object, int] = {}
    pairs: list[tuple[float, int, int, int]] = []
    within: list[tuple[int, float, int]] = []
    left = list(scores)
    if len(left) != sum(len(group.completion_ids) for group in groups):
        raise ValueError(f"{len(left)} scores for {sum(len(group.completion_ids) for group in groups)} completions")
    for group in groups:
        prompt = names.setdefault(group.prompt_id or tuple(group.prompt_ids), len(names))
        mine, left = left[: len(group.completion_ids)], left[len(group.completion_ids) :]
        lengths = [len(ids) for ids in group.completion_ids]
        within += [(prompt, score, length) for score, length in zip(mine, lengths, strict=True)]
        for a, first in enumerate(group.ranks):
            for b, second in enumerate(group.ranks):
                if first < second:
                    pairs.append((mine[a] - mine[b], lengths[a], lengths[b], prompt))
    table = np.array(pairs, dtype=np.float64).reshape(-1, 4)
    return ScoredPairs(
        leads=table[:, 0],
        chosen=table[:, 1],
        rejected=table[:, 2],
        prompts=table[:, 3].astype(np.int64),
        within=np.array(within, dtype=np.float64).reshape(-1, 3),
    )


def clustered_share(hits: Floats, clusters: NDArray[np.int64]) -> Figure:
    """Return the share of hits (each 0 to 1) with Wilson's interval at the number of items that they are worth.

    Items of one cluster (pairs of one prompt) go together, so n items say less than n independent ones. The design
    effect, the variance between clusters over that of independent items, divides n (Kish 1965, section 5.4; never below
    1). Worked: every item written down k times has the interval of the n / k originals. Where all hits are equal the
    variance says nothing, and each cluster counts as one item.
    """
    n = len(hits)
    if not n:
        return NOTHING
    share = float(hits.mean())
    _, index = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(index)
    between = float(((np.bincount(index, weights=hits) - share * sizes) ** 2).sum())
    alone = float(((hits - share) ** 2).sum())
    design = between / alone if alone > 0 else n / len(sizes)
    worth = n / max(design, 1.0)
    return Figure(share, *wilson_interval(share * worth, worth), n)


def accuracy(pairs: ScoredPairs, where: NDArray[np.bool_] | None = None) -> Figure:
    """Return the share of pairs (only those `where`) that the model orders as the annotator did; equal is wrong."""
    chosen = np.ones(len(pairs), dtype=bool) if where is None else where
    return clustered_share((pairs.leads[chosen] > 0).astype(np.float64), pairs.prompts[chosen])


def length_rule(pairs: ScoredPairs) -> int:
    """Return 1 when the longer response wins the more often in these (training) pairs, -1 when the shorter does."""
    return 1 if np.sign(pairs.chosen - pairs.rejected).sum() >= 0 else -1


def length_only(pairs: ScoredPairs, rule: int) -> Floats:
    """Return what the rule "take the longer" (1) or "the shorter" (-1) gets right of each pair; equal counts half."""
    return (1 + rule * np.sign(pairs.chosen - pairs.rejected)) / 2


def by_length(pairs: ScoredPairs) -> dict[str, Figure]:
    """Return the accuracy where the chosen one is much shorter, shorter, of matched length, longer, much longer."""
    difference = pairs.difference
    found = {}
    for name, low, high in LENGTH_BINS:
        if name == "matched":
            inside = np.abs(difference) <= MATCHED
        else:
            inside = (
                (difference >= low) & (difference < high) if high < 0 else (difference > low) & (difference <= high)
            )
        found[name] = accuracy(pairs, inside)
    return found


def gain_over_length(pairs: ScoredPairs, rule: int, *, seed: int) -> Figure:
    """Return the accuracy's lead over the length rule's on the same pairs, bootstrapped by prompt."""
    gained = (pairs.leads > 0) - length_only(pairs, rule)
    sums = np.array([[gained[pairs.prompts == p].sum(), (pairs.prompts == p).sum()] for p in np.unique(pairs.prompts)])
    found = bootstrap(sums.astype(np.float64), ratio, seed=seed)
    return _figure(found, len(pairs))


def by_disagreement(pairs: ScoredPairs, leads: Floats) -> dict[str, Any]:
    """Return the accuracy on the half of the pairs on which an ensemble agrees the most, and on the other half.

    `leads` [members, P] are each member's; agreement is a small standard deviation between them. Where the first half
    is not the more accurate one, the spread says nothing about errors.
    """
    spread = leads.std(axis=0, ddof=1)
    order = np.argsort(spread, kind="stable")
    agreeing = np.zeros(len(pairs), dtype=bool)
    agreeing[order[: (len(pairs) + 1) // 2]] = True
    halves = (("agreeing", agreeing), ("disagreeing", ~agreeing))
    figures = {name: accuracy(pairs, where)._asdict() for name, where in halves if where.any()}
    return {"members": len(leads), "mean_spread": float(spread.mean()), **figures}


def length_correlation(pairs: ScoredPairs, *, seed: int) -> Figure:
    """Return Pearson's correlation of score and length among the responses to one prompt, bootstrapped by prompt.

    Both are taken from their mean within the prompt: scores mean something only there.
    """
    tables = []
    for name in np.unique(pairs.within[:, 0]):
        score, length = pairs.within[pairs.within[:, 0] == name, 1:].T
        x, y = score - score.mean(), length - length.mean()
        tables.append([x @ y, x @ x, y @ y])
    found = bootstrap(np.array(tables).reshape(-1, 3), _correlation, seed=seed)
    return _figure(found, len(pairs.within))


def _correlation(sums: Floats) -> float:
    return float(sums[0] / np.sqrt(sums[1] * sums[2])) if sums[1] > 0 and sums[2] > 0 else float("nan")


def _figure(found: Estimate | None, n: int) -> Figure:
    return Figure(found.value, found.low, found.high, n) if found else NOTHING


class Measured(NamedTuple):
    """What a reward model is worth: figures by (task, metric), facts for the summary, and the fitted temperature."""

    figures: Mapping[tuple[str, str], Figure]
    facts: Mapping[str, Any]
    temperature: float


def measure(train: ScoredPairs, heldout: ScoredPairs, *, seed: int) -> Measured:
    """Return the figures of a reward model on held-out pairs; the training pairs decide only what "by length" means.

    Calibration after the temperature is cross-fitted: each half of the prompts is judged with the other half's. The
    temperature that is kept is fitted on all held-out pairs.
    """
    rule = length_rule(train)
    lengths = by_length(heldout)
    mended = calibration.cross_fitted(heldout.leads, heldout.prompts.tolist(), seed)
    kept = calibration.fit_temperature(heldout.leads)
    figures = {
        ("pairwise_accuracy@1", "accuracy"): accuracy(heldout),
        ("length_matched_accuracy@1", "accuracy"): lengths["matched"],
        ("length_only_accuracy@1", "accuracy"): clustered_share(length_only(heldout, rule), heldout.prompts),
        ("gain_over_length_only@1", "accuracy_gain"): gain_over_length(heldout, rule, seed=seed),
        ("reward_length_correlation@1", "within_prompt"): length_correlation(heldout, seed=seed),
    }
    facts: dict[str, Any] = {"temperature": kept, "length_rule": "longer" if rule > 0 else "shorter"}
    facts["by_length"] = {name: figure._asdict() for name, figure in lengths.items() if figure.n}
    for name, temperature in (("before", 1.0), ("after", mended)):
        error = calibration.calibration_error(heldout.leads, heldout.prompts.tolist(), temperature, seed=seed)
        figures["calibration@1", f"ece_{name}"] = _figure(error, len(heldout))
        stated = calibration.confidences(heldout.leads, temperature)
        facts[f"calibration_{name}"] = {
            "nll": calibration.negative_log_likelihood(heldout.leads, temperature),
            "honest_ece": calibration.honest_error(heldout.leads, temperature, seed=seed),
            "bins": calibration.as_rows(calibration.reliability(stated, calibration.rights(heldout.leads))),
        }
    return Measured({key: figure for key, figure in figures.items() if figure.n}, facts, kept)
