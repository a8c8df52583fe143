"""Does PPO hold its target KL, and beat SFT? One row a seed: `bench/ppo_kl.py WORKSPACE... --out DIR`.

Each WORKSPACE is a finished demo (`trivium run recipes/tiny.toml --seed N --workspace runs/seed-N`) and is only read:
its tokenizer, SFT and reward model are copied to DIR, where the recipe's [ppo] runs with the controller on, then
[evaluate] on that model alone. Held means that the mean `rollout/kl` of the last quarter of the rounds is within 20% of
the target. The same command again skips what is done. Options change [ppo], so that variants can be set side by side
(another DIR for each): `--set ptx.coef=0.5 --set ptx_corpus=train_tokenizer@latest`. Prints Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from trivium.config import load_recipe
from trivium.evals.stats import mean_interval
from trivium.pipeline import run_recipe
from trivium.records import EvalResult, RunManifest
from trivium.runs.events import read_metrics
from trivium.runs.registry import latest_runs

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.toml"
PARENTS = ("train_tokenizer", "sft", "reward_model")
HELD = 0.2
"""How far from the target, as a fraction of it, still is held."""


def parse() -> argparse.Namespace:
    """Return the command line's words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspaces", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--target", type=float, default=2.0, help="nats per completion")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--coef", type=float, default=0.15, help="where kl_coef starts")
    parser.add_argument("--gain", type=float, default=3.0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another key of [ppo]")
    return parser.parse_args()


def overrides(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return what changes in the recipe's tables."""
    ppo: dict[str, Any] = {"iterations": options.rounds, "kl_coef": options.coef, "kl_target": options.target}
    ppo |= {"kl_gain": options.gain} if options.target else {}
    for word in options.set:
        key, _, text = word.partition("=")
        *groups, leaf = key.split(".")
        table = ppo
        for group in groups:
            table = table.setdefault(group, {})
        try:
            table[leaf] = json.loads(text)
        except ValueError:
            table[leaf] = text
    return {"ppo": ppo, "evaluate": {"models": ["sft@latest", "ppo@latest"]}}


def finished(source: Path, options: argparse.Namespace) -> dict[str, tuple[Path, RunManifest]]:
    """Return the runs of a workspace of its own in which PPO and its evaluation of this seed are done."""
    known = latest_runs(source)
    missing = [table for table in PARENTS if table not in known]
    if missing:
        raise SystemExit(f"{source} has no finished {missing[0]}; run the demo there first")
    workspace = options.out / source.name
    for table in PARENTS:
        folder, manifest = known[table]
        shutil.copytree(folder, workspace / table / manifest.run_id, dirs_exist_ok=True)
    recipe = load_recipe(RECIPE)
    # One thread of fp32, as the demo's own: "auto" is a measurement, and the machine may be busy.
    settings = dataclasses.replace(recipe.settings, seed=known["sft"][1].seed, precision="fp32", threads=1)
    recipe = dataclasses.replace(recipe, settings=settings)
    run_recipe(recipe, workspace=workspace, only=("ppo", "evaluate"), overrides=overrides(options))
    return latest_runs(workspace)


def row(runs: dict[str, tuple[Path, RunManifest]], target: float) -> tuple[list[str], dict[str, bool]]:
    """Return the cells of one seed and which of the claims held."""
    folder, manifest = runs["ppo"]
    curves = read_metrics(folder)
    kls = [kl for _, kl in curves["rollout/kl"]]
    last = kls[-(len(kls) // 4) :]
    kl, low, high = mean_interval(last)
    results = {(r.checkpoint, r.task.partition("@")[0], r.metric): r for r in runs["evaluate"][1].results}
    win, fresh = (results["ppo", "win_rate_vs_sft", metric] for metric in ("win_rate", "kl"))
    cells = [str(manifest.seed), f"{kl:.2f} [{low:.2f}, {high:.2f}]"]
    cells += [f"{100 * (kl / target - 1):+.0f}%"] if target else []
    cells += [shown(fresh, 1), f"{curves['train/kl_coef'][-1][1]:.3f}", shown(win, 100)]
    for task, metric, scale in (("bits_per_byte", "bits_per_byte", 1), ("format", "accuracy", 100)):
        cells.append(" to ".join(f"{scale * results[model, task, metric].value:.3g}" for model in ("sft", "ppo")))
    held = {"PPO beats SFT in true taste (interval above 50%)": win.low > 0.5}
    if target:
        held[f"the KL of the last quarter is within {HELD:.0%} of {target:g} nats"] = abs(kl / target - 1) <= HELD
    return cells, held


def shown(result: EvalResult, scale: float) -> str:
    """Return a figure with its interval."""
    digits = 1 if scale == 100 else 2
    value, low, high = (f"{scale * x:.{digits}f}" for x in (result.value, result.low, result.high))
    return f"{value} [{low}, {high}]"


def main() -> None:
    """Run what is not done yet, print the table, then in how many seeds each claim held."""
    options = parse()
    heads = ["seed", "KL, last quarter of the rounds"] + (["off target"] if options.target else [])
    heads += ["KL, held-out prompts", "last kl_coef", "win rate over SFT, %"]
    heads += ["bits per byte, SFT to PPO", "format, %, SFT to PPO"]
    rows = [row(finished(source, options), options.target) for source in options.workspaces]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for cells, _ in rows:
        print("| " + " | ".join(cells) + " |")
    print()
    for claim in rows[0][1]:
        print(f"- {claim}: {sum(held[claim] for _, held in rows)} of {len(rows)} seeds")


if __name__ == "__main__":
    main()
