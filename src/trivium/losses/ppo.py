"""PPO for language models: KL estimators, rewards per token, advantages, the clipped losses, the KL controller.

Every [B, T] tensor is aligned with the targets: column t is the token that position t predicts, `mask` (bool [B, T]) is
true where that token was sampled. What stands outside the mask never reaches a result.

Where a KL term may stand (checked by exact enumeration in tests/losses): as a *reward*, `kl_k1` has the gradient of the
reverse KL(policy || reference); as a *loss*, `kl_k1` has none at all on average, `kl_k2` has that of the reverse KL,
and `kl_k3` that of the forward KL unless it is weighted with the ratio (losses/grpo.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return `log p - log ref` [B, T] (nats): unbiased for KL(p || ref) under samples of p, sometimes negative."""
    return logprobs.float() - ref_logprobs.float()


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return `(log p - log ref)^2 / 2` [B, T]: never negative, slightly biased in value, unbiased in gradient."""
    return kl_k1(logprobs, ref_logprobs).square() / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return `exp(d) - 1 - d` with `d = log ref - log p` [B, T]: unbiased in value, never negative, low variance."""
    lead = -kl_k1(logprobs, ref_logprobs)
    return torch.expm1(lead) - lead


def penalise_unfinished(scores: Tensor, finished: Tensor, penalty: float) -> Tensor:
    """Return `scores` [B] less `penalty` where `finished` (bool [B], the end token was sampled) is false.

    A completion cut at the length limit was never judged as a whole; without this the policy learns to ramble
    (the EOS trick of Huang et al. 2024, "The N+ implementation details", detail 4). Raises ValueError for a negative
    penalty, which would be a prize.
    """
    if penalty < 0:
        raise ValueError(f"penalty {penalty} is negative: it would reward unfinished completions")
    return scores.float() - penalty * (~finished.bool()).float()


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return the reward of each token, fp32 [B, T]: `-kl_coef * kl`, plus the score on the row's last masked token.

    `scores` [B] of whole completions, `kl` [B, T] per token (`kl_k1`). So each row sums to
    `score - kl_coef * sum(kl)` (Stiennon et al. 2020, section 3.4). A row without sampled tokens is all zero.

    Worked: score 2, kl (0.1, 0.3), kl_coef 0.5, mask (0, 1, 1, 0) gives 0, -0.05, 2 - 0.15, 0.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).max(dim=1, keepdim=True).values
    rewards = torch.where(mask, -kl_coef * kl.float(), 0.0)
    return rewards + torch.where(positions == last, scores.float().unsqueeze(-1), 0.0)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns), each fp32 [B, T], 0 outside the mask.

    `A_t = sum_l (gamma lam)^l delta_{t+l}`, `delta_t = r_t + gamma V_{t+1} - V_t`, `returns = A + V` (Schulman et al.
    2016, eq. 16), where "next" is the row's next *masked* token: tokens in between (a tool's answer, a user's turn, a
    pad) take no part. After the last token the value is 0, also for a completion cut at the length limit: a missing
    end is scored (`penalise_unfinished`), not guessed. `bootstrap` [B] gives another value there.
    """
    rewards, values = rewards.float(), values.float()
    rows, length = rewards.shape
    next_value = torch.zeros(rows, device=rewards.device) if bootstrap is None else bootstrap.float()
    next_advantage = torch.zeros(rows, device=rewards.device)
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(length)):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(here, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, next_advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float, mask: Tensor | None = None
) -> Tensor:
    """Return PPO's clipped loss of each token, fp32 [B, T], 0 outside `mask`.

    `-min(ratio A, clip(ratio, 1 - clip_range, 1 + clip_range) A)`, `ratio = exp(logprobs - old_logprobs)` (Schulman
    et al. 2017, eq. 7). Without a `mask` the inputs must be 0 outside it, as `token_logprobs` and `gae` leave them.

    Worked, clip_range 0.2: ratio 1.5 gives -1.2 for A = 1 and 1.5 for A = -1; ratio 0.5 gives -0.5 and 0.8.
    """
    ratio = _ratio(logprobs, old_logprobs, mask)
    advantages = advantages.float() if mask is None else torch.where(mask, advantages.float(), 0.0)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def is_clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Return where the clip holds the gradient back, bool [B, T]: what `clip_frac` counts over the mask."""
    ratio = _ratio(logprobs, old_logprobs, None)
    return torch.where(advantages > 0, ratio > 1 + clip_range, (ratio < 1 - clip_range) & (advantages < 0))


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    clip_range_value: float | None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the value model's loss of each token, fp32 [B, T], 0 outside `mask`.

    `max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2`, as in lm-human-preferences; c = None does not clip.
    Without a `mask` the inputs must be 0 outside it.

    Worked, c = 0.2: V_old 0, R 1, V 0.5 clips to 0.2 and costs 0.8^2 / 2 = 0.32 instead of 0.125.
    """
    values, old_values, returns = (
        x if mask is None else torch.where(mask, x, 0.0) for x in (values, old_values, returns)
    )
    error = (values.float() - returns.float()).square()
    if clip_range_value is not None:
        held = values.float().clamp(old_values.float() - clip_range_value, old_values.float() + clip_range_value)
        error = torch.maximum(error, (held - returns.float()).square())
    return error / 2


def _ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor | None) -> Tensor:
    lead = logprobs.float() - old_logprobs.float()
    return (lead if mask is None else torch.where(mask, lead, 0.0)).exp()


class AdaptiveKL:
    """Keeps the KL per completion near a target by moving `kl_coef`.

    With `gain` 0 the controller of Ziegler et al. 2019, section 2.2: its coefficient sums up the errors of the past, so
    it is late, and falls for as long as a fresh policy has not yet had the time to move. A `gain` answers to the error
    of now as well. `value` is the coefficient to use now, `level` what the past has made of it.
    """

    def __init__(self, init: float, target: float | None, horizon: float, gain: float = 0.0) -> None:
        """Start at `init`; `target` in nats per completion (None never moves), `horizon` in completions.

        Raises ValueError unless target and horizon are positive and the gain is not negative.
        """
        if (target is not None and not target > 0) or not horizon > 0 or not gain >= 0:
            raise ValueError(f"target {target} and horizon {horizon} must be positive, gain {gain} not negative")
        self.value = self.level = init
        self.target = target
        self.horizon = horizon
        self.gain = gain

    def update(self, kl: float, n: int) -> float:
        """Move the coefficient after `n` completions of mean KL `kl` (nats) and return it.

        With the error `e = kl / target - 1`: `level *= 1 + clip(e, -0.2, 0.2) * n / horizon`, at most 20% per horizon,
        and `value = level * exp(gain * clip(e, -1, 1))`.
        Worked: level 0.1, target 2, n = horizon, gain 3, kl 2.2: level 0.11, value 0.11 * exp(0.3) = 0.148.
        """
        if self.target is not None:
            error = kl / self.target - 1
            self.level *= 1 + min(max(error, -0.2), 0.2) * n / self.horizon
            self.value = self.level * math.exp(self.gain * min(max(error, -1.0), 1.0))
        return self.value

    def state(self) -> dict[str, float]:
        """Return what a checkpoint holds of it."""
        return {"kl_coef": self.value, "kl_level": self.level}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take `state()` back."""
        self.value, self.level = state["kl_coef"], state["kl_level"]
