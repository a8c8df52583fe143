"""Kahneman-Tversky optimisation: each completion is judged alone, as desirable or not.

No pair is needed, so a thumb up or down is enough. What is gained or lost is measured from a reference point: how far
the policy has moved from the reference at all, estimated on completions of *other* prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trivium.losses.dpo import check_beta


def kto(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    baseline: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return KTO's loss of each completion and its implicit reward `beta (log pi - log ref)`, each fp32 [N].

    With `r = log pi - log ref`, summed over the completion, and the reference point `z = max(0, baseline)`:
    `desirable_weight * (1 - sigmoid(beta (r - z)))` where `desirable` (bool [N]), else
    `undesirable_weight * (1 - sigmoid(beta (z - r)))` (Ethayarajh et al. 2024, arXiv 2402.01306, section 4). `baseline`
    is the mean r of mismatched completions (scalar), taken over the **whole** batch before it is split; no gradient
    flows through it. The paper keeps `desirable_weight * num_desirable` at 1 to 4/3 times the same product of the
    undesirable. Raises ValueError for a beta or a weight that is not positive.

    Worked, beta 0.5, baseline 1: r = 3 costs 1 - sigmoid(1) = 0.2689 where desirable, 1 - sigmoid(-1) = 0.7311 where
    not.
    """
    check_beta(beta)
    if not desirable_weight > 0 or not undesirable_weight > 0:
        raise ValueError(f"weights {desirable_weight} and {undesirable_weight} must be positive")
    reward = beta * (policy.float() - reference.float())
    gain = reward - beta * baseline.detach().float().clamp(min=0)
    loss = torch.where(
        desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)
    )  # 1 - sigmoid(x) = sigmoid(-x), without the cancellation
    return loss, reward.detach()


def best_and_worst(ranks: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return which completions count as desirable (bool [N]) and each one's weight in its group (fp32 [N]).

    `ranks`, `groups` int64 [N], as in PreferenceBatch. Of a ranking the best place is desirable, the worst is not, and
    what stands between says neither and weighs 0; those that count share weight 1, so a ranking weighs 1 however many
    it placed, and one that is a single tie weighs 0.

    Worked: ranks 0, 1, 2 give desirable (1, 0, 0) and weights 1/2, 0, 1/2; ranks 0, 1, 1 weights 1/3 each.
    """
    ids, index = torch.unique(groups, return_inverse=True)
    last = torch.zeros(len(ids), dtype=ranks.dtype, device=ranks.device)
    last = last.scatter_reduce(0, index, ranks, "amax", include_self=False)[index]
    counts = ((ranks == 0) | (ranks == last)) & (last > 0)
    sizes = torch.zeros(len(ids), device=ranks.device).index_add(0, index, counts.float())
    return ranks == 0, counts / sizes.clamp(min=1)[index]
