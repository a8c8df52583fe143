"""The table of domain adaptation: what each adapted model gained on its domain, beside what it forgot elsewhere."""

from __future__ import annotations

from trivium.apps.report.cells import Cell, Row, Table, phrase
from trivium.apps.report.sources import Source, Sources

COLUMNS = (
    ("replay", "Replay"),
    ("domain", "Domain text, before and after"),
    ("gain", "Gain"),
    ("general", "General text, before and after"),
    ("forgetting", "Forgetting"),
)


def adaptation_table(sources: Sources) -> Table:
    """Return one row for each adapted model; no row where the workspace has none."""
    rows = tuple(
        Row(
            key=source.manifest.table,
            label=source.label,
            cells=(
                (source.cell("fraction of the rows", source.manifest.config.get("replay_frac"), unit="fraction"),),
                _text(source, "domain"),
                _change(source, "domain", "gain"),
                _text(source, "general"),
                _change(source, "general", "forgetting"),
            ),
        )
        for source in sources.of_stage("adapt")
    )
    return Table(
        key="adaptation",
        title="Domain adaptation: gain beside forgetting",
        intro="Bits per byte of held-out text, with 95% intervals over its documents; lower is better. The gain is "
        "what the domain's text costs less than before, the forgetting what general text costs more; a negative one "
        "means that the model has become better there too. Replay is the share of general text in training.",
        columns=COLUMNS,
        rows=rows,
    )


def _text(source: Source, kind: str) -> tuple[Cell, ...]:
    """Return a kind of text's bits per byte before and after."""
    cells = [
        source.measured(result, when)
        for when in ("before", "after")
        for result in source.results(kind, "bits_per_byte", when)
    ]
    return tuple(cells) or (phrase("not measured"),)


def _change(source: Source, kind: str, metric: str) -> tuple[Cell, ...]:
    """Return the difference between the two, measured on the same documents."""
    return tuple(source.measured(result) for result in source.results(kind, metric)) or (phrase("not measured"),)
