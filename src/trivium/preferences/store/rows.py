"""Records as rows and rows as records, and the few queries that everything else is made of.

What a page asks at every request is built once, with names for what changes: SQLAlchemy takes longer to build such a
query than SQLite to answer it.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, RowMapping

from trivium.config import UserError
from trivium.preferences.store import schema
from trivium.preferences.store.judgements import Purpose, Task
from trivium.records import Completion, Conversation, Message, Ranking, to_tool_calls

CHUNK = 500
"""Ids per SELECT, well under the databases' limits on bound values."""


def now() -> str:
    """Return the time in UTC, for the `created_at` columns: told to people, part of no id and no digest."""
    return moment(0.0)


def moment(seconds_ahead: float) -> str:
    """Return the time in UTC that many seconds from now; such texts compare as the times do."""
    ahead = datetime.timedelta(seconds=seconds_ahead)
    return (datetime.datetime.now(datetime.UTC) + ahead).isoformat(timespec="milliseconds")


def from_prompt(prompt: Conversation) -> dict[str, Any]:
    """Return the row of a prompt."""
    return {
        "id": prompt.id,
        "messages": prompt.as_dicts(),
        "source": prompt.source,
        "meta": dict(prompt.meta),
        "created_at": now(),
    }


def to_prompt(row: RowMapping) -> Conversation:
    """Return the prompt of a row."""
    messages = tuple(
        Message(role=m["role"], content=m["content"], tool_calls=to_tool_calls(m.get("tool_calls", ())))
        for m in row["messages"]
    )
    return Conversation(messages=messages, source=row["source"], meta=row["meta"])


def from_completion(completion: Completion) -> dict[str, Any]:
    """Return the row of a completion."""
    return {
        "id": completion.id,
        "prompt_id": completion.prompt_id,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "policy": completion.policy,
        "finish_reason": completion.finish_reason,
        "created_at": now(),
    }


def to_completion(row: RowMapping) -> Completion:
    """Return the completion of a row."""
    return Completion(
        prompt_id=row["prompt_id"],
        text=row["text"],
        token_ids=tuple(row["token_ids"]),
        logprobs=tuple(row["logprobs"]),
        policy=row["policy"],
        finish_reason=row["finish_reason"],
    )


def to_task(row: RowMapping) -> Task:
    """Return the task of a row, with its judgements where they were counted."""
    return Task(
        id=row["id"],
        collection=row["collection"],
        prompt_id=row["prompt_id"],
        completion_ids=tuple(row["completion_ids"]),
        overlap=row["overlap"],
        position=row["position"],
        judgements=row.get("judgements", 0),
        purpose=row["purpose"],
        repeat_of=row["repeat_of"] or "",
        gold=tuple(tuple(group) for group in row["gold"] or ()),
        priority=row["priority"],
    )


def to_ranking(row: Mapping[str, Any]) -> Ranking:
    """Return the ranking of a row that was joined with its task."""
    return Ranking(
        prompt_id=row["prompt_id"],
        groups=tuple(tuple(group) for group in row["groups"]),
        annotator=row["annotator"],
        kind=row["kind"],
        none_acceptable=row["none_acceptable"],
        rationale=row["rationale"],
        seconds=row["seconds"],
        order_shown=tuple(row["order_shown"]),
        soft=tuple((first, second, chance) for first, second, chance in row["soft"] or ()),
    )


def within(query: sa.Select[Any], collection: str | None) -> sa.Select[Any]:
    """Return the query narrowed to the tasks of one collection, or as it is for None."""
    return query if collection is None else query.where(schema.tasks.c.collection == collection)


@functools.cache
def tasks_with_counts() -> sa.Select[Any]:
    """Return the query for all tasks with `judgements`, the number of annotators of :kind who have answered.

    Counted task by task, along the index: where the query asks for few tasks, few judgements are looked at.
    """
    table = schema.rankings
    judged = sa.select(sa.func.count(sa.distinct(table.c.annotator)))
    judged = judged.where(table.c.task_id == schema.tasks.c.id, table.c.kind == sa.bindparam("kind"))
    judged = judged.where(~table.c.adjudicates)
    return sa.select(schema.tasks, judged.correlate(schema.tasks).scalar_subquery().label("judgements"))


def task(connection: Connection, identifier: str, kind: str) -> Task | None:
    """Return one task with its judgements of `kind`; None where there is none of that id."""
    row = connection.execute(_task(), {"id": identifier, "kind": kind}).mappings().first()
    return None if row is None else to_task(row)


@functools.cache
def _task() -> sa.Select[Any]:
    return tasks_with_counts().where(schema.tasks.c.id == sa.bindparam("id"))


def questions(connection: Connection, collection: str | None, purpose: Purpose) -> list[Task]:
    """Return the tasks of one purpose, of one collection or of all, their judgements not counted."""
    found = connection.execute(_questions(collection is None), {"collection": collection, "purpose": purpose})
    return [to_task(row) for row in found.mappings()]


@functools.cache
def _questions(everywhere: bool) -> sa.Select[Any]:
    query = sa.select(schema.tasks).where(schema.tasks.c.purpose == sa.bindparam("purpose"))
    return query if everywhere else query.where(schema.tasks.c.collection == sa.bindparam("collection"))


def description(connection: Connection, collection: str) -> tuple[str, float]:
    """Return a collection's instructions (empty: none) and its pass mark."""
    found = connection.execute(_DESCRIPTION, {"name": collection}).first()
    return ("", 0.0) if found is None else (found[0], found[1])


_DESCRIPTION = sa.select(schema.collections.c.instructions, schema.collections.c.pass_mark).where(
    schema.collections.c.name == sa.bindparam("name")
)


def insert_new(connection: Connection, table: sa.Table, values: Iterable[Mapping[str, Any]]) -> None:
    """Insert the rows whose key is not there yet."""
    new = [dict(row) for row in values]
    if new:
        connection.execute(_insert(connection, table), new)


def insert_one(connection: Connection, table: sa.Table, row: Mapping[str, Any]) -> bool:
    """Insert a row and return True, or return False where its key is there already."""
    statement = _insert(connection, table).values(dict(row)).returning(sa.literal(1))
    return connection.scalar(statement) is not None


def _insert(connection: Connection, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()


def insert_completions(connection: Connection, completions: Iterable[Completion]) -> None:
    """Insert the completions that are not there yet. Raises UserError where a prompt is missing."""
    new = list(completions)
    all_by_ids(connection, schema.prompts, (completion.prompt_id for completion in new))
    insert_new(connection, schema.completions, map(from_completion, new))


def by_ids(connection: Connection, table: sa.Table, ids: Iterable[str]) -> list[RowMapping]:
    """Return the rows with these ids, those that exist, in no particular order."""
    names = list(dict.fromkeys(ids))
    found: list[RowMapping] = []
    for start in range(0, len(names), CHUNK):
        found.extend(connection.execute(_with_ids(table), {"ids": names[start : start + CHUNK]}).mappings())
    return found


@functools.cache
def _with_ids(table: sa.Table) -> sa.Select[Any]:
    return sa.select(table).where(table.c.id.in_(sa.bindparam("ids", expanding=True)))


def all_by_ids(connection: Connection, table: sa.Table, ids: Iterable[str]) -> list[RowMapping]:
    """Return the rows with these ids. Raises UserError naming the first that is missing."""
    names = list(dict.fromkeys(ids))
    found = by_ids(connection, table, names)
    if len(found) < len(names):
        known = {row["id"] for row in found}
        missing = next(name for name in names if name not in known)
        raise UserError(f"the preference database has no {table.name.removesuffix('s')} {missing!r}")
    return found
