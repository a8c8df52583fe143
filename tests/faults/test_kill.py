"""R1, R5: a process killed or asked to stop at any instant, and started again by the same command.

Pre-training with a moving average, and fine-tuning with the spike guard, on one thread; a checkpoint every 3 steps, an
evaluation every 7, so that the two fall together and apart.
"""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from trivium.records import from_dict
from trivium.runs.manifest import RunManifest
from trivium.training import checkpoint_folder as disk

from .conftest import Workspace, assert_equal, repeated

TRAINED = pytest.mark.parametrize("table", ["pretrain", "sft"])


@TRAINED
@pytest.mark.parametrize("seed", [1])
@repeated(kills=(4, 50))
def test_r1_killed_at_random_instants(whole: Workspace, tmp_path: Path, table: str, seed: int, kills: int) -> None:
    """SIGKILL: weights equal to the bit, logs but for clock times, nothing to do by hand, nothing left over."""
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


@TRAINED
@pytest.mark.parametrize("seed", [2])
@repeated(signals=(3, 20))
def test_r5_asked_to_stop_at_random_instants(
    whole: Workspace, tmp_path: Path, table: str, seed: int, signals: int
) -> None:
    """SIGTERM: exit code 143, the checkpoint is of the last step that was logged, and the same command goes on."""
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
