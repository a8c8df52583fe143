"""What was never trained for by name: learning from the context, and gaining from worked steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trivium.evals.perplexity import DocumentLoss
from trivium.evals.stats import mean_interval, paired_bootstrap, unpaired_bootstrap

Interval = tuple[float, float, float]
EARLY = (4, 16)
"""Tokens 4 to 15 of a document: past its opening, with little to go by."""
LATE = (48, 96)
"""Tokens 48 to 95: with some dozens of tokens to learn from."""


def in_context_gain(losses: Sequence[DocumentLoss]) -> tuple[Interval, int]:
    """Return ((mean, low, high), documents): how many nats per token a prediction is cheaper late in a document.

    Early less late loss within each document that reaches `LATE` by 16 tokens or more (Olsson et al. 2022 take tokens
    50 and 500 of long ones). Above 0 says that the context is used; texts whose openings are hard by themselves add
    to it, so compare models on the same documents.
    """
    gains = [
        float(np.mean(d.nats[slice(*EARLY)]) - np.mean(d.nats[slice(*LATE)]))
        for d in losses
        if len(d.nats) >= LATE[0] + 16
    ]
    return mean_interval(gains), len(gains)


def few_shot_gain(with_examples: Sequence[float], without: Sequence[float], seed: int) -> Interval:
    """Return accuracy with answered examples in the context less accuracy without, over the same items."""
    return paired_bootstrap(with_examples, without, seed)


def steps_gain(grades: Mapping[str, Sequence[float]], seed: int) -> dict[str, Interval]:
    """Return, for each task whose name also exists with `_steps`, accuracy with worked steps less accuracy without.

    `grades` maps `name@version` to the grades of its items; `arithmetic_steps@1` is set against `arithmetic@1`.
    """
    gains = {}
    for task, direct in grades.items():
        name, at, version = task.partition("@")
        worked = grades.get(f"{name}_steps{at}{version}")
        if worked:
            gains[task] = unpaired_bootstrap(worked, direct, seed)
    return gains
