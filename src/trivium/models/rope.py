"""Rotary positions (2104.09864): how fast each pair of a head turns, and how the scalings slow that down.

The arithmetic is transformers', operation by operation in float32: at position 10,000 a frequency that differs in its
last bit is an angle that differs in the third decimal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trivium.models.config import ModelConfig

Scaling = Mapping[str, Any]


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Return RoPE's angle per position of each pair, float32 [head_dim / 2] on the CPU, scaling included.

    `theta^(-2i / head_dim)` for pair i, then what the scaling makes of it.
    """
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32, device="cpu") / config.head_size
    turns = config.rope_theta**exponents
    scaling = config.rope_scaling or {"rope_type": "default"}
    return _SCALINGS[scaling["rope_type"]](turns, scaling, config)


def attention_factor(config: ModelConfig) -> float:
    """Return the number that cosine and sine are multiplied with: 1, but for YaRN (2309.00071, section 3.4).

    `0.1 * ln(factor) + 1`, so that scores over a longer context stay as sharp; a config may give another number, or
    two (`mscale`, `mscale_all_dim`: DeepSeek) whose terms are divided.
    """
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def sharpness(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return sharpness(over) / sharpness(under) if over and under else sharpness(1.0)


def _default(turns: Tensor, scaling: Scaling, config: ModelConfig) -> Tensor:
    return 1.0 / turns


def _linear(turns: Tensor, scaling: Scaling, config: ModelConfig) -> Tensor:
    """All pairs slowed by `factor`: as if the positions were divided (2306.15595)."""
    slowed: Tensor = 1.0 / turns / scaling["factor"]
    return slowed


def _llama3(turns: Tensor, scaling: Scaling, config: ModelConfig) -> Tensor:
    """Slow pairs are slowed further by `factor`, fast ones kept, those between blended (Llama 3.1)."""
    frequencies = 1.0 / turns
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    periods = scaling["original_max_position_embeddings"] / (2 * math.pi / frequencies)
    kept = ((periods - low) / (high - low)).clamp(0.0, 1.0)
    blended = (1 - kept) * frequencies / scaling["factor"] + kept * frequencies
    return torch.where(kept == 1, frequencies, torch.where(kept == 0, frequencies / scaling["factor"], blended))


def _yarn(turns: Tensor, scaling: Scaling, config: ModelConfig) -> Tensor:
    """Pairs that turn more than `beta_fast` times in the original context are kept, those under `beta_slow` slowed.

    Between the two the blend is linear in the pair's index (2309.00071, section 3.2, there in the number of turns).
    """
    size, pairs = config.head_size, config.head_size // 2

    def pair_that_turns(times: float) -> float:
        context = scaling["original_max_position_embeddings"]
        return size * math.log(context / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = pair_that_turns(scaling.get("beta_fast") or 32)
    high = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    # transformers bounds by the head's size, not by its pairs; so do the models that were trained with it.
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 if low == high else 0.0
    kept = 1 - ((torch.arange(pairs, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    blended: Tensor = 1.0 / (scaling["factor"] * turns) * (1 - kept) + 1.0 / turns * kept
    return blended


_SCALINGS: dict[str, Callable[[Tensor, Scaling, ModelConfig], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
