"""Group-relative policy optimisation: the group's mean is the baseline, so there is no value model."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from trivium.losses.ppo import kl_k3, policy_loss


def group_advantages(rewards: Tensor, groups: Tensor, scale: Literal["std", "none"] = "std") -> Tensor:
    """Return the advantage of each completion over its group, fp32 [N].

    `rewards` [N], `groups` int64 [N] (which prompt). `"std"`: `(r - mean) / (std + 1e-4)`, unbiased standard deviation
    (DeepSeekMath, section 4.1.2); `"none"`: `r - mean` (Dr. GRPO, Liu et al. 2025: dividing favours prompts whose
    answers nearly all agree). A group of one, or of equal rewards, gives exactly 0.

    Worked: rewards 1, 0, 0, 1 of one group have mean 0.5 and std 0.5774, so the advantages are +-0.8659 or +-0.5.
    """
    rewards = rewards.float()
    ids, index = torch.unique(groups, return_inverse=True)
    zeros = torch.zeros(len(ids), device=rewards.device)
    counts = zeros.index_add(0, index, torch.ones_like(rewards))
    mean = zeros.index_add(0, index, rewards) / counts
    centred = rewards - mean[index]
    variance = zeros.index_add(0, index, centred.square()) / (counts - 1).clamp(min=1)
    advantages = centred / (variance.sqrt()[index] + 1e-4) if scale == "std" else centred
    # The mean of equal numbers need not equal them in floating point; a group that teaches nothing must move nothing.
    highest = zeros.scatter_reduce(0, index, rewards, "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, index, rewards, "amin", include_self=False)
    return torch.where((highest == lowest)[index], 0.0, advantages)


def grpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    clip_range: float,
    beta: float,
    mask: Tensor | None = None,
    kl_ratio: bool = True,
) -> Tensor:
    """Return the loss of each token, fp32 [B, T], 0 outside `mask`: PPO's clipped term plus `beta * kl`.

    `advantages` [B, T] repeat the completion's over its tokens. `kl = ratio * kl_k3`, whose gradient is that of the
    reverse KL(policy || reference); `kl_ratio=False` leaves the ratio out, as in DeepSeekMath eq. 4, and follows the
    forward KL. Without a `mask` the inputs must be 0 outside it. Left out of the paper: the mean per completion; the
    step divides by all sampled tokens (DAPO), so that long completions are not favoured.
    """
    if mask is not None:
        # Before any exp: the gradient of `where(mask, inf, 0)` would be NaN.
        logprobs, old_logprobs, ref_logprobs = (
            torch.where(mask, x.float(), 0.0) for x in (logprobs, old_logprobs, ref_logprobs)
        )
    loss = policy_loss(logprobs, old_logprobs, advantages, clip_range, mask)
    if not beta:
        return loss
    kl = kl_k3(logprobs, ref_logprobs)
    return loss + beta * (kl * (logprobs.float() - old_logprobs.float()).exp() if kl_ratio else kl)
