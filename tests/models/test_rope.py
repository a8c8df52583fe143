"""RoPE's table equals transformers' at every position, for every scaling; rows 21 of the list of silent bugs."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from trivium.models.config import ModelConfig
from trivium.models.rope import attention_factor, inverse_frequencies
from trivium.models.transformer import Transformer, rotate

SHAPE = {
    "vocab_size": 8,
    "hidden_size": 128,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
SCALINGS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-untruncated": {**YARN, "truncate": False},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.25},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
    "yarn-no-stretch": {**YARN, "factor": 1.0},
    "yarn-short-original": {**YARN, "original_max_position_embeddings": 4},
}


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_the_table_is_that_of_transformers(name, theta):
    """To the last bit in the frequencies (one in llama3's blend), so at any position, here to 4 times the context."""
    scaling = SCALINGS[name]
    config = ModelConfig(**SHAPE, rope_theta=theta, rope_scaling=scaling)
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SHAPE, rope_parameters=rope))
    if name == "llama3":
        assert torch.allclose(inverse_frequencies(config), theirs.inv_freq, rtol=2**-22, atol=0)
    else:
        assert torch.equal(inverse_frequencies(config), theirs.inv_freq)
    assert attention_factor(config) == theirs.attention_scaling
    positions = torch.tensor([[0, 1, 127, 128, 511, 512, 2047]])
    cos, sin = Transformer(config).model.rope(positions)
    expected_cos, expected_sin = theirs(torch.zeros(1), positions)
    # Two roundings of the same angle apart: 2048 * 2^-23, only where llama3 blends.
    tolerance = 3e-4 if name == "llama3" else 1e-6
    assert torch.allclose(cos[:, :, 0], expected_cos[..., :32], atol=tolerance)
    assert torch.allclose(sin[:, :, 0], expected_sin[..., :32], atol=tolerance)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_survive_low_precision(autocast, dtype):
    """Row 21: in bfloat16, position 16,001 is position 16,000; the bar is 1e-3 in the cosine."""
    model = Transformer(ModelConfig(**SHAPE)).to(dtype)
    positions = torch.tensor([[100, 1000, 4095, 16000]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        cos, sin = model.model.rope(positions)
    exact = positions[..., None].double() / 10000.0 ** (torch.arange(0, 64, 2).double() / 64)
    assert cos.dtype == torch.float32
    assert (cos[:, :, 0].double() - exact.cos()).abs().max() <= 1e-3
    assert (sin[:, :, 0].double() - exact.sin()).abs().max() <= 1e-3


def test_rotation_by_hand():
    """A quarter turn takes (1, 0) to (0, 1) and (0, 1) to (-1, 0)."""
    quarter = torch.full((1, 1, 1, 1), math.pi / 2)
    turned = rotate(torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]), quarter.cos(), quarter.sin())
    assert torch.allclose(turned, torch.tensor([[[[0.0, 1.0], [-1.0, 0.0]]]]), atol=1e-7)


def test_linear_scaling_divides_the_positions():
    plain = inverse_frequencies(ModelConfig(**SHAPE))
    scaled = inverse_frequencies(ModelConfig(**SHAPE, rope_scaling={"rope_type": "linear", "factor": 4.0}))
    assert torch.equal(scaled * 4, plain)


def test_yarn_keeps_the_fast_pairs_and_slows_the_slow_ones():
    """Theta 10,000, 32 pairs, context 128: pair 0 turns 20 times, the last 0.003 times (fewer than 1: slowed)."""
    plain = inverse_frequencies(ModelConfig(**SHAPE))
    scaled = inverse_frequencies(ModelConfig(**SHAPE, rope_scaling={**YARN, "beta_fast": 16.0}))
    assert scaled[0] == plain[0]
    assert torch.allclose(scaled[-8:], plain[-8:] / 4)
    between = scaled / plain
    assert bool((between.diff() <= 1e-6).all())  # never slower, then faster again


def test_yarns_attention_factor_by_hand():
    """0.1 ln 4 + 1 = 1.1386."""
    assert attention_factor(ModelConfig(**SHAPE, rope_scaling=YARN)) == pytest.approx(1.1386, abs=1e-4)
    assert attention_factor(ModelConfig(**SHAPE)) == 1.0
