"""`bench/gpu.py` at toy size on the CPU: every part of it runs, and its figures hang together."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gpu():
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_all_parts_run_and_agree_with_one_another(gpu, tmp_path, capsys):
    torch.set_num_threads(1)
    path = tmp_path / "results" / "gpu.json"
    results = gpu.main(["--toy", "--device", "cpu", "--results", str(path)])
    assert json.loads(path.read_text()) == results
    assert [row["optimizer"] for row in results["training"]] == ["muon", "adamw"]
    row = results["training"][0]
    tokens = row["rows"] * row["micro_batches"] * row["context"]
    assert row["tokens_per_s"] == pytest.approx(tokens / row["seconds_per_step"])
    config = gpu.network(gpu.TOY[0], 32, 128)
    assert row["parameters"] == config.num_parameters()
    assert row["mfu"] == pytest.approx(
        row["tokens_per_s"] * 3 * config.flops_per_token(32) / results["peak_flops"], rel=1e-6
    )
    differences = {name: value for name, value in results["numerics"].items() if name.startswith("fp32")}
    assert len(differences) == 4 and set(differences.values()) == {0.0}, "the CPU against itself"
    # bf16 keeps 8 bits: one product is off by up to 2^-9, and a loss over a few dozen of them stays within a percent.
    assert 0 < results["numerics"]["bf16_loss"] < 0.01
    assert 0 < results["numerics"]["bf16_gradients"] < 0.2
    assert results["decode"][0]["tokens_per_s_4_rows"] > 0
    (ppo,) = results["ppo"]
    assert ppo["seconds"] == pytest.approx(ppo["sample_s"] + ppo["shape_s"] + ppo["update_s"], rel=0.2)
    assert "| toy | bf16 |" in capsys.readouterr().out


def test_the_sizes_are_those_of_their_names(gpu):
    counts = [gpu.network(size, 2048, 50_304).num_parameters() / 1e6 for size in gpu.SIZES]
    assert counts == pytest.approx([124, 350, 1300], rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_run(gpu):
    with pytest.raises(SystemExit, match="--toy runs the same code"):
        gpu.main([])
