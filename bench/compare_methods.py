"""PPO, DPO, GRPO, rejection sampling and best-of-n at equal KL: `bootstrap.py bench compare_methods`.

Every table of recipes/compare_methods.toml is one method at one strength, trained from the same SFT model with the same
judgements: those of each workspace, a finished demo (a fresh one is made first). Its own PPO and DPO are compared, too.
All are measured on the same held-out prompts, against the same completions of the SFT model: the learned reward
(proxy), the win rate by the true taste, which only a SIMULATED world has, KL and length. Several workspaces are several
seeds.

Writes bench/results/compare_methods.json and docs/figures/compare_methods.svg, and prints the tables in Markdown. What
is trained, or measured, already is found again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from trivium.config import Recipe, RunSettings, UserError, load_attribute, load_recipe
from trivium.data.sources import load_prompts
from trivium.evals.best_of_n import best_of_kl, kl_bound, level_probabilities, sample_weights, win_shares
from trivium.evals.equal_kl import at_equal_kl, at_kl, difference_at_equal_kl
from trivium.evals.players import load_player
from trivium.evals.stats import mean_interval
from trivium.evals.win_rate import Sample, grade, log_ratios, sample_completions
from trivium.pipeline import run_recipe
from trivium.records import Conversation, RunManifest, atomic_write
from trivium.rewards.judge import as_reward
from trivium.rewards.learned import LearnedReward
from trivium.runs.registry import latest_runs
from trivium.training.distributed import setup

ROOT = Path(__file__).resolve().parents[1]
FIRST = ("data_prep", "train_tokenizer", "pretrain", "sft", "collect_comparisons", "reward_model", "ppo", "dpo")
LABELS = {
    "ppo": "PPO",
    "dpo": "DPO",
    "grpo": "GRPO",
    "rejection_sampling": "rejection sampling",
    "best_of_n": "best-of-n",
}
COLOURS = {
    "ppo": "#0072b2",
    "dpo": "#d55e00",
    "grpo": "#009e73",
    "rejection_sampling": "#cc79a7",
    "best_of_n": "#333333",
}
MARKS = {"ppo": "o", "dpo": "s", "grpo": "^", "rejection_sampling": "D", "best_of_n": "x"}
FIGURES = ("kl", "proxy", "truth", "win", "length")

Arrays = dict[str, np.ndarray]
"""Of one policy, one number a prompt for each of FIGURES."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One method at one strength: its table (or `n = 8`), and what it did on each prompt."""

    method: str
    name: str
    arrays: Arrays


# -- training


def train(workspace: Path, options: argparse.Namespace) -> dict[str, RunManifest]:
    """Return the manifest of each policy to compare: the demo's own PPO and DPO, and all of the recipe of methods.

    What is not there yet is trained.
    """
    methods = load_recipe(options.methods)
    if not set(FIRST) <= set(latest_runs(workspace)):
        demo = load_recipe(options.recipe)
        settings = dataclasses.replace(demo.settings, seed=options.seed, threads=options.threads)
        first = tuple(spec for spec in demo.stages if spec.table in FIRST)
        run_recipe(Recipe(path=demo.path, base=demo.base, settings=settings, stages=first), workspace=workspace)
    runs = latest_runs(workspace)
    own = {table: runs[table][1] for table in ("ppo", "dpo")}
    used = {manifest.parents["policy"] for manifest in own.values()} | {own["ppo"].parents["reward_model"]}
    if used != {runs[table][1].run_id for table in ("sft", "reward_model")}:
        raise UserError(f"{workspace}: its ppo and dpo are of an older sft or reward_model; run its recipe again")
    settings = dataclasses.replace(methods.settings, seed=runs["sft"][1].seed, threads=options.threads)
    return own | run_recipe(dataclasses.replace(methods, settings=settings), workspace=workspace)


# -- measuring


class Judges:
    """Who grades completions in one workspace, and what they are compared with: the SFT model's own."""

    def __init__(self, workspace: Path, seed: int, options: argparse.Namespace) -> None:
        """Load the judges and the SFT model."""
        self.options, self.seed, runs = options, seed, latest_runs(workspace)
        self.truth = as_reward(load_attribute(options.judge))
        self.proxy = LearnedReward.from_folder(runs["reward_model"][0] / "model")
        self.sft = load_player(runs["sft"][0])
        self.prompts = heldout_prompts(seed, options)

    @cached_property
    def against(self) -> np.ndarray:
        """The true grades of the SFT model's completions to win against, [P, num_against]."""
        return self.shaped(grade(self.sample(self.sft, self.options.num_against, 2), self.truth))

    def sample(self, player: Any, num: int, purpose: int) -> Sample:
        """Return `num` completions of each prompt, neighbours; `purpose` keeps random numbers apart."""
        repeated = [prompt for prompt in self.prompts for _ in range(num)]
        seed = (self.seed, 43, purpose)
        tokens = self.options.max_new_tokens
        return sample_completions(player, repeated, max_new_tokens=tokens, temperature=1.0, seed=seed)

    def shaped(self, values: Sequence[float]) -> np.ndarray:
        """Return numbers of completions as [P, N]."""
        return np.asarray(values, dtype=np.float64).reshape(len(self.prompts), -1)

    def graded(self, sample: Sample) -> Arrays:
        """Return what each completion [P, N] is worth: proxy, truth, its share of wins, and its tokens."""
        truth = self.shaped(grade(sample, self.truth))
        proxy = self.shaped(grade(sample, self.proxy))
        return {
            "proxy": proxy,
            "truth": truth,
            "win": win_shares(truth, self.against),
            "length": self.shaped(sample.lengths),
        }

    def policy(self, method: str, folder: Path) -> list[Point]:
        """Return a trained policy, each prompt's figures the mean of `num_samples` completions."""
        sample = self.sample(load_player(folder), self.options.num_samples, 3)
        figures = self.graded(sample) | {"kl": self.shaped(log_ratios(self.sft.model, sample, 1.0))}
        arrays = {name: values.mean(1) for name, values in figures.items()}
        return [Point(method=method, name=folder.parent.name, arrays=arrays)]

    def best_of_n(self) -> list[Point]:
        """Return best-of-n for n = 1, 2, 4 ... `num_best`, all from the same completions, picked by the proxy."""
        pool = self.sample(self.sft, self.options.num_best, 1)
        figures = self.graded(pool)
        ids = [completion.token_ids for completion in pool.completions]
        logprobs = self.shaped([sum(completion.logprobs) for completion in pool.completions])
        num = logprobs.shape[1]
        rows = [
            level_probabilities(ids[row * num : (row + 1) * num], scores.tolist(), logprobs[row].tolist())
            for row, scores in enumerate(figures["proxy"])
        ]
        points = []
        for n in (2**power for power in range(num.bit_length())):
            weights = sample_weights(figures["proxy"], n)
            arrays = {name: (weights * values).sum(1) for name, values in figures.items()}
            arrays["kl"] = best_of_kl(figures["proxy"], np.asarray(rows), n)
            points.append(Point(method="best_of_n", name=f"n = {n}", arrays=arrays))
        return points


def heldout_prompts(seed: int, options: argparse.Namespace) -> list[Conversation]:
    """Return the held-out prompts of one workspace's seed, each once."""
    wanted = {"num": options.num_prompts, "split": "heldout"}
    loaded = load_prompts([options.prompts], base=ROOT, seed=seed, options=wanted, strict=True, quarantine=None)
    return list({prompt.id: prompt for prompt in loaded}.values())[: options.num_prompts]


def measure(workspace: Path, manifests: Mapping[str, RunManifest], options: argparse.Namespace) -> list[Point]:
    """Return every method at every strength, measured in one workspace; what was measured before is read again."""
    runs, seed = latest_runs(workspace), latest_runs(workspace)["sft"][1].seed
    judges = Judges(workspace, seed, options)
    asked = [options.prompts, options.judge, options.num_prompts, options.num_samples, options.num_best]
    asked += [options.num_against, options.max_new_tokens, seed]
    asked += [runs[table][1].run_id for table in ("sft", "reward_model")]

    def found(name: str, compute: Callable[[], list[Point]]) -> list[Point]:
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
        kept = workspace / "compare_methods" / f"{name}-{key}.json"
        if not kept.is_file():
            print(f"measuring {name}", flush=True)
            rows = [[p.method, p.name, {key: values.tolist() for key, values in p.arrays.items()}] for p in compute()]
            kept.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(kept, json.dumps(rows))
        return [
            Point(method=method, name=name, arrays={key: np.asarray(values) for key, values in arrays.items()})
            for method, name, arrays in json.loads(kept.read_text())
        ]

    points = found("best_of_n", judges.best_of_n)
    for table, manifest in manifests.items():
        points += found(manifest.run_id, partial(judges.policy, manifest.stage, workspace / table / manifest.run_id))
    return points


# -- comparing


def curves(points: Sequence[Point], figure: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return each method's KLs and gains, [strengths, prompts] each."""
    found: dict[str, list[Arrays]] = {}
    for point in points:
        if point.name != "n = 1":  # the SFT model itself: where every curve starts
            found.setdefault(point.method, []).append(point.arrays)
    return {
        method: (np.stack([a["kl"] for a in arrays]), np.stack([a[figure] for a in arrays]))
        for method, arrays in found.items()
    }


def summary(points: Sequence[Point], seed: int, targets: Sequence[float]) -> dict[str, Any]:
    """Return one workspace's results: each point with its intervals, and each method's win rate at each KL."""
    wins = curves(points, "win")
    at: dict[str, Any] = {method: {} for method in wins}
    for method, curve in wins.items():
        for target in targets:
            entry = {"win": named(at_equal_kl(*curve, target, 0.5, seed))}
            if method != "best_of_n":
                less = difference_at_equal_kl(curve, wins["best_of_n"], target, 0.5, seed)
                entry["less_best_of_n"] = named(less)
            at[method][f"{target:g}"] = entry
    rows = [
        {"method": p.method, "name": p.name, **{f: named(mean_interval(p.arrays[f].tolist())) for f in FIGURES}}
        for p in points
    ]
    for row in rows:
        if row["method"] == "best_of_n":
            row["kl_bound"] = round(kl_bound(int(row["name"].removeprefix("n = "))), 4)
    return {"seed": seed, "prompts": len(points[0].arrays["kl"]), "points": rows, "at_kl": at}


def named(interval: tuple[float, float, float]) -> dict[str, float | None]:
    """Return a figure with its interval, as JSON has it: no NaN."""
    keys = ("value", "low", "high")
    # Adding 0 makes -0 a 0.
    return {k: None if math.isnan(v) else round(v, 4) + 0.0 for k, v in zip(keys, interval, strict=True)}


def over_seeds(seeds: Sequence[Mapping[str, Any]], targets: Sequence[float]) -> dict[str, Any]:
    """Return each method's win rate at each KL over the seeds that reach it: mean, least, most, how many."""
    found: dict[str, Any] = {}
    for method in seeds[0]["at_kl"]:
        found[method] = {}
        for target in (f"{t:g}" for t in targets):
            entries = [seed["at_kl"][method][target] for seed in seeds]
            values = [entry["win"]["value"] for entry in entries if entry["win"]["value"] is not None]
            less = [
                e["less_best_of_n"]["value"] for e in entries if e.get("less_best_of_n", {}).get("value") is not None
            ]
            found[method][target] = {"win": spread(values), "less_best_of_n": spread(less)}
    return found


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Return mean, least, most and number of a few values; only the number where there is none."""
    if not values:
        return {"n": 0}
    return {"mean": round(float(np.mean(values)), 4), "least": min(values), "most": max(values), "n": len(values)}


def percent(entry: Mapping[str, Any]) -> str:
    """Return a mean with its range over seeds, in percent."""
    if not entry["n"]:
        return "not reached"
    ends = f" ({100 * entry['least']:.0f} to {100 * entry['most']:.0f}; {entry['n']})" if entry["n"] > 1 else ""
    return f"{100 * entry['mean']:.1f}{ends}"


def shown(entry: Mapping[str, Any]) -> str:
    """Return a share with its interval over prompts, in percent."""
    if entry["value"] is None:
        return "not reached"
    ends = "" if entry["low"] is None else f" [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
    return f"{100 * entry['value']:.1f}{ends}"


def tables(results: Mapping[str, Any]) -> str:
    """Return the comparison as two Markdown tables: win rates at equal KL, and every point."""
    targets = [f"{t:g}" for t in results["targets"]]
    heads = " | ".join(f"{target} nats" for target in targets)
    lines = [f"| true-taste win rate at KL, % | {heads} |", "| --- |" + " --- |" * len(targets)]
    for method, entries in results["over_seeds"].items():
        cells = [percent(entries[t]["win"]) for t in targets]
        if len(results["seeds"]) == 1:  # no range over seeds, but an interval over prompts
            cells = [shown(results["seeds"][0]["at_kl"][method][t]["win"]) for t in targets]
        lines.append(f"| {LABELS[method]} | " + " | ".join(cells) + " |")
    lines += ["", "| seed | policy | KL, nats | learned reward | true taste | win rate, % | tokens |"]
    lines.append("|" + " --- |" * 7)
    for seed in results["seeds"]:
        for point in seed["points"]:
            kl, proxy, truth, win, length = (point[name] for name in FIGURES)
            figures = f"{kl['value']:.2f} | {proxy['value']:.2f} | {truth['value']:.3f} | {shown(win)}"
            name = point["name"] if point["method"] != "best_of_n" else f"best-of-n, {point['name']}"
            lines.append(f"| {seed['seed']} | {name} | {figures} | {length['value']:.0f} |")
    return "\n".join(lines)


# -- drawing


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw learned reward (left) and true-taste win rate (right) over KL: a point a strength and seed, a line a method.

    The line is the mean over the seeds, at the KLs which all of them reach.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "trivium", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8.4, 3.8))
    for axis, name, start in zip(axes, ("proxy", "win"), (None, 0.5), strict=True):
        scale = 100 if name == "win" else 1
        for method in results["over_seeds"]:
            draw_method(axis, results["seeds"], method, name, start, scale)
        axis.set_xlabel("KL from the SFT model, nats per completion")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25, linewidth=0.5)
    axes[0].set_ylabel("learned reward (proxy)")
    axes[1].set_ylabel("% won against SFT, true taste (SIMULATED)")
    axes[1].axhline(50, color="grey", linewidth=0.8)
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    seeds = len(results["seeds"])
    each = " each; lines: means" if seeds > 1 else "; bars: 95% over prompts"
    figure.suptitle(f"{seeds} seed{'s' if seeds > 1 else ''}, {results['seeds'][0]['prompts']} held-out prompts{each}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def draw_method(
    axis: Any, seeds: Sequence[Mapping[str, Any]], method: str, name: str, start: float | None, scale: float
) -> None:
    """Draw one method's points of all seeds, and their mean curve."""
    lines, colour = [], COLOURS[method]
    for seed in seeds:
        own = [point for point in seed["points"] if point["method"] == method and point["name"] != "n = 1"]
        first = next(p[name]["value"] for p in seed["points"] if p["name"] == "n = 1") if start is None else start
        x, y = [p["kl"]["value"] for p in own], [p[name]["value"] for p in own]
        axis.plot(x, [scale * v for v in y], MARKS[method], color=colour, markersize=3.5, alpha=0.45, linestyle="none")
        lines.append((x, y, first))
        if len(seeds) == 1:
            ends = [[scale * p[name][end] for p in own] for end in ("low", "high")]
            axis.vlines(x, *ends, color=colour, linewidth=0.8, alpha=0.6)
    most = max(0.0, min(max(x) for x, _, _ in lines))  # an estimate may lie below 0
    grid = [most * (i / 60) ** 2 for i in range(61)]
    mean = [scale * float(np.mean([at_kl(x, y, t, first) for x, y, first in lines])) for t in grid]
    axis.plot(grid, mean, color=colour, linewidth=1.6, label=LABELS[method], marker=MARKS[method], markevery=[60])


def main() -> None:
    """Train or find every policy, measure it, print the tables, write results and figure."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workspace", type=Path, nargs="+", default=[ROOT / "runs" / "tiny"])
    options.add_argument("--methods", type=Path, default=ROOT / "recipes" / "compare_methods.toml")
    options.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "tiny.toml", help="makes a fresh workspace")
    options.add_argument("--seed", type=int, default=0, help="of a fresh workspace")
    options.add_argument("--threads", type=int, default=0)
    options.add_argument("--prompts", default="trivium.data.microworld:preference_prompts")
    options.add_argument("--judge", default="trivium.data.microworld:taste")
    options.add_argument("--num-prompts", type=int, default=100)
    options.add_argument("--num-samples", type=int, default=2, help="completions of each prompt by a trained policy")
    options.add_argument("--num-best", type=int, default=64, help="completions that best-of-n chooses from")
    options.add_argument("--num-against", type=int, default=8, help="completions of the SFT model to win against")
    options.add_argument("--max-new-tokens", type=int, default=96)
    options.add_argument("--targets", type=float, nargs="+", default=[0.5, 1, 2, 2.5, 3])
    options.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "compare_methods.json")
    options.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "compare_methods.svg")
    chosen = options.parse_args()
    setup(RunSettings(threads=chosen.threads))
    try:
        seeds = []
        for workspace in chosen.workspace:
            manifests = train(workspace.resolve(), chosen)
            points = measure(workspace.resolve(), manifests, chosen)
            seeds.append(summary(points, latest_runs(workspace.resolve())["sft"][1].seed, chosen.targets))
    except UserError as error:
        raise SystemExit(f"compare_methods: {error}") from None
    results = {"targets": chosen.targets, "over_seeds": over_seeds(seeds, chosen.targets), "seeds": seeds}
    print(tables(results))
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(chosen.results, json.dumps(results, indent=1) + "\n")
    draw(results, chosen.figure)


if __name__ == "__main__":
    main()
