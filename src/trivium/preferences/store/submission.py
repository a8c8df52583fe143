"""How a judgement is stored: found its task, checked, told from a repeat, appended."""

from __future__ import annotations

import functools
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from trivium.preferences.store import rows, schema
from trivium.preferences.store.assignment import append, check_place, release
from trivium.preferences.store.judgements import AlreadyJudged, Refused, Task, UnknownTask, check_ranking
from trivium.records import Completion, Ranking, content_id


def submit(
    connection: Connection,
    ranking: Ranking,
    collection: str,
    key: str,
    task: str = "",
    revise: bool = False,
    within_overlap: bool = False,
    adjudicates: bool = False,
) -> bool:
    """Append the judgement and return True, or return False where it is a repeat; see `Store.submit`."""
    asked = _find_task(connection, ranking, collection, task)
    check_ranking(ranking, asked.completion_ids)
    key = key or content_id("submission", asked.id, ranking.id)
    about = {"task": asked.id, "annotator": ranking.annotator, "kind": ranking.kind}
    history = connection.execute(_HISTORY, about).mappings().all()
    for row in history:
        if row["idempotency_key"] == key:
            if row["ranking_id"] != ranking.id:
                raise Refused(f"the key {key[:40]!r} was used for a different judgement; use a new one")
            return False
    if history and history[-1]["ranking_id"] == ranking.id:
        return False
    if history and not revise:
        raise AlreadyJudged(f"{ranking.annotator} has already judged this task; the first answer was kept")
    if within_overlap and not history:
        check_place(connection, asked, ranking.annotator, ranking.kind)
    values = {
        "ranking_id": ranking.id,
        "task_id": asked.id,
        "annotator": ranking.annotator,
        "kind": ranking.kind,
        "revision": len(history),
        "groups": ranking.groups,
        "none_acceptable": ranking.none_acceptable,
        "rationale": ranking.rationale,
        "seconds": ranking.seconds,
        "order_shown": ranking.order_shown,
        "idempotency_key": key,
        "adjudicates": adjudicates,
        "created_at": rows.now(),
        "soft": ranking.soft,
    }
    connection.execute(_INSERT, values)
    release(connection, asked.id, ranking.annotator, ranking.kind)
    return True


_HISTORY = (
    sa.select(schema.rankings)
    .where(
        schema.rankings.c.task_id == sa.bindparam("task"),
        schema.rankings.c.annotator == sa.bindparam("annotator"),
        schema.rankings.c.kind == sa.bindparam("kind"),
    )
    .order_by(schema.rankings.c.revision)
)
_INSERT = schema.rankings.insert()


def submit_edit(connection: Connection, task: Task, original: str, text: str, annotator: str) -> bool:
    """Store what a person made of a response as preferred to it, and return True; False for a repeat.

    It is a task of its own, which asks nobody: the two are its responses, the person's judgement its only one.
    """
    edited = Completion(prompt_id=task.prompt_id, text=text, policy=f"edited by {annotator}")
    if edited.id == original or original not in task.completion_ids:
        raise Refused("an edit changes one of the task's responses")
    rows.insert_completions(connection, [edited])
    name = content_id("edit", task.id, original, edited.id, annotator)
    about = {"id": name, "prompt_id": task.prompt_id, "completion_ids": [edited.id, original], "overlap": 1}
    append(connection, task.collection, [about | {"purpose": "edit"}])
    groups = ((edited.id,), (original,))
    ranking = Ranking(prompt_id=task.prompt_id, groups=groups, annotator=annotator, kind="human")
    return submit(connection, ranking, task.collection, name, name)


def _find_task(connection: Connection, ranking: Ranking, collection: str, task: str) -> Task:
    asked = {"collection": collection, "task": task, "prompt": ranking.prompt_id}
    found = [rows.to_task(row) for row in connection.execute(_task_asked(bool(task)), asked).mappings()]
    named = {name for group in ranking.groups for name in group} | set(ranking.order_shown)
    if len(found) > 1:
        found = [each for each in found if set(each.completion_ids) == named]
    if len(found) != 1 or found[0].prompt_id != ranking.prompt_id:
        about = (
            f"task {task[:40]!r}" if task else f"task about prompt {ranking.prompt_id[:40]!r} with these completions"
        )
        raise UnknownTask(f"collection {collection!r} has no {about}")
    return found[0]


@functools.cache
def _task_asked(named: bool) -> sa.Select[Any]:
    """Return the query for the :task of a :collection or, where none is named, for the ordinary ones of a :prompt."""
    table = schema.tasks
    # FOR UPDATE makes two submissions about one task wait for each other on PostgreSQL; SQLite has one writer anyway.
    query = sa.select(table).where(table.c.collection == sa.bindparam("collection")).with_for_update()
    if named:
        return query.where(table.c.id == sa.bindparam("task"))
    return query.where(table.c.prompt_id == sa.bindparam("prompt"), table.c.purpose == "rank")
