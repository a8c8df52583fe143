"""The account of what was read: kept, or quarantined with its place and reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trivium.config import UserError
from trivium.records import write_jsonl

SNIPPET = 200
"""Characters of a bad record that the quarantine keeps."""


class BadRecord(Exception):
    """A record that cannot be used: the reason, and where in its line (1-based) it shows."""

    def __init__(self, reason: str, column: int = 1) -> None:
        """Keep the reason and the column."""
        super().__init__(reason)
        self.reason = reason
        self.column = column


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands: its file (or spec) and its 1-based line (or number within the file)."""

    file: str
    line: int

    def __str__(self) -> str:
        """Return `file:line`."""
        return f"{self.file}:{self.line}"


@dataclass(kw_only=True)
class Intake:
    """Counts records, and quarantines the bad ones; `max_bad` None means that any number is only counted.

    `files` counts per file: `{"read", "kept", "quarantined"}`. `ignored` names files of a folder that are of no known
    kind. Call `close` to write the quarantine.
    """

    max_bad: int | None = None
    quarantine: Path | None = None
    read: int = 0
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    files: dict[str, Counter[str]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)

    @property
    def quarantined(self) -> int:
        """How many records were bad."""
        return len(self.bad)

    def keep(self, place: Place) -> None:
        """Count a good record."""
        self._count(place, "kept")
        self.kept += 1

    def reject(self, place: Place, error: BadRecord, text: str = "") -> None:
        """Quarantine a bad record. Raises UserError when that is one more than `max_bad`."""
        self._count(place, "quarantined")
        self.reasons[error.reason.partition(":")[0]] += 1
        entry = {"file": place.file, "line": place.line, "column": error.column, "reason": error.reason}
        self.bad.append(entry | {"text": text[:SNIPPET]})
        if self.max_bad is not None and len(self.bad) > self.max_bad:
            allowed = "strict reading allows none" if self.max_bad == 0 else f"more than max_bad = {self.max_bad}"
            raise UserError(f"{place}:{error.column}: {error.reason} ({allowed}; mend the line or allow bad ones)")

    def _count(self, place: Place, what: str) -> None:
        self.read += 1
        counts = self.files.setdefault(place.file, Counter())
        counts["read"] += 1
        counts[what] += 1

    def close(self) -> None:
        """Write what was quarantined, one JSON object a line, where there was anything and a path was given."""
        if self.quarantine is not None and self.bad:
            write_jsonl(self.quarantine, self.bad)
