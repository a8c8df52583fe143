"""The tables of models: every held-out task for every model, win rates against SFT, and what every run cost."""

from __future__ import annotations

from dataclasses import replace

from trivium.apps.report.cells import Cell, Row, Table, phrase, write_number
from trivium.apps.report.judges import taste_of
from trivium.apps.report.sources import OPEN_SCALE, PROXY, Sources, task_name
from trivium.apps.report.stages_table import cost_cells
from trivium.config import STAGES

TASKS = (
    "bits_per_byte",
    "grammar",
    "facts",
    "reading",
    "reasoning",
    "arithmetic",
    "arithmetic_steps",
    "instruction_following",
    "format",
    "style",
    "refusal",
    "few_shot",
    "chain_of_thought",
    "in_context_learning",
)
"""The order in which tasks are shown; others come after, by name."""

NOTES = {
    "few_shot": "what answered examples in the context add",
    "chain_of_thought": "what working in steps adds",
    "in_context_learning": "what reading on adds, per token",
}
SIDES = ("harmful_refused", "harmless_refused")
"""The two sides of the refusal task."""
LOWER_IS_BETTER = ("bits_per_byte", "loss", "perplexity")


def checkpoints(sources: Sources) -> list[str]:
    """Return the evaluated models in the order of the pipeline."""
    found = {result.checkpoint for _, result in sources.evaluations()}
    tables = {
        s.manifest.table: (STAGES.index(s.manifest.stage) if s.manifest.stage in STAGES else 99) for s in sources.runs
    }
    return sorted(found, key=lambda name: (tables.get(name, 98), name))


def is_win_rate(task: str) -> bool:
    """Tell whether a task belongs to the table of win rates."""
    return "win_rate_vs_" in task or task in OPEN_SCALE


def tasks_table(sources: Sources) -> Table:
    """Return tasks by models; a model that a task was not run on says so."""
    models = checkpoints(sources)
    found = {(task_name(r.task), r.metric) for _, r in sources.evaluations() if not is_win_rate(task_name(r.task))}
    found -= {("refusal", metric) for metric in SIDES}  # a table of their own
    several = {task for task, _ in found if sum(other == task for other, _ in found) > 1}
    rows = []
    for task, metric in sorted(found, key=lambda pair: (TASKS.index(pair[0]) if pair[0] in TASKS else 99, pair)):
        groups = tuple(_bare(sources.evaluated(m, task, "", metric), task) or (phrase("not measured"),) for m in models)
        label = task.replace("_", " ")
        note = "lower is better" if metric in LOWER_IS_BETTER else NOTES.get(task, "")
        note = f"graded by {taste_of(sources)}" if metric == "score" else note
        rows.append(
            Row(
                key=f"{task}: {metric}",
                label=f"{label}: {metric.replace('_', ' ')}" if task in several else label,
                note=note,
                cells=groups,
            )
        )
    return Table(
        key="tasks",
        title="Every task, every model",
        intro="Held-out items that occur in no training data, with 95% intervals over the items (n). "
        "The intervals say how sure the figure is for this one trained model; they do not cover what another "
        "seed would give.",
        columns=tuple((m, sources.model_label(m)) for m in models),
        rows=tuple(rows),
    )


def _bare(cells: list[Cell], task: str) -> tuple[Cell, ...]:
    """Return cells whose unit is not repeated where the row's heading has named it; no label stands before them."""
    named = task.replace("_", " ")
    bare = [replace(c, phrase=write_number(c.value, c.unit, bare=True)) if c.unit == named else c for c in cells]
    return tuple(bare)


def wins_table(sources: Sources) -> Table:
    """Return each model's win rates against the reference, its KL from it and the mean length of what it writes."""
    truth, proxy = sources.contest(), sources.contest("proxy_")
    against = sources.model_label((truth or proxy).partition("_vs_")[2]) or "SFT"
    wanted = (
        (truth, "win_rate", f"Win rate against {against}"),
        (truth, "win_rate_length_controlled", "Win rate at equal length"),
        (proxy, "win_rate", "Win rate by the proxy"),
        ("true_taste", "score", "Mean taste (SIMULATED)" if "SIMULATED" in taste_of(sources) else "Mean taste"),
        (truth or proxy.removeprefix("proxy_"), "kl", f"KL from {against}, per completion"),
        (truth or proxy.removeprefix("proxy_"), "mean_length", "Mean length"),
    )
    models = checkpoints(sources)
    found = {(task, metric): {m: sources.evaluated(m, task, "", metric) for m in models} for task, metric, _ in wanted}
    columns = [(task, metric, label) for task, metric, label in wanted if task and any(found[task, metric].values())]
    shown = [m for m in models if any(found[task, metric][m] for task, metric, _ in columns)]
    rows = tuple(
        Row(
            key=m,
            label=sources.model_label(m),
            cells=tuple(
                tuple(found[task, metric][m]) or (phrase("the reference" if _is(m, task) else "not measured"),)
                for task, metric, _ in columns
            ),
        )
        for m in shown
    )
    judge = taste_of(sources) if truth else "the proxy" if proxy else "nobody yet"
    intro = f"How often a model's response is preferred to that of {against} on held-out prompts; 50% is no better. "
    if proxy:
        intro += f"The proxy is {PROXY.removesuffix(' (proxy)')}: where it sees more gain than the truth, it is gamed. "
    intro += "KL is how far the model has moved. Longer responses can win by their length; equal length takes that out."
    return Table(
        key="wins",
        title=f"Against the {against} model, judged by {judge}",
        intro=intro,
        columns=tuple((_column(task, metric), label) for task, metric, label in columns),
        rows=rows,
    )


def _column(task: str, metric: str) -> str:
    """Return the key of a column: its metric, told apart from the truth's where it is the proxy's."""
    return f"proxy_{metric}" if task.startswith("proxy_") else task if task in OPEN_SCALE else metric


def _is(model: str, task: str) -> bool:
    return task.endswith(f"_vs_{model}")


def costs_table(sources: Sources) -> Table:
    """Return what every run used: these figures change from one time to the next, so they have a table of their own."""
    rows = tuple(
        Row(
            key=source.manifest.table,
            label=source.label,
            cells=tuple(
                (replace(cell, label=""),)
                for cell in (
                    *cost_cells(source),
                    source.cell("tokens", source.manifest.cost.tokens or None, unit="tokens", cost=True),
                )
            ),
        )
        for source in sources.runs
    )
    columns = (("operations", "Operations"), ("time", "Time"), ("memory", "Peak memory"), ("tokens", "Tokens"))
    return Table(key="costs", title="What it cost", intro="Measured, of every run.", columns=columns, rows=rows)
