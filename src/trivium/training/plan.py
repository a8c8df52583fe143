"""What a run on many GPUs needs, by formula: memory of each GPU, bytes sent per step, the utilisation to expect.

docs/scale.md is made from `PLANS`; `tests/training/test_plan.py` holds the formulas to hand-worked and measured cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trivium.losses.cross_entropy import CHUNK_BYTES
from trivium.models.accounting import (
    FP32_BYTES,
    activation_bytes,
    cast_bytes,
    joined_bytes,
    logits_bytes,
    parameters,
    recomputed_bytes,
    sharing_bytes,
    training_flops,
)
from trivium.models.config import ModelConfig

KERNEL_FRACTION = 0.55
"""Assumed share of the data sheet's peak that training reaches when nothing is waited for: an H100 reached 0.47 at 1.3
billion parameters, and the parts of that step come to 0.57 at the width of 7 billion (docs/performance.md)."""


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
    """How a run lies on its GPUs: groups of `tensor_parallel * context_parallel` that work on the same rows.

    Weights and gradients are summed over `copies`, the ranks beside tensor parallelism; `sharded` is FSDP, else DDP.
    """

    gpus: int
    rows: int
    """Rows of a micro-batch of each group."""
    context: int
    accumulation: int = 1
    """Micro-batches per step."""
    tensor_parallel: int = 1
    context_parallel: int = 1
    sharded: bool = True
    checkpointing: bool = True
    optimizer: str = "adamw"
    """`adamw`, or `muon` for the matrices in the layers, which keeps one state instead of two."""
    precision: str = "bf16"
    loss_chunk: int = 0
    """Positions of the micro-batch whose logits exist at once; 0: all."""

    @property
    def replicas(self) -> int:
        """The number of groups with rows of their own."""
        return self.gpus // (self.tensor_parallel * self.context_parallel)

    @property
    def copies(self) -> int:
        """The number of ranks that have the same part of every matrix, or shards of it."""
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


def memory(config: ModelConfig, layout: Layout, *, packed: bool = False) -> dict[str, float]:
    """Return the bytes on each GPU at the peak of a step, by what they are for.

    fp32 weights, gradients and optimizer state, divided by tensor parallelism and, with FSDP, by all copies; then, of
    one micro-batch, the activations `kept` for the backward pass and what is `passing`: the logits with their loss or,
    under activation checkpointing and if larger, one layer computed again. `packed`: with the mask that a CPU stores
    for rows of several documents; a GPU has kernels that need none. `gathered` are the copies in the compute dtype:
    with FSDP of the largest unit twice (one computes while the next arrives) and its gradient once; else autocast's.
    """
    kind: dict[str, Any] = {"precision": layout.precision, "packed": packed, "split": layout.tensor_parallel}
    kind["parts"] = layout.context_parallel
    share = layout.tensor_parallel * (layout.copies if layout.sharded else 1)
    small, numbers = 2 if layout.precision == "bf16" else FP32_BYTES, config.num_parameters()
    return {
        "weights": FP32_BYTES * numbers / share,
        "gradients": FP32_BYTES * numbers / share,
        "optimizer": optimizer_bytes(config, layout.optimizer) / share,
        "gathered": _gathered_bytes(config, layout, small),
        "kept": activation_bytes(config, layout.rows, layout.context, checkpointing=layout.checkpointing, **kind),
        "passing": _passing_bytes(config, layout, kind),
    }


def _passing_bytes(config: ModelConfig, layout: Layout, kind: dict[str, Any]) -> float:
    """Return the bytes of what comes and goes in a micro-batch, at the moment when that is most.

    With context parallelism the whole rows' hidden states stand beside the logits, after they were joined of parts.
    """
    split, parts, rows, context = layout.tensor_parallel, layout.context_parallel, layout.rows, layout.context
    chunk, precision = layout.loss_chunk, layout.precision
    # In chunks a rank does its own positions' logits only; all at once everybody's.
    passing = logits_bytes(
        config, rows, context / parts if chunk else context, chunk=chunk, precision=precision, split=split
    )
    if parts > 1:
        joined = joined_bytes(config, rows, context)
        tokens = rows * context / parts
        passing = max(passing + joined / 3, joined, tokens * sharing_bytes(config, precision, split=split, parts=parts))
    if layout.checkpointing:  # the loss is over when the first layer is computed again
        passing = max(passing, recomputed_bytes(config, rows, context, **kind))
        if (
            not layout.sharded
        ):  # autocast keeps its copies of all layers until the forward pass ends, the logits then out
            logits = min(chunk or rows * context, rows * context) * config.vocab_size * FP32_BYTES / split
            passing = max(passing, logits + cast_bytes(config, precision, split=split))
    return passing


def _gathered_bytes(config: ModelConfig, layout: Layout, small: int) -> float:
    """Return the bytes of the weights' copies in the compute dtype that exist throughout the backward pass."""
    counts, split = parameters(config), layout.tensor_parallel
    inside = (counts["attention"] + counts["mlp"]) / split
    outside = (counts["embedding"] + counts["head"]) / split
    unit = inside / max(1, config.num_hidden_layers)
    if layout.sharded and layout.copies > 1:
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
    after attention and after MLP, forward and backward, and forward once more under activation checkpointing. Context
    parallelism gathers keys and values in each layer, once more under activation checkpointing, and reduce-scatters
    their gradients in fp32; and the last hidden states once, in fp32 both ways.
    """
    split, n, numbers = layout.tensor_parallel, layout.copies, config.num_parameters() / layout.tensor_parallel
    small = 2 if layout.precision == "bf16" else FP32_BYTES
    ring = (n - 1) / n
    sent = {
        "all_reduce": 0.0,
        "all_gather": 0.0,
        "reduce_scatter": 0.0,
        "tensor_parallel": 0.0,
        "context_parallel": 0.0,
    }
    if layout.sharded:
        sent["all_gather"] = 2 * ring * small * numbers * layout.accumulation
        sent["reduce_scatter"] = ring * FP32_BYTES * numbers * layout.accumulation
    else:
        sent["all_reduce"] = 2 * ring * FP32_BYTES * numbers
    passes = 6 if layout.checkpointing else 4
    tokens, parts = layout.rows * layout.context * layout.accumulation, layout.context_parallel
    stream = tokens / parts * config.hidden_size * small
    sent["tensor_parallel"] = config.num_hidden_layers * passes * 2 * (split - 1) / split * stream
    keys = 2 * config.kv_heads * config.head_size / split * ((2 if layout.checkpointing else 1) * small + FP32_BYTES)
    per_token = config.num_hidden_layers * keys + 2 * config.hidden_size * FP32_BYTES
    sent["context_parallel"] = (parts - 1) / parts * tokens * per_token
    return sent


def expected_mfu(config: ModelConfig, layout: Layout, machine: Machine) -> dict[str, float]:
    """Return seconds per step and the MFU to expect: `compute_s`, `exposed_s`, `step_s`, `mfu`, `tokens_per_s`.

    The layers run at KERNEL_FRACTION of the data sheet's peak, recomputation included. Data-parallel traffic goes on
    behind the computation and is waited for only where it takes longer; what tensor and context parallelism send stands
    in the way and is waited for in full. MFU counts each FLOP of the model once (PaLM), so recomputation lowers it.
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
    group = layout.tensor_parallel * layout.context_parallel
    neighbours = sent["tensor_parallel"] / (
        machine.inside if layout.tensor_parallel <= machine.gpus_per_node else machine.between
    ) + sent["context_parallel"] / (machine.inside if group <= machine.gpus_per_node else machine.between)
    exposed = max(0.0, data - compute) + neighbours
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
EIGHT_B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
)
CHUNK = CHUNK_BYTES // FP32_BYTES
"""Logits that the loss has at once on a GPU (losses/cross_entropy.py); divided by the vocabulary, positions."""
PLANS: Mapping[str, tuple[ModelConfig, Layout]] = {
    "7B, one node": (
        SEVEN_B,
        Layout(gpus=8, rows=1, context=4096, accumulation=32, loss_chunk=CHUNK // 32000, checkpointing=False),
    ),
    "7B, eight nodes": (SEVEN_B, Layout(gpus=64, rows=4, context=4096, accumulation=2, loss_chunk=CHUNK // 32000)),
    "70B, 32 nodes, FSDP": (SEVENTY_B, Layout(gpus=256, rows=4, context=4096, loss_chunk=CHUNK // 32000)),
    "70B, 32 nodes, FSDP and TP 8": (
        SEVENTY_B,
        Layout(gpus=256, tensor_parallel=8, rows=4, context=4096, accumulation=8, loss_chunk=CHUNK // 32000),
    ),
    "8B, long rows, eight nodes, CP 8": (
        EIGHT_B,
        Layout(gpus=64, context_parallel=8, rows=1, context=131072, loss_chunk=CHUNK // 128256),
    ),
}
"""The plans of docs/scale.md: Llama 2's shapes and Llama 3's smallest, steps of a million tokens or more."""


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
        grid = f"{layout.replicas} × {layout.context_parallel} × {layout.tensor_parallel}"
        put("GPUs (data × context × tensor parallel)", f"{layout.gpus} ({grid})")
        put("rows × context × micro-batches", f"{layout.rows} × {layout.context:,} × {layout.accumulation}")
        put("activation checkpointing", "yes" if layout.checkpointing else "no")
        put("tokens per step", f"{layout.tokens:,}")
        for name, size in parts.items():
            put(f"{name}, GB", f"{size / 1e9:.2f}")
        put(f"**memory of {machine.memory_bytes / 1e9:.0f} GB**", f"**{sum(parts.values()) / 1e9:.1f}**")
        put("sent per GPU and step: weights, GB", f"{sent['all_gather'] / 1e9:.0f}")
        put("… gradients, GB", f"{(sent['reduce_scatter'] + sent['all_reduce']) / 1e9:.0f}")
        put("… activations (tensor parallel), GB", f"{sent['tensor_parallel'] / 1e9:.0f}")
        put("… keys, values, hidden states (context parallel), GB", f"{sent['context_parallel'] / 1e9:.0f}")
        put("computing, s", f"{speed['compute_s']:.2f}")
        put("waiting for the network, s", f"{speed['exposed_s']:.2f}")
        put("tokens per second", f"{speed['tokens_per_s']:,.0f}")
        put("**MFU to expect**", f"**{speed['mfu']:.0%}**")
    lines = [f"| per GPU ({machine.name}) | {' | '.join(PLANS)} |", "| --- |" + " ---: |" * len(PLANS)]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"
