"""`bench/depth_sweep.py`: neighbours cost what the derived run costs, and a small sweep comes to its results."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sweep():
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("bench_depth_sweep", ROOT / "bench" / "depth_sweep.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_depth_sweep"] = module
    spec.loader.exec_module(module)
    return module


def test_each_neighbour_changes_one_thing(sweep):
    base = {"batch_size": 4, "lr": 0.01}
    found = {variant.name: variant for variant in sweep.neighbours(2, base)}
    assert set(found) == {
        "lr x0.5", "lr x2", "width x0.75", "width x1.38", "batch x0.5", "batch x2", "layers 1", "layers 3"
    }  # fmt: skip
    shape = sweep.shape_fields(2)
    for name, variant in found.items():
        changed = {
            "lr": variant.lr != 0.01,
            "batch": variant.batch_size != 4,
            "width": variant.shape["hidden_size"] != 128,
            "layers": variant.shape["num_layers"] != 2,
        }
        assert [what for what, is_changed in changed.items() if is_changed] == [name.partition(" ")[0]]
        assert variant.shape == shape or name.startswith(("width", "layers"))


def test_a_width_of_ones_own_is_that_of_every_neighbour_but_the_widths(sweep):
    """8 a layer at depth 3: 24 wide, three quarters and four thirds of it to the nearest 4."""
    found = {
        variant.name: variant.shape["hidden_size"] for variant in sweep.neighbours(3, {"batch_size": 4, "lr": 0.01}, 24)
    }
    assert found.pop("width x0.67") == 16
    assert found.pop("width x1.33") == 32
    assert set(found.values()) == {24}


@pytest.mark.slow  # five trainings and a figure
def test_a_small_sweep_costs_the_same_everywhere_and_is_found_again(sweep, tmp_path, monkeypatch, capsys):
    """Depth 1 for a twentieth of a token per parameter: equal FLOPs to within one step, and a verdict."""
    words = ["--depths", "1", "--documents", "150", "--context", "32", "--vocab-size", "300", "--threads", "1"]
    words += ["--tokens-per-parameter", "0.05", "--workspace", str(tmp_path / "runs")]
    words += ["--results", str(tmp_path / "sweep.json"), "--figure", str(tmp_path / "figures" / "sweep.svg")]
    whole = sweep.neighbours
    some = ("lr x2", "width x1.25", "batch x2", "layers 2")
    monkeypatch.setattr(sweep, "neighbours", lambda *of: (v for v in whole(*of) if v.name in some))
    monkeypatch.setattr(sys, "argv", ["depth_sweep.py", *words])
    sweep.main()
    results = json.loads((tmp_path / "sweep.json").read_text())["depths"]["1"]
    assert results["tokens_per_parameter"] == 0.05
    assert set(results["hand_set"]) == set(some)
    for row in results["hand_set"].values():
        a_step = row["training_flops"] / row["steps"]
        assert row["training_flops"] == pytest.approx(results["training_flops"], abs=a_step)
        assert row["better_by"] == pytest.approx(1 - row["bits_per_byte"] / results["bits_per_byte"])
    best = max(row["better_by"] for row in results["hand_set"].values())
    assert results["best_hand_set_is_better_by"] == best
    assert results["holds"] == (best <= 0.02)
    assert (tmp_path / "figures" / "sweep.svg").read_text().startswith("<?xml")
    before = (tmp_path / "sweep.json").read_text()
    capsys.readouterr()
    sweep.main()
    assert (tmp_path / "sweep.json").read_text() == before
    assert "for the first time" not in capsys.readouterr().err
