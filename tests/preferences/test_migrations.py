"""R33: a database of any earlier schema opens as one of this; up, down and up again, not one judgement differs."""

import sqlite3
import threading

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from trivium.config import UserError
from trivium.preferences.store import Store, schema, versions
from trivium.records import Ranking

from .test_store import NASTY, ask

EARLIER = list(range(1, schema.SCHEMA_VERSION))
OLD_TABLES = ("prompts", "completions", "tasks", "rankings", "skips", "demonstrations")


def take(engine, start, end):
    with engine.connect().execution_options(trivium_writes=True) as connection, connection.begin():
        versions.migrate(connection, start, end)


def fill(location, number):
    """Fill a database of the newest schema; what is older is made from it by going down."""
    with Store(location) as store:
        tasks = store.add_tasks("c", [ask(f"{NASTY} {n}") for n in range(number)], overlap=2)
        given = []
        for place, task in enumerate(tasks):
            for name in ("ann", "bob"):
                ids = task.completion_ids[place % 4 :] + task.completion_ids[: place % 4]
                ranking = Ranking(
                    prompt_id=task.prompt_id, groups=tuple((i,) for i in ids), annotator=name, kind="human"
                )
                given.append((ranking, f"{name}-{task.id}", task.id))
        store.submit_many(given, "c")
        store.skip(tasks[0].id, "eve", "human", NASTY)


def drop_everything(engine):
    with engine.begin() as connection:
        found = sa.MetaData()
        found.reflect(connection)
        found.drop_all(connection)


@pytest.fixture(params=["sqlite", "postgres"])
def empty(request, tmp_path):
    """The location of an empty database and an engine on it."""
    location = tmp_path / "p.db" if request.param == "sqlite" else request.getfixturevalue("postgres")
    engine = schema.make_engine(location)
    if request.param == "postgres":
        drop_everything(engine)
    yield location, engine
    if request.param == "postgres":
        drop_everything(engine)
    engine.dispose()


def test_the_steps_lead_from_nothing_to_the_tables_of_today(empty):
    """No column, type, key or default differs between a database that was migrated and a new one."""
    _, engine = empty
    take(engine, 0, schema.SCHEMA_VERSION)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True, "compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
        assert versions.version(connection, "p") == schema.SCHEMA_VERSION
    steps = ScriptDirectory(str(versions.FOLDER), version_locations=[str(versions.FOLDER)])
    assert steps.get_heads() == [str(schema.SCHEMA_VERSION)]


FULL = pytest.param(50_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])
"""Tasks with two judgements each: 100,000 rows of what people said, 400,000 in all."""


@pytest.mark.parametrize("number", [300, FULL])
@pytest.mark.parametrize("version", EARLIER)
def test_r33_up_down_and_up_again_export_the_same_bytes(empty, tmp_path, version, number):
    location, engine = empty
    fill(location, number)

    def export(name):
        with Store(location) as store:
            assert store.export_jsonl(tmp_path / name) == 2 * number
            return (tmp_path / name).read_bytes(), store.digest(), {t: store.counts()[t] for t in OLD_TABLES}

    before = export("before.jsonl")
    versions.downgrade(location, version)
    with engine.connect() as connection:
        assert versions.version(connection, "p") == version
    assert export("up.jsonl") == before  # opening it has brought it up
    versions.downgrade(location, version)
    versions.downgrade(location, version)  # a second time is nothing to do
    assert export("again.jsonl") == before


def test_what_the_first_release_wrote_opens(tmp_path):
    """A file with the tables of schema 1 as its own code made them, not by going down from ours."""
    path = tmp_path / "p.db"
    take(schema.make_engine(path), 0, 1)
    raw = sqlite3.connect(path)
    raw.execute("""INSERT INTO prompts VALUES ('p', '[{"content":"hi","role":"user"}]', '"s"', '{}', 't')""")
    for name in "ab":
        raw.execute(f"INSERT INTO completions VALUES ('{name}', 'p', '\"{name}\"', '[]', '[]', '\"sft\"', 'stop', 't')")
    raw.execute("""INSERT INTO tasks VALUES ('t', 'c', 0, 'p', '["a","b"]', 1, 't')""")
    ranking = (1, "r", "t", "ann", "human", 0, '[["b"],["a"]]', 0, '""', 2.5, "[]", "k", "t")
    raw.execute(f"INSERT INTO rankings VALUES ({','.join('?' * len(ranking))})", ranking)
    raw.commit()
    raw.close()
    with Store(path) as store:
        (ranking,) = store.rankings("c")
        assert ranking.groups == (("b",), ("a",))
        assert store.tasks()[0].purpose == "rank"
    assert (tmp_path / "p.db.schema-1").is_file()
    with sqlite3.connect(tmp_path / "p.db.schema-1") as kept:
        assert kept.execute("SELECT version FROM trivium_schema").fetchone() == (1,)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        sqlite3.connect(path).execute("DELETE FROM rankings")


def test_a_step_that_fails_leaves_the_old_schema_whole(tmp_path, monkeypatch):
    path = tmp_path / "p.db"
    fill(path, 3)
    versions.downgrade(path, 1)
    before = sqlite3.connect(path).execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall()
    monkeypatch.setattr("alembic.op.drop_column", lambda *_: None)

    def fails(*_):
        raise RuntimeError("power cut")

    monkeypatch.setattr("alembic.operations.Operations.create_table", fails)
    with pytest.raises(Exception, match="power cut"):
        Store(path)
    monkeypatch.undo()
    assert sqlite3.connect(path).execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall() == before
    with Store(path) as store:
        assert len(store.rankings()) == 6


def test_two_that_open_an_old_database_at_once_bring_it_up_once(tmp_path):
    path = tmp_path / "p.db"
    fill(path, 5)
    versions.downgrade(path, 1)
    errors = []

    def open_it():
        try:
            Store(path).close()
        except Exception as error:  # told below
            errors.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with Store(path) as store:
        assert len(store.rankings()) == 10


def test_backup_while_people_rank_and_restore(tmp_path):
    path = tmp_path / "p.db"
    fill(path, 40)
    with Store(path) as store:
        tasks = store.add_tasks("more", [ask(f"more {n}") for n in range(60)])
        stop = threading.Event()

        def vote():
            for task in tasks:
                if stop.is_set():
                    return
                groups = tuple((name,) for name in task.completion_ids)
                store.submit(Ranking(prompt_id=task.prompt_id, groups=groups, annotator="x", kind="human"), "more")

        thread = threading.Thread(target=vote)
        thread.start()
        versions.backup(path, tmp_path / "copy" / "b.db")
        stop.set()
        thread.join()
        expected = store.digest("c")
    with pytest.raises(UserError, match="there already"):
        versions.backup(path, tmp_path / "copy" / "b.db")
    with Store(tmp_path / "copy" / "b.db") as copied:
        assert copied.digest("c") == expected
        whole = copied.digest()
        assert len(copied.rankings("more")) <= 60
    kept = versions.restore(tmp_path / "copy" / "b.db", path)
    with Store(path) as store, Store(kept) as old:
        assert store.digest() == whole
        assert old.digest("c") == expected


def test_what_is_no_backup_is_refused_before_anything_is_touched(tmp_path):
    path = tmp_path / "p.db"
    fill(path, 3)
    good = path.read_bytes()
    (tmp_path / "text").write_text("no database at all\n" * 100)
    whole = tmp_path / "whole.db"
    versions.backup(path, whole)
    damaged = bytearray(whole.read_bytes())
    damaged[4096 * 2 : 4096 * 4] = b"\xff" * 8192
    (tmp_path / "damaged").write_bytes(damaged)
    sqlite3.connect(tmp_path / "other").execute("CREATE TABLE prompts (x)")
    sqlite3.connect(tmp_path / "empty").close()
    for name in ("text", "damaged", "other", "empty", "missing"):
        with pytest.raises(UserError):
            versions.restore(tmp_path / name, path)
        assert path.read_bytes() == good
    for call in (lambda: versions.backup("postgresql://x/y", tmp_path / "z"), lambda: versions.downgrade(path, 0)):
        with pytest.raises(UserError):
            call()
