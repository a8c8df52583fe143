"""How a judgement is stored: found its task, checked, told from a repeat, appended."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from trivium.preferences.store import rows, schema
from trivium.preferences.store.judgements import AlreadyJudged, Refused, Task, UnknownTask, check_ranking
from trivium.records import Ranking, content_id


def submit(
    connection: Connection, ranking: Ranking, collection: str, key: str, task: str = "", revise: bool = False
) -> bool:
    """Append the judgement and return True, or return False where it is a repeat; see `Store.submit`."""
    asked = _find_task(connection, ranking, collection, task)
    check_ranking(ranking, asked.completion_ids)
    key = key or content_id("submission", asked.id, ranking.id)
    table = schema.rankings
    theirs = (table.c.annotator == ranking.annotator) & (table.c.kind == ranking.kind)
    query = sa.select(table).where(table.c.task_id == asked.id, theirs).order_by(table.c.revision)
    history = connection.execute(query).mappings().all()
    for row in history:
        if row["idempotency_key"] == key:
            if row["ranking_id"] != ranking.id:
                raise Refused(f"the key {key[:40]!r} was used for a different judgement; use a new one")
            return False
    if history and history[-1]["ranking_id"] == ranking.id:
        return False
    if history and not revise:
        raise AlreadyJudged(f"{ranking.annotator} has already judged this task; the first answer was kept")
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
        "created_at": rows.now(),
        "soft": ranking.soft,
    }
    connection.execute(table.insert(), values)
    return True


def _find_task(connection: Connection, ranking: Ranking, collection: str, task: str) -> Task:
    # FOR UPDATE makes two submissions about one task wait for each other on PostgreSQL; SQLite has one writer anyway.
    query = sa.select(schema.tasks).where(schema.tasks.c.collection == collection).with_for_update()
    query = query.where(schema.tasks.c.id == task if task else schema.tasks.c.prompt_id == ranking.prompt_id)
    found = [rows.to_task(row) for row in connection.execute(query).mappings()]
    named = {name for group in ranking.groups for name in group} | set(ranking.order_shown)
    if len(found) > 1:
        found = [each for each in found if set(each.completion_ids) == named]
    if len(found) != 1 or found[0].prompt_id != ranking.prompt_id:
        about = (
            f"task {task[:40]!r}" if task else f"task about prompt {ranking.prompt_id[:40]!r} with these completions"
        )
        raise UnknownTask(f"collection {collection!r} has no {about}")
    return found[0]
