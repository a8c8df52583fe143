"""The rules a judgement must obey before it is stored, and the task it answers."""

from __future__ import annotations

import math
import typing
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from trivium.config import UserError
from trivium.records import AnnotatorKind, Completion, Ranking, content_id

KINDS: frozenset[str] = frozenset(typing.get_args(AnnotatorKind))
Purpose = Literal["rank", "repeat", "gold", "qualify", "edit"]
MAX_NAME = 100
"""Characters of an annotator's name."""
MAX_RATIONALE = 20_000
"""Characters of a free-text reason."""


class Refused(UserError):
    """A judgement that cannot be stored, and why."""


class UnknownTask(Refused):
    """A judgement about something that nobody was asked."""


class AlreadyJudged(Refused):
    """A second, different judgement of a task by the same annotator, not declared as a revision."""


class Full(Refused):
    """A judgement of a task that others have finished while its lease ran out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One question to annotators: rank these completions of this prompt.

    `collection` is the run that asked, `overlap` how many annotators (of one kind) are wanted, `judgements` how many
    have answered so far, `position` its place in the collection (from 0), `priority` how much an answer would teach
    (higher is asked first). `purpose`: "rank"; "repeat", the same question again for who answered `repeat_of`; "gold",
    a question with a known answer; "qualify", one of those that a newcomer answers first; "edit", which asks nobody:
    it holds what somebody made of a response, preferred to it. `gold` is the known answer.
    """

    id: str
    collection: str
    prompt_id: str
    completion_ids: tuple[str, ...]
    overlap: int
    position: int
    judgements: int = 0
    purpose: Purpose = "rank"
    repeat_of: str = ""
    gold: tuple[tuple[str, ...], ...] = ()
    priority: float = 0.0


def task_id(collection: str, prompt_id: str, completion_ids: Iterable[str]) -> str:
    """Return the id of a task: the same question in the same collection is the same task, in whatever order."""
    return content_id("task", collection, prompt_id, sorted(completion_ids))


def distinct(completions: Iterable[Completion], prompt_id: str) -> dict[str, Completion]:
    """Return the completions by id, each once, in the order given.

    Raises Refused when one answers another prompt.
    """
    found: dict[str, Completion] = {}
    for completion in completions:
        if completion.prompt_id != prompt_id:
            raise Refused(f"completion {completion.id} answers prompt {completion.prompt_id}, not {prompt_id}")
        found.setdefault(completion.id, completion)
    return found


def check_annotator(name: str, kind: str) -> None:
    """Raise Refused unless `name` can name an annotator and `kind` is one of human, ai, simulated."""
    if kind not in KINDS:
        raise Refused(f"annotator kind {kind!r} is none of {', '.join(sorted(KINDS))}")
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise Refused(f"an annotator's name is 1 to {MAX_NAME} printable characters, got {name[:20]!r}")


def check_ranking(ranking: Ranking, completion_ids: Iterable[str]) -> None:
    """Raise Refused unless the ranking places exactly these completions, each once.

    With `none_acceptable` the order may be left out, but then wholly: a part of one says nothing clear.
    """
    check_annotator(ranking.annotator, ranking.kind)
    asked = set(completion_ids)
    named = [name for group in ranking.groups for name in group]
    for name, times in Counter(named).items():
        if name not in asked:
            raise Refused(f"completion {name!r} is not among those to be ranked; reload the task")
        if times > 1:
            raise Refused(f"completion {name!r} is ranked {times} times; place each response once")
    if any(not group for group in ranking.groups):
        raise Refused("a ranking may not hold an empty place")
    missing = len(asked) - len(named)
    if missing and not (ranking.none_acceptable and not named):
        raise Refused(f"{missing} of {len(asked)} responses are not ranked; place them all, or choose none acceptable")
    if ranking.order_shown and sorted(ranking.order_shown) != sorted(asked):
        raise Refused("order_shown must hold each response of the task once")
    _check_soft(ranking, asked)
    if not (math.isfinite(ranking.seconds) and ranking.seconds >= 0):
        raise Refused(f"seconds must be zero or more, got {ranking.seconds}")
    if len(ranking.rationale) > MAX_RATIONALE:
        raise Refused(f"the rationale has {len(ranking.rationale)} characters, the limit is {MAX_RATIONALE}")


def _check_soft(ranking: Ranking, asked: set[str]) -> None:
    """Raise Refused unless every soft label is a probability about two different responses, each pair once."""
    pairs: set[frozenset[str]] = set()
    for first, second, chance in ranking.soft:
        pair = frozenset((first, second))
        if not pair <= asked or len(pair) < 2 or pair in pairs:
            raise Refused("a soft label must be about two different responses of the task, each pair once")
        if not 0.0 <= chance <= 1.0:
            raise Refused(f"a soft label is a probability from 0 to 1, got {chance}")
        pairs.add(pair)
