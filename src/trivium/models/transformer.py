"""The network: a decoder-only transformer whose parameter names are Hugging Face's, so a folder is the same for both.

Per layer `x += attention(norm(x)); x += mlp(norm(x))`, or the norms after (OLMo 2), with RMSNorm (1910.07467), rotary
positions (2104.09864), grouped queries (2305.13245) and SwiGLU (2002.05202). Left out: dropout, learned positions,
mixtures of experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.models.attention import Seen, attend, who_sees_whom
from trivium.models.config import ModelConfig
from trivium.models.part import PartOf
from trivium.models.rope import attention_factor, inverse_frequencies


class KVCache:
    """The keys and values of the positions seen so far, in storage that never grows.

    One tensor each of [layers, B, kv_heads, capacity, head_dim], allocated at the first write (only then is the dtype
    known, which autocast may lower). `length` slots are filled, the same number in every row: prompts of different
    lengths are padded on the left.
    """

    def __init__(self, config: ModelConfig, *, batch_size: int, capacity: int) -> None:
        """Plan a cache for `batch_size` rows of at most `capacity` tokens; nothing is allocated yet."""
        self.shape = (config.num_hidden_layers, batch_size, config.kv_heads, capacity, config.head_size)
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, kv_heads, T, head_dim] after the filled slots of `layer`; return views of everything up to them."""
        if self._keys is None or self._values is None:
            self._keys, self._values = keys.new_zeros(self.shape), values.new_zeros(self.shape)
        end = self.length + keys.shape[2]
        if end > self.shape[3]:
            raise ValueError(f"The cache holds {self.shape[3]} positions; {end} are needed.")
        rows = keys.shape[0]
        all_keys, all_values = self._keys[layer, :rows, :, :end], self._values[layer, :rows, :, :end]
        all_keys[:, :, self.length :] = keys
        all_values[:, :, self.length :] = values
        return all_keys, all_values

    def next_slot(self, rows: int, start: int) -> tuple[tuple[Tensor, ...], ...]:
        """Return views of every layer: where the next keys go, and values, then all of them from `start` up to there.

        Four tuples, of [rows, kv_heads, head_dim] each and of [rows, kv_heads, slots, head_dim] each. Whoever has
        written a slot in every layer counts it in `length`. Raises ValueError for a cache that is empty or full.
        """
        if self._keys is None or self._values is None or self.length >= self.shape[3]:
            raise ValueError(f"There is no next slot: {self.length} of {self.shape[3]} are filled.")
        both, end = (self._keys[:, :rows], self._values[:, :rows]), self.length + 1
        new = (stored[:, :, :, self.length].unbind() for stored in both)
        seen = (stored[:, :, :, start:end].unbind() for stored in both)
        return (*new, *seen)

    def shift(self, slots: int) -> None:
        """Move everything `slots` slots towards the beginning; what stood there is gone."""
        for stored in (self._keys, self._values):
            for layer in () if stored is None else stored:
                # A copy first: source and destination overlap.
                layer[:, :, : self.length - slots] = layer[:, :, slots : self.length].clone()
        self.length -= slots

    def move(self, sources: Tensor, destinations: Tensor) -> None:
        """Copy the rows `sources` over the rows `destinations` (int64 [k] each, disjoint)."""
        for stored in (self._keys, self._values):
            if stored is not None and len(sources):
                stored[:, destinations, :, : self.length] = stored[:, sources, :, : self.length]

    def adopt(self, other: KVCache, sources: Tensor, destinations: Tensor) -> None:
        """Copy what `other` holds of its rows `sources` into the rows `destinations`, ending where `length` ends.

        Slots before a shorter prefix keep what they have: they are padding, for the attention mask to hide.
        """
        if other._keys is None or other._values is None:
            return
        if self._keys is None or self._values is None:
            self._keys, self._values = other._keys.new_zeros(self.shape), other._values.new_zeros(self.shape)
        slots = slice(self.length - other.length, self.length)
        self._keys[:, destinations, :, slots] = other._keys[:, sources]
        self._values[:, destinations, :, slots] = other._values[:, sources]


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        """Start as the pure normalisation: all weights 1."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised, in its own dtype."""
        wide = x.float()
        return (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


class ProjectionNorm(RMSNorm):
    """RMSNorm over all heads of a position at once: x is [..., heads, head_dim], the weight heads * head_dim long."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised, in its own shape and dtype."""
        return super().forward(x.flatten(-2)).view(x.shape)


class Attention(nn.Module):
    """Causal self-attention with grouped queries and rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Make the projections; `layer` is this module's place in the cache."""
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_size
        width, queries, keys = (
            config.hidden_size,
            config.num_attention_heads * self.head_dim,
            config.kv_heads * self.head_dim,
        )
        self.q_proj = nn.Linear(width, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, width, bias=False)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, config.rms_norm_eps) for _ in range(2))
        elif config.post_norm:
            self.q_norm, self.k_norm = (ProjectionNorm(size, config.rms_norm_eps) for size in (queries, keys))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], seen: Seen, cache: KVCache | None) -> Tensor:
        """Return what each position of x [B, T, H] gathered from those it sees."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.q_proj(x).view(shape), self.k_proj(x).view(shape), self.v_proj(x).view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q, *rope).transpose(1, 2), rotate(k, *rope).transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if seen.part is not None:
            k, v = seen.part.gather(2, k, v)
        out: Tensor = self.o_proj(attend(q, k, v, seen).transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the three projections."""
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed x, [B, T, H]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention, then MLP, each on a normalised copy and added back; with `post_norm` their results are normalised."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Make the layer at index `layer`."""
        super().__init__()
        self.post_norm = config.post_norm
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        if not self.post_norm:
            self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Before the MLP, or, as Hugging Face names them for OLMo 2 too, after the attention and after the MLP.
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.post_norm:
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], seen: Seen, cache: KVCache | None) -> Tensor:
        """Return the residual stream after this layer, [B, T, H]."""
        if self.post_norm:
            x = x + self.post_attention_layernorm(self.self_attn(x, rope, seen, cache))
            after: Tensor = x + self.post_feedforward_layernorm(self.mlp(x))
            return after
        x = x + self.self_attn(self.input_layernorm(x), rope, seen, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Tokens to hidden states: embedding, layers, final norm. What a language model and a scalar model share."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the network with torch's initial weights; `Transformer.init_weights` sets the real ones."""
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Not a buffer: `.to(bfloat16)` must not touch it, in bfloat16 neighbouring positions become one.
        self._inverse_frequencies = {torch.device("cpu"): inverse_frequencies(config)}
        self._attention_factor = attention_factor(config)
        self._compiled = False
        self.part_of: PartOf | None = None
        """Where it is set, a pass computes this part of each row's positions, and others compute the rest."""

    def compile_layers(self, **options: Any) -> None:
        """Compile each layer for training; in evaluation mode, and with a cache, the layers run as written.

        All layers share one compiled program, and so do all steps whose rows have one length. Sampling changes its
        lengths with every token and would compile without end. `options` are torch.compile's.
        """
        for layer in self.layers:
            layer.compile(**options)
        self._compiled = True

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states [B, T, H], also where the layers compute a part of the positions only.

        The arguments are those of `Transformer.forward`. Raises ValueError for a part with a cache or attention_mask.
        """
        past = cache.length if cache is not None else 0
        length = input_ids.shape[1]
        part = None if self.part_of is None else self.part_of(length, input_ids.device)
        if part is not None and (cache is not None or attention_mask is not None):
            raise ValueError("A part of each row goes with neither a cache nor an attention_mask: it is for training.")
        if positions is None:
            positions = torch.arange(past, past + length, device=input_ids.device)[None]
        seen = {
            window: who_sees_whom(
                length,
                past,
                input_ids.device,
                window,
                dtype=self._compute_dtype(input_ids.device),
                head_dim=self.config.head_size,
                document_ids=document_ids,
                attention_mask=attention_mask,
                part=part,
                # Not in PPO and DPO, which compare what they train with passes without gradients.
                steady=self._compiled and self.training and torch.is_grad_enabled(),
            )
            for window in dict.fromkeys(self.config.windows)
        }
        x = self.embed_tokens(input_ids)
        if part is not None:
            x, positions = part.take(x), part.take(positions)
        rope = self.rope(positions)
        as_written = self._compiled and (cache is not None or not self.training)
        for layer, window in zip(self.layers, self.config.windows, strict=True):
            # `_call_impl` is the layer before `compile`; a stance of torch's would stop FlexAttention's program, too.
            x = (layer._call_impl if as_written else layer)(x, rope, seen[window], cache)  # type: ignore[no-untyped-call]
        if cache is not None:
            cache.length += length
        out: Tensor = self.norm(x)
        return out if part is None else part.join(out, length)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of every position's angles, each float32 [B, T, 1, head_dim / 2]."""
        device = positions.device
        if device not in self._inverse_frequencies:
            self._inverse_frequencies[device] = self._inverse_frequencies[torch.device("cpu")].to(device)
        # An elementwise product: a matrix product would be lowered to bfloat16 by autocast.
        angles = positions[..., None, None].float() * self._inverse_frequencies[device]
        if self._attention_factor == 1:
            return angles.cos(), angles.sin()
        return angles.cos() * self._attention_factor, angles.sin() * self._attention_factor

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype of queries and keys: the weights', unless autocast lowers it."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.embed_tokens.weight.dtype


class Transformer(nn.Module):
    """A causal language model; `state_dict()` has exactly the keys of transformers' `...ForCausalLM`."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the network with torch's initial weights; call `init_weights` before training from scratch."""
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output matrix the embedding itself (one Parameter), where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        # Some moves (to another kind of device) make new Parameters, one per use: tie them again.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.tie_weights()
        return self

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the final hidden states [B, T, hidden_size]; `logits` turns them (or some of them) into scores.

        `input_ids`: int64 [B, T]. `positions`: int64 [B, T] or [1, T], by default counted from the cache's length on.
        `document_ids`: int64 [B, T], a position then sees only its own document, whose tokens stand together (not with
        a cache).
        `attention_mask`: [B, cached + T], false or 0 at padding, which nobody sees. Right-padded rows need none: under
        the causal mask a pad cannot influence what stands before it.
        """
        out: Tensor = self.model(
            input_ids, positions=positions, document_ids=document_ids, cache=cache, attention_mask=attention_mask
        )
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the unnormalised log-probabilities of the next token, float32 [..., vocab_size]."""
        out: Tensor = self.lm_head(hidden)
        return out.float()

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> Transformer:
        """Set the weights for training from scratch, a pure function of the shape and `seed`, and return self.

        Matrices are normal with standard deviation 1 / sqrt(fan in), so that a unit-variance input gives a
        unit-variance output at any width. The two that write into the residual stream (o_proj, down_proj) are divided
        by sqrt(2 * layers) (GPT-2, section 2.3) and by 10: at their full size the layers' first, random outputs drown
        the embeddings (one measurement, prose by bytes, depth 2, 500 steps: loss 2.18 against 2.32; 0.02 throughout
        gave 2.49).
        Embeddings and output matrix have `initializer_range`, so that the first loss is about log(vocab_size); tied,
        a token at first predicts itself with a logit of initializer_range * hidden_size. Norms are 1, biases 0.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                std = self._initial_std(name, parameter)
                drawn = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
                parameter.copy_(drawn)
        return self

    def _initial_std(self, name: str, parameter: Tensor) -> float:
        if "embed_tokens" in name or "lm_head" in name:
            return self.config.initializer_range
        std = 1 / math.sqrt(parameter.shape[1])
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= 10 * math.sqrt(2 * self.config.num_hidden_layers)
        return std


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, T, heads, head_dim] with pair (i, i + head_dim/2) turned by its position's angle i, in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
