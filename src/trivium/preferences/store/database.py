"""The Store: prompts, completions, tasks, rankings, skips and demonstrations in one database."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from trivium.config import UserError
from trivium.preferences.store import assignment, batches, export, rows, schema, versions
from trivium.preferences.store.judgements import (
    Purpose,
    Refused,
    Task,
    UnknownTask,
    check_annotator,
    distinct,
    task_id,
)
from trivium.preferences.store.progress import Progress, progress
from trivium.preferences.store.submission import submit, submit_edit
from trivium.records import AnnotatorKind, Completion, Conversation, Demonstration, Ranking


class Store:
    """The preference database at a path (SQLite) or URL (`postgresql://…`), made if it is missing.

    Safe to share between threads and, by the database's own locks, between processes. Adding what is there already
    changes nothing, so a stage that was killed can simply run again. Raises UserError where the database cannot be
    opened, is not ours, or is of another schema version; with `create=False` also where it does not exist.
    """

    def __init__(self, location: str | Path, *, create: bool = True) -> None:
        """Open the database and check its schema."""
        self._engine = schema.make_engine(location)
        self.name = self._engine.url.render_as_string(hide_password=True).removeprefix("sqlite:///")
        # SQLite has one writer; threads that wait for a lock of ours wake at once, where the database's own would poll.
        self._writer = threading.RLock()
        self._batches = batches.Batches(self.writing, self._writer)
        if self._engine.dialect.name == "sqlite":
            file = Path(self._engine.url.database or "")
            if not create and not file.is_file():
                raise UserError(f"there is no preference database at {file}; collect responses to compare first")
            file.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            versions.prepare(self._engine, self.name)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        """Return itself, to be closed at the end of a `with`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all connections."""
        self.close()

    # ---- what is asked ----

    def add_completions(self, completions: Iterable[Completion]) -> None:
        """Store completions by content id; their prompts must be there. Raises UserError otherwise."""
        with self.writing() as connection:
            rows.insert_completions(connection, completions)

    def add_tasks(
        self,
        collection: str,
        items: Iterable[tuple[Conversation, Sequence[Completion]]],
        *,
        overlap: int = 1,
    ) -> list[Task]:
        """Store one task per (prompt, completions) with all they hold, and return the tasks in that order.

        Equal completions are asked about once; a prompt left with fewer than two has nothing to rank, so it makes no
        task: the difference in length tells the caller how many. `overlap` annotators of a kind are wanted per task.
        """
        if overlap < 1:
            raise UserError(f"overlap must be at least 1 annotator, got {overlap}")
        wanted = [(prompt, distinct(completions, prompt.id)) for prompt, completions in items]
        wanted = [(prompt, found) for prompt, found in wanted if len(found) >= 2]
        ids = {task_id(collection, prompt.id, found): (prompt.id, list(found)) for prompt, found in wanted}
        with self.writing() as connection:
            rows.insert_new(connection, schema.prompts, (rows.from_prompt(prompt) for prompt, _ in wanted))
            rows.insert_completions(connection, (c for _, found in wanted for c in found.values()))
            values = [
                {"id": name, "prompt_id": prompt_id, "completion_ids": completion_ids, "overlap": overlap}
                for name, (prompt_id, completion_ids) in ids.items()
            ]
            assignment.append(connection, collection, values)
            stored = {row["id"]: rows.to_task(row) for row in rows.by_ids(connection, schema.tasks, ids)}
        return [stored[name] for name in ids]

    def tasks(self, collection: str | None = None, *, kind: AnnotatorKind = "human") -> list[Task]:
        """Return the tasks of a collection (None: of all), in order, with the judgements of `kind` each has."""
        with self.reading() as connection:
            query = rows.tasks_with_counts().order_by(schema.tasks.c.collection, schema.tasks.c.position)
            found = connection.execute(rows.within(query, collection), {"kind": kind})
            return [rows.to_task(row) for row in found.mappings()]

    def questions(self, collection: str | None, purpose: Purpose) -> list[Task]:
        """Return the tasks of one purpose, their judgements not counted."""
        with self.reading() as connection:
            return rows.questions(connection, collection, purpose)

    def task(self, identifier: str, *, kind: AnnotatorKind = "human") -> Task:
        """Return one task. Raises UnknownTask."""
        with self.reading() as connection:
            found = rows.task(connection, identifier, kind)
        if found is None:
            raise UnknownTask(f"there is no task {identifier[:40]!r}; reload the page for the next one")
        return found

    def open_tasks(self, collection: str | None, annotator: str, kind: AnnotatorKind = "human") -> list[Task]:
        """Return what this annotator may be asked: not judged or skipped by them, and with a place left."""
        check_annotator(annotator, kind)
        with self.reading() as connection:
            return assignment.open_tasks(connection, collection, annotator, kind)

    def lease(
        self, tasks: Iterable[Task], annotator: str, kind: AnnotatorKind = "human", seconds: float = assignment.LEASE_S
    ) -> Task | None:
        """Keep the first of these tasks that still has a place for this annotator, and return it; None if none has."""
        with self.writing(durable=False) as connection:
            return assignment.take(connection, tasks, annotator, kind, seconds)

    def add_repeats(self, collection: str, fraction: float, seed: int = 0) -> int:
        """Ask a fraction of the tasks again, of whoever judged them first; return how many repeats were new."""
        with self.writing() as connection:
            return assignment.add_repeats(connection, collection, fraction, seed)

    def add_known(
        self,
        collection: str,
        items: Sequence[tuple[Conversation, Sequence[Completion], Sequence[Sequence[int]]]],
        purpose: Literal["gold", "qualify"] = "gold",
    ) -> int:
        """Store questions with known answers, as groups of places, best first; return how many were new."""
        with self.writing() as connection:
            return assignment.add_known(connection, collection, items, purpose)

    def describe(self, collection: str, *, instructions: str, pass_mark: float = 0.0) -> None:
        """Set what annotators of a collection are told, and the share of known pairs that newcomers must get right."""
        row = {"name": collection, "instructions": instructions, "pass_mark": pass_mark}
        with self.writing() as connection:
            connection.execute(schema.collections.delete().where(schema.collections.c.name == collection))
            connection.execute(schema.collections.insert(), row)

    def description(self, collection: str) -> tuple[str, float]:
        """Return a collection's instructions (empty: none) and its pass mark."""
        with self.reading() as connection:
            return rows.description(connection, collection)

    def set_priorities(self, priorities: Mapping[str, float]) -> None:
        """Set how much an answer to each of these tasks would teach; the higher are asked first."""
        with self.writing() as connection:
            for name, priority in priorities.items():
                connection.execute(schema.tasks.update().where(schema.tasks.c.id == name).values(priority=priority))

    # ---- what is answered ----

    def submit(
        self,
        ranking: Ranking,
        collection: str,
        idempotency_key: str = "",
        *,
        task: str = "",
        revise: bool = False,
        within_overlap: bool = False,
    ) -> bool:
        """Store a judgement and return True; or return False where it is a repeat of one already stored.

        A repeat has the same key or, from the same annotator about the same task, the same content. `task` names the
        task where a prompt has several; a changed mind needs `revise` and becomes a row of its own. `within_overlap`
        refuses (Full) one more than the task wants from an annotator without a live lease.
        Raises Refused (nothing is stored) for a ranking that does not place the task's completions, each once.
        """

        def store(connection: Connection) -> bool:
            return submit(connection, ranking, collection, idempotency_key, task, revise, within_overlap)

        if self._engine.dialect.name == "sqlite":
            return self._batches.run(store)
        with self.writing() as connection:
            return store(connection)

    def adjudicate(self, ranking: Ranking, collection: str, idempotency_key: str, *, task: str) -> bool:
        """Store what a lead decides about a disputed task: it stands in the place of all other judgements of it.

        Those stay stored, and are what the annotators are measured by; a lead who decides again is the one that counts.
        """
        with self.writing() as connection:
            return submit(connection, ranking, collection, idempotency_key, task, revise=True, adjudicates=True)

    def submit_edit(self, task: Task, original: str, text: str, annotator: str) -> bool:
        """Store a person's edit of a task's response as preferred to the original; return False for a repeat."""
        with self.writing() as connection:
            return submit_edit(connection, task, original, text, annotator)

    def submit_many(self, rankings: Iterable[tuple[Ranking, str, str]], collection: str) -> int:
        """Store (ranking, idempotency key, task) in one transaction, all or none, and return how many were new.

        The task may be empty where a prompt has only one.
        """
        with self.writing() as connection:
            return sum(submit(connection, ranking, collection, key, task) for ranking, key, task in rankings)

    def skip(self, task: str, annotator: str, kind: AnnotatorKind, reason: str) -> bool:
        """Record that an annotator passes on a task, and why; return False where they already had."""
        check_annotator(annotator, kind)
        if not reason.strip():
            raise Refused("a skip needs a reason")
        row = {"task_id": task, "annotator": annotator, "kind": kind, "reason": reason, "created_at": rows.now()}
        with self.writing() as connection:
            if not rows.by_ids(connection, schema.tasks, [task]):
                raise UnknownTask(f"there is no task {task[:40]!r}; reload the page for the next one")
            assignment.release(connection, task, annotator, kind)
            return rows.insert_one(connection, schema.skips, row)

    def flag(self, task: str, completion_id: str, annotator: str, reason: str) -> bool:
        """Record that a person finds a response harmful, and why; return False where they already had."""
        check_annotator(annotator, "human")
        row = {"task_id": task, "annotator": annotator, "completion_id": completion_id, "reason": reason}
        with self.writing() as connection:
            found = rows.by_ids(connection, schema.tasks, [task])
            if not found or completion_id not in found[0]["completion_ids"]:
                raise UnknownTask(f"task {task[:40]!r} has no response {completion_id[:40]!r}; reload the page")
            return rows.insert_one(connection, schema.flags, row | {"created_at": rows.now()})

    def add_demonstration(self, demonstration: Demonstration) -> bool:
        """Store the ideal response that a person wrote, with its prompt; return False where it is there already."""
        if not demonstration.response.strip():
            raise Refused("the ideal response is empty")
        check_annotator(demonstration.annotator, "human")
        row = {
            "id": demonstration.id,
            "prompt_id": demonstration.prompt.id,
            "response": demonstration.response,
            "annotator": demonstration.annotator,
            "created_at": rows.now(),
        }
        with self.writing() as connection:
            rows.insert_new(connection, schema.prompts, [rows.from_prompt(demonstration.prompt)])
            return rows.insert_one(connection, schema.demonstrations, row)

    # ---- what is known ----

    def rankings(self, collection: str | None = None, kinds: Collection[AnnotatorKind] | None = None) -> list[Ranking]:
        """Return the valid judgements (the last revision of each), of these kinds of annotator (None: of all).

        Those of ordinary tasks and of edits: repeats and gold say something of the annotators. The order is that of
        tasks and annotators, not that of arrival: a re-run yields the same list.
        """
        return [rows.to_ranking(row) for row in self.ranking_rows(collection, kinds)]

    def ranking_rows(
        self,
        collection: str | None = None,
        kinds: Collection[AnnotatorKind] | None = None,
        purposes: Sequence[Purpose] = ("rank", "edit"),
        *,
        adjudicated: bool = True,
    ) -> list[dict[str, Any]]:
        """Return the same as `rankings`, as rows with their task, its purpose, collection, revision and time.

        Without `adjudicated`, as the annotators judged, whatever a lead decided since.
        """
        table, tasks = schema.rankings, schema.tasks
        about = (tasks.c.prompt_id, tasks.c.collection, tasks.c.completion_ids)
        query = sa.select(table, *about, tasks.c.purpose, tasks.c.repeat_of, tasks.c.gold)
        query = query.join(tasks, tasks.c.id == table.c.task_id).where(tasks.c.purpose.in_(purposes))
        query = query.order_by(tasks.c.collection, tasks.c.position, table.c.kind, table.c.annotator, table.c.revision)
        if kinds is not None:
            query = query.where(table.c.kind.in_(kinds))
        with self.reading() as connection:
            found = connection.execute(rows.within(query, collection)).mappings().all()
        decided = {
            row["task_id"]: row["sequence"]
            for row in sorted(found, key=lambda row: row["sequence"])
            if row["adjudicates"]
        }
        if adjudicated:
            found = [row for row in found if decided.get(row["task_id"], row["sequence"]) == row["sequence"]]
        else:
            found = [row for row in found if not row["adjudicates"]]
        # Later revisions come later and replace, in place, what came before.
        latest = {(row["task_id"], row["kind"], row["annotator"]): row for row in found}
        return [dict(row) for row in latest.values()]

    def prompts(self, ids: Iterable[str]) -> dict[str, Conversation]:
        """Return the prompts by id. Raises UserError naming one that is missing."""
        with self.reading() as connection:
            return {row["id"]: rows.to_prompt(row) for row in rows.all_by_ids(connection, schema.prompts, ids)}

    def completions(self, ids: Iterable[str]) -> dict[str, Completion]:
        """Return the completions by id. Raises UserError naming one that is missing."""
        with self.reading() as connection:
            return {row["id"]: rows.to_completion(row) for row in rows.all_by_ids(connection, schema.completions, ids)}

    def prompt(self, identifier: str) -> Conversation:
        """Return one prompt. Raises UserError when it is missing."""
        return self.prompts([identifier])[identifier]

    def completion(self, identifier: str) -> Completion:
        """Return one completion. Raises UserError when it is missing."""
        return self.completions([identifier])[identifier]

    def demonstrations(self) -> list[Demonstration]:
        """Return all demonstrations, in the order of their ids."""
        with self.reading() as connection:
            query = sa.select(schema.demonstrations).order_by(schema.demonstrations.c.id)
            found = connection.execute(query).mappings().all()
        prompts = self.prompts(row["prompt_id"] for row in found)
        return [
            Demonstration(prompt=prompts[row["prompt_id"]], response=row["response"], annotator=row["annotator"])
            for row in found
        ]

    def collections(self) -> list[str]:
        """Return the names of all collections that ask something, in the order in which they came."""
        table = schema.tasks
        query = sa.select(table.c.collection).group_by(table.c.collection).order_by(sa.func.min(table.c.created_at))
        with self.reading() as connection:
            return list(connection.scalars(query))

    def flags(self, collection: str | None = None) -> list[dict[str, Any]]:
        """Return what people flagged as harmful, with the task, the response, who and why, in the order of time."""
        query = sa.select(schema.flags).join(schema.tasks).order_by(schema.flags.c.created_at)
        with self.reading() as connection:
            return [dict(row) for row in connection.execute(rows.within(query, collection)).mappings()]

    def counts(self) -> dict[str, int]:
        """Return the number of rows of each table, by its name."""
        tables = [table for table in schema.metadata.sorted_tables if table is not schema.schema_version]
        with self.reading() as connection:
            return {t.name: connection.scalar(sa.select(sa.func.count()).select_from(t)) or 0 for t in tables}

    def progress(
        self, collection: str | None = None, kind: AnnotatorKind = "human", annotator: str | None = None
    ) -> Progress:
        """Return how far the ordinary tasks of a collection are with judgements of `kind`, or one annotator with them.

        For an annotator, `done` counts the tasks they have judged, `waiting` those they have neither judged nor
        skipped; `mean_seconds` is their pace (0 before the first).
        """
        with self.reading() as connection:
            return progress(connection, collection, kind, annotator)

    def digest(self, collection: str | None = None, kinds: Collection[AnnotatorKind] | None = None) -> str:
        """Return the SHA-256 of what `rankings` says: equal judgements, equal digest, whenever they were given."""
        return export.digest(self.rankings(collection, kinds))

    def export_jsonl(self, path: Path, collection: str | None = None, *, schema: str = "rankings") -> int:
        """Write the rankings as JSON Lines in one of the field's schemas (`export.WRITERS`); return the lines."""
        found = self.ranking_rows(collection)
        prompts = self.prompts(row["prompt_id"] for row in found)
        completions = self.completions(name for row in found for name in row["completion_ids"])
        return export.WRITERS[schema](path, found, prompts, completions)

    # ---- the database ----

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except schema.OUR_ERRORS:
            raise
        except schema.DATABASE_ERRORS as error:
            raise schema.explain(error, self.name) from error

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection for queries."""
        with self._explained(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self, *, durable: bool = True) -> Iterator[Connection]:
        """Yield a connection in a transaction that is committed at the end, or rolled back as a whole.

        What is not `durable` may be forgotten in a power cut (never half written), and is not waited for.
        """
        options = {"trivium_writes": True, "trivium_durable": durable}
        with self._explained(), self._writer, self._engine.connect().execution_options(**options) as connection:
            with connection.begin():
                yield connection
