"""The loop and its checkpoints: a run cut off anywhere and resumed is the run that was never cut off."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from trivium.batches import TokenBatch
from trivium.config import Stopped, UserError
from trivium.runs.events import read_metrics
from trivium.runs.manifest import Run
from trivium.stages.sft import objective
from trivium.training.checkpoint import Checkpointer
from trivium.training.loop import FitConfig, fit
from trivium.training.optim import OptimConfig, Optimizer

from .conftest import tiny_model

CONFIG = FitConfig(steps=12, log_every=1, save_every=3, optim=OptimConfig(lr=1e-2))


def batch_of(step: int) -> list[TokenBatch]:
    """Return the batch of a step: a pure function of it."""
    ids = torch.randint(8, 32, (4, 12), generator=torch.Generator().manual_seed(step))
    return [TokenBatch(input_ids=ids[:, :-1], targets=ids[:, 1:], positions=torch.arange(11).expand(4, 11))]


def train(run: Run, interrupt_at: int | None = None, config: FitConfig = CONFIG) -> dict[str, torch.Tensor]:
    """Train, perhaps dying at a step, and return the weights."""
    model = tiny_model()

    def batches(step: int) -> list[TokenBatch]:
        if step == interrupt_at:
            raise KeyboardInterrupt
        return batch_of(step)

    fit(run, model, partial(objective, model), batches, config)
    return dict(model.state_dict())


@pytest.mark.parametrize("cut", [1, 3, 4, 7, 11])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_resumed_is_uninterrupted_to_the_bit(make_run: Callable[[str], Run], cut: int, kind: str) -> None:
    """Weights and the loss log are equal whether or not the run died on the way, before and after a checkpoint."""
    config = FitConfig(steps=12, log_every=1, save_every=3, optim=OptimConfig(lr=1e-2, kind=kind))
    whole = train(make_run("whole"), config=config)
    with pytest.raises(KeyboardInterrupt):
        train(make_run("cut"), interrupt_at=cut, config=config)
    resumed = train(make_run("cut"), config=config)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [read_metrics(make_run(name).dir) for name in ("whole", "cut")]
    assert logs[0]["train/loss"] == logs[1]["train/loss"]
    assert len(logs[0]["train/loss"]) == 12


def test_a_signal_saves_a_checkpoint_and_says_where(make_run: Callable[[str], Run]) -> None:
    """SIGTERM in step 4: that step is finished, saved, and the exit code is the shell's 143."""
    model = tiny_model()

    def batches(step: int) -> list[TokenBatch]:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_of(step)

    run = make_run("signal")
    with pytest.raises(Stopped, match="after step 5") as stopped:
        fit(run, model, partial(objective, model), batches, CONFIG)
    assert stopped.value.exit_code == 143
    assert (run.dir / "checkpoints" / "00000005").is_dir()
    assert not list((run.dir / "checkpoints").glob("*.tmp"))


def damaged_files(folder: Path) -> list[tuple[str, Callable[[Path], None]]]:
    """Return ways to damage each file of a checkpoint: a flipped bit, a cut, a loss."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[random.Random(path.name).randrange(len(data))] ^= 1 << 3
        path.write_bytes(bytes(data))

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    ways = {"flip": flip, "cut": cut, "unlink": Path.unlink}
    return [
        (f"{path.name} {name}", partial(way, path)) for path in sorted(folder.iterdir()) for name, way in ways.items()
    ]  # type: ignore[misc]


def test_damage_is_named_and_the_checkpoint_before_it_is_used(
    make_run: Callable[[str], Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file, bit-flipped, truncated or lost: never loaded, set aside, and the older checkpoint serves."""
    for number in range(9):
        with pytest.raises(KeyboardInterrupt):
            train(make_run(f"damage{number}"), interrupt_at=8)
        run = make_run(f"damage{number}")
        newest = run.dir / "checkpoints" / "00000006"
        name, damage = damaged_files(newest)[number]
        damage()  # type: ignore[call-arg]
        model = tiny_model()
        checkpoint = Checkpointer(
            run, modules={"model": model}, optimizers={"model": Optimizer(model, CONFIG.optim)}
        ).resume()
        assert checkpoint is not None and checkpoint.step == 3, name
        assert "00000006" in capsys.readouterr().err
        assert newest.with_suffix(".damaged").is_dir()


def test_divergence_stops_with_a_sentence(make_run: Callable[[str], Run]) -> None:
    """Six non-finite steps in a row end the run and name the way out."""
    model = tiny_model()
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    with pytest.raises(UserError, match="lower the learning rate"):
        fit(make_run("nan"), model, partial(objective, model), batch_of, CONFIG)
