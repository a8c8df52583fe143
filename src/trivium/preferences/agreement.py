"""How far annotators agree, each figure with a 95% interval.

All figures are sums over prompts of small tables, so one bootstrap serves them all: prompts are drawn with
replacement (judgements of one prompt are not independent), tables added up, the figure taken.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trivium.records import Ranking

Floats = NDArray[np.float64]
Level = Literal["nominal", "ordinal", "interval"]
RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with its 95% bootstrap interval, from `n` prompts."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far annotators agree where several judged the same responses; None where that never happened.

    `pairwise`: share of equal verdicts (first better, second better, tie) over all pairs of annotators and of
    responses. `alpha`: Krippendorff's alpha of the ranks, ordinal; 1 is perfect, 0 is chance. `tau_b`: mean Kendall's
    tau-b between two annotators of a prompt. `ceiling`: how often one annotator's verdict predicts another's (a tie
    predicts by coin), over the pairs which that other one decided. It is the accuracy a reward model would have if it
    were one more annotator; a model that learns what they have in common can exceed it.
    """

    pairwise: Estimate | None
    alpha: Estimate | None
    tau_b: Estimate | None
    ceiling: Estimate | None


def bootstrap(tables: Floats, figure: Callable[[Floats], float], *, seed: int = 0) -> Estimate | None:
    """Return figure(sum of the tables) with its interval; `tables` is [prompts, ...]; None where it is undefined."""
    value = figure(tables.sum(axis=0)) if len(tables) else float("nan")
    if np.isnan(value):
        return None
    rng = np.random.default_rng([seed, 0xB007])
    flat = tables.reshape(len(tables), -1)
    draws = []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(len(flat), size=len(flat)), minlength=len(flat))
        draws.append(figure((times @ flat).reshape(tables.shape[1:])))
    # A resample may hold nothing that the figure is defined on.
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Estimate(value=float(value), low=float(low), high=float(high), n=len(tables))


def ratio(sums: Floats) -> float:
    """Return sums[0] / sums[1], NaN over zero."""
    return float(sums[0] / sums[1]) if sums[1] > 0 else float("nan")


def midranks(ranking: Ranking) -> dict[str, float]:
    """Return the rank of each completion, counted from 1; tied ones share the mean of the places they take."""
    ranks: dict[str, float] = {}
    for group in ranking.groups:
        middle = len(ranks) + (len(group) + 1) / 2
        ranks.update(dict.fromkeys(group, middle))
    return ranks


def agreement(rankings: Iterable[Ranking], *, seed: int = 0) -> Agreement:
    """Return how far the annotators of these rankings agree.

    Two rankings are compared when they order the same completions of the same prompt. An annotator is a name and a
    kind; of several rankings of the same thing by one annotator the last counts.
    """
    prompts = [items for items in _shared(rankings) if items]
    size = max((len(ranks[0]) for items in prompts for ranks in items), default=0)
    pairwise, ceiling, tau, coincidences = [], [], [], []
    for items in prompts:
        each = [_verdicts(ranks) for ranks in items]
        pairwise.append(np.sum([e[0] for e in each], axis=0))
        ceiling.append(np.sum([e[1] for e in each], axis=0))
        tau.append(np.sum([e[2] for e in each], axis=0))
        # Ranks are multiples of one half from 1 on: 1, 1.5, 2 ... are the categories 0, 1, 2 ...
        coincidences.append(sum(_coincidences(np.rint(2 * ranks - 2).astype(int), 2 * size - 1) for ranks in items))
    return Agreement(
        pairwise=bootstrap(np.array(pairwise), ratio, seed=seed),
        alpha=bootstrap(np.array(coincidences), _alpha, seed=seed),
        tau_b=bootstrap(np.array(tau), ratio, seed=seed),
        ceiling=bootstrap(np.array(ceiling), ratio, seed=seed),
    )


def _shared(rankings: Iterable[Ranking]) -> list[list[Floats]]:
    """Return, per prompt, the rank arrays [annotators >= 2, completions] of each set of completions that was ranked."""
    found: dict[str, dict[tuple[str, ...], dict[tuple[str, str], Floats]]] = defaultdict(lambda: defaultdict(dict))
    for ranking in rankings:
        ranks = midranks(ranking)
        names = tuple(sorted(ranks))
        if len(names) >= 2:
            array = np.array([ranks[name] for name in names])
            found[ranking.prompt_id][names][ranking.annotator, ranking.kind] = array
    return [
        [np.array(list(by_annotator.values())) for by_annotator in items.values() if len(by_annotator) >= 2]
        for items in found.values()
    ]


def _verdicts(ranks: Floats) -> tuple[Floats, Floats, Floats]:
    """Return (sum, count) of equal verdicts, of right predictions and of tau-b, for ranks [annotators, completions]."""
    first, second = np.triu_indices(ranks.shape[1], 1)
    verdicts = np.sign(ranks[:, second] - ranks[:, first])
    same, right, tau = np.zeros(2), np.zeros(2), np.zeros(2)
    for a, b in itertools.combinations(verdicts, 2):
        same += (a == b).sum(), a.size
        for guess, truth in ((a, b), (b, a)):
            decided = truth != 0
            credit = np.where(guess == truth, 1.0, np.where(guess == 0, 0.5, 0.0))
            right += credit[decided].sum(), decided.sum()
        untied = float((a != 0).sum() * (b != 0).sum())
        if untied:
            tau += float(a @ b) / np.sqrt(untied), 1.0
    return same, right, tau


def kendall_tau_b(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's tau-b of two rank vectors; NaN where one of them is one single tie (Kendall 1945)."""
    return ratio(_verdicts(np.array([first, second], dtype=np.float64))[2])


def krippendorff_alpha(ratings: Floats, level: Level = "ordinal") -> float:
    """Return Krippendorff's alpha of ratings [annotators, units], NaN for a missing one.

    alpha = 1 - observed / expected disagreement; NaN where all ratings are equal (Krippendorff 2011, section D). How
    far two ratings are apart depends on the level: `nominal`, equal or not; `ordinal`, by the ratings between them;
    `interval`, by their difference.
    """
    return float(_alpha_at(*_units(ratings, level)))


def alpha_interval(ratings: Floats, level: Level = "ordinal", *, seed: int = 0) -> Estimate | None:
    """Return the same with its interval, the units (columns) drawn with replacement; None where it is undefined."""
    coincidences, distance = _units(ratings, level)
    apiece = [_coincidences(column, len(coincidences)) for column in _codes(ratings)[1].T[:, :, None]]
    return bootstrap(np.array(apiece), lambda sums: _alpha_at(sums, distance), seed=seed)


def _codes(ratings: Floats) -> tuple[Floats, NDArray[np.int_]]:
    """Return the values that occur, ascending, and each rating as its place among them, -1 for a missing one."""
    values = np.unique(ratings[~np.isnan(ratings)])
    fill = values[0] if len(values) else 0.0
    return values, np.where(np.isnan(ratings), -1, np.searchsorted(values, np.nan_to_num(ratings, nan=fill)))


def _units(ratings: Floats, level: Level) -> tuple[Floats, Floats | None]:
    """Return the coincidence matrix, and the squared distance of its values (None: ordinal, from the totals)."""
    values, codes = _codes(ratings)
    distances: dict[Level, Floats | None] = {
        "nominal": 1.0 - np.eye(len(values)),
        "interval": (values[:, None] - values[None, :]) ** 2,
        "ordinal": None,
    }
    return _coincidences(codes, len(values)), distances[level]


def kendall_w(ranks: Floats) -> float:
    """Return Kendall's coefficient of concordance of ranks [annotators, items], tied ones at their midranks.

    W = 12 S / (m^2 (n^3 - n) - m T): 1 when all rank alike, and 1 / m in expectation when all rank at random (Kendall
    and Smith 1939; T corrects for ties). With m raters, (m W - 1) / (m - 1) is their mean Spearman correlation. NaN
    where every annotator ties everything.
    """
    raters, items = ranks.shape
    totals = ranks.sum(axis=0)
    spread = float(((totals - totals.mean()) ** 2).sum())
    ties = sum(float((sizes**3 - sizes).sum()) for row in ranks for sizes in [np.unique(row, return_counts=True)[1]])
    room = raters**2 * (items**3 - items) - raters * ties
    return 12 * spread / room if room > 0 else float("nan")


def concordance(rankings: Iterable[Ranking], *, seed: int = 0) -> Estimate | None:
    """Return the mean Kendall's W over all sets of responses that several annotators ranked, bootstrapped by prompt."""
    tables = []
    for items in _shared(rankings):
        found = [w for w in map(kendall_w, items) if not np.isnan(w)]
        if found:
            tables.append([sum(found), len(found)])
    return bootstrap(np.array(tables, dtype=np.float64), ratio, seed=seed)


def retest(rankings: Iterable[Ranking], *, seed: int = 0) -> Agreement:
    """Return how far annotators agree with themselves: on what they were shown again without being told.

    `rankings` in the order given, repeats included. Several rankings of one set of responses by one annotator are
    compared with each other, and with nobody else's; the figures are those of `agreement`.
    """
    times: dict[tuple[str, ...], int] = defaultdict(int)
    again = []
    for ranking in rankings:
        who = f"{ranking.kind}/{ranking.annotator}"
        own = (ranking.prompt_id, who, *sorted(name for group in ranking.groups for name in group))
        times[own] += 1
        # The response's name carries whose it is, so that nobody is compared with anybody else.
        groups = tuple(tuple(f"{who}/{name}" for name in group) for group in ranking.groups)
        again.append(replace(ranking, groups=groups, annotator=str(times[own])))
    return agreement(again, seed=seed)


def _coincidences(categories: NDArray[np.int_], size: int) -> Floats:
    """Return the coincidence matrix [size, size] of categories [annotators, units], -1 for a missing one."""
    counts = (categories[:, :, None] == np.arange(size)).sum(axis=0).astype(np.float64)
    raters = counts.sum(axis=1)
    counts, raters = counts[raters >= 2], raters[raters >= 2]
    pairs = np.einsum("uc,uk->uck", counts, counts) - np.einsum("uc,ck->uck", counts, np.eye(size))
    return np.asarray((pairs / (raters - 1)[:, None, None]).sum(axis=0))


def _alpha(coincidences: Floats) -> float:
    return _alpha_at(coincidences, None)


def _alpha_at(coincidences: Floats, distance: Floats | None) -> float:
    totals = coincidences.sum(axis=1)
    number = totals.sum()
    if distance is None:
        # Ordinal distance: the ratings from c to k, the ends counted by half; that is a difference of midpoints.
        midpoints = np.cumsum(totals) - totals / 2
        distance = (midpoints[:, None] - midpoints[None, :]) ** 2
    expected = (np.outer(totals, totals) * distance).sum()
    if expected <= 0:
        return float("nan")
    return float(1 - (number - 1) * (coincidences * distance).sum() / expected)
