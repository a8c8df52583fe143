"""From specs to raw rows: every kind of file, folder, dataset and code gives `Row`s, each with its place."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.config import UserError, call_attribute, is_code
from trivium.data.sources.intake import BadRecord, Intake, Place
from trivium.data.sources.jsonl import open_binary, parse_json, read_lines

MAX_PIECE_CHARS = 20_000
"""A text file longer than this is read as several documents, cut at blank lines, so that it can be held out in part."""


@dataclass(frozen=True, slots=True)
class Row:
    """One raw record, or the reason why there is none; `value` may also be a finished noun (from code)."""

    place: Place
    value: Any
    shown: str = ""


def read_rows(spec: str, *, base: Path, seed: int, options: Mapping[str, Any], intake: Intake) -> Iterator[Row]:
    """Yield the raw rows of a spec. Raises UserError when the spec names nothing that can be read."""
    if spec.startswith("hf:"):
        yield from _hugging_face(spec)
    elif is_code(spec) and not (base / spec).exists():
        rows = call_attribute(spec, seed, **options)
        yield from (Row(Place(spec, number), value) for number, value in enumerate(rows, 1))
    else:
        for path, name in _expand(spec, base, intake):
            yield from _READERS[_kind(path)](path, name)


def _expand(spec: str, base: Path, intake: Intake) -> Iterator[tuple[Path, str]]:
    """Yield each file of a spec with the name it goes by (relative, so that it is the same on every machine)."""
    root = (base / Path(spec).expanduser()).resolve()
    if root.is_file():
        if _kind(root) not in _READERS:
            raise UserError(f"{root}: no reader for this kind of file; known: {', '.join(sorted(_READERS))} (and .gz)")
        yield root, root.name
        return
    if not root.is_dir():
        raise UserError(f"no file or folder at {root} (named as {spec!r}); paths start from the recipe's folder")
    found = 0
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if any(part.startswith(".") for part in inside.parts) or not path.is_file():
            continue
        if _kind(path) in _READERS:
            found += 1
            yield path, f"{root.name}/{inside.as_posix()}"
        else:
            intake.ignored.append(inside.as_posix())
    if not found:
        raise UserError(f"{root} holds no file that can be read; known kinds: {', '.join(sorted(_READERS))} (and .gz)")


def _kind(path: Path) -> str:
    """Return the suffix that says how to read a file: `.jsonl` for `a.jsonl.gz` too."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _read_jsonl(path: Path, name: str) -> Iterator[Row]:
    for number, value, shown in read_lines(path):
        yield Row(Place(name, number), value, shown)


def _read_json(path: Path, name: str) -> Iterator[Row]:
    """Yield the items of a JSON array or the one object of the file; the place is the item's number."""
    text = _text(path)
    if isinstance(text, BadRecord):
        yield Row(Place(name, 1), text)
        return
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path, name)
        return
    try:
        items = parse_json(text)
    except BadRecord as error:
        line = text.count("\n", 0, error.column - 1) + 1
        column = error.column - (text.rfind("\n", 0, error.column - 1) + 1)
        yield Row(Place(name, line), BadRecord(error.reason, max(column, 1)), text)
        return
    for number, item in enumerate(items, 1):
        wrong = not isinstance(item, dict)
        yield Row(Place(name, number), BadRecord(f"not a JSON object: found {type(item).__name__}") if wrong else item)


def _read_text(path: Path, name: str) -> Iterator[Row]:
    text = _text(path)
    if isinstance(text, BadRecord):
        yield Row(Place(name, 1), text)
        return
    line = 1
    for piece in split_text(text):
        yield Row(Place(name, line), {"text": piece.strip("\n"), "source": name})
        line += piece.count("\n")


def _read_html(path: Path, name: str) -> Iterator[Row]:
    text = _text(path)
    yield Row(Place(name, 1), text if isinstance(text, BadRecord) else {"html": text, "source": name})


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    parquet = _optional("pyarrow.parquet", "parquet files")
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for value in batch.to_pylist():
                number += 1
                yield Row(Place(name, number), {k: v for k, v in value.items() if v is not None})
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        yield Row(Place(name, number + 1), BadRecord(f"damaged parquet: {error}"))


def _text(path: Path) -> str | BadRecord:
    """Return a whole file as text, or why it is none."""
    try:
        with open_binary(path) as handle:
            data = handle.read()
        if b"\x00" in data:
            return BadRecord("NUL byte: not a text file", data.index(b"\x00") + 1)
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        return BadRecord(f"not UTF-8: {found}; save the file as UTF-8", error.start + 1)
    except (EOFError, zlib.error, OSError) as error:
        return BadRecord(f"cannot be read: {error}")
    return text if text.strip() else BadRecord("empty file")


def split_text(text: str, limit: int = MAX_PIECE_CHARS) -> Iterator[str]:
    """Yield the text whole, or in pieces of about half to one `limit` of characters cut at blank lines.

    Joined, the pieces are the text again; a stretch without a blank line is never cut.
    """
    if len(text) <= limit:
        yield text
        return
    start = 0
    while start < len(text):
        cut = text.find("\n\n", start + limit // 2)
        end = len(text) if cut < 0 or len(text) - cut < limit // 4 else cut + 2
        yield text[start:end]
        start = end


def _hugging_face(spec: str) -> Iterator[Row]:
    """Yield the rows of a dataset by name, streamed: `hf:NAME` or `hf:NAME:SPLIT`."""
    datasets = _optional("datasets", "Hugging Face datasets")
    name, _, split = spec.removeprefix("hf:").partition(":")
    try:
        for number, value in enumerate(datasets.load_dataset(name, split=split or "train", streaming=True), 1):
            yield Row(Place(spec, number), {k: v for k, v in value.items() if v is not None})
    except Exception as error:  # datasets raises a dozen kinds, from requests' to its own
        raise UserError(f"{spec} cannot be loaded ({error}); check the name and the network, or give files") from None


def _optional(module: str, what: str) -> Any:
    """Return a module of the `data` extra. Raises UserError saying how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{what} need the package {module.split('.')[0]!r}: pip install 'trivium[data]'") from None


def extract_html(html: str) -> str:
    """Return the main text of an HTML page, without navigation, scripts and comments.

    Raises BadRecord when there is none, UserError when trafilatura is not installed.
    """
    trafilatura = _optional("trafilatura", "HTML pages")
    # Its deduplication keeps state between documents, which would make one result depend on the ones before.
    text = trafilatura.extract(html, deduplicate=False, include_comments=False, include_tables=False)
    if not text:
        raise BadRecord("no main text found in the HTML page")
    return str(text)


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_text,
    ".md": _read_text,
    ".html": _read_html,
    ".htm": _read_html,
    ".parquet": _read_parquet,
}
