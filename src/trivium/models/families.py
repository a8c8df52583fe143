"""The families of Hugging Face that the network can be: what their `config.json` means, and how it is written.

A key that would change what the network computes is computed, or refused by name; none is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trivium.models.config import FULL, ROPE_KINDS, ROPE_OPTIONS, SLIDING, ModelConfig, ModelError, require

CLASSES: Mapping[str, str] = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "olmo2": "Olmo2",
}
"""`model_type` and the beginning of the class names in transformers."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
    },
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "olmo2": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279, "pad_token_id": 1},
}
"""What a key absent from `config.json` means in each family; a wrong guess here would load and compute nonsense."""

REFUSED: Mapping[str, object] = {
    "mlp_bias": False,
    "use_bias": False,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "attention_sinks": False,
    "attention_chunk_size": None,
    "no_rope_layers": None,
    "clip_qkv": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "num_experts": 0,
    "num_local_experts": 0,
    "quantization_config": None,
}
"""Keys that change what is computed in ways this network does not, and the value that changes nothing.

The four families' own classes in transformers know none of them but `mlp_bias`; forks and near relatives that keep the
family's `model_type` set them. Dropout is left out of the network and of this table: it changes training only.
"""

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "hidden_act",
    "initializer_range",
)
_ROPE_NUMBERS = frozenset().union(*ROPE_KINDS.values(), *ROPE_OPTIONS.values())
_HARMLESS_ROPE_KEYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"})


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Return the shape that a `config.json` describes; raises ModelError for what this network cannot compute."""
    family = str(config.get("model_type"))
    require(family in CLASSES, f"model_type {family!r} is not supported; the network can be {', '.join(CLASSES)}.")
    known = {**DEFAULTS[family], **config}
    if family in ("llama", "qwen3", "olmo2"):
        require(not known.get("attention_bias"), f"attention_bias of {family} (a bias on o_proj too) is not supported.")
    for key, neutral in REFUSED.items():
        value = known.get(key)
        require(value is None or value == neutral, f"{key} = {value!r} in config.json is not supported.")
    try:
        fields = {name: known[name] for name in _REQUIRED}
    except KeyError as error:
        raise ModelError(f"config.json lacks {error.args[0]!r}.") from None
    theta, scaling = _read_rope(known)
    window, layer_types = _read_windows(known)
    eos = known.get("eos_token_id")
    return ModelConfig(
        **fields,
        **{name: known[name] for name in _OPTIONAL if known.get(name) is not None},
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        post_norm=family == "olmo2",
        sliding_window=window,
        layer_types=layer_types,
        bos_token_id=known.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=known.get("pad_token_id"),
    )


def write_config(config: ModelConfig, architecture: str = "ForCausalLM", dtype: str = "float32") -> dict[str, Any]:
    """Return the `config.json` of a network as `architecture` ("ForCausalLM" or "ForSequenceClassification").

    RoPE's base and the dtype are written twice, under the names of transformers 4 and 5: version 4 reads a file with
    only `rope_parameters` silently with the wrong base.
    """
    family = config.model_type
    scaling = dict(config.rope_scaling) if config.rope_scaling else None
    eos = config.eos_token_id
    written: dict[str, Any] = {
        "architectures": [CLASSES[family] + architecture],
        "model_type": family,
        **{name: getattr(config, name) for name in (*_REQUIRED, *_OPTIONAL)},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta},
        "attention_dropout": 0.0,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
    }
    if family in ("llama", "qwen3", "olmo2"):
        written["attention_bias"] = False
    if family == "llama":
        written["mlp_bias"] = False
    if family in ("qwen2", "qwen3", "mistral"):
        written["sliding_window"] = config.sliding_window
    if family in ("qwen2", "qwen3"):
        written["use_sliding_window"] = config.sliding_window is not None
        # Versions without layer_types know only this number: the first layer that has the window.
        windowed = [window is not None for window in config.windows]
        written["max_window_layers"] = windowed.index(True) if any(windowed) else config.num_hidden_layers
        if config.layer_types is not None:
            written["layer_types"] = list(config.layer_types)
    if architecture == "ForSequenceClassification":
        written |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return written


def _read_rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return RoPE's base and its scaling (None for none) from either generation of `config.json`."""
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    nested = [key for key, value in scaling.items() if isinstance(value, Mapping)]
    require(not nested, f"RoPE that differs between layers ({', '.join(nested)}) is not supported.")
    unknown = sorted(key for key in scaling.keys() - _ROPE_NUMBERS - _HARMLESS_ROPE_KEYS if scaling[key] is not None)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind in ROPE_KINDS:
        require(not unknown, f"{', '.join(unknown)} of the RoPE scaling {kind!r} is not supported.")
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    partial = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    require(partial == 1.0, f"partial_rotary_factor {partial} is not supported.")
    if kind == "default":
        return theta, None
    wanted = ROPE_KINDS.get(kind, frozenset()) | ROPE_OPTIONS.get(kind, frozenset())
    original = "original_max_position_embeddings"
    if original in wanted:  # as transformers finds it: beside the scaling, in it, or the context itself
        places = (config.get(original), scaling.get(original), config.get("max_position_embeddings"))
        scaling[original] = next((place for place in places if place), None)
    return theta, {"rope_type": kind, **{k: scaling[k] for k in sorted(wanted) if scaling.get(k) is not None}}


def _read_windows(config: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...] | None]:
    """Return the window (None for none), and each layer's kind where they differ."""
    family, layers = config["model_type"], config["num_hidden_layers"]
    window: int | None = config.get("sliding_window")
    named = config.get("layer_types")
    if family in ("llama", "olmo2"):  # their classes have no window, whatever the file says
        window = None
    elif family in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        window = None
    if named is None:
        first = 0 if family == "mistral" else config.get("max_window_layers", 28)
        named = [SLIDING if window is not None and layer >= first else FULL for layer in range(layers)]
    strange = sorted(set(named) - {FULL, SLIDING})
    require(not strange, f"layer_types has {', '.join(strange)}; this network computes {FULL} and {SLIDING}.")
    require(len(named) == layers, f"layer_types names {len(named)} layers; num_hidden_layers is {layers}.")
    require(
        window is not None or SLIDING not in named,
        f"layer_types of {family} has {SLIDING}, but there is no window (sliding_window, use_sliding_window).",
    )
    if SLIDING not in named:
        require(family != "mistral" or window is None or not layers, "layer_types of mistral turns its window off.")
        return None, None
    return window, None if FULL not in named else tuple(named)
