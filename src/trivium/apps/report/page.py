"""Putting the report together: HTML for reading, Markdown for keeping, JSON for checking, text for the terminal."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table as TextTable
from rich.text import Text

from trivium.apps.report.adaptation import adaptation_table
from trivium.apps.report.cells import Line, Table, lines, visible
from trivium.apps.report.charts import Chart, can_draw, drift_chart, reward_model_chart, training_charts, wins_chart
from trivium.apps.report.lineage import Descent, limits, lineage, stale
from trivium.apps.report.model_tables import costs_table, tasks_table, wins_table
from trivium.apps.report.refusal_table import refusals_table
from trivium.apps.report.reward_table import rewards_table
from trivium.apps.report.sources import Sources
from trivium.apps.report.specimens import Exhibit, exhibits
from trivium.apps.report.stages_table import stage_tables
from trivium.records import atomic_write

VERSION = 1
"""Of the layout of report.json."""
TEXT_WIDTH = 118


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that the templates show."""

    name: str
    judges: tuple[str, ...]
    tables: Mapping[str, Table]
    curves: tuple[Chart, ...]
    charts: tuple[Chart, ...]
    exhibits: tuple[Exhibit, ...]
    lineage: tuple[Descent, ...]
    limits: tuple[str, ...]
    stale: tuple[str, ...]


def gather(workspace: Path) -> Report:
    """Return the report of a workspace, however much of the pipeline has run.

    Raises UserError when there is no such workspace.
    """
    sources = Sources(workspace)
    models = (rewards_table(sources), tasks_table(sources), wins_table(sources), costs_table(sources))
    tables = [*stage_tables(sources), *models]
    # A pipeline that adapts nothing, or measures no refusals, has no use for an empty table.
    tables += [table for table in (adaptation_table(sources), refusals_table(sources)) if table.rows]
    return Report(
        name=sources.name,
        judges=sources.judges(),
        tables={table.key: table for table in tables},
        curves=tuple(training_charts(sources)),
        charts=(drift_chart(sources), reward_model_chart(sources), wins_chart(sources)),
        exhibits=tuple(exhibits(sources)),
        lineage=tuple(lineage(sources)),
        limits=tuple(limits(sources)),
        stale=tuple(stale(sources)),
    )


def write_report(workspace: Path) -> Path:
    """Write report.html, report.md and report.json into `<workspace>/report` and return the path of the page.

    The same runs give the same bytes. Raises UserError when there is no such workspace.
    """
    report = gather(workspace)
    folder = workspace / "report"
    data = json.dumps(as_dict(report), indent=1, ensure_ascii=False)
    atomic_write(folder / "report.json", _valid(data) + "\n")
    atomic_write(folder / "report.md", render(report, "report.md.j2"))
    atomic_write(folder / "report.html", render(report, "report.html.j2"))
    return folder / "report.html"


def render(report: Report, template: str) -> str:
    """Return one of the report's texts; everything that is not the template's own is escaped."""
    loader = PackageLoader("trivium.apps.report")
    environment = Environment(
        loader=loader,
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": markdown, "visible": visible, "number": _number, "svg": Markup, "lines": lines}
    environment.globals["can_draw"] = can_draw()
    return _valid(environment.get_template(template).render(report=report))


def as_dict(report: Report) -> dict[str, Any]:
    """Return report.json: every cell with value, interval and file; costs apart, because they vary."""
    cells = [cell for table in report.tables.values() for cell in table.all_cells()]
    cells += [cell for chart in (*report.curves, *report.charts) for cell in chart.cells if cell.table]
    return {
        "version": VERSION,
        "workspace": report.name,
        "judges": list(report.judges),
        "cells": [cell.as_dict() for cell in cells if not cell.cost],
        "costs": [cell.as_dict() for cell in cells if cell.cost],
        "runs": [
            {
                "run": descent.run,
                "stage": descent.stage,
                "table": descent.table,
                "seed": descent.seed,
                "parents": {link.field: link.name for link in descent.parents},
                "fingerprint": descent.fingerprint,
                "manifest_sha256": descent.sha256,
            }
            for descent in report.lineage
        ],
        "limits": list(report.limits),
    }


def comparable(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of report.json that two workings of one recipe must share, an interrupted one included.

    Costs are left out, and so are the hashes of manifests and event logs, which hold times of the clock.
    """
    cells = [{k: v for k, v in cell.items() if k != "sha256"} for cell in report["cells"]]
    runs = [{k: v for k, v in run.items() if k != "manifest_sha256"} for run in report["runs"]]
    return {"version": report["version"], "cells": cells, "runs": runs, "limits": report["limits"]}


def render_text(workspace: Path) -> str:
    """Return the comparison as a compact table for the terminal.

    Raises UserError when there is no such workspace.
    """
    sources = Sources(workspace)
    stages, _ = stage_tables(sources)
    buffer = io.StringIO()
    console = Console(file=buffer, width=TEXT_WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    kept = [row for row in stages.rows if row.key != "goal"]
    console.print(_text_table(stages, {row.key for row in kept}, figures=True))
    for extra in (adaptation_table(sources), refusals_table(sources)):
        if extra.rows:
            console.print(_text_table(extra, {row.key for row in extra.rows}))
    for table in (tasks_table(sources), wins_table(sources)):
        if table.rows:
            console.print(_text_table(table, {row.key for row in table.rows}))
        else:
            console.print(Text(f"{table.title}: {sources.missing('evaluate').main}"))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _text_table(table: Table, rows: set[str], *, figures: bool = False) -> TextTable:
    text = TextTable(
        title=table.title, box=box.SIMPLE_HEAD, title_justify="left", title_style="", pad_edge=False, show_lines=figures
    )
    text.add_column("")
    for _, heading in table.columns:
        text.add_column(Text(heading), overflow="fold")
    for row in table.rows:
        if row.key in rows:
            groups = ["\n".join(_line(line, figures) for line in lines(group)) for group in row.cells]
            text.add_row(Text(row.label), *(Text(visible(group)) for group in groups))
    return text


def _line(line: Line, figures: bool) -> str:
    """Return one line of a cell for the terminal."""
    # Beside each other in the table of stages, below each other in the narrow columns of a table of models.
    interval = " [{}]" if figures else "\n{}"
    texts = [f"{c.joint}{c.main}{interval.format(c.interval) if c.interval else ''}" for c in line.cells]
    named = f"{line.label}: " if figures and line.label else ""
    shown = named + "".join(texts)
    return f"{line.heading}\n{shown}" if line.heading else shown


def markdown(text: object) -> str:
    """Return text that Markdown shows as it is, on one line: model text may hold tables, links and tags."""
    flat = " ".join(visible(text).split())
    escaped = re.sub(r"([\\`*_\[\]{}|#~])", r"\\\1", flat)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}".replace("-", "−")


def _valid(text: str) -> str:
    """Return text without the lone surrogates that users' files can smuggle in."""
    return text.encode("utf-8", "replace").decode("utf-8")
