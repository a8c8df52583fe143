"""The append-only log of a run: metrics, samples and specimens as JSON Lines.

A checkpoint remembers the log's length; a run that resumes cuts the log back to it, so that a killed and resumed run
leaves the same log as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from trivium.records import Event, from_dict, read_jsonl, to_dict

MAX_SPECIMENS = 20
"""How many specimens of a kind a stage keeps: enough to look at, too few to weigh anything."""


class EventLog:
    """Appends to `events.jsonl` and `specimens.jsonl` of a run's folder."""

    def __init__(self, folder: Path, run_id: str) -> None:
        """Open (or create) both files of the run in `folder` for appending."""
        self.run_id = run_id
        self._events_path = folder / "events.jsonl"
        self._specimens_path = folder / "specimens.jsonl"
        self._events = _open(self._events_path)
        self._specimens = _open(self._specimens_path)
        self._counts: dict[str, int] = {}
        if self._specimens_path.stat().st_size:
            self._recount()

    def metric(self, name: str, value: float, step: int) -> None:
        """Record a number at a step; a non-finite one is stored as null, because JSON has no NaN."""
        self._append("metric", name, value if math.isfinite(value) else None, step)

    def sample(self, name: str, value: Any, step: int) -> None:
        """Record something to look at as the run goes on (a generated text, say)."""
        self._append("sample", name, value, step)

    def notice(self, name: str, value: Any, step: int) -> None:
        """Record something unusual: a step passed over, a damaged checkpoint."""
        self._append("notice", name, value, step)

    def specimen(self, name: str, value: Any, step: int = 0) -> bool:
        """Keep one specimen for the walkthrough; returns False once MAX_SPECIMENS of this name are kept."""
        if self._counts.get(name, 0) >= MAX_SPECIMENS:
            return False
        self._counts[name] = self._counts.get(name, 0) + 1
        self._write(self._specimens, "specimen", name, value, step)
        return True

    def _append(self, kind: Literal["metric", "sample", "notice"], name: str, value: Any, step: int) -> None:
        self._write(self._events, kind, name, value, step)

    def _write(self, file: Any, kind: Any, name: str, value: Any, step: int) -> None:
        event = Event(run_id=self.run_id, step=step, time=round(time.time(), 3), kind=kind, name=name, value=value)
        # Rounding the clock to milliseconds keeps lines short; one write per line keeps them whole for readers.
        file.write((_one_line(to_dict(event)) + "\n").encode("utf-8", "surrogatepass"))
        file.flush()

    def offsets(self) -> dict[str, int]:
        """Return the length in bytes of both files: what a checkpoint stores."""
        return {"events": self._events.tell(), "specimens": self._specimens.tell()}

    def truncate(self, offsets: dict[str, int]) -> None:
        """Cut both files back to `offsets` (what a checkpoint stored); a file that is shorter stays and is named."""
        for file, key in ((self._events, "events"), (self._specimens, "specimens")):
            length = file.seek(0, os.SEEK_END)
            if length < offsets[key]:
                # Never lengthened: that would fill the gap with NUL bytes, which no reader takes.
                print(f"{file.name}: {offsets[key] - length} bytes are missing; the log has a gap", file=sys.stderr)
            file.truncate(min(length, offsets[key]))
            file.seek(0, os.SEEK_END)
        self._recount()

    def sync(self) -> None:
        """Make both files durable: a checkpoint that outlives a power cut must not remember more than they hold."""
        for file in (self._events, self._specimens):
            os.fsync(file.fileno())

    def _recount(self) -> None:
        self._counts = {}
        for row in read_jsonl(self._specimens_path):
            self._counts[row["name"]] = self._counts.get(row["name"], 0) + 1

    def close(self) -> None:
        """Close both files."""
        self._events.close()
        self._specimens.close()


def _open(path: Path) -> BinaryIO:
    """Open a log for appending; half a line, left by a writer that was killed, would spoil the next, so it goes."""
    if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
    return path.open("ab")


def _one_line(value: object) -> str:
    """Return `value` as JSON; a NaN or an infinity, which JSON does not have, becomes null wherever it stands."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), ensure_ascii=False)


def read_events(run_folder: Path, *, kind: str | None = None) -> Iterator[Event]:
    """Yield the events of a run (a run still going on included), optionally of one kind."""
    name = "specimens.jsonl" if kind == "specimen" else "events.jsonl"
    path = run_folder / name
    if not path.exists():
        return
    for row in read_jsonl(path):
        if kind is None or row["kind"] == kind:
            yield from_dict(Event, row)


def read_metrics(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return each metric's (step, value) points in order."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for event in read_events(run_folder, kind="metric"):
        if event.value is not None:
            curves.setdefault(event.name, []).append((event.step, float(event.value)))
    return curves
