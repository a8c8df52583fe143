"""The formulas against a hand-worked network, torch's own counter, and what autograd and the allocator really hold."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from trivium.losses.cross_entropy import cross_entropy
from trivium.models import accounting
from trivium.models.config import ModelConfig
from trivium.models.transformer import Transformer

BY_HAND = ModelConfig(
    vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)
SHAPES = [
    ModelConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        qk_norm=True,
        tie_word_embeddings=True,
    ),
    ModelConfig(vocab_size=2000, hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4),
    ModelConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        attention_bias=True,
    ),
]
NAMES = ["qwen3", "llama", "qwen2"]


def test_flops_and_parameters_by_hand():
    """Width 4, two heads of 2, one key-value head, MLP 8, 10 tokens, a row of 3 of which 2 are visible on average.

    q and o are 4 x 4, k and v 4 x 2: 48 multiply-adds, 96 FLOPs. Scores and mixing: 2 * 4 wide over 2 positions: 16
    multiply-adds, 32 FLOPs. MLP: 3 * 4 * 8 = 96, 192 FLOPs. Output 4 * 10 = 40, 80 FLOPs. Together 400, training 1,200;
    with the layer's forward pass repeated 1,200 + 320.
    """
    assert accounting.flops(BY_HAND, 3) == {
        "embedding": 0.0,
        "attention_projections": 96.0,
        "attention_scores": 32.0,
        "mlp": 192.0,
        "head": 80.0,
    }
    assert accounting.training_flops(BY_HAND, 3) == 1200.0
    assert accounting.training_flops(BY_HAND, 3, checkpointing=True) == 1520.0
    assert accounting.parameters(BY_HAND) == {"embedding": 40, "attention": 48, "mlp": 96, "norms": 12, "head": 40}


@pytest.mark.parametrize("config", SHAPES, ids=NAMES)
def test_the_components_sum_to_the_whole(config):
    windowed = dataclasses.replace(config, sliding_window=7)
    for shape in (config, windowed):
        assert sum(accounting.parameters(shape).values()) == shape.num_parameters()
        assert sum(accounting.flops(shape, 20).values()) == pytest.approx(shape.flops_per_token(20), rel=1e-12)


@pytest.mark.parametrize("config", SHAPES, ids=NAMES)
def test_flops_agree_with_torchs_counter_forward_and_backward(config):
    """Exactly, for the matrix products; torch does not count the CPU's attention kernel, so the scores are left out."""
    model = Transformer(config).init_weights(0)
    ids = torch.arange(2 * 16).reshape(2, 16) % config.vocab_size
    with FlopCounterMode(display=False) as forward:
        hidden = model.logits(model(ids))
    with FlopCounterMode(display=False) as backward:
        hidden.sum().backward()
    parts = accounting.flops(config, 16)
    products = sum(parts.values()) - parts["attention_scores"]
    assert forward.get_total_flops() == 32 * products
    assert backward.get_total_flops() == 2 * 32 * products


def run(model: Transformer, ids: torch.Tensor, precision: str, *, packed: bool) -> torch.Tensor:
    """Return the loss as pre-training computes it, ready for the backward pass."""
    places = {}
    if packed:
        places = {"positions": torch.arange(ids.shape[1]).expand_as(ids), "document_ids": torch.zeros_like(ids)}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        return cross_entropy(model.logits(model(ids, **places)), ids).sum()


def kept_bytes(model: Transformer, ids: torch.Tensor, precision: str, *, packed: bool) -> int:
    """Return the bytes that autograd keeps for the backward pass, weights left out, each storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run(model, ids, precision, packed=packed)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def expected_kept(config: ModelConfig, rows: int, context: int, precision: str, *, packed: bool) -> float:
    """Return the same by formula: activations, logits (without the passing copies of the loss), copies of weights."""
    activations = accounting.activation_bytes(config, rows, context, precision=precision, packed=packed)
    logits = accounting.logits_bytes(config, rows, context)
    passing = accounting.LOSS_COPIES * rows * context * config.vocab_size * accounting.FP32_BYTES
    return activations + logits - passing + accounting.cast_bytes(config, precision)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", SHAPES, ids=NAMES)
def test_what_is_kept_for_the_backward_pass_is_the_formula(config, precision, packed):
    """The formula names every tensor of weight: within 2% (casts of biases are left out)."""
    ids = torch.zeros(4, 64, dtype=torch.long)
    model = Transformer(config).init_weights(0)
    measured = kept_bytes(model, ids, precision, packed=packed)
    assert expected_kept(config, 4, 64, precision, packed=packed) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", SHAPES, ids=NAMES)
def test_the_peak_of_a_step_is_the_formula_within_a_tenth(config, precision):
    """Torch's allocator over forward and backward of a micro-batch whose gradients already exist."""
    rows, context = 4, 128
    ids = torch.zeros(rows, context, dtype=torch.long)
    model = Transformer(config).init_weights(0)
    run(model, ids, precision, packed=True).backward()
    measured = allocated_peak(lambda: run(model, ids, precision, packed=True).backward())
    formula = (
        accounting.activation_bytes(config, rows, context, precision=precision)
        + accounting.logits_bytes(config, rows, context)
        + accounting.cast_bytes(config, precision)
    )
    assert formula == pytest.approx(measured, rel=0.1)


def allocated_peak(work) -> int:
    """Return the most bytes that torch's CPU allocator held during `work`, beyond those it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 0
    return peak


def test_checkpointing_keeps_inputs_and_computes_one_layer_again():
    """By hand, fp32: width 4, a row of 2 tokens, 3 layers. A layer's input is 16 bytes a token."""
    config = dataclasses.replace(BY_HAND, num_hidden_layers=3)
    layer = sum(accounting.layer_activations(config, 2).values())
    # norms 2 * 9 * 4, two inputs of 16, q + out 8 and k + v 4 wide times 4 bytes, 2 heads, a mask row of 2, MLP 4 * 8
    assert layer == 72 + 32 + (12 * 4 + 8) + 8 + 128
    rest = (2 * 4 + 1) * 4 + 16 + 2 * 4 + 8 + 2
    assert accounting.activation_bytes(config, 1, 2) == 2 * (3 * layer + rest)
    assert accounting.activation_bytes(config, 1, 2, checkpointing=True) == 2 * (3 * 16 + rest)
    assert accounting.recomputed_bytes(config, 1, 2) == 2 * (layer + 16 + 2 * 8 * 4)


def test_tensor_parallel_ranks_share_what_is_inside_the_blocks():
    whole, half = (accounting.layer_activations(SHAPES[0], 64, split=split) for split in (1, 2))
    assert {name for name in whole if half[name] == whole[name] / 2} == {"qk_norms", "attention", "mlp"}
    assert all(half[name] == whole[name] for name in ("norms", "projection_inputs", "mask"))


def test_a_chunked_loss_by_hand():
    """10 tokens of vocabulary, width 4, 2 rows of 3: a block of 2 positions, the gradients, 13 bytes a position."""
    assert accounting.logits_bytes(BY_HAND, 2, 3) == 6 * (10 * 4 * 5 + 13)
    assert accounting.logits_bytes(BY_HAND, 2, 3, chunk=2) == 2 * 10 * 4 + 2 * 10 * 4 * 4 + 6 * 4 * 4 + 6 * 13
    bf16 = accounting.logits_bytes(BY_HAND, 2, 3, chunk=2, precision="bf16")
    assert bf16 == 2 * 10 * 6 + 2 * 10 * 4 * 4 + 6 * 4 * 2 + 6 * 13
