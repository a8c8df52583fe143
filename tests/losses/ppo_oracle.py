"""PPO's arithmetic as TRL 1.12 has it (the last version with PPO), written anew in NumPy, one number at a time.

Rows are responses only, padded on the right; `lengths` counts a row's real tokens. What TRL does and Trivium does not:

1. *The score stands on the first pad* after the response, where the row has one (trl#3750), and so counts as one more
   step: its value is trained, and GAE passes through it. `score_on_pad=False` puts it on the last token instead.
2. *The temperature* is `temperature + 1e-7` there.
3. *Losses are means* over a micro-batch's tokens, so that their weight depends on the split; here they are per token.
4. *The penalty for a missing end of text* is taken off before the score is placed, as here; TRL looks for the end token
   anywhere in the response, Trivium asks the generator why it stopped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Shaped:
    """What a round becomes: rewards, advantages, returns, each [B][T], and where values are trained."""

    rewards: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    trained: np.ndarray


def whitened(x: np.ndarray, mask: np.ndarray, shift_mean: bool) -> np.ndarray:
    """Scale what the mask holds to variance 1 (of n - 1), with or without its mean; 0 elsewhere."""
    inside = [x[place] for place in zip(*mask.nonzero(), strict=True)]
    mean = sum(inside) / len(inside)
    variance = sum((value - mean) ** 2 for value in inside) / (len(inside) - 1)
    white = (x - mean) / math.sqrt(variance + 1e-8)
    return np.where(mask, white if shift_mean else white + mean, 0.0)


def shaped(
    logprobs: np.ndarray,
    ref_logprobs: np.ndarray,
    values: np.ndarray,
    scores: np.ndarray,
    lengths: list[int],
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
    score_on_pad: bool,
) -> Shaped:
    """Return a round as the update sees it."""
    rows, width = logprobs.shape
    mask = np.array([[t < lengths[b] for t in range(width)] for b in range(rows)])
    ends = [lengths[b] if score_on_pad and lengths[b] < width else lengths[b] - 1 for b in range(rows)]
    trained = np.array([[t <= ends[b] for t in range(width)] for b in range(rows)])
    rewards = np.zeros((rows, width))
    for b in range(rows):
        for t in range(lengths[b]):
            rewards[b, t] = -kl_coef * (logprobs[b, t] - ref_logprobs[b, t])
        rewards[b, ends[b]] += scores[b]
    if whiten_rewards:
        rewards = whitened(rewards, trained, shift_mean=False)
    advantages = np.zeros((rows, width))
    for b in range(rows):
        last = 0.0
        for t in range(ends[b], -1, -1):
            following = values[b, t + 1] if t < ends[b] else 0.0
            last = rewards[b, t] + gamma * following - values[b, t] + gamma * lam * last
            advantages[b, t] = last
    returns = np.where(trained, advantages + values, 0.0)
    return Shaped(rewards, whitened(advantages, mask, shift_mean=True), returns, trained)


def policy_losses(new: np.ndarray, old: np.ndarray, advantages: np.ndarray, mask: np.ndarray, clip: float):
    """Return the loss of each token."""
    out = np.zeros(new.shape)
    for place in zip(*mask.nonzero(), strict=True):
        ratio = math.exp(new[place] - old[place])
        held = min(max(ratio, 1 - clip), 1 + clip)
        out[place] = max(-advantages[place] * ratio, -advantages[place] * held)
    return out


def value_losses(new: np.ndarray, old: np.ndarray, returns: np.ndarray, trained: np.ndarray, clip: float):
    """Return the loss of each forecast."""
    out = np.zeros(new.shape)
    for place in zip(*trained.nonzero(), strict=True):
        held = min(max(new[place], old[place] - clip), old[place] + clip)
        out[place] = 0.5 * max((new[place] - returns[place]) ** 2, (held - returns[place]) ** 2)
    return out
