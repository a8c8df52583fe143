"""The thread that writes checkpoints is gone once it has been waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from trivium.runs.manifest import Run
from trivium.training.checkpoint import Checkpointer

from .conftest import tiny_model


def test_waiting_outlasts_the_thread_and_not_only_its_word(
    make_run: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that still frees its tensors when the interpreter ends would abort the process."""
    write = Checkpointer._write

    def and_linger(self: Checkpointer, *arguments: Any) -> None:
        write(self, *arguments)
        threading.Event().wait(0.3)

    monkeypatch.setattr(Checkpointer, "_write", and_linger)
    before = threading.active_count()
    saver = Checkpointer(make_run("writes"), modules={"model": tiny_model()}, optimizers={})
    saver.save(1)
    saver.wait()
    assert threading.active_count() == before
