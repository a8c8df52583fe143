"""R4, R6: the disk fills up, or a write fails, at every point of saving; weights move while they are being written."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trivium.config import DiskFull
from trivium.training import checkpoint_folder as disk
from trivium.training.checkpoint import KeepConfig

from .conftest import Small, fork, repeated, same


class Counted:
    """Makes the k-th of the operations that put a checkpoint on the disk fail for want of space."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
        self.failing, self.count = failing, 0
        for owner, name in (
            (disk, "save_file"), (Path, "write_text"), (Path, "mkdir"), (Path, "rename"), (os, "fsync"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **words: Any) -> Any:
            self.count += 1
            if self.count == self.failing:
                raise OSError(errno.ENOSPC, "No space left on device", str(arguments[0]))
            return operation(*arguments, **words)

        return act


def test_r4_an_error_at_each_operation_of_saving(tmp_path: Path) -> None:
    """Whichever fails, the checkpoint before it is whole, what has a name is whole, and saving again succeeds."""
    failing = 0
    while True:
        failing += 1
        small = Small(tmp_path / str(failing), keep=KeepConfig(last=1))
        small.save(3)
        at_3 = small.tensors()
        small.step(6)
        at_6 = small.tensors()
        with pytest.MonkeyPatch.context() as patch:
            counted = Counted(patch, failing)
            small.saver.save(6)
            assert small.saver._written.wait(60)
        if counted.count < failing:
            break  # there is no such operation: every one has had its turn
        with pytest.raises(DiskFull, match=r"no space for the checkpoint .*00000006: it needs \d+ bytes") as error:
            small.saver.check()
        assert error.value.exit_code == 5
        left = disk.listing(small.saver.folder)
        for path in left:
            disk.verify(path)
        again = Small(tmp_path / str(failing), keep=KeepConfig(last=1))
        checkpoint = again.saver.resume()
        assert checkpoint is not None, f"operation {failing} left none"
        assert same(again.tensors(), at_3 if checkpoint.step == 3 else at_6)
        assert not list(again.saver.folder.glob("*.tmp"))
        again.save(7)
        assert again.steps == [7]
    assert failing > 10, "aside, three files, their fsyncs, the folder's, the logs', the rename, the parent's"


@repeated(points=(6, 60))
def test_r4_the_kernel_refuses_at_a_byte_of_the_file(tmp_path: Path, points: int) -> None:
    """A limit on the size of files, which is a real error of a real write, at bytes all over the tensors' file."""
    small = Small(tmp_path)
    small.net.layers[0] = torch.nn.Linear(64, 64)  # larger than the logs, which the limit must not touch
    small.save(3)
    size = (small.saver.folder / "00000003" / disk.TENSORS).stat().st_size
    for point in range(points):
        limit = 4096 + (size - 4096) * point // points

        def work(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            small.step(6)
            with small.saver:
                small.saver.save(6)

        child = fork(work, tmp_path / "log")
        assert child.wait() == 5, f"limit {limit} of {size}: {child.log.read_text()[-2000:]}"
        assert "00000006: it needs" in child.log.read_text() and "00000003 is whole" in child.log.read_text()
        assert [path.name for path in small.saver.folder.iterdir()] == ["00000003"]
        disk.verify(small.saver.folder / "00000003")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 192 KiB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this process may not mount a tmpfs; the other two tests of R4 need none")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_r4_a_disk_of_less_than_two_checkpoints(small_disk: Path) -> None:
    """One fits and the second does not: exit code 5, the first is kept; with space made, the same run goes on."""
    ballast = small_disk / "ballast"
    small = Small(small_disk)
    small.net.layers[0] = torch.nn.Linear(64, 64)
    small.save(3)
    at_3 = small.tensors()
    size = sum(path.stat().st_size for path in (small.saver.folder / "00000003").iterdir())
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    assert free > size
    ballast.write_bytes(b"x" * (free - size // 2))
    small.step(6)
    small.saver.save(6)
    with pytest.raises(DiskFull, match=f"00000006: it needs {small.saver.num_bytes():,} bytes") as error:
        small.saver.wait()
    assert error.value.exit_code == 5
    with pytest.raises(DiskFull, match="a checkpoint of small-0 needs"):
        small.saver.resume()
    ballast.unlink()
    checkpoint = small.saver.resume()
    assert checkpoint is not None and checkpoint.step == 3 and same(small.tensors(), at_3)
    small.save(6)
    assert small.steps == [3, 6]


@pytest.mark.parametrize("seed", [6])
@repeated(saves=(10, 200))
def test_r6_what_moves_after_saving_does_not_reach_the_file(tmp_path: Path, seed: int, saves: int) -> None:
    """Everything is overwritten as soon as `save` returns, with the writer free to be anywhere."""
    rng = random.Random(seed)
    small = Small(tmp_path)
    for number in range(1, saves + 1):
        small.step(number)
        before = small.tensors()
        small.saver.save(number)
        for tensor in small.saver._tensors().values():
            with torch.no_grad():
                tensor.fill_(rng.random())
        small.saver.wait()
        file = load_file(small.saver.folder / f"{number:08d}" / disk.TENSORS)
        assert same(before, {name: value for name, value in file.items() if not name.startswith("rng/")}), number
