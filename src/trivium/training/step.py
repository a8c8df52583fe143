"""One optimizer step: count first, then accumulate, then move.

The divisor is the number of items over **all** micro-batches and ranks, known before the first backward. So splitting a
batch differently cannot change the result (transformers#34191 is what happens otherwise).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from trivium.batches import LossOutput
from trivium.training.distributed import all_reduce_max, all_reduce_sum, context_ranks
from trivium.training.optim import Optimizer
from trivium.training.parallel import Spread


class Batch(Protocol):
    """Anything that knows how many items its loss is summed over."""

    @property
    def num_items(self) -> Tensor:
        """The number of items."""
        ...


B = TypeVar("B", bound=Batch)
Objective = Callable[[B], LossOutput]
"""From a micro-batch to the **sum** of its items' losses; the step divides."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did: mean loss and metrics per item, the gradient's norm before clipping, items counted."""

    loss: float
    grad_norm: float
    num_items: float
    skipped: bool = False
    metrics: dict[str, float] = field(default_factory=dict)


def train_step(
    objective: Objective[B],
    micro_batches: Sequence[B],
    optimizer: Optimizer,
    *,
    lr_scale: float,
    precision: contextlib.AbstractContextManager[object] | None = None,
    skip_above: float = math.inf,
) -> StepResult:
    """Take one optimizer step over `micro_batches` and return what happened.

    `precision` (re-enterable, as `autocast` gives it) covers one forward pass at a time: the backward pass follows
    its dtypes by itself, the optimizer works in fp32, and autocast forgets its cast copies of the weights on leaving.
    Held open over several steps it would go on with the weights of the first.

    A gradient that is not finite, or whose norm is above `skip_above`, moves nothing: the step is skipped and says so.
    """
    total = all_reduce_sum(torch.stack([batch.num_items.float() for batch in micro_batches]).sum())
    # A window with nothing to train (every row truncated away) has loss 0 and gradient 0, not 0/0.
    divisor = total.clamp(min=1e-8)
    # The gradients of all ranks are added up: of those that share a row's positions, each adds its part of them.
    shared = divisor * context_ranks()
    optimizer.zero_grad()
    # Summed where they are: asking for a number makes a GPU finish before it is given the next micro-batch.
    sums: dict[str, Tensor] = {}
    for batch, counted, reducing in _windows(objective, micro_batches):
        with reducing:
            with precision or contextlib.nullcontext():
                output = objective(batch)
            if not counted:
                output = LossOutput(total=output.total * 0)
            (output.total / shared).backward()  # type: ignore[no-untyped-call]
        for name, value in {"": output.total, **output.metrics}.items():
            sums[name] = sums.get(name, 0.0) + value.detach().float()
    grad_norm = float(optimizer.clip())
    count = float(total)
    # A rank's own sums would do for a mean only where all ranks have equally many items. Read before the weights move,
    # so that a GPU moves them while the next step is prepared.
    reduced = all_reduce_sum(torch.stack([value.cpu() for value in sums.values()])).tolist()
    means = {name: value / max(count, 1e-8) for name, value in zip(sums, reduced, strict=True)}
    skipped = not math.isfinite(grad_norm) or grad_norm > skip_above
    if not skipped:
        optimizer.step(lr_scale)
    loss = means.pop("")
    return StepResult(loss=loss, grad_norm=grad_norm, num_items=count, skipped=skipped, metrics=means)


def _windows(
    objective: Objective[B], micro_batches: Sequence[B]
) -> Iterator[tuple[B, bool, contextlib.AbstractContextManager[None]]]:
    """Yield each micro-batch, whether it counts, and the context that sums gradients over ranks after the last.

    A sharded model's forward pass is a collective, so a rank that has fewer micro-batches than another takes its last
    one again, for nothing.
    """
    if not isinstance(objective, Spread):
        yield from ((batch, True, contextlib.nullcontext()) for batch in micro_batches)
        return
    count = len(micro_batches)
    rounds = all_reduce_max(count) if objective.lockstep else count
    for index in range(rounds):
        yield micro_batches[min(index, count - 1)], index < count, objective.reducing(index == rounds - 1)
