"""Where the work happens: device, threads, precision, and how many processes share it.

The only room that imports `torch.distributed`; a single process needs no process group and pays nothing.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time

import torch
import torch.distributed as dist
from torch import Tensor

from trivium.config import ConfigError, RunSettings


def setup(settings: RunSettings) -> None:
    """Set the thread count: oversubscription costs tenfold on CPU, so it is one thread per core we may use."""
    torch.set_num_threads(settings.threads or num_cores())


def num_cores() -> int:
    """Return how many cores this process may use; OMP_NUM_THREADS, where set, is the user's own word."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none


def device_of(settings: RunSettings) -> torch.device:
    """Return the device that the settings ask for.

    Raises ConfigError when it is CUDA and there is none.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device = {name!r}: must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device = {name!r}: this torch ({torch.__version__}) sees no CUDA device; use cpu or auto")
    return device


def compute_dtype(settings: RunSettings) -> torch.dtype:
    """Return the dtype of the matrix products: bf16 where this machine multiplies it clearly faster, else fp32."""
    if settings.precision != "auto":
        return torch.bfloat16 if settings.precision == "bf16" else torch.float32
    if device_of(settings).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _bf16_pays() else torch.float32


@functools.cache
def _bf16_pays() -> bool:
    """Tell whether this CPU multiplies bf16 matrices at least 1.5 times as fast as fp32 ones.

    What a processor supports does not say it: with AMX bf16 is ten times as fast, with AVX-512 BF16 alone six times on
    one processor and half as fast on another (docs/LOG.md). Without either it is emulated, and nothing is measured.
    """
    if not any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("amx_tile", "avx512_bf16")):
        return False
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(5):  # in turn, and the best of each: other work on the machine then disturbs both alike
        for dtype in seconds:
            matrix = torch.ones(768, 768, dtype=dtype)
            began = time.perf_counter()
            torch.mm(matrix, matrix)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - began)
    return seconds[torch.float32] > 1.5 * seconds[torch.bfloat16]


def autocast(settings: RunSettings) -> contextlib.AbstractContextManager[object]:
    """Return the context in which forward passes run: autocast to bf16 over fp32 master weights, or nothing."""
    if compute_dtype(settings) is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_of(settings).type, dtype=torch.bfloat16)


def world() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of `value` over all ranks (itself when there is one)."""
    if world()[1] > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value
