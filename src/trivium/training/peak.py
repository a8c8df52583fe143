"""How fast this machine multiplies matrices: the peak that model FLOPs utilisation (MFU) is measured against."""

from __future__ import annotations

import functools

import torch

from trivium.config import RunSettings
from trivium.training.distributed import compute_dtype, device_of
from trivium.training.timing import product_seconds

SIDES = {"cuda": 8192, "cpu": 1024}
"""Side of the square matrices: large enough to be bound by arithmetic, small enough to cost a tenth of a second."""


def peak_flops(settings: RunSettings) -> float:
    """Return the FLOPs per second of a large matrix product in the dtype that training computes in, measured once.

    What a vendor's data sheet says is more, on a CPU and on a GPU: no product reaches it. A utilisation against this
    peak says how far the network is from plain matrix products on the same machine, with the same number of threads.
    """
    return matrix_flops(device_of(settings), compute_dtype(settings), torch.get_num_threads())


@functools.cache
def matrix_flops(device: torch.device, dtype: torch.dtype, threads: int, side: int = 0) -> float:
    """Return the best FLOPs per second of a `side` x `side` product (0: of the device's usual size).

    `threads` only tells results apart: torch is already set to that many.
    """
    side = side or SIDES.get(device.type, SIDES["cpu"])
    (seconds,) = product_seconds([dtype], device, side)
    return 2 * side**3 / seconds
