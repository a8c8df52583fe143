"""A JSON Lines reader that loses nothing: every line is a record or is rejected with column and reason.

Python's own reader accepts NaN, takes the last of duplicate keys, and lets lone surrogates through; others stop at the
first bad byte. Here each of these is one rejected line, and the next line is read as if nothing had happened.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from trivium.data.sources.intake import BadRecord

MAX_LINE_BYTES = 32 * 2**20
"""A longer line is rejected unread: it is a broken file far more often than a document."""

_NUMBER = re.compile(r"-?(NaN|Infinity)")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_SURROGATE = re.compile("[\ud800-\udfff]")


def open_binary(path: Path) -> BinaryIO:
    """Return the file opened for reading bytes, unpacked if its name ends in .gz."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRecord, str]]:
    """Yield (line number, object or BadRecord, beginning of the raw line) for every line but trailing blank ones."""
    blanks: list[int] = []
    for number, raw, failure in _raw_lines(path):
        if failure is None and not raw.strip():
            blanks.append(number)
            continue
        yield from ((blank, BadRecord("blank line"), "") for blank in blanks)
        blanks.clear()
        shown = raw[:400].decode("utf-8", "replace")
        try:
            if failure is not None:
                raise failure
            yield number, parse_line(raw), shown
        except BadRecord as error:
            yield number, error, shown


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes, BadRecord | None]]:
    """Yield (line number, bytes, None), or the reason why the line, or the file from there on, cannot be read."""
    number = 0
    with open_binary(path) as handle:
        while True:
            number += 1
            try:
                raw = handle.readline(MAX_LINE_BYTES + 1)
                if not raw:
                    return
                if len(raw) > MAX_LINE_BYTES:
                    start = raw[:400]
                    while raw and not raw.endswith(b"\n"):
                        raw = handle.readline(MAX_LINE_BYTES)
                    yield number, start, BadRecord(f"line too long: over {MAX_LINE_BYTES} bytes", MAX_LINE_BYTES + 1)
                    continue
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                yield number, b"", BadRecord(f"damaged gzip: {error}; what follows cannot be read")
                return
            yield number, raw, None


def parse_line(raw: bytes) -> dict[str, Any]:
    """Return the object of one line. Raises BadRecord with a reason and a column (in characters, from 1)."""
    raw = raw.rstrip(b"\r\n")
    if b"\x00" in raw:
        raise BadRecord("NUL byte", raw.index(b"\x00") + 1)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(raw[: error.start].decode("utf-8")) + 1
        raise BadRecord(f"not UTF-8: byte 0x{raw[error.start]:02x} ({error.reason})", column) from None
    value = parse_json(text)
    if not isinstance(value, dict):
        raise BadRecord(f"not a JSON object: found {type(value).__name__}")
    return value


def parse_json(text: str) -> Any:
    """Return the JSON value of a text, held to the standard. Raises BadRecord with a reason and a column."""
    if text.startswith("\ufeff"):
        raise BadRecord("byte order mark: save as UTF-8 without BOM")
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        two = error.msg == "Extra data" and text[error.pos :].lstrip()[:1] in "{["
        reason = "two objects on one line" if two else f"not JSON: {error.msg}"
        raise BadRecord(reason, error.pos + 1) from None
    except RecursionError:
        raise BadRecord("not JSON: nested too deeply") from None
    except BadRecord as error:
        number = _NUMBER.search(text) if error.reason.startswith("not a finite number") else None
        raise BadRecord(error.reason, number.start() + 1 if number else 1) from None
    except ValueError as error:
        raise BadRecord(f"not JSON: {error}") from None
    if "\\u" in text:
        _check_escapes(text, value)
    return value


def _check_escapes(text: str, value: Any) -> None:
    """Reject what only an escape can smuggle in: lone surrogates, which no UTF-8 file can hold, and NUL."""
    for string in _strings(value):
        if _SURROGATE.search(string):
            found = _ESCAPED_SURROGATE.search(text)
            raise BadRecord("lone surrogate: half of a UTF-16 pair", found.start() + 1 if found else 1)
        if "\x00" in string:
            raise BadRecord("NUL character", max(text.find("\\u0000"), 0) + 1)


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, keys included."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting.extend(item.keys())
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise BadRecord(f"duplicate key: {twice!r}")
    return result


def _no_constant(name: str) -> Any:
    raise BadRecord(f"not a finite number: {name}")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise BadRecord(f"not a finite number: {digits}")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)
