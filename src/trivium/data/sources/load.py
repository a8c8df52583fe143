"""The four ways to load data: documents, conversations, prompts and judgements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from trivium.data.sources.files import Row, read_rows
from trivium.data.sources.intake import BadRecord, Intake
from trivium.data.sources.schemas import Judgement, to_conversation, to_document, to_judgements, to_prompt
from trivium.records import Conversation, Document

N = TypeVar("N")


def load_documents(
    specs: Sequence[str],
    *,
    base: Path,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    strict: bool = False,
    quarantine: Path | None = None,
    intake: Intake | None = None,
) -> Iterator[Document]:
    """Yield the documents of all specs, in order.

    `options` go to code (`"module:attribute"`). What cannot be used is quarantined, or with `strict` raises UserError;
    give an `intake` to read the counts afterwards (it then decides instead of `strict` and `quarantine`).
    """
    own = intake or _intake(strict, quarantine)
    return _load(specs, lambda row: [to_document(row)], Document, base, seed, options, own)


def load_conversations(
    specs: Sequence[str],
    *,
    base: Path,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    strict: bool = False,
    quarantine: Path | None = None,
    intake: Intake | None = None,
) -> Iterator[Conversation]:
    """Yield the conversations of all specs, each with at least one assistant message (see `load_documents`)."""
    own = intake or _intake(strict, quarantine)
    return _load(specs, lambda row: [to_conversation(row)], Conversation, base, seed, options, own)


def load_prompts(
    specs: Sequence[str],
    *,
    base: Path,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    strict: bool = False,
    quarantine: Path | None = None,
    intake: Intake | None = None,
) -> Iterator[Conversation]:
    """Yield the prompts of all specs: conversations that end with a user's message; other columns are `meta`."""
    own = intake or _intake(strict, quarantine)
    return _load(specs, lambda row: [to_prompt(row)], Conversation, base, seed, options, own)


def load_preferences(
    specs: str | Sequence[str],
    *,
    base: Path,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    strict: bool = False,
    quarantine: Path | None = None,
    intake: Intake | None = None,
) -> Iterator[Judgement]:
    """Yield (prompt, responses, groups of indices best first, annotator) for every judgement of all specs."""
    own = intake or _intake(strict, quarantine)
    specs = [specs] if isinstance(specs, str) else specs
    return _load(specs, to_judgements, Judgement, base, seed, options, own)


def load_rows(specs: Sequence[str], *, base: Path, seed: int = 0) -> Iterator[Any]:
    """Yield raw rows of any schema (test items, say). Raises UserError at the first that cannot be read."""
    intake = Intake(max_bad=0)
    for spec in specs:
        for row in read_rows(spec, base=base, seed=seed, options={}, intake=intake):
            if isinstance(row.value, BadRecord):
                intake.reject(row.place, row.value, row.shown)
            yield row.value


def _intake(strict: bool, quarantine: Path | None) -> Intake:
    return Intake(max_bad=0 if strict else None, quarantine=quarantine)


def _load(
    specs: Sequence[str],
    convert: Callable[[Mapping[str, Any]], list[N]],
    noun: type[N],
    base: Path,
    seed: int,
    options: Mapping[str, Any] | None,
    intake: Intake,
) -> Iterator[N]:
    try:
        for spec in specs:
            for row in read_rows(spec, base=base, seed=seed, options=options or {}, intake=intake):
                try:
                    items = _convert(row, convert, noun)
                except BadRecord as error:
                    intake.reject(row.place, error, row.shown or str(row.value))
                    continue
                intake.keep(row.place)
                yield from items
    finally:
        intake.close()


def _convert(row: Row, convert: Callable[[Mapping[str, Any]], list[N]], noun: type[N]) -> list[N]:
    """Return a row's nouns; code may yield them ready-made. Raises BadRecord."""
    if isinstance(row.value, BadRecord):
        raise row.value
    if isinstance(row.value, noun):
        return [row.value]
    if not isinstance(row.value, Mapping):
        raise BadRecord(f"wrong type: expected an object or a {noun.__name__}, found {type(row.value).__name__}")
    return convert(row.value)
