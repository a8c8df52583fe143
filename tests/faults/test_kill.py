"""R1, R5: a process killed or asked to stop at any instant, and started again by the same command.

Every stage that trains, on one thread: pre-training with a moving average, fine-tuning with the spike guard, PPO with
the adaptive controller, Constitutional AI whose critic and reviser are the model itself. A checkpoint every 3 steps (or
rounds), an evaluation every 7, so that the two fall together and apart.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from trivium.records import from_dict
from trivium.runs.manifest import RunManifest
from trivium.training import checkpoint_folder as disk

from .conftest import Workspace, assert_equal

ALIGNED = ("reward_model", "dpo", "ppo", "grpo", "constitutional_ai")


def experiments(name: str, few: dict[str, int], full: int) -> pytest.MarkDecorator:
    """Parametrize by table and by how often `name`: so often in CI, `full` times in the soak."""
    slow = (pytest.mark.slow, pytest.mark.timeout(3600))
    short = [pytest.param(table, count, id=f"{table}-{count}") for table, count in few.items()]
    long = [pytest.param(table, full, id=f"{table}-{full}", marks=slow) for table in few]
    return pytest.mark.parametrize(("table", name), [*short, *long])


@pytest.mark.parametrize("seed", [1])
@experiments("kills", {"pretrain": 4, "sft": 4} | dict.fromkeys(ALIGNED, 2), 50)
def test_r1_killed_at_random_instants(whole: Workspace, tmp_path: Path, table: str, seed: int, kills: int) -> None:
    """SIGKILL: weights equal to the bit, logs but for clock times, nothing to do by hand, nothing left over."""
    whole.finish(table)
    rng = random.Random(seed)
    workspace = whole.copy(tmp_path / "w", without=table)
    landed = finished = 0
    while landed < kills:
        child = workspace.start(table)
        time.sleep(rng.uniform(0.0, whole.seconds[table]))
        landed += child.send(signal.SIGKILL)
        if child.wait() == 0:
            finished += 1
            assert_equal(workspace, whole, table)
            workspace = whole.copy(tmp_path / "w", without=table)
        assert finished <= 10 * kills, "it is never killed in time"
    workspace.run(table)
    assert_equal(workspace, whole, table)


@pytest.mark.parametrize("seed", [2])
@experiments("signals", {"pretrain": 3, "sft": 3} | dict.fromkeys(ALIGNED, 2), 20)
def test_r5_asked_to_stop_at_random_instants(
    whole: Workspace, tmp_path: Path, table: str, seed: int, signals: int
) -> None:
    """SIGTERM: exit code 143, the checkpoint is of the last step that was logged, and the same command goes on."""
    whole.finish(table)
    rng = random.Random(seed)
    workspace = whole.copy(tmp_path / "w", without=table)
    landed = finished = 0
    while landed < signals:
        child = workspace.start(table)
        time.sleep(rng.uniform(0.0, whole.seconds[table]))
        child.send(signal.SIGTERM)
        code = child.wait()
        assert code in (0, 143), child.log.read_text()[-3000:]
        if code == 143:
            landed += 1
            _is_saved(workspace, table)
        else:
            finished += 1
            assert_equal(workspace, whole, table)
            workspace = whole.copy(tmp_path / "w", without=table)
        assert finished <= 10 * signals, "it is never stopped in time"
    workspace.run(table)
    assert_equal(workspace, whole, table)


@pytest.mark.parametrize("seed", [3])
@experiments("signals", dict.fromkeys(("sft", "ppo", "grpo", "constitutional_ai"), 1), 20)
def test_r5_a_second_sigterm_ends_it_at_once_and_costs_nothing(
    whole: Workspace, tmp_path: Path, table: str, seed: int, signals: int
) -> None:
    """Two SIGTERMs within 20 ms, in a rollout as in a save: exit code 143 within 10 s, resumed to the same end."""
    whole.finish(table)
    rng = random.Random(seed)
    workspace = whole.copy(tmp_path / "w", without=table)
    landed = 0
    for _ in range(10 * signals):
        child = workspace.start(table)
        workspace.has_begun(table, child)
        time.sleep(rng.uniform(0.0, 0.8 * whole.seconds[table]))
        began = time.monotonic()
        child.send(signal.SIGTERM)
        time.sleep(rng.uniform(0.0, 0.02))
        child.send(signal.SIGTERM)
        code = child.wait()
        assert code in (0, 143), child.log.read_text()[-3000:]
        assert time.monotonic() - began < 10
        landed += code == 143
        if code == 0:
            assert_equal(workspace, whole, table)
            workspace = whole.copy(tmp_path / "w", without=table)
        if landed == signals:
            break
    assert landed == signals, "it is never stopped in time"
    workspace.run(table)
    assert_equal(workspace, whole, table)


def test_r1_answers_that_were_written_are_not_sampled_again_and_still_counted(whole: Workspace, tmp_path: Path) -> None:
    """Killed between the answers and the first checkpoint: the answers stay, and so does what they cost."""
    table = "constitutional_ai"
    workspace = whole.copy(tmp_path / "w", without=table)
    child = workspace.start(table)
    while not (found := list((workspace.folder / table).glob("*/revisions.jsonl"))):
        assert child.poll() is None, child.log.read_text()[-3000:]
        time.sleep(0.002)
    assert child.send(signal.SIGKILL), "it was done before it could be killed"
    child.wait()
    for saved in (found[0].parent / "checkpoints").glob("0*"):  # as if it had been killed before its first one
        shutil.rmtree(saved)
    written = found[0].stat().st_mtime_ns
    workspace.run(table)
    assert found[0].stat().st_mtime_ns == written
    assert_equal(workspace, whole, table)


def _is_saved(workspace: Workspace, table: str) -> None:
    """Assert that the newest checkpoint is whole and of the last logged step, unless the run is done or not begun."""
    manifests = list((workspace.folder / table).glob("*/manifest.json"))
    if not manifests:
        return
    manifest = from_dict(RunManifest, json.loads(manifests[0].read_text()))
    if manifest.status == "done":
        return
    assert manifest.status in ("stopped", "running")
    found = disk.listing(manifests[0].parent / "checkpoints")
    assert not list((manifests[0].parent / "checkpoints").glob("*.tmp"))
    assert (disk.step_of(found[-1]) if found else 0) == workspace.last_logged(table)
    for path in found:
        disk.verify(path)


def test_r5_the_time_limit_has_an_exit_code_of_its_own(whole: Workspace, tmp_path: Path) -> None:
    """A run of a million steps that may take half a second: exit code 4, and everything done is in a checkpoint."""
    workspace = whole.copy(tmp_path / "w", without="pretrain")
    workspace.recipe = workspace.recipe.replace("[data_prep]", "time_limit_s = 0.5\n[data_prep]", 1)
    workspace.recipe = workspace.recipe.replace("fit.steps = 20", "fit.steps = 1000000", 1)
    child = workspace.start("pretrain")
    assert child.wait() == 4, child.log.read_text()[-3000:]
    assert "stopped at the time limit" in child.log.read_text()
    _is_saved(workspace, "pretrain")
    first = workspace.last_logged("pretrain")
    assert workspace.start("pretrain").wait() == 4
    assert workspace.last_logged("pretrain") >= first, "the limit is no part of what the run is: it was resumed"
    assert len(list((workspace.folder / "pretrain").iterdir())) == 1
