"""The shape of a network, in Hugging Face's field names.

Five families share one network: Llama, Qwen2 (biases on q, k, v), Qwen3 (RMSNorm on each query and key head), Mistral
(a sliding window) and OLMo 2 (norms after attention and MLP). Which one a shape belongs to follows from its switches,
see `ModelConfig.model_type`; `families.py` reads and writes their `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trivium.config import UserError

ROPE_KINDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings"}),
}
"""The RoPE scalings this network computes, with the numbers each one needs."""

ROPE_OPTIONS: Mapping[str, frozenset[str]] = {
    "yarn": frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
}
"""The numbers a RoPE scaling can do without."""

ROPE_REFUSALS: Mapping[str, str] = {
    "dynamic": "its angles depend on the longest row so far, so a cached answer would differ from an uncached one; "
    "use 'yarn', or a larger rope_theta",
    "longrope": "it changes its angles at a length, so a cached answer would differ from an uncached one",
}
"""Why a known RoPE scaling is not computed."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""What an entry of `layer_types` can be."""


class ModelError(UserError, ValueError):
    """A model's shape or folder is not one this network can be."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The ids that mean something to the network's users; the network itself treats them like any other."""

    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends a sequence."""
        eos = self.eos_token_id
        return frozenset(() if eos is None else (eos,) if isinstance(eos, int) else eos)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(SpecialTokens):
    """The shape of a network; names and meanings are Hugging Face's. Raises ModelError for an impossible shape."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    """None: as many as attention heads. See `kv_heads`."""
    head_dim: int | None = None
    """None: `hidden_size / num_attention_heads`. See `head_size`."""
    max_position_embeddings: int = 2048
    """The context in tokens: prompt and completion together."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    """None, or `{"rope_type": "linear" | "llama3" | "yarn", ...}` with the numbers that kind needs."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases on q, k and v (not o): Qwen2."""
    qk_norm: bool = False
    """RMSNorm on every query and key head: Qwen3."""
    post_norm: bool = False
    """Norms after attention and MLP, not before, and one RMSNorm each over all queries and all keys: OLMo 2."""
    sliding_window: int | None = None
    """A position sees itself and the `sliding_window - 1` before it: Mistral."""
    layer_types: tuple[str, ...] | None = None
    """Per layer "sliding_attention" or "full_attention"; None: every layer has the window, where there is one."""
    hidden_act: str = "silu"
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        """Refuse a shape that no network of this kind can have."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1.")
        require(self.num_hidden_layers >= 0, "num_hidden_layers must not be negative.")
        heads, kv_heads = self.num_attention_heads, self.kv_heads
        require(
            kv_heads >= 1 and heads % kv_heads == 0,
            f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads}).",
        )
        require(
            self.head_dim is not None or self.hidden_size % heads == 0,
            f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads ({heads}), or give head_dim.",
        )
        require(self.head_size % 2 == 0, f"head_dim is {self.head_size}; RoPE turns pairs, so it must be even.")
        require(self.hidden_act == "silu", f"hidden_act is {self.hidden_act!r}; this network computes 'silu' only.")
        require(self.sliding_window is None or self.sliding_window >= 1, "sliding_window must be at least 1, or None.")
        self._check_family()
        _check_rope(self.rope_scaling)

    def _check_family(self) -> None:
        """Refuse switches that no published layout has together: such a model could be saved in nobody's format."""
        on = [name for name in ("post_norm", "qk_norm", "attention_bias") if getattr(self, name)]
        require(
            len(on) < 2,
            f"{' and '.join(on)} exclude each other: no published layout has both "
            "(post_norm is OLMo 2, qk_norm Qwen3, attention_bias Qwen2).",
        )
        if self.post_norm:
            require(self.sliding_window is None, "post_norm (OLMo 2) has no sliding_window.")
            require(
                self.head_size * self.num_attention_heads == self.hidden_size,
                f"head_dim is {self.head_size}; OLMo 2's is hidden_size / num_attention_heads.",
            )
        if self.layer_types is not None:
            unknown = sorted(set(self.layer_types) - {FULL, SLIDING})
            require(not unknown, f"layer_types has {', '.join(unknown)}; this network computes {FULL} and {SLIDING}.")
            require(
                len(self.layer_types) == self.num_hidden_layers,
                f"layer_types names {len(self.layer_types)} layers; num_hidden_layers is {self.num_hidden_layers}.",
            )
            require(self.sliding_window is not None, "layer_types has meaning only with a sliding_window.")
            require(
                self.qk_norm or self.attention_bias or len(set(self.layer_types)) < 2,
                "layer_types that differ exist in Qwen2 (attention_bias) and Qwen3 (qk_norm) only.",
            )

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads, resolved."""
        return self.num_key_value_heads if self.num_key_value_heads is not None else self.num_attention_heads

    @property
    def head_size(self) -> int:
        """The width of one head, resolved."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    @property
    def model_type(self) -> str:
        """The Hugging Face family whose layout and arithmetic this is."""
        if self.post_norm:
            return "olmo2"
        if self.qk_norm:
            return "qwen3"
        if self.attention_bias:
            return "qwen2"
        return "llama" if self.sliding_window is None else "mistral"

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each layer's window; None where a position sees all before it."""
        kinds = self.layer_types or (SLIDING,) * self.num_hidden_layers
        return tuple(self.sliding_window if kind == SLIDING else None for kind in kinds)

    def num_parameters(self) -> int:
        """Return how many numbers the network learns; tied embeddings count once."""
        embedding = self.vocab_size * self.hidden_size
        per_layer = self._layer_matrix_parameters() + 2 * self.hidden_size
        if self.attention_bias:
            per_layer += (self.num_attention_heads + 2 * self.kv_heads) * self.head_size
        if self.qk_norm:
            per_layer += 2 * self.head_size
        if self.post_norm:
            per_layer += (self.num_attention_heads + self.kv_heads) * self.head_size
        head = 0 if self.tie_word_embeddings else embedding
        return embedding + self.num_hidden_layers * per_layer + self.hidden_size + head

    def flops_per_token(self, context: int) -> float:
        """Return the FLOPs of one forward pass, per token of a row of `context` tokens; training costs 3x.

        Two FLOPs per multiply-add, matrix products only (the embedding lookup, norms and softmax are not counted):

            2 * (matrix parameters of all layers + hidden_size * vocab_size)
              + 4 * num_attention_heads * head_dim * (mean visible, summed over the layers)

        where `mean visible` is the mean number of positions a position attends to: (context + 1) / 2 under the causal
        mask, fewer under a sliding window. PaLM (2204.02311, appendix B) counts the whole context instead.
        """
        windows = [min(window or context, context) for window in self.windows]
        visible = sum((window * (window + 1) / 2 + (context - window) * window) / context for window in windows)
        matrices = self.num_hidden_layers * self._layer_matrix_parameters() + self.hidden_size * self.vocab_size
        return 2.0 * matrices + 4.0 * self.num_attention_heads * self.head_size * visible

    def _layer_matrix_parameters(self) -> int:
        attention = 2 * (self.num_attention_heads + self.kv_heads) * self.head_size * self.hidden_size
        return attention + 3 * self.hidden_size * self.intermediate_size

    @classmethod
    def from_depth(cls, depth: int, vocab_size: int, context: int, **changes: Any) -> ModelConfig:
        """Return the network of `depth` layers that one dial stands for; `changes` override single fields.

        Width 64 * depth, `depth` heads of 64, half as many key-value heads where depth is even, SwiGLU width 8/3 of
        the width rounded up to a multiple of 64 (as many parameters as the 4x of a plain MLP), RMSNorm on queries and
        keys (it forgives a high learning rate), embeddings tied up to depth 6, where they would be a large part of the
        parameters. With 4,096 tokens: depth 2 is 0.9 million parameters, 4 is 4.0, 6 is 11.3, 8 is 27.8.
        """
        require(depth >= 1, f"depth is {depth}; it must be at least 1.")
        width = 64 * depth
        fields: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": -(-8 * width // (3 * 64)) * 64,
            "num_hidden_layers": depth,
            "num_attention_heads": depth,
            "num_key_value_heads": depth // 2 if depth % 2 == 0 else depth,
            "head_dim": 64,
            "max_position_embeddings": context,
            "tie_word_embeddings": depth <= 6,
            "qk_norm": True,
        }
        return cls(**{**fields, **changes})


def require(condition: bool, message: str) -> None:
    """Raise ModelError with `message` unless `condition` holds."""
    if not condition:
        raise ModelError(message)


def _check_rope(scaling: Mapping[str, Any] | None) -> None:
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    reason = ROPE_REFUSALS.get(str(kind), f"the network computes {', '.join(ROPE_KINDS)}")
    require(kind in ROPE_KINDS, f"RoPE scaling {kind!r} is not supported: {reason}.")
    lacking = sorted(ROPE_KINDS[str(kind)] - scaling.keys())
    require(not lacking, f"RoPE scaling {kind!r} lacks {', '.join(lacking)}.")
    options = ROPE_OPTIONS.get(str(kind), frozenset())
    unknown = sorted(scaling.keys() - ROPE_KINDS[str(kind)] - options - {"rope_type"})
    require(not unknown, f"RoPE scaling {kind!r} has no {', '.join(unknown)}.")
