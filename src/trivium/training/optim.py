"""Optimizers: Muon for the matrices inside the network, AdamW for everything else.

Every trainable parameter is in exactly one group; norms, biases, embeddings and output heads are never decayed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from trivium.config import bounds, one_of
from trivium.training import compensation
from trivium.training.muon import Muon
from trivium.training.parallel import clip_gradients, mesh_of, shard_like
from trivium.training.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer settings; one learning rate serves both, because Muon's update is scaled to AdamW's RMS."""

    kind: str = "muon"
    """`muon` (Muon for hidden matrices, AdamW for the rest) or `adamw` for all."""
    lr: float = 3e-3
    """Peak learning rate."""
    embedding_lr_scale: float = 1.0
    """Factor on `lr` for everything AdamW trains beside Muon (embeddings, head, norms)."""
    weight_decay: float = 0.1
    """Decoupled decay of hidden matrices only."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.95
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment after bias correction."""
    momentum: float = 0.95
    """Muon's Nesterov momentum."""
    grad_clip: float = 1.0
    """Global gradient norm above which the gradient is scaled down; 0 means never."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How the learning rate moves."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        one_of(self, kind=("muon", "adamw"))
        bounds(
            self, lr=(0, None), weight_decay=(0, None), beta1=(0, 1), beta2=(0, 1), momentum=(0, 1), grad_clip=(0, None)
        )


def partition(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return the trainable parameters as `hidden` matrices, low-rank `adapters` and the `rest`; each exactly once.

    Hidden matrices are the 2-D weights of the blocks, and the only ones decayed; embeddings, heads, norms and biases
    are the rest. Adapters (models/lora.py) are matrices inside the blocks too, but AdamW's: what Muon would make
    orthogonal is a factor of their product, not the product (docs/LOG.md has both measured).
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"hidden": [], "adapters": [], "rest": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hidden = parameter.ndim == 2 and ".layers." in f".{name}"
            kind = "adapters" if name.endswith(("lora_A", "lora_B")) else "hidden" if hidden else "rest"
            groups[kind].append((name, parameter))
    return groups


def by_mesh(parameters: Sequence[nn.Parameter]) -> tuple[list[dict[str, Any]], list[int]]:
    """Return one parameter group for each set of ranks that parameters are sharded over, and their places in the list.

    A fused update takes no mixture. A checkpoint counts by the places, which do not depend on the ranks.
    """
    groups: dict[DeviceMesh | None, list[int]] = {}
    for place, parameter in enumerate(parameters):
        groups.setdefault(mesh_of(parameter), []).append(place)
    made = [{"params": [parameters[place] for place in places]} for places in groups.values()]
    return made, [place for places in groups.values() for place in places]


class Optimizer:
    """One to three torch optimizers stepped as one, with a learning-rate factor per step.

    Weights in bf16 are always updated with compensation: without it, or an fp32 copy, most would never move.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        """Build the optimizers over the trainable parameters of `model`.

        Raises ConfigError for weights in fp16, or sharded ones in bf16.
        """
        self.config = config
        groups = partition(model)
        hidden = [p for _, p in groups["hidden"]]
        adapters = [p for _, p in groups["adapters"]]
        rest = [p for _, p in groups["rest"]]
        self.parameters = hidden + adapters + rest
        compensation.check_trainable(self.parameters)
        self._is_compensated = any(compensation.is_compensated(p) for p in self.parameters)
        adamw = compensation.AdamW if self._is_compensated else torch.optim.AdamW
        betas = (config.beta1, config.beta2)
        rest_lr = config.lr * config.embedding_lr_scale
        self.optimizers: list[torch.optim.Optimizer] = []
        if hidden and config.kind == "muon":
            muon = Muon(
                hidden,
                lr=config.lr,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            self.optimizers.append(muon)
        elif hidden:
            self.optimizers.append(
                adamw(hidden, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)
            )
        self._places: list[list[int]] = [list(range(len(hidden)))] if hidden else []
        for members, lr in ((adapters, config.lr), (rest, rest_lr)):
            if members:
                members_by_mesh, places = by_mesh(members)
                self._places.append(places)
                self.optimizers.append(
                    adamw(members_by_mesh, lr=lr, betas=betas, eps=config.eps, weight_decay=0.0, fused=True)
                )
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def step(self, lr_scale: float) -> None:
        """Apply the gradients at `lr_scale` times the peak learning rates."""
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * lr_scale
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def clip(self) -> Tensor:
        """Return the global gradient norm (before clipping) and clip it to `grad_clip`."""
        limit = self.config.grad_clip if self.config.grad_clip > 0 else float("inf")
        if not self._is_compensated:
            return clip_gradients(self.parameters, limit)
        # torch's own takes the norm of bf16 gradients in bf16, that is to two digits.
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        total = torch.stack(norms).norm() if norms else torch.zeros(())
        nn.utils.clip_grads_with_norm_(self.parameters, limit, total)
        return total

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as flat named tensors, for a checkpoint."""
        flat: dict[str, Tensor] = {}
        for number, (optimizer, places) in enumerate(zip(self.optimizers, self._places, strict=True)):
            for index, entry in optimizer.state_dict()["state"].items():
                flat |= {f"{number}.{places[index]}.{key}": torch.as_tensor(value) for key, value in entry.items()}
        return flat

    def state_bytes(self) -> int:
        """Return how many bytes `tensors()` takes once the first step is taken, for what has to fit on a disk."""
        total = 0
        for optimizer in self.optimizers:
            adam = isinstance(optimizer, torch.optim.AdamW)  # two moments and a float32 count of steps; Muon has one
            for group in optimizer.param_groups:
                decays = group["betas"] if adam else (group["momentum"],)
                total += sum(compensation.state_bytes(p, decays) + (4 if adam else 0) for p in group["params"])
        return total

    def load_tensors(self, flat: dict[str, Tensor]) -> None:
        """Take `tensors()` back."""
        for number, optimizer in enumerate(self.optimizers):
            indices = {place: index for index, place in enumerate(self._places[number])}
            owners = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            optimizer.state.clear()
            for name, value in _under(flat, f"{number}."):
                place, key = name.split(".", 1)
                owner = owners[indices[int(place)]]
                # Not by `load_state_dict`, which would round an fp32 moment to the dtype of its bf16 weight.
                optimizer.state[owner][key] = shard_like(owner, value.to(owner.device))


def _under(flat: dict[str, Tensor], prefix: str) -> Iterable[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), value) for name, value in flat.items() if name.startswith(prefix))
