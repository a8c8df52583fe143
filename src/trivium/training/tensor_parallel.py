"""One matrix on many ranks: each layer's heads and inner width are dealt out over the ranks of a tensor group.

Queries, keys, values, gate and up are cut by rows, o and down by columns, so that attention and MLP each sum one
[B, T, H] over the group on the way forward and one on the way back (Megatron-LM, 1909.08053, section 3; here by
torch's `parallelize_module`). Embeddings, the head, a scalar head and the residual stream's norms stay whole on
every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from trivium.config import ConfigError
from trivium.models.config import ModelConfig
from trivium.models.lora import adapters_of
from trivium.models.transformer import Layer, ProjectionNorm

HEADS = 2
"""The dimension of the heads in what the norms of queries and keys get: [B, T, heads, head_dim]."""


def check_divides(config: ModelConfig, ranks: int) -> None:
    """Raise ConfigError unless heads, key-value heads and inner width can be dealt out evenly over so many ranks."""
    shape = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.intermediate_size,
    }
    odd = [f"{name} = {size}" for name, size in shape.items() if size % ranks]
    if odd:
        raise ConfigError(
            f"tensor_parallel = {ranks} does not divide the model's {' and '.join(odd)}; "
            "use a number of ranks that does, or another shape"
        )


def check_network(model: nn.Module, layers: Sequence[nn.Module], ranks: int) -> None:
    """Raise ConfigError for a network that is not ours, has adapters, or cannot be dealt out over so many ranks."""
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig) or not layers or not all(isinstance(layer, Layer) for layer in layers):
        raise ConfigError(
            f"tensor_parallel = {ranks}: only Trivium's own network knows how to be cut, and "
            f"{type(model).__name__} is another; use parallel = 'fsdp' alone"
        )
    if adapters_of(model):
        raise ConfigError(
            f"tensor_parallel = {ranks} cuts whole matrices, and this stage trains low-rank adapters beside them; "
            "set lora.rank to 0, or use parallel = 'fsdp' alone"
        )
    check_divides(config, ranks)


def split_layers(layers: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Keep this rank's part of each layer's matrices, as DTensors on the 1-D `mesh`; the other ranks keep theirs."""
    for layer in layers:
        # Every rank has the same weights, so none has to send them.
        parallelize_module(layer, mesh, _plan(layer), src_data_rank=None)


def _plan(layer: nn.Module) -> dict[str, ParallelStyle]:
    """Return which part of a layer is cut how."""
    # The input becomes a DTensor once for q, k and v (gate and up): their gradients are added before they are summed.
    plan: dict[str, ParallelStyle] = {
        "self_attn": _entered(4),
        "mlp": _entered(1),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    for name in ("q_norm", "k_norm"):
        norm = getattr(layer.self_attn, name)
        if isinstance(norm, ProjectionNorm):
            plan[f"self_attn.{name}"] = _OverAllHeads()
        elif norm is not None:
            # One weight for all heads: each rank has the gradient from its own heads, and the sum is what counts.
            plan[f"self_attn.{name}"] = SequenceParallel(sequence_dim=HEADS, use_local_output=True)
    return plan


def _entered(arguments: int) -> PrepareModuleInput:
    layouts = (Replicate(), *[None] * (arguments - 1))
    return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)


class _OverAllHeads(ParallelStyle):
    """A norm over all heads of a position at once (OLMo 2): its weight is cut by heads, its mean is over all ranks."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def cut(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
            for key, parameter in list(module.named_parameters(recurse=False)):
                shard = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
                module.register_parameter(key, nn.Parameter(shard, requires_grad=parameter.requires_grad))

        def enter(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> DTensor:
            return DTensor.from_local(inputs[0], mesh, [Shard(HEADS)], run_check=False)

        def leave(module: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
            local: Tensor = output.to_local()
            return local

        return distribute_module(module, device_mesh, cut, enter, leave)  # type: ignore[arg-type]  # they may return


@torch.no_grad()
def settle_gradients(parameters: Sequence[nn.Parameter], mesh: DeviceMesh) -> None:
    """Make the gradients what they are on one process: sums over heads, and one and the same on every copy.

    `mesh`: that of the tensor group. What every rank holds whole has had the same gradient computed on each; the mean
    keeps the copies from drifting apart where a GPU's sums are not in the same order everywhere.
    """
    waiting = []
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        if isinstance(parameter, DTensor) and "tensor" in (parameter.device_mesh.mesh_dim_names or ()):
            assert isinstance(grad, DTensor)
            if grad.placements != parameter.placements:
                parameter.grad = grad.redistribute(placements=parameter.placements)
        else:
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            waiting.append((local, dist.all_reduce(local, group=mesh.get_group(), async_op=True)))
    for local, work in waiting:
        assert work is not None, "an asynchronous collective gives something to wait for"
        work.wait()
        local.div_(mesh.size())
