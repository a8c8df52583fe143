"""What a network costs, by formula and by component: parameters, FLOPs, and the bytes kept for the backward pass.

`tests/models/test_accounting.py` holds each to a hand-worked case and to what torch counts and keeps.
"""

from __future__ import annotations

from typing import Any

from trivium.models.config import ModelConfig

FP32_BYTES = 4
LOSS_COPIES = 4
"""Tensors of the logits' size that the backward pass of the cross-entropy holds for a moment beside the logits:
the shifted exponent, its product, the scattered target and their sum."""


def parameters(config: ModelConfig) -> dict[str, int]:
    """Return the number of weights of each component; they sum to `config.num_parameters()`.

    `head` is 0 where it is the embedding itself (tied).
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    queries, keys = _attention_widths(config)
    biases = queries + 2 * keys if config.attention_bias else 0
    norms = (2 * width + (2 * config.head_size if config.qk_norm else 0)) * layers + width
    embedding = config.vocab_size * width
    return {
        "embedding": embedding,
        "attention": layers * (2 * width * (queries + keys) + biases),
        "mlp": layers * 3 * width * config.intermediate_size,
        "norms": norms,
        "head": 0 if config.tie_word_embeddings else embedding,
    }


def flops(config: ModelConfig, context: int) -> dict[str, float]:
    """Return the FLOPs of one forward pass by component, per token of a row of `context` (sum: `flops_per_token`).

    Two per multiply-add, matrix products only. `attention_scores` are queries times keys and weights times values over
    the positions that the mask lets a token see (half the row), which is what a kernel that skips the rest computes;
    a kernel that does not computes twice that. The embedding is a lookup: 0.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    queries, keys = _attention_widths(config)
    window = min(config.sliding_window or context, context)
    visible = (window * (window + 1) / 2 + (context - window) * window) / context
    return {
        "embedding": 0.0,
        "attention_projections": 2.0 * layers * 2 * width * (queries + keys),
        "attention_scores": 4.0 * layers * queries * visible,
        "mlp": 2.0 * layers * 3 * width * config.intermediate_size,
        "head": 2.0 * width * config.vocab_size,
    }


def training_flops(config: ModelConfig, context: int, *, checkpointing: bool = False) -> float:
    """Return the FLOPs of training on one token: the backward pass costs two forward passes, one per operand.

    With activation checkpointing the layers' forward pass is computed twice; MFU counts it once, hardware utilisation
    twice (PaLM, 2204.02311, appendix B).
    """
    parts = flops(config, context)
    again = sum(parts.values()) - parts["head"] if checkpointing else 0.0
    return 3 * sum(parts.values()) + again


def layer_activations(
    config: ModelConfig, context: int, *, precision: str = "fp32", packed: bool = True, split: int = 1, parts: int = 1
) -> dict[str, float]:
    """Return the bytes per token that one layer keeps for its backward pass, by what they are.

    `precision` is `fp32` or `bf16` (autocast over fp32: the residual stream and the norms stay fp32, every matrix
    product keeps a bf16 copy of its input). `packed`: rows of several documents, whose mask the attention kernel of a
    CPU keeps as numbers, a row of it per token. `split` is the number of ranks of tensor parallelism, which share what
    lies inside attention and MLP; the norms and their outputs every rank holds whole. `parts` is the number of ranks of
    context parallelism: for each token that a rank has it keeps the keys and values of as many.
    """
    width, heads, small = config.hidden_size, config.num_attention_heads, _element_bytes(precision)
    queries, keys = _attention_widths(config)
    copies = (
        2 if small == FP32_BYTES else 5
    )  # fp32: one output of each norm; bf16: one cast for each of q, k, v, gate, up
    qk_norms = (2 * (queries + keys) + heads + config.kv_heads) * FP32_BYTES if config.qk_norm else 0
    return {
        "norms": 2 * (2 * width + 1) * FP32_BYTES,
        "projection_inputs": copies * width * small,
        "qk_norms": qk_norms / split,
        "attention": ((2 * queries + 2 * keys * parts) * small + heads * FP32_BYTES) / split,
        "mask": context * small if packed else 0,
        "mlp": 4 * config.intermediate_size * small / split,
    }


def activation_bytes(
    config: ModelConfig,
    rows: int,
    context: int,
    *,
    precision: str = "fp32",
    packed: bool = True,
    checkpointing: bool = False,
    split: int = 1,
    parts: int = 1,
) -> float:
    """Return the bytes kept for the backward pass of one micro-batch, without the logits and the copies of weights.

    With `checkpointing` a layer keeps its input alone; `recomputed_bytes` then come and go, one layer at a time. Of
    rows shared by `parts` ranks each has its own tokens, but the ids of all.
    """
    kind: dict[str, Any] = {"precision": precision, "packed": packed, "split": split, "parts": parts}
    whole = sum(layer_activations(config, context, **kind).values())
    kept = config.hidden_size * FP32_BYTES if checkpointing else whole
    per_token = config.num_hidden_layers * kept
    final = (2 * config.hidden_size + 1) * FP32_BYTES + config.hidden_size * _element_bytes(precision)
    rotary = config.head_size * FP32_BYTES / (1 if packed else rows)
    ids = 8 * parts + (context if packed else 0)  # the token ids, and the mask as booleans
    return rows * context / parts * (per_token + final + rotary + ids)


def recomputed_bytes(
    config: ModelConfig,
    rows: int,
    context: int,
    *,
    precision: str = "fp32",
    packed: bool = True,
    split: int = 1,
    parts: int = 1,
) -> float:
    """Return the bytes of one layer while it is computed again and differentiated, under activation checkpointing.

    All that it keeps, the gradient of the residual stream, and those of gate and up, which exist together; or, if that
    is more, `sharing_bytes` when the MLP is over and what it kept is free.
    """
    kept = layer_activations(config, context, precision=precision, packed=packed, split=split, parts=parts)
    gate_and_up = 2 * config.intermediate_size * _element_bytes(precision) / split
    sharing = sharing_bytes(config, precision, split=split, parts=parts) - kept["mlp"]
    return rows * context / parts * (sum(kept.values()) + config.hidden_size * FP32_BYTES + max(gate_and_up, sharing))


def sharing_bytes(config: ModelConfig, precision: str, *, split: int = 1, parts: int = 1) -> float:
    """Return the bytes per token that a rank has, of the gradients of all tokens' keys and values on their way.

    Nothing where rows are whole. As they come from attention and, for the sum over ranks, in fp32; then the sum.
    """
    if parts == 1:
        return 0.0
    keys = 2 * _attention_widths(config)[1] / split
    return keys * (parts * (_element_bytes(precision) + FP32_BYTES) + FP32_BYTES)


def joined_bytes(config: ModelConfig, rows: int, context: int) -> float:
    """Return the bytes of whole rows' last hidden states while they are joined of parts.

    As they come from all ranks, one rank after the other, and in the order of the row; on the way back their gradient
    likewise.
    """
    return 3 * rows * context * config.hidden_size * FP32_BYTES


def logits_bytes(
    config: ModelConfig, rows: int, context: float, *, chunk: int = 0, precision: str = "fp32", split: int = 1
) -> float:
    """Return the bytes of the logits and their loss at the peak; `chunk` positions of the micro-batch at once (0: all).

    All at once: the fp32 logits, LOSS_COPIES of their size, and a few numbers per position. In chunks
    (losses/cross_entropy.py) the gradients are made beside the loss: one fp32 block of logits (and its copy in the
    compute dtype), and the output layer's gradient twice: the sum, and what is being added to it or scaled from it.
    """
    positions, vocabulary = rows * context, config.vocab_size / split
    if not chunk:
        return positions * (vocabulary * FP32_BYTES * (1 + LOSS_COPIES) + 13)
    small = _element_bytes(precision)
    block = min(chunk, positions) * vocabulary * (FP32_BYTES + (small if small < FP32_BYTES else 0))
    gradients = 2 * vocabulary * config.hidden_size * FP32_BYTES + positions * config.hidden_size * small
    return block + gradients + positions * 13


def cast_bytes(config: ModelConfig, precision: str, *, split: int = 1) -> float:
    """Return the bytes of the bf16 copies of the matrices that autocast makes for a forward and backward pass."""
    if _element_bytes(precision) == FP32_BYTES:
        return 0.0
    counts = parameters(config)
    return 2 * (counts["attention"] + counts["mlp"] + config.vocab_size * config.hidden_size) / split


def _element_bytes(precision: str) -> int:
    return 2 if precision == "bf16" else FP32_BYTES


def _attention_widths(config: ModelConfig) -> tuple[int, int]:
    """Return the widths of all queries and of all keys (or values)."""
    return config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
