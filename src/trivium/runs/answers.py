"""Answers kept as they come, so that a run that is cut off does not ask the same again.

One JSON object a line, appended and flushed for each answer: a question to somebody else's server costs time or money.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from trivium.records import content_id, read_jsonl

Q = TypeVar("Q")

AskFn = Callable[[Mapping[int, Q]], Iterable[tuple[int, Any]]]
"""Asks the numbered questions and yields (number, answer) in any order, as the answers come; None: it failed."""


class Answers:
    """The answers in one file, by what was asked; a failure is kept, too, as None."""

    def __init__(self, path: Path) -> None:
        """Read what is there; half a line, which a killed writer leaves, is cut off."""
        self.path = path
        self._known: dict[str, Any] = {}
        if path.exists():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                # Else the next answer would be glued to the half line, and both would be lost.
                with path.open("r+b") as handle:
                    handle.truncate(whole)
            self._known = {row["key"]: row["answer"] for row in read_jsonl(path)}

    def complete(self, purpose: str, questions: Sequence[Q], text: Callable[[Q], object], ask: AskFn[Q]) -> list[Any]:
        """Return the answer to every question, in order; `ask` gets only those that are not answered yet.

        `text(question)` is what identifies a question, JSON-able; the same one asked twice is two questions.
        """
        keys = [content_id(purpose, number, text(question)) for number, question in enumerate(questions)]
        missing = {n: question for n, question in enumerate(questions) if keys[n] not in self._known}
        if missing:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as handle:
                for number, answer in ask(missing):
                    self._known[keys[number]] = answer
                    # ASCII: a lone surrogate in a model's words could not be written otherwise.
                    handle.write(json.dumps({"key": keys[number], "answer": answer}) + "\n")
                    handle.flush()
        return [self._known.get(key) for key in keys]
