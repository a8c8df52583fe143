"""The guard of the step: what is not finite, or a spike, moves nothing, is counted, and ends the run if it goes on."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trivium.config import UserError, bounds
from trivium.runs.manifest import Run
from trivium.training.step import StepResult


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Which steps are passed over, and how many in a row end the run."""

    max_skipped: int = 5
    """Steps in a row that may be passed over; one more stops the run: one is an accident, six are divergence."""
    spike_factor: float = 0.0
    """A gradient norm above this multiple of the running median is passed over; 0 means that none is."""
    window: int = 100
    """Steps that the running median looks back on; before there are so many, no spike is seen."""

    def __post_init__(self) -> None:
        """Refuse values outside their range; a factor up to 1 would pass over half of all steps."""
        bounds(self, max_skipped=(0, None), spike_factor=(0, None), window=(2, None))
        if self.spike_factor:
            bounds(self, spike_factor=(1.01, None))


class Guard:
    """Counts what was passed over, and remembers the last gradient norms."""

    def __init__(self, config: GuardConfig) -> None:
        """Start with nothing seen."""
        self.config = config
        self.count = 0
        self.in_a_row = 0
        # Spikes enter too: a norm that has risen for good becomes the median, instead of locking the run out.
        self._norms: deque[float] = deque(maxlen=config.window)

    @property
    def limit(self) -> float:
        """The largest gradient norm that the next step may have."""
        if not self.config.spike_factor or len(self._norms) < self.config.window:
            return math.inf
        return self.config.spike_factor * statistics.median(self._norms)

    def judge(self, result: StepResult) -> str:
        """Take a step's result in and return why it was passed over, or "" when it was not."""
        finite = math.isfinite(result.grad_norm)
        if finite and self.config.spike_factor:
            self._norms.append(result.grad_norm)
        self.count += result.skipped
        self.in_a_row = self.in_a_row + 1 if result.skipped else 0
        return "" if not result.skipped else "spike" if finite else "not finite"

    def raise_if_diverged(self, run_id: str, reason: str) -> None:
        """Raise UserError after more than `max_skipped` steps in a row."""
        if self.in_a_row > self.config.max_skipped:
            what = "was not finite" if reason == "not finite" else "was above its limit"
            raise UserError(f"{run_id}: the gradient {what} {self.in_a_row} steps in a row; lower the learning rate")

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        return {"count": self.count, "in_a_row": self.in_a_row, "norms": list(self._norms)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take `state()` back."""
        self.count, self.in_a_row = state["count"], state["in_a_row"]
        self._norms.extend(state["norms"])


class Guards:
    """The guards of a stage with an outer loop of its own: one for each network, by name.

    Not one for all, because a network that learns would hide another that has stopped to.
    """

    def __init__(self, run: Run, names: Iterable[str]) -> None:
        """Start with nothing seen."""
        self.run = run
        self._guards = {name: Guard(GuardConfig()) for name in names}

    def take(self, name: str, result: StepResult, round_: int) -> StepResult:
        """Take the result of a network's step in and return it; one that was passed over is told.

        Raises UserError after more than `GuardConfig.max_skipped` in a row.
        """
        guard = self._guards[name]
        reason = guard.judge(result)
        if reason:
            facts = {"reason": reason, "network": name, "loss": result.loss, "grad_norm": result.grad_norm}
            self.run.notice("step skipped", facts, round_)
            guard.raise_if_diverged(self.run.id, reason)
        return result

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of them."""
        return {name: guard.state() for name, guard in self._guards.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take `state()` back; a checkpoint of before there were guards has none."""
        for name, own in state.items():
            self._guards[name].restore(own)
