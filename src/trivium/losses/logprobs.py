"""Log-probabilities of given tokens, entropy, and sums over a mask.

Everything is computed in fp32 whatever the logits' type, is zero where a position is masked, and does not depend on
what stands at masked positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trivium.batches import IGNORE


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probability (nats) of each target, fp32 [B, T], 0 where the target is IGNORE.

    `log p(y) = z_y / temperature - logsumexp(z / temperature)`. `logits` [B, T, V], `targets` int64 [B, T], already
    shifted (batches.py). Use the temperature that sampled the targets, else the ratio of the first PPO step is not 1.
    The [B, T, V] log-softmax is never formed: only its normaliser and the picked logit. Raises ValueError for a
    temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive; score greedy completions at temperature 1")
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    trained = targets != IGNORE
    picked = scaled.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(trained, picked - scaled.logsumexp(-1), 0.0)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy (nats) of each position's distribution, fp32 [B, T]; reduce it with `masked_mean`.

    `H = logsumexp(z) - sum_v softmax(z)_v z_v`, with `z = logits / temperature`, `logits` [B, T, V].
    """
    scaled = logits.float() / temperature
    return scaled.logsumexp(-1) - (scaled.softmax(-1) * scaled).sum(-1)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Return each row's sum of `x` [B, T] over `mask` (bool [B, T]), fp32 [B]."""
    return torch.where(mask, x.float(), 0.0).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `x` over `mask` (same shape, any rank) as a scalar; 0 for an empty mask.

    For display and statistics only: a loss is summed and divided once, in `training/step.py`.
    """
    return torch.where(mask, x.float(), 0.0).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Return `x` scaled to variance 1 over `mask`, fp32 [B, T], 0 outside the mask.

    `shift_mean=True` (advantages) also moves the mean to 0; False (rewards) keeps the mean, because a constant added
    to every reward is part of what is optimised (lm-human-preferences). The variance is the unbiased one. Call it on
    the whole rollout before it is split: statistics of a micro-batch would make the result depend on the split.
    """
    x = x.float()
    count = mask.sum()
    mean = masked_mean(x, mask)
    variance = torch.where(mask, (x - mean).square(), 0.0).sum() / (count - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)
