"""A checkpoint on disk: whole or absent, and known to be what was written before anything of it is used.

`checkpoints/00000120/` holds `tensors.safetensors`, `state.json` and `checksums.json`: size and SHA-256 of the other
two and, because it could be damaged as well, a checksum of itself. A folder gets its name when all that is in it is on
the disk. A step that is saved again gets a second folder, `00000120-1`; `*.tmp` are unfinished, `*.damaged` set aside.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trivium.config import bounds
from trivium.records import content_id, fsync_folder, sha256_file

TENSORS, STATE, CHECKSUMS = "tensors.safetensors", "state.json", "checksums.json"
FILES = (STATE, TENSORS)
NAME = re.compile(r"(\d{8,})(?:-(\d+))?")


class Damaged(ValueError):
    """A checkpoint is not what was written; says how."""


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """Which checkpoints stay; only whole ones count."""

    last: int = 2
    """The newest ones: the newest, and one to fall back to."""
    best: str = ""
    """Also the one with the best value of this held-out metric (`eval/loss`, say), saved as soon as it is measured;
    empty means none."""
    highest: bool = False
    """Whether the best value is the highest; else it is the lowest."""
    every: int = 0
    """Also those whose step is a multiple of this; 0 means none."""

    def __post_init__(self) -> None:
        """Refuse to keep none."""
        bounds(self, last=(1, None), every=(0, None))

    @property
    def after_the_end(self) -> bool:
        """Whether checkpoints are wanted for more than resuming, and so stay when the run is done."""
        return bool(self.best or self.every)

    def is_better(self, score: float, than: float | None) -> bool:
        """Tell whether a value of the metric is better than another (None: than nothing)."""
        return than is None or (score > than if self.highest else score < than)


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's folder is of."""
    return _order(path)[0]


def _order(path: Path) -> tuple[int, int]:
    match = NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def listing(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first, whether they are whole or not."""
    found = [p for p in folder.iterdir() if NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=_order)


def sweep(folder: Path) -> None:
    """Remove what a killed writer left unfinished."""
    for path in folder.glob("*.tmp") if folder.is_dir() else ():
        shutil.rmtree(path)


def free_name(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step goes: a new place, so that publishing it replaces nothing."""
    name = f"{step:08d}"
    taken = [_order(path)[1] for path in listing(folder) if step_of(path) == step]
    return folder / (f"{name}-{max(taken) + 1}" if taken else name)


def write(target: Path, tensors: Mapping[str, Tensor], state: str, *, before_publishing: Callable[[], None]) -> None:
    """Write a checkpoint: aside, hashed, fsynced, renamed, the rename fsynced. On any error nothing is published."""
    aside = target.with_name(f"{target.name}.tmp")
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True)
        fsync_folder(target.parent.parent)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        save_file(dict(tensors), aside / TENSORS)
        (aside / STATE).write_text(state, encoding="utf-8")
        files = {name: {"bytes": (aside / name).stat().st_size, "sha256": sha256_file(aside / name)} for name in FILES}
        (aside / CHECKSUMS).write_text(_sealed(files), encoding="utf-8")
        for path in sorted(aside.iterdir()):
            _fsync_file(path)
        fsync_folder(aside)
        before_publishing()
        aside.rename(target)
        fsync_folder(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sealed(files: Mapping[str, Any]) -> str:
    return json.dumps({"checksum": content_id("checkpoint", files), "files": files}, indent=1, sort_keys=True) + "\n"


def verify(path: Path) -> None:
    """Raise Damaged unless every file of a checkpoint is there, none else is, and each is what was written."""
    try:
        text = (path / CHECKSUMS).read_bytes().decode("utf-8")
        files: Mapping[str, Any] = json.loads(text)["files"]
        # The text itself is compared: a flip that JSON does not mind (in a space, say) is found too.
        intact = text == _sealed(files) and set(files) == set(FILES)
    except FileNotFoundError:
        raise Damaged(f"{CHECKSUMS} is missing") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{CHECKSUMS} cannot be read: {error}") from None
    if not intact:
        raise Damaged(f"the checksum of {CHECKSUMS} itself is wrong")
    found = {entry.name for entry in path.iterdir()} - {CHECKSUMS}
    if found != set(files):
        odd = sorted(found ^ set(files))[0]
        raise Damaged(f"{odd} is missing" if odd in files else f"{odd} does not belong to it")
    for name, facts in files.items():
        size = (path / name).stat().st_size
        if size != facts["bytes"]:
            raise Damaged(f"{name} has {size:,} bytes, not {facts['bytes']:,}")
        if sha256_file(path / name) != facts["sha256"]:
            raise Damaged(f"the SHA-256 of {name} is wrong")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the state of a checkpoint once it is verified; raises Damaged when it is not whole."""
    verify(path)
    try:
        return load_file(path / TENSORS), json.loads((path / STATE).read_text(encoding="utf-8"))
    except (SafetensorError, ValueError) as error:
        raise Damaged(f"it cannot be read: {error}") from None


def score_of(path: Path) -> float | None:
    """Return the value of the metric that a checkpoint was kept for, or None."""
    try:
        score = json.loads((path / STATE).read_text(encoding="utf-8"))["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(score) if isinstance(score, int | float) else None


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing uses it and somebody can look at it; returns where it is."""
    number, target = 0, path.with_name(f"{path.name}.damaged")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.{number}.damaged")
    return path.rename(target)


def prune(folder: Path, keep: KeepConfig) -> dict[Path, str]:
    """Remove the checkpoints that `keep` does not ask for, and return the damaged ones met, with what is wrong.

    What takes the place of an older one is read back first: a checkpoint that rotted, or that the disk did not take,
    does not count, so there is always a whole one.
    """
    damaged: dict[Path, str] = {}

    def is_whole(path: Path) -> bool:
        try:
            verify(path)
        except (Damaged, OSError) as error:
            damaged[set_aside(path)] = str(error)
            return False
        return True

    steps: dict[int, Path] = {}
    for path in reversed(listing(folder)):
        if len(steps) < keep.last and step_of(path) not in steps and is_whole(path):
            steps[step_of(path)] = path
    if not steps:
        return damaged
    kept = set(steps.values())
    if keep.every:
        newest = {step_of(path): path for path in listing(folder)}  # of two of one step, the later
        kept |= {path for step, path in newest.items() if step % keep.every == 0}
    scores = [(score, path) for path in listing(folder) if (score := score_of(path)) is not None]
    best = sorted(scores, key=lambda pair: -pair[0] if keep.highest else pair[0]) if keep.best else []
    kept |= set(next(([path] for _, path in best if path in steps.values() or is_whole(path)), []))
    for path in listing(folder):
        if path not in kept:
            # Renamed first: a kill in the middle leaves a *.tmp, not something that looks like a damaged checkpoint.
            shutil.rmtree(path.rename(path.with_name(f"{path.name}.tmp")))
    return damaged
