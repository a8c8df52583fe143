"""The loop and its checkpoints: a run cut off anywhere and resumed is the run that was never cut off."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from trivium.batches import LossOutput, TokenBatch
from trivium.config import ConfigError, Stopped, UserError
from trivium.losses.cross_entropy import cross_entropy
from trivium.runs.events import read_events, read_metrics
from trivium.runs.manifest import Run
from trivium.stages.sft import objective
from trivium.training import checkpoint_folder
from trivium.training.checkpoint import Checkpointer, KeepConfig
from trivium.training.guard import GuardConfig
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


def losing(run: Run) -> dict[str, torch.Tensor]:
    """Train with an objective that drops at random from torch's own generator, as a user's might."""
    model = tiny_model()

    def dropping(batch: TokenBatch) -> LossOutput:
        logits = torch.nn.functional.dropout(model.logits(model(batch.input_ids)), 0.3)
        return LossOutput(total=cross_entropy(logits, batch.targets).sum())

    fit(run, model, dropping, cut_at.get(run.id, batch_of), CONFIG)
    return dict(model.state_dict())


def dying_at(step: int) -> Callable[[int], list[TokenBatch]]:
    """Return the batches of a run that dies when it asks for the one of `step`."""

    def batches(number: int) -> list[TokenBatch]:
        if number == step:
            raise KeyboardInterrupt
        return batch_of(number)

    return batches


cut_at: dict[str, Callable[[int], list[TokenBatch]]] = {}


def test_random_numbers_of_torch_go_on_where_they_were(make_run: Callable[[str], Run]) -> None:
    """Dropout in a user's objective: cut off at step 7 and resumed from 6, the weights are those of the whole run."""
    whole = losing(make_run("whole"))
    torch.manual_seed(99)  # whatever else drew from it before
    cut_at["cut-0"] = dying_at(7)
    with pytest.raises(KeyboardInterrupt):
        losing(make_run("cut"))
    del cut_at["cut-0"]
    torch.manual_seed(98)
    resumed = losing(make_run("cut"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# -- signals


def fit_with_signal(
    run: Run, number: int, *, in_batch: int = -1, in_evaluation: int = -1
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Train with an evaluation every 4 steps; send the signal in one; return weights and evaluations that ended."""
    model, evaluated = tiny_model(), list[int]()

    def batches(step: int) -> list[TokenBatch]:
        if step == in_batch:
            signal.raise_signal(number)
        return batch_of(step)

    def evaluate(step: int) -> dict[str, float]:
        run.sample("text", f"before {step}", step)
        if step == in_evaluation:
            signal.raise_signal(number)
        evaluated.append(step)
        run.sample("text", f"after {step}", step)
        return {"eval/loss": float(sum(p.sum() for p in model.parameters()))}

    config = FitConfig(
        steps=12, log_every=1, save_every=5, eval_every=4, ema_decay=0.5, optim=OptimConfig(lr=1e-2, kind="adamw")
    )
    fit(run, model, partial(objective, model), batches, config, evaluate=evaluate)
    return dict(model.state_dict()), evaluated


def story(run: Run) -> list[tuple[object, ...]]:
    """Return what a run logged, without what the clock says."""
    clock = ("train/tokens_per_s", "train/data_s", "train/checkpoint_s")
    return [(e.step, e.kind, e.name, e.value) for e in read_events(run.dir) if e.name not in clock]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGALRM, 4)])
@pytest.mark.parametrize("at", [4, 8, 12])
def test_a_signal_cuts_an_evaluation_off_and_resuming_makes_up_for_it(
    make_run: Callable[[str], Run], number: int, code: int, at: int
) -> None:
    """Neither the rest of it is run nor a step taken; weights, log and evaluations then are those of the whole run."""
    whole, _ = fit_with_signal(make_run("whole"), number)
    run = make_run("cut")
    with pytest.raises(Stopped, match=f"after step {at}, checkpoint saved") as stopped:
        fit_with_signal(run, number, in_evaluation=at)
    assert stopped.value.exit_code == code
    assert [e.value for e in read_events(run.dir, kind="sample")][-1] == f"before {at}"
    again = make_run("cut")
    resumed, evaluated = fit_with_signal(again, number)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert evaluated == [step for step in (4, 8, 12) if step >= at]
    assert story(again) == story(make_run("whole"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGALRM, 4)])
def test_a_signal_in_a_step_before_an_evaluation_saves_without_evaluating(
    make_run: Callable[[str], Run], number: int, code: int
) -> None:
    """The step is finished; the evaluation that would follow is owed, not run."""
    whole, _ = fit_with_signal(make_run("whole"), number)
    with pytest.raises(Stopped, match="after step 8") as stopped:
        fit_with_signal(make_run("cut"), number, in_batch=7)
    assert stopped.value.exit_code == code
    resumed, evaluated = fit_with_signal(make_run("cut"), number)
    assert evaluated == [8, 12] and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert story(make_run("cut")) == story(make_run("whole"))


def test_a_second_signal_acts_at_once(make_run: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first waits for a write that never ends; the second does what it did before there was a loop."""
    never, waiting = threading.Event(), threading.Event()
    monkeypatch.setattr(checkpoint_folder, "write", lambda *_, **__: never.wait(60))
    run = make_run("a")
    wait = Checkpointer.wait

    def noted(saver: Checkpointer) -> None:
        if saver.stop.signal and not waiting.is_set():
            waiting.set()
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        wait(saver)

    monkeypatch.setattr(Checkpointer, "wait", noted)
    began = time.monotonic()

    def leave(*_: object) -> None:
        raise ZeroDivisionError("at once")

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(ZeroDivisionError, match="at once"):
            fit_with_signal(run, signal.SIGTERM, in_batch=2)
        assert signal.getsignal(signal.SIGTERM) is leave
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - began < 30, "it waited for the write, which would have taken a minute"
    never.set()


# -- the guard, the average, the best


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_poisoned_step_moves_nothing_and_says_which_it_was(
    make_run: Callable[[str], Run], poison: float, kind: str
) -> None:
    """NaN or infinity in batch 5: weights and optimizer state stay to the bit, one step is lost, the log names it."""
    model, seen = tiny_model(), dict[int, dict[str, torch.Tensor]]()
    run = make_run("poisoned")

    def poisoned(batch: TokenBatch) -> LossOutput:
        output = objective(model, batch)
        return LossOutput(total=output.total * poison) if len(seen) == 6 else output

    def batches(step: int) -> list[TokenBatch]:
        tensors = saver[0]._tensors()
        seen[step] = {name: tensor.clone() for name, tensor in tensors.items()}
        return batch_of(step)

    saver: list[Checkpointer] = []
    resume = Checkpointer.resume

    def catch(self: Checkpointer) -> object:
        saver.append(self)
        return resume(self)

    config = FitConfig(steps=8, log_every=4, optim=OptimConfig(lr=1e-2, kind=kind), ema_decay=0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "resume", catch)
        fit(run, model, poisoned, batches, config)
    changed = [step for step in range(7) if any(not torch.equal(seen[step][n], seen[step + 1][n]) for n in seen[1])]
    assert changed == [0, 1, 2, 3, 4, 6], "step 5 and no other moved nothing"
    (notice,) = read_events(run.dir, kind="notice")
    assert (notice.name, notice.step, notice.value["batch"], notice.value["reason"]) == (
        "step skipped", 6, 5, "not finite",
    )  # fmt: skip
    assert read_metrics(run.dir)["train/skipped"] == [(6, 1.0)]


def spiking(run: Run, cut: int | None = None) -> dict[str, torch.Tensor]:
    """Train with a batch 9 whose loss is a hundredfold, under a guard; perhaps dying on the way."""
    model = tiny_model()
    step_now = [0]

    def spiky(batch: TokenBatch) -> LossOutput:
        output = objective(model, batch)
        return LossOutput(total=output.total * (100.0 if step_now[0] == 9 else 1.0))

    def batches(step: int) -> list[TokenBatch]:
        if step == cut:
            raise KeyboardInterrupt
        step_now[0] = step
        return batch_of(step)

    guard = GuardConfig(spike_factor=5.0, window=6)
    fit(run, model, spiky, batches, dataclasses.replace(CONFIG, guard=guard))
    return dict(model.state_dict())


def test_a_spike_is_passed_over_also_when_the_run_was_resumed_just_before(make_run: Callable[[str], Run]) -> None:
    """The window of norms is in the checkpoint: resumed at 6 (three norms before it is full again), 9 is still seen."""
    whole = spiking(make_run("whole"))
    (notice,) = read_events(make_run("whole").dir, kind="notice")
    assert (notice.value["batch"], notice.value["reason"]) == (9, "spike")
    assert notice.value["grad_norm"] > notice.value["limit"] > 0
    with pytest.raises(KeyboardInterrupt):
        spiking(make_run("cut"), cut=8)
    resumed = spiking(make_run("cut"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert story(make_run("cut")) == story(make_run("whole"))


def test_the_average_is_what_is_evaluated_and_left(make_run: Callable[[str], Run]) -> None:
    """Weights as they were trained do not depend on it; the evaluation and the end see 0.5 of the old and the new."""
    plain, averaged = tiny_model(), tiny_model()
    looked: list[torch.Tensor] = []
    trained: list[torch.Tensor] = []

    def watch(model: torch.nn.Module, into: list[torch.Tensor]) -> Callable[[int], dict[str, float]]:
        def evaluate(step: int) -> dict[str, float]:
            into.append(next(model.parameters()).detach().clone())
            return {"eval/loss": 0.0}

        return evaluate

    config = FitConfig(steps=3, eval_every=1, optim=OptimConfig(lr=1e-2))
    start = next(plain.parameters()).detach().clone()
    fit(make_run("p"), plain, partial(objective, plain), batch_of, config, evaluate=watch(plain, trained))
    config = dataclasses.replace(config, ema_decay=0.5)
    fit(make_run("a"), averaged, partial(objective, averaged), batch_of, config, evaluate=watch(averaged, looked))
    expected = start
    for weights, seen in zip(trained, looked, strict=True):
        expected = 0.5 * expected + 0.5 * weights
        # lerp(a, b, 0.5) is a + 0.5 (b - a): equal up to one rounding of numbers below 1.
        assert torch.allclose(seen, expected, rtol=0, atol=1e-7) and not torch.equal(seen, weights)
    assert torch.equal(next(averaged.parameters()), looked[-1])


def test_the_best_is_saved_when_it_is_measured(make_run: Callable[[str], Run]) -> None:
    """Evaluated at 2, 4, ..., 12 with 6 the lowest: its checkpoint is there at the end, though none was due at 6."""
    model, values = tiny_model(), {2: 0.9, 4: 0.6, 6: 0.1, 8: 0.5, 10: 0.3, 12: 0.2}
    run = make_run("best")
    config = dataclasses.replace(CONFIG, eval_every=2, save_every=5, keep=KeepConfig(last=1, best="eval/loss"))
    fit(run, model, partial(objective, model), batch_of, config, evaluate=lambda step: {"eval/loss": values[step]})
    assert sorted(path.name for path in (run.dir / "checkpoints").iterdir()) == ["00000006", "00000012"]
    run.finish("done")
    assert (run.dir / "checkpoints" / "00000006").is_dir(), "what was asked for stays when the run is done"
    with pytest.raises(ConfigError, match="this stage evaluates nothing"):
        fit(make_run("none"), model, partial(objective, model), batch_of, config)


def test_waiting_for_data_and_for_checkpoints_is_measured_apart(make_run: Callable[[str], Run]) -> None:
    """A clock that every batch moves by 2 s and every copy for a checkpoint by 5 s shows up as just that."""
    now = [0.0]
    model, run = tiny_model(), make_run("a")

    def batches(step: int) -> list[TokenBatch]:
        now[0] += 2.0
        return batch_of(step)

    copied = Checkpointer._tensors

    def slow(self: Checkpointer) -> dict[str, torch.Tensor]:
        now[0] += 5.0
        return copied(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now[0])
        patch.setattr(Checkpointer, "_tensors", slow)
        fit(run, model, partial(objective, model), batches, dataclasses.replace(CONFIG, log_every=4))
    curves = read_metrics(run.dir)
    assert curves["train/data_s"] == [(4, 8.0), (8, 8.0), (12, 8.0)]
    # Saved after 3, 6, 9 and 12; the last one comes after the last line of the log.
    assert curves["train/checkpoint_s"] == [(4, 5.0), (8, 5.0), (12, 5.0)]


# -- damage


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
