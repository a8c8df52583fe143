"""Which of two policies does a judge prefer, at what length, and how far has the policy moved for it.

The judge sees a prompt and one completion and gives a number; the higher one wins the prompt, equal ones share it. Both
policies answer the same held-out prompts, with random numbers of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trivium.evals.perplexity import row_logprobs
from trivium.evals.players import Player
from trivium.evals.stats import RESAMPLES, mean_interval, win_interval, win_of
from trivium.models.transformer import Transformer
from trivium.records import Completion, Conversation
from trivium.rewards.verifiable import Reward

Interval = tuple[float, float, float]
"""A figure with the ends of its 95% interval."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion per prompt of one player: the ids that were read, and the completions with their logprobs."""

    prompts: tuple[Conversation, ...]
    encoded: tuple[list[int], ...]
    completions: tuple[Completion, ...]
    is_base: bool

    @property
    def lengths(self) -> list[int]:
        """The tokens of each completion."""
        return [len(completion.token_ids) for completion in self.completions]


def sample_completions(
    player: Player, prompts: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seed: Sequence[int]
) -> Sample:
    """Return one sampled completion per prompt; a temperature of 0 is greedy."""
    encoded = [player.encode(prompt, (), max_new_tokens) for prompt in prompts]
    generated = player.write(encoded, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    completions = tuple(
        Completion(
            prompt_id=prompt.id, text=player.text_of(made), token_ids=tuple(made.token_ids), policy=player.name,
            logprobs=tuple(made.logprobs), finish_reason=made.finish_reason,
        )
        for prompt, made in zip(prompts, generated, strict=True)
    )  # fmt: skip
    return Sample(prompts=tuple(prompts), encoded=tuple(encoded), completions=completions, is_base=player.is_base)


def grade(sample: Sample, reward: Reward) -> list[float]:
    """Return the reward's number for each completion; a judge of texts is a Reward by `as_reward`."""
    return reward(sample.prompts, sample.completions)


def win_rate(ours: Sequence[float], theirs: Sequence[float], seed: int) -> Interval:
    """Return the share of prompts that the first grades win, ties as half, with its interval over the prompts."""
    return win_interval(ours, theirs, seed)


def length_controlled(
    ours: Sequence[float], theirs: Sequence[float], lengths: Sequence[int], other: Sequence[int], seed: int
) -> Interval:
    """Return the win rate that a completion of the same length would have, with its bootstrap interval.

    A logistic model of the outcome with two terms, a constant and the bounded length difference
    `tanh((len - len') / spread)`, is read where that difference is 0 (Dubois et al. 2024, without their term for the
    prompt's difficulty). The slope is shrunk a little, as few prompts could otherwise explain everything by length.
    """
    wins = np.array([win_of(a, b) for a, b in zip(ours, theirs, strict=True)])
    difference = np.asarray(lengths, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    if not len(wins):
        return float("nan"), float("nan"), float("nan")
    terms = np.tanh(difference / max(float(difference.std()), 1e-9))
    rows = np.random.default_rng([seed, 96]).integers(0, len(wins), size=(RESAMPLES, len(wins)))
    resampled = _at_equal_length(wins[rows], terms[rows])
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(_at_equal_length(wins[None], terms[None])[0]), float(low), float(high)


def _at_equal_length(wins: NDArray[np.float64], terms: NDArray[np.float64], ridge: float = 1.0) -> NDArray[np.float64]:
    """Return the fitted probability of a win at difference 0, for each row of [R, n] outcomes: Newton's method."""
    constant, slope = np.zeros(len(wins)), np.zeros(len(wins))
    for _ in range(25):
        p = 1 / (1 + np.exp(-(constant[:, None] + slope[:, None] * terms)))
        weight = p * (1 - p)
        # A trace of ridge on the constant too keeps it finite where every outcome is the same.
        g0 = (wins - p).sum(1) - 1e-2 * constant
        g1 = ((wins - p) * terms).sum(1) - ridge * slope
        h00, h01 = weight.sum(1) + 1e-2, (weight * terms).sum(1)
        h11 = (weight * terms * terms).sum(1) + ridge
        determinant = h00 * h11 - h01 * h01
        constant = np.clip(constant + (h11 * g0 - h01 * g1) / determinant, -12, 12)
        slope = np.clip(slope + (h00 * g1 - h01 * g0) / determinant, -12, 12)
    fitted: NDArray[np.float64] = 1 / (1 + np.exp(-constant))
    return fitted


def kl_to(reference: Transformer, sample: Sample, temperature: float) -> Interval | None:
    """Return the mean KL(policy || reference) per completion in nats, with its 95% interval.

    The estimate is unbiased, and at one seed it may come out slightly negative. None for a base model, which reads
    another prompt, and for greedy completions, which are no sample.
    """
    if sample.is_base or not temperature > 0:
        return None
    return mean_interval(log_ratios(reference, sample, temperature))


def log_ratios(reference: Transformer, sample: Sample, temperature: float) -> list[float]:
    """Return `sum(log p - log ref)` over each sampled completion (nats), both at the sampling temperature."""
    rows = [
        ([*ids, *c.token_ids], [False] * len(ids) + [True] * len(c.token_ids))
        for ids, c in zip(sample.encoded, sample.completions, strict=True)
    ]
    refs = row_logprobs(reference, rows, temperature=temperature)
    return [sum(c.logprobs) - sum(ref) for c, ref in zip(sample.completions, refs, strict=True)]
