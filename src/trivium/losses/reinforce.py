"""REINFORCE with a baseline that needs no value model: RLOO and REINFORCE++.

In both the KL to the reference is part of the *reward* (k1, whose gradient there is that of the reverse KL), not of
the loss as in `losses/grpo.py`. Every [B, T] tensor is aligned with the targets and counts over `mask` only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trivium.losses.grpo import group_advantages
from trivium.losses.logprobs import masked_sum, whiten
from trivium.losses.ppo import gae, policy_loss, shape_rewards


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return each completion's reward less the mean of its group's *other* ones, fp32 [N].

    `rewards` [N], `groups` int64 [N] (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740). It equals
    `n / (n - 1) * (r - mean)` for a group of n: unlike the group's mean, this baseline does not contain the sample
    itself, so the gradient is unbiased. A group of one, or of equal rewards, gives exactly 0.

    Worked: rewards 1, 0, 0, 1 give 2/3, -2/3, -2/3, 2/3; as 1 - (0 + 0 + 1) / 3.
    """
    ids, index = torch.unique(groups, return_inverse=True)
    counts = torch.zeros(len(ids), device=rewards.device).index_add(0, index, torch.ones_like(rewards.float()))
    return (group_advantages(rewards, groups, "none") * counts[index]) / (counts[index] - 1).clamp(min=1)


def penalised(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return each completion's score less `kl_coef` times its KL, fp32 [B]; `kl` [B, T] is `kl_k1` per token.

    The reward that RLOO maximises (Ahmadian et al. 2024). Worked: score 2, kl (0.1, 0.3), kl_coef 0.5 give 1.8.
    """
    return scores.float() - kl_coef * masked_sum(kl, mask)


def rloo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float, mask: Tensor) -> Tensor:
    """Return the loss of each *completion*, fp32 [B]: PPO's clipped term on the probability of the whole completion.

    `ratio = exp(sum_t (logprobs - old_logprobs))`: RLOO holds that the completion is the action, not the token.
    `advantages` [B, T] repeat the completion's over its tokens. On the first update the gradient is
    `-A grad log p(completion)`, not divided by the length. Rows need at least one token in `mask`.

    Worked, clip_range 0.2, A = 1: two tokens with log ratios 0.05 and 0.05 give -exp(0.1) = -1.1052.
    """
    first = mask.int().argmax(-1, keepdim=True)
    whole = masked_sum(logprobs, mask), masked_sum(old_logprobs, mask)
    return policy_loss(*whole, advantages.gather(-1, first).squeeze(-1), clip_range)


def returns_to_go(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return the reward that is still to come at each token, fp32 [B, T], 0 outside the mask.

    `G_t = score - kl_coef * sum_{i >= t} kl_i` (Hu et al. 2025, arXiv 2501.03262): PPO's shaped reward with no discount
    and no value model.

    Worked: score 2, kl (0.1, 0.3), kl_coef 0.5 give 2 - 0.2 = 1.8 and 2 - 0.15 = 1.85.
    """
    rewards = shape_rewards(scores, kl, mask, kl_coef)
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)[0]


def normalised(returns: Tensor, mask: Tensor) -> Tensor:
    """Return `returns` [B, T] with mean 0 and variance 1 over all tokens of the round: REINFORCE++'s advantages.

    Over the *round*, not over a group (Hu et al. 2025), so prompts need not be asked more than once; call it before
    the round is split. Returns that are all equal give exactly 0: they teach nothing. Left out: the paper's variant
    with the group's mean as a baseline first.
    """
    inside = returns[mask]
    if not len(inside) or bool(inside.amax() == inside.amin()):
        return torch.zeros_like(returns, dtype=torch.float32)
    return whiten(returns, mask)
