"""What PPO trains: a policy and a value model, as two networks or as one with two heads, with their optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trivium.batches import LossOutput, RolloutBatch
from trivium.config import ConfigError, Dial, bounds
from trivium.models.heads import ScalarModel, TwoHeads
from trivium.models.lora import LoraConfig, training_flops
from trivium.models.transformer import Transformer
from trivium.runs.manifest import Run
from trivium.training.guard import Guards
from trivium.training.optim import OptimConfig, Optimizer
from trivium.training.parallel import spread
from trivium.training.side_text import TextBatch
from trivium.training.step import StepResult


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How a round of completions becomes optimizer steps; part of the `[ppo]` table itself."""

    epochs: int = 2
    """Passes over each round's completions."""
    minibatches: int = 2
    """Optimizer steps per pass."""
    clip_range: float = 0.2
    """How far the ratio of new to old probability may move before its gradient stops."""
    clip_range_value: float = 0.2
    """How far a value may move from its old estimate."""
    max_approx_kl: Dial[float] = 0.0
    """KL (nats per token) of the sampling to the current policy above which a round's passes end; 0 never ends them."""
    shared_trunk: Dial[bool] = False
    """One network with two heads instead of a value model of its own."""
    value_coef: Dial[float] = 0.0
    """With `shared_trunk`: weight of the value loss beside the policy's; 0 means 0.1 (lm-human-preferences)."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, weight_decay=0.0))
    """Optimizer of policy and value model."""
    lora: Dial[LoraConfig] = field(default_factory=LoraConfig)
    """Low-rank adapters for policy and value model, on frozen weights; rank 0 means none."""

    def __post_init__(self) -> None:
        """Refuse values outside their range, and a weight of what is not summed."""
        bounds(self, epochs=(1, None), minibatches=(1, None), clip_range=(1e-4, 1))
        bounds(self, max_approx_kl=(0, None), value_coef=(0, None))
        if self.value_coef and not self.shared_trunk:
            raise ConfigError(
                f"value_coef = {self.value_coef} means nothing to a value model with an optimizer of its own; "
                "set shared_trunk = true, or leave it out"
            )

    @property
    def value_weight(self) -> float:
        """The weight of the value loss in the loss of a shared trunk."""
        return self.value_coef or 0.1


class ActorCritic:
    """The networks that are trained, by name: `policy` and `value`, or one called `policy` with both heads.

    `modules` and `optimizers` are what a checkpoint holds, `objectives` what `train_step` minimises.
    """

    def __init__(
        self,
        policy: Transformer,
        value: ScalarModel,
        objectives: Mapping[str, Callable[[Any], LossOutput]],
        config: UpdateConfig,
        run: Run,
    ) -> None:
        """Spread each network that has an objective over the ranks, and make its optimizer and its guard."""
        self.config = config
        trained: dict[str, nn.Module] = {"policy": policy, "value": value}
        if config.shared_trunk:
            trained = {"policy": TwoHeads(policy, value)}
        self.modules = trained
        # Before the optimizers are made: sharding replaces the parameters.
        self.objectives = {name: spread(module, objectives[name], run.settings) for name, module in trained.items()}
        self.optimizers = {name: Optimizer(module, config.optim) for name, module in trained.items()}
        self.guards = Guards(run, trained)
        self.model = policy.config

    def minibatches(self, count: int, *, seed: int) -> Iterator[Tensor]:
        """Yield the row numbers (int64) of each optimizer step over `count` rows, in a new order in every epoch."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.config.epochs):
            yield from torch.randperm(count, generator=generator).tensor_split(self.config.minibatches)

    def step(
        self, take: Callable[..., StepResult], part: RolloutBatch, text: Sequence[TextBatch], round_: int
    ) -> tuple[StepResult, StepResult]:
        """Have `take` (`train_step`) move each network, and return what it did to policy and value: one of two heads.

        Text comes before the completions, because DDP counts on the last micro-batch to use every parameter. Raises
        UserError where a network's gradient was not finite too often in a row (`training.guard`).
        """
        results = {
            name: take(objective, [*text, part] if name == "policy" else [part], self.optimizers[name])
            for name, objective in self.objectives.items()
        }
        for name, result in results.items():
            self.guards.take(name, result, round_)
        return results["policy"], results.get("value", results["policy"])

    def flops_per_token(self, context: int, *, passes: float) -> float:
        """Return the FLOPs of training on a token of a row of `context` so many times over."""
        return len(self.modules) * passes * training_flops(self.model, context, self.config.lora)
