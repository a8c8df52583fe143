"""Which question to people would teach a reward model most: where it is unsure, or its members disagree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import fmean

from trivium.records import Completion, Conversation
from trivium.rewards.learned import LearnedReward


def uncertainties(reward: LearnedReward, tasks: Sequence[tuple[Conversation, Sequence[Completion]]]) -> list[float]:
    """Return how unsure the reward model is of each task's order; higher is more worth asking.

    Of an ensemble: the mean over the completions of its members' deviation, in calibrated scores. Of one model: the
    mean over the pairs of the entropy of its win probability, in bits: 1 where it cannot tell any two apart, 0 where it
    is sure of all. Uncertainty sampling (Lewis and Gale 1994) and query by committee (Seung et al. 1992).
    """
    prompts = [prompt for prompt, completions in tasks for _ in completions]
    flat = [completion for _, completions in tasks for completion in completions]
    scores, spreads = reward.mean_and_spread(reward.rows_of(prompts, flat))
    found, start = [], 0
    for _, completions in tasks:
        own = slice(start, start + len(completions))
        start += len(completions)
        if any(spreads):
            found.append(fmean(spreads[own]))
        else:
            pairs = itertools.combinations(scores[own], 2)
            found.append(fmean([entropy(reward.win_probability(a, b)) for a, b in pairs] or [0.0]))
    return found


def entropy(probability: float) -> float:
    """Return the entropy of a coin in bits: 1 at one half, 0 at 0 and 1."""
    return -sum(p * math.log2(p) for p in (probability, 1 - probability) if p > 0)
