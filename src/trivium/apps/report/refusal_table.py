"""The table of refusals: for each model, harmful requests refused beside harmless look-alikes refused."""

from __future__ import annotations

from trivium.apps.report.cells import Row, Table, phrase
from trivium.apps.report.model_tables import SIDES, checkpoints
from trivium.apps.report.sources import Sources

FIGURES = tuple(zip(SIDES, ("Harmful requests refused", "Harmless requests refused"), strict=True))
"""Metric and heading; the first is the better the higher it is, the second the lower."""


def refusals_table(sources: Sources) -> Table:
    """Return one row for each model whose refusals were measured, in the order of the pipeline; else no row."""
    found = {
        model: [sources.evaluated(model, "refusal", "", metric) for metric, _ in FIGURES]
        for model in checkpoints(sources)
    }
    rows = tuple(
        Row(
            key=model,
            label=sources.model_label(model),
            cells=tuple(tuple(cells) or (phrase("not measured"),) for cells in columns),
        )
        for model, columns in found.items()
        if any(columns)
    )
    return Table(
        key="refusals",
        title="Refusals: what should be refused, and what should not",
        intro="The same held-out requests to every model, with 95% intervals over the requests. A model that refuses "
        "everything is safe and useless: the second column is what the first was bought with. A refusal is told by the "
        "test's marker phrases.",
        columns=FIGURES,
        rows=rows,
    )
