"""Answers kept as they come, so that a run that is cut off does not ask the same again.

One JSON object a line, appended and flushed for each answer: a question to somebody else's server costs time or money.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from trivium.records import content_id, read_jsonl
from trivium.runs.manifest import Run

Q = TypeVar("Q")

AskFn = Callable[[Mapping[int, Q]], Iterable[tuple[int, Any]]]
"""Asks the numbered questions and yields (number, answer) in any order, as the answers come; None: it failed."""


Price = tuple[int, float]
"""What an answer cost: tokens and FLOPs."""


class Answers:
    """The answers in one file, by what was asked; a failure is kept, too, as None."""

    def __init__(self, path: Path, run: Run | None = None) -> None:
        """Read what is there; half a line, which a killed writer leaves, is cut off.

        `run` is charged by `settle` for what was answered before.
        """
        self.path = path
        self._run = run
        self._charged = run.cost() if run is not None else None
        self._known: dict[str, Any] = {}
        self._owed: dict[str, Price] = {}
        if path.exists():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                # Else the next answer would be glued to the half line, and both would be lost.
                with path.open("r+b") as handle:
                    handle.truncate(whole)
            for row in read_jsonl(path):
                self._known[row["key"]] = row["answer"]
                if "price" in row:
                    self._owed[row["key"]] = (row["price"][0], row["price"][1])

    def settle(self) -> None:
        """Charge the run for the answers that were there already, once, in the place of what it was charged before.

        So a run that was cut off costs what one that was not costs: the prices of its answers, without work that was
        lost on the way. Where there is a checkpoint, it knows better and is asked afterwards.
        """
        if self._run is None or self._charged is None:
            return
        tokens, flops = (sum(price[n] for price in self._owed.values()) for n in (0, 1))
        self._run.spend(tokens=int(tokens) - self._charged.tokens, flops=flops - self._charged.flops)
        self._charged = None

    def complete(
        self,
        purpose: str,
        questions: Sequence[Q],
        text: Callable[[Q], object],
        ask: AskFn[Q],
        price: Callable[[int], Price] | None = None,
    ) -> list[Any]:
        """Return the answer to every question, in order; `ask` gets only those that are not answered yet.

        `text(question)` is what identifies a question, JSON-able; the same one asked twice is two questions.
        `price(number)` is what the answer has cost whoever asked, and is kept beside it.
        """
        keys = [content_id(purpose, number, text(question)) for number, question in enumerate(questions)]
        missing = {n: question for n, question in enumerate(questions) if keys[n] not in self._known}
        if missing:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as handle:
                for number, answer in ask(missing):
                    self._known[keys[number]] = answer
                    cost = {"price": price(number)} if price is not None else {}
                    # ASCII: a lone surrogate in a model's words could not be written otherwise.
                    handle.write(json.dumps({"key": keys[number], "answer": answer} | cost) + "\n")
                    handle.flush()
        return [self._known.get(key) for key in keys]
