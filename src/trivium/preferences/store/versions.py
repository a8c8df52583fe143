"""Which schema a database has, and how it gets the one that is known here.

An empty database gets the tables as they are now; one of an earlier version is taken through the migrations, each in
the same transaction as the check, so that it has either the old schema or the new. On SQLite the old file is copied
first. Of a newer schema, or of tables that are not ours, nothing is touched.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from trivium.config import UserError
from trivium.preferences.store import schema

FOLDER = Path(__file__).parent / "migrations"


def prepare(engine: Engine, name: str) -> None:
    """Create the tables in an empty database, or bring those found to the schema known here.

    Raises UserError for a newer or an unknown schema.
    """
    with engine.connect() as connection:
        found = version(connection, name)
    if found == schema.SCHEMA_VERSION:
        return
    if found:
        keep_copy(engine, found)
    with engine.connect().execution_options(trivium_writes=True) as connection, connection.begin():
        found = version(connection, name)  # Another process may have been quicker.
        if not found:
            schema.metadata.create_all(connection)
            connection.execute(schema.schema_version.insert().values(version=schema.SCHEMA_VERSION))
        elif found < schema.SCHEMA_VERSION:
            migrate(connection, found, schema.SCHEMA_VERSION)


def version(connection: Connection, name: str) -> int:
    """Return the schema of a database, 0 for an empty one.

    Raises UserError for a newer one, and for tables that are not ours.
    """
    found = set(sa.inspect(connection).get_table_names())
    if schema.schema_version.name not in found:
        if found & set(schema.metadata.tables):
            raise UserError(f"{name} holds tables that Trivium did not make; name another database")
        return 0
    known = connection.scalar(sa.select(sa.func.max(schema.schema_version.c.version)))
    if not known or known > schema.SCHEMA_VERSION:
        raise UserError(
            f"{name} has preference schema {known}, this Trivium knows {schema.SCHEMA_VERSION}; "
            "use the version of Trivium that wrote it, or another database"
        )
    return int(known)


def migrate(connection: Connection, start: int, end: int) -> None:
    """Take the database from one schema to another, up or down, in the transaction of `connection`."""
    # Needed by nobody whose database is new.
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(FOLDER), version_locations=[str(FOLDER)])
    up = end > start
    walk = script._upgrade_revs if up else script._downgrade_revs  # as Alembic's cookbook has it, for want of an ini

    def steps(found: Any, _context: Any) -> Any:
        return walk(str(end), found)

    # Where a database stands is told by `trivium_schema`, which older versions read too; Alembic wants a table of its
    # own for as long as it works.
    table = sa.Table("trivium_migration", sa.MetaData(), sa.Column("version_num", sa.String(32), primary_key=True))
    table.drop(connection, checkfirst=True)
    table.create(connection)
    if start:
        connection.execute(table.insert().values(version_num=str(start)))
    with EnvironmentContext(Config(), script, fn=steps) as environment:
        environment.configure(connection=connection, version_table=table.name)
        environment.run_migrations()
    table.drop(connection)


def keep_copy(engine: Engine, found: int) -> Path | None:
    """Copy a SQLite file beside itself before it is changed and return the copy; a server's keeper makes their own."""
    if engine.dialect.name != "sqlite" or not engine.url.database:
        return None
    source = Path(engine.url.database)
    target = source.with_name(f"{source.name}.schema-{found}")
    if not target.exists():
        copy(source, target)
    return target


def copy(source: Path, target: Path) -> None:
    """Write a whole copy of a SQLite database, also while others write to it; published once complete."""
    # A name of its own: others may be copying at the same moment.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        aside = Path(folder) / target.name
        reading, writing = sqlite3.connect(source), sqlite3.connect(aside)
        try:
            reading.backup(writing)
        finally:
            writing.close()
            reading.close()
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.replace(target)


def backup(location: str | Path, target: Path) -> None:
    """Write a whole copy of a SQLite database to `target`, which must not exist; others may write meanwhile.

    Raises UserError for a database that is missing or no file (a server has tools of its own).
    """
    source = _file(location)
    if target.exists():
        raise UserError(f"{target} is there already; name another file")
    target.parent.mkdir(parents=True, exist_ok=True)
    copy(source, target)


def restore(source: Path, location: str | Path) -> Path | None:
    """Put a backup in a database's place and return where what stood there was kept (None: nothing did).

    Raises UserError for a backup that is missing, damaged, not ours or of a newer schema, before anything is touched.
    """
    if not source.is_file():
        raise UserError(f"there is no backup {source}")
    _check(source)
    target = _file(location, missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = None
    if target.exists():
        kept = next(
            place
            for number in range(10_000)
            if not (place := target.with_name(f"{target.name}.before-restore-{number}")).exists()
        )
        copy(target, kept)
    for rest in ("-wal", "-shm"):  # they belong to the file that goes
        target.with_name(target.name + rest).unlink(missing_ok=True)
    copy(source, target)
    return kept


def downgrade(location: str | Path, end: int) -> None:
    """Take a database back to an earlier schema, after a copy; raises UserError for one that there never was."""
    engine = schema.make_engine(location)
    name = engine.url.render_as_string(hide_password=True).removeprefix("sqlite:///")
    if engine.dialect.name == "sqlite":
        _file(location)
    try:
        with engine.connect() as connection:
            found = version(connection, name)
        if not 1 <= end <= found:
            raise UserError(f"{name} has schema {found}; it can go back to 1 at the least, not to {end}")
        keep_copy(engine, found)
        with engine.connect().execution_options(trivium_writes=True) as connection, connection.begin():
            if end < found:
                migrate(connection, found, end)
    except schema.DATABASE_ERRORS as error:
        raise schema.explain(error, name) from error
    finally:
        engine.dispose()


def _file(location: str | Path, *, missing_ok: bool = False) -> Path:
    if "://" in str(location) and not str(location).startswith("sqlite:"):
        raise UserError("this works on a file; for a server use its own tools, such as pg_dump and pg_restore")
    path = Path(schema.make_engine(location).url.database or "")
    if not missing_ok and not path.is_file():
        raise UserError(f"there is no preference database at {path}")
    return path


def _check(path: Path) -> None:
    """Raise UserError unless a file is a whole database of ours."""
    try:
        reading = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)
        try:
            (said,) = reading.execute("PRAGMA integrity_check").fetchone()
        finally:
            reading.close()
        if said != "ok":
            raise UserError(f"{path} is damaged ({str(said).splitlines()[0]}); restore another backup")
        engine = schema.make_engine(path)
        with engine.connect() as connection:
            if not version(connection, str(path)):
                raise UserError(f"{path} is an empty database, not a backup")
        engine.dispose()
    except schema.DATABASE_ERRORS as error:
        raise schema.explain(error, str(path)) from error
