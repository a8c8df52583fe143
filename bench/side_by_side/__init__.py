"""Two implementations of the same work side by side: processes that take turns, a clock that skips the warm-up.

A bench names its sides (own, and peers) and its cases. Each side is a function that prepares one case and then does
steps, telling a `Clock` how many items each had, until the clock says that the time is up. Every process measures all
cases of one side in one precision, with the default allocator or with the same tuned one for all ("tuned": the settings
must be in the environment before a process starts). A figure is the median over processes.

`ratio` is own's best to the best peer as run, `ratio_tuned` the same of the tuned; `ratio_cpu` and `ratio_cpu_tuned`
are of items per second of processor time, which suffer less where other work shares the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
TUNED = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
    ":glibc.malloc.top_pad=268435456"
}
WARM_UP = 2
"""Steps before the clock starts: the first ones allocate, and choose kernels."""


@dataclass(frozen=True)
class Shape:
    """A network and its batch."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    context: int = 256
    batch_size: int = 16

    @property
    def tokens(self) -> int:
        """Tokens in a step of full rows."""
        return self.context * self.batch_size

    @property
    def fields(self) -> dict[str, Any]:
        """The network as both sides' configurations name it."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "max_position_embeddings": 2 * self.context,
            "tie_word_embeddings": True,
        }


SHAPES = {
    "toy": Shape(512, 32, 64, 2, 2, context=32, batch_size=4),
    "tiny": Shape(4096, 128, 352, 4, 4),
    "small": Shape(8192, 384, 1024, 6, 6),
}


class Clock:
    """Counts items once the first few steps are over, until the time is up."""

    def __init__(self, seconds: float, warm_up: int = WARM_UP) -> None:
        """Wait for the first steps."""
        self.seconds, self.steps, self.items, self.elapsed, self.cpu = seconds, -warm_up, 0.0, 0.0, 0.0
        self._began = self._cpu_began = 0.0
        if not warm_up:
            self._start()

    def _start(self) -> None:
        self._began, self._cpu_began = time.perf_counter(), cpu_seconds()

    def tick(self, items: float = 1.0) -> bool:
        """Note that a step of so many items ended and tell whether the time is up."""
        self.steps += 1
        if self.steps == 0:
            self._start()
        elif self.steps > 0:
            self.items += items
            self.elapsed, self.cpu = time.perf_counter() - self._began, cpu_seconds() - self._cpu_began
        return self.steps > 0 and self.elapsed >= self.seconds


def cpu_seconds() -> float:
    """Return the processor time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


Side = Callable[["Task", Clock], None]
"""Prepares a case and takes steps until the clock stops it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one side is to do."""

    case: str
    shape: Shape
    precision: str
    folder: Path
    """What `prepare` of the bench wrote."""
    tuned: bool = False
    """Whether the allocator is the tuned one, for what else a bench tunes with it."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is compared."""

    name: str
    unit: str
    cases: Sequence[str]
    sides: Mapping[str, Side]
    packages: Sequence[str] = ("torch", "transformers", "trl")
    prepare: Callable[[Shape, Path], None] = lambda shape, folder: None
    """Writes what all processes read: models, tokenizer, data."""
    script: str = ""
    precisions: Sequence[str] = ("fp32",)
    seconds: float = 3.0
    warm_up: int = WARM_UP
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What a reader has to know to repeat it."""


@contextlib.contextmanager
def peak_memory(found: dict[str, Any]):
    """Write into `found` how many bytes the process held at most inside, where Linux lets the mark be set back."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    yield
    try:
        status = Path("/proc/self/status").read_text()
        found["peak_bytes"] = int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(bench: Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what this process measured, case by case."""
    import torch

    torch.set_num_threads(options.threads)
    found = []
    for case in options.cases:
        clock = Clock(options.seconds, bench.warm_up)
        task = Task(
            case=case,
            shape=SHAPES[options.shape],
            precision=options.precision,
            folder=Path(options.folder),
            tuned=os.environ.get("GLIBC_TUNABLES") == TUNED["GLIBC_TUNABLES"],
        )
        row: dict[str, Any] = {"case": case}
        with peak_memory(row):
            bench.sides[options.worker](task, clock)
        row |= {"per_s": clock.items / clock.elapsed, "per_cpu_s": clock.items / clock.cpu, "steps": clock.steps}
        found.append(row)
    return found


def measure(
    bench: Bench, options: argparse.Namespace, side: str, precision: str, *, tuned: bool
) -> list[dict[str, Any]]:
    """Return what a fresh process measured; raises SystemExit with what it said when it fails."""
    words = ["--worker", side, "--cases", *options.cases, "--precision", precision, "--shape", options.shape]
    words += ["--seconds", str(options.seconds), "--threads", str(options.threads), "--folder", str(options.folder)]
    environment = os.environ | (TUNED if tuned else {}) | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment["OMP_NUM_THREADS"] = str(options.threads)
    done = subprocess.run(
        [sys.executable, bench.script, *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{side} {precision} failed:\n{done.stderr[-3000:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return median, minimum and maximum over a side's processes."""
    rates = [run["per_s"] for run in runs]
    return {
        "per_s": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
        "per_cpu_s": statistics.median(run["per_cpu_s"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "processes": len(runs),
    }


def compare(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of every case: own and peers take turns, process by process."""
    runs: dict[tuple[str, str, str, bool], list[dict[str, Any]]] = {}
    for number in range(options.processes):
        for precision in options.precisions:
            for tuned in (False, True):
                for side in options.sides:
                    label = f"{side} {precision} {'tuned' if tuned else 'as run'} {number + 1}"
                    print(label, end=" ", flush=True)
                    made = measure(bench, options, side, precision, tuned=tuned)
                    print(", ".join(f"{row['case']} {row['per_s']:,.1f}" for row in made), flush=True)
                    for row in made:
                        runs.setdefault((row["case"], side, precision, tuned), []).append(row)
    return {
        case: with_ratios(
            [
                {"side": side, "precision": precision, "tuned": tuned, **summary(made)}
                for (of, side, precision, tuned), made in runs.items()
                if of == case
            ]
        )
        for case in options.cases
    }


def with_ratios(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a case's rows, own and peers apart, with own's best to the best peer; None where there is no peer."""

    def ratio(of: str, tuned: bool) -> float | None:
        own, peers = (
            [row[of] for row in rows if (row["side"] == "own") == mine and row["tuned"] == tuned]
            for mine in (True, False)
        )
        return max(own) / max(peers) if own and peers else None

    return {
        "own": [row for row in rows if row["side"] == "own"],
        "peers": [row for row in rows if row["side"] != "own"],
        "ratio": ratio("per_s", False),
        "ratio_tuned": ratio("per_s", True),
        "ratio_cpu": ratio("per_cpu_s", False),
        "ratio_cpu_tuned": ratio("per_cpu_s", True),
    }


def report(found: Mapping[str, Any], unit: str) -> str:
    """Return the table as Markdown."""
    lines = [f"| case | side | precision | allocator | {unit} (low to high) | peak MB |", "|" + " --- |" * 6]
    ratios = []
    for name, case in found.items():
        for row in case["own"] + case["peers"]:
            rate = f"{row['per_s']:,.1f} ({row['low']:,.1f} to {row['high']:,.1f})"
            allocator = "tuned" if row["tuned"] else "default"
            peak_mb = f"{row['peak_bytes'] / 1e6:,.0f}"
            lines.append(f"| {name} | {row['side']} | {row['precision']} | {allocator} | {rate} | {peak_mb} |")
        if case["ratio"] and case["ratio_tuned"]:
            ratios.append(
                f"{name}: {case['ratio']:.2f} as run, {case['ratio_tuned']:.2f} tuned (by processor time "
                f"{case['ratio_cpu']:.2f} and {case['ratio_cpu_tuned']:.2f})"
            )
    return "\n".join(lines) + ("\n\nOwn's best to the peer's best: " + "; ".join(ratios) if ratios else "")


def peak(threads: int) -> dict[str, float]:
    """Return the measured FLOP/s of a 2048 x 2048 product in each dtype."""
    import torch

    torch.set_num_threads(threads)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(2048, 2048, dtype=dtype)
        times = []
        for _ in range(6):
            began = time.perf_counter()
            torch.mm(matrix, matrix)
            times.append(time.perf_counter() - began)
        rates[str(dtype).removeprefix("torch.")] = 2 * 2048**3 / min(times)
    return rates


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def parser(bench: Bench, description: str | None) -> argparse.ArgumentParser:
    """Return the options that every bench has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cases", nargs="+", default=list(bench.cases), choices=list(bench.cases))
    made.add_argument("--sides", nargs="+", default=list(bench.sides), choices=list(bench.sides))
    made.add_argument("--shape", default="small", choices=list(SHAPES))
    made.add_argument("--precisions", nargs="+", default=list(bench.precisions), choices=["fp32", "bf16"])
    made.add_argument("--seconds", type=float, default=bench.seconds, help="of measuring, per case and process")
    made.add_argument("--processes", type=int, default=3)
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--results", type=Path, default=RESULTS / f"{bench.name}.json")
    made.add_argument("--worker", choices=list(bench.sides), help=argparse.SUPPRESS)
    made.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    made.add_argument("--folder", default="", help=argparse.SUPPRESS)
    return made


def main(bench: Bench, description: str | None, words: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; return what was written."""
    options = parser(bench, description).parse_args(words)
    if options.worker:
        found = work(bench, options)
        print("\n" + json.dumps(found))
        return {"cases": found}
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        bench.prepare(SHAPES[options.shape], Path(folder))
        cases = compare(bench, options)
    print("\n" + report(cases, bench.unit))
    facts = {
        "unit": bench.unit,
        "versions": versions(bench.packages),
        "settings": {
            "shape": vars(SHAPES[options.shape]), "seconds": options.seconds, "processes": options.processes,
            "threads": options.threads, "tuned": TUNED, **bench.settings,
        },
        "cores": len(os.sched_getaffinity(0)),
        "peak_flops_per_s": peak(options.threads),
        "cases": cases,
    }  # fmt: skip
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"\nwritten to {options.results}")
    return facts
