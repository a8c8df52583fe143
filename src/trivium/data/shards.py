"""Token shards: documents as ids in flat files, memory-mapped, checksummed, and tied to their tokenizer.

A folder holds `tokens-00000.bin`, ... (uint16, or uint32 for vocabularies above 65,536), `documents.npy` (int64 [D, 2]:
tokens and bytes of text of each document) and `index.json`, written last: without it there are no shards. The index
holds every file's SHA-256 and its own, so one flipped bit anywhere is found when the folder is opened.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trivium.config import UserError
from trivium.records import atomic_write, content_id, sha256_file

INDEX = "index.json"
DOCUMENTS = "documents.npy"
SHARD_TOKENS = 2**24
"""Tokens after which a new file begins (32 MiB at two bytes each); documents are never cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """Documents of token ids, read lazily. `starts[i]` and `lengths[i]` place document i in file `files[i]`.

    `text_bytes[i]` is the UTF-8 length of document i's text (for bits per byte); all arrays are int64 [D].
    """

    tokens: tuple[NDArray[Any], ...]
    files: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    fingerprint: str
    """Of the tokenizer that made the ids."""

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, the special ones around each included."""
        return int(self.lengths.sum())

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents' text."""
        return int(self.text_bytes.sum())

    def document(self, index: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return ids `start` to `stop` of a document, as a view of the file."""
        begin, length = int(self.starts[index]), int(self.lengths[index])
        return self.tokens[int(self.files[index])][
            begin + start : begin + (length if stop is None else min(stop, length))
        ]

    def head(self, num_tokens: int) -> Shards:
        """Return the first documents that together hold at most `num_tokens` tokens (at least one document)."""
        count = max(1, int(np.searchsorted(np.cumsum(self.lengths), num_tokens, side="right")))
        return Shards(
            tokens=self.tokens,
            files=self.files[:count],
            starts=self.starts[:count],
            lengths=self.lengths[:count],
            text_bytes=self.text_bytes[:count],
            fingerprint=self.fingerprint,
        )


def write_shards(
    folder: Path,
    documents: Iterable[tuple[Sequence[int], int]],
    *,
    tokenizer_fingerprint: str,
    vocab_size: int,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, int]:
    """Write documents, given as (ids, bytes of text), and return counts: `documents`, `tokens`, `bytes`, `files`.

    Every file appears whole or not at all; the index comes last. Raises UserError when there is no document.
    """
    (folder / INDEX).unlink(missing_ok=True)
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    table: list[tuple[int, int]] = []
    files: list[dict[str, Any]] = []
    buffer: list[NDArray[Any]] = []
    held = first = 0

    def flush() -> None:
        nonlocal held, first
        path = folder / f"tokens-{len(files):05d}.bin"
        atomic_write(path, np.concatenate(buffer).tobytes())
        files.append({"file": path.name, "sha256": sha256_file(path), "tokens": held, "documents": len(table) - first})
        buffer.clear()
        held, first = 0, len(table)

    for ids, text_bytes in documents:
        buffer.append(np.asarray(ids, dtype=np.int64).astype(dtype))
        table.append((len(ids), text_bytes))
        held += len(ids)
        if held >= shard_tokens:
            flush()
    if buffer:
        flush()
    if not table:
        raise UserError(f"no documents to write to {folder}; is the corpus empty?")
    for stale in folder.glob("tokens-*.bin"):
        if stale.name not in {entry["file"] for entry in files}:
            stale.unlink()
    encoded = io.BytesIO()
    np.save(encoded, np.asarray(table, dtype=np.int64), allow_pickle=False)
    atomic_write(folder / DOCUMENTS, encoded.getvalue())
    index: dict[str, Any] = {
        "version": 1,
        "dtype": dtype.str,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "vocab_size": vocab_size,
        "documents": {"file": DOCUMENTS, "sha256": sha256_file(folder / DOCUMENTS)},
        "files": files,
    }
    atomic_write(folder / INDEX, json.dumps(index | {"checksum": content_id("shards", index)}, indent=1) + "\n")
    totals = np.asarray(table, dtype=np.int64).sum(axis=0)
    return {"documents": len(table), "tokens": int(totals[0]), "bytes": int(totals[1]), "files": len(files)}


def open_shards(folder: Path, expected_fingerprint: str | None = None, *, verify: bool = True) -> Shards:
    """Return the shards of a folder after checking every file's SHA-256 (`verify=False` trusts the files).

    Raises UserError naming what is missing or damaged, or both tokenizers when `expected_fingerprint` differs.
    """
    index = _read_index(folder)
    found = index["tokenizer_fingerprint"]
    if expected_fingerprint is not None and found != expected_fingerprint:
        raise UserError(
            f"{folder} was made with tokenizer {found[:12]}, but the tokenizer given is {expected_fingerprint[:12]}; "
            "use the tokenizer beside the shards, or run train_tokenizer again"
        )
    for entry in [index["documents"], *index["files"]]:
        path = folder / entry["file"]
        if not path.exists():
            raise UserError(f"{path} is missing; run train_tokenizer again")
        if verify and sha256_file(path) != entry["sha256"]:
            raise UserError(f"{path} is damaged (its SHA-256 is not the recorded one); run train_tokenizer again")
    table = np.load(folder / index["documents"]["file"], allow_pickle=False)
    per_file = [entry["documents"] for entry in index["files"]]
    ends = np.cumsum(table[:, 0])
    file_of = np.repeat(np.arange(len(per_file)), per_file)
    file_starts = np.concatenate([[0], np.cumsum([entry["tokens"] for entry in index["files"]])])
    dtype = np.dtype(index["dtype"])
    return Shards(
        tokens=tuple(np.memmap(folder / entry["file"], dtype=dtype, mode="r") for entry in index["files"]),
        files=file_of,
        starts=ends - table[:, 0] - file_starts[file_of],
        lengths=table[:, 0],
        text_bytes=table[:, 1],
        fingerprint=found,
    )


def _read_index(folder: Path) -> dict[str, Any]:
    """Return the index after checking it against its own checksum."""
    path = folder / INDEX
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        checksum = index.pop("checksum")
    except FileNotFoundError:
        raise UserError(f"{folder} has no {INDEX}, so no token shards; run train_tokenizer first") from None
    except (ValueError, KeyError, AttributeError):
        raise UserError(f"{path} is damaged; run train_tokenizer again") from None
    if content_id("shards", index) != checksum:
        raise UserError(f"{path} is damaged (its checksum is not the recorded one); run train_tokenizer again")
    return index
