"""What annotators do to the reward model: `bootstrap.py bench annotators --workspaces runs/seed-0 ...`.

From finished demos, one per seed: the SFT model's responses are judged again by SIMULATED annotators of whom some are
spammers (they rank at random), `--overlap` for each prompt, and reward models are trained on the same prompts,

- `majority`: on one ranking a prompt, by majority vote of its annotators;
- `reliability`: on every annotator's ranking, weighted by measured reliability (`annotator_weights = "reliability"`);
- `equal`: on every annotator's ranking, all alike (with `--equal`);
- `without NAME`: as `equal`, but without one annotator (with `--leave-one-out`).

All take the same steps over the same share of the prompts, and all are scored on prompts held out by how many pairs
they order as the hidden taste does, which no annotator says outright. Writes bench/results/annotators.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trivium.config import Recipe, RunSettings, StageSpec
from trivium.data.chat import render_prompt
from trivium.data.microworld import taste
from trivium.data.microworld.preferences import annotators as honest
from trivium.pipeline import run_recipe
from trivium.preferences.comparisons import heldout_prompts, majority
from trivium.preferences.reliability import reliability
from trivium.preferences.store import Store
from trivium.preferences.store.judgements import Task
from trivium.records import Completion, Conversation, Ranking, atomic_write, write_jsonl
from trivium.rewards.learned import LearnedReward
from trivium.runs.registry import latest_runs
from trivium.training.distributed import setup

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Spammer:
    """A simulated annotator who does not read: every order of the responses is equally likely."""

    name: str
    kind: str = "simulated"

    def rank(self, prompt: Conversation, texts: Sequence[str], rng: np.random.Generator) -> list[list[int]]:
        """Return a random order of the texts."""
        return [[int(i)] for i in rng.permutation(len(texts))]


@dataclass(frozen=True, kw_only=True)
class World:
    """One seed: the prompts with the responses that are judged, and the judgements."""

    prompts: dict[str, Conversation]
    completions: dict[str, Completion]
    rankings: list[Ranking]


def judged(workspace: Path, into: Path, options: argparse.Namespace) -> World:
    """Return the demo's tasks, ranked anew by the pool; who ranks which prompt, and how, follows from the seed."""
    found = latest_runs(workspace)
    collection, seed = found["collect_comparisons"][1].run_id, found["sft"][1].seed
    into.mkdir(parents=True, exist_ok=True)
    # Opening a database leaves files beside it, and the demo is not ours to write to.
    shutil.copyfile(workspace / "preferences.db", into / "source.db")
    with Store(into / "source.db") as store:
        tasks: list[Task] = store.tasks(collection)
        prompts = store.prompts({task.prompt_id for task in tasks})
        completions = store.completions({name for task in tasks for name in task.completion_ids})
    pool: list[Any] = [*honest(seed), *(Spammer(name=f"sim-spammer-{n}") for n in range(options.spammers))]
    rankings = []
    for number, task in enumerate(tasks):
        rng = np.random.default_rng([seed, 0x5BA3, number])
        for index in rng.permutation(len(pool))[: options.overlap]:
            shown = [completions[task.completion_ids[i]] for i in rng.permutation(len(task.completion_ids))]
            groups = pool[index].rank(prompts[task.prompt_id], [c.text for c in shown], rng)
            rankings.append(
                Ranking(
                    prompt_id=task.prompt_id,
                    groups=tuple(tuple(shown[i].id for i in group) for group in groups),
                    annotator=pool[index].name,
                    kind="simulated",
                )
            )
    return World(prompts=prompts, completions=completions, rankings=rankings)


def written(world: World, rankings: Sequence[Ranking], path: Path) -> str:
    """Write rankings as a file that collect_comparisons reads, and return its path."""
    lines = []
    for ranking in rankings:
        ids = [name for group in ranking.groups for name in group]
        lines.append(
            {
                "prompt": world.prompts[ranking.prompt_id].as_dicts(),
                "responses": [world.completions[name].text for name in ids],
                "ranking": [[ids.index(name) for name in group] for group in ranking.groups],
                "annotator": ranking.annotator,
                "kind": ranking.kind,
            }
        )
    write_jsonl(path, lines)
    return str(path)


def arms(options: argparse.Namespace, names: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return each reward model's table: its collection and its config, by name."""
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "majority": ("majority_votes", {}),
        "reliability": ("all_votes", {"annotator_weights": "reliability"}),
    }
    if options.equal or options.leave_one_out:
        found["equal"] = ("all_votes", {})
    for name in names if options.leave_one_out else ():
        found[f"without {name}"] = ("all_votes", {"weights": {name: 0.0}})
    return found


def recipe_of(world: World, into: Path, model: Path, seed: int, options: argparse.Namespace) -> Recipe:
    """Return the recipe: both collections read in, then one reward model for each arm."""
    files = {
        "all_votes": written(world, world.rankings, into / "all_votes.jsonl"),
        "majority_votes": written(world, majority(world.rankings), into / "majority_votes.jsonl"),
    }
    stages = [
        StageSpec(table=table, stage="collect_comparisons", values={"policy": str(model), "rankings": [path]})
        for table, path in files.items()
    ]
    for name, (collection, config) in arms(options, sorted({r.annotator for r in world.rankings})).items():
        # As many rankings a step as its prompts have: every arm sees each prompt equally often in equally many steps.
        batch = options.batch_size * (1 if collection == "majority_votes" else options.overlap)
        fit = {"steps": options.steps, "batch_size": batch, "log_every": 10, "optim": {"lr": options.lr}}
        values = {"init": str(model), "comparisons": f"{collection}@latest", "heldout_frac": options.heldout_frac}
        stages.append(StageSpec(table=table_of(name), stage="reward_model", values={**values, **config, "fit": fit}))
    settings = RunSettings(name=into.name, seed=seed, threads=options.threads)
    return Recipe(path=into / "recipe.toml", base=into, settings=settings, stages=tuple(stages))


def table_of(arm: str) -> str:
    """Return the name of an arm's table."""
    return "reward_" + arm.replace(" ", "_").replace("-", "_")


def truth(world: World, folder: Path, options: argparse.Namespace, seed: int) -> tuple[int, int]:
    """Return (pairs of held-out prompts ordered as the hidden taste orders them, pairs)."""
    reward = LearnedReward.from_folder(folder)
    assert reward.tokenizer is not None
    heldout = heldout_prompts(world.prompts, options.heldout_frac, seed)
    texts: dict[str, set[str]] = {prompt: set() for prompt in heldout}
    for completion in world.completions.values():
        if completion.prompt_id in heldout:
            texts[completion.prompt_id].add(completion.text)
    right = pairs = 0
    for prompt in sorted(heldout):
        said = sorted(texts[prompt])
        start = render_prompt(reward.tokenizer, world.prompts[prompt])
        scores = reward.score_ids([[*start, *reward.tokenizer.encode(t), reward.tokenizer.end_id] for t in said])
        liked = [taste(world.prompts[prompt], text) for text in said]
        for a in range(len(said)):
            for b in range(a):
                if abs(liked[a] - liked[b]) > 1e-9:
                    pairs += 1
                    right += (scores[a] > scores[b]) == (liked[a] > liked[b])
    return right, pairs


def run(workspace: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train the arms of one seed (what is done is found) and return its row."""
    found = latest_runs(workspace)
    seed = found["sft"][1].seed
    into = options.into / f"seed-{seed}"
    world = judged(workspace, into, options)
    recipe = recipe_of(world, into, found["sft"][0] / "model", seed, options)
    manifests = run_recipe(recipe, workspace=into)
    names = sorted({r.annotator for r in world.rankings})
    row: dict[str, Any] = {"seed": seed, "arms": {}, "votes": label_quality(world)}
    for arm in arms(options, names):
        manifest = manifests[table_of(arm)]
        right, pairs = truth(world, into / table_of(arm) / manifest.run_id / "model", options, seed)
        row["arms"][arm] = {"accuracy": right / pairs, "pairs": pairs, "seconds": manifest.cost.seconds}
        if manifest.summary.get("reliability"):
            row["reliability"] = manifest.summary["reliability"]
    return row


def label_quality(world: World) -> dict[str, float]:
    """Return how many decided pairs are as the hidden taste orders them, in all votes and in the majority's."""
    liked = {name: taste(world.prompts[c.prompt_id], c.text) for name, c in world.completions.items()}
    shares = {}
    for name, rankings in (("votes", world.rankings), ("majority", majority(world.rankings))):
        hits = [
            liked[a] > liked[b]
            for ranking in rankings
            for place, better in enumerate(ranking.groups)
            for worse in ranking.groups[place + 1 :]
            for a in better
            for b in worse
            if abs(liked[a] - liked[b]) > 1e-9
        ]
        shares[name] = float(np.mean(hits))
    shares["mean_weight"] = float(np.mean([one.weight for one in reliability(world.rankings).values()]))
    return shares


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, a line for each arm and a column for each seed."""
    lines = [
        "| held-out pairs ordered as the hidden taste does, % | " + " | ".join(f"seed {r['seed']}" for r in rows) + " |"
    ]
    lines.append("| --- |" + " --- |" * len(rows))
    for arm in rows[0]["arms"]:
        lines.append(f"| {arm} | " + " | ".join(f"{100 * r['arms'][arm]['accuracy']:.1f}" for r in rows) + " |")
    lines.append("| pairs | " + " | ".join(str(r["arms"]["majority"]["pairs"]) for r in rows) + " |")
    ahead = sum(r["arms"]["reliability"]["accuracy"] > r["arms"]["majority"]["accuracy"] for r in rows)
    return "\n".join(lines) + f"\n\nweights by reliability beat the majority vote in {ahead} of {len(rows)} seeds"


def main() -> None:
    """Train or find the reward models, print the table, write the results."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workspaces", type=Path, nargs="+", required=True, help="finished demos, one per seed")
    options.add_argument("--into", type=Path, default=ROOT / "runs" / "annotators")
    options.add_argument("--spammers", type=int, default=3, help="beside the demo's five annotators")
    options.add_argument("--overlap", type=int, default=3)
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--batch-size", type=int, default=8, help="prompts a step")
    options.add_argument("--lr", type=float, default=5e-4)
    options.add_argument("--heldout-frac", type=float, default=0.4)
    options.add_argument("--threads", type=int, default=0)
    options.add_argument("--equal", action="store_true")
    options.add_argument("--leave-one-out", action="store_true")
    options.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "annotators.json")
    chosen = options.parse_args()
    setup(RunSettings(threads=chosen.threads))
    rows = [run(workspace, chosen) for workspace in chosen.workspaces]
    print(table(rows))
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(chosen.results, json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
