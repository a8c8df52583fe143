"""Who may be asked what: open tasks, leases, and the questions whose answers are known.

A lease keeps a task's place for the annotator who reads it, for a while: two people do not spend their time on the
same place, and one whose browser closed does not hold it for ever. Repeats and gold are questions about the annotator,
not the responses: none of them is training data.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from trivium.config import UserError
from trivium.preferences.store import rows, schema
from trivium.preferences.store.judgements import Full, Purpose, Task, distinct, task_id
from trivium.records import AnnotatorKind, Completion, Conversation, content_id

LEASE_S = 15 * 60.0
"""How long a task is kept for an annotator who was shown it, unless the page asks again."""
REPEAT_AFTER = 10
"""How many other judgements an annotator gives before a question comes back."""


def open_tasks(connection: Connection, collection: str | None, annotator: str, kind: AnnotatorKind) -> list[Task]:
    """Return what this annotator may be asked: neither judged nor skipped by them, and with a place left.

    Of an ordinary task a place is left while judgements and the live leases of others are fewer than its overlap. Gold
    and qualification questions have a place for everybody; a repeat, for who judged the original and
    `REPEAT_AFTER` other tasks since.
    """
    asked = {"collection": collection, "annotator": annotator, "kind": kind}
    found = [rows.to_task(row) for row in connection.execute(_unanswered(collection is None), asked).mappings()]
    held = _held(connection, annotator, kind)
    ago = _judged_ago(connection, annotator, kind)
    return [task for task in found if _has_place(task, held, ago)]


@functools.cache
def _unanswered(everywhere: bool) -> sa.Select[Any]:
    """Return the query for the tasks, of :collection or of all, that :annotator has neither judged nor skipped."""
    query = rows.tasks_with_counts().order_by(schema.tasks.c.collection, schema.tasks.c.position)
    for table in (schema.rankings, schema.skips):
        query = query.where(~sa.exists().where(table.c.task_id == schema.tasks.c.id, _theirs(table)))
    return query if everywhere else query.where(schema.tasks.c.collection == sa.bindparam("collection"))


def _theirs(table: sa.Table) -> sa.ColumnElement[bool]:
    """Return the condition that a row is of :annotator, who is of :kind."""
    return (table.c.annotator == sa.bindparam("annotator")) & (table.c.kind == sa.bindparam("kind"))


def _has_place(task: Task, held: dict[str, int], ago: dict[str, int]) -> bool:
    if task.purpose == "repeat":
        return ago.get(task.repeat_of, -1) >= REPEAT_AFTER
    if task.purpose != "rank":
        return task.purpose != "edit"
    return task.judgements + held.get(task.id, 0) < task.overlap


def _held(connection: Connection, annotator: str, kind: AnnotatorKind) -> dict[str, int]:
    """Return how many others hold a live lease, by task."""
    asked = {"annotator": annotator, "kind": kind, "now": rows.now()}
    return {task: count for task, count in connection.execute(_held_by_others(), asked)}


@functools.cache
def _held_by_others() -> sa.Select[Any]:
    """Return the query for each task with how many live leases others than :annotator have; who answered has none."""
    leases, answers = schema.leases, schema.rankings
    kind: sa.BindParameter[str] = sa.bindparam("kind")
    query = sa.select(leases.c.task_id, sa.func.count()).group_by(leases.c.task_id)
    query = query.where(leases.c.kind == kind, leases.c.annotator != sa.bindparam("annotator"))
    answered = sa.exists().where(
        answers.c.task_id == leases.c.task_id, answers.c.annotator == leases.c.annotator, answers.c.kind == kind
    )
    return query.where(leases.c.expires_at > sa.bindparam("now"), ~answered)


def _judged_ago(connection: Connection, annotator: str, kind: AnnotatorKind) -> dict[str, int]:
    """Return how many judgements this annotator has given since each task they judged."""
    order = list(connection.scalars(_JUDGED, {"annotator": annotator, "kind": kind}))
    return {task: len(order) - 1 - place for place, task in enumerate(order)}


_JUDGED = (
    sa.select(schema.rankings.c.task_id)
    .where(_theirs(schema.rankings), schema.rankings.c.revision == 0)
    .order_by(schema.rankings.c.sequence)
)


def take(
    connection: Connection, tasks: Iterable[Task], annotator: str, kind: AnnotatorKind, seconds: float
) -> Task | None:
    """Lease the first of these tasks that still has a place and return it; None when all were taken meanwhile.

    What the annotator holds already comes first: a page that is opened again shows the same task.
    """
    key = {"annotator": annotator, "kind": kind}
    holding = set(connection.scalars(_HOLDING, key | {"now": rows.now()}))
    for task in sorted(tasks, key=lambda task: task.id not in holding):
        if connection.dialect.name == "postgresql":  # two who want the last place wait for each other
            connection.execute(sa.select(schema.tasks.c.id).where(schema.tasks.c.id == task.id).with_for_update())
        if task.purpose == "rank":
            judged = len(_judged_by(connection, task.id, kind))
            if judged + _held(connection, annotator, kind).get(task.id, 0) >= task.overlap:
                continue
        release(connection, task.id, annotator, kind)
        connection.execute(_LEASE, {"task_id": task.id, "expires_at": rows.moment(seconds), **key})
        return task
    return None


_LIVE = schema.leases.c.expires_at > sa.bindparam("now")
_HOLDING = sa.select(schema.leases.c.task_id).where(_theirs(schema.leases), _LIVE)
_LEASE = schema.leases.insert()


def _judged_by(connection: Connection, task: str, kind: str) -> set[str]:
    return set(connection.scalars(_JUDGES, {"task": task, "kind": kind}))


_JUDGES = sa.select(schema.rankings.c.annotator).where(
    schema.rankings.c.task_id == sa.bindparam("task"),
    schema.rankings.c.kind == sa.bindparam("kind"),
    ~schema.rankings.c.adjudicates,
)


def check_place(connection: Connection, task: Task, annotator: str, kind: str) -> None:
    """Raise Full where the task has all its judgements and this annotator's lease has run out."""
    if task.purpose != "rank":
        return
    judged = _judged_by(connection, task.id, kind)
    if annotator in judged or len(judged) < task.overlap:
        return
    if task.id not in connection.scalars(_HOLDING, {"annotator": annotator, "kind": kind, "now": rows.now()}).all():
        raise Full("others have finished this task while it lay here; nothing was stored, the next one follows")


def release(connection: Connection, task: str, annotator: str, kind: str) -> None:
    """Give up an annotator's lease: they have answered, or passed."""
    connection.execute(_RELEASE, {"task": task, "annotator": annotator, "kind": kind})


_RELEASE = schema.leases.delete().where(schema.leases.c.task_id == sa.bindparam("task"), _theirs(schema.leases))


def add_repeats(connection: Connection, collection: str, fraction: float, seed: int) -> int:
    """Ask this fraction of a collection's ordinary tasks a second time, and return how many repeats were new.

    Which ones follows from the seed alone; a second call adds those of tasks that came since.
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"the fraction of repeated tasks is between 0 and 1, got {fraction}")
    query = sa.select(schema.tasks).where(schema.tasks.c.collection == collection, schema.tasks.c.purpose == "rank")
    found = [rows.to_task(row) for row in connection.execute(query.order_by(schema.tasks.c.position)).mappings()]
    chosen = [task for task in found if int(content_id("repeat", seed, task.id)[:8], 16) < fraction * 2**32]
    values = [
        {"id": content_id("repeat", task.id), "prompt_id": task.prompt_id, "completion_ids": task.completion_ids}
        | {"overlap": task.overlap, "purpose": "repeat", "repeat_of": task.id}
        for task in chosen
    ]
    return append(connection, collection, values)


def add_known(
    connection: Connection,
    collection: str,
    items: Sequence[tuple[Conversation, Sequence[Completion], Sequence[Sequence[int]]]],
    purpose: Purpose,
) -> int:
    """Store questions whose answer is known, as groups of places among the completions; return how many were new."""
    values = []
    for prompt, completions, groups in items:
        found = list(distinct(completions, prompt.id))
        names = [[completions[place].id for place in group] for group in groups]
        if sorted(name for group in names for name in group) != sorted(found) or len(found) < 2:
            raise UserError(
                f"a question with a known answer must place each of two or more different responses once "
                f"({prompt.messages[-1].content[:40]!r}…)"
            )
        rows.insert_new(connection, schema.prompts, [rows.from_prompt(prompt)])
        rows.insert_completions(connection, completions)
        about = {"id": content_id(purpose, task_id(collection, prompt.id, found)), "prompt_id": prompt.id}
        values.append(about | {"completion_ids": found, "overlap": 1, "purpose": purpose, "gold": names})
    return append(connection, collection, values)


def append(connection: Connection, collection: str, values: Sequence[dict[str, Any]]) -> int:
    """Store tasks after the last of their collection, those that are not there yet, and return how many they were."""
    known = {row["id"] for row in rows.by_ids(connection, schema.tasks, (each["id"] for each in values))}
    new = [each for each in values if each["id"] not in known]
    last = sa.select(sa.func.max(schema.tasks.c.position)).where(schema.tasks.c.collection == collection)
    highest = connection.scalar(last)
    start = 0 if highest is None else highest + 1
    fixed = {"collection": collection, "created_at": rows.now()}
    # All columns in every row: an insert of many has one list of them.
    every = {"purpose": "rank", "repeat_of": None, "gold": None, "priority": 0.0}
    placed = [every | each | fixed | {"position": start + number} for number, each in enumerate(new)]
    rows.insert_new(connection, schema.tasks, placed)
    return len(new)
