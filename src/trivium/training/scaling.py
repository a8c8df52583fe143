"""The `depth` dial: one number to the shape, the batch, the learning rate and the length of a compute-optimal run.

Every rule is a published fit, named where it stands; what they come to on text of one's own is checked by
`bench/depth_sweep.py` (docs/concepts/depth.md has what was measured, and at which depths).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trivium.models.accounting import training_flops
from trivium.models.config import ModelConfig

HEAD_SIZE = 64
"""Width of a head, and width per layer: 64 * depth keeps the ratio of GPT-2 (768 wide at 12 layers). Kaplan et al.
(2001.08361, section 3.2) find the loss flat within a few percent for ratios from about 20 to 200."""

TOKENS_PER_PARAMETER = 20.0
"""Chinchilla (Hoffmann et al. 2203.15556, table 3): about 20 training tokens per parameter at every compute budget."""

MIN_STEPS = 750
"""Steps below which the batch is halved rather than the steps: where the fit of the batch, made for billions of tokens,
stops being followed downwards. Measured at 0.39 million tokens: 766 steps of 2 rows were better than 383 of 4 by 5.6%
in bits per byte (docs/concepts/depth.md)."""

MAX_LR = 0.01
"""Where the learning-rate fit, made for 60 million parameters and more, stops being followed downwards in size: at
depth 1, where it asks for 0.02, 0.01 was better by 1.5% in bits per byte (docs/concepts/depth.md)."""

MAX_WEIGHT_DECAY = 0.3
"""Where the weight-decay fit stops being followed: runs of a few steps would be asked to forget all they learn."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The part of a network that depth decides."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How a network of known size is trained: `tokens` in all, rows per step, steps, peak learning rate, decay."""

    tokens: int
    batch_size: int
    steps: int
    lr: float
    weight_decay: float


def shape_of(depth: int, hidden_size: int = 0, num_heads: int = 0) -> Shape:
    """Return the shape at `depth`; a width or a number of heads above 0 is kept, and the rest follows from it.

    `depth` layers of width 64 * depth in heads of 64, with half as many key-value heads where their number is even
    (grouped queries: half the cache, next to no loss). A width of one's own gets the number of heads whose size is
    nearest to 64 and even. Worked: depth 4 is width 256, 4 heads, 2 key-value heads; depth 2 with width 96 is 2
    heads of 48.
    """
    width = hidden_size or HEAD_SIZE * depth
    fitting = [heads for heads in range(1, width + 1) if width % heads == 0 and (width // heads) % 2 == 0] or [1]
    heads = num_heads or min(fitting, key=lambda number: abs(math.log(width / number / HEAD_SIZE)))
    return Shape(
        hidden_size=width,
        num_layers=depth,
        num_heads=heads,
        num_kv_heads=heads // 2 if heads % 2 == 0 else heads,
    )


def budget_of(
    model: ModelConfig,
    context: int,
    tokens_per_parameter: float = 0.0,
    *,
    batch_size: int = 0,
    steps: int = 0,
    lr: float = 0.0,
    weight_decay: float = -1.0,
) -> Budget:
    """Return how to train `model` on rows of `context` tokens; a value that is given (above 0; decay 0) is kept.

    Tokens D = `tokens_per_parameter` (0: 20) times all parameters, tied embeddings once. The batch is
    `optimal_batch_tokens(D)`, or less so that there are MIN_STEPS steps; where the recipe sets the steps, D becomes
    what they read. The learning rate is `optimal_lr`, the decay `optimal_weight_decay`, at that D.
    """
    size = model.num_parameters()
    planned = (tokens_per_parameter or TOKENS_PER_PARAMETER) * size
    rows = batch_size or max(1, round(min(optimal_batch_tokens(planned), planned / MIN_STEPS) / context))
    count = steps or max(1, math.ceil(planned / (rows * context)))
    tokens = count * rows * context
    peak = lr or optimal_lr(matrix_parameters(model), tokens)
    decay = weight_decay if weight_decay >= 0 else optimal_weight_decay(peak, count, tokens / size)
    return Budget(tokens=tokens, batch_size=rows, steps=count, lr=_two_digits(peak), weight_decay=_two_digits(decay))


def matrix_parameters(model: ModelConfig) -> int:
    """Return the number of weights inside the layers: what the fits below call N (no embedding, no output layer)."""
    outside = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2) + model.hidden_size
    return max(1, model.num_parameters() - outside)


def optimal_batch_tokens(tokens: float) -> float:
    """Return the tokens per step that train best on `tokens` in all: 0.58 * D^0.571 (Step Law, 2503.04715).

    Nearly D^0.5: the critical batch size grows with the data and not with the model (2505.13738, figure 1).
    """
    return float(0.58 * tokens**0.571)


def optimal_lr(parameters: float, tokens: float) -> float:
    """Return the peak learning rate, 1.79 * N^-0.713 * D^0.307 (Step Law, 2503.04715), at most MAX_LR.

    The fit is AdamW's. It serves Muon too, whose update is scaled to AdamW's size (training/optim.py), and whose
    orthogonal update makes the best rate depend little on the width alone; at D = 20 N the rate falls as N^-0.41,
    which for a width of 64 * depth is a little steeper than muP's 1 / width (2203.03466).
    """
    return min(MAX_LR, float(1.79 * parameters**-0.713 * tokens**0.307))


def optimal_weight_decay(lr: float, steps: int, tokens_per_parameter: float) -> float:
    """Return the decay whose averaging time is tau = 1.084 * (D / N)^-0.527 of the run (2505.13738).

    The weights are a moving average over 1 / (lr * decay) steps, so decay = 1 / (lr * tau * steps).
    """
    tau = 1.084 * tokens_per_parameter**-0.527
    return min(MAX_WEIGHT_DECAY, float(1 / (lr * tau * steps)))


def _two_digits(value: float) -> float:
    """Return `value` to two significant digits: more would pretend to a precision that the fits do not have."""
    return float(f"{value:.2g}")


def depth_table(depths: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 20, 32)) -> str:
    """Return what the dial comes to, as the Markdown table of docs/concepts/depth.md."""
    heads = "depth, width, heads, parameters, tokens, rows per step, steps, learning rate, decay, FLOPs".split(", ")
    lines = ["| " + " | ".join(heads) + " |", "|" + " ---: |" * len(heads)]
    for depth in depths:
        shape, large = shape_of(depth), depth >= 12
        context = 2048 if large else 256
        model = ModelConfig(
            vocab_size=32768 if large else 4096,
            hidden_size=shape.hidden_size,
            intermediate_size=32 * math.ceil(shape.hidden_size * 8 / 3 / 32),
            num_hidden_layers=depth,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            tie_word_embeddings=True,
            qk_norm=True,
        )
        budget = budget_of(model, context)
        cost = budget.tokens * training_flops(model, context)
        cells = [f"{depth}", f"{shape.hidden_size:,}", f"{shape.num_heads}", f"{model.num_parameters() / 1e6:,.1f} M"]
        cells += [f"{budget.tokens / 1e6:,.0f} M", f"{budget.batch_size}", f"{budget.steps:,}"]
        lines.append("| " + " | ".join([*cells, f"{budget.lr}", f"{budget.weight_decay}", f"{cost:.1e}"]) + " |")
    return "\n".join(lines) + "\n"
