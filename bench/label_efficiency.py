"""How many rankings does a reward model need? Its accuracy over their number: `bootstrap.py bench label_efficiency`.

One reward model for each number of rankings, every smaller set within the larger ones, all measured on the same
held-out prompts; beside them the annotators' ceiling and the rule that reads the length alone. The chat model, the
prompts and the SIMULATED annotators are the demo's: `--workspace runs/tiny` takes them from a finished demo, another
workspace makes them first. Writes bench/results/label_efficiency.json and docs/figures/label_efficiency.svg.

Every model sees its rankings as often as the demo's does, and takes at least `--least-steps` optimizer steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from trivium.config import Recipe, RunSettings, StageSpec, load_recipe
from trivium.pipeline import run_recipe
from trivium.records import RunManifest, atomic_write
from trivium.training.distributed import setup

ROOT = Path(__file__).resolve().parents[1]
FIRST = ("data_prep", "train_tokenizer", "pretrain", "sft", "collect_comparisons")
PASSES = 2.4
"""How often the demo's reward model sees each ranking: 120 steps of 16 over 800."""


def table_of(num: int, options: argparse.Namespace) -> StageSpec:
    """Return the table that trains on `num` rankings (0: all, of which there are `num_all`)."""
    batch = min(16, num) if num else 16
    steps = max(options.least_steps, math.ceil(PASSES * (num or options.num_all) / batch))
    fit = {"steps": steps, "batch_size": batch, "log_every": 10, "optim": {"lr": options.lr}}
    return StageSpec(table=f"labels_{num or 'all'}", stage="reward_model", values={"max_rankings": num, "fit": fit})


def figures_of(manifest: RunManifest) -> dict[str, Any]:
    """Return what a point of the curve is drawn from."""
    figures = {(result.task, result.metric): result for result in manifest.results}
    row: dict[str, Any] = {"rankings": manifest.summary["data"]["num_rankings"], "steps": manifest.summary["steps"]}
    for name, key in (("accuracy", "pairwise_accuracy@1"), ("length_only", "length_only_accuracy@1")):
        found = figures[key, "accuracy"]
        row[name] = {"value": found.value, "low": found.low, "high": found.high, "n": found.n}
    return row


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train the models and return the curve; what is done already is found."""
    demo = load_recipe(options.recipe)
    first = tuple(spec for spec in demo.stages if spec.table in FIRST)
    settings = dataclasses.replace(demo.settings, seed=options.seed, threads=options.threads)
    tables = tuple(table_of(num, options) for num in (*options.rankings, 0))
    recipe = Recipe(path=demo.path, base=demo.base, settings=settings, stages=(*first, *tables))
    manifests = run_recipe(recipe, workspace=options.workspace)
    points = [figures_of(manifests[spec.table]) for spec in tables]
    last = manifests[tables[-1].table]
    return {
        "annotators": list(last.summary["kinds"]),
        "seed": options.seed,
        "lr": options.lr,
        "heldout_rankings": last.summary["num_heldout_rankings"],
        "ceiling": last.summary["ceiling"],
        "points": points,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw accuracy over the number of rankings, with the ceiling and the length rule as lines."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "trivium", "font.size": 9})
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.0, 3.4))
    points = results["points"]
    numbers = [point["rankings"] for point in points]
    values = [100 * point["accuracy"]["value"] for point in points]
    below = [value - 100 * point["accuracy"]["low"] for value, point in zip(values, points, strict=True)]
    above = [100 * point["accuracy"]["high"] - value for value, point in zip(values, points, strict=True)]
    axis.errorbar(numbers, values, yerr=[below, above], marker="o", capsize=3, color="#4f81bd", label="reward model")
    ceiling = results["ceiling"]
    if ceiling:
        axis.axhline(100 * ceiling["value"], color="#3f7f3f", label="ceiling: one annotator foretells another")
        axis.axhspan(100 * ceiling["low"], 100 * ceiling["high"], color="#3f7f3f", alpha=0.12)
    rule = 100 * points[-1]["length_only"]["value"]
    axis.axhline(rule, color="#c0504d", linestyle="--", label="length alone")
    axis.axhline(50, color="grey", linewidth=0.8, label="a coin")
    axis.set_xscale("log")
    axis.set_xticks(numbers, [str(number) for number in numbers])
    axis.minorticks_off()
    axis.set_xlabel(f"rankings trained on (annotators: {', '.join(results['annotators']).upper()})")
    axis.set_ylabel("% of held-out pairs ordered right")
    axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def table(results: dict[str, Any]) -> str:
    """Return the curve as a Markdown table."""
    lines = ["| rankings | steps | held-out pairs ordered right, % (95%) |", "| --- | --- | --- |"]
    for point in results["points"]:
        value, low, high = (100 * point["accuracy"][key] for key in ("value", "low", "high"))
        lines.append(f"| {point['rankings']} | {point['steps']} | {value:.1f} ({low:.1f} to {high:.1f}) |")
    ceiling, rule = results["ceiling"], results["points"][-1]["length_only"]
    if ceiling:
        value, low, high = (100 * ceiling[key] for key in ("value", "low", "high"))
        lines.append(f"| ceiling |  | {value:.1f} ({low:.1f} to {high:.1f}) |")
    lines.append(
        f"| length alone |  | {100 * rule['value']:.1f} ({100 * rule['low']:.1f} to {100 * rule['high']:.1f}) |"
    )
    return "\n".join(lines)


def main() -> None:
    """Make or find the runs, print the table, write results and figure."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rankings", type=int, nargs="+", default=[12, 25, 50, 100, 200, 400])
    options.add_argument(
        "--num-all", type=int, default=800, help="rankings there are about, for the last point's steps"
    )
    options.add_argument("--least-steps", type=int, default=20)
    options.add_argument("--lr", type=float, default=5e-4)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=0)
    options.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "tiny.toml")
    options.add_argument("--workspace", type=Path, default=ROOT / "runs" / "label-efficiency")
    options.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "label_efficiency.json")
    options.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "label_efficiency.svg")
    chosen = options.parse_args()
    setup(RunSettings(threads=chosen.threads))
    results = run(chosen)
    print(table(results))
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(chosen.results, json.dumps(results, indent=1) + "\n")
    draw(results, chosen.figure)


if __name__ == "__main__":
    main()
