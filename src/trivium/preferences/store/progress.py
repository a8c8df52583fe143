"""How far a collection is, and how fast people are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

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
    answers, skips, tasks = schema.rankings, schema.skips, schema.tasks
    ordinary = tasks.c.purpose == "rank"
    given = sa.select(sa.func.count(), sa.func.avg(answers.c.seconds)).select_from(answers.join(tasks))
    given = given.where(answers.c.kind == kind, answers.c.revision == 0, ~answers.c.adjudicates, ordinary)
    passed = sa.select(skips.c.task_id).select_from(skips.join(tasks)).where(skips.c.kind == kind, ordinary)
    if annotator is not None:
        given = given.where(answers.c.annotator == annotator)
        passed = passed.where(skips.c.annotator == annotator)
    number, pace = connection.execute(rows.within(given, collection)).one()
    passes = Counter(connection.scalars(rows.within(passed, collection)))
    skipped = passes.total()
    if annotator is not None:  # asked for with every task that is shown, so the judgements of others are not counted
        size = connection.scalar(rows.within(sa.select(sa.func.count()).select_from(tasks).where(ordinary), collection))
        total, done, waiting = size or 0, number, (size or 0) - number - skipped
    else:
        query = rows.within(rows.tasks_with_counts(kind).where(ordinary), collection)
        every = [rows.to_task(row) for row in connection.execute(query).mappings()]
        total, done = len(every), sum(task.judgements >= task.overlap for task in every)
        waiting = sum(task.judgements + passes[task.id] < task.overlap for task in every)
    pace_s = float(pace or 0.0)
    return Progress(tasks=total, done=done, waiting=waiting, rankings=number, skips=skipped, mean_seconds=pace_s)
