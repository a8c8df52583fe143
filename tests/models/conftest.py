"""The five families, tiny and random, in both implementations."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

from trivium.models.config import ModelConfig
from trivium.models.transformer import Transformer

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": {"rope_theta": 5000.0, "rms_norm_eps": 1e-5},
    "llama-tied-mha": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama-linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama-yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "max_position_embeddings": 64,
    },
    "qwen2": {"attention_bias": True, "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "qwen3-window": {"qk_norm": True, "sliding_window": 5},
    "qwen2-mixed-windows": {
        "attention_bias": True,
        "sliding_window": 5,
        "layer_types": ("full_attention", "sliding_attention", "full_attention"),
    },
    "mistral": {"sliding_window": 7},
    "olmo2": {"post_norm": True, "rms_norm_eps": 1e-5},
}


def _random_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter, norms and biases included, a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))


def _tiny(**changes) -> Transformer:
    model = Transformer(ModelConfig(**{**SHAPE, **changes}))
    _random_weights(model)
    return model.eval()


def _tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(8, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def _reference(model: Transformer):
    """Return transformers' model of the same shape and weights, made without any of our file writing."""
    config = model.config
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
    }[config.model_type]
    extra = {}
    if config.sliding_window and config.model_type in ("qwen2", "qwen3"):
        extra = {"use_sliding_window": True, "max_window_layers": 0}
    if config.layer_types:
        extra["layer_types"] = list(config.layer_types)
    rope = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    theirs = model_class(
        config_class(
            **{key: getattr(config, key) for key in SHAPE},
            head_dim=config.head_size,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            rope_parameters=rope,
            sliding_window=config.sliding_window,
            pad_token_id=0,
            attn_implementation="eager",
            **extra,
        )
    )
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs.eval()


@pytest.fixture(params=FAMILIES)
def family(request) -> Transformer:
    return _tiny(**FAMILIES[request.param])


@pytest.fixture
def tiny():
    """`tiny(**changes)`: a random model, the shape of SHAPE with some fields changed."""
    return _tiny


@pytest.fixture
def tokens():
    """`tokens(batch, length, seed)`: random ids above the special ones."""
    return _tokens


@pytest.fixture
def reference():
    """`reference(model)`: transformers' model of the same shape and weights."""
    return _reference
