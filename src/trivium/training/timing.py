"""How long work takes at best, measured in turn with what it is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

TRIALS = 5
"""The best of so many counts: what else runs on the machine can only make work slower."""


def best_seconds(works: Sequence[Callable[[], object]], device: torch.device, trials: int = TRIALS) -> list[float]:
    """Return the shortest time that each work took, to its end on the device, after one round to warm up.

    They take turns, so that other work on the machine disturbs all alike.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    shortest = [float("inf")] * len(works)
    for trial in range(trials + 1):
        for number, work in enumerate(works):
            wait()
            began = time.perf_counter()
            work()
            wait()
            seconds = time.perf_counter() - began
            shortest[number] = min(shortest[number], seconds) if trial else shortest[number]
    return [max(seconds, 1e-9) for seconds in shortest]


def product_seconds(dtypes: Sequence[torch.dtype], device: torch.device, side: int) -> list[float]:
    """Return the shortest time of a `side` x `side` matrix product in each dtype."""

    def product(dtype: torch.dtype) -> Callable[[], object]:
        matrix = torch.full((side, side), 0.01, device=device, dtype=dtype)
        return lambda: torch.mm(matrix, matrix)

    return best_seconds([product(dtype) for dtype in dtypes], device)


def _nothing() -> None:
    """Wait for nothing: on a CPU a call returns when its work is done."""
