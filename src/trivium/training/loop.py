"""The loop that pretrain, sft, reward_model and dpo share: batch, step, log, look, save.

All side work hangs on named moments; a stage hands over an objective and a function from step to micro-batches.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from trivium.config import ConfigError, bounds
from trivium.runs.manifest import Run
from trivium.training.average import Average
from trivium.training.checkpoint import Checkpointer
from trivium.training.checkpoint_folder import KeepConfig
from trivium.training.distributed import all_reduce_sum, autocast, check_shares, decide, world
from trivium.training.guard import Guard, GuardConfig
from trivium.training.optim import OptimConfig, Optimizer
from trivium.training.parallel import spread, whole
from trivium.training.peak import peak_flops
from trivium.training.schedule import lr_scale
from trivium.training.step import B, Objective, StepResult, train_step
from trivium.training.stopping import Interrupted


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long to train, on how much at once, and how often to look."""

    steps: int = 100
    """Optimizer steps."""
    batch_size: int = 16
    """Items (rows, or prompts) per optimizer step over all ranks."""
    micro_batch_size: int = 0
    """Items per forward pass; 0 means the whole batch. Changes memory, not results."""
    log_every: int = 10
    """Steps between logged metrics."""
    eval_every: int = 0
    """Steps between evaluations on held-out data; 0 means only at the end."""
    save_every: int = 100
    """Steps between checkpoints; there is one more after the last step."""
    keep: KeepConfig = field(default_factory=KeepConfig)
    """Which checkpoints stay."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Which steps are passed over."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, evaluated and exported in their place; 0 means none."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        bounds(self, steps=(0, None), batch_size=(1, None), micro_batch_size=(0, None), log_every=(1, None))
        bounds(self, eval_every=(0, None), save_every=(1, None), ema_decay=(0, 0.999999))


def fit(
    run: Run,
    model: nn.Module,
    objective: Objective[B],
    micro_batches: Callable[[int], Sequence[B]],
    config: FitConfig,
    *,
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    flops_per_item: float = 0.0,
    tokens_in: Callable[[Sequence[B]], int] | None = None,
) -> None:
    """Train `model` for `config.steps` steps, resuming from the run's newest checkpoint if there is one.

    `micro_batches(step)` must be a pure function, which is what makes a resumed run equal to an uninterrupted one.
    `evaluate(step)` returns metrics to log. `flops_per_item` are the training FLOPs of one token of a micro-batch.
    Raises UserError when training diverges, DiskFull when a checkpoint does not fit, Stopped after a signal.
    """
    check_shares(batch_size=config.batch_size)
    objective = spread(model, objective, run.settings)  # before the optimizer: sharding replaces the parameters
    fitting = _Fitting(run, model, config, evaluate)
    start = fitting.resume()
    saver = fitting.saver
    if flops_per_item and tokens_in:
        run.machine(peak_flops=peak_flops(run.settings))  # before the first step, so that no step waits for it
    with saver, run.progress("training", config.steps - start) as advance:
        meter = _Meter(saver)
        for step in range(start, config.steps):
            saver.check()
            with meter.waiting_for_data():
                batches = micro_batches(step)
            scale = lr_scale(config.optim.schedule, step, config.steps)
            result = fitting.take_step(objective, batches, scale, step)
            num_tokens = int(all_reduce_sum(torch.tensor(tokens_in(batches)))) if tokens_in else 0
            meter.tokens += num_tokens
            run.spend(tokens=num_tokens, flops=flops_per_item * num_tokens)
            done = step + 1
            last = done == config.steps
            if last or done % config.log_every == 0:
                read = meter.read()
                if flops_per_item and "train/tokens_per_s" in read:
                    peak = world()[1] * peak_flops(run.settings)
                    read["train/mfu"] = read["train/tokens_per_s"] * flops_per_item / peak
                _log(run, result, config.optim.lr * scale, read, done)
            best = None
            if evaluate and (last or (config.eval_every and done % config.eval_every == 0)):
                best = fitting.look(done)
            advance(loss=result.loss)
            if saver.is_due(done, config.save_every, config.steps) or best is not None:
                fitting.save(done, best)
            saver.leave_if_asked(done)
    if fitting.average:
        fitting.average.copy_to_model()
    model.eval()


class _Fitting:
    """What a loop holds besides the model: optimizer, average, guard and checkpoints."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        config: FitConfig,
        evaluate: Callable[[int], Mapping[str, float]] | None,
    ) -> None:
        self.run, self.model, self.config, self.evaluate = run, model, config, evaluate
        if config.keep.best and evaluate is None:
            raise ConfigError(f"keep.best = {config.keep.best!r}: this stage evaluates nothing while it trains")
        self.optimizer = Optimizer(model, config.optim)
        self.average = Average(model, config.ema_decay) if config.ema_decay else None
        self.guard = Guard(config.guard)
        self.saver = Checkpointer(
            run,
            modules={"model": model},
            optimizers={"model": self.optimizer},
            averages={"model": self.average} if self.average else {},
            keep=config.keep,
        )

    def resume(self) -> int:
        """Return the step to go on from; an evaluation that was cut off is done now."""
        torch.manual_seed(self.run.seed)  # for an objective that draws from it (dropout); a checkpoint holds its state
        checkpoint = self.saver.resume()
        if checkpoint is None:
            return 0
        self.guard.restore(checkpoint.state["guard"])
        if checkpoint.state["owes_evaluation"]:
            best = self.look(checkpoint.step)
            if best is not None:
                self.save(checkpoint.step, best)
        return checkpoint.step

    def take_step(self, objective: Objective[B], batches: Sequence[B], scale: float, step: int) -> StepResult:
        """Return what the step did; one that was passed over is logged, counted and, if it goes on, the end."""
        self.model.train()
        limit = self.guard.limit
        precision = autocast(self.run.settings)
        result = train_step(objective, batches, self.optimizer, lr_scale=scale, precision=precision, skip_above=limit)
        reason = self.guard.judge(result)
        if reason:
            # Batches are a function of the step, so its number says which rows they were.
            facts = {"reason": reason, "batch": step, "loss": result.loss, "grad_norm": result.grad_norm}
            self.run.notice("step skipped", facts | {"limit": limit}, step + 1)
            self.run.metric("train/skipped", self.guard.count, step + 1)
            self.guard.raise_if_diverged(self.run.id, reason)
        elif self.average:
            self.average.update()
        return result

    def look(self, done: int) -> float | None:
        """Evaluate and return the value of `keep.best` where it is the best so far.

        A signal cuts the evaluation off: the checkpoint is of the moment before it, and says that it is owed.
        """
        assert self.evaluate is not None
        moment = self.saver.moment()
        metrics: dict[str, float] = {}
        self.model.eval()
        averaged = self.average.in_model() if self.average else contextlib.nullcontext()
        try:
            with averaged, whole(self.model), self.saver.stop.interruptible():
                if self.run.owner:
                    metrics |= self.evaluate(done)
        except Interrupted:
            self.saver.stop.agreed()
            state = {"guard": self.guard.state(), "owes_evaluation": True}
            self.saver.save(done, state, moment=moment)
            self.saver.leave_if_asked(done)
            raise
        for name, value in metrics.items():
            self.run.metric(name, value, done)
        return decide(lambda: self.saver.improves(metrics))

    def save(self, done: int, best: float | None) -> None:
        """Save a checkpoint, with the value of `keep.best` where it is one for that."""
        self.saver.save(done, {"guard": self.guard.state(), "owes_evaluation": False}, score=best)


class _Meter:
    """Where the time goes since the last reading."""

    def __init__(self, saver: Checkpointer) -> None:
        self.saver = saver
        self.tokens = 0
        self._data_s = 0.0
        self._saving_s = saver.seconds
        self._began = time.monotonic()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        began = time.monotonic()
        yield
        self._data_s += time.monotonic() - began

    def read(self) -> dict[str, float]:
        """Return the metrics of the interval that ends now, and begin the next."""
        now = time.monotonic()
        read = {"train/data_s": self._data_s, "train/checkpoint_s": self.saver.seconds - self._saving_s}
        if self.tokens:
            read["train/tokens_per_s"] = self.tokens / max(now - self._began, 1e-9)
        self.tokens, self._data_s, self._saving_s, self._began = 0, 0.0, self.saver.seconds, now
        return read


def _log(run: Run, result: StepResult, lr: float, meter: Mapping[str, float], step: int) -> None:
    run.metric("train/loss", result.loss, step)
    run.metric("train/grad_norm", result.grad_norm, step)
    run.metric("train/lr", lr, step)
    for name, value in meter.items():
        run.metric(name, value, step)
    for name, value in result.metrics.items():
        run.metric(f"train/{name}", value, step)
