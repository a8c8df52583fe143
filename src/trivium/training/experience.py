"""A round of completions as PPO's experience: their rewards per token on the leash of KL, advantages and returns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from trivium.batches import IGNORE, RolloutBatch, TokenBatch
from trivium.config import ConfigError, Dial, RunSettings, bounds
from trivium.losses import ppo as losses
from trivium.losses.logprobs import whiten
from trivium.models.heads import ScalarModel
from trivium.models.transformer import Transformer
from trivium.training.distributed import autocast
from trivium.training.rollout import completion_logprobs, reference_logprobs, rows_over_ranks, token_values


@dataclass(frozen=True, kw_only=True)
class ExperienceConfig:
    """What a completion is worth, and the leash; part of the `[ppo]` table itself."""

    kl_coef: float = 0.05
    """Weight of the per-token KL (k1, nats) in the reward; where it starts when a target is set."""
    kl_target: float = 0.0
    """KL per completion (nats) that the adaptive controller holds; 0 keeps `kl_coef` fixed."""
    kl_horizon: Dial[float] = 0.0
    """Rounds in which the controller moves `kl_coef` by at most 20%; 0 means 10."""
    kl_gain: Dial[float] = 0.0
    """How much a KL off its target changes the price at once: by `exp(gain * error)`; 0 leaves it to the horizon."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    whiten_rewards: Dial[bool] = False
    """Divide the rewards of a round's tokens by their standard deviation, their mean kept."""
    missing_eos_penalty: float = 1.0
    """Taken off the score of a completion that was cut at the length limit."""

    def __post_init__(self) -> None:
        """Refuse values outside their range, and settings of a controller that is off."""
        bounds(self, kl_coef=(0, None), kl_target=(0, None), kl_horizon=(0, None), kl_gain=(0, None))
        bounds(self, gamma=(0, 1), lam=(0, 1), missing_eos_penalty=(0, None))
        for name in ("kl_horizon", "kl_gain"):
            if getattr(self, name) and not self.kl_target:
                raise ConfigError(f"{name} = {getattr(self, name)} is the adaptive controller's; set kl_target, too")

    def controller(self, batch_size: int) -> losses.AdaptiveKL:
        """Return the controller of `kl_coef` for rounds of `batch_size` completions."""
        return losses.AdaptiveKL(
            self.kl_coef, self.kl_target or None, horizon=(self.kl_horizon or 10) * batch_size, gain=self.kl_gain
        )


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What looks at a completion again: the network that wrote it, the one that it started as, and the forecaster."""

    policy: Transformer
    reference: Transformer
    value: ScalarModel


def experience(
    tokens: TokenBatch,
    scores: Tensor,
    networks: Networks,
    config: ExperienceConfig,
    settings: RunSettings,
    *,
    kl_coef: float,
    temperature: float,
) -> RolloutBatch:
    """Return completions (`tokens` [B, T], on the device) with their `scores` [B] as what the update learns from.

    Log-probabilities of policy and reference at the sampling `temperature`, the KL between them in the reward, values,
    whitened advantages, returns. The rows are shared out over the ranks, and every rank gets all of them.
    """
    device = tokens.input_ids.device
    mask = tokens.targets != IGNORE
    with autocast(settings):
        old = rows_over_ranks(tokens, partial(completion_logprobs, networks.policy, temperature=temperature))
        reference = rows_over_ranks(tokens, partial(reference_logprobs, networks.reference, temperature=temperature))
        values = rows_over_ranks(tokens, partial(token_values, networks.value)).masked_fill(~mask, 0.0)
    kl = losses.kl_k1(old, reference)
    rewards = losses.shape_rewards(scores.to(device), kl, mask, kl_coef)
    if config.whiten_rewards:  # the mean stays: without it a reward would be what it is against the round's others
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = losses.gae(rewards, values, mask, config.gamma, config.lam)
    return RolloutBatch(
        tokens=tokens,
        mask=mask,
        old_logprobs=old,
        ref_logprobs=reference,
        returns=returns,
        values=values,
        advantages=whiten(advantages, mask),
        rewards=rewards,
        scores=scores.to(device),
    )
