"""`bench/side_by_side`: the clock, the ratios and the table by hand; our sides of all its benches at toy size."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ("sft", "reward_model", "dpo", "grpo", "ppo", "decode")


@pytest.fixture(scope="module", autouse=True)
def bench_on_path():
    """Let scripts import their neighbour, as they can when they are run."""
    sys.path.insert(0, str(ROOT / "bench"))
    yield
    sys.path.remove(str(ROOT / "bench"))


@pytest.fixture
def machinery():
    """Return the shared module."""
    return importlib.import_module("side_by_side")


def script(name):
    """Return a bench as a module."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_clock_counts_from_the_end_of_the_warm_up(machinery, monkeypatch):
    """Steps of one second each, two to warm up, three seconds: three steps of 10, 20 and 30 items are counted."""
    now = iter(range(100))
    monkeypatch.setattr(machinery.time, "perf_counter", lambda: float(next(now)))
    monkeypatch.setattr(machinery, "cpu_seconds", lambda: 7.0)
    clock = machinery.Clock(3.0)
    assert [clock.tick(1000), clock.tick(1000)] == [False, False]
    assert [clock.tick(10), clock.tick(20), clock.tick(30)] == [False, False, True]
    assert (clock.items, clock.elapsed, clock.steps, clock.cpu) == (60, 3.0, 3, 0.0)


def test_ratios_are_of_the_best_to_the_best_and_tuned_ones_apart(machinery):
    """Own 6 and 8 as run, 9 tuned; peers 2 and 4 as run, 3 tuned: 8 / 4 and 9 / 3. By processor time, all the same."""
    rates = {("own", "fp32", False): 6, ("own", "bf16", False): 8, ("own", "fp32", True): 9}
    rates |= {("peer", "fp32", False): 2, ("peer", "bf16", False): 4, ("peer", "fp32", True): 3}
    rows = []
    for (side, precision, tuned), rate in rates.items():
        runs = [{"per_s": rate + spread, "per_cpu_s": 5, "peak_bytes": 10 + spread} for spread in (-1, 0, 1)]
        rows.append({"side": side, "precision": precision, "tuned": tuned} | machinery.summary(runs))
    found = machinery.with_ratios(rows)
    assert (found["ratio"], found["ratio_tuned"], found["ratio_cpu"], found["ratio_cpu_tuned"]) == (2, 3, 1, 1)
    assert (rows[0]["per_s"], rows[0]["low"], rows[0]["high"], rows[0]["peak_bytes"]) == (6, 5, 7, 11)
    table = machinery.report({"case": found}, "items/s")
    assert "| case | own | bf16 | default | 8.0 (7.0 to 9.0) |" in table and "2.00 as run, 3.00 tuned" in table
    alone = machinery.with_ratios([row for row in rows if row["side"] == "own"])
    assert alone["ratio"] is None and "to the peer" not in machinery.report({"case": alone}, "items/s")


@pytest.mark.parametrize("name", BENCHES)
def test_our_side_of_every_case_does_its_work(machinery, name, tmp_path):
    torch.set_num_threads(1)
    bench = script(name).BENCH
    shape = machinery.SHAPES["toy"]
    bench.prepare(shape, tmp_path)
    for case in bench.cases:
        clock = machinery.Clock(1e-9, warm_up=1)
        bench.sides["own"](machinery.Task(case=case, shape=shape, precision="fp32", folder=tmp_path), clock)
        assert clock.steps == 1 and clock.items > 0 and clock.elapsed > 0


@pytest.mark.parametrize("case", ["padded", "packed"])
def test_the_sft_bench_counts_each_conversation_of_an_epoch_once_and_no_padding(machinery, case, tmp_path):
    """Lengths 2 to 9 in rows of the shape's context: an epoch's tokens are those of the conversations it holds."""
    sft, shape = script("sft"), dataclasses.replace(machinery.SHAPES["toy"], batch_size=1)
    rows = [([length] * length, 1) for length in (2, 9, 5, 7, 3)]
    dealt = sft.deal(machinery.Task(case=case, shape=shape, precision="fp32", folder=tmp_path), rows)
    epoch = range(dealt.loader.num_batches_per_epoch)
    assert sum(sft.real_tokens(dealt, number) for number in epoch) == 2 + 9 + 5 + 7 + 3
    assert sum(int((dealt.batch(number).targets >= 0).sum()) for number in epoch) == 1 + 8 + 4 + 6 + 2


def test_generation_of_both_sides_is_of_the_same_network(machinery):
    """The peer's network takes our weights by name, and computes the same."""
    networks = importlib.import_module("side_by_side.networks")
    shape = machinery.SHAPES["toy"]
    own, peer = networks.own_network(shape), networks.peer_network(shape)
    peer.load_state_dict(own.state_dict())
    ids = torch.randint(8, shape.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(own.logits(own(ids)), peer(ids).logits, atol=1e-5)


@pytest.mark.slow  # every process imports TRL
def test_a_whole_bench_at_toy_size_writes_its_table(machinery, tmp_path, capsys):
    words = ["--shape", "toy", "--seconds", "0.1", "--processes", "1", "--threads", "1"]
    path = tmp_path / "made" / "reward_model.json"
    facts = machinery.main(script("reward_model").BENCH, "", [*words, "--results", str(path)])
    assert json.loads(path.read_text()) == facts
    (case,) = facts["cases"].values()
    assert case["ratio"] > 0 and case["ratio_tuned"] > 0 and {"trl", "torch"} <= facts["versions"].keys()
    assert all(row["peak_bytes"] > 1e7 for row in case["own"] + case["peers"])
    assert "pairs/s" in capsys.readouterr().out
