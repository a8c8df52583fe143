"""One new token per row through the network, written out: generation spends nearly all its time here.

The arithmetic is `Transformer.forward`'s with a cache. Left out is what a single token does not need: no mask is made,
no angle computed, no module called that is a plain matrix; results go into memory that is there already. The matrices
are the modules' own, so nothing is copied and nothing can be out of date.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.models.config import ModelConfig
from trivium.models.transformer import KVCache, Layer, RMSNorm, Transformer


def can_decode(model: nn.Module) -> bool:
    """Tell whether `Decoding` computes what the model computes: this network itself, unhooked, at its own precision."""
    if type(model) is not Transformer or any(type(layer) is not Layer for layer in model.model.layers):
        return False
    if torch.is_autocast_enabled(model.model.embed_tokens.weight.device.type):
        return False  # which knows nothing of results that are written into given memory
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Decoding:
    """A network, and the room to read one token for each row of a cache."""

    def __init__(self, model: Transformer, cache: KVCache, *, context: int) -> None:
        """Prepare to read tokens at positions below `context`; `cache` holds what was read before."""
        self.model, self.cache = model, cache
        config, weight = model.config, model.model.embed_tokens.weight
        self.head_dim, self.kv_heads = config.head_size, config.kv_heads
        cos, sin = model.model.rope(torch.arange(context, device=weight.device)[None])
        # rotate() is x cos + (x with its halves swapped) (-sin, sin); all angles are looked up here from now on.
        self.angles = torch.cat((cos, cos, -sin, sin), dim=-1)[0, :, 0]
        self.layers = [_DecodingLayer(cast(Layer, layer)) for layer in model.model.layers]
        self.windows = config.windows
        self._room: _Room | None = None

    @torch.inference_mode()
    def read(self, tokens: Tensor, positions: Tensor, *, start: int, visible: Tensor | None) -> Tensor:
        """Return the logits [B, V] after `tokens` at `positions` (int64 [B] each), kept in the cache's next slot.

        Slots before `start` are seen by no row. `visible` [B, 1, 1, capacity], what attention adds to its scores or a
        bool, says which of the others a row sees; None means all.
        """
        rows, end = len(tokens), self.cache.length + 1
        x = F.embedding(tokens, self.model.model.embed_tokens.weight)
        if self._room is None or len(self._room.normed) != rows:
            self._room = _Room(x, self.model.config)
        room = self._room
        cos, sin = F.embedding(positions, self.angles)[:, None].chunk(2, dim=-1)
        views, masks = {}, {}
        for window in dict.fromkeys(self.windows):
            first = start if window is None else max(start, end - window)
            views[window] = self.cache.next_slot(rows, first)
            masks[window] = None if visible is None else visible[..., first:end]
        for index, (layer, window) in enumerate(zip(self.layers, self.windows, strict=True)):
            new_keys, new_values, keys, values = views[window]
            q, k = layer.heads(x, cos, sin, room)
            new_keys[index].copy_(k)
            new_values[index].copy_(room.v)
            # The heads that share keys are the queries of one row of attention: nothing is repeated.
            q = q.view(rows, self.kv_heads, -1, self.head_dim)
            seen = F.scaled_dot_product_attention(q, keys[index], values[index], attn_mask=masks[window])
            layer.add_attention(x, seen.reshape(rows, -1))
            layer.add_mlp(x, room)
        self.cache.length = end
        return self.model.logits(self.model.model.norm(x))


class _Room:
    """Memory for what a layer makes of a token per row, and the views of it that every layer needs."""

    def __init__(self, x: Tensor, config: ModelConfig) -> None:
        """Make room for rows like those of x [B, H]."""
        rows, size = len(x), config.head_size
        queries, keys = config.num_attention_heads, config.kv_heads
        self.normed, self.gate, self.up = torch.empty_like(x), *x.new_empty(2, rows, config.intermediate_size)
        heads = x.new_empty(rows, queries + 2 * keys, size)
        self.flat = torch.split(heads.flatten(1), [queries * size, keys * size, keys * size], dim=-1)
        self.turning, self.v = heads[:, : queries + keys], heads[:, queries + keys :]
        self.q, self.k = self.turning[:, :queries], self.turning[:, queries:]


class _DecodingLayer:
    """A layer's parts as functions of [B, H] that write where they are told."""

    def __init__(self, layer: Layer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm = None if layer.post_norm else _norm(layer.input_layernorm)
        self.mlp_norm = None if layer.post_norm else _norm(layer.post_attention_layernorm)
        self.attention_norm_after = layer.post_attention_layernorm if layer.post_norm else None
        self.mlp_norm_after = layer.post_feedforward_layernorm if layer.post_norm else None
        self.qkv = [_product(matrix) for matrix in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.o_proj, self.down_proj = _added(attention.o_proj), _added(mlp.down_proj)
        self.gate_proj, self.up_proj = _product(mlp.gate_proj), _product(mlp.up_proj)

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor, room: _Room) -> tuple[Tensor, Tensor]:
        """Return rotated queries [B, heads, head_dim] and keys [B, kv_heads, head_dim]; the values are `room.v`."""
        source = x if self.input_norm is None else self.input_norm(x, room.normed)
        for product, out in zip(self.qkv, room.flat, strict=True):
            product(source, out)
        if self.q_norm is not None and self.k_norm is not None:
            room.q.copy_(self.q_norm(room.q))
            room.k.copy_(self.k_norm(room.k))
        turning = room.turning
        turned = (turning * cos).addcmul_(turning.roll(turning.shape[-1] // 2, -1), sin).to(x.dtype)
        return turned[:, : room.q.shape[1]], turned[:, room.q.shape[1] :]

    def add_attention(self, x: Tensor, gathered: Tensor) -> None:
        """Add to the residual stream x what was gathered, through the output matrix."""
        _add(x, self.o_proj, gathered, self.attention_norm_after)

    def add_mlp(self, x: Tensor, room: _Room) -> None:
        """Add the MLP of x to x."""
        source = x if self.mlp_norm is None else self.mlp_norm(x, room.normed)
        self.gate_proj(source, room.gate)
        self.up_proj(source, room.up)
        _add(x, self.down_proj, F.silu(room.gate, inplace=True).mul_(room.up), self.mlp_norm_after)


Into = Callable[[Tensor, Tensor], Tensor]
"""A function of x [B, n] that writes its result [B, m] into the second argument, and returns that."""


def _norm(norm: RMSNorm) -> Into:
    """Return a norm as a function that writes where it is told."""
    weight, eps = norm.weight, norm.eps
    if type(norm) is not RMSNorm or weight.dtype != torch.float32:
        return lambda x, out: out.copy_(norm(x))
    share = 1 / len(weight)
    start = weight.new_full((1, 1, 1), eps)

    def normalise(x: Tensor, out: Tensor) -> Tensor:
        # mean(x^2) + eps of every row as one product.
        scale = torch.baddbmm(start, x[:, None], x[:, :, None], alpha=share).rsqrt_()
        return torch.mul(x, scale[:, 0], out=out).mul_(weight)

    return normalise


def _product(matrix: nn.Module) -> Into:
    """Return a matrix as a function that writes where it is told; any other module is called, its result copied."""
    if type(matrix) is not nn.Linear:
        return lambda x, out: out.copy_(matrix(x))
    transposed, bias = matrix.weight.T, _bias(matrix)
    if bias is None:
        return lambda x, out: torch.mm(x, transposed, out=out)
    return lambda x, out: torch.addmm(bias, x, transposed, out=out)


def _added(matrix: nn.Module) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return a matrix as a function of (x, sum): the product added into `sum`, or by itself where that is None."""
    if type(matrix) is not nn.Linear or _bias(matrix) is not None:
        return lambda x, total: matrix(x) if total is None else total.add_(matrix(x))
    transposed = matrix.weight.T
    return lambda x, total: torch.mm(x, transposed) if total is None else total.addmm_(x, transposed)


def _bias(matrix: nn.Linear) -> Tensor | None:
    return cast(Tensor | None, matrix.bias)  # torch says that there always is one


def _add(x: Tensor, matrix: Callable[[Tensor, Tensor | None], Tensor], source: Tensor, after: RMSNorm | None) -> None:
    """Add the product of `source` to x, through the norm that comes after it, if one does."""
    if after is None:
        matrix(source, x)
    else:
        x.add_(after(matrix(source, None)))
