"""Checkpoints: one writer for all stages, atomic and verified; safetensors and JSON only.

Written aside, hashed, fsynced, renamed; a reader either finds a whole checkpoint or an older whole one. No stage keeps
hidden random state (every draw is a function of seed and step), so weights, optimizer state, the step and the run's own
counters are all there is to save.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trivium.records import atomic_write, fsync_folder, sha256_file
from trivium.runs.manifest import Run
from trivium.training.distributed import barrier, decide
from trivium.training.optim import Optimizer
from trivium.training.parallel import copy_whole, whole_tensor

KEEP = 2
"""How many whole checkpoints stay: the newest, and one to fall back to."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint: `step` steps are behind it."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(
    run: Run,
    step: int,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint of the run after `step` steps; older ones beyond KEEP are removed once it is whole.

    All ranks must call it: sharded tensors are gathered from them, and rank 0 writes.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        # named_parameters names a tied weight once; safetensors refuses shared storage.
        tensors |= {f"{name}/{key}": whole_tensor(value.detach()) for key, value in module.named_parameters()}
    for name, optimizer in optimizers.items():
        tensors |= {f"{name}#optimizer/{key}": whole_tensor(value) for key, value in optimizer.tensors().items()}
    if run.owner:
        _write(run, step, tensors, state)
    barrier()


def _write(run: Run, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None) -> None:
    folder = run.dir / "checkpoints"
    target, aside = folder / f"{step:08d}", folder / f"{step:08d}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        # Cloned, because an optimizer may hold several views of one storage.
        save_file(
            {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()},
            aside / "tensors.safetensors",
        )
        facts = {"step": step, "run": run.state(), "state": dict(state or {}), "fingerprint": run.manifest.fingerprint}
        atomic_write(aside / "state.json", json.dumps(facts))
        hashes = {path.name: sha256_file(path) for path in sorted(aside.iterdir())}
        atomic_write(aside / "checksums.json", json.dumps(hashes))
        with (aside / "tensors.safetensors").open("rb") as handle:
            os.fsync(handle.fileno())
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        fsync_folder(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in _names(folder)[:-KEEP]:
        shutil.rmtree(old)


def resume(run: Run, *, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> Checkpoint | None:
    """Load the newest whole checkpoint of the run into the modules and optimizers and return it, or None.

    The run's logs are cut back to it. A damaged one is named, set aside as `*.damaged`, and the one before is used.
    Of several ranks, rank 0 picks the checkpoint; a sharded module takes its shards of it, however it was sharded when
    it was written.
    """
    read: dict[str, tuple[Checkpoint, Mapping[str, Any]]] = {}
    newest = decide(lambda: _newest_whole(run, read))
    if newest is None:
        run.events.truncate({"events": 0, "specimens": 0})
        return None
    checkpoint, run_state = read.get(newest) or _read(run.home / "checkpoints" / newest, run.manifest.fingerprint)
    for name, module in modules.items():
        parameters = dict(module.named_parameters())
        for key, value in _under(checkpoint.tensors, f"{name}/").items():
            copy_whole(parameters[key], value)
    for name, optimizer in optimizers.items():
        optimizer.load_tensors(_under(checkpoint.tensors, f"{name}#optimizer/"))
    run.restore(run_state)
    return checkpoint


def _newest_whole(run: Run, read: dict[str, tuple[Checkpoint, Mapping[str, Any]]]) -> str | None:
    """Return the name of the newest checkpoint that is whole, now in `read`; those that are not are set aside."""
    for path in reversed(_names(run.home / "checkpoints")):
        try:
            read[path.name] = _read(path, run.manifest.fingerprint)
            return path.name
        except (OSError, ValueError, KeyError) as error:
            print(f"{path}: damaged ({error}); the checkpoint before it is used", file=sys.stderr)
            path.rename(path.with_suffix(".damaged"))
    return None


def _read(path: Path, fingerprint: str) -> tuple[Checkpoint, Mapping[str, Any]]:
    hashes = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
    found = {p.name for p in path.iterdir()} - {"checksums.json"}
    if found != set(hashes):
        raise ValueError(f"its files are {sorted(found)}, not {sorted(hashes)}")
    for name, expected in hashes.items():
        if sha256_file(path / name) != expected:
            raise ValueError(f"the SHA-256 of {name} is wrong")
    facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if facts["fingerprint"] != fingerprint:
        raise ValueError("it belongs to another configuration")
    checkpoint = Checkpoint(step=facts["step"], tensors=load_file(path / "tensors.safetensors"), state=facts["state"])
    return checkpoint, facts["run"]


def _names(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.name.isdigit()) if folder.is_dir() else []


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
