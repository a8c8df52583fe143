"""`bench/compare_methods.py`: like is compared with like, and a small comparison comes to its figure."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from trivium.config import load_recipe

ROOT = Path(__file__).resolve().parents[2]
TOY = """
[ppo_1]
stage = "ppo"
prompts = ["trivium.data.microworld:preference_prompts"]
options = { num = 16 }
iterations = 2
batch_size = 8
sampling = { max_new_tokens = 12 }

[grpo_1]
stage = "grpo"
reward_model = "reward_model@latest"
rewards = {}
prompts = ["trivium.data.microworld:preference_prompts"]
options = { num = 16 }
iterations = 2
prompts_per_round = 3
group_size = 3
sampling = { max_new_tokens = 12 }

[rejection_sampling_1]
stage = "rejection_sampling"
prompts = ["trivium.data.microworld:preference_prompts"]
options = { num = 16 }
rounds = 1
prompts_per_round = 6
num_samples = 3
minibatches = 2
sampling = { max_new_tokens = 12 }
optim = { lr = 1e-2 }
"""


@pytest.fixture(scope="module")
def bench():
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("bench_compare_methods", ROOT / "bench" / "compare_methods.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_compare_methods"] = module
    spec.loader.exec_module(module)
    return module


def test_all_methods_start_from_one_model_and_learn_one_set_of_judgements(bench):
    """Every table names the same policy; the reward is the learned one; no table repeats another.

    The methods that sample see the same prompts, at the same length and temperature.
    """
    from trivium.pipeline import configs

    recipe = load_recipe(ROOT / "recipes" / "compare_methods.toml")
    made = configs(recipe)
    assert {spec.stage for spec in recipe.stages} == set(bench.LABELS) - {"best_of_n"}
    assert {config.policy for config in made.values()} == {"sft@latest"}
    assert {getattr(config, "reward_model", "reward_model@latest") for config in made.values()} == {
        "reward_model@latest"
    }
    sampling = [config for config in made.values() if hasattr(config, "sampling")]
    assert len({(c.prompts, str(c.options), c.sampling) for c in sampling}) == 1
    assert len(set(map(str, made.values()))) == len(made)


def point(bench, method: str, name: str, kl: float, win: float):
    """Return a point of ten prompts that are all alike."""
    arrays = {"kl": kl, "win": win, "proxy": win, "truth": win, "length": 30.0}
    return bench.Point(method=method, name=name, arrays={key: np.full(10, value) for key, value in arrays.items()})


def test_win_rates_are_read_at_one_kl_and_spread_over_seeds(bench):
    """PPO (4 nats, 0.9) from (0, 0.5): 0.7 at 1 nat; best-of-n (1, 0.8): 0.1 more there, and not known at 4 nats."""
    points = [
        point(bench, "best_of_n", "n = 1", 0.0, 0.45),
        point(bench, "best_of_n", "n = 8", 1.0, 0.8),
        point(bench, "ppo", "ppo_1", 4.0, 0.9),
    ]
    one = bench.summary(points, 0, [1.0, 4.0])
    assert one["at_kl"]["ppo"]["1"]["win"]["value"] == 0.7
    assert one["at_kl"]["ppo"]["1"]["less_best_of_n"]["value"] == -0.1
    assert one["at_kl"]["best_of_n"]["4"]["win"]["value"] is None
    assert one["points"][1]["kl_bound"] == pytest.approx(1.2044, abs=1e-4)
    other = bench.summary([*points[:2], point(bench, "ppo", "ppo_1", 4.0, 0.8)], 1, [1.0, 4.0])
    both = bench.over_seeds([one, other], [1.0, 4.0])
    assert both["ppo"]["1"]["win"] == {"mean": 0.675, "least": 0.65, "most": 0.7, "n": 2}
    assert both["best_of_n"]["4"]["win"] == {"n": 0}
    text = bench.tables({"targets": [1.0, 4.0], "over_seeds": both, "seeds": [one, other]})
    assert "| PPO | 67.5 (65 to 70; 2) | 85.0 (80 to 90; 2) |" in text
    assert "| best-of-n | 80.0 (80 to 80; 2) | not reached |" in text


@pytest.mark.slow  # the smoke recipe up to its policies, then three more, measured
def test_a_small_comparison_is_drawn_and_found_again(bench, tmp_path, monkeypatch, capsys):
    """From nothing to the figure; the second call trains and measures nothing and writes the same bytes."""
    (tmp_path / "methods.toml").write_text(TOY)
    words = ["--recipe", str(ROOT / "recipes" / "smoke.toml"), "--methods", str(tmp_path / "methods.toml")]
    words += ["--workspace", str(tmp_path / "runs"), "--num-prompts", "6", "--num-best", "4", "--num-against", "3"]
    words += ["--max-new-tokens", "12", "--threads", "1", "--targets", "0.01"]
    words += ["--results", str(tmp_path / "out" / "m.json"), "--figure", str(tmp_path / "out" / "m.svg")]
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", *words])
    bench.main()
    text = (tmp_path / "out" / "m.json").read_text()
    (seed,) = json.loads(text)["seeds"]
    names = [row["name"] for row in seed["points"]]
    assert names == ["n = 1", "n = 2", "n = 4", "ppo", "dpo", "ppo_1", "grpo_1", "rejection_sampling_1"]
    first, *_, last = seed["points"]
    assert first["kl"]["value"] == 0 and abs(first["win"]["value"] - 0.5) < 0.3 and last["kl"]["value"] > 0
    svg = (tmp_path / "out" / "m.svg").read_text()
    assert "SIMULATED" in svg and "rejection sampling" in svg
    assert "true-taste win rate at KL" in capsys.readouterr().out
    bench.main()
    assert "measuring" not in capsys.readouterr().out
    assert (tmp_path / "out" / "m.json").read_text() == text and (tmp_path / "out" / "m.svg").read_text() == svg


def test_policies_of_another_model_are_refused(bench, tmp_path, monkeypatch):
    """A demo whose PPO came from an earlier SFT model than the newest: one sentence, before anything is trained."""
    runs = {table: (tmp_path, argparse.Namespace(run_id=f"{table}-1", seed=0, parents={})) for table in bench.FIRST}
    runs["ppo"][1].parents = {"policy": "sft-0", "reward_model": "reward_model-1"}
    runs["dpo"][1].parents = {"policy": "sft-1"}
    monkeypatch.setattr(bench, "latest_runs", lambda workspace: runs)
    options = argparse.Namespace(methods=ROOT / "recipes" / "compare_methods.toml", threads=1)
    with pytest.raises(bench.UserError, match="of an older sft or reward_model"):
        bench.train(tmp_path, options)
