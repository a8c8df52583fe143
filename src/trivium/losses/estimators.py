"""How a round's rewards become advantages: the choices behind `estimator = "..."` in the grpo stage."""

from __future__ import annotations

import torch
from torch import Tensor

from trivium.losses.grpo import group_advantages
from trivium.losses.reinforce import leave_one_out, normalised, penalised, returns_to_go

ESTIMATORS: dict[str, tuple[str, ...]] = {
    "grpo": ("scale", "aggregate"),
    "rloo": (),
    "reinforce++": ("aggregate",),
}
"""By name, and which other settings of the stage mean something to each."""


def round_advantages(
    rewards: Tensor, kl: Tensor, mask: Tensor, estimator: str, group_size: int, scale: str, beta: float
) -> Tensor:
    """Return the advantage of each token, fp32 [B, T], 0 outside `mask`, of a whole round before it is split.

    `rewards` [B], in groups of `group_size` neighbours; `kl` [B, T] (`kl_k1`, nats) is part of the reward with weight
    `beta`, except for `grpo`, whose loss holds it. `scale` is that of `group_advantages`.
    Worked: one group of two, rewards 1 and 0, one token each, kl 0: `grpo` with `none` gives 0.5 and -0.5, `rloo` 1 and
    -1, `reinforce++` 0.7071 and -0.7071.
    """
    if estimator == "reinforce++":
        return normalised(returns_to_go(rewards, kl, mask, beta), mask)
    groups = torch.arange(len(rewards), device=rewards.device) // group_size
    if estimator == "rloo":
        advantages = leave_one_out(penalised(rewards, kl, mask, beta), groups)
    else:
        advantages = group_advantages(rewards, groups, "std" if scale == "std" else "none")
    return advantages.unsqueeze(-1) * mask


def completion_divisors(estimator: str, aggregate: str, mask: Tensor, longest: int) -> Tensor | None:
    """Return what each completion's summed loss is divided by, fp32 [B]; None where tokens are the items, not rows.

    `token`: None, every token of an update weighs the same (DAPO). `completion`: its tokens (DeepSeekMath, eq. 3), so
    a short answer's tokens weigh more. `constant`: `longest`, whatever it has (Dr. GRPO, Liu et al. 2025, section 3.1).
    RLOO's loss is one number per completion, which is divided by 1.
    """
    if estimator == "rloo":
        return torch.ones(len(mask), device=mask.device)
    if aggregate == "constant":
        return torch.full((len(mask),), float(longest), device=mask.device)
    return mask.sum(-1).float() if aggregate == "completion" else None
