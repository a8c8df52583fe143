"""What sways annotators besides quality: the place on the screen and the length of the text.

Plain rates with intervals; 0.5 means no effect. The place is random by design, so a rate away from 0.5 is a bias.
Length is not: longer may be better, so that rate describes the judgements and proves nothing alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from trivium.preferences.agreement import Estimate, bootstrap, ratio
from trivium.preferences.comparisons import derive
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


def _win_rate(judged: Iterable[tuple[Ranking, Mapping[str, int]]], seed: int) -> Estimate | None:
    """Return how often the response with the smaller number wins, resampled by prompt."""
    tables: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for ranking, numbers in judged:
        for chosen, rejected in derive(ranking):
            if numbers[chosen] != numbers[rejected]:
                tables[ranking.prompt_id][0] += numbers[chosen] < numbers[rejected]
                tables[ranking.prompt_id][1] += 1
    return bootstrap(np.array(list(tables.values())), ratio, seed=seed)
