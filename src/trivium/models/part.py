"""Which positions of each row a forward pass computes, where others compute the rest of them at the same time.

A network knows no ranks: whoever trains it gives its `Decoder` a `PartOf`, and says there how the others' keys, values
and hidden states are had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Gather(Protocol):
    """How the others' positions are had."""

    def __call__(self, dim: int, *xs: Tensor) -> tuple[Tensor, ...]:
        """Return everybody's positions of each tensor, side by side along `dim`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the positions of every row of a batch; all parts are of one size.

    `queries`: int64 [Tq], the places in the row of the positions in this part. `keys`: int64 [n Tq], those of all n
    parts, in the order in which `gather` lines up what the parts have. Places from the row's length on are padding at
    its end: under the causal mask nothing before it sees it. `gather(dim, *xs)` goes from tensors of this part's
    positions, [..., Tq, ...] of one shape, to those of everybody's, [..., n Tq, ...], and the gradient of each is the
    sum of what all parts have for this one's positions.

    Worked: rows of 7, two parts, of which this is the first. `queries` is 0 1 6 7, `keys` is 0 1 6 7 2 3 4 5; place 7
    is padding.
    """

    queries: Tensor
    keys: Tensor
    gather: Gather

    def take(self, x: Tensor) -> Tensor:
        """Return the part's positions of whole rows, [B, Tq, ...] of [B, T, ...]."""
        return at(x, self.queries)

    def join(self, x: Tensor, length: int) -> Tensor:
        """Return whole rows of `length` [B, T, ...] from this part's positions [B, Tq, ...] and the others'."""
        (everybodys,) = self.gather(1, x)
        return everybodys.index_select(1, self.keys.argsort()[:length])


PartOf = Callable[[int, torch.device], Part]
"""From the length of the rows, and where the batch is, to the part of them that is computed here."""


def at(x: Tensor, places: Tensor) -> Tensor:
    """Return what stands at `places` (int64 [n]) of rows [B, T, ...]; padding is the last position once more."""
    return x.index_select(1, places.clamp(max=x.shape[1] - 1))
