"""Checkpoints of a run: one writer for all stages, behind the loop's back; one reader, which trusts nothing.

A checkpoint is weights, optimizer state, averages, torch's random state, the step, and what the run has logged and
spent. Batches and samples are functions of seed and step, so there is no loader to save. `save` copies everything and
returns; a thread writes, hashes, fsyncs, renames and removes the older ones (`checkpoint_folder` says how).
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from trivium.config import DiskFull, UserError, is_disk_full
from trivium.runs.manifest import Run
from trivium.training import checkpoint_folder as disk
from trivium.training.average import Average
from trivium.training.checkpoint_folder import Damaged, KeepConfig
from trivium.training.distributed import barrier, decide
from trivium.training.optim import Optimizer
from trivium.training.parallel import copy_whole, whole_tensor
from trivium.training.stopping import StopRequest, graceful_stop, raise_if_stopped


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint: `step` steps are behind it."""

    step: int
    state: Mapping[str, Any]
    """What the stage gave to `save`."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where the run and torch's random numbers stood when it was taken."""

    run: str
    """`Run.state()` as JSON: text, because what it refers to goes on changing."""
    rng: Mapping[str, Tensor]


class Checkpointer:
    """Saves and loads the checkpoints of a run; `with` it, signals wait for a whole step and its checkpoint.

    `modules`, `optimizers` and `averages` are loaded and saved in place, under their names. One write is under way at a
    time; the next save waits for it, and so does the end of `with`. What went wrong with it is raised by the next
    `check`, `save` or `wait`.
    """

    def __init__(
        self,
        run: Run,
        *,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        averages: Mapping[str, Average] | None = None,
        keep: KeepConfig | None = None,
    ) -> None:
        """Prepare; nothing is read or written yet."""
        self.run = run
        self.folder = run.home / "checkpoints"
        self.modules, self.optimizers, self.averages = modules, optimizers, averages or {}
        self.keep = keep or KeepConfig()
        self.stop = StopRequest()
        """Whether a signal asked for the end."""
        self._signals = contextlib.ExitStack()
        self.seconds = 0.0
        """Seconds that the loop has lost to saving."""
        self.best: float | None = None
        """The best value of `keep.best` so far."""
        self._written = threading.Event()
        self._written.set()
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._damaged: dict[Path, str] = {}
        self._step = 0
        run.keep_checkpoints = self.keep.after_the_end

    def __enter__(self) -> Checkpointer:
        """Take the signals over and return itself."""
        self.stop = self._signals.enter_context(graceful_stop())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for the write under way, then give the signals back; beside another error, its own is only told.

        Raises Stopped for a signal that came while the last checkpoint was being written.
        """
        with self._signals:
            if error is None:
                self.wait()
                self.stop.agreed()
                raise_if_stopped(self.stop, self._step)
            elif not self.stop.hurry:
                try:
                    self.wait()
                except UserError as also:
                    print(also, file=sys.stderr)

    def leave_if_asked(self, step: int) -> None:
        """Raise Stopped when a signal asked for it, once the checkpoint of this step is on the disk.

        Without one (the signal has only just come) the next step is the last.
        """
        if self.stop.signal and self._step == step:
            self.wait()
            barrier()  # another rank that left would take the first one with it, in the middle of its write
            raise_if_stopped(self.stop, step)

    # -- saving

    def moment(self) -> Moment:
        """Return where the run stands: what a checkpoint saved later can go back to."""
        return Moment(run=json.dumps(self.run.state()), rng=rng_tensors())

    def is_due(self, step: int, every: int, last: int) -> bool:
        """Tell whether to save after `step`: it is a multiple of `every`, the last, or a signal asked for the end.

        All ranks must ask after every step: a signal that one of them got is all of theirs from then on.
        """
        return bool(self.stop.agreed()) or step % every == 0 or step == last

    def save(
        self,
        step: int,
        state: Mapping[str, Any] | None = None,
        *,
        moment: Moment | None = None,
        score: float | None = None,
    ) -> None:
        """Start writing a checkpoint after `step` steps; everything may change as soon as this returns.

        `state` is JSON-able; `moment` is where resuming puts logs and random numbers (default: where they stand);
        `score` is the value of `keep.best` at this step.
        """
        began = time.monotonic()
        self.wait()
        moment = moment or self.moment()
        live = {**self._tensors(), **{f"rng/{name}": value for name, value in moment.rng.items()}}
        self._step = step
        if self.run.owner:  # every rank takes part in gathering, one writes
            copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in live.items()}
            own = {"step": step, "state": dict(state or {}), "score": score}
            own |= {"fingerprint": self.run.manifest.fingerprint, "run": json.loads(moment.run)}
            self._written.clear()
            target = disk.free_name(self.folder, step)
            # A daemon, so that a second signal does not wait for a slow disk; the *.tmp is removed at the next start.
            self._writer = threading.Thread(target=self._write, args=(target, copies, json.dumps(own)), daemon=True)
            self._writer.start()
        if score is not None and self.keep.is_better(score, self.best):
            self.best = score
        self.seconds += time.monotonic() - began

    def improves(self, metrics: Mapping[str, float]) -> float | None:
        """Return the value of `keep.best` when it is the best so far, else None; raises UserError when it is absent."""
        if not self.keep.best:
            return None
        if self.keep.best not in metrics:
            known = ", ".join(sorted(metrics))
            raise UserError(f"keep.best = {self.keep.best!r}: the evaluation of {self.run.id} gives {known}")
        score = float(metrics[self.keep.best])
        return score if math.isfinite(score) and self.keep.is_better(score, self.best) else None

    def check(self) -> None:
        """Raise what went wrong with a finished write (DiskFull, UserError), and log damage that it met."""
        if not self._written.is_set():
            return
        damaged, self._damaged = self._damaged, {}
        self._tell(damaged, self._step)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Wait until nothing is being written, then `check`."""
        began = time.monotonic()
        while not self._written.wait(1.0):
            pass  # in short waits, between which Python handles signals
        if self._writer is not None:
            # It has said that all is written, and still frees its copies: a process that ended now would abort in that.
            self._writer.join()
            self._writer = None
        self.seconds += time.monotonic() - began
        self.check()

    def _write(self, target: Path, tensors: Mapping[str, Tensor], state: str) -> None:
        """Write and prune; runs in the thread, and leaves its outcome for `check`."""
        try:
            disk.write(target, tensors, state, before_publishing=self.run.events.sync)
            self._damaged |= disk.prune(self.folder, self.keep)
        except (OSError, SafetensorError) as error:
            self._failure = self._explain(error, target, sum(t.numel() * t.element_size() for t in tensors.values()))
        except BaseException as error:  # raised again where somebody sees it
            self._failure = error
        finally:
            self._written.set()

    def _explain(self, error: Exception, target: Path, num_bytes: int) -> UserError:
        """Return what a user is told of a write that failed."""
        older = disk.listing(self.folder)
        kept = f"{older[-1]} is whole and" if older else "there is none before it, but what is finished"
        way_out = f"run the same command again; {kept} is kept"
        if is_disk_full(error):
            free = shutil.disk_usage(self.run.dir).free
            said = f"no space for the checkpoint {target}: it needs {num_bytes:,} bytes and {free:,} are free"
            explained: UserError = DiskFull(f"{said}; free some and {way_out}")
        else:
            explained = UserError(f"the checkpoint {target} could not be written ({error}); mend that and {way_out}")
        explained.__cause__ = error
        return explained

    # -- loading

    def resume(self) -> Checkpoint | None:
        """Load the newest whole checkpoint in place and return it, or None where there is none.

        The run's logs are cut back to it. A damaged one is named, set aside as `*.damaged`, and the one before is used.
        Raises UserError when it is another run's or holds other tensors, DiskFull when the next one cannot fit.
        """
        read: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        newest = decide(lambda: self._newest_whole(read))  # of several ranks, the first looks for all
        checkpoint = None
        if newest is None:
            self.run.events.truncate({"events": 0, "specimens": 0})
        else:
            tensors, facts = read.get(newest) or disk.read(self.folder / newest)
            checkpoint = self._load(self.folder / newest, tensors, facts)
            self._step = checkpoint.step
        scores = [s for path in disk.listing(self.folder) if (s := disk.score_of(path)) is not None]
        self.best = (max if self.keep.highest else min)(scores) if scores else None
        self.check()
        return checkpoint

    def _newest_whole(self, read: dict[str, tuple[dict[str, Tensor], dict[str, Any]]]) -> str | None:
        """Return the name of the newest checkpoint that is whole, now in `read`; those that are not are set aside."""
        disk.sweep(self.folder)
        self._preflight()
        for path in reversed(disk.listing(self.folder)):
            try:
                read[path.name] = disk.read(path)
                return path.name
            except PermissionError:
                raise
            except (Damaged, OSError) as error:
                self._damaged[disk.set_aside(path)] = str(error)
        return None

    def _load(self, path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Checkpoint:
        ours, theirs = self.run.manifest.fingerprint, facts["fingerprint"]
        if theirs != ours and not self.run.settings.allow_changed:
            raise UserError(
                f"{path} belongs to a run of fingerprint {theirs} and this run's is {ours}: its recipe, data or seed "
                "is another; move that folder away to start from the beginning, or say --run.allow-changed to go on"
            )
        parameters = {f"{n}/{key}": p for n, m in self.modules.items() for key, p in module_tensors(m).items()}
        found = {key: value for key, value in tensors.items() if "#" not in key and not key.startswith("rng/")}
        odd = sorted(found.keys() ^ parameters.keys()) or sorted(
            key for key, p in parameters.items() if p.shape != found[key].shape or p.dtype != found[key].dtype
        )
        if odd:
            raise UserError(f"{path} and this model differ in {odd[0]}; move it away to start from the beginning")
        with torch.no_grad():
            for key, value in found.items():
                copy_whole(parameters[key], value)
        for name, optimizer in self.optimizers.items():
            # Copied: the optimizer keeps what it is given, and that is a view of a file which is going to be removed.
            own = {key: value.clone() for key, value in _under(tensors, f"{name}#optimizer/").items()}
            optimizer.load_tensors(own)
        for name, average in self.averages.items():
            average.load_tensors(_under(tensors, f"{name}#average/"))
        set_rng(_under(tensors, "rng/"))
        # The lengths of another run's log say nothing about this one's.
        self.run.restore(facts["run"] | ({"offsets": self.run.events.offsets()} if theirs != ours else {}))
        if theirs != ours:
            self._tell_changed(path, theirs, facts["step"])
        return Checkpoint(step=facts["step"], state=facts["state"])

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            tensors |= {f"{name}/{key}": value for key, value in module_tensors(module).items()}
        for name, optimizer in self.optimizers.items():
            tensors |= {f"{name}#optimizer/{key}": value for key, value in optimizer.tensors().items()}
        for name, average in self.averages.items():
            tensors |= {f"{name}#average/{key}": value for key, value in average.tensors().items()}
        return {name: whole_tensor(value) for name, value in tensors.items()}

    def num_bytes(self) -> int:
        """Return how many bytes the tensors of a checkpoint take, before the first step as well as after it."""
        state = sum(optimizer.state_bytes() for optimizer in self.optimizers.values())
        parts = [module_tensors(module) for module in self.modules.values()]
        parts += [average.tensors() for average in self.averages.values()]
        parts.append(rng_tensors())
        return state + sum(t.numel() * t.element_size() for part in parts for t in part.values())

    def _preflight(self) -> None:
        """Raise DiskFull when a checkpoint cannot fit: better before the first step than at the first save."""
        needed, free = self.num_bytes(), shutil.disk_usage(self.run.dir).free
        if needed > free:
            raise DiskFull(
                f"a checkpoint of {self.run.id} needs {needed:,} bytes and the disk that holds {self.folder} has "
                f"{free:,} free; free some, or name a --workspace on another disk"
            )

    def _tell_changed(self, path: Path, fingerprint: str, step: int) -> None:
        """Say on stderr, in the log and in the manifest that the run goes on from another run's checkpoint."""
        if self.run.owner:
            print(f"{path}: of a run of fingerprint {fingerprint}, allowed; this run goes on from it", file=sys.stderr)
        entry = {"fingerprint": fingerprint, "step": step}
        self.run.notice("checkpoint of another run", entry, step)
        self.run.note(continued_from=[*self.run.state()["summary"].get("continued_from", []), entry])

    def _tell(self, damaged: Mapping[Path, str], step: int) -> None:
        """Name damaged checkpoints on stderr and in the run's log."""
        for path, what in damaged.items():
            print(f"{path}: damaged ({what}); set aside, the checkpoint before it is used", file=sys.stderr)
            self.run.notice("checkpoint damaged", {"path": path.name, "what": what}, step)


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a module, by name: the parameters that are trained, a tied one once.

    Frozen ones (those below adapters) are the parent's, from which the stage has loaded them again.
    """
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def rng_tensors() -> dict[str, Tensor]:
    """Return the state of torch's own random numbers, which nothing of ours draws from but an objective might."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng(states: Mapping[str, Tensor]) -> None:
    """Take `rng_tensors()` back; a device's that is not here is left out."""
    torch.set_rng_state(states["cpu"].clone())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].clone())


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
