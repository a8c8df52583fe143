"""How the C library hands out memory: a training step asks for the same large blocks again and again."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Have the C library keep freed blocks for the next request, and return whether it does; glibc only.

    By default it returns every block above 32 MB, and the end of the heap, to the system at once, and the next step
    pays a page fault for each 4 kB of it: 18,000 to 35,000 a step at 14 million parameters (docs/LOG.md). The peak of
    resident memory stays what it was; it is given back when the process ends. A user who sets the allocator up in the
    environment (GLIBC_TUNABLES, MALLOC_...) knows better, and is left alone.
    """
    chosen = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * 2**20}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
