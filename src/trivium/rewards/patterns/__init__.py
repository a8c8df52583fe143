"""Regular expressions that cannot hang: each search has a second of processor time, in a process kept for it.

`(a+)+b` on thirty letters tries every way to cut them, and Python's engine cannot be stopped from within. The process
ends itself by a timer of the kernel's, which counts processor time: a busy machine changes no answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

SEARCH_S = 1.0
"""Processor seconds that one search may take; more, and it has found nothing."""


class Searcher:
    """Asks a process of its own, which is started when it is first needed and after each search that took too long."""

    def __init__(self, seconds: float = SEARCH_S) -> None:
        """Remember the limit; nothing is started yet."""
        self.seconds = seconds
        self.too_long = 0
        """Searches that took too long so far."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def found(self, pattern: str, text: str) -> bool:
        """Return whether the pattern occurs in the text; a search that takes too long has found nothing."""
        with self._lock:
            asked, answers = self._pipes()
            try:
                asked.write(json.dumps([pattern, text]).encode() + b"\n")
                asked.flush()
                answer = answers.readline()
            except BrokenPipeError:
                answer = b""
            if answer:
                return answer == b"1\n"
            self.close()
            self.too_long += 1
            return False

    def close(self) -> None:
        """End the process, if there is one of ours."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            process.wait()

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        # A forked process must not share its parent's: the two would read each other's answers.
        if self._process is None or self._owner != os.getpid():
            worker = str(Path(__file__).with_name("worker.py"))
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", worker, str(self.seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self._owner = os.getpid()
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout


searcher = Searcher()
"""The one that checks use."""
