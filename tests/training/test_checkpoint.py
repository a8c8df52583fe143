"""Checkpoints: what is saved is what was there, what is loaded is what was saved, and there is always a whole one."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trivium.config import ConfigError, DiskFull, UserError
from trivium.runs.events import read_events
from trivium.runs.manifest import Run
from trivium.training import checkpoint_folder as disk
from trivium.training.average import Average
from trivium.training.checkpoint import Checkpointer, KeepConfig
from trivium.training.optim import OptimConfig, Optimizer

from .conftest import tiny_model

MakeRun = Callable[[str], Run]


class Trainee:
    """A small network, its optimizer and its checkpoints; `step` moves all of its state by known noise."""

    def __init__(self, run: Run, kind: str = "muon", keep: KeepConfig | None = None) -> None:
        self.model = tiny_model()
        self.optimizer = Optimizer(self.model, OptimConfig(kind=kind))
        self.average = Average(self.model, 0.9)
        self.saver = Checkpointer(
            run,
            modules={"model": self.model},
            optimizers={"model": self.optimizer},
            averages={"model": self.average},
            keep=keep,
        )

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step(1.0)
        self.average.update()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.saver._tensors().items()}

    def save(self, *steps: int, score: dict[int, float] | None = None) -> None:
        for number in steps:
            self.step(number)
            self.saver.save(number, {"note": number}, score=(score or {}).get(number))
        self.saver.wait()

    @property
    def steps(self) -> list[int]:
        return [disk.step_of(path) for path in disk.listing(self.saver.folder)]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Tell whether two sets of tensors are equal to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def flip(path: Path, bit: int = 3) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << bit
    path.write_bytes(bytes(data))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hold every write back until the event is set, so that what happens meanwhile happens for certain."""
    opened, write = threading.Event(), disk.write

    def wait_and_write(*arguments: Any, **words: Any) -> None:
        assert opened.wait(60)
        write(*arguments, **words)

    monkeypatch.setattr(disk, "write", wait_and_write)
    yield opened
    opened.set()


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_what_is_loaded_is_what_was_saved(make_run: MakeRun, kind: str) -> None:
    """Weights, both optimizers' moments and counts, the average, torch's random numbers, and the stage's own state."""
    first = Trainee(make_run("a"), kind)
    torch.manual_seed(5)
    first.step(1)
    first.saver.save(1, {"note": [1, 0.1]})
    first.saver.wait()
    saved, drawn = first.tensors(), torch.rand(3)
    second = Trainee(make_run("a"), kind)
    checkpoint = second.saver.resume()
    assert checkpoint is not None and checkpoint.step == 1 and checkpoint.state == {"note": [1, 0.1]}
    assert any("exp_avg" in name for name in saved) and equal(saved, second.tensors())
    assert torch.equal(torch.rand(3), drawn)
    first.step(2)
    second.step(2)
    assert equal(first.tensors(), second.tensors()), "the state is not only equal but used alike"


def test_the_file_holds_the_weights_of_the_moment_of_saving(make_run: MakeRun, gate: threading.Event) -> None:
    """Weights, optimizer state and average are overwritten before the writer has begun: none of it reaches the file."""
    trainee = Trainee(make_run("a"))
    trainee.step(1)
    before = trainee.tensors()
    trainee.saver.save(1)
    for tensor in trainee.saver._tensors().values():
        with torch.no_grad():
            tensor.fill_(7)
    gate.set()
    trainee.saver.wait()
    file = load_file(trainee.saver.folder / "00000001" / disk.TENSORS)
    assert equal(before, {name: value for name, value in file.items() if not name.startswith("rng/")})


def test_what_the_run_says_afterwards_is_not_in_the_checkpoint(make_run: MakeRun, gate: threading.Event) -> None:
    """The summary and the log go on changing while the thread writes; resuming goes back to the moment of saving."""
    run = make_run("a")
    trainee = Trainee(run)
    run.note(before=1)
    run.metric("train/loss", 1.0, 1)
    trainee.saver.save(1)
    run.note(after=1)
    run.metric("train/loss", 2.0, 2)
    gate.set()
    trainee.saver.wait()
    again = make_run("a")
    Trainee(again).saver.resume()
    assert again.state()["summary"] == {"before": 1}
    assert [event.value for event in read_events(again.dir)] == [1.0]


def test_the_next_save_waits_for_the_former(make_run: MakeRun, gate: threading.Event) -> None:
    """Two checkpoints are never written at a time, and both are whole."""
    trainee = Trainee(make_run("a"))
    trainee.step(1)
    trainee.saver.save(1)
    threading.Timer(0.05, gate.set).start()
    trainee.step(2)
    trainee.saver.save(2)
    assert trainee.steps[0] == 1, "the second save went on before the first was published"
    trainee.saver.wait()
    assert trainee.steps == [1, 2]
    assert trainee.saver.seconds > 0


# -- retention


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (KeepConfig(), [5, 6]),
        (KeepConfig(last=1), [6]),
        (KeepConfig(last=3), [4, 5, 6]),
        (KeepConfig(last=1, every=2), [2, 4, 6]),
        (KeepConfig(last=1, best="eval/loss"), [3, 6]),
        (KeepConfig(last=2, best="eval/accuracy", highest=True), [1, 5, 6]),
        (KeepConfig(last=1, best="eval/loss", every=4), [3, 4, 6]),
    ],
)
def test_rotation_keeps_the_last_the_best_and_every_nth(make_run: MakeRun, keep: KeepConfig, left: list[int]) -> None:
    """Of steps 1 to 6 with values 0.9, 0.7, 0.2, 0.5, 0.3, 0.4: the lowest is at 3, the highest at 1."""
    values = dict(zip(range(1, 7), (0.9, 0.7, 0.2, 0.5, 0.3, 0.4), strict=True))
    trainee = Trainee(make_run("a"), keep=keep)
    trainee.save(*values, score=values if keep.best else None)
    assert trainee.steps == left
    assert make_run("a").keep_checkpoints is False and trainee.saver.run.keep_checkpoints is keep.after_the_end


def test_a_damaged_one_does_not_count(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Keep two: step 2 rots before step 3 is saved, so 1 stays, and the damage is named in the log."""
    run = make_run("a")
    trainee = Trainee(run)
    trainee.save(1, 2)
    flip(trainee.saver.folder / "00000002" / disk.TENSORS)
    trainee.save(3)
    assert trainee.steps == [1, 3]
    assert (trainee.saver.folder / "00000002.damaged").is_dir() and "00000002.damaged" in capsys.readouterr().err
    notices = [event.value for event in read_events(run.dir, kind="notice")]
    assert notices == [{"path": "00000002.damaged", "what": f"the SHA-256 of {disk.TENSORS} is wrong"}]


def test_keeping_one_never_leaves_none(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk lies about what it took of the newest: the one before it stays, and resuming finds it."""
    trainee = Trainee(make_run("a"), keep=KeepConfig(last=1))
    trainee.save(1)
    before = trainee.tensors()
    publish = disk.write

    def publish_and_rot(target: Path, *arguments: Any, **words: Any) -> None:
        publish(target, *arguments, **words)
        flip(target / disk.TENSORS)

    monkeypatch.setattr(disk, "write", publish_and_rot)
    trainee.save(2)
    assert trainee.steps == [1]
    again = Trainee(make_run("a"), keep=KeepConfig(last=1))
    checkpoint = again.saver.resume()
    assert checkpoint is not None and checkpoint.step == 1 and equal(before, again.tensors())


def test_a_step_saved_again_replaces_nothing_before_it_is_whole(make_run: MakeRun) -> None:
    """The second checkpoint of a step has a name of its own, is the one loaded, and supersedes the first."""
    trainee = Trainee(make_run("a"))
    trainee.save(4)
    trainee.saver.save(4, {"note": "again"})
    trainee.saver.wait()
    assert [path.name for path in disk.listing(trainee.saver.folder)] == ["00000004-1"]
    checkpoint = Trainee(make_run("a")).saver.resume()
    assert checkpoint is not None and checkpoint.state == {"note": "again"}


def test_the_best_value_is_known_after_resuming(make_run: MakeRun) -> None:
    """Lower than the best kept, or it is not the best; a metric that is not measured is named with those that are."""
    keep = KeepConfig(best="eval/loss")
    Trainee(make_run("a"), keep=keep).save(1, 2, score={1: 0.5, 2: 0.8})
    saver = Trainee(make_run("a"), keep=keep).saver
    saver.resume()
    assert saver.improves({"eval/loss": 0.6}) is None and saver.improves({"eval/loss": 0.4}) == 0.4
    assert saver.improves({"eval/loss": float("nan")}) is None
    with pytest.raises(UserError, match=r"keep.best = 'eval/loss': the evaluation of a-0 gives eval/accuracy"):
        saver.improves({"eval/accuracy": 0.4})
    with pytest.raises(ConfigError, match="last = 0: must be at least 1"):
        KeepConfig(last=0)


# -- what is refused


def test_another_runs_checkpoint_is_refused_with_both_fingerprints(make_run: MakeRun) -> None:
    """A whole checkpoint copied from elsewhere is not damaged; it stays where it is, and nothing is loaded."""
    trainee = Trainee(make_run("a"))
    trainee.save(1)
    path = trainee.saver.folder / "00000001"
    tensors, facts = disk.read(path)
    shutil.rmtree(path)
    disk.write(path, tensors, json.dumps(facts | {"fingerprint": "e" * 20}), before_publishing=lambda: None)
    other = Trainee(make_run("a"))
    before = other.tensors()
    with pytest.raises(UserError, match=f"belongs to a run of fingerprint {'e' * 20} and this run's is {'f' * 20}"):
        other.saver.resume()
    assert path.is_dir() and equal(before, other.tensors())


def test_another_runs_checkpoint_is_taken_on_the_users_word_and_told(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `allow_changed`: weights and state are the other run's, this run's log stays, and the manifest says it."""
    trainee = Trainee(make_run("a"))
    trainee.save(1)
    path = trainee.saver.folder / "00000001"
    tensors, facts = disk.read(path)
    shutil.rmtree(path)
    facts = facts | {"fingerprint": "e" * 20, "run": facts["run"] | {"offsets": {"events": 0, "specimens": 0}}}
    disk.write(path, tensors, json.dumps(facts), before_publishing=lambda: None)
    other = Trainee(make_run("a"))
    other.saver.run.settings = replace(other.saver.run.settings, allow_changed=True)
    other.saver.run.notice("earlier", {}, 0)
    assert other.saver.resume() is not None
    assert equal(trainee.tensors(), other.tensors())
    entry = {"fingerprint": "e" * 20, "step": 1}
    told = [(event.name, event.value) for event in read_events(other.saver.run.dir, kind="notice")]
    assert told == [("earlier", {}), ("checkpoint of another run", entry)]
    assert other.saver.run.state()["summary"]["continued_from"] == [entry]
    assert f"{path}: of a run of fingerprint {'e' * 20}, allowed" in capsys.readouterr().err
    other.save(2)  # from here on the checkpoints are this run's, and remember what came before
    again = Trainee(make_run("a"))
    assert again.saver.resume() is not None
    assert again.saver.run.state()["summary"]["continued_from"] == [entry]


def test_tensors_of_another_precision_are_refused(make_run: MakeRun) -> None:
    """The same shapes in bf16: an fp32 run would go on with weights of 8 bits."""
    trainee = Trainee(make_run("a"))
    trainee.save(1)
    other = Trainee(make_run("a"))
    other.model.bfloat16()
    with pytest.raises(UserError, match=r"and this model differ in model/.*move it away"):
        other.saver.resume()


def test_other_tensors_are_refused_before_any_is_loaded(make_run: MakeRun) -> None:
    """One parameter is missing in the model: its name is said."""
    trainee = Trainee(make_run("a"))
    trainee.save(1)
    other = Trainee(make_run("a"))
    del other.model.get_submodule("model.layers.1").input_layernorm  # type: ignore[attr-defined]
    before = other.tensors()
    with pytest.raises(UserError, match=r"differ in model/model.layers.1.input_layernorm.weight"):
        other.saver.resume()
    assert equal(before, other.tensors())


def test_a_run_whose_first_checkpoint_cannot_fit_is_refused(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte less than needed: refused before the first step with path, needed and free; with that byte it starts."""
    trainee = Trainee(make_run("a"))
    needed = trainee.saver.num_bytes()
    usage = shutil.disk_usage(trainee.saver.run.dir)
    for free, refused in ((needed - 1, True), (needed, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if refused:
            with pytest.raises(DiskFull, match=f"needs {needed:,} bytes .*a-0/checkpoints has {free:,} free") as error:
                trainee.saver.resume()
            assert error.value.exit_code == 5
        else:
            assert trainee.saver.resume() is None


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_bytes_known_beforehand_are_those_of_the_file(make_run: MakeRun, kind: str) -> None:
    """Before the first step there is no optimizer state yet; the figure is that of the tensors saved after it."""
    trainee = Trainee(make_run("a"), kind)
    known = trainee.saver.num_bytes()
    trainee.save(1)
    file = load_file(trainee.saver.folder / "00000001" / disk.TENSORS)
    assert known == sum(tensor.numel() * tensor.element_size() for tensor in file.values())


# -- what goes wrong while writing


@pytest.mark.parametrize(
    ("number", "kind", "code", "said"),
    [(errno.ENOSPC, DiskFull, 5, r"no space for .*00000002: it needs [\d,]+ bytes and [\d,]+ are free"),
     (errno.EIO, UserError, 2, r"00000002 could not be written \(.*\)")],
)  # fmt: skip
def test_a_failed_write_surfaces_at_the_next_step(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[UserError], code: int, said: str
) -> None:
    """`save` returns; the next `check` raises it once, names what is kept, and nothing was published."""
    trainee = Trainee(make_run("a"))
    trainee.save(1)

    def fail(*_: object) -> None:
        raise OSError(number, "x")

    monkeypatch.setattr(disk, "save_file", fail)
    trainee.saver.save(2)
    assert trainee.saver._written.wait(60)
    with pytest.raises(kind, match=f"{said}.*00000001 is whole and is kept") as error:
        trainee.saver.check()
    assert error.value.exit_code == code
    trainee.saver.check()
    assert [path.name for path in trainee.saver.folder.iterdir()] == ["00000001"]


def test_an_error_in_the_loop_waits_for_the_write_and_stays_the_error(make_run: MakeRun, gate: threading.Event) -> None:
    """The last checkpoint is whole when the exception has left."""
    trainee = Trainee(make_run("a"))
    threading.Timer(0.05, gate.set).start()
    with pytest.raises(ZeroDivisionError), trainee.saver:
        trainee.saver.save(1)
        raise ZeroDivisionError
    assert trainee.steps == [1]


def test_unfinished_ones_are_removed_at_the_start(make_run: MakeRun) -> None:
    """What a killed writer left does not stay, and is not taken for a checkpoint."""
    trainee = Trainee(make_run("a"))
    trainee.save(1)
    left = trainee.saver.folder / "00000002.tmp"
    shutil.copytree(trainee.saver.folder / "00000001", left)
    checkpoint = Trainee(make_run("a")).saver.resume()
    assert checkpoint is not None and checkpoint.step == 1 and not left.exists()


def test_a_log_shorter_than_the_checkpoint_remembers_is_not_filled_with_nothing(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """A power cut took lines of the log: what is there stays readable, and the gap is named."""
    run = make_run("a")
    trainee = Trainee(run)
    for step in (1, 2, 3):
        run.metric("train/loss", float(step), step)
    trainee.save(3)
    log = run.dir / "events.jsonl"
    log.write_bytes(log.read_bytes()[:-10])
    again = make_run("a")
    Trainee(again).saver.resume()
    assert "the log has a gap" in capsys.readouterr().err
    again.metric("train/loss", 4.0, 4)
    assert [event.value for event in read_events(again.dir)] == [1.0, 2.0, 4.0]
