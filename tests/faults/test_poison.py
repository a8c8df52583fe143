"""R9, row 26: a loss that is not finite, once in every stage that trains, and again and again until it is the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from trivium.runs.events import read_events, read_metrics

from .conftest import Workspace
from .poisoned import poison

STAGES = ("pretrain", "sft", "reward_model", "dpo", "ppo", "grpo", "constitutional_ai")
NAN, INFINITE = float("nan"), float("inf")
STEP = 4


def weights_are_finite(folder: Path) -> bool:
    """Tell whether every number of the model that a run left is one."""
    return all(bool(tensor.isfinite().all()) for tensor in load_file(folder / "model" / "model.safetensors").values())


@pytest.mark.parametrize(
    ("table", "name", "factor"),
    [
        *((table, "objective", (INFINITE, NAN)[place % 2]) for place, table in enumerate(STAGES)),
        ("ppo", "value_objective", INFINITE),
    ],
)
def test_r9_one_poisoned_step_moves_nothing_is_told_and_is_the_only_one(
    whole: Workspace, tmp_path: Path, table: str, name: str, factor: float
) -> None:
    """Weights equal to the bit before and after (the stage looks itself), one notice, and the run is done."""
    workspace = whole.copy(tmp_path / "w", without=table)
    child = workspace.start(table, first=lambda: poison(table, {STEP}, factor=factor, name=name))
    assert child.wait() == 0, child.log.read_text()[-3000:]
    folder, manifest = workspace.of(table)
    (notice,) = [event for event in read_events(folder, kind="notice") if event.name == "step skipped"]
    assert notice.value["reason"] == "not finite"
    if table == "ppo":
        assert notice.value["network"] == ("policy" if name == "objective" else "value")
    assert sum(value for _, value in read_metrics(folder)["train/skipped"]) > 0
    assert manifest.status == "done" and weights_are_finite(folder)


@pytest.mark.parametrize("table", STAGES)
def test_r9_six_in_a_row_are_the_end(whole: Workspace, tmp_path: Path, table: str) -> None:
    """From one step on all are poisoned: one sentence and exit code 2, and nothing is published."""
    workspace = whole.copy(tmp_path / "w", without=table)
    child = workspace.start(table, first=lambda: poison(table, range(STEP, 10_000), factor=NAN))
    assert child.wait() == 2, child.log.read_text()[-3000:]
    said = [line for line in child.log.read_text().splitlines() if line.startswith("trivium: ")]
    assert len(said) == 1 and "the gradient was not finite 6 steps in a row; lower the learning rate" in said[0]
    ((manifest,),) = [list((workspace.folder / table).glob("*/manifest.json"))]
    assert json.loads(manifest.read_text())["status"] == "failed"
    assert not (manifest.parent / "model").exists()
    events = [e for e in read_events(manifest.parent, kind="notice") if e.name == "step skipped"]
    assert len(events) == 6


@pytest.mark.timeout(300)
def test_r9_one_ranks_infinity_is_passed_over_by_both(whole: Workspace, tmp_path: Path) -> None:
    """DPO and GRPO on two ranks, rank 1's loss infinite in one step: neither's weights move, both go on to the end."""
    workspace = whole.finish("dpo").copy(tmp_path / "w", without="dpo")
    recipe = workspace.write_recipe()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    places = os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": places, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    script = str(Path(__file__).with_name("poisoned.py"))
    words = ["run", str(recipe), "--workspace", str(workspace.folder), "--only", "dpo", "grpo"]
    words += ["--run.rank-timeout-s", "60"]
    done = subprocess.run(
        [*launcher, script, "1", "dpo", "grpo", "--", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for table in ("dpo", "grpo"):
        folder, manifest = workspace.of(table)
        skipped = [event for event in read_events(folder, kind="notice") if event.name == "step skipped"]
        assert len(skipped) == 1 and manifest.status == "done" and weights_are_finite(folder)
