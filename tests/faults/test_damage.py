"""R2, R3, R13: flipped bits, cut and missing files; found before anything is used, named, set aside."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from trivium.config import UserError
from trivium.data.shards import open_shards
from trivium.runs.events import read_events
from trivium.training import checkpoint_folder as disk

from .conftest import Small, Workspace, repeated, same


class Pristine:
    """Two checkpoints, of steps 3 and 6, that are put back before each experiment."""

    def __init__(self, place: Path) -> None:
        first = Small(place / "pristine")
        first.save(3)
        self.at_3 = first.tensors()
        first.save(6)
        self.place, self.source = place, first.run.dir

    def damaged(self, damage: Callable[[Path], None]) -> Small:
        """Return the run reopened after `damage` was done to its newest checkpoint's folder."""
        target = self.place / "trial"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.source, target / "small-0")
        damage(target / "small-0" / "checkpoints" / "00000006")
        return Small(target)

    def assert_found(self, damage: Callable[[Path], None], what: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Assert that the damage is found and named, and that the checkpoint before it is loaded to the bit."""
        small = self.damaged(damage)
        checkpoint = small.saver.resume()
        small.run.events.close()
        assert checkpoint is not None and checkpoint.step == 3, f"{what}: loaded"
        assert same(small.tensors(), self.at_3), what
        assert "00000006.damaged" in capsys.readouterr().err, what
        assert [n.value["path"] for n in read_events(small.run.dir, kind="notice")] == ["00000006.damaged"], what
        assert small.steps == [3] and (small.saver.folder / "00000006.damaged").is_dir(), what


@pytest.fixture
def pristine(tmp_path: Path) -> Pristine:
    """Return the checkpoints to damage."""
    return Pristine(tmp_path)


@pytest.mark.parametrize("seed", [3])
@repeated(flips=(30, 200))
def test_r2_every_single_flipped_bit_is_found(
    pristine: Pristine, capsys: pytest.CaptureFixture[str], seed: int, flips: int
) -> None:
    """Files in turn, the bit at random."""
    rng = random.Random(seed)
    names = sorted(path.name for path in (pristine.source / "checkpoints" / "00000006").iterdir())
    assert names == ["checksums.json", "state.json", "tensors.safetensors"]
    for number in range(flips):
        name = names[number % len(names)]
        size = (pristine.source / "checkpoints" / "00000006" / name).stat().st_size
        bit = rng.randrange(8 * size)

        def flip(folder: Path, name: str = name, bit: int = bit) -> None:
            data = bytearray((folder / name).read_bytes())
            data[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(bytes(data))

        pristine.assert_found(flip, f"bit {bit} of {name}", capsys)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_r2_no_bit_of_the_list_of_checksums_is_free(pristine: Pristine, capsys: pytest.CaptureFixture[str]) -> None:
    """Every bit of checksums.json, one after the other: also those in spaces and names."""
    size = (pristine.source / "checkpoints" / "00000006" / disk.CHECKSUMS).stat().st_size
    for bit in range(8 * size):

        def flip(folder: Path, bit: int = bit) -> None:
            data = bytearray((folder / disk.CHECKSUMS).read_bytes())
            data[bit // 8] ^= 1 << bit % 8
            (folder / disk.CHECKSUMS).write_bytes(bytes(data))

        pristine.assert_found(flip, f"bit {bit}", capsys)


@pytest.mark.parametrize("seed", [4])
@repeated(cuts=(12, 100))
def test_r3_every_truncation_is_found(
    pristine: Pristine, capsys: pytest.CaptureFixture[str], seed: int, cuts: int
) -> None:
    """Each file cut to nothing, by one byte, and at random."""
    rng = random.Random(seed)
    names = sorted(path.name for path in (pristine.source / "checkpoints" / "00000006").iterdir())
    for number in range(cuts):
        name = names[number % len(names)]
        size = (pristine.source / "checkpoints" / "00000006" / name).stat().st_size
        length = {0: 0, 1: size - 1}.get(number // len(names), rng.randrange(size))

        def cut(folder: Path, name: str = name, length: int = length) -> None:
            (folder / name).write_bytes((folder / name).read_bytes()[:length])

        pristine.assert_found(cut, f"{name} cut to {length} of {size} bytes", capsys)


def test_r3_a_file_too_few_or_too_many_is_found(pristine: Pristine, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of the three missing, all missing, one more than there should be, a file grown, a forged list."""
    for name in (disk.CHECKSUMS, *disk.FILES):
        pristine.assert_found(lambda folder, name=name: (folder / name).unlink(), f"{name} missing", capsys)
    pristine.assert_found(lambda folder: (shutil.rmtree(folder), folder.mkdir()), "an empty folder", capsys)  # type: ignore[arg-type,func-returns-value]
    pristine.assert_found(lambda folder: _write(folder / "more.safetensors", b"x"), "an extra file", capsys)
    pristine.assert_found(lambda folder: _write(folder / ".hidden", b""), "a hidden extra file", capsys)
    pristine.assert_found(lambda folder: _append(folder / disk.STATE, b" "), "a state with a space more", capsys)
    pristine.assert_found(lambda folder: _write(folder / disk.CHECKSUMS, b'{"files": {}}'), "a list of none", capsys)
    pristine.assert_found(lambda folder: _write(folder / disk.CHECKSUMS, b"[" * 100_000), "a nested list", capsys)


def test_r3_with_every_checkpoint_damaged_the_run_begins_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are named, none is loaded, and the log starts anew but for the notices."""
    first = Small(tmp_path)
    first.save(3, 6)
    for path in disk.listing(first.saver.folder):
        _append(path / disk.TENSORS, b"x")
    again = Small(tmp_path)
    before = again.tensors()
    assert again.saver.resume() is None
    assert same(before, again.tensors()) and again.steps == []
    said = capsys.readouterr().err
    assert "00000003.damaged" in said and "00000006.damaged" in said
    assert [e.kind for e in read_events(again.run.dir)] == ["notice", "notice"]


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


@pytest.mark.parametrize("seed", [5])
@repeated(flips=(6, 40))
def test_r13_a_flipped_bit_in_a_token_shard_is_refused(whole: Workspace, tmp_path: Path, seed: int, flips: int) -> None:
    """Any file of the shards: named, before the first step; the stage alone refuses, the recipe makes it again."""
    rng = random.Random(seed)
    source = whole.of("train_tokenizer")[0] / "shards" / "train"
    names = sorted(path.name for path in source.iterdir())
    for number in range(flips):
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)
        shutil.copytree(source, tmp_path / "shards")
        path = tmp_path / "shards" / names[number % len(names)]
        data = bytearray(path.read_bytes())
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(data))
        with pytest.raises(UserError, match=path.name):
            open_shards(tmp_path / "shards")
    workspace = whole.copy(tmp_path / "w", without="pretrain")
    (shard,) = (workspace.of("train_tokenizer")[0] / "shards" / "train").glob("*.bin")
    data = bytearray(shard.read_bytes())
    data[rng.randrange(len(data))] ^= 1
    shard.write_bytes(bytes(data))
    child = workspace.start("pretrain")
    assert child.wait() == 2 and f"{shard} is not what the run wrote" in child.log.read_text()
    assert not (workspace.folder / "pretrain").exists(), "no step was taken"
    assert f"{shard} is not what the run wrote" in workspace.run("data_prep", "train_tokenizer", "pretrain")
