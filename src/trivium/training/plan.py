"""What a run on many GPUs needs, by formula: memory of each GPU, bytes sent per step, the utilisation to expect.

docs/scale.md is made from `PLANS`; `tests/training/test_plan.py` holds the formulas to hand-worked and measured cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trivium.models.accounting import (
    FP32_BYTES,
    activation_bytes,
    cast_bytes,
    logits_bytes,
    parameters,
    recomputed_bytes,
    training_flops,
)
from trivium.models.config import ModelConfig

KERNEL_FRACTION = 0.6
"""Assumed share of a GPU's peak that the layers reach when nothing is waited for; `bench/gpu.py` measures it."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the plan assumes of a GPU: bf16 FLOPs per second, memory, and bytes per second out of it by either way."""

    name: str
    flops: float
    memory_bytes: float
    inside: float
    """Within a node (NVLink), one direction."""
    between: float
    """Between nodes, one direction, per GPU."""
    gpus_per_node: int = 8


H100 = Machine(name="H100 SXM, 8 a node", flops=989e12, memory_bytes=80e9, inside=450e9, between=50e9)
"""The data sheet's figures; 400 Gb/s of network per GPU, as such nodes usually have."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run lies on its GPUs. Data parallel ranks are `gpus / tensor_parallel`; `sharded` is FSDP, else DDP."""

    gpus: int
    rows: int
    """Rows of a micro-batch on each data-parallel rank."""
    context: int
    accumulation: int = 1
    """Micro-batches per step."""
    tensor_parallel: int = 1
    sharded: bool = True
    checkpointing: bool = True
    optimizer: str = "adamw"
    """`adamw`, or `muon` for the matrices in the layers, which keeps one state instead of two."""
    precision: str = "bf16"
    loss_chunk: int = 0
    """Positions of the micro-batch whose logits exist at once; 0: all."""

    @property
    def replicas(self) -> int:
        """The number of data-parallel ranks."""
        return self.gpus // self.tensor_parallel

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step over all GPUs."""
        return self.replicas * self.rows * self.context * self.accumulation


def optimizer_bytes(config: ModelConfig, optimizer: str) -> float:
    """Return the bytes of the optimizer's state: two fp32 numbers per weight (AdamW); one for Muon's matrices."""
    counts = parameters(config)
    matrices = config.num_parameters() - counts["embedding"] - counts["head"] - counts["norms"]
    if config.attention_bias:
        matrices -= config.num_hidden_layers * (config.num_attention_heads + 2 * config.kv_heads) * config.head_size
    saved = matrices if optimizer == "muon" else 0
    return FP32_BYTES * (2.0 * config.num_parameters() - saved)


def memory(config: ModelConfig, layout: Layout) -> dict[str, float]:
    """Return the bytes on each GPU at the peak of a step, by what they are for.

    fp32 weights, gradients and optimizer state, divided by tensor parallelism and, with FSDP, by all replicas; then, of
    one micro-batch, the activations `kept` for the backward pass and what is `passing`: the logits with their loss or,
    under activation checkpointing and if larger, one layer computed again. Rows are taken to need no stored mask (a
    plain causal one, or a kernel that knows documents). `gathered` are the copies in the compute dtype: with FSDP of
    the largest unit twice (one computes while the next arrives) and its gradient once; else autocast's copies.
    """
    split, numbers, rows, context = layout.tensor_parallel, config.num_parameters(), layout.rows, layout.context
    passing = logits_bytes(config, rows, context, chunk=layout.loss_chunk, precision=layout.precision, split=split)
    kind: dict[str, Any] = {"precision": layout.precision, "packed": False, "split": split}
    if layout.checkpointing:  # the loss is over when the first layer is computed again
        passing = max(passing, recomputed_bytes(config, rows, context, **kind))
        if (
            not layout.sharded
        ):  # autocast keeps its copies of all layers until the forward pass ends, the logits then out
            logits = min(layout.loss_chunk or rows * context, rows * context) * config.vocab_size * FP32_BYTES / split
            passing = max(passing, logits + cast_bytes(config, layout.precision, split=split))
    share = split * (layout.replicas if layout.sharded else 1)
    small = 2 if layout.precision == "bf16" else FP32_BYTES
    return {
        "weights": FP32_BYTES * numbers / share,
        "gradients": FP32_BYTES * numbers / share,
        "optimizer": optimizer_bytes(config, layout.optimizer) / share,
        "gathered": _gathered_bytes(config, layout, small),
        "kept": activation_bytes(config, rows, context, checkpointing=layout.checkpointing, **kind),
        "passing": passing,
    }


def _gathered_bytes(config: ModelConfig, layout: Layout, small: int) -> float:
    """Return the bytes of the weights' copies in the compute dtype that exist throughout the backward pass."""
    counts, split = parameters(config), layout.tensor_parallel
    inside = (counts["attention"] + counts["mlp"]) / split
    outside = (counts["embedding"] + counts["head"]) / split
    unit = inside / max(1, config.num_hidden_layers)
    if layout.sharded and layout.replicas > 1:
        return small * 3 * max(unit, outside)
    if small == FP32_BYTES:
        return 0.0
    head = config.vocab_size * config.hidden_size / split
    return small * (head + (unit if layout.checkpointing else inside))


def communication(config: ModelConfig, layout: Layout) -> dict[str, float]:
    """Return the bytes that each GPU sends in one optimizer step, by kind, with the algorithms of rings.

    Over n ranks an all-gather or a reduce-scatter of S bytes sends S (n-1)/n from each, an all-reduce twice that. DDP
    all-reduces fp32 gradients once a step. FSDP gathers bf16 weights for the forward pass and again for the backward
    pass and reduce-scatters gradients in fp32, each micro-batch. Tensor parallelism all-reduces the residual stream
    after attention and after MLP, forward and backward, and forward once more under activation checkpointing.
    """
    split, n, numbers = layout.tensor_parallel, layout.replicas, config.num_parameters() / layout.tensor_parallel
    small = 2 if layout.precision == "bf16" else FP32_BYTES
    ring = (n - 1) / n
    sent = {"all_reduce": 0.0, "all_gather": 0.0, "reduce_scatter": 0.0, "tensor_parallel": 0.0}
    if layout.sharded:
        sent["all_gather"] = 2 * ring * small * numbers * layout.accumulation
        sent["reduce_scatter"] = ring * FP32_BYTES * numbers * layout.accumulation
    else:
        sent["all_reduce"] = 2 * ring * FP32_BYTES * numbers
    passes = 6 if layout.checkpointing else 4
    stream = layout.rows * layout.context * config.hidden_size * small * layout.accumulation
    sent["tensor_parallel"] = config.num_hidden_layers * passes * 2 * (split - 1) / split * stream
    return sent


def expected_mfu(config: ModelConfig, layout: Layout, machine: Machine) -> dict[str, float]:
    """Return seconds per step and the MFU to expect: `compute_s`, `exposed_s`, `step_s`, `mfu`, `tokens_per_s`.

    The layers run at KERNEL_FRACTION of the data sheet's peak, recomputation included. Data-parallel traffic goes on
    behind the computation and is waited for only where it takes longer; tensor-parallel traffic stands in the way and
    is waited for in full. MFU counts each FLOP of the model once (PaLM), so recomputation lowers it.
    """
    tokens = layout.tokens / layout.gpus
    useful = tokens * training_flops(config, layout.context)
    done = tokens * training_flops(config, layout.context, checkpointing=layout.checkpointing)
    compute = done / (KERNEL_FRACTION * machine.flops)
    sent = communication(config, layout)
    within = layout.gpus <= machine.gpus_per_node
    data = (sent["all_reduce"] + sent["all_gather"] + sent["reduce_scatter"]) / (
        machine.inside if within else machine.between
    )
    tensor = sent["tensor_parallel"] / (
        machine.inside if layout.tensor_parallel <= machine.gpus_per_node else machine.between
    )
    exposed = max(0.0, data - compute) + tensor
    step = compute + exposed
    return {
        "compute_s": compute,
        "exposed_s": exposed,
        "step_s": step,
        "mfu": useful / step / machine.flops,
        "tokens_per_s": layout.tokens / step,
    }


SEVEN_B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=4096,
)
SEVENTY_B = ModelConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=4096,
)
PLANS: Mapping[str, tuple[ModelConfig, Layout]] = {
    "7B, one node": (
        SEVEN_B,
        Layout(gpus=8, rows=1, context=4096, accumulation=32, loss_chunk=2048, checkpointing=False),
    ),
    "7B, eight nodes": (SEVEN_B, Layout(gpus=64, rows=4, context=4096, accumulation=2, loss_chunk=2048)),
    "70B, 32 nodes, FSDP": (SEVENTY_B, Layout(gpus=256, rows=4, context=4096, loss_chunk=2048)),
    "70B, 32 nodes, FSDP and TP 8": (
        SEVENTY_B,
        Layout(gpus=256, tensor_parallel=8, rows=4, context=4096, accumulation=8, loss_chunk=2048),
    ),
}
"""The plans of docs/scale.md: Llama 2's shapes, steps of a million tokens or more."""


def plan_table(machine: Machine = H100) -> str:
    """Return the plans as a Markdown table, one column a plan."""
    rows: dict[str, list[str]] = {}

    def put(name: str, text: str) -> None:
        rows.setdefault(name, []).append(text)

    for config, layout in PLANS.values():
        parts, sent, speed = (
            memory(config, layout),
            communication(config, layout),
            expected_mfu(config, layout, machine),
        )
        put("parameters", f"{config.num_parameters() / 1e9:.2f} billion")
        put("GPUs (data × tensor parallel)", f"{layout.gpus} ({layout.replicas} × {layout.tensor_parallel})")
        put("rows × context × micro-batches", f"{layout.rows} × {layout.context:,} × {layout.accumulation}")
        put("activation checkpointing", "yes" if layout.checkpointing else "no")
        put("tokens per step", f"{layout.tokens:,}")
        for name, size in parts.items():
            put(f"{name}, GB", f"{size / 1e9:.2f}")
        put(f"**memory of {machine.memory_bytes / 1e9:.0f} GB**", f"**{sum(parts.values()) / 1e9:.1f}**")
        put("sent per GPU and step: weights, GB", f"{sent['all_gather'] / 1e9:.0f}")
        put("… gradients, GB", f"{(sent['reduce_scatter'] + sent['all_reduce']) / 1e9:.0f}")
        put("… activations (tensor parallel), GB", f"{sent['tensor_parallel'] / 1e9:.0f}")
        put("computing, s", f"{speed['compute_s']:.2f}")
        put("waiting for the network, s", f"{speed['exposed_s']:.2f}")
        put("tokens per second", f"{speed['tokens_per_s']:,.0f}")
        put("**MFU to expect**", f"**{speed['mfu']:.0%}**")
    lines = [f"| per GPU ({machine.name}) | {' | '.join(PLANS)} |", "| --- |" + " ---: |" * len(PLANS)]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"
