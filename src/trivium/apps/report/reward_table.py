"""The table of the reward models: what each is worth, how sure it may be, and what length alone would do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from trivium.apps.report.cells import NOT_RECORDED, Cell, Row, Table, finite, mapping, phrase
from trivium.apps.report.judges import who
from trivium.apps.report.sources import Source, Sources

BY_LENGTH = ("much shorter", "shorter", "matched", "longer", "much longer")
"""What the chosen response is beside the rejected one, in the order shown."""


def rewards_table(sources: Sources) -> Table:
    """Return one column for each reward model, each figure from its held-out pairs."""
    models = sources.of_stage("reward_model")
    rows = []
    for key, label, note, make in _figures(sources):
        cells = tuple((make(source),) for source in models)
        if any(cell.value is not None or cell.phrase not in ("", NOT_RECORDED) for (cell,) in cells):
            rows.append(Row(key=key, label=label, note=note, cells=cells))
    return Table(
        key="rewards",
        title="The reward model, measured",
        intro="On pairs of held-out prompts, with 95% intervals in which pairs of one prompt count as one witness. The "
        "length rule reads nothing but the length; a reward model that does not beat it has learned little else.",
        columns=tuple((source.manifest.table, source.label) for source in models),
        rows=tuple(rows),
    )


Figures = Iterator[tuple[str, str, str, Callable[[Source], Cell]]]


def _figures(sources: Sources) -> Figures:
    """Yield (key, label, note, maker of a model's cell) for every row."""
    yield "accuracy", "pairs ordered as annotators did", "", _result("pairwise_accuracy", "accuracy")
    yield "ceiling", f"ceiling: agreement of {who(sources)}", "", _ceiling
    yield "rule", "the length rule", "its direction is that of the training pairs", _rule
    yield (
        "length_only",
        "the length rule's own accuracy",
        "equal lengths count half",
        _result("length_only_accuracy", "accuracy"),
    )
    yield "gain", "gain over the length rule", "same pairs", _result("gain_over_length_only", "accuracy_gain")
    for name in BY_LENGTH:
        note = "the chosen response beside the rejected one; matched: within 10%"
        yield f"length: {name}", f"accuracy, chosen {name}", note if name == BY_LENGTH[0] else "", _by_length(name)
    yield (
        "correlation",
        "correlation of score and length",
        "within a prompt",
        _result("reward_length_correlation", "within_prompt"),
    )
    yield "ece_before", "calibration error, as scored", "lower is better", _result("calibration", "ece_before")
    yield "ece_after", "calibration error, after the temperature", "cross-fitted", _result("calibration", "ece_after")
    yield "honest", "the same, of honest forecasts", "what the noise of so few pairs alone gives", _honest
    yield "temperature", "temperature", "above 1: the scores claim too much", _temperature


def _result(task: str, metric: str) -> Callable[[Source], Cell]:
    def make(source: Source) -> Cell:
        found = source.results(task, metric)
        return source.measured(found[0]) if found else phrase(NOT_RECORDED)

    return make


def _rule(source: Source) -> Cell:
    rule = source.manifest.summary.get("length_rule")
    return source.cell("", text=f"take the {rule}") if rule in ("longer", "shorter") else phrase(NOT_RECORDED)


def _ceiling(source: Source) -> Cell:
    value = source.manifest.summary.get("ceiling")
    return source.estimate("", value) if value is not None else phrase("nobody judged the same twice")


def _by_length(name: str) -> Callable[[Source], Cell]:
    def make(source: Source) -> Cell:
        value = mapping(source.manifest.summary.get("by_length")).get(name)
        return source.estimate("", value) if value is not None else phrase("no such pair")

    return make


def _honest(source: Source) -> Cell:
    return _number(source, mapping(source.manifest.summary.get("calibration_after")).get("honest_ece"))


def _temperature(source: Source) -> Cell:
    return _number(source, source.manifest.summary.get("temperature"))


def _number(source: Source, value: Any) -> Cell:
    return source.cell("", value) if finite(value) is not None else phrase(NOT_RECORDED)
