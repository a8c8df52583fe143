r"""The tables, and how a database is opened.

Text that people or models wrote is kept as JSON with `\u` escapes: then a NUL (which PostgreSQL refuses in text) or a
lone surrogate (which no UTF-8 can hold) in a model's output can neither crash nor change.
Rankings are append-only: a correction is a row with the next `revision`, and on SQLite a trigger refuses anything else.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect, Engine

from trivium.config import DiskFull, UserError

SCHEMA_VERSION = 2
"""Raised by one with every change of a table, together with a migration in `migrations/`."""

BUSY_S = 30.0
"""How long a writer waits for another process that holds the SQLite lock."""


class JsonText(sa.types.TypeDecorator[Any]):
    """Any JSON-able value, kept as ASCII text."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Return the text to be stored."""
        return json.dumps(value, separators=(",", ":"), sort_keys=True)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """Return the value that was stored."""
        return None if value is None else json.loads(value)


metadata = sa.MetaData()

schema_version = sa.Table(
    "trivium_schema",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
)
prompts = sa.Table(
    "prompts",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("messages", JsonText, nullable=False),
    sa.Column("source", JsonText, nullable=False),
    sa.Column("meta", JsonText, nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
)
completions = sa.Table(
    "completions",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("prompt_id", sa.ForeignKey("prompts.id"), nullable=False, index=True),
    sa.Column("text", JsonText, nullable=False),
    sa.Column("token_ids", JsonText, nullable=False),
    sa.Column("logprobs", JsonText, nullable=False),
    sa.Column("policy", JsonText, nullable=False),
    sa.Column("finish_reason", sa.String(16), nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
)
tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("collection", sa.String(200), nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("prompt_id", sa.ForeignKey("prompts.id"), nullable=False),
    sa.Column("completion_ids", JsonText, nullable=False),
    sa.Column("overlap", sa.Integer, nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
    sa.Column("purpose", sa.String(16), nullable=False, server_default="rank"),
    sa.Column("repeat_of", sa.String(64), nullable=True),
    sa.Column("gold", JsonText, nullable=True),
    sa.Column("priority", sa.Float, nullable=False, server_default="0"),
    sa.UniqueConstraint("collection", "position"),
    sa.Index("tasks_by_prompt", "collection", "prompt_id"),
)
rankings = sa.Table(
    "rankings",
    metadata,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("ranking_id", sa.String(64), nullable=False),
    sa.Column("task_id", sa.ForeignKey("tasks.id"), nullable=False),
    sa.Column("annotator", sa.String(200), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("groups", JsonText, nullable=False),
    sa.Column("none_acceptable", sa.Boolean, nullable=False),
    sa.Column("rationale", JsonText, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("order_shown", JsonText, nullable=False),
    sa.Column("idempotency_key", sa.String(200), nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
    sa.Column("adjudicates", sa.Boolean, nullable=False, server_default=sa.false()),
    # Null in rows of schema 1: rows are never rewritten.
    sa.Column("soft", JsonText, nullable=True),
    sa.UniqueConstraint("task_id", "annotator", "kind", "revision"),
    sa.UniqueConstraint("task_id", "annotator", "kind", "idempotency_key"),
    sqlite_autoincrement=True,
)
skips = sa.Table(
    "skips",
    metadata,
    sa.Column("task_id", sa.ForeignKey("tasks.id"), primary_key=True),
    sa.Column("annotator", sa.String(200), primary_key=True),
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("reason", JsonText, nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
)
demonstrations = sa.Table(
    "demonstrations",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("prompt_id", sa.ForeignKey("prompts.id"), nullable=False, index=True),
    sa.Column("response", JsonText, nullable=False),
    sa.Column("annotator", sa.String(200), nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
)

collections = sa.Table(
    "collections",
    metadata,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("instructions", JsonText, nullable=False),
    sa.Column("pass_mark", sa.Float, nullable=False),
)
leases = sa.Table(
    "leases",
    metadata,
    sa.Column("task_id", sa.ForeignKey("tasks.id"), primary_key=True),
    sa.Column("annotator", sa.String(200), primary_key=True),
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("expires_at", sa.String(40), nullable=False),
)
flags = sa.Table(
    "flags",
    metadata,
    sa.Column("task_id", sa.ForeignKey("tasks.id"), primary_key=True),
    sa.Column("annotator", sa.String(200), primary_key=True),
    sa.Column("completion_id", sa.ForeignKey("completions.id"), primary_key=True),
    sa.Column("reason", JsonText, nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
)
people = sa.Table(
    "people",
    metadata,
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
    sa.Column("revoked_at", sa.String(40), nullable=True),
)
# Of tokens only the SHA-256 is kept: who reads the database cannot sign in with it.
invitations = sa.Table(
    "invitations",
    metadata,
    sa.Column("token_hash", sa.String(64), primary_key=True),
    sa.Column("name", sa.ForeignKey("people.name"), nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
    sa.Column("expires_at", sa.String(40), nullable=False),
    sa.Column("used_at", sa.String(40), nullable=True),
)
sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("token_hash", sa.String(64), primary_key=True),
    sa.Column("name", sa.ForeignKey("people.name"), nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
    sa.Column("expires_at", sa.String(40), nullable=False),
)

for _verb in ("UPDATE", "DELETE"):
    sa.event.listen(
        rankings,
        "after_create",
        sa.DDL(  # type: ignore[no-untyped-call]  # SQLAlchemy 2.1 leaves this constructor untyped
            f"CREATE TRIGGER rankings_no_{_verb.lower()} BEFORE {_verb} ON rankings "
            "BEGIN SELECT RAISE(ABORT, 'rankings are append-only'); END"
        ).execute_if(dialect="sqlite"),
    )


def make_engine(location: str | Path) -> Engine:
    """Return an engine for a file's path or a database URL; nothing is opened yet.

    Raises UserError for a URL that no installed driver understands.
    """
    text = str(location)
    if "://" not in text:
        url = sa.URL.create("sqlite", database=str(Path(text).expanduser()))
    else:
        try:
            url = sa.make_url(text)
            if url.drivername in ("postgresql", "postgres"):
                url = url.set(drivername="postgresql+psycopg")
        except sa.exc.ArgumentError as error:
            raise UserError(f"{text!r} is no database URL; name a file, or postgresql://user@host/name") from error
    try:
        if url.drivername == "postgresql+psycopg":
            import psycopg  # An extra: needed only by those who name such a database.

            engine = sa.create_engine(url, module=psycopg)
        else:
            engine = sa.create_engine(url, connect_args={"timeout": BUSY_S} if url.drivername == "sqlite" else {})
    except (sa.exc.ArgumentError, ImportError) as error:
        raise UserError(
            f"no driver for {url.drivername!r} databases is installed; use a file, or install trivium[postgres]"
        ) from error
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # The driver must not begin transactions by itself: it would do so lazily, and a reader that turns writer half-way
    # fails with "locked" at once instead of waiting.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    writes = options.get("trivium_writes", False)
    if writes:
        # FULL: an acknowledged judgement outlives a power cut, for one wait for the disk that a person does not notice.
        durable = options.get("trivium_durable", True)
        connection.exec_driver_sql(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def explain(error: BaseException, name: str) -> UserError:
    """Return the one sentence that a database error means to a user."""
    reason = str(getattr(error, "orig", None) or error).splitlines()[0]
    if "disk is full" in reason or "No space left" in reason:
        return DiskFull(f"no space left for {name}; free some and run again, everything confirmed so far is kept")
    if "locked" in reason:
        return UserError(f"{name} was locked by another process for {BUSY_S:.0f} s; stop that process and try again")
    if "not a database" in reason or "malformed" in reason:
        return UserError(f"{name} is not a preference database ({reason}); move it away or name another")
    if "readonly" in reason or "unable to open" in reason:
        return UserError(f"{name} cannot be opened for writing ({reason}); check the folder and its permissions")
    return UserError(f"the preference database {name} failed: {reason}")


DATABASE_ERRORS = (sa.exc.DatabaseError, sqlite3.Error)
"""What the driver raises."""

OUR_ERRORS = (sa.exc.ProgrammingError, sa.exc.IntegrityError, sa.exc.InterfaceError)
"""Those of them that are a fault of this code and deserve their traceback."""
