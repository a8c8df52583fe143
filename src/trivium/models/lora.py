"""Low-rank adapters: the matrices of the blocks stay frozen, and each learns a small product B A beside it.

`y = x W^T + b + (alpha / rank) (x A^T) B^T` (Hu et al. 2021, arXiv 2106.09685, section 4.1). A is drawn as PEFT draws
it and B starts at 0, so an adapted network first computes what the network computed, to the bit. `adapter_folder.py`
reads and writes PEFT's folders. Left out: dropout on the adapter's input, adapters on embeddings and output matrix,
DoRA, one rank per matrix.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.config import ConfigError, Dial, bounds, one_of
from trivium.models.accounting import flops
from trivium.models.config import ModelConfig, require
from trivium.models.heads import ScalarModel
from trivium.models.hf import load_model
from trivium.models.transformer import Transformer

M = TypeVar("M", Transformer, ScalarModel)

MATRICES: Mapping[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "both": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
"""What `targets` can be, and the matrices of a block that it names."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of low rank on a frozen network; rank 0 trains the whole network and changes nothing else.

    The learning rate is AdamW's: on a network of 0.4 M weights made here 1e-2 was the best of 1e-3, 3e-3, 1e-2 and 3e-2
    (docs/LOG.md); on large ones 2e-4 is usual (the paper's GPT-3). Embeddings stay frozen: a base that has never seen
    the tokens of the chat format learns them better as a whole network.
    """

    rank: Dial[int] = 0
    """Columns of B and rows of A; 0 means no adapters. 8 is enough for a few thousand examples."""
    alpha: float = 16.0
    """The adapters' product counts alpha / rank."""
    targets: str = "both"
    """Which matrices of each block get one: `attention` (q, k, v, o), `mlp` (gate, up, down) or `both`."""

    def __post_init__(self) -> None:
        """Refuse an unknown target, a negative rank and an alpha that switches the adapters off."""
        bounds(self, rank=(0, None), alpha=(1e-6, None))
        one_of(self, targets=tuple(MATRICES))

    def __bool__(self) -> bool:
        """Tell whether there are adapters at all."""
        return self.rank > 0


class LoraLinear(nn.Module):
    """A frozen linear map with an adapter beside it; its own tensors are named as the map's were."""

    bias: nn.Parameter | None

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        """Take over the map's parameters, frozen, and put adapters of zeros beside them."""
        super().__init__()
        self.weight = base.weight.requires_grad_(False)
        self.bias = base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        outputs, inputs = self.weight.shape
        self.lora_A = nn.Parameter(self.weight.new_zeros(rank, inputs))
        self.lora_B = nn.Parameter(self.weight.new_zeros(outputs, rank))
        self.scale = scale
        self.is_on = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of x [..., inputs], the adapter's part included unless it is switched off."""
        out = F.linear(x, self.weight, self.bias)
        # Scaled where it is narrowest. W + B A is not formed: that would be a copy of the network.
        return out + F.linear(F.linear(x, self.lora_A) * self.scale, self.lora_B) if self.is_on else out

    def merged(self) -> Tensor:
        """Return the weight of the plain linear map that computes the same."""
        return torch.addmm(self.weight.detach(), self.lora_B.detach(), self.lora_A.detach(), alpha=self.scale)


def adapt(model: M, config: LoraConfig, *, seed: int = 0) -> M:
    """Return the model itself, frozen, with adapters on the targeted matrices; as it was where the rank is 0.

    A is uniform in +-1 / sqrt(inputs), a function of `seed`; B is 0. A scalar model's head stays trainable: it is one
    row, and starts at nothing. Raises ConfigError for a rank that a matrix cannot have, ModelError for adapters on
    adapters.
    """
    if not config:
        return model
    freeze(model)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in targets_in(model, MATRICES[config.targets]):
        outputs, inputs = linear.weight.shape
        if config.rank > min(outputs, inputs):
            raise ConfigError(
                f"lora.rank = {config.rank}: {name} is {outputs} x {inputs}, so {min(outputs, inputs)} is the most "
                "that means anything; lower it, or choose other targets"
            )
        made = attach(model, name, linear, config.rank, config.alpha / config.rank)
        bound = 1 / math.sqrt(inputs)
        with torch.no_grad():
            made.lora_A.copy_(torch.empty(made.lora_A.shape).uniform_(-bound, bound, generator=generator))
    return model


def policy_and_reference(
    folder: Path,
    config: LoraConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Transformer, Transformer]:
    """Return the model of a folder, to train, and the frozen one that it is compared with.

    With adapters both are one network, and the reference is what it computes inside `adapters_off`. The folder's
    weights are whole, an earlier stage's adapters merged into them, so that is the start of this stage and no other.
    """
    policy = adapt(load_model(folder, device=device, dtype=dtype), config, seed=seed)
    return policy, policy if config else load_model(folder, device=device, dtype=dtype).requires_grad_(False)


def trained_copy(
    frozen: ScalarModel, config: LoraConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> ScalarModel:
    """Return a copy of a frozen scalar model, to train: all of it in `dtype`, or adapters beside the very same weights.

    With adapters the two share the tensors below the head (PPO's reward model and its value model do), in the frozen
    one's dtype.
    """
    shared = {id(parameter): parameter for parameter in frozen.model.parameters()} if config else {}
    made = copy.deepcopy(frozen, shared)
    return adapt(made, config, seed=seed) if config else made.to(dtype).requires_grad_(True)


def adapters_of(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapted maps of a model by name; empty for a plain one."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let an adapted model compute what it did before it was adapted, for a while; a plain one is left alone."""
    adapters = list(adapters_of(model).values())
    for adapter in adapters:
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_on = True


def merged(model: M) -> M:
    """Return a plain model that computes the same: B A added into each matrix, all other tensors shared.

    A plain model is returned itself. Neither the adapted model nor its frozen weights change.
    """
    adapters = adapters_of(model)
    if not adapters:
        return model
    with torch.device("meta"):
        plain = type(model)(model.config)
    own = {f"{name}.{part}" for name in adapters for part in ("lora_A", "lora_B")}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
    tensors |= {f"{name}.weight": adapter.merged() for name, adapter in adapters.items()}
    plain.load_state_dict(tensors, assign=True)
    if isinstance(plain, Transformer):
        plain.tie_weights()
    return plain.train(model.training)


def adapter_facts(model: nn.Module) -> dict[str, Any]:
    """Return what a manifest says of a model's adapters under `lora`: rank, alpha, number of matrices and weights."""
    adapters = adapters_of(model)
    if not adapters:
        return {}
    rank, alpha = rank_and_alpha(adapters)
    trainable = sum(adapter.lora_A.numel() + adapter.lora_B.numel() for adapter in adapters.values())
    return {"lora": {"rank": rank, "alpha": alpha, "num_matrices": len(adapters), "num_trainable": trainable}}


def training_flops(config: ModelConfig, context: int, lora: LoraConfig) -> float:
    """Return the FLOPs of training on one token of a row of `context`, forward and backward.

    The whole network costs three forward passes. With adapters a frozen matrix has no gradient of its own: 4 N instead
    of 6 N for N frozen weights, and three forward passes of the attention's scores and of the adapters. The lowest
    block, whose input needs no gradient, is counted like the others.
    """
    if not lora:
        return 3 * config.flops_per_token(context)
    parts = flops(config, context)
    shapes = _shapes(config)
    narrow = sum(sum(shapes[name]) for name in MATRICES[lora.targets])
    adapters = 2.0 * config.num_hidden_layers * lora.rank * narrow
    scores = parts["attention_scores"]
    return 2 * (sum(parts.values()) - scores) + 3 * (scores + adapters)


def freeze(model: Transformer | ScalarModel) -> None:
    """Have nothing of a model trained but a scalar model's head."""
    model.requires_grad_(False)
    if isinstance(model, ScalarModel):
        model.score.requires_grad_(True)


def targets_in(model: Transformer | ScalarModel, kinds: tuple[str, ...]) -> list[tuple[str, nn.Linear]]:
    """Return the linear maps inside the blocks that go by one of these names; refuse a model that has adapters."""
    require(not adapters_of(model), "This model has adapters already; merge them first.")
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and name.rpartition(".")[2] in kinds
    ]


def attach(model: nn.Module, name: str, linear: nn.Linear, rank: int, scale: float) -> LoraLinear:
    """Put adapters of zeros on the linear map called `name`, and return the adapted map, now in its place."""
    made = LoraLinear(linear, rank, scale)
    place, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(place), leaf, made)
    return made


def rank_and_alpha(adapters: Mapping[str, LoraLinear]) -> tuple[int, float]:
    """Return the rank and alpha that all adapters of a model share."""
    first = next(iter(adapters.values()))
    return len(first.lora_A), first.scale * len(first.lora_A)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of each matrix of a block."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    return {
        "q_proj": (width, queries),
        "k_proj": (width, keys),
        "v_proj": (width, keys),
        "o_proj": (queries, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }
