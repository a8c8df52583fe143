"""The nouns on the device: what the losses and the loop work on.

Targets are shifted **once, in the collator**: `targets[b, t]` is the token that position `t` must predict, so logits
and targets line up and no loss shifts anything. Rows are padded on the right; with causal attention a pad can influence
nothing before it, so no padding mask is needed to train.

One two-turn conversation, `<user> hi <end> <assistant> yo <end>`, trained on the assistant's tokens only::

    position      0       1    2      3            4     5
    input_ids     <user>  hi   <end>  <assistant>  yo    <end>
    targets       -100    -100 -100   yo           <end> -100
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

IGNORE = -100
"""The target of a position that is not trained."""

B = TypeVar("B")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Rows of tokens with their targets.

    `input_ids`, `targets`, `positions`: int64 [B, T]. `document_ids`: int64 [B, T] or None; where given (packing),
    a position attends only to its own document and `positions` restart with each. `weights`: float [B, T] or None; what
    each target counts for, 0 where there is none. `row_numbers`: int64 [B] or None; the number of each row in the run,
    for what is drawn at random for a row alone.
    """

    input_ids: Tensor
    targets: Tensor
    positions: Tensor
    document_ids: Tensor | None = None
    weights: Tensor | None = None
    row_numbers: Tensor | None = None

    @property
    def num_items(self) -> Tensor:
        """The number of trained targets, int64 scalar; where they have weights, the sum of those."""
        return (self.targets != IGNORE).sum() if self.weights is None else self.weights.sum()

    @property
    def num_items_per_row(self) -> Tensor:
        """The number of trained targets of each row, int64 [B]."""
        return (self.targets != IGNORE).sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch:
    """All judged completions of some prompts, each row once, with the pairs among them.

    `tokens`: N rows of prompt + completion, targets on the completion only. `lengths`: int64 [N], tokens in a row.
    `pairs`: int64 [P, 2], rows (chosen, rejected). `weights`: float [P]; the C(K,2) pairs of a ranking share weight 1
    (InstructGPT section 3.5), so a ranking counts once however many it placed. `ranks`: int64 [N], 0 = best in the
    row's group, equal = tie. `groups`: int64 [N], which prompt. `ref_logprobs`: float [N] or None, the reference's
    summed log-probability of each completion. `ranking_weights`: float [G] or None, what each group counts for (1).
    `baseline`: float scalar or None, KTO's reference point (losses/kto.py), of the whole batch that this may be
    a part of. `targets`: float [P] or None, the probability that the chosen one is the better one (1 for None).
    """

    tokens: TokenBatch
    lengths: Tensor
    pairs: Tensor
    weights: Tensor
    ranks: Tensor
    groups: Tensor
    ref_logprobs: Tensor | None = None
    ranking_weights: Tensor | None = None
    baseline: Tensor | None = None
    targets: Tensor | None = None

    @property
    def num_items(self) -> Tensor:
        """The number of prompts, as the sum of the pairs' weights (float scalar)."""
        return self.weights.sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """Sampled completions, ready for the update; every [B, T] tensor is aligned with `tokens.targets`.

    `mask`: bool [B, T], true where the target is a sampled token. `old_logprobs`, `ref_logprobs`, `advantages`,
    `returns`, `values`, `rewards`: float [B, T], zero outside the mask. `scores`: float [B], the reward function's.
    `divisors`: float [B] or None; where given, the items are completions, each one's summed loss divided by its own.
    """

    tokens: TokenBatch
    mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    returns: Tensor
    values: Tensor
    rewards: Tensor
    scores: Tensor
    divisors: Tensor | None = None

    @property
    def num_items(self) -> Tensor:
        """The number of sampled tokens, or of completions where `divisors` are given, int64 scalar."""
        return self.mask.sum() if self.divisors is None else torch.ones_like(self.divisors).sum().long()


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """What an objective returns: `total`, the **sum** over items (scalar), and sums of metrics to report beside it."""

    total: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


def select_rows(batch: B, rows: Tensor) -> B:
    """Return the batch (TokenBatch or RolloutBatch) cut to `rows` (int64 [n] of its first dimension)."""
    return _map(batch, lambda tensor: tensor[rows.to(tensor.device)])


def to_device(batch: B, device: torch.device | str) -> B:
    """Return the batch with every tensor on `device`."""
    return _map(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _map(batch: B, function: object) -> B:
    changes: dict[str, object] = {}
    for item in dataclasses.fields(batch):  # type: ignore[arg-type]
        value = getattr(batch, item.name)
        if isinstance(value, Tensor):
            changes[item.name] = function(value)  # type: ignore[operator]
        elif dataclasses.is_dataclass(value):
            changes[item.name] = _map(value, function)
    return dataclasses.replace(batch, **changes)  # type: ignore[type-var]
