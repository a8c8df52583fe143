"""Writes that share a transaction: one refused takes no other along, and nobody is told before the commit."""

import contextlib
import threading

import pytest
import sqlalchemy as sa

from trivium.preferences.store import Refused, Store
from trivium.preferences.store.batches import Batches

from .test_store import ask, rank


def test_those_that_wait_share_a_commit_and_a_refusal_is_its_own(tmp_path):
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'x.db'}")
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE numbers (n INTEGER PRIMARY KEY)"))
    commits, first_is_in, go = [], threading.Event(), threading.Event()

    @contextlib.contextmanager
    def transaction():
        with engine.begin() as connection:
            yield connection
        commits.append(1)

    batches = Batches(transaction, threading.RLock())
    told = {}

    def write(number):
        def work(connection):
            if number == 0:
                first_is_in.set()
                go.wait(10)
            connection.execute(sa.text("INSERT INTO numbers VALUES (:n)"), {"n": number})
            if number % 4 == 3:
                raise Refused(f"no {number}")
            return number

        try:
            told[number] = batches.run(work)
        except Refused as error:
            told[number] = str(error)

    threads = [threading.Thread(target=write, args=[n]) for n in range(12)]
    threads[0].start()
    first_is_in.wait(10)
    for thread in threads[1:]:
        thread.start()
    while len(batches._waiting) < 11:
        pass
    go.set()
    for thread in threads:
        thread.join()
    assert told == {n: f"no {n}" if n % 4 == 3 else n for n in range(12)}
    assert len(commits) == 2, "the first alone, then all who waited for it"
    with engine.connect() as connection:
        assert set(connection.scalars(sa.text("SELECT n FROM numbers"))) == {n for n in range(12) if n % 4 != 3}


def test_where_the_commit_fails_everybody_is_told(tmp_path):
    @contextlib.contextmanager
    def transaction():
        with sa.create_engine("sqlite://").begin() as connection:
            yield connection
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Batches(transaction, threading.RLock()).run(lambda connection: 1)


def test_judgements_wait_for_the_disk_and_leases_do_not(tmp_path):
    with Store(tmp_path / "p.db") as store:
        (task,) = store.add_tasks("c", [ask("p")])
        said = []
        sa.event.listen(store._engine, "before_cursor_execute", lambda *given: said.append(given[2]))
        store.lease([task], "ann")
        assert said[0] == "PRAGMA synchronous=NORMAL"
        said.clear()
        store.submit(rank(task), "c")
        assert said[0] == "PRAGMA synchronous=FULL"
