"""A stage one of whose steps has a loss that is not finite, and that sees for itself that the step moved nothing.

Also a program, which torchrun starts: `poisoned.py RANK STAGE... -- arguments of trivium`.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn


def poison(stage: str, steps: Collection[int], *, factor: float, name: str = "objective", here: bool = True) -> None:
    """Multiply the loss of these steps (from 0) of a stage's objective by `factor`, where `here`.

    At the next step the weights must be those of before, to the bit, or the stage fails with an AssertionError.
    """
    module = importlib.import_module(f"trivium.stages.{stage}")
    real: Callable[..., Any] = getattr(module, name)
    seen = 0
    before: list[torch.Tensor] = []

    def objective(model: nn.Module, *arguments: Any, **named: Any) -> Any:
        nonlocal seen, before
        output = real(model, *arguments, **named)
        if not torch.is_grad_enabled():
            return output  # an evaluation
        now = [parameter.detach().clone() for parameter in model.parameters()]
        if before:
            moved = [not torch.equal(old, new) for old, new in zip(before, now, strict=True)]
            assert not any(moved), f"the poisoned step moved {sum(moved)} of {len(moved)} tensors"
        hit, seen = seen in steps, seen + 1
        before = now if hit else []
        return dataclasses.replace(output, total=output.total * factor) if hit and here else output

    setattr(module, name, objective)


if __name__ == "__main__":
    split = sys.argv.index("--")
    for poisoned in sys.argv[2:split]:
        poison(poisoned, {3}, factor=float("inf"), here=os.environ["RANK"] == sys.argv[1])
    sys.argv = ["trivium", *sys.argv[split + 1 :]]
    from trivium.cli import main

    main()
