"""What the pages show, gathered from a workspace: the pipeline with its runs, and one run in full.

Only reading, and only inside the workspace: a run is found by looking its id up in the listing, never by building a
path from what a request says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trivium.apps.dashboard.explain import METRICS, SPECIMENS, STAGES, explain
from trivium.apps.dashboard.tail import Tail
from trivium.records import RunManifest, to_dict
from trivium.runs.events import read_events
from trivium.runs.registry import list_runs

MAX_POINTS = 1500
"""Points of a curve that are sent to the page; a longer curve is thinned evenly."""

MAX_SAMPLES = 200
"""Samples of a name that are sent to the page, the newest."""

Point = tuple[int, float | None]


@dataclass
class RunLog:
    """The metrics and samples of one run so far; `refresh` reads only what is new."""

    tail: Tail
    curves: dict[str, list[Point]] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def refresh(self) -> None:
        """Take in what was appended; start over when the log was cut."""
        while True:
            before = self.tail.offset
            rows, cut = self.tail.read()
            if cut:
                self.curves, self.samples = {}, {}
            for row in rows:
                self._take(row)
            if self.tail.offset == before or not rows:
                return

    def _take(self, row: Mapping[str, Any]) -> None:
        step, value = row.get("step"), row.get("value")
        if not isinstance(step, int):
            return
        if row.get("kind") == "metric" and (value is None or isinstance(value, int | float)):
            self.curves.setdefault(row["name"], []).append((step, value))
        elif row.get("kind") == "sample":
            kept = self.samples.setdefault(row["name"], [])
            kept.append({"step": step, "time": row.get("time"), "value": value})
            del kept[:-MAX_SAMPLES]


class Snapshot:
    """The state of a workspace at this moment; logs are remembered between calls, manifests are read afresh."""

    def __init__(self, workspace: Path) -> None:
        """Look at `workspace`, which need not exist yet."""
        self.workspace = workspace.resolve()
        self._logs: dict[Path, RunLog] = {}
        self._lock = threading.Lock()

    def runs(self) -> list[tuple[Path, RunManifest]]:
        """Return (folder, manifest) of every run whose folder lies inside the workspace, oldest first."""
        return [pair for pair in list_runs(self.workspace) if self._is_own(*pair)]

    def _is_own(self, folder: Path, manifest: RunManifest) -> bool:
        # A link out of the workspace would make the pages read what they were not pointed at.
        inside = folder.resolve() == folder and not any((folder / n).is_symlink() for n in LOG_NAMES)
        return inside and folder.name == manifest.run_id and folder.parent.name == manifest.table

    def find(self, run_id: str) -> tuple[Path, RunManifest] | None:
        """Return folder and manifest of the run with this id, or None where the listing has no such run."""
        return next((pair for pair in self.runs() if pair[1].run_id == run_id), None)

    def tail(self, folder: Path, cursor: str | None) -> Tail:
        """Return a Tail of the run's events, from `cursor`, or from the present end for None."""
        if cursor is not None:
            return Tail(folder / "events.jsonl", cursor)
        with self._lock:
            return Tail(folder / "events.jsonl", self._log(folder).tail.cursor)

    def _log(self, folder: Path) -> RunLog:
        log = self._logs.setdefault(folder, RunLog(tail=Tail(folder / "events.jsonl")))
        log.refresh()
        return log

    def overview(self) -> dict[str, Any]:
        """Return the pipeline: one card per table (its newest run), the stages not run yet, and the lineage."""
        runs = self.runs()
        newest = {manifest.table: (folder, manifest) for folder, manifest in runs}
        pairs = sorted(newest.values(), key=lambda pair: _order(pair[1]))
        cards = [self._card(folder, manifest) for folder, manifest in pairs]
        seen = {manifest.stage for _, manifest in pairs}
        return {
            "workspace": self.workspace.name,
            "stages": cards,
            "missing": [{"stage": s, "title": e.title, "about": e.about} for s, e in STAGES.items() if s not in seen],
            "lineage": _lineage([manifest for _, manifest in pairs], [manifest for _, manifest in runs]),
            "results": list(_results(pairs)),
            "older": len(runs) - len(cards),
        }

    def _card(self, folder: Path, manifest: RunManifest) -> dict[str, Any]:
        words = explain(manifest.stage)
        with self._lock:
            curves = self._log(folder).curves
            name = next((m for m in words.headline if curves.get(m)), "")
            points = thin(curves.get(name, []), 60)
            step = max((points[-1][0] for points in curves.values() if points), default=0)
        return {
            **_brief(manifest),
            "title": words.title,
            "headline": {"name": name, "about": METRICS.get(name, ""), "points": points},
            "step": step,
            "facts": _facts(manifest),
            "quiet_s": _quiet(folder) if manifest.status == "running" else None,
        }

    def run(self, run_id: str) -> dict[str, Any] | None:
        """Return everything about one run, or None where the listing has no such run."""
        found = self.find(run_id)
        if found is None:
            return None
        folder, manifest = found
        runs = [m for _, m in self.runs()]
        words = explain(manifest.stage)
        with self._lock:
            log = self._log(folder)
            cursor = log.tail.cursor
            curves = {name: _curve(name, points) for name, points in sorted(log.curves.items(), key=_curve_order)}
            samples = {name: list(rows) for name, rows in log.samples.items()}
        specimens: dict[str, Any] = {}
        for event in read_events(folder, kind="specimen"):
            kept = specimens.setdefault(event.name, {"about": SPECIMENS.get(event.name, ""), "rows": []})
            kept["rows"].append({"step": event.step, "value": event.value})
        return {
            **to_dict(manifest),
            "title": words.title,
            "about": words.about,
            "watch": words.watch,
            "curves": curves,
            "samples": samples,
            "specimens": specimens,
            "cursor": cursor,
            "quiet_s": _quiet(folder) if manifest.status == "running" else None,
            "made_from": [_link(name, value, runs) for name, value in manifest.parents.items()],
            "used_by": [_brief(m) for m in runs if manifest.run_id in m.parents.values()],
            "others": [_brief(m) for m in runs if m.table == manifest.table and m.run_id != run_id],
        }


LOG_NAMES = ("manifest.json", "events.jsonl", "specimens.jsonl")


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most `most` of the points, evenly chosen, the first and the last always among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _order(manifest: RunManifest) -> tuple[int, str]:
    stages = list(STAGES)
    return (stages.index(manifest.stage) if manifest.stage in STAGES else len(stages), manifest.started_at)


def _curve_order(item: tuple[str, Any]) -> tuple[int, str]:
    names = list(METRICS)
    return (names.index(item[0]) if item[0] in METRICS else len(names), item[0])


def _curve(name: str, points: Sequence[Point]) -> dict[str, Any]:
    return {"about": METRICS.get(name, ""), "points": thin(points, MAX_POINTS)}


def _brief(manifest: RunManifest) -> dict[str, Any]:
    names = ("run_id", "table", "stage", "status", "message", "started_at", "finished_at")
    return {name: getattr(manifest, name) for name in names} | {"cost": to_dict(manifest.cost)}


def _facts(manifest: RunManifest) -> dict[str, Any]:
    """Return the numbers of the summary that fit on a card."""
    counts = manifest.summary.get("counts")
    facts = {k: v for k, v in counts.items() if isinstance(v, int)} if isinstance(counts, Mapping) else {}
    flat = {k: v for k, v in manifest.summary.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return dict(list((facts | flat).items())[:4])


def _quiet(folder: Path) -> float:
    """Return the seconds since the run last wrote to its log or manifest: a killed one falls silent."""
    stamps = [(folder / name).stat().st_mtime for name in LOG_NAMES if (folder / name).exists()]
    return round(max(0.0, time.time() - max(stamps, default=0.0)), 1)


def _link(name: str, value: str, runs: Sequence[RunManifest]) -> dict[str, Any]:
    known = next((m for m in runs if m.run_id == value), None)
    # A path of the user's machine stays on the machine: its last part is enough to know the model by.
    return {"field": name, "run_id": value if known else "", "label": known.table if known else Path(value).name}


def _lineage(shown: Sequence[RunManifest], runs: Sequence[RunManifest]) -> dict[str, Any]:
    """Return the shown runs and all they came from as `nodes` and `edges` (from, to: positions in nodes)."""
    by_id = {m.run_id: m for m in runs}
    nodes: dict[str, dict[str, Any]] = {}
    edges: list[dict[str, Any]] = []

    def visit(manifest: RunManifest) -> None:
        if manifest.run_id in nodes:
            return
        nodes[manifest.run_id] = _brief(manifest)
        for name, value in manifest.parents.items():
            if value in by_id:
                visit(by_id[value])
            elif value not in nodes:
                nodes[value] = {"run_id": "", "table": Path(value).name, "stage": "", "status": "outside"}
            edges.append({"from": value, "to": manifest.run_id, "field": name})

    for manifest in shown:
        visit(manifest)
    place = {key: i for i, key in enumerate(nodes)}
    return {
        "nodes": list(nodes.values()),
        "edges": [e | {"from": place[e["from"]], "to": place[e["to"]]} for e in edges],
    }


def _results(pairs: Sequence[tuple[Path, RunManifest]]) -> Iterator[dict[str, Any]]:
    for _, manifest in pairs:
        for result in manifest.results:
            yield to_dict(result) | {"run_id": manifest.run_id, "table": manifest.table}
