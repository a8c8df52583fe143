"""A workspace: one pipeline at a time works in it, and what a finished run left in it is looked at before use."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from trivium.config import UserError
from trivium.records import RunManifest, sha256_file


@contextlib.contextmanager
def locked(workspace: Path) -> Iterator[None]:
    """Hold the workspace: two pipelines writing one would overwrite each other's runs."""
    workspace.mkdir(parents=True, exist_ok=True)
    with (workspace / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another trivium process works in {workspace}; wait for it or name another --workspace"
            ) from None
        yield


def damage(folder: Path, manifest: RunManifest) -> str | None:
    """Return what is wrong with a finished run's artifacts, or None."""
    for artifact in manifest.artifacts:
        path = folder / artifact.path
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != artifact.bytes or sha256_file(path) != artifact.sha256:
            return f"{path} is not what the run wrote (its SHA-256 differs)"
    return None
