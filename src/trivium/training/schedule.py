"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trivium.config import bounds, one_of


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves over a run."""

    kind: str = "wsd"
    """`wsd` (warm-up, stable, linear decay; arXiv 2404.06395), `cosine`, `linear` or `constant`."""
    warmup_frac: float = 0.05
    """Fraction of the steps spent rising linearly from zero."""
    decay_frac: float = 0.5
    """Fraction of the steps that the final decay of `wsd` takes."""
    final_frac: float = 0.05
    """The learning rate at the end, as a fraction of the peak."""

    def __post_init__(self) -> None:
        """Refuse fractions outside 0 to 1."""
        one_of(self, kind=("wsd", "cosine", "linear", "constant"))
        bounds(self, warmup_frac=(0, 1), decay_frac=(0, 1), final_frac=(0, 1))


def lr_scale(config: ScheduleConfig, step: int, total: int) -> float:
    """Return the factor on the peak learning rate at `step` (0-based) of `total`.

    Worked: wsd over 100 steps with warmup 0.1, decay 0.5, final 0: step 0 gives 0.1, steps 9 to 49 give 1,
    step 74 gives 0.5.
    """
    warmup = max(1, round(config.warmup_frac * total))
    if step < warmup:
        return (step + 1) / warmup
    if config.kind == "constant":
        return 1.0
    start = warmup if config.kind != "wsd" else max(warmup, total - round(config.decay_frac * total))
    progress = min(1.0, max(0.0, (step + 1 - start) / max(1, total - start)))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1 - progress
    return config.final_frac + (1 - config.final_frac) * shape
