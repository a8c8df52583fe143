"""The plans' formulas: hand-worked traffic, and memory against what torch holds in a whole step of a small model."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from trivium.losses.cross_entropy import cross_entropy, head_cross_entropy
from trivium.models.config import ModelConfig
from trivium.models.transformer import Transformer
from trivium.training import context_parallel
from trivium.training.optim import OptimConfig, Optimizer
from trivium.training.plan import (
    H100,
    KERNEL_FRACTION,
    PLANS,
    Layout,
    communication,
    expected_mfu,
    memory,
    optimizer_bytes,
    plan_table,
)

SMALL = ModelConfig(
    vocab_size=500,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    qk_norm=True,
    tie_word_embeddings=True,
)
WIDE_VOCABULARY = dataclasses.replace(SMALL, vocab_size=6000, num_hidden_layers=2, tie_word_embeddings=False)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, qk_norm=False, attention_bias=True)])
def test_the_optimizers_state_is_what_it_holds(config, kind):
    """All of it but the step counters, one number a tensor."""
    model = Transformer(config).init_weights(0)
    optimizer = Optimizer(model, OptimConfig(kind=kind))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    held = sum(tensor.nbytes for name, tensor in optimizer.tensors().items() if not name.endswith("step"))
    assert optimizer_bytes(config, kind) == held


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layers", ["kept", "recomputed"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_memory_of_a_step_on_one_device_is_the_formula_within_a_tenth(optimizer, layers, precision):
    """Weights, gradients and states by their tensors; the rest by torch's allocator over forward and backward."""
    layout = Layout(
        gpus=1,
        rows=8,
        context=64,
        sharded=False,
        checkpointing=layers == "recomputed",
        optimizer=optimizer,
        precision=precision,
    )
    measured = measure(SMALL, layout, whole_loss)
    assert sum(memory(SMALL, layout).values()) == pytest.approx(measured, rel=0.1)
    if layout.checkpointing:  # where the layer and not the loss is the peak
        few = dataclasses.replace(SMALL, vocab_size=20)
        assert sum(memory(few, layout).values()) == pytest.approx(measure(few, layout, whole_loss), rel=0.1)


def test_the_memory_of_a_chunked_loss_is_the_formula_within_a_tenth():
    """With 6,000 tokens of vocabulary the logits are most of a step; 64 of 512 positions at a time they are not."""
    layout = Layout(gpus=1, rows=8, context=64, sharded=False, checkpointing=False, precision="fp32")
    whole, chunked = layout, dataclasses.replace(layout, loss_chunk=64)
    sizes = [sum(memory(WIDE_VOCABULARY, each).values()) for each in (whole, chunked)]
    assert sizes[0] == pytest.approx(measure(WIDE_VOCABULARY, whole, whole_loss), rel=0.1)
    assert sizes[1] == pytest.approx(measure(WIDE_VOCABULARY, chunked, chunked_loss), rel=0.1)
    assert sizes[1] < 0.4 * sizes[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layers", ["kept", "recomputed"])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_memory_of_shared_rows_is_the_formula_within_a_tenth(heads, layers, precision, monkeypatch):
    """The same of one of four ranks, packed rows; instead of a collective the others send what this rank has itself.

    So all that is allocated is what a rank allocates, but for what gloo or NCCL hold inside.
    """
    config = dataclasses.replace(SMALL, num_key_value_heads=heads, vocab_size=50)
    layout = Layout(
        gpus=4,
        rows=2,
        context=256,
        context_parallel=4,
        sharded=False,
        checkpointing=layers == "recomputed",
        precision=precision,
    )

    def send(into: torch.Tensor, mine: torch.Tensor, group: object) -> None:
        into.unflatten(0, (4, -1)).copy_(mine)

    def add_up(into: torch.Tensor, parts: torch.Tensor, group: object) -> None:
        into.copy_(parts.unflatten(0, (4, -1))[1])

    monkeypatch.setattr(context_parallel, "_all_gather", send)
    monkeypatch.setattr(context_parallel, "_reduce_scatter", add_up)
    rows = object.__new__(context_parallel.SharedRows)
    rows.mesh = SimpleNamespace(size=lambda: 4, get_local_rank=lambda: 1, get_group=lambda: None)

    def loss(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
        model.model.part_of = rows.part
        hidden = model(ids, positions=torch.arange(256).expand_as(ids), document_ids=torch.zeros_like(ids))
        return cross_entropy(model.logits(hidden), ids).sum()

    formula = memory(config, layout, packed=True)
    assert sum(formula.values()) == pytest.approx(measure(config, layout, loss), rel=0.1)
    whole = memory(config, dataclasses.replace(layout, gpus=1, context_parallel=1), packed=True)
    assert formula["kept"] < 0.4 * whole["kept"], "activations of a quarter, but keys and values of all"


def whole_loss(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model.logits(model(ids)), ids).sum()


def chunked_loss(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    return head_cross_entropy(model(ids), model.lm_head.weight, ids, chunk=64).sum()


class Recomputed(nn.Module):
    """A layer that keeps its input alone and is computed again in the backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *arguments):
        return checkpoint(self.layer, *arguments, use_reentrant=False)


def measure(config: ModelConfig, layout: Layout, loss) -> int:
    """Return the peak bytes of a step whose gradients and optimizer states exist, as in a second micro-batch."""
    model = Transformer(config).init_weights(0)
    optimizer = Optimizer(model, OptimConfig(kind=layout.optimizer))
    if layout.checkpointing:
        model.model.layers = nn.ModuleList(Recomputed(layer) for layer in model.model.layers)
    ids = torch.zeros(layout.rows, layout.context, dtype=torch.long)

    def work() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=layout.precision == "bf16"):
            total = loss(model, ids)
        total.backward()

    work()
    optimizer.step(1.0)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters())
    states = sum(tensor.nbytes for tensor in optimizer.tensors().values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return weights + gradients + states + peak


def test_traffic_by_hand():
    """A million weights on 4 ranks; rings send three quarters of what they move, and all-reduce it twice."""
    config = dataclasses.replace(SMALL, vocab_size=1, num_hidden_layers=1, qk_norm=False)
    n = config.num_parameters()
    ddp = Layout(gpus=4, rows=2, context=8, accumulation=3, sharded=False)
    assert communication(config, ddp) == {
        "all_reduce": 2 * 0.75 * 4 * n,
        "all_gather": 0.0,
        "reduce_scatter": 0.0,
        "tensor_parallel": 0.0,
        "context_parallel": 0.0,
    }
    fsdp = communication(config, dataclasses.replace(ddp, sharded=True))
    assert fsdp["all_gather"] == 3 * 2 * 0.75 * 2 * n
    assert fsdp["reduce_scatter"] == 3 * 0.75 * 4 * n
    # 16 tokens of 64 numbers of 2 bytes; all-reduced (half sent twice over 2 ranks) 4 times a layer, 6 if recomputed.
    tp = dataclasses.replace(ddp, tensor_parallel=2, accumulation=1)
    assert communication(config, tp)["tensor_parallel"] == 6 * 2 * 0.5 * 16 * 64 * 2
    assert communication(config, dataclasses.replace(tp, checkpointing=False))["tensor_parallel"] == 4 * 16 * 64 * 2
    assert communication(config, tp)["all_reduce"] == 2 * 0.5 * 4 * n / 2
    assert sum(communication(config, dataclasses.replace(ddp, gpus=1)).values()) == 0


def test_traffic_of_shared_rows_by_hand():
    """One layer with 2 key heads of 16 and a row of 16 tokens by 4 ranks, each of which sends three quarters of it.

    Keys and values of a token are 64 numbers: in bf16 forward, once more if recomputed, their gradients in fp32; its
    hidden state 64 numbers in fp32, its gradient likewise.
    """
    config = dataclasses.replace(SMALL, vocab_size=1, num_hidden_layers=1, qk_norm=False)
    cp = Layout(gpus=8, rows=2, context=8, context_parallel=4, checkpointing=False)
    sent = communication(config, cp)
    assert sent["context_parallel"] == 0.75 * 16 * (64 * (2 + 4) + 64 * (4 + 4))
    again = communication(config, dataclasses.replace(cp, checkpointing=True))
    assert again["context_parallel"] == sent["context_parallel"] + 0.75 * 16 * 64 * 2
    # Weights and gradients travel between all 8; rows are of 2 groups.
    assert sent["reduce_scatter"] == 7 / 8 * 4 * config.num_parameters()
    assert cp.tokens == 2 * 16
    both = communication(config, dataclasses.replace(cp, tensor_parallel=2))
    assert both["context_parallel"] == 0.75 * 16 * (64 / 2 * (2 + 4) + 64 * (4 + 4)), "half of the heads each"
    assert both["tensor_parallel"] == 4 * 2 * 0.5 * (16 / 4) * 64 * 2, "a quarter of the positions each"
    slow = dataclasses.replace(H100, inside=1.0)
    waited = expected_mfu(config, cp, slow)["exposed_s"] - expected_mfu(config, cp, H100)["exposed_s"]
    assert waited > sent["context_parallel"] * 0.99, "nothing hides it"


def test_utilisation_is_that_of_the_kernels_less_recomputation_less_waiting():
    config, layout = PLANS["7B, one node"]
    assert expected_mfu(config, layout, H100)["mfu"] == pytest.approx(KERNEL_FRACTION)
    again = expected_mfu(config, dataclasses.replace(layout, checkpointing=True), H100)
    assert 0.75 * KERNEL_FRACTION < again["mfu"] < 0.77 * KERNEL_FRACTION, "3 of 4 passes count, the head's all"
    slow = expected_mfu(config, layout, dataclasses.replace(H100, inside=1e9))
    sent = communication(config, layout)
    assert slow["step_s"] == pytest.approx((sent["all_gather"] + sent["reduce_scatter"]) / 1e9)
    assert slow["tokens_per_s"] == pytest.approx(layout.tokens / slow["step_s"])


def test_sharding_divides_what_is_held_and_every_plan_fits():
    config, layout = PLANS["7B, one node"]
    parts = memory(config, layout)
    assert parts["weights"] == 4 * config.num_parameters() / 8
    assert parts["optimizer"] == 2 * parts["weights"]
    for name, (shape, plan) in PLANS.items():
        assert sum(memory(shape, plan).values()) < 0.9 * H100.memory_bytes, name
        assert plan.gpus % (plan.tensor_parallel * plan.context_parallel * H100.gpus_per_node) in (
            0,
            plan.gpus % H100.gpus_per_node,
        )
        assert name in plan_table()
