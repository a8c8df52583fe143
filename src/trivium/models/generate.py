"""Sampling: many prompts at once, token by token, with a cache that never grows.

Prompts are padded on the left, so that every row's next token falls into the same slot. Each row draws from random
numbers of its own, fixed by (seed, row) before the first step: who else is in the batch cannot change a sample. A
finished row gives up its place to a live one, so the batch shrinks as rows end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trivium.models.transformer import KVCache, Transformer

PREFILL_TOKENS_CPU = 2048
"""About how many prompt tokens are read at once: few enough for their activations to stay in a processor's cache."""
PREFILL_TOKENS = 65536
"""The same on an accelerator, where it bounds memory only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One completion.

    `token_ids` includes the stop token where there is one. `logprobs` (nats) belong to the distribution the tokens
    were drawn from. `finish_reason`: "stop" (a stop token, or `on_token` said so) or "length".
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sampling:
    """How a token is drawn from logits."""

    temperature: float
    top_k: int
    top_p: float

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more.")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (off) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off).")

    def draw(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens int64 [B] and their logprobs [B], from logits [B, V] and one number in [0, 1) per row."""
        if self.temperature == 0:
            tokens = logits.argmax(-1)
            return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k or self.top_p < 1:
            logits = filter_logits(logits, self.top_k, self.top_p)
        logprobs = logits.log_softmax(-1)
        # float64: the last sum must not be reached by rounding, or a token of probability 0 could be drawn.
        cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
        drawn = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
        return drawn[:, 0], logprobs.gather(1, drawn)[:, 0]


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Return logits [B, V] with -inf outside the `top_k` likeliest and the smallest set of probability `top_p`."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # A token stays if those before it do not yet add up to top_p, so the likeliest always does.
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        logits = ordered.masked_fill(outside, -torch.inf).gather(-1, order.argsort(-1))
    return logits


class _Batch:
    """The live rows of a batch: cache, padding mask, positions; row i of everything belongs to prompt `rows[i]`."""

    def __init__(
        self, model: Transformer, prompts: Sequence[Sequence[int]], rows: Sequence[int], new_tokens: int
    ) -> None:
        """Read the prompts named by `rows` (equal ones once) and make room for `new_tokens` more."""
        self.model = model
        device = model.model.embed_tokens.weight.device
        places: dict[tuple[int, ...], list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(tuple(prompts[row]), []).append(place)
        unique = sorted(places, key=len)
        longest = len(unique[-1])
        self.rows = torch.tensor(rows, device=device)
        lengths = torch.tensor([len(prompts[row]) for row in rows], device=device)
        self.positions = lengths[:, None] - 1
        self.padded = len(unique[0]) < longest
        self.real = torch.arange(longest + new_tokens, device=device) >= longest - lengths[:, None]
        self.cache = KVCache(model.config, batch_size=len(rows), capacity=longest + new_tokens)
        self.cache.length = longest
        self.logits = torch.empty(len(rows), model.config.vocab_size, device=device)
        at_once = max(1, (PREFILL_TOKENS_CPU if device.type == "cpu" else PREFILL_TOKENS) // longest)
        for start in range(0, len(unique), at_once):
            self._prefill({prompt: places[prompt] for prompt in unique[start : start + at_once]})

    def _prefill(self, places: Mapping[tuple[int, ...], Sequence[int]]) -> None:
        """Read prompts, each once, and put its keys, values and next logits at all its places in the batch."""
        device, width = self.rows.device, max(map(len, places))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in places])
        if int(ids.max()) >= self.model.config.vocab_size or int(ids.min()) < 0:
            raise ValueError(f"A prompt holds a token id outside the vocabulary of {self.model.config.vocab_size}.")
        lengths = torch.tensor([[len(prompt)] for prompt in places])
        mask = torch.arange(width) >= width - lengths
        positions = (mask.cumsum(-1) - 1).clamp(min=0).to(device)
        prefix = KVCache(self.model.config, batch_size=len(places), capacity=width)
        padding = None if bool(mask.all()) else mask.to(device)
        hidden = self.model(ids.to(device), positions=positions, cache=prefix, attention_mask=padding)
        pairs = [(source, place) for source, group in enumerate(places.values()) for place in group]
        sources, destinations = torch.tensor(pairs, device=device).T
        self.cache.adopt(prefix, sources, destinations)
        self.logits[destinations] = self.model.logits(hidden[:, -1])[sources]

    def step(self, tokens: Tensor) -> None:
        """Read one token per live row (int64 [B]); `logits` are then those of the next."""
        self.positions = self.positions + 1
        mask = self.real[:, : self.cache.length + 1] if self.padded else None
        hidden = self.model(tokens[:, None], positions=self.positions, cache=self.cache, attention_mask=mask)
        self.logits = self.model.logits(hidden[:, -1])

    def drop(self, finished: Tensor, tokens: Tensor) -> Tensor:
        """Fill the places of finished rows (bool [B]) with live ones from the end; return the live rows' tokens."""
        live = (~finished).nonzero()[:, 0]
        count = len(live)
        holes, movers = finished[:count].nonzero()[:, 0], live[live >= count]
        self.cache.move(movers, holes)
        kept = torch.arange(count, device=live.device)
        kept[holes] = movers
        self.rows, self.real, self.positions = self.rows[kept], self.real[kept], self.positions[kept]
        return tokens[kept]


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: frozenset[int] = frozenset(),
    seed: int | Sequence[int] = 0,
    draws: Sequence[int] | None = None,
    batch_size: int | None = None,
    on_token: Callable[[int, int], bool] | None = None,
    on_done: Callable[[int], object] | None = None,
) -> list[Generated]:
    """Return one completion per prompt (token ids), in the prompts' order.

    `temperature` 0 takes the likeliest token (its logprob is then the model's own, at temperature 1). `top_k` 0 and
    `top_p` 1 are off; where on, logprobs are those after the filter. Row i draws with numbers that depend on
    (`seed`, i) only, or on (`seed`, `draws[i]`): the prompts may be part of a larger whole. `batch_size`: how many rows
    at a time (default all). `on_token(row, token)` is called for every token and may return True to end that row. A row
    also ends at the model's context (`max_position_embeddings`).
    `on_done(n)` is called whenever n more rows have ended, for whoever shows progress.
    Raises ValueError for a prompt that is empty or fills the context.
    """
    sampling = _Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    budgets = torch.tensor([_budget(model, prompt, max_new_tokens) for prompt in prompts], dtype=torch.long)
    uniforms = torch.from_numpy(_uniforms(seed, draws or range(len(prompts)), max_new_tokens))
    size = batch_size or max(len(prompts), 1)
    # Rows of like length together: the less padding, the less work.
    order = (
        sorted(range(len(prompts)), key=lambda row: len(prompts[row])) if size < len(prompts) else range(len(prompts))
    )
    done: dict[int, Generated] = {}
    for start in range(0, len(prompts), size):
        rows = list(order[start : start + size])
        done |= _generate_batch(model, prompts, rows, sampling, budgets, uniforms, stop_ids, on_token, on_done)
    return [done[row] for row in range(len(prompts))]


def _generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    rows: list[int],
    sampling: _Sampling,
    budgets: Tensor,
    uniforms: Tensor,
    stop_ids: frozenset[int],
    on_token: Callable[[int, int], bool] | None,
    on_done: Callable[[int], object] | None,
) -> dict[int, Generated]:
    """Return the completions of the prompts named by `rows`, by row."""
    batch = _Batch(model, prompts, rows, int(budgets[rows].max()))
    device = batch.rows.device
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    budgets, uniforms = budgets.to(device), uniforms.to(device)
    history: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # per step: rows, tokens, logprobs, stopped
    while True:
        step = len(history)
        tokens, logprobs = sampling.draw(batch.logits, uniforms[batch.rows, step])
        stopped = torch.isin(tokens, stops)
        if on_token is not None:
            pairs = zip(batch.rows.tolist(), tokens.tolist(), strict=True)
            stopped |= torch.tensor([bool(on_token(row, token)) for row, token in pairs], device=device)
        history.append((batch.rows, tokens, logprobs, stopped))
        finished = stopped | (budgets[batch.rows] <= step + 1)
        ended = int(finished.sum())
        if ended and on_done is not None:
            on_done(ended)
        if ended == len(tokens):
            return _collect(history)
        batch.step(batch.drop(finished, tokens) if ended else tokens)


def _collect(history: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> dict[int, Generated]:
    """Return the completions that the steps add up to, by row; one copy from the device for each step's tensors."""
    done: dict[int, Generated] = {}
    ended: set[int] = set()
    for step in history:
        for row, token, logprob, stopped in zip(*(part.tolist() for part in step), strict=True):
            completion = done.setdefault(row, Generated())
            completion.token_ids.append(token)
            completion.logprobs.append(logprob)
            if stopped:
                ended.add(row)
    return {
        row: Generated(
            token_ids=made.token_ids, logprobs=made.logprobs, finish_reason="stop" if row in ended else "length"
        )
        for row, made in done.items()
    }


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: frozenset[int] = frozenset(),
    seed: int | Sequence[int] = 0,
) -> Iterator[tuple[int, float]]:
    """Yield (token id, logprob) as they are drawn, the stop token included: row 0 of `generate` with the same seed.

    Mistakes in the arguments raise ValueError at the call, before the first token is asked for.
    """
    sampling = _Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    budget = _budget(model, prompt, max_new_tokens)
    uniforms = torch.from_numpy(_uniforms(seed, range(1), max_new_tokens))[0]

    def tokens() -> Iterator[tuple[int, float]]:
        batch: _Batch | None = None
        drawn: Tensor | None = None
        for step in range(budget):
            # Not around the yield: the caller's own gradients are none of our business.
            with torch.no_grad():
                if batch is None or drawn is None:
                    batch = _Batch(model, [prompt], [0], budget)
                else:
                    batch.step(drawn)
                drawn, logprob = sampling.draw(batch.logits, uniforms[step : step + 1].to(batch.logits.device))
            yield int(drawn), float(logprob)
            if int(drawn) in stop_ids:
                return

    return tokens()


def _budget(model: Transformer, prompt: Sequence[int], max_new_tokens: int) -> int:
    """Return how many tokens may follow a prompt."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if not prompt:
        raise ValueError("A prompt is empty; it needs at least one token (the beginning-of-sequence token, say).")
    room = model.config.max_position_embeddings - len(prompt)
    if room < 1:
        raise ValueError(
            f"A prompt of {len(prompt)} tokens leaves no room in the model's context of "
            f"{model.config.max_position_embeddings}; shorten it."
        )
    return min(max_new_tokens, room)


def _uniforms(
    seed: int | Sequence[int], rows: Sequence[int], steps: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return the numbers in [0, 1) that each row will draw with, [rows, steps]."""
    key = [seed] if isinstance(seed, int) else list(seed)
    return (
        np.stack([np.random.default_rng([*key, row]).random(steps) for row in rows])
        if len(rows)
        else np.empty((0, steps))
    )
