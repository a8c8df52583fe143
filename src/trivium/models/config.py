"""The shape of a network, in Hugging Face's field names, and its translation to and from `config.json`.

Four families share one network: Llama, Qwen2 (biases on q, k, v), Qwen3 (RMSNorm on each query and key head) and
Mistral (a sliding window). Which family a config belongs to follows from its switches, see `ModelConfig.model_type`.
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
}
"""The RoPE scalings this network computes, with the numbers each one needs."""

FAMILY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
"""What a key absent from `config.json` means in each family; a wrong guess here would load and compute nonsense."""


class ModelError(UserError, ValueError):
    """A model's shape or folder is not one this network can be."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
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
    """None, or `{"rope_type": "linear" | "llama3", ...}` with the numbers that kind needs."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases on q, k and v (not o): Qwen2."""
    qk_norm: bool = False
    """RMSNorm on every query and key head: Qwen3."""
    sliding_window: int | None = None
    """A position sees itself and the `sliding_window - 1` before it: Mistral."""
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        """Refuse a shape that no network of this kind can have."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1.")
        _require(self.num_hidden_layers >= 0, "num_hidden_layers must not be negative.")
        heads, kv_heads = self.num_attention_heads, self.kv_heads
        _require(
            kv_heads >= 1 and heads % kv_heads == 0,
            f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads}).",
        )
        _require(
            self.head_dim is not None or self.hidden_size % heads == 0,
            f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads ({heads}), or give head_dim.",
        )
        _require(self.head_size % 2 == 0, f"head_dim is {self.head_size}; RoPE turns pairs, so it must be even.")
        _require(self.hidden_act == "silu", f"hidden_act is {self.hidden_act!r}; this network computes 'silu' only.")
        _require(
            not (self.qk_norm and self.attention_bias),
            "qk_norm (Qwen3) and attention_bias (Qwen2) exclude each other: no published layout has both.",
        )
        _require(self.sliding_window is None or self.sliding_window >= 1, "sliding_window must be at least 1, or None.")
        _check_rope(self.rope_scaling)

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
        if self.qk_norm:
            return "qwen3"
        if self.attention_bias:
            return "qwen2"
        return "llama" if self.sliding_window is None else "mistral"

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends a sequence."""
        eos = self.eos_token_id
        return frozenset(() if eos is None else (eos,) if isinstance(eos, int) else eos)

    def num_parameters(self) -> int:
        """Return how many numbers the network learns; tied embeddings count once."""
        embedding = self.vocab_size * self.hidden_size
        per_layer = self._layer_matrix_parameters() + 2 * self.hidden_size
        if self.attention_bias:
            per_layer += (self.num_attention_heads + 2 * self.kv_heads) * self.head_size
        if self.qk_norm:
            per_layer += 2 * self.head_size
        head = 0 if self.tie_word_embeddings else embedding
        return embedding + self.num_hidden_layers * per_layer + self.hidden_size + head

    def flops_per_token(self, context: int) -> float:
        """Return the FLOPs of one forward pass, per token of a row of `context` tokens; training costs 3x.

        Two FLOPs per multiply-add, matrix products only (the embedding lookup, norms and softmax are not counted):

            2 * (matrix parameters of all layers + hidden_size * vocab_size)
              + 4 * num_hidden_layers * num_attention_heads * head_dim * mean visible

        where `mean visible` is the mean number of positions a position attends to: (context + 1) / 2 under the causal
        mask, fewer under a sliding window. PaLM (2204.02311, appendix B) counts the whole context instead.
        """
        window = min(self.sliding_window or context, context)
        visible = (window * (window + 1) / 2 + (context - window) * window) / context
        matrices = self.num_hidden_layers * self._layer_matrix_parameters() + self.hidden_size * self.vocab_size
        attention = self.num_hidden_layers * self.num_attention_heads * self.head_size * visible
        return 2.0 * matrices + 4.0 * attention

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
        _require(depth >= 1, f"depth is {depth}; it must be at least 1.")
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

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Return the shape that a `config.json` describes; raises ModelError for what this network cannot compute."""
        family = config.get("model_type")
        _require(
            family in FAMILY_DEFAULTS,
            f"model_type {family!r} is not supported; the network can be {', '.join(FAMILY_DEFAULTS)}.",
        )
        known = {**FAMILY_DEFAULTS[str(family)], **config}
        if family == "llama" or family == "qwen3":
            _require(
                not known.get("attention_bias"), f"attention_bias of {family} (a bias on o_proj too) is not supported."
            )
        _require(not known.get("mlp_bias"), "mlp_bias is not supported.")
        try:
            fields = {name: known[name] for name in _REQUIRED_FIELDS}
        except KeyError as error:
            raise ModelError(f"config.json lacks {error.args[0]!r}.") from None
        theta, scaling = _read_rope(known)
        eos = known.get("eos_token_id")
        return cls(
            **fields,
            **{name: known[name] for name in _OPTIONAL_FIELDS if known.get(name) is not None},
            rope_theta=theta,
            rope_scaling=scaling,
            attention_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            sliding_window=_read_window(known),
            bos_token_id=known.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=known.get("pad_token_id"),
        )

    def to_hf(self, architecture: str = "ForCausalLM", dtype: str = "float32") -> dict[str, Any]:
        """Return the `config.json` of this network as `architecture` ("ForCausalLM" or "ForSequenceClassification").

        RoPE's base and the dtype are written twice, under the names of transformers 4 and 5: version 4 reads a file
        with only `rope_parameters` silently with the wrong base.
        """
        family = self.model_type
        scaling = dict(self.rope_scaling) if self.rope_scaling else None
        eos = self.eos_token_id
        written: dict[str, Any] = {
            "architectures": [
                {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}.get(family, "Mistral") + architecture
            ],
            "model_type": family,
            **{name: getattr(self, name) for name in (*_REQUIRED_FIELDS, *_OPTIONAL_FIELDS)},
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": self.rope_theta},
            "attention_dropout": 0.0,
            "dtype": dtype,
            "torch_dtype": dtype,
            "use_cache": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "pad_token_id": self.pad_token_id,
        }
        if family in ("llama", "qwen3"):
            written["attention_bias"] = False
        if family == "llama":
            written["mlp_bias"] = False
        else:
            written["sliding_window"] = self.sliding_window
        if family in ("qwen2", "qwen3"):
            windowed = self.sliding_window is not None
            written["use_sliding_window"] = windowed
            written["max_window_layers"] = 0 if windowed else self.num_hidden_layers
        if architecture == "ForSequenceClassification":
            written |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        return written


_REQUIRED_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL_FIELDS = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "hidden_act",
    "initializer_range",
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ModelError(message)


def _check_rope(scaling: Mapping[str, Any] | None) -> None:
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    _require(
        kind in ROPE_KINDS, f"RoPE scaling {kind!r} is not supported; the network computes {', '.join(ROPE_KINDS)}."
    )
    lacking = sorted(ROPE_KINDS[str(kind)] - scaling.keys())
    _require(not lacking, f"RoPE scaling {kind!r} lacks {', '.join(lacking)}.")


def _read_rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return RoPE's base and its scaling (None for none) from either generation of `config.json`."""
    new = dict(config.get("rope_parameters") or {})
    scaling = {**(config.get("rope_scaling") or {}), **new}
    theta = float(scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    partial = scaling.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    _require(partial == 1.0, f"partial_rotary_factor {partial} is not supported.")
    kind = scaling.pop("rope_type", None) or scaling.get("type") or "default"
    scaling.pop("type", None)
    if kind == "default":
        return theta, None
    return theta, {
        "rope_type": kind,
        **{key: scaling[key] for key in ROPE_KINDS.get(kind, frozenset()) & scaling.keys()},
    }


def _read_window(config: Mapping[str, Any]) -> int | None:
    window: int | None = config.get("sliding_window")
    if config["model_type"] == "mistral":
        return window
    if window is None or not config.get("use_sliding_window"):
        return None
    layers = config["num_hidden_layers"]
    first = config.get("max_window_layers", 28)
    if first >= layers:
        return None
    _require(first == 0, f"A sliding window from layer {first} on only is not supported; all layers must agree.")
    return window
