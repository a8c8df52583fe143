"""What sways annotators besides quality: the place on the screen, the length of the text, who wrote it.

`*_effect` are plain rates with intervals, 0.5 means none; `*_test` say whether chance could have done it. The place is
random by design, so an effect of it is a bias. Length and model are not: longer may be better. Of them an effect
over all judgements describes, and only a difference between annotators of the same responses points at somebody.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from trivium.preferences.agreement import Estimate, bootstrap, ratio
from trivium.preferences.comparisons import derive
from trivium.preferences.sheet import Floats, Sheet
from trivium.preferences.significance import Tested, contrast, logistic, mean_test, p_value
from trivium.records import Ranking


def position_effect(rankings: Iterable[Ranking], *, seed: int = 0) -> Estimate | None:
    """Return how often the response shown earlier wins a decided pair; None where no order was recorded."""
    places = ((ranking, {name: place for place, name in enumerate(ranking.order_shown)}) for ranking in rankings)
    return _win_rate(((ranking, shown) for ranking, shown in places if shown), seed)


def length_effect(rankings: Iterable[Ranking], lengths: Mapping[str, int], *, seed: int = 0) -> Estimate | None:
    """Return how often the longer response wins a decided pair; `lengths` maps completion ids to characters.

    Pairs of equal length are left out; None where none is left.
    """
    shortness = {name: -length for name, length in lengths.items()}
    return _win_rate(((ranking, shortness) for ranking in rankings), seed)


def model_effect(rankings: Iterable[Ranking], policies: Mapping[str, str], *, seed: int = 0) -> dict[str, Estimate]:
    """Return how often each policy's responses win their decided pairs against other policies'."""
    tables: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    for ranking in rankings:
        for pair in derive(ranking):
            if policies[pair[0]] != policies[pair[1]]:
                for won, name in zip((1.0, 0.0), pair, strict=True):
                    table = tables[policies[name]][ranking.prompt_id]
                    table[0] += won
                    table[1] += 1
    found = {name: bootstrap(np.array(list(rows.values())), ratio, seed=seed) for name, rows in sorted(tables.items())}
    return {name: estimate for name, estimate in found.items() if estimate}


def _win_rate(judged: Iterable[tuple[Ranking, Mapping[str, int]]], seed: int) -> Estimate | None:
    """Return how often the response with the smaller number wins, resampled by prompt."""
    tables: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for ranking, numbers in judged:
        for chosen, rejected in derive(ranking):
            if numbers[chosen] != numbers[rejected]:
                tables[ranking.prompt_id][0] += numbers[chosen] < numbers[rejected]
                tables[ranking.prompt_id][1] += 1
    return bootstrap(np.array(list(tables.values())), ratio, seed=seed)


def position_test(sheet: Sheet, annotator: str | None = None) -> Tested:
    """Return whether what is shown earlier is placed better, over all judgements or one annotator's.

    A randomisation test: if the place does not matter, every order on the screen was equally likely whatever was
    answered, and sum(place * score) has mean 0 and variance |place|^2 |score|^2 / (K - 1) exactly (Hoeffding 1951).
    Scores are first cleaned of what the other annotators say of the same responses (`Sheet.residuals`): the test stays
    exact, because they did not see this order, and gains power. The effect is the mean correlation of place and score.
    """
    known = ~np.isnan(sheet.placings[:, 0])
    rows = sheet.placings[known if annotator is None else known & sheet.mine(annotator)]
    variance = float(rows[:, 1].sum())
    z = float(rows[:, 0].sum()) / math.sqrt(variance) if variance > 0 else math.nan
    return Tested(effect=float(rows[:, 2].sum()) / max(len(rows), 1), z=z, p=p_value(z), n=len(rows))


def leaning_test(sheet: Sheet, values: Floats, annotator: str | None = None) -> Tested:
    """Return whether responses with a higher number are placed better, or better than the other annotators place them.

    `values` are `leanings` to lengths, or to 1 for a policy's responses and 0 for others'. Over all: their mean against
    0. Of one annotator: their mean less the others', clustered by prompt, so that on shared prompts quality cancels.
    """
    known = ~np.isnan(values)
    values, prompts = values[known], sheet.prompts[known]
    if annotator is None:
        return mean_test(values, prompts)
    return contrast(values, sheet.mine(annotator)[known], prompts)


def length_logistic(
    rankings: Iterable[Ranking], lengths: Mapping[str, int], control: Mapping[str, float] | None = None
) -> Tested | None:
    """Return the log odds that a response twice as long wins a decided pair, by logistic regression.

    logit P(chosen is a) = effect * log2(length a / length b) [+ gamma * (control a - control b)], standard errors
    clustered by prompt. With a `control` (a reward model's scores, the mean rank by others, known quality) it is
    verbosity: what length wins at equal quality. None without pairs, or where the fit does not converge.
    """
    rows, clusters = [], []
    prompts: dict[str, int] = {}
    for ranking in rankings:
        for chosen, rejected in derive(ranking):
            row = [math.log2(max(lengths[chosen], 1) / max(lengths[rejected], 1))]
            if control is not None:
                row.append(control[chosen] - control[rejected])
            rows.append(row)
            clusters.append(prompts.setdefault(ranking.prompt_id, len(prompts)))
    features: Floats = np.array(rows, dtype=np.float64).reshape(len(rows), 1 if control is None else 2)
    if not features[:, 0].any():
        return None
    # The chosen one is called a throughout: turned round, a pair has the same likelihood.
    fitted = logistic(features, np.ones(len(rows)), np.array(clusters))
    return fitted.tested(0, len(rows)) if fitted.converged else None
