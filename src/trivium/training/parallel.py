"""One model on many ranks: gradients are summed over them, weights replicated (DDP) or sharded (FSDP2).

With `tensor_parallel` the ranks lie on a grid: those of a tensor group work on the same rows, each with its part of the
matrices (`tensor_parallel.py`), and what is said above goes for the other direction, from group to group. With
`context_parallel` neighbours work on the same rows, too, each on its part of the positions (`context_parallel.py`);
every one of them has whole gradients to add, so that nothing changes for what is said above.

`spread` is called before the optimizer is made, because sharding replaces the parameters. Outside of a training step
a sharded model is used through `whole`, which puts the full weights in their place for a while: evaluation, sampling
and saving then run without talking to other ranks, as long and as often as each likes.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from trivium.batches import LossOutput
from trivium.config import RunSettings
from trivium.training import context_parallel, tensor_parallel
from trivium.training.distributed import compute_dtype, context_ranks, tensor_ranks, world

B = TypeVar("B")


class Spread(Generic[B]):
    """An objective whose gradients are summed over all ranks; called like the objective it was made of.

    Every rank must call it equally often where `lockstep`: a sharded forward pass is a collective.
    """

    def __init__(
        self,
        loss: nn.Module,
        *,
        lockstep: bool,
        rows: context_parallel.SharedRows | None = None,
        tensor_mesh: DeviceMesh | None = None,
    ) -> None:
        """Hold the wrapped module, whose forward pass goes from a micro-batch to (total, metrics)."""
        self._loss = loss
        self._rows = rows
        self._tensor_mesh = tensor_mesh
        self.lockstep = lockstep

    def __call__(self, batch: B) -> LossOutput:
        """Return the summed loss of a micro-batch, as the objective does.

        Of rows that several ranks share, a rank's figure may be another than its neighbour's: their mean is the loss.
        """
        total, metrics = self._loss(batch) if self._rows is None else self._rows.loss(self._loss, batch)
        return LossOutput(total=total, metrics=metrics)

    @contextlib.contextmanager
    def reducing(self, last: bool) -> Iterator[None]:
        """Run one micro-batch, forward and backward; gradients are summed over ranks in the `last` one only."""
        if isinstance(self._loss, DistributedDataParallel):
            with contextlib.nullcontext() if last else self._loss.no_sync():
                yield
        else:
            for module in self._loss.modules():
                if isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(last, recurse=False)
            yield
            if last and self._tensor_mesh is not None:
                tensor_parallel.settle_gradients(list(self._loss.parameters()), self._tensor_mesh)


class _Loss(nn.Module):
    """A model and its objective as one module, so that all that uses the weights happens inside its forward pass."""

    def __init__(self, model: nn.Module, objective: Callable[[Any], LossOutput]) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return (summed loss, summed metrics): plain containers, in which the wrappers find their tensors."""
        output = self._objective(batch)
        return output.total, output.metrics


def spread(model: nn.Module, objective: Callable[[B], LossOutput], settings: RunSettings) -> Callable[[B], LossOutput]:
    """Return the objective to train `model` with on all ranks (itself on one); call it before making the optimizer."""
    if settings.activation_checkpointing:
        checkpoint_layers(model)
    if world()[1] == 1:
        return objective
    loss, rows = _Loss(model, objective), None
    device = next(loss.parameters()).device.type
    if context_ranks() > 1:
        context_parallel.check_network(model, context_ranks())
        rows = context_parallel.SharedRows(device)
    if tensor_ranks() > 1:
        return Spread[B](loss, lockstep=True, rows=rows, tensor_mesh=_lay_on_grid(loss, settings))
    if settings.parallel == "fsdp":
        _shard(loss, settings, init_device_mesh(device, (world()[1],)))
        return Spread[B](loss, lockstep=True, rows=rows)
    wrapped = DistributedDataParallel(loss, gradient_as_bucket_view=True)
    # A lambda, because DDP compares a hook's annotations, which here are strings, with its types.
    wrapped.register_comm_hook(None, lambda _, bucket: _sum(bucket))
    return Spread[B](wrapped, lockstep=False, rows=rows)


def _sum(bucket: Any) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients; DDP of itself takes the mean over ranks, which is wrong when their items differ."""
    buffer = bucket.buffer()
    total = buffer.float()  # itself, unless the weights are bf16, whose sum would be rounded at every rank
    work = dist.all_reduce(total, async_op=True)
    assert work is not None, "an asynchronous collective gives something to wait for"
    return work.get_future().then(lambda _: buffer.copy_(total))  # type: ignore[no-any-return]


def checkpoint_layers(model: nn.Module) -> None:
    """Have each layer keep its input alone and compute its activations again in the backward pass."""
    for layer in _layers(model):
        if "forward" not in vars(layer):
            layer.forward = _computed_again(layer.forward)


def _computed_again(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # A function, not a `partial`: of that torch's compiler makes no program, and the layer would run as written.
    def checkpointed(*args: Any, **more: Any) -> Tensor:
        # Nothing in a layer is random, so there is no state of generators to keep.
        out: Tensor = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **more)
        return out

    return checkpointed


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model: what stands in its ModuleLists named `layers`."""
    return [
        block for name, each in model.named_modules() if name.split(".")[-1] == "layers" for block in each.children()
    ]


def _lay_on_grid(loss: _Loss, settings: RunSettings) -> DeviceMesh:
    """Cut the layers over the ranks of a tensor group, then shard or replicate over groups; return the group's mesh.

    The ranks of a group are neighbours, so that they are on one machine where its GPUs divide by their number.
    """
    groups, tensor = world()[1] // tensor_ranks(), tensor_ranks()
    # Before the groups talk to each other for the first time.
    tensor_parallel.check_network(loss.model, _layers(loss), tensor)
    # Replicas of what is cut are torch's hybrid mesh with one shard: DDP itself knows no DTensors.
    sizes = {"data": groups} if settings.parallel == "fsdp" else {"data": groups, "shards": 1}
    device = next(loss.parameters()).device.type
    mesh = init_device_mesh(device, (*sizes.values(), tensor), mesh_dim_names=(*sizes, "tensor"))
    # It advises to flatten meshes, on every rank, where a tensor is gathered over both directions in turn.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    tensor_parallel.split_layers(_layers(loss), mesh["tensor"])
    if groups > 1:
        _shard(loss, settings, mesh[tuple(sizes)])
    return mesh["tensor"]


def _shard(loss: _Loss, settings: RunSettings, mesh: DeviceMesh) -> None:
    """Shard each layer, and in one more group the rest (tied weights stay one parameter, because they share it)."""
    # As autocast has it: matrices multiply in bf16, the residual stream, embeddings and head stay fp32, as do sums.
    lowered = compute_dtype(settings) is torch.bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if lowered else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in _layers(loss):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(loss, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            # Sums, not means: the step has divided by the items of all ranks. gloo knows no other reduction.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


# ------------------------------------------------------------------------------------------- whole tensors, and back


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """Return the ranks over which a tensor is sharded, None for one that is not; torch mixes no two in one call."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded one (all ranks must ask), any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_whole(into: Tensor, value: Tensor) -> None:
    """Copy a full tensor into a parameter, of which each rank keeps its part."""
    into.data.copy_(shard_like(into, value))


def shard_like(like: Tensor, value: Tensor) -> Tensor:
    """Return the full tensor `value` sharded as `like` is; itself where `like` is whole or of another shape."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    # Every rank has the value, so none has to send it.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def whole(*models: nn.Module) -> Iterator[None]:
    """Put the full weights in place of sharded ones for a while, for anything but training; nothing to do else.

    All ranks must enter; inside, a forward pass is no collective. Changes to the weights are lost.
    """
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(_whole(model))
        yield


@contextlib.contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    held = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    if not held:
        yield
        return
    full: dict[int, nn.Parameter] = {}
    hooks = []
    for _, _, parameter in held:
        if id(parameter) not in full:
            full[id(parameter)] = nn.Parameter(whole_tensor(parameter.detach()), requires_grad=False)
    for module in model.modules():
        # Whatever holds a part of a layer, too: attention and MLP make DTensors of their inputs.
        if isinstance(module, FSDPModule) or any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            hooks.append((module, module._forward_pre_hooks, module._forward_hooks))
            module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    for module, name, parameter in held:
        module._parameters[name] = full[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = before, after


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Return the norm of all gradients, over all ranks' shards, and scale them down to `limit` where it is above."""
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return nn.utils.clip_grad_norm_(parameters, limit)
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(mesh_of(parameter), []).append(parameter)
    norms = [
        whole_tensor(nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]))
        for group in groups.values()
    ]
    total = torch.stack(norms).norm() if len(norms) > 1 else norms[0] if norms else torch.zeros(())
    for group in groups.values():
        nn.utils.clip_grads_with_norm_(group, limit, total)
    return total
