"""How far a collection is, and how fast people are."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from trivium.preferences.store import rows, schema
from trivium.records import AnnotatorKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a collection is: `done` tasks have all the judgements wanted of this kind.

    `waiting` tasks lack some even when every skip counts as an answer: what a pipeline should still wait for, since a
    task that all its annotators passed on will never be done.
    """

    tasks: int
    done: int
    waiting: int
    rankings: int
    skips: int
    mean_seconds: float


def progress(connection: Connection, collection: str | None, kind: AnnotatorKind, annotator: str | None) -> Progress:
    """Return how far a collection is, or one annotator with it; see `Store.progress`."""
    asked = {"collection": collection, "kind": kind, "annotator": annotator}
    one, everywhere = annotator is not None, collection is None
    number, pace = connection.execute(_given(one, everywhere), asked).one()
    passes = Counter(connection.scalars(_passed(one, everywhere), asked))
    skipped = passes.total()
    if one:  # asked for with every task that is shown, so the judgements of others are not counted
        total = connection.scalar(_size(everywhere), asked) or 0
        done, waiting = number, total - number - skipped
    else:
        every = [rows.to_task(row) for row in connection.execute(_counted(everywhere), asked).mappings()]
        total, done = len(every), sum(task.judgements >= task.overlap for task in every)
        waiting = sum(task.judgements + passes[task.id] < task.overlap for task in every)
    pace_s = float(pace or 0.0)
    return Progress(tasks=total, done=done, waiting=waiting, rankings=number, skips=skipped, mean_seconds=pace_s)


def _ordinary(query: sa.Select[Any], everywhere: bool) -> sa.Select[Any]:
    """Return the query narrowed to ordinary tasks, of :collection or of all."""
    query = query.where(schema.tasks.c.purpose == "rank")
    return query if everywhere else query.where(schema.tasks.c.collection == sa.bindparam("collection"))


@functools.cache
def _given(one: bool, everywhere: bool) -> sa.Select[Any]:
    """Return the query for the number of first judgements, of :annotator or of all, and their mean seconds."""
    table = schema.rankings
    query = sa.select(sa.func.count(), sa.func.avg(table.c.seconds)).select_from(table.join(schema.tasks))
    query = query.where(table.c.kind == sa.bindparam("kind"), table.c.revision == 0, ~table.c.adjudicates)
    return _ordinary(query.where(table.c.annotator == sa.bindparam("annotator")) if one else query, everywhere)


@functools.cache
def _passed(one: bool, everywhere: bool) -> sa.Select[Any]:
    """Return the query for the tasks that :annotator skipped, or for a task once for each who did."""
    table = schema.skips
    query = sa.select(table.c.task_id).select_from(table.join(schema.tasks))
    query = query.where(table.c.kind == sa.bindparam("kind"))
    return _ordinary(query.where(table.c.annotator == sa.bindparam("annotator")) if one else query, everywhere)


@functools.cache
def _size(everywhere: bool) -> sa.Select[Any]:
    return _ordinary(sa.select(sa.func.count()).select_from(schema.tasks), everywhere)


@functools.cache
def _counted(everywhere: bool) -> sa.Select[Any]:
    return _ordinary(rows.tasks_with_counts(), everywhere)
