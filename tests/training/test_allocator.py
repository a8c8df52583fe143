"""Freed memory is kept: the page faults of a step are paid once."""

import os
import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import torch
from trivium.training.allocator import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for when in range(30):
    torch.ones(12 * 2**20)
    if when == 19:
        before = faults()
print(faults() - before)
"""
"""Ten blocks of 48 MB, each freed before the next: 12,288 pages each, or a few where the system uses larger pages. The
twenty before them let the heap find its size."""


def count(mode: str, **environment: str) -> list[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES" and not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", COUNT, mode]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_blocks_that_are_freed_and_asked_for_again_fault_once():
    told, kept = count("keep")
    assert told == "True"
    _, returned = count("as it is")
    assert int(kept) <= int(returned) / 10


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX"])
def test_what_the_user_set_up_is_left_alone(name):
    value = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2", "MALLOC_ARENA_MAX": "2"}[name]
    assert count("keep", **{name: value})[0] == "False"
