"""The table "Comparing the stages": what each stage was for, what it was given, what it cost and what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from trivium.apps.report.cells import Cell, Row, Table, in_line, join, mapping, phrase, words
from trivium.apps.report.challenges import challenge_cells
from trivium.apps.report.judges import rankings_by, taste_of, who
from trivium.apps.report.sources import LABELS, PROXY, Source, Sources, is_rollout, task_name, write_kind, write_origin

GOALS = {
    "pretrain": "Predict the next token of raw text, and so learn the language and what it says about the world.",
    "sft": "Imitate ideal responses, so that the model answers a request instead of continuing it.",
    "ppo": "Do what annotators prefer: learn a reward from their rankings, then raise it while staying near "
    "the SFT model.",
    "dpo": "Learn from the same comparisons directly: no reward model, no sampling while training.",
    "grpo": "Raise a reward that a program can check, each completion compared with others to the same prompt.",
    "rejection_sampling": "Answer many times, let the learned reward pick the best, and imitate that.",
    "constitutional_ai": "Let written principles judge: critique a response, revise it, and train on the revision.",
}
ROWS = (
    ("goal", "Goal"),
    ("data", "Data"),
    ("supervision", "Supervision"),
    ("compute", "Compute"),
    ("steps", "Steps"),
    ("held-out", "Held-out results, with 95% intervals"),
    ("challenge", "Key challenge, as a number"),
)
SIZES = {
    "num_documents": "documents",
    "num_conversations": "conversations",
    "num_prompts": "prompts",
    "num_completions": "completions",
    "num_rankings": "rankings",
    "num_pairs": "pairs",
    "tokens": "tokens",
}
HEADLINES = {
    "pretrain": ("bits_per_byte", "grammar", "facts"),
    "sft": ("instruction_following", "format", "refusal"),
    "ppo": ("win_rate", "instruction_following", "style"),
    "dpo": ("win_rate", "instruction_following", "style"),
    "grpo": ("arithmetic_steps", "arithmetic", "win_rate"),
    "rejection_sampling": ("win_rate", "instruction_following", "style"),
    "constitutional_ai": ("refusal", "win_rate"),
}
"""What each kind of model is held against in the comparison; the second table holds every task."""

Cells = tuple[Cell, ...]


def stage_tables(sources: Sources) -> tuple[Table, Table]:
    """Return the table of the three classical stages, and the one of the other ways to learn from judgements."""
    others = [("dpo", "DPO"), ("grpo", "GRPO"), ("constitutional_ai", "Constitutional AI")]
    if sources.find("rejection_sampling"):  # no part of the demo: where it did not run, nothing is missing
        others.insert(2, ("rejection_sampling", "Rejection sampling"))
    return (
        _table(
            sources,
            "stages",
            "Comparing the stages",
            "The three classical stages, as they went in this workspace.",
            (("pretrain", "Pre-training"), ("sft", "Fine-tuning"), ("ppo", "RLHF: reward model and PPO")),
        ),
        _table(
            sources,
            "alternatives",
            "Other ways to learn from judgements",
            "The same questions put to the methods that stand beside PPO. All of them start from the same SFT "
            "model unless the lineage below says otherwise.",
            tuple(others),
        ),
    )


def _table(sources: Sources, key: str, title: str, intro: str, columns: tuple[tuple[str, str], ...]) -> Table:
    makers: dict[str, Callable[[Sources, str], Sequence[Cell]]] = {
        "goal": lambda _, stage: [phrase(GOALS[stage])],
        "data": data_cells,
        "supervision": supervision_cells,
        "compute": compute_cells,
        "steps": steps_cells,
        "held-out": heldout_cells,
        "challenge": challenge_cells,
    }
    rows = tuple(
        Row(key=row, label=label, cells=tuple(tuple(makers[row](sources, stage)) for stage, _ in columns))
        for row, label in ROWS
    )
    return Table(key=key, title=title, intro=intro, columns=columns, rows=rows)


def _parts(stage: str) -> tuple[str, ...]:
    """Return the stages whose runs make up one column."""
    return ("collect_comparisons", "reward_model", "ppo") if stage == "ppo" else (stage,)


# -- data


def data_cells(sources: Sources, stage: str) -> list[Cell]:
    """Return what a stage learned from: its name, and its size in documents, pairs, prompts or tokens."""
    cells: list[Cell] = []
    for part, group in _groups(stage):
        source = sources.find(part)
        if source is None:
            cells.append(sources.missing(part, group=group))
            continue
        summary = source.manifest.summary
        facts = {k: v for k, v in summary.items() if k in SIZES and k != "tokens"} | mapping(summary.get("data"))
        named = data_name(sources, source, facts)
        found = [source.cell("name", text=named)] if named else []
        found += [source.cell(word, facts[key], unit=word) for key, word in SIZES.items() if key in facts]
        cells += in_line(found or [source.cell("size")], group)
    return cells


def _groups(stage: str, skip: str = "") -> list[tuple[str, str]]:
    """Return the stages of a column, each with the heading that it needs where there are several."""
    parts = [part for part in _parts(stage) if part != skip]
    return [(part, LABELS[part] if len(parts) > 1 else "") for part in parts]


def data_name(sources: Sources, source: Source, facts: dict[str, Any]) -> str:
    """Return the name of a run's data; pre-training reads shards, so its name is that of the text they were made of."""
    origin = sources.find("data_prep") if source.manifest.stage == "pretrain" else source
    names = [name for name, _ in origin.origins()] if origin else []
    name = str(facts.get("name", ""))
    parent = sources.by_id(name)
    return join(names) or (f"from {parent.label}" if parent else join(write_origin(n) for n in name.split(", ")))


# -- supervision


def supervision_cells(sources: Sources, stage: str) -> list[Cell]:
    """Return where the training signal came from, with who judged: people, an AI or SIMULATED annotators."""
    source = sources.find(stage)
    if stage == "pretrain":
        return [phrase("Next token: the text is its own label.")]
    if stage == "sft":
        return [_pairs_by(source) if source else sources.missing(stage)]
    if stage in ("ppo", "dpo", "rejection_sampling"):
        return rankings_by(sources)
    if source is None:
        return [sources.missing(stage)]
    if stage == "grpo":
        rewards = source.manifest.config.get("rewards")
        by = f" ({join(map(write_origin, sorted(rewards)))})" if isinstance(rewards, dict) and rewards else ""
        return [source.cell("reward", label="", text=f"A program's check of each answer{by}; nobody ranks.")]
    judges = [
        write_origin(str(source.manifest.config[k]))
        for k in ("critic", "reviser", "judge")
        if source.manifest.config.get(k)
    ]
    kinds = mapping(source.manifest.summary.get("kinds"))
    who = f"; rankings by {join(write_kind(k) for k in sorted(kinds))} judges" if kinds else ""
    by = f": {join(dict.fromkeys(judges))}" if judges else ""
    return [source.cell("principles", label="", text=f"Written principles, applied by critic and reviser{by}{who}.")]


def _pairs_by(source: Source) -> Cell:
    code = [name for name, is_code in source.origins() if is_code]
    files = [name for name, is_code in source.origins() if not is_code]
    text = "Instruction and ideal response; the loss falls on the response only."
    if files:
        text += f" Responses as written in {join(files)}."
    if code:
        text += f" Responses written by a PROGRAM, not by people ({join(code)})."
    return source.cell("pairs", text=text, label="")


# -- cost and steps


def compute_cells(sources: Sources, stage: str) -> list[Cell]:
    """Return FLOPs, seconds and peak memory; costs differ from one time to the next, so they are kept apart."""
    cells: list[Cell] = []
    for part, group in _groups(stage):
        source = sources.find(part)
        cells += in_line(cost_cells(source), group) if source else [sources.missing(part, group=group)]
    return [dataclasses.replace(cell, cost=True) for cell in cells]


def cost_cells(source: Source) -> list[Cell]:
    """Return what one run used."""
    cost = source.manifest.cost
    return [
        source.cell("operations", cost.flops or None, unit="FLOPs", cost=True),
        source.cell("time", cost.seconds, unit="s", cost=True),
        source.cell("peak memory", cost.peak_memory_bytes or None, unit="bytes", cost=True),
    ]


def steps_cells(sources: Sources, stage: str) -> list[Cell]:
    """Return the optimizer steps of the column's training runs."""
    cells = []
    for part, group in _groups(stage, skip="collect_comparisons"):
        source = sources.find(part)
        found = source.cell(group, source.manifest.summary.get("steps")) if source else sources.missing(part, group)
        cells.append(dataclasses.replace(found, unit="steps"))
    return cells


# -- results


def heldout_cells(sources: Sources, stage: str) -> list[Cell]:
    """Return the stage's own held-out figures, then its headline tasks from the evaluate runs."""
    cells: list[Cell] = []
    if stage == "ppo":
        cells += reward_model_cells(sources)
    source = sources.find(stage)
    if source is None:
        return [*cells, sources.missing(stage, figure="PPO" if stage == "ppo" else "")]
    table = source.manifest.table
    tasks: list[Cell] = []
    for task in (name for short in HEADLINES[stage] for name in sources.contests(short)):
        tasks += sources.evaluated(table, task, task_label(sources, task), headline_metric(task))
    # What the evaluation measured again, with an interval, need not stand there twice.
    cells += own_results(source, skip=("kl", *(cell.unit.replace(" ", "_") for cell in tasks)))
    return [*cells, *tasks] or [source.cell("", text="not evaluated yet")]


def own_results(source: Source, skip: Sequence[str] = ()) -> list[Cell]:
    """Return up to four of the figures that a run measured itself."""
    results = [r for r in source.manifest.results if not (r.checkpoint or is_rollout(r.task)) and r.metric not in skip]
    names = {"heldout": "held-out data"}
    tasks = [names.get(task_name(r.task), words(task_name(r.task))) for r in results]
    return [source.measured(r, f"{words(r.metric)}, {task}") for r, task in list(zip(results, tasks, strict=True))[:4]]


def reward_model_cells(sources: Sources) -> list[Cell]:
    """Return the reward model's held-out accuracy beside the ceiling set by the annotators' own agreement."""
    source = sources.find("reward_model")
    if source is None:
        return [sources.missing("reward_model", figure=LABELS["reward_model"])]
    cells = [
        source.measured(r, f"reward model: {words(task_name(r.task))}") for r in source.results("pairwise_accuracy")
    ]
    ceiling = source.manifest.summary.get("ceiling")
    if ceiling is not None:
        cells.append(source.estimate(f"ceiling: agreement of {who(sources)}", ceiling))
    return cells or [source.cell("reward model: accuracy")]


def headline_metric(task: str) -> str:
    """Return the metric that stands for a task where it has several."""
    return "win_rate" if "win_rate" in task else ""


def task_label(sources: Sources, task: str) -> str:
    """Return what a task is called on the page; a win rate says against whom, and who judged it."""
    if "win_rate_vs_" not in task:
        graded = any(r.metric == "score" and task_name(r.task) == task for _, r in sources.evaluations())
        return f"{words(task)}, graded by {taste_of(sources)}" if graded else words(task)
    against = sources.model_label(task.partition("_vs_")[2])
    judge = PROXY if task.startswith("proxy_") else taste_of(sources)
    return f"win rate against {against}, judged by {judge}"
