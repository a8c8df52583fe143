"""A run: its folder, its manifest, and what a stage may say about itself while it works.

Layout: `<workspace>/<table>/<run_id>/` with `manifest.json`, `events.jsonl`, `specimens.jsonl`, `checkpoints/`
(private to the run) and `model/` (Hugging Face layout) where there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trivium import __version__
from trivium.config import RunSettings
from trivium.records import (
    Artifact,
    Cost,
    EvalResult,
    RunManifest,
    atomic_write,
    content_id,
    from_dict,
    sha256_file,
    to_dict,
)
from trivium.runs.events import EventLog

MANIFEST = "manifest.json"
WANTED = "wanted"
"""The empty file among the checkpoints of a finished run that are to stay."""
PRIVATE = {"manifest.json", "events.jsonl", "specimens.jsonl", "checkpoints"}
"""What in a run's folder is not an artifact: it is rewritten, appended to, or private to the run."""


def fingerprint(
    *,
    stage: str,
    config: Mapping[str, Any],
    parents: Mapping[str, str],
    inputs: Mapping[str, str],
    seed: int,
    settings: Mapping[str, Any],
) -> str:
    """Return the hash of everything that determines a run's artifacts."""
    return content_id("run", __version__, stage, config, parents, inputs, seed, settings)


def read_manifest(folder: Path) -> RunManifest | None:
    """Return the manifest in a run's folder, or None where there is none that can be read."""
    try:
        return from_dict(RunManifest, json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def carried_cost(previous: RunManifest) -> Cost:
    """Return the cost that an unfinished run goes on counting from, until a checkpoint says better.

    What a run that was stopped had computed is done again where no checkpoint holds it, and must not count twice.
    """
    return dataclasses.replace(previous.cost, tokens=0, flops=0.0) if previous.status == "stopped" else previous.cost


def is_base(manifest: RunManifest | None) -> bool:
    """Tell whether a run left a base model: pre-trained, or adapted from one; all others are taken for chat models."""
    return manifest is not None and (manifest.stage == "pretrain" or manifest.summary.get("is_base") is True)


class Run:
    """One execution of a stage; everything the stage leaves behind goes through it.

    A stage reads `run.parent(field)` (the folder of an artifact named in its Config), `run.input(text)` (a user's
    path), `run.seed`, `run.settings` and `run.workspace`, writes files under `run.dir`, and reports through
    `metric`, `sample`, `specimen`, `result`, `note` and `spend`.
    """

    def __init__(
        self,
        manifest: RunManifest,
        *,
        folder: Path,
        workspace: Path,
        settings: RunSettings,
        base: Path,
        home: Path | None = None,
    ) -> None:
        """Make the folder if need be and open the log; `base` is what relative input paths start from.

        Of several ranks the first owns the run. The others write into a `folder` that is thrown away, and `home` is
        the owner's, where checkpoints are read.
        """
        self.manifest = manifest
        self.dir = folder
        self.home = home or folder
        self.owner = self.home == folder
        self.workspace = workspace
        self.settings = settings
        self.base = base
        self.keep_checkpoints = False
        """Whether the checkpoints stay when the run is done (a stage's wish)."""
        self.dir.mkdir(parents=True, exist_ok=True)
        _sweep(self.dir)
        self.events = EventLog(folder, manifest.run_id)
        self._results: list[EvalResult] = []
        self._summary: dict[str, Any] = {}
        self._cost = manifest.cost
        self._started = time.monotonic()
        self._energy = energy_joules()
        reset_peak_memory()

    @property
    def id(self) -> str:
        """The run id, `<table>-<fingerprint>`."""
        return self.manifest.run_id

    @property
    def seed(self) -> int:
        """The seed every random choice of this run follows from."""
        return self.manifest.seed

    def parent(self, field: str) -> Path:
        """Return the folder that the Config field `field` (a Ref) resolved to."""
        return self.parents_of(field)[0]

    def parents_of(self, field: str) -> list[Path]:
        """Return the folders that a Config field holding several Refs resolved to, in order."""
        found = [v for k, v in self.manifest.parents.items() if k == field or k.startswith(f"{field}.")]
        return [Path(v) if os.sep in v else self.workspace / v.rsplit("-", 1)[0] / v for v in found]

    def model(self, field: str) -> Path:
        """Return the model folder of the artifact in `field`: a run's `model/`, or the Hugging Face folder itself."""
        folder = self.parent(field)
        return folder if (folder / "config.json").is_file() else folder / "model"

    def input(self, text: str) -> Path:
        """Return a user's path, relative ones taken from the recipe's folder."""
        return (self.base / Path(text).expanduser()).resolve()

    # -- what a stage says about itself

    def metric(self, name: str, value: float, step: int) -> None:
        """Record a number at a step (`group/name`)."""
        self.events.metric(name, value, step)

    def sample(self, name: str, value: Any, step: int) -> None:
        """Record something to look at along the way."""
        self.events.sample(name, value, step)

    def notice(self, name: str, value: Any, step: int) -> None:
        """Record something unusual that a reader of the log must know."""
        self.events.notice(name, value, step)

    def specimen(self, name: str, value: Any, step: int = 0) -> bool:
        """Keep one specimen for the walkthrough (about twenty of a name are kept)."""
        return self.events.specimen(name, value, step)

    def result(
        self,
        task: str,
        metric: str,
        value: float,
        *,
        low: float = math.nan,
        high: float = math.nan,
        n: int = 0,
        checkpoint: str = "",
    ) -> None:
        """Record a measured figure with its 95% interval (NaN where none was estimated) and item count."""
        self._results.append(
            EvalResult(
                task=task, metric=metric, value=value, low=low, high=high, n=n, seed=self.seed, checkpoint=checkpoint
            )
        )

    def note(self, **facts: Any) -> None:
        """Add facts to the manifest's summary (JSON-able: names, counts, small tables)."""
        self._summary.update(facts)

    def machine(self, **facts: Any) -> None:
        """Add facts about the machine, which a rerun elsewhere need not share, to the manifest's `host`."""
        self.manifest = dataclasses.replace(self.manifest, host={**self.manifest.host, **facts})

    def spend(self, *, tokens: int = 0, flops: float = 0.0) -> None:
        """Add to the run's cost."""
        self._cost = dataclasses.replace(self._cost, tokens=self._cost.tokens + tokens, flops=self._cost.flops + flops)

    def cost(self) -> Cost:
        """Return the cost so far, resumed parts included."""
        seconds = self._cost.seconds + time.monotonic() - self._started
        peak = max(self._cost.peak_memory_bytes, peak_memory_bytes())
        cost = dataclasses.replace(self._cost, seconds=round(seconds, 3), peak_memory_bytes=peak)
        now_energy = energy_joules()
        if self._energy is None or now_energy is None or now_energy < self._energy:
            return cost
        return dataclasses.replace(cost, energy_joules=(cost.energy_joules or 0.0) + now_energy - self._energy)

    @contextlib.contextmanager
    def progress(self, label: str, total: int) -> Iterator[Any]:
        """Show progress: a bar with rate and time left on a terminal, else a plain line about every ten seconds.

        Yields `advance(n=1, **facts)`.
        """
        if not self.owner:
            yield lambda n=1, **facts: None
            return
        with show_progress(f"{self.manifest.table}: {label}", total) as advance:
            yield advance

    # -- state for checkpoints, and the end

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the run itself: log lengths, cost, results, summary."""
        return {
            "offsets": self.events.offsets(),
            "cost": to_dict(self.cost()),
            "results": [to_dict(r) for r in self._results],
            "summary": self._summary,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take `state()` back: cut the logs to their length then and go on counting from the cost then."""
        if self.owner:
            self.events.truncate(dict(state["offsets"]))
        self._cost = from_dict(Cost, state["cost"])
        self._started = time.monotonic()
        self._energy = energy_joules()
        self._results = [from_dict(EvalResult, r) for r in state["results"]]
        self._summary = dict(state["summary"])

    def finish(self, status: str, message: str = "") -> RunManifest:
        """Write the final manifest (artifacts hashed when the run is done) and close the log."""
        self.manifest = dataclasses.replace(
            self.manifest,
            status=status,  # type: ignore[arg-type]
            artifacts=tuple(list_artifacts(self.dir)) if status == "done" else (),
            results=tuple(self._results),
            summary=self._summary,
            cost=self.cost(),
            finished_at=now(),
            message=message,
        )
        self.events.close()
        if status == "done" and self.keep_checkpoints and (self.dir / "checkpoints").is_dir():
            (self.dir / "checkpoints" / WANTED).touch()
        write_manifest(self.dir, self.manifest)
        if status == "done":
            drop_checkpoints(self.dir)
        return self.manifest


def drop_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a run that is done, unless its stage wants them for more than resuming."""
    if not (folder / "checkpoints" / WANTED).exists():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def write_manifest(folder: Path, manifest: RunManifest) -> None:
    """Write `manifest.json` atomically; NaN (no interval) is stored as null."""
    data = json.loads(json.dumps(to_dict(manifest)), parse_constant=lambda _: None)
    atomic_write(folder / MANIFEST, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def _sweep(folder: Path) -> None:
    """Remove the half-written files of a writer that was killed, which would pass for artifacts."""
    for path in folder.rglob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def list_artifacts(folder: Path) -> Iterator[Artifact]:
    """Yield every file of a run's folder that is an artifact, with its hash and size."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and inside.parts[0] not in PRIVATE:
            yield Artifact(path=inside.as_posix(), sha256=sha256_file(path), bytes=path.stat().st_size)


def now() -> str:
    """Return the time as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def reset_peak_memory() -> None:
    """Start counting peak memory anew, so that each stage of one process has its own (Linux; elsewhere it stays)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process since `reset_peak_memory`, or since its start."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def energy_joules() -> float | None:
    """Return the processors' energy counters in joules (RAPL), or None where the host does not show them.

    Only differences mean anything; a counter that wraps between two readings makes theirs negative.
    """
    try:
        counters = list(Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj"))
        return sum(int(counter.read_text()) for counter in counters) / 1e6 if counters else None
    except (OSError, ValueError):
        return None


def code_version() -> dict[str, Any]:
    """Return Trivium's version and, in a git checkout of it, the commit and whether it was changed."""
    here = Path(__file__).resolve().parent
    version: dict[str, Any] = {"version": __version__}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(here)]
        top = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--", str(here)], capture_output=True, text=True, timeout=5, check=True
        )
        version |= {"commit": top.stdout.strip(), "dirty": bool(status.stdout.strip())}
    return version


def host_facts() -> dict[str, Any]:
    """Return what machine this is, without its name."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


@contextlib.contextmanager
def show_progress(label: str, total: int) -> Iterator[Any]:
    """Yield `advance(n=1, **facts)`; draws a rich bar on a terminal, else prints a plain line every ten seconds."""
    facts_text = ""
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        from rich.console import Console

        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total or None, rate="", facts="")

            def advance(n: int = 1, **facts: float) -> None:
                speed = bar.tasks[0].speed
                bar.update(task, advance=n, rate=f"{speed:.1f}/s" if speed else "", facts=_facts(facts))

            yield advance
        return
    began = last = time.monotonic()
    done = 0

    def advance_plain(n: int = 1, **facts: float) -> None:
        nonlocal done, last, facts_text
        done += n
        moment = time.monotonic()
        if moment - last >= 10:
            last = moment
            rate = done / max(moment - began, 1e-9)
            share = f"/{total}, {(total - done) / max(rate, 1e-9):.0f} s left" if total else ""
            print(f"{label}: {done}{share}, {rate:.1f}/s {_facts(facts)}", file=sys.stderr, flush=True)

    yield advance_plain


def _facts(facts: Mapping[str, float]) -> str:
    return " ".join(f"{k}={v:.4g}" for k, v in facts.items())
