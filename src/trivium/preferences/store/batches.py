"""Many small writes in few transactions: SQLite waits for the disk at each commit, so those that wait share one.

Whoever comes first does the work of all who came meanwhile, each within a savepoint of its own: a judgement that is
refused takes no other with it, and nobody is told "stored" before the commit that holds it has returned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy.engine import Connection

T = TypeVar("T")


@dataclass
class _Job:
    work: Callable[[Connection], Any]
    done: bool = False
    result: Any = None
    error: BaseException | None = None


class Batches:
    """Runs writes of many threads, as many as wait in one transaction."""

    def __init__(self, transaction: Callable[[], AbstractContextManager[Connection]], turn: threading.RLock) -> None:
        """Open transactions with `transaction`; `turn` is the lock of whoever writes."""
        self._transaction = transaction
        self._turn = turn
        self._lock = threading.Lock()
        self._waiting: list[_Job] = []

    def run(self, work: Callable[[Connection], T]) -> T:
        """Return what `work` does with a connection, once it is committed; raises what it raised, stored by nobody."""
        job = _Job(work)
        with self._lock:
            self._waiting.append(job)
        with self._turn:
            if not job.done:  # else whoever had the turn before has done it
                with self._lock:
                    batch, self._waiting = self._waiting, []
                self._commit(batch)
        if job.error is not None:
            raise job.error
        result: T = job.result
        return result

    def _commit(self, batch: list[_Job]) -> None:
        try:
            with self._transaction() as connection:
                for job in batch:
                    try:
                        with connection.begin_nested():
                            job.result = job.work(connection)
                    except Exception as error:
                        job.error = error
        except BaseException as error:  # nothing of the batch was stored
            for job in batch:
                job.error = error
        finally:
            for job in batch:
                job.done = True
