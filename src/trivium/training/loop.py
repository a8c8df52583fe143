"""The loop that pretrain, sft, reward_model and dpo share: batch, step, log, look, save.

All side work hangs on named moments; a stage hands over an objective and a function from step to micro-batches.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from trivium.config import Stopped, UserError, bounds
from trivium.runs.manifest import Run
from trivium.training.checkpoint import resume, save_checkpoint
from trivium.training.distributed import all_reduce_max, all_reduce_sum, autocast, check_shares
from trivium.training.optim import OptimConfig, Optimizer
from trivium.training.parallel import spread, whole
from trivium.training.schedule import lr_scale
from trivium.training.step import B, Objective, StepResult, train_step

MAX_SKIPPED = 5
"""How many steps in a row may be non-finite before the run stops: one is an accident, five are divergence."""


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
    """Steps between checkpoints."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        bounds(self, steps=(0, None), batch_size=(1, None), micro_batch_size=(0, None), log_every=(1, None))
        bounds(self, eval_every=(0, None), save_every=(1, None))


class StopRequest:
    """Whether a signal asked the loop to stop at the end of the step it is in."""

    def __init__(self) -> None:
        """Start with no signal received; `signal` is what all ranks know of, once they have `agreed`."""
        self.received = self.signal = 0

    def agreed(self) -> int:
        """Return the signal, if any of the ranks received one: they must stop after the same step.

        One that arrives while they agree is still in `received` for the next time, on this rank alone until then.
        """
        self.signal = all_reduce_max(self.received)
        return self.signal


@contextlib.contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Yield a StopRequest that the first SIGTERM or Ctrl-C sets; a second one acts at once, as before."""
    request = StopRequest()
    before: dict[int, object] = {}

    def note(number: int, _: object) -> None:
        request.received = number
        signal.signal(number, before[number])  # type: ignore[arg-type]

    try:
        for number in (int(signal.SIGTERM), int(signal.SIGINT)):
            before[number] = signal.getsignal(number)
            signal.signal(number, note)
    except ValueError:  # not the main thread: the embedding program owns the signals
        before.clear()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def raise_if_stopped(request: StopRequest, step: int) -> None:
    """Raise Stopped when a signal asked for it; the caller has just saved a checkpoint."""
    if request.signal:
        raise Stopped(request.signal, f" after step {step}, checkpoint saved")


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
    Raises UserError when training diverges and Stopped after a signal.
    """
    check_shares(batch_size=config.batch_size)
    objective = spread(model, objective, run.settings)
    optimizer = Optimizer(model, config.optim)
    checkpoint = resume(run, modules={"model": model}, optimizers={"model": optimizer})
    start = checkpoint.step if checkpoint else 0
    skipped = 0
    with graceful_stop() as stop, run.progress("training", config.steps - start) as advance:
        clock, tokens_since = time.monotonic(), 0
        for step in range(start, config.steps):
            batches = micro_batches(step)
            scale = lr_scale(config.optim.schedule, step, config.steps)
            model.train()
            result = train_step(objective, batches, optimizer, lr_scale=scale, precision=autocast(run.settings))
            num_tokens = int(all_reduce_sum(torch.tensor(tokens_in(batches)))) if tokens_in else 0
            tokens_since += num_tokens
            run.spend(tokens=num_tokens, flops=flops_per_item * num_tokens)
            skipped = skipped + 1 if result.skipped else 0
            if skipped > MAX_SKIPPED:
                raise UserError(
                    f"{run.id}: the gradient was not finite {skipped} steps in a row; lower the learning rate"
                )
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                rate = tokens_since / max(time.monotonic() - clock, 1e-9)
                _log(run, result, config.optim.lr * scale, rate, done)
                clock, tokens_since = time.monotonic(), 0
            if evaluate and (done == config.steps or (config.eval_every and done % config.eval_every == 0)):
                model.eval()
                with whole(model):
                    for name, value in evaluate(done).items() if run.owner else ():
                        run.metric(name, value, done)
            advance(loss=result.loss)
            if stop.agreed() or (done % config.save_every == 0 and done < config.steps):
                save_checkpoint(run, done, modules={"model": model}, optimizers={"model": optimizer})
            raise_if_stopped(stop, done)
    model.eval()


def _log(run: Run, result: StepResult, lr: float, rate: float, step: int) -> None:
    run.metric("train/loss", result.loss, step)
    run.metric("train/grad_norm", result.grad_norm, step)
    run.metric("train/lr", lr, step)
    if rate:
        run.metric("train/tokens_per_s", rate, step)
    if result.skipped:
        run.metric("train/skipped", 1.0, step)
    for name, value in result.metrics.items():
        run.metric(f"train/{name}", value, step)
