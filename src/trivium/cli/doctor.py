"""`trivium doctor`: what this machine has and what Trivium would use of it; every line is measured, none is assumed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trivium import __version__
from trivium.cli.options import parse
from trivium.cli.verbs import TOOLS
from trivium.config import ConfigError, RunSettings


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `doctor` understands."""

    workspace: Path = Path()
    """The folder whose disk is measured."""
    device: str = "auto"
    """The device whose speed is measured: auto, cpu, cuda or cuda:N."""


def run(words: Sequence[str]) -> int:
    """Print the facts and return 0, or 1 when Trivium could not train here."""
    options = parse(Options, "doctor", words, TOOLS["doctor"])
    healthy = True
    for name, value, is_fine in facts(options):
        print(f"{'  ' if is_fine else '! '}{name:<12}{value}")
        healthy = healthy and is_fine
    return 0 if healthy else 1


def facts(options: Options) -> Iterator[tuple[str, str, bool]]:
    """Yield (name, what was measured, whether training can go on with it)."""
    yield "trivium", __version__, True
    yield "python", f"{platform.python_version()} at {sys.executable}", sys.version_info >= (3, 11)
    yield from _torch_facts(options)
    folder = next(path for path in (options.workspace.resolve(), *options.workspace.resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    yield "disk", f"{free / 1e9:.1f} GB free at {folder}", free > 1e9
    yield from _extra_facts()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    yield "browser", browser or "no Chromium on the path (needed by the page tests alone)", True
    compiler = shutil.which("g++") or shutil.which("clang++")
    yield "compiler", compiler or "none (torch.compile stays off; nothing requires it)", True


def _extra_facts() -> Iterator[tuple[str, str, bool]]:
    """Yield what each extra would still bring, by the requirements that Trivium was installed with."""
    try:
        requirements = importlib.metadata.requires("trivium") or []
    except importlib.metadata.PackageNotFoundError:
        yield "extras", "unknown: Trivium runs from its source without being installed", True
        return
    missing: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        name = re.split(r"[^\w.-]", requirement)[0]
        if extra:
            missing.setdefault(extra[1], [])
            if not next(iter(importlib.metadata.distributions(name=name)), None):
                missing[extra[1]].append(name)
    for extra_name, names in missing.items():
        yield f"[{extra_name}]", f"missing {', '.join(names)}" if names else "installed", True


def _torch_facts(options: Options) -> Iterator[tuple[str, str, bool]]:
    try:
        import torch

        from trivium.training.distributed import compute_dtype, device_of, num_cores
        from trivium.training.peak import SIDES, matrix_flops
    except ImportError as error:
        yield "torch", f"cannot be imported: {error}", False
        return
    yield "torch", torch.__version__, True
    torch.set_num_threads(num_cores())
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores", True
    settings = RunSettings(device=options.device)
    try:
        device = device_of(settings)
    except ConfigError as error:
        yield "device", str(error), False
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    yield "device", f"{device} ({name})", True
    chosen = compute_dtype(settings)
    peaks = {dtype: matrix_flops(device, dtype, torch.get_num_threads()) for dtype in (torch.float32, torch.bfloat16)}
    speeds = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {peak / 1e9:,.0f} GFLOP/s" for dtype, peak in peaks.items()
    )
    side = SIDES[device.type]
    yield "precision", f"{str(chosen).removeprefix('torch.')} ({speeds} on a {side} x {side} product)", True
    yield "peak", f"{peaks[chosen] / 1e12:.2f} TFLOP/s, what train/mfu is a share of", True
