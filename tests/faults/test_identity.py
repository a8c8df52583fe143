"""R8, R10, R11: what a run is, that it is the same twice, and that it does not grow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from trivium.batches import LossOutput
from trivium.records import sha256_file
from trivium.runs.events import read_events
from trivium.training.loop import FitConfig, fit

from .conftest import Net, Small, Workspace, assert_equal, fork

CHANGES: dict[str, Callable[[str], str]] = {
    "data": lambda recipe: recipe.replace("num = 200", "num = 201"),
    "tokenizer": lambda recipe: recipe.replace("vocab_size = 400", "vocab_size = 401"),
    "model": lambda recipe: recipe.replace("num_layers = 1", "num_layers = 2"),
    "seed": lambda recipe: recipe.replace('name = "faults"', 'name = "faults"\nseed = 1'),
}


@pytest.mark.parametrize("what", CHANGES)
def test_r8_a_change_is_another_run_and_the_old_checkpoint_is_refused(
    whole: Workspace, tmp_path: Path, what: str
) -> None:
    """Another run id, begun from nothing: nothing of the old run can get into it by itself.

    A checkpoint carried over by hand is refused, both fingerprints named, and taken with `allow_changed` alone.
    """
    workspace = whole.copy(tmp_path / "w", without="pretrain")
    short = workspace.recipe
    workspace.recipe = short.replace("fit.steps = 20", "fit.steps = 1000000", 1)  # so that it cannot end by itself
    newest = workspace.interrupt("pretrain", signal.SIGTERM)
    old, manifest = workspace.of("pretrain")
    workspace.recipe = CHANGES[what](short)
    if what in ("data", "tokenizer"):
        workspace.run("data_prep", "train_tokenizer")
    child = workspace.start("pretrain")
    assert child.wait() == 0, child.log.read_text()[-2000:]
    (new,) = [folder for folder in (workspace.folder / "pretrain").iterdir() if folder != old]
    shutil.rmtree(new / "model")
    shutil.copytree(newest, new / "checkpoints" / newest.name)
    changed = new / "manifest.json"
    changed.write_text(changed.read_text().replace('"status": "done"', '"status": "stopped"'))
    child = workspace.start("pretrain")
    assert child.wait() == 2
    said = child.log.read_text()
    assert f"{newest.name} belongs to a run of fingerprint {manifest.fingerprint} and this run's is" in said
    assert new.name.rsplit("-", 1)[1] in said.rsplit("this run's is", 1)[1]
    assert (new / "checkpoints" / newest.name).is_dir() and not (new / "model").exists()
    # On the user's word it goes on all the same, where the tensors fit, and says so in three places.
    workspace.recipe = workspace.recipe.replace('name = "faults"', 'name = "faults"\nallow_changed = true')
    child = workspace.start("pretrain")
    code, said = child.wait(), child.log.read_text()
    if what in ("tokenizer", "model"):
        assert code == 2 and f"{newest.name} and this model differ in model/" in said
        return
    assert code == 0, said[-2000:]
    assert f"{newest.name}: of a run of fingerprint {manifest.fingerprint}, allowed; this run goes on from it" in said
    entry = {"fingerprint": manifest.fingerprint, "step": int(newest.name)}
    done = json.loads(changed.read_text())
    assert (done["status"], done["summary"]["continued_from"]) == ("done", [entry])
    told = [event.value for event in read_events(new, kind="notice") if event.name == "checkpoint of another run"]
    assert told == [entry]


def test_r8_one_byte_of_a_users_file_is_another_run(whole: Workspace, tmp_path: Path) -> None:
    """The file's content is in the fingerprint, and so in the run's name."""
    workspace = whole.copy(tmp_path / "w", without="sft")
    data = tmp_path / "w" / "talks.jsonl"
    line = (
        '{{"messages": [{{"role": "user", "content": "Question {0}?"}}, {{"role": "assistant", "content": "Yes."}}]}}\n'
    )
    data.write_text("".join(line.format(number) for number in range(60)))
    workspace.recipe = workspace.recipe.replace("trivium.data.microworld:instructions", str(data))
    workspace.recipe = workspace.recipe.replace("options = { num = 60 }\n", "")
    workspace.run("sft")
    data.write_text(data.read_text().replace("Question 7?", "Question 7!"))
    assert f"input {data} changed" in workspace.run("sft")
    assert len(list((workspace.folder / "sft").iterdir())) == 2


def test_r8_a_damaged_manifest_does_not_cost_the_checkpoints(whole: Workspace, tmp_path: Path) -> None:
    """The checkpoints know which run they are of: it is resumed from them."""
    workspace = whole.copy(tmp_path / "w", without="pretrain")
    workspace.recipe = workspace.recipe.replace("fit.steps = 20", "fit.steps = 300", 1)
    workspace.interrupt("pretrain", signal.SIGKILL)
    (manifest,) = (workspace.folder / "pretrain").glob("*/manifest.json")
    manifest.write_text(manifest.read_text()[:-20])
    assert "left without a manifest that can be read, resumes" in workspace.run("pretrain")
    assert workspace.of("pretrain")[1].status == "done"


@pytest.mark.parametrize("table", ["pretrain", "sft"])
def test_r10_the_same_run_twice_is_the_same(whole: Workspace, tmp_path: Path, table: str) -> None:
    """One thread: weights and log are equal to the bit in another folder and another process."""
    workspace = whole.copy(tmp_path / "w", without=table)
    workspace.run(table)
    assert_equal(workspace, whole, table)


@pytest.mark.slow
def test_r10_one_and_two_threads_are_only_reported(
    whole: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is promised about it: sums may be split otherwise. What was found is printed."""
    workspace = whole.copy(tmp_path / "w", without="pretrain")
    workspace.recipe = workspace.recipe.replace("threads = 1", "threads = 2")
    workspace.run("pretrain")
    hashes = [sha256_file(place.of("pretrain")[0] / "model" / "model.safetensors") for place in (whole, workspace)]
    with capsys.disabled():
        print(f"\n1 and 2 threads: weights {'equal' if hashes[0] == hashes[1] else 'differ'}", file=sys.stderr)


class Numbers:
    """A batch of nothing."""

    num_items = torch.ones(())


def soak(place: Path, steps: int) -> None:
    """Train for `steps` steps with a checkpoint every 10; fail when memory or open files grow after a fifth of them."""
    small = Small(place)
    net = Net()
    page = os.sysconf("SC_PAGE_SIZE")
    measured: list[tuple[int, int]] = []

    def batches(step: int) -> list[Numbers]:
        if step % (steps // 5) == 0 and step:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            measured.append((resident, len(os.listdir("/proc/self/fd"))))
        return [Numbers()]

    def objective(model: Net, batch: Numbers) -> LossOutput:
        return LossOutput(total=sum(p.square().sum() for p in model.parameters()))  # type: ignore[arg-type]

    config = FitConfig(steps=steps, save_every=10, log_every=10, ema_decay=0.9)
    fit(small.run, net, partial(objective, net), batches, config)
    print(f"steps {steps}: (bytes resident, open files) {measured}")
    first, last = measured[0], measured[-1]
    assert last[0] < 1.01 * first[0], f"memory grew: {measured}"
    # A checkpoint may be under way at either look: its file is open then.
    assert abs(last[1] - first[1]) <= 2, f"open files grew: {measured}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_r11_ten_thousand_steps_take_no_more_memory_than_two_thousand(tmp_path: Path) -> None:
    """With a checkpoint every 10 steps: resident memory within 1%, open files constant."""
    child = fork(lambda: soak(tmp_path, 10_000), tmp_path / "log")
    assert child.wait() == 0, child.log.read_text()[-3000:]
