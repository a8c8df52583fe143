"""Next-token cross-entropy: what pre-training and fine-tuning minimise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

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


LOGITS_BYTES = 256 * 2**20
"""How large the fp32 logits of one forward pass may be before they are made chunk by chunk."""


def total_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    logits: Callable[[Tensor], Tensor],
    z_loss: float = 0.0,
    limit_bytes: int = LOGITS_BYTES,
) -> Tensor:
    """Return the sum over positions of `cross_entropy(logits(hidden), targets, z_loss)`, a scalar in fp32.

    Where the logits of all positions would exceed `limit_bytes`, they are made in chunks of at most that size
    (`head_cross_entropy`). `hidden` [B, T, H]; `logits` must be the product with `weight` [V, H].
    """
    positions, vocabulary = targets.numel(), weight.shape[0]
    # A weight that is spread over ranks only its own module knows to gather.
    spread = type(weight) not in (Tensor, nn.Parameter)
    if spread or positions * vocabulary * 4 <= limit_bytes:
        return cross_entropy(logits(hidden), targets, z_loss=z_loss).sum()
    return head_cross_entropy(hidden, weight, targets, max(1, limit_bytes // (4 * vocabulary)), z_loss)


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, z_loss: float = 0.0) -> Tensor:
    """Return the sum of `cross_entropy(hidden @ weight.T, targets, z_loss)`, holding `chunk` positions' logits at once.

    `hidden` [B, T, H], `weight` [V, H], result a scalar in fp32. The gradients are made together with the loss, while
    a chunk's logits are there (as 2410.10989 does): nothing is computed twice, and what stays for the backward pass is
    [B, T, H] and [V, H] instead of [B, T, V]. That is possible only for the sum, whose positions all weigh the same.
    Under autocast the products are in its dtype; the softmax, the loss and the sum of the weight's gradient over the
    chunks are in fp32. Raises ValueError for a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least 1 position")
    trained = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total: Tensor = _HeadCrossEntropy.apply(hidden, weight, targets, chunk, z_loss, trained)  # type: ignore[no-untyped-call]
    return total


class _HeadCrossEntropy(torch.autograd.Function):
    """The loss of the output layer, with its gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, z_loss: float, trained: bool
    ) -> Tensor:
        """Return the summed loss; keep the gradients for a loss that counts once."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        rows, goals = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(dtype)
            to_rows = torch.empty_like(rows) if trained else None
            to_weight = torch.zeros_like(weight, dtype=torch.float32) if trained else None
            for start in range(0, len(goals), chunk):
                part, goal = rows[start : start + chunk].to(dtype), goals[start : start + chunk]
                scores = (part @ matrix.T).float()
                total += cross_entropy(scores, goal, z_loss).sum()
                if to_rows is not None and to_weight is not None:
                    gradient = _scores_gradient_(scores, goal, z_loss).to(dtype)
                    to_rows[start : start + chunk] = gradient @ matrix
                    to_weight += gradient.T @ part
        if to_rows is not None and to_weight is not None:
            ctx.save_for_backward(to_rows.view_as(hidden), to_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        """Return the kept gradients times the gradient of the sum (in training, 1 / number of items)."""
        to_hidden, to_weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            to_hidden * above.to(to_hidden.dtype) if wanted[0] else None,
            to_weight * above.to(to_weight.dtype) if wanted[1] else None,
            *(None,) * 4,
        )


def _scores_gradient_(scores: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """Turn logits [N, V] in place into the gradient of their summed cross-entropy, and return it.

    `softmax(z) * (1 + 2 * z_loss * logsumexp(z)) - onehot(y)`, zero where the target is IGNORE.
    """
    normaliser = scores.logsumexp(-1, keepdim=True)
    scores.sub_(normaliser).exp_()
    if z_loss:
        scores.mul_(1 + 2 * z_loss * normaliser)
    trained = (targets != IGNORE).unsqueeze(-1)
    scores.scatter_add_(-1, targets.clamp(min=0).unsqueeze(-1), -torch.ones_like(normaliser))
    return scores.masked_fill_(~trained, 0.0)
