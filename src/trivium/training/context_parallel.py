"""One row on many ranks: the positions of each row are dealt out over the ranks of a context group.

A row is cut into 2n chunks for n ranks, and rank r has the chunks r and 2n - 1 - r: under the causal mask a late chunk
sees more than an early one, and each rank has one of both. In each layer a rank computes what it needs of its own
positions, and gathers the keys and values of all of them (Llama 3, 2407.21783, section 3.3.2). All ranks then have the
row's hidden states, so that an objective does not know of any of this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trivium.batches import IGNORE, TokenBatch
from trivium.config import ConfigError
from trivium.models.part import Part
from trivium.models.transformer import Decoder
from trivium.training.distributed import context_ranks, tensor_ranks, world

# By their names since torch 2.13, which warns of the old ones, or by those.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def check_network(model: nn.Module, ranks: int) -> None:
    """Raise ConfigError for a network that cannot compute a part of a row's positions."""
    if not _decoders(model):
        raise ConfigError(
            f"context_parallel = {ranks}: only Trivium's own network can share the positions of a row, and "
            f"{type(model).__name__} is another; set it to 1"
        )


def places_of(rank: int, ranks: int, length: int) -> Tensor:
    """Return the places of a row of `length` that are this rank's, int64; those from `length` on are padding.

    Worked: of 7 positions rank 0 of 2 has 0 1 6 7, rank 1 has 2 3 4 5.
    """
    size = -(-length // (2 * ranks))
    begins = torch.tensor([rank * size, (2 * ranks - 1 - rank) * size])
    return (begins[:, None] + torch.arange(size)).flatten()


class SharedRows:
    """The context group of this rank, and how an objective is computed on it."""

    def __init__(self, device: str) -> None:
        """Meet the other ranks of the group; `device` is the type of what is sent ("cpu", "cuda"). All ranks must."""
        context, tensor = context_ranks(), tensor_ranks()
        sizes = (world()[1] // (context * tensor), context, tensor)
        mesh = init_device_mesh(device, sizes, mesh_dim_names=("data", "context", "tensor"))
        self.mesh: DeviceMesh = mesh["context"]

    def part(self, length: int, device: torch.device) -> Part:
        """Return this rank's part of rows of `length`."""
        size, rank = self.mesh.size(), self.mesh.get_local_rank()
        places = torch.stack([places_of(each, size, length) for each in range(size)]).to(device)
        return Part(queries=places[rank], keys=places.flatten(), gather=self.gather)

    # What is sent stands between compiled programs. torch leaves the decorator, and what follows, unannotated.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def gather(self, dim: int, *xs: Tensor) -> tuple[Tensor, ...]:
        """Return of each tensor what all ranks have, one after the other along `dim`; their gradients are added up."""
        group, ranks = self.mesh.get_group(), self.mesh.size()
        gathered: tuple[Tensor, ...] = _Gathered.apply(group, ranks, dim, *xs)  # type: ignore[no-untyped-call]
        return gathered

    def loss(self, loss: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return `loss(batch)`, (total, metrics), each network in it computing this rank's part of every row.

        The mean over the group's ranks is the group's figure. Where the items are tokens each rank has its own, so that
        none does the output layer's work for another; what is said of whole rows is computed by all ranks alike.
        So an objective over a TokenBatch must be a sum over its targets, as `num_items` says.
        """
        decoders = _decoders(loss)
        for decoder in decoders:
            decoder.part_of = self.part
        try:
            if not isinstance(batch, TokenBatch):
                whole: tuple[Tensor, Mapping[str, Tensor]] = loss(batch)
                return whole
            total, metrics = loss(self.own_targets(batch))
        finally:
            for decoder in decoders:
                decoder.part_of = None
        ranks = self.mesh.size()
        return total * ranks, {name: value * ranks for name, value in metrics.items()}

    def own_targets(self, batch: TokenBatch) -> TokenBatch:
        """Return the batch with the targets of this rank's positions alone."""
        length, device = batch.targets.shape[1], batch.targets.device
        mine = torch.isin(torch.arange(length, device=device), self.part(length, device).queries)
        return dataclasses.replace(
            batch,
            targets=batch.targets.where(mine, IGNORE),
            weights=None if batch.weights is None else batch.weights * mine,
        )


class _Gathered(torch.autograd.Function):
    """An all-gather of tensors of one shape, whose gradient is a reduce-scatter of sums in fp32.

    torch's DTensor does the same with twice the copies on the way back (docs/LOG.md).
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, ranks: int, dim: int, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.ranks, ctx.dim = group, ranks, dim
        mine = torch.stack(xs)
        parts = mine.new_empty(ranks, *mine.shape)
        _all_gather(parts.flatten(0, 1), mine, group=group)  # views: gloo wants one dimension less
        return tuple(part.movedim(0, dim).flatten(dim, dim + 1) for part in parts.unbind(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        first, *_ = gradients[0].chunk(ctx.ranks, ctx.dim)
        parts = first.new_empty(ctx.ranks, len(gradients), *first.shape, dtype=torch.float32)
        for place, gradient in enumerate(gradients):
            for rank, part in enumerate(gradient.chunk(ctx.ranks, ctx.dim)):
                parts[rank, place] = part
        mine = torch.empty_like(parts[0])
        _reduce_scatter(mine, parts.flatten(0, 1), group=ctx.group)
        return None, None, None, *mine.to(gradients[0].dtype).unbind()


def _decoders(model: nn.Module) -> list[Decoder]:
    return [module for module in model.modules() if isinstance(module, Decoder)]
