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
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from trivium.batches import IGNORE, TokenBatch
from trivium.config import ConfigError
from trivium.models.part import Part
from trivium.models.transformer import Decoder
from trivium.training.distributed import context_ranks, tensor_ranks, world


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

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Return what all ranks have, one after the other along `dim`; gradients are summed over them, in fp32."""
        mine = DTensor.from_local(x, self.mesh, [Shard(dim)], run_check=False)
        everybodys = mine.redistribute(placements=[Replicate()], backward_dtype=torch.float32)
        return everybodys.to_local(grad_placements=[Partial()])

    def loss(self, loss: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return `loss(batch)`, (total, metrics), each network in it computing this rank's part of every row.

        The mean over the group's ranks is the group's figure. Where the items are tokens each rank has its own, so that
        none does the output layer's work for another; what is said of whole rows is computed by all ranks alike.
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


def _decoders(model: nn.Module) -> list[Decoder]:
    return [module for module in model.modules() if isinstance(module, Decoder)]
