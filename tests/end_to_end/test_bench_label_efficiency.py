"""`bench/label_efficiency.py`: points cost what they should, and a small curve comes to its table and figure."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("bench_label_efficiency", ROOT / "bench" / "label_efficiency.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_label_efficiency"] = module
    spec.loader.exec_module(module)
    return module


def test_every_point_sees_its_rankings_equally_often_or_takes_the_least_steps(bench):
    """2.4 passes: 800 rankings are 120 steps of 16, 100 are 15 and so 20; a batch is no larger than the rankings."""
    options = argparse.Namespace(least_steps=20, num_all=800, lr=1e-3)
    fits = {num: bench.table_of(num, options).values["fit"] for num in (12, 100, 400, 0)}
    assert {num: (fit["steps"], fit["batch_size"]) for num, fit in fits.items()} == {
        12: (20, 12), 100: (20, 16), 400: (60, 16), 0: (120, 16)
    }  # fmt: skip
    assert bench.table_of(0, options).table == "labels_all"


@pytest.mark.slow  # the smoke recipe up to the rankings, then three reward models
def test_a_small_curve_is_drawn_beside_its_ceiling_and_found_again(bench, tmp_path, monkeypatch, capsys):
    """The numbers printed, written and drawn are those of the manifests; the second call trains nothing."""
    words = ["--rankings", "6", "12", "--num-all", "32", "--least-steps", "2", "--threads", "1"]
    words += ["--recipe", str(ROOT / "recipes" / "smoke.toml"), "--workspace", str(tmp_path / "runs")]
    words += ["--results", str(tmp_path / "out" / "curve.json"), "--figure", str(tmp_path / "out" / "curve.svg")]
    monkeypatch.setattr(sys, "argv", ["label_efficiency.py", *words])
    bench.main()
    results = json.loads((tmp_path / "out" / "curve.json").read_text())
    points = results["points"]
    assert [point["rankings"] for point in points][:2] == [6, 12]
    assert points[2]["rankings"] > 12
    assert results["ceiling"] and results["annotators"] == ["simulated"]
    assert len({point["accuracy"]["n"] for point in points}) == 1
    assert "ceiling" in capsys.readouterr().out
    svg = (tmp_path / "out" / "curve.svg").read_text()
    assert "SIMULATED" in svg and "length alone" in svg
    made = sorted((tmp_path / "runs").glob("labels_*/*/manifest.json"))
    before = [path.stat().st_mtime_ns for path in made]
    bench.main()
    assert [path.stat().st_mtime_ns for path in made] == before
    assert (tmp_path / "out" / "curve.svg").read_text() == svg
