"""One step: how a batch is cut up cannot change what it does."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from trivium.batches import IGNORE, TokenBatch, select_rows
from trivium.models.lora import LoraConfig, adapt
from trivium.stages.sft import objective
from trivium.training.optim import OptimConfig, Optimizer, partition
from trivium.training.step import train_step

from .conftest import tiny_model


def unequal_batch(rows: int = 8) -> TokenBatch:
    """Return rows whose numbers of trained targets differ (1 to 8), so that a mean of means would be wrong."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 32, (rows, 10), generator=generator)
    targets = ids.roll(-1, 1).clone()
    for row in range(rows):
        targets[row, row + 1 :] = IGNORE
    return TokenBatch(input_ids=ids, targets=targets, positions=torch.arange(10).expand(rows, 10))


def gradients(micro_rows: int) -> tuple[float, list[Tensor]]:
    """Return the loss and the gradients of one step with micro-batches of `micro_rows` rows."""
    torch.set_num_threads(1)
    model = tiny_model()
    optimizer = Optimizer(model, OptimConfig(grad_clip=0.0, lr=0.0))
    batch = unequal_batch()
    parts = [select_rows(batch, rows) for rows in torch.arange(8).split(micro_rows)]
    result = train_step(partial(objective, model), parts, optimizer, lr_scale=1.0)
    return result.loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("micro_rows", [1, 3, 4])
def test_micro_batches_are_one_batch(micro_rows: int) -> None:
    """8 rows at once, one by one, by three (a short last one) and by four: equal loss and gradients."""
    loss, whole = gradients(8)
    split_loss, split = gradients(micro_rows)
    assert split_loss == pytest.approx(loss, rel=1e-6)
    difference = torch.cat([(a - b).flatten() for a, b in zip(whole, split, strict=True)]).norm()
    assert difference / torch.cat([g.flatten() for g in whole]).norm() < 2e-6


def test_mean_of_means_would_be_caught() -> None:
    """The bug this room exists to avoid moves the gradient by far more than the tolerance above."""
    _, whole = gradients(8)
    batch, model = unequal_batch(), tiny_model()
    for row in range(8):
        part = select_rows(batch, torch.tensor([row]))
        (objective(model, part).total / part.num_items / 8).backward()
    wrong = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    right = torch.cat([g.flatten() for g in whole])
    assert (wrong - right).norm() / right.norm() > 0.05


def test_nothing_to_train_moves_nothing() -> None:
    """A window whose rows are all masked has loss 0 and gradient 0, not 0/0."""
    model = tiny_model()
    before = [p.detach().clone() for p in model.parameters()]
    batch = unequal_batch()
    empty = TokenBatch(
        input_ids=batch.input_ids, targets=torch.full_like(batch.targets, IGNORE), positions=batch.positions
    )
    result = train_step(
        partial(objective, model), [empty], Optimizer(model, OptimConfig(weight_decay=0.0)), lr_scale=1.0
    )
    assert (result.loss, result.grad_norm, result.num_items) == (0.0, 0.0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_non_finite_gradient_moves_nothing() -> None:
    """Infinity in one row's loss: the step is skipped and says so; weights are bit-equal."""
    model = tiny_model()
    before = [p.detach().clone() for p in model.parameters()]

    def poisoned(batch: TokenBatch) -> object:
        output = objective(model, batch)
        return type(output)(total=output.total * float("inf"), metrics={})

    result = train_step(poisoned, [unequal_batch()], Optimizer(model, OptimConfig()), lr_scale=1.0)  # type: ignore[arg-type]
    assert result.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    """Embeddings, norms and the head are never decayed; a zero-gradient step moves hidden matrices alone."""
    model = tiny_model()
    groups = partition(model)
    names = [name for group in groups.values() for name, _ in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(parameter.ndim == 2 for _, parameter in groups["hidden"])
    assert not any("norm" in name or "embed" in name for name, _ in groups["hidden"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for kind in ("adamw", "muon"):
        optimizer = Optimizer(model, OptimConfig(kind=kind, weight_decay=0.5, lr=0.1))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(1.0)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name, _ in groups["hidden"]}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_adapters_are_adamws_whatever_trains_matrices_and_are_never_decayed(kind: str) -> None:
    """Every A and B is in exactly one group and nothing frozen is in any; a step is AdamW's: lr along the sign."""
    model = adapt(tiny_model(), LoraConfig(rank=2))
    groups = partition(model)
    assert not groups["hidden"] and not groups["rest"]
    names = [name for name, _ in groups["adapters"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, OptimConfig(kind=kind, weight_decay=0.5, lr=0.1, embedding_lr_scale=7.0))
    for _, parameter in groups["adapters"]:
        parameter.grad = torch.full_like(parameter, -3.0)
    optimizer.step(1.0)
    for name, parameter in model.named_parameters():
        # The first step of Adam is lr * g / (|g| + eps).
        expected = before[name] + (0.1 if name in names else 0.0)
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6 if name in names else 0)


def losses_of(precision: torch.autocast | None) -> list[float]:
    """Return the losses of ten steps on one batch."""
    model = tiny_model()
    optimizer = Optimizer(model, OptimConfig(lr=2e-2))
    step = partial(train_step, lr_scale=1.0, precision=precision)
    return [step(partial(objective, model), [unequal_batch()], optimizer).loss for _ in range(10)]


def test_bf16_follows_fp32_step_by_step() -> None:
    """Autocast caches its copies of the weights: held open, it would train on with the first step's."""
    torch.set_num_threads(1)
    fp32, bf16 = losses_of(None), losses_of(torch.autocast("cpu", dtype=torch.bfloat16))
    assert fp32[-1] < 0.7 * fp32[0], "ten steps learn something, so stale weights would show"
    assert bf16 == pytest.approx(fp32, rel=2e-2)
