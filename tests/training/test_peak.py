"""MFU: a rate of FLOPs over a measured peak; the peak is the best of several trials and is measured once."""

from __future__ import annotations

import pytest
import torch

from trivium.batches import LossOutput, TokenBatch
from trivium.config import RunSettings
from trivium.losses.cross_entropy import cross_entropy
from trivium.models.accounting import training_flops
from trivium.runs.events import read_metrics
from trivium.training import loop, peak, timing
from trivium.training.loop import FitConfig, fit

from .conftest import tiny_model

CPU = torch.device("cpu")


def test_a_product_of_side_n_is_two_n_cubed_flops_over_its_time(monkeypatch):
    sides = []
    monkeypatch.setattr(timing.torch, "mm", lambda a, b: sides.append((a.shape, b.shape)))
    monkeypatch.setattr(timing, "best_seconds", lambda works, device: [work() or 0.5 for work in works])
    assert peak.matrix_flops.__wrapped__(CPU, torch.float32, 1, side=10) == 2 * 1000 / 0.5
    assert sides == [((10, 10), (10, 10))]


def test_the_peak_is_measured_once_and_is_a_speed_that_exists():
    """Above 0.1 GFLOP/s (an emulator) and below 10 PFLOP/s (no machine yet)."""
    settings = RunSettings(device="cpu", precision="fp32")
    first = peak.peak_flops(settings)
    assert 1e8 < first < 1e16
    assert peak.peak_flops(settings) == first


def test_the_loop_logs_rate_times_flops_over_peak(make_run, monkeypatch):
    monkeypatch.setattr(loop, "peak_flops", lambda settings: 1e9)
    model = tiny_model()
    ids = torch.arange(12).reshape(2, 6)
    batch = TokenBatch(
        input_ids=ids, targets=ids, positions=torch.arange(6).expand(2, 6), document_ids=torch.zeros_like(ids)
    )

    def objective(part: TokenBatch) -> LossOutput:
        return LossOutput(total=cross_entropy(model.logits(model(part.input_ids)), part.targets).sum())

    def train(run, **options):
        fit(run, model, objective, lambda step: [batch], FitConfig(steps=2, log_every=1), **options)
        return read_metrics(run.dir)

    assert "train/mfu" not in train(make_run("none")), "without FLOPs there is nothing to say"
    flops = training_flops(model.config, 6)
    run = make_run("some")
    curves = train(run, flops_per_item=flops, tokens_in=lambda parts: 12)
    for (_, rate), (_, share) in zip(curves["train/tokens_per_s"], curves["train/mfu"], strict=True):
        assert share == pytest.approx(rate * flops / 1e9)
    assert run.manifest.host["peak_flops"] == 1e9
