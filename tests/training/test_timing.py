"""Measured times: the best of several trials, in turn, the first thrown away."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

from trivium.config import RunSettings
from trivium.training import distributed, timing

CPU = torch.device("cpu")


def test_the_best_trial_counts_and_the_first_is_thrown_away(monkeypatch):
    """Readings begin, end for a warm-up and three trials: 9, 3, 1 and 2 seconds."""
    clock = itertools.accumulate([0, 9, 0, 3, 0, 1, 0, 2])
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: float(next(clock))))
    calls = []
    assert timing.best_seconds([lambda: calls.append(1)], CPU, trials=3) == [1.0]
    assert len(calls) == 4


def test_works_take_turns(monkeypatch):
    """a b, then a b again: what slows the machine down for a while slows both."""
    clock = itertools.accumulate([0, 9, 0, 9, 0, 5, 0, 4, 0, 3, 0, 6])
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: float(next(clock))))
    calls = []
    assert timing.best_seconds([lambda: calls.append("a"), lambda: calls.append("b")], CPU, trials=2) == [3.0, 4.0]
    assert "".join(calls) == "ababab"


@pytest.mark.parametrize(("bf16_s", "chosen"), [(0.66, torch.bfloat16), (0.67, torch.float32)])
def test_auto_takes_bf16_where_it_is_one_and_a_half_times_as_fast(monkeypatch, bf16_s, chosen):
    """fp32 takes 1 s; a processor that has no unit for bf16 is not asked."""
    asked = []
    seconds = {torch.float32: 1.0, torch.bfloat16: bf16_s}
    monkeypatch.setattr(
        distributed, "product_seconds", lambda dtypes, device, side: asked.append(side) or [seconds[d] for d in dtypes]
    )
    settings = RunSettings(device="cpu", precision="auto")
    monkeypatch.setattr(distributed, "_bf16_pays", distributed._bf16_pays.__wrapped__)  # which remembers its answer
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    for supported in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=supported: answer, raising=False)
        assert distributed.compute_dtype(settings) is (chosen if supported else torch.float32)
    assert asked == [768]
