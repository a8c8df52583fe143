"""Next-token cross-entropy: what pre-training and fine-tuning minimise."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trivium.batches import IGNORE


def cross_entropy(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Return the loss of each position in nats, fp32 [B, T], 0 where the target is IGNORE.

    `loss = logsumexp(z) - z_y + z_loss * logsumexp(z)^2`. `logits` [B, T, V]; `targets` int64 [B, T], already shifted
    (batches.py), so nothing is shifted here. The z-loss term (PaLM, section 5, there 1e-4) keeps the normaliser near
    1, which steadies long low-precision runs.
    """
    scores = logits.float()
    normaliser = scores.logsumexp(-1)
    picked = scores.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    loss = normaliser - picked
    if z_loss:
        loss = loss + z_loss * normaliser.square()
    return torch.where(targets != IGNORE, loss, 0.0)


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, z_loss: float = 0.0) -> Tensor:
    """Return `cross_entropy(hidden @ weight.T, targets, z_loss)` while holding only `chunk` positions' logits at once.

    `hidden` [B, T, H], `weight` [V, H], result fp32 [B, T]. Each chunk's logits are computed again in the backward
    pass, so memory is B * chunk * V instead of B * T * V. Raises ValueError for a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least 1 position")

    def piece(part: Tensor, weight: Tensor, goal: Tensor) -> Tensor:
        return cross_entropy(part @ weight.T, goal, z_loss)

    pairs = zip(torch.split(hidden, chunk, dim=1), torch.split(targets, chunk, dim=1), strict=True)
    pieces = [cast(Tensor, checkpoint(piece, part, weight, goal, use_reentrant=False)) for part, goal in pairs]
    return torch.cat(pieces, dim=1)
