"""Following a log that another process appends to, by file offset, without ever holding it open or locking it."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

MARK_BYTES = 64
"""How many bytes before the offset are remembered, to notice that the log was cut and has grown again since."""

MAX_READ_BYTES = 8 << 20
"""The most that one `read` takes, so that a huge log is followed in pieces."""


class Tail:
    """Reads what was appended to a JSON Lines file since the last look.

    A resumed run cuts its log back to the checkpoint; `read` then says so and starts over. A cursor (`"offset-mark"`)
    carries the place to another Tail, over a network say.
    """

    def __init__(self, path: Path, cursor: str = "") -> None:
        """Start at `cursor`, or at the beginning for an empty or a senseless one."""
        self.path = path
        offset, _, mark = cursor.partition("-")
        valid = offset.isascii() and offset.isdigit() and mark.isascii() and mark.isdigit() and len(cursor) < 40
        self.offset = int(offset) if valid else 0
        self._mark = int(mark) if valid else 0

    @property
    def cursor(self) -> str:
        """The place reached, as text."""
        return f"{self.offset}-{self._mark}"

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the whole lines appended since and whether the log was cut; what is no event is left out."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                tail = self._before(file, self.offset) if self.offset <= size else None
                cut = self.offset > 0 and (tail is None or zlib.crc32(tail) != self._mark)
                if cut:
                    self.offset = 0
                file.seek(self.offset)
                data = file.read(MAX_READ_BYTES)
                whole = data[: data.rfind(b"\n") + 1]
                if whole:
                    self.offset += len(whole)
                    self._mark = zlib.crc32(self._before(file, self.offset))
        except OSError:
            # The folder of a run that is redone is removed first; the next look finds the new one.
            return [], False
        return [row for row in map(_parse, whole.splitlines()) if row is not None], cut

    @staticmethod
    def _before(file: Any, offset: int) -> bytes:
        start = max(0, offset - MARK_BYTES)
        file.seek(start)
        data: bytes = file.read(offset - start)
        return data


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8", "replace"), parse_constant=lambda _: None)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("name"), str) else None
