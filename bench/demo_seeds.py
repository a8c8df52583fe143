"""Set finished runs of the demo side by side, one row a seed, and count what held: `bench/demo_seeds.py WORKSPACE...`.

Prints Markdown. Every figure is read from the workspaces' manifests; run the demo first, once per seed:
`python3 bootstrap.py demo --seed N --workspace runs/seed-N`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trivium.records import EvalResult, RunManifest
from trivium.runs.registry import latest_runs

Runs = dict[str, tuple[Path, RunManifest]]


def find(runs: Runs, table: str, checkpoint: str, task: str, metric: str) -> EvalResult:
    """Return one figure of a run; raises SystemExit naming what is missing."""
    results = runs[table][1].results if table in runs else ()
    for result in results:
        if (result.checkpoint or table, result.task.partition("@")[0], result.metric) == (checkpoint, task, metric):
            return result
    raise SystemExit(f"{table} has no {task} {metric} of {checkpoint}; run the demo to its end first")


def percent(result: EvalResult) -> str:
    """Return a share with its interval."""
    return f"{100 * result.value:.1f} [{100 * result.low:.1f}, {100 * result.high:.1f}]"


def row(workspace: Path) -> tuple[list[str], dict[str, bool]]:
    """Return the cells of one workspace and which of the claims held in it."""
    runs = latest_runs(workspace)
    base, sft = (find(runs, "evaluate", m, "instruction_following", "accuracy") for m in ("pretrain", "sft"))
    wins = {m: find(runs, "evaluate", m, "win_rate_vs_sft", "win_rate") for m in ("ppo", "dpo")}
    spent = {m: find(runs, "evaluate", m, "win_rate_vs_sft", "kl") for m in wins}
    accuracy = find(runs, "reward_model", "reward_model", "pairwise_accuracy", "accuracy")
    ceiling = runs["reward_model"][1].summary["ceiling"]["value"]
    seconds = sum(manifest.cost.seconds for _, manifest in runs.values())
    peak = max(manifest.cost.peak_memory_bytes for _, manifest in runs.values())
    cells = [str(runs["evaluate"][1].seed), percent(base), percent(sft)]
    cells += [f"{percent(accuracy)} ({100 * ceiling:.1f})"]
    for model, win in wins.items():
        cells.append(f"{percent(win)} at {spent[model].value:.1f}")
    cells += [f"{seconds / 60:.1f}", f"{peak / 1e9:.2f}"]
    held = {
        "SFT beats base on instruction following (intervals apart)": sft.low > base.high,
        "PPO beats SFT in true taste (interval above 50%)": wins["ppo"].low > 0.5,
        "DPO beats SFT in true taste (interval above 50%)": wins["dpo"].low > 0.5,
        "reward model beats chance on held-out pairs": accuracy.low > 0.5,
    }
    return cells, held


def main() -> None:
    """Print the table of the workspaces named on the command line, then in how many of them each claim held."""
    heads = ["seed", "base: instruction following, %", "SFT: the same", "reward model, % of held-out pairs (ceiling)"]
    heads += ["PPO win rate, %, at KL in nats", "DPO win rate, %, at KL in nats", "minutes", "peak GB"]
    rows = [row(Path(name)) for name in sys.argv[1:]]
    if not rows:
        raise SystemExit(__doc__)
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for cells, _ in rows:
        print("| " + " | ".join(cells) + " |")
    print()
    for claim in rows[0][1]:
        print(f"- {claim}: {sum(held[claim] for _, held in rows)} of {len(rows)} seeds")


if __name__ == "__main__":
    main()
