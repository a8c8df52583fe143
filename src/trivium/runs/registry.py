"""Where runs are found: a workspace is one folder, and an artifact is named by a short text.

`"sft@latest"` is the newest finished run of that table; `"sft-1a2b…"` a run; a path with a separator a model folder
from elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from trivium.config import ConfigError, suggest
from trivium.records import RunManifest
from trivium.runs.manifest import read_manifest


def list_runs(workspace: Path) -> list[tuple[Path, RunManifest]]:
    """Return (folder, manifest) of every run in the workspace, oldest first."""
    return sorted(_scan(workspace), key=lambda pair: (pair[1].started_at, pair[1].run_id))


def _scan(workspace: Path) -> Iterator[tuple[Path, RunManifest]]:
    if not workspace.is_dir():
        return
    for path in workspace.glob("*/*/manifest.json"):
        manifest = read_manifest(path.parent)
        if manifest is not None:
            yield path.parent, manifest


def latest_runs(workspace: Path) -> dict[str, tuple[Path, RunManifest]]:
    """Return the newest finished run of each table, in the order in which they finished.

    Newest is by `finished_at`, then by start: a run that is redone replaces the earlier one.
    """
    done = [pair for pair in list_runs(workspace) if pair[1].status == "done"]
    done.sort(key=lambda pair: (pair[1].finished_at, pair[1].started_at))
    return {manifest.table: (folder, manifest) for folder, manifest in done}


def resolve(workspace: Path, reference: str, *, base: Path, current: dict[str, str] | None = None) -> str:
    """Return the run id, or the absolute path of a folder, that `reference` names.

    `current` maps tables to the run ids of the pipeline going on: `@latest` means these before anything older.
    Raises ConfigError when there is no such run or folder.
    """
    if os.sep in reference or reference.startswith("."):
        folder = (base / Path(reference).expanduser()).resolve()
        if not (folder / "config.json").is_file():
            raise ConfigError(f"no Hugging Face model folder at {folder} (it has no config.json)")
        return str(folder)
    table, at, version = reference.partition("@")
    if at and version == "latest":
        if current and table in current:
            return current[table]
        runs = latest_runs(workspace)
        if table in runs:
            return runs[table][1].run_id
        known = sorted(set(runs) | set(current or {}))
        raise ConfigError(
            f"{reference}: no finished run of {table!r} in {workspace}; run that stage first"
            + (suggest(table, known) if known else "")
        )
    if at and version != "final":
        raise ConfigError(
            f"{reference}: only the end of a run is kept; name {table!r} itself, or a stage's 'sft@latest'"
        )
    for folder, manifest in list_runs(workspace):
        if manifest.run_id == table:
            if manifest.status != "done":
                raise ConfigError(f"{reference}: that run is {manifest.status}, not done; run it to its end first")
            return folder.name
    raise ConfigError(f"no run {reference!r} in {workspace}; name a stage as 'sft@latest' or a run id")


def model_folder(workspace: Path, reference: str, *, base: Path | None = None) -> Path:
    """Return the Hugging Face folder of the model that `reference` names."""
    found = resolve(workspace, reference, base=base or Path.cwd())
    return Path(found) if os.sep in found else workspace / found.rsplit("-", 1)[0] / found / "model"
