"""Next-token cross-entropy, what pre-training and fine-tuning minimise, and log-probabilities without all logits."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from trivium.batches import IGNORE
from trivium.losses.logprobs import entropy, token_logprobs

PLAIN_BYTES = 32 * 2**20
"""Logits of up to so many bytes are formed all at once."""
CHUNK_BYTES_CPU = 8 * 2**20
"""Above that, so many at a time: enough that adding up the weight's gradient costs little (docs/LOG.md)."""
CHUNK_BYTES = 2**30
"""The same on an accelerator, where adding up the weight's gradient reads and writes all of it once a chunk."""
KINDS = 6
"""Kinds of calls that are compiled on a GPU."""


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


def head_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, *, chunk: int | None = None
) -> Tensor:
    """Return `cross_entropy(hidden @ weight.T, targets, z_loss)` without holding the logits of all positions at once.

    `hidden` [B, T, H], `weight` [V, H], result fp32 [B, T]. `chunk` positions are worked on at a time; by default all,
    where their logits take at most PLAIN_BYTES, else as many as CHUNK_BYTES hold. Positions to IGNORE cost nothing in
    chunks. Raises ValueError for a chunk below 1.
    """
    if chunk is None and 4 * weight.shape[0] * targets.numel() <= PLAIN_BYTES:
        return cross_entropy(linear(hidden, weight), targets, z_loss)
    return _in_chunks(hidden, weight, targets, z_loss, chunk, at_once=True)[0]


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    chunk: int | None,
    *,
    at_once: bool,
    spread: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the losses [B, T] and, with `spread`, the entropies, which keep no gradient (without, zeros).

    `at_once`: gradients are computed beside the losses, as for their sum.
    """
    if chunk is None:
        room = CHUNK_BYTES_CPU if hidden.device.type == "cpu" else CHUNK_BYTES
        chunk = max(1, room // (4 * weight.shape[0]))
    if chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least 1 position")
    trained = targets != IGNORE
    # Asked here: inside a Function gradients are off in any case, and it is told that it needs them also under no_grad.
    wanted = at_once and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    parts = hidden[trained], weight, targets[trained]
    # torch leaves `apply` unannotated.
    losses, entropies = _HeadLoss.apply(*parts, z_loss, chunk, wanted, spread)  # type: ignore[no-untyped-call]
    zeros = torch.zeros(targets.shape, device=losses.device)
    return zeros.masked_scatter(trained, losses), zeros.masked_scatter(trained, entropies) if spread else zeros


def head_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, chunk: int | None = None
) -> Tensor:
    """Return `token_logprobs(hidden @ weight.T, targets, temperature)`, fp32 [B, T], without all logits at once.

    `hidden` [B, T, H], `weight` [V, H]. `chunk` and where it is not given are `head_cross_entropy`'s: all at once where
    the logits of all positions take at most PLAIN_BYTES, to the bit what it would be without this function; else
    positions to IGNORE (the prompt's, half of them often) cost nothing. Raises ValueError for a chunk below 1, and for
    a temperature that is not positive.
    """
    if (chunk is None and 4 * weight.shape[0] * targets.numel() <= PLAIN_BYTES) or not temperature > 0:
        return token_logprobs(linear(hidden, weight), targets, temperature)
    return _logprobs_in_chunks(hidden, weight, targets, temperature, chunk, spread=False)[0]


def head_logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return `head_logprobs` and the entropy of each position's distribution, both fp32 [B, T] in nats.

    The entropy keeps no gradient; where the logits are not formed all at once it is 0 at positions to IGNORE.
    """
    if (chunk is None and 4 * weight.shape[0] * targets.numel() <= PLAIN_BYTES) or not temperature > 0:
        logits = linear(hidden, weight)
        return token_logprobs(logits, targets, temperature), entropy(logits.detach(), temperature)
    return _logprobs_in_chunks(hidden, weight, targets, temperature, chunk, spread=True)


def _logprobs_in_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int | None, *, spread: bool
) -> tuple[Tensor, Tensor]:
    # Every token's gradient has a factor of its own (its advantage), so none is computed before that is known.
    scaled = hidden if temperature == 1.0 else hidden / temperature
    losses, entropies = _in_chunks(scaled, weight, targets, 0.0, chunk, at_once=False, spread=spread)
    return -losses, entropies


class _HeadLoss(torch.autograd.Function):
    """Losses of N positions and their entropies; gradients are computed beside, while a chunk's logits are at hand.

    That needs to know what each loss will be multiplied with. Objectives sum them, so the gradients are computed for 1
    and multiplied in the backward pass; where the factors turn out to differ, or none were computed, everything is
    computed again with them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, chunk: int, wanted: bool, spread: bool
    ) -> tuple[Tensor, Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        ctx.z_loss, ctx.chunk, ctx.dtype, ctx.wanted = z_loss, chunk, dtype, wanted
        learns = ctx.needs_input_grad[1]  # a frozen output matrix, as under adapters, needs no gradient
        entropies = torch.empty(len(targets) if spread else 0, device=hidden.device)
        parts = hidden.to(dtype), weight.to(dtype), targets
        losses, *gradients = _walk(*parts, z_loss, chunk, None, wanted, learns, entropies)
        ctx.save_for_backward(hidden, weight, targets, *gradients)
        ctx.mark_non_differentiable(entropies)
        return losses, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, for_hidden, for_weight = ctx.saved_tensors
        if ctx.wanted and bool((factors == factors[:1]).all()):
            if len(factors):
                for_hidden, for_weight = for_hidden * factors[0], for_weight * factors[0]
        else:
            parts = hidden.to(ctx.dtype), weight.to(ctx.dtype), targets
            learns, nothing = ctx.needs_input_grad[1], factors.new_empty(0)
            _, for_hidden, for_weight = _walk(*parts, ctx.z_loss, ctx.chunk, factors, True, learns, nothing)
        learned = for_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
        return for_hidden.to(hidden.dtype), learned, None, None, None, None, None


def _walk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    chunk: int,
    factors: Tensor | None,
    wanted: bool,
    learns: bool,
    entropies: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses fp32 [N] and, where wanted, the gradients of their sum (times `factors`): [N, H], fp32 [V, H].

    The second only where the weight `learns`; empty tensors stand for what is not computed. `entropies` [N] is filled,
    unless it is empty.
    """
    losses = torch.empty(len(targets), device=hidden.device)
    for_hidden = torch.empty_like(hidden) if wanted else hidden.new_empty(0)
    for_weight = torch.zeros(weight.shape if wanted and learns else 0, device=weight.device)
    room = torch.empty(min(chunk, len(targets)), weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    kind = (weight.shape[0], hidden.dtype, z_loss, factors is None, wanted, len(entropies) > 0)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            goal = targets[part, None]
            # In place: one block of memory serves all chunks. A fresh one costs a page fault per 4 kB, each time.
            scores = torch.mm(hidden[part], weight.T, out=room[: len(goal)])
            given = None if factors is None else factors[part, None]
            work = _chosen(scores, kind)
            losses[part], spreads, slope = work(scores, goal, given, z_loss, wanted, len(entropies) > 0)
            if len(entropies):
                entropies[part] = spreads
            if wanted:
                torch.mm(slope, weight, out=for_hidden[part])
                # Summed in fp32: thousands of chunks in bf16 would lose the small ones.
                if learns and hidden.dtype == torch.float32:
                    for_weight.addmm_(slope.T, hidden[part])
                elif learns:
                    for_weight += slope.T @ hidden[part]
    return losses, for_hidden, for_weight


Chunk = tuple[Tensor, Tensor, Tensor]
"""Losses fp32 [N], entropies fp32 [N] and the losses' slopes by the logits, [N, V] in their dtype; or empty."""


def _in_place(logits: Tensor, goal: Tensor, factors: Tensor | None, z_loss: float, wanted: bool, spread: bool) -> Chunk:
    """Return what `logits` [N, V] with targets `goal` [N, 1] come to, in as little new memory as there can be."""
    scores = logits.float()
    top = scores.amax(-1, keepdim=True)
    picked = scores.gather(1, goal)
    shares = scores.sub_(top).exp_()
    total = shares.sum(-1, keepdim=True)
    normaliser = total.log() + top
    losses = (normaliser - picked + z_loss * normaliser.square())[:, 0]
    entropies, slope = losses.new_empty(0), logits.new_empty(0)
    if spread:  # with e = exp(z - top), whose sum is total: H = log(total) - sum(e log e) / total
        entropies = (total.log() + torch.special.entr(shares).sum(-1, keepdim=True) / total)[:, 0]
    if wanted:
        # d loss / d z = softmax(z) (1 + 2 z_loss logsumexp(z)) - onehot(y)
        slopes = shares.mul_((1 + 2 * z_loss * normaliser) / total).scatter_add_(1, goal, -torch.ones_like(top))
        slope = (slopes if factors is None else slopes.mul_(factors)).to(logits.dtype)
    return losses, entropies, slope


def _at_once(logits: Tensor, goal: Tensor, factors: Tensor | None, z_loss: float, wanted: bool, spread: bool) -> Chunk:
    """Return what `_in_place` returns, written for a compiler: on a GPU a few passes over the logits, not nine."""
    scores = logits.float()
    top = scores.amax(-1, keepdim=True)
    shares = (scores - top).exp()
    total = shares.sum(-1, keepdim=True)
    normaliser = total.log() + top
    losses = (normaliser - scores.gather(1, goal) + z_loss * normaliser.square())[:, 0]
    entropies, slope = losses.new_empty(0), logits.new_empty(0)
    if spread:
        entropies = (total.log() + torch.special.entr(shares).sum(-1, keepdim=True) / total)[:, 0]
    if wanted:
        is_goal = torch.arange(logits.shape[1], device=logits.device) == goal
        slopes = shares * ((1 + 2 * z_loss * normaliser) / total) - is_goal.float()
        slope = (slopes if factors is None else slopes * factors).to(logits.dtype)
    return losses, entropies, slope


_compiled: set[tuple[object, ...]] = set()


def _chosen(logits: Tensor, kind: tuple[object, ...]) -> Callable[..., Chunk]:
    """Return the compiled form on a GPU where it can be had, for the first few kinds of call; else the one in place.

    torch makes a program for each kind and one more for changing lengths, eight at most, and then would run the
    compiler's form as written, which takes several times the memory of the one in place. One position alone would be
    a kind of its own.
    """
    if not logits.is_cuda or len(logits) < 2 or not _can_fuse(logits.device):
        return _in_place
    if kind not in _compiled and len(_compiled) >= KINDS:
        return _in_place
    _compiled.add(kind)
    return _fused()


@functools.cache
def _fused() -> Callable[..., Chunk]:
    return torch.compile(_at_once)


@functools.cache
def _can_fuse(device: torch.device) -> bool:
    """Tell whether torch can compile for this GPU here: that takes triton, a C compiler and Python's headers."""
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < (7, 0):
        return False
    compilers = [os.environ.get("CC", "cc"), "gcc", "clang"]
    return any(map(shutil.which, compilers)) and Path(sysconfig.get_path("include"), "Python.h").exists()
