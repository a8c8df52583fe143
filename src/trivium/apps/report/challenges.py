"""The key challenge of each stage, as a number: clean data, annotation that agrees, a reward that is not gamed."""

from __future__ import annotations

import dataclasses
from typing import Any

from trivium.apps.report.cells import (
    NOT_RECORDED,
    Cell,
    finite,
    in_line,
    mapping,
    words,
    write_count,
    write_number,
)
from trivium.apps.report.judges import taste_of, who
from trivium.apps.report.sources import EVENTS, Source, Sources


def challenge_cells(sources: Sources, stage: str) -> list[Cell]:
    """Return the figures that show how well the stage's own difficulty was met."""
    if stage == "pretrain":
        source = sources.find("data_prep")
        return dropped_cells(source) if source else [sources.missing("data_prep", figure="clean data")]
    if stage == "sft":
        return annotation_cells(sources)
    source = sources.find(stage)
    if source is None:
        return [sources.missing(stage)]
    summary = source.manifest.summary
    revised = summary.get("num_revised")
    shown = [source.cell("responses revised", revised, text=_counted(revised, "responses revised"), label="")]
    return [*(shown if revised is not None else []), *drift_cells(sources, source)] or [
        source.cell("", text=NOT_RECORDED)
    ]


def dropped_cells(source: Source) -> list[Cell]:
    """Return what data preparation read, kept and dropped, each reason counted."""
    counts = mapping(source.manifest.summary.get("counts"))
    totals = ("read", "kept")
    cells = in_line(source.cell(name, counts.get(name), text=_counted(counts.get(name), name)) for name in totals)
    reasons = sorted(mapping(counts.get("dropped")).items(), key=lambda item: (-item[1], item[0]))
    dropped = [source.cell(words(r), num, text=_counted(num, words(r)), unit="documents") for r, num in reasons[:8]]
    return [*(dataclasses.replace(cell, unit="documents") for cell in cells), *in_line(dropped, "Dropped, and why")]


def _counted(num: Any, word: str) -> str:
    """Return `611 duplicate`, or nothing for what was not counted."""
    return f"{write_count(num)} {word}" if isinstance(num, int | float) else ""


def _percent_of(value: Any, word: str) -> str:
    number = finite(value)
    return "" if number is None else f"{write_number(number, 'fraction')} {word}"


def annotation_cells(sources: Sources) -> list[Cell]:
    """Return how varied the prompts are and how far annotators agree."""
    cells: list[Cell] = []
    for stage, what in (("sft", "instructions"), ("collect_comparisons", "ranked prompts")):
        source = sources.find(stage)
        if source is None:
            cells.append(sources.missing(stage, figure=what))
            continue
        diversity = mapping(source.manifest.summary.get("prompt_diversity"))
        names = {"distinct_1": "distinct words", "distinct_2": "distinct word pairs"}
        varied = [
            source.cell(f"{what}: {word}", diversity[k], unit="fraction", text=_percent_of(diversity[k], word))
            for k, word in names.items()
            if k in diversity
        ]
        varied += [
            source.cell(f"{what}: {k.replace('_', ' ')}", diversity[k], text=f"{shown} {word}")
            for k, word in (("clusters", "clusters"), ("effective_clusters", "equal clusters would be as spread"))
            if (number := finite(diversity.get(k))) is not None and (shown := write_number(number, ""))
        ]
        cells += in_line(varied, f"Diversity of the {what}")
        agreement = mapping(source.manifest.summary.get("agreement"))
        names = {"pairwise": f"{who(sources)}: equal verdicts on a pair", "alpha": "Krippendorff's alpha"}
        for key, unit in (("pairwise", "fraction"), ("alpha", "")):
            if key in agreement:
                cells.append(source.estimate(names[key], agreement[key], unit=unit))
    return cells


def drift_cells(sources: Sources, source: Source) -> list[Cell]:
    """Return the KL spent, and the reward that was trained on beside the taste that was not."""
    table = source.manifest.table
    cells = sources.evaluated(table, sources.contest(), "KL from the SFT model, held-out prompts", "kl")
    for metric, figure, unit in (
        ("rollout/kl", "KL from the SFT model, in training", "nats"),
        ("rollout/score", "proxy, the learned reward", ""),
        ("rollout/reward", "the reward trained on", ""),
        ("rollout/true_taste", f"true taste: {taste_of(sources)}", ""),
        ("train/margin", "implicit reward margin", ""),
    ):
        cells += edge_cells(source, metric, figure, unit)
    return cells + lost_cells(sources, table)


def lost_cells(sources: Sources, table: str) -> list[Cell]:
    """Return how far the true taste has fallen since its best stretch of training, as the evaluation worked it out."""
    for source in sources.of_stage("evaluate"):
        found = mapping(mapping(source.manifest.summary.get("overoptimization")).get(table))
        if "truth_lost" in found:
            best = finite(found.get("peak_kl"))
            where = "" if best is None else f" (at a KL of {write_number(best, 'nats')})"
            return [
                source.cell(f"true taste lost since its best stretch{where}: {taste_of(sources)}", found["truth_lost"])
            ]
    return []


def edge_cells(source: Source, metric: str, figure: str, unit: str) -> list[Cell]:
    """Return a metric's mean over the first and over the last tenth of a run, as one line."""
    edges = source.edges(metric)
    if edges is None:
        return []
    first = source.cell(f"{figure}, first tenth", edges[0], unit=unit, artifact=EVENTS, label=figure)
    last = source.cell(f"{figure}, last tenth", edges[1], unit=unit, artifact=EVENTS, label=figure, joint=" → ")
    return [first, last]
