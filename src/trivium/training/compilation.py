"""Whether and how the network's layers are compiled for training.

Layer by layer: all layers share one program, so compiling takes as long for thirty layers as for one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from trivium.config import ConfigError, RunSettings
from trivium.models.heads import ScalarModel
from trivium.models.transformer import Transformer
from trivium.training.distributed import device_of

LONG_FLOPS = 1e14
"""From so many FLOPs on, six minutes at 300 GFLOP/s, a run on CPU earns back the 20 s that compiling costs."""


def compile_layers(model: Transformer | ScalarModel, settings: RunSettings, *, flops: float = 0.0) -> bool:
    """Compile the model's layers for training where the settings want it, and return whether they did.

    `auto` compiles on a GPU that torch can compile for, and on a CPU where the run's training takes at least LONG_FLOPS
    `flops`: the recipe decides, not a clock, so that a resumed run computes what it would have computed. Raises
    ConfigError for `on` where something is lacking that compiling needs.
    """
    device = device_of(settings).type
    if settings.compile == "off" or (settings.compile == "auto" and device == "cpu" and flops < LONG_FLOPS):
        return False
    problem = lacking(device)
    if problem and settings.compile == "on":
        raise ConfigError(f"compile = 'on': {problem}; install it, or set compile to off")
    if not problem:
        model.model.compile_layers()
    return not problem


def lacking(device: str) -> str:
    """Return what torch.compile needs and this machine lacks, as a clause; empty when nothing is."""
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    # What torch's own compiler calls: CXX, else the platform's.
    names = {"darwin": "clang++", "win32": "cl"}
    name = os.environ.get("CXX") or names.get(sys.platform, "g++")
    if shutil.which(name) is None:
        return f"there is no C++ compiler ({name}) on the path"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers (Python.h) are not installed"
    return ""
