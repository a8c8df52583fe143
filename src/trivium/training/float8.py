"""Products in fp8 for the network's layers, by torchao, on GPUs whose matrix units have it.

A forward pass and both products of the backward pass are in fp8, each tensor scaled by its own largest value at that
moment (Micikevicius et al., arXiv 2209.05433); weights, their gradients and the optimizer stay in fp32. Only training
computes so: an evaluation, a sample and the exported model see the weights as they are.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.config import ConfigError, RunSettings
from trivium.models.heads import ScalarModel
from trivium.models.lora import adapters_of
from trivium.models.transformer import Transformer
from trivium.training.distributed import device_of

TILE = 16
"""Both sides of a matrix must be multiples of it; others stay in bf16, as do those under low-rank adapters."""
HARDWARE = (8, 9)
"""The first compute capability with fp8 products: Ada; Hopper is 9.0."""


def check(settings: RunSettings) -> None:
    """Raise ConfigError where the settings ask for fp8 and the GPU or torchao is lacking, before any work is done."""
    problem = _lacking(settings) if settings.precision == "fp8" else ""
    if problem:
        raise ConfigError(f"precision = 'fp8': {problem}; use 'bf16'")


def lower_products(model: Transformer | ScalarModel, settings: RunSettings, *, emulate: bool = False) -> int:
    """Make the layers' products fp8 for training where the settings ask for it; return how many matrices now are.

    Called before the layers are compiled or spread over ranks. `emulate` rounds to fp8 and multiplies in fp32, which
    any machine can: for tests. Raises ConfigError where the GPU, torchao or a matrix that fits is lacking.
    """
    if settings.precision != "fp8":
        return 0
    if not emulate:
        check(settings)
    from torchao.float8 import Float8LinearConfig

    # The products of the backward pass sum over tokens, of which a padded batch has any number.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    lowered = 0
    for module in model.model.layers.modules():
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.in_features % TILE == child.out_features % TILE == 0:
                setattr(module, name, _linear_class().from_float(child, config))
                lowered += 1
    if not lowered and not adapters_of(model):
        raise ConfigError(f"precision = 'fp8': no matrix of this network has sides that divide by {TILE}; use 'bf16'")
    return lowered


def _lacking(settings: RunSettings) -> str:
    """Return what fp8 needs and is not here, as a clause; empty when nothing is."""
    device = device_of(settings)
    if device.type != "cuda":
        return "it is for GPUs"
    if torch.cuda.get_device_capability(device) < HARDWARE:
        return f"{torch.cuda.get_device_name(device)} has no fp8 products (Ada, Hopper and later do)"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed (pip install 'trivium[fp8]')"
    return ""


@functools.cache
def _linear_class() -> Any:
    """Return torchao's linear layer with fp8 products in training mode alone; made late, for torchao is optional."""
    from torchao.float8.float8_linear import Float8Linear

    class TrainingFloat8Linear(Float8Linear):  # type: ignore[misc]
        """A linear layer that is an ordinary one in evaluation mode."""

        def forward(self, input: Tensor) -> Tensor:
            """Return `input @ weight.T + bias`."""
            out: Tensor = super().forward(input) if self.training else F.linear(input, self.weight, self.bias)
            return out

    return TrainingFloat8Linear
