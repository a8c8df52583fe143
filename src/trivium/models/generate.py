"""Sampling: many prompts at once, token by token, with a cache that never grows.

Prompts are padded on the left, so that every row's next token falls into the same slot. Each row draws from random
numbers of its own, fixed by (seed, row) before the first step: who else is in the batch cannot change a sample. A
finished row gives up its place: to a prompt that waits for one, where `batch_size` let fewer in than there are, else to
the last live row, and the batch shrinks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.models.decode import Decoding, can_decode
from trivium.models.transformer import KVCache, Transformer

PREFILL_TOKENS_CPU = 2048
"""About how many prompt tokens are read at once: few enough for their activations to stay in a processor's cache."""
PREFILL_TOKENS = 65536
"""The same on an accelerator, where it bounds memory only."""
BLOCK = 64
"""Tokens whose probabilities are added up at once when one is drawn."""
REFILL = 8
"""Waiting prompts enter when this fraction of the places (one in eight) is free: reading a few at once costs less."""


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
        probabilities = logits.softmax(-1)
        drawn = invert(probabilities, uniforms)
        return drawn, probabilities.gather(1, drawn[:, None])[:, 0].log()


def invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Return the token at which each row's running sum first exceeds `uniform` of the whole, int64 [B].

    `probabilities` [B, V] need not add up to 1 exactly; `uniforms` float64 [B] in [0, 1). A running sum over the whole
    vocabulary costs more than a small network, so it is taken over blocks, then within the block that is hit.
    """
    missing = -probabilities.shape[1] % BLOCK
    padded = F.pad(probabilities, (0, missing)) if missing else probabilities
    blocks = padded.view(len(padded), -1, BLOCK)
    # float64, and `>`: no rounding may reach the end of a sum, or a token of probability 0 could be drawn.
    sums = blocks.sum(-1).double()
    ends = sums.cumsum(-1)
    goal = uniforms[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, goal, right=True)
    size = sums.gather(1, block)
    share = ((goal - ends.gather(1, block) + size) / size).clamp_(0.0, 1.0 - 2.0**-53)
    inside = blocks[torch.arange(len(blocks), device=block.device), block[:, 0]].cumsum(-1, dtype=torch.float64)
    return (block * BLOCK + torch.searchsorted(inside, share * inside[:, -1:], right=True))[:, 0]


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
    """The live rows of a batch: cache, padding, positions; place i of everything belongs to prompt `rows[i]`."""

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], new_tokens: int, *, size: int) -> None:
        """Make room for `size` of the prompts at a time, with `new_tokens` more each; nothing is read yet."""
        self.model, self.prompts, self.size = model, prompts, size
        device = model.model.embed_tokens.weight.device
        self.longest = max(map(len, prompts))
        span = self.longest + new_tokens
        # Where prompts enter later the slots move on without end; half as many again, and they seldom move back.
        capacity = span if size >= len(prompts) else span + span // 2
        self.cache = KVCache(model.config, batch_size=size, capacity=capacity)
        self.cache.length = self.longest  # a prompt ends where the next slot begins, whatever its length
        self.slots = torch.arange(capacity, device=device)
        self.rows, self.starts, self.positions, self.made = (
            torch.empty(0, dtype=torch.long, device=device) for _ in range(4)
        )
        self.logits = torch.empty(0, model.config.vocab_size, device=device)
        self.decoding = Decoding(model, self.cache, context=span) if can_decode(model) else None
        self._see()

    def admit(self, rows: Sequence[int]) -> None:
        """Read the prompts named by `rows`, equal ones once, into the next free places."""
        live, device = len(self.rows), self.rows.device
        places: dict[tuple[int, ...], list[int]] = {}
        for place, row in enumerate(rows, start=live):
            places.setdefault(tuple(self.prompts[row]), []).append(place)
        unique = sorted(places, key=len)
        lengths = torch.tensor([len(self.prompts[row]) for row in rows], device=device)
        self.rows = torch.cat((self.rows, torch.tensor(rows, device=device)))
        self.starts = torch.cat((self.starts, self.cache.length - lengths))
        self.positions = torch.cat((self.positions, lengths - 1))
        self.made = torch.cat((self.made, torch.zeros_like(lengths)))
        self.logits = torch.cat((self.logits, self.logits.new_empty(len(rows), self.logits.shape[1])))
        tokens = PREFILL_TOKENS_CPU if device.type == "cpu" else PREFILL_TOKENS
        at_once = max(1, tokens // len(unique[-1]))
        for start in range(0, len(unique), at_once):
            self._prefill({prompt: places[prompt] for prompt in unique[start : start + at_once]})
        self._see()

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
        if self.cache.length == len(self.slots):
            # Everything a live row or a waiting prompt needs lies in the last `span` slots.
            slots = min(self.start, self.cache.length - self.longest)
            self.cache.shift(slots)
            self.starts = self.starts - slots
            self._see()
        self.positions = self.positions + 1
        self.made = self.made + 1
        if self.decoding is not None:
            self.logits = self.decoding.read(tokens, self.positions, start=self.start, visible=self.visible)
            return
        mask = None if self.last == 0 else self.slots[: self.cache.length + 1] >= self.starts[:, None]
        hidden = self.model(tokens[:, None], positions=self.positions[:, None], cache=self.cache, attention_mask=mask)
        self.logits = self.model.logits(hidden[:, -1])

    def drop(self, finished: Tensor, tokens: Tensor) -> Tensor:
        """Fill the places of finished rows (bool [B]) with live ones from the end; return the live rows' tokens."""
        live = (~finished).nonzero()[:, 0]
        count = len(live)
        holes, movers = finished[:count].nonzero()[:, 0], live[live >= count]
        self.cache.move(movers, holes)
        kept = torch.arange(count, device=live.device)
        kept[holes] = movers
        self.rows, self.starts, self.positions, self.made = (
            each[kept] for each in (self.rows, self.starts, self.positions, self.made)
        )
        self.logits = self.logits[:count]  # out of date: the live rows' are made by the next step
        self._see()
        return tokens[kept]

    def _see(self) -> None:
        """Note which slots the rows begin at, and where they differ, who sees which: until rows come or go."""
        first, last = (int(self.starts.min()), int(self.starts.max())) if len(self.starts) else (0, 0)
        self.start, self.last, self.visible = first, last, None
        if first == last or self.decoding is None:
            return
        seen = (self.slots >= self.starts[:, None])[:, None, None]
        weight = self.model.model.embed_tokens.weight
        if weight.device.type == "cpu":
            # As attention there works with it; a bool would be turned into this in every layer of every step.
            seen = torch.zeros(seen.shape, dtype=weight.dtype).masked_fill_(~seen, -torch.inf)
        self.visible = seen


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
    at a time (default all); the others enter as rows end. `on_token(row, token)` is called for every token and may
    return True to end that row. A row also ends at the model's context (`max_position_embeddings`).
    `on_done(n)` is called whenever n more rows have ended, for whoever shows progress.
    Raises ValueError for a prompt that is empty or fills the context.
    """
    sampling = _Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    budgets = torch.tensor([_budget(model, prompt, max_new_tokens) for prompt in prompts], dtype=torch.long)
    if not prompts:
        return []
    uniforms = torch.from_numpy(_uniforms(seed, draws or range(len(prompts)), max_new_tokens))
    size = min(batch_size or len(prompts), len(prompts))
    # Rows of like length together: the less padding, the less work.
    waiting = deque(range(len(prompts)))
    if size < len(prompts):
        waiting = deque(sorted(waiting, key=lambda row: len(prompts[row])))
    batch = _Batch(model, prompts, int(budgets.max()), size=size)
    done = _run(batch, waiting, sampling, budgets, uniforms, stop_ids, on_token, on_done)
    return [done[row] for row in range(len(prompts))]


def _run(
    batch: _Batch,
    waiting: deque[int],
    sampling: _Sampling,
    budgets: Tensor,
    uniforms: Tensor,
    stop_ids: frozenset[int],
    on_token: Callable[[int, int], bool] | None,
    on_done: Callable[[int], object] | None,
) -> dict[int, Generated]:
    """Return the completions of all that wait, by row."""
    device = batch.rows.device
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    budgets, uniforms = budgets.to(device), uniforms.to(device)
    history: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # per step: rows, tokens, logprobs, stopped
    while waiting or len(batch.rows):
        free = batch.size - len(batch.rows)
        if waiting and (free * REFILL >= batch.size or not len(batch.rows)):
            batch.admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
        tokens, logprobs = sampling.draw(batch.logits, uniforms[batch.rows, batch.made])
        stopped = torch.isin(tokens, stops)
        if on_token is not None:
            pairs = zip(batch.rows.tolist(), tokens.tolist(), strict=True)
            stopped |= torch.tensor([bool(on_token(row, token)) for row, token in pairs], device=device)
        history.append((batch.rows, tokens, logprobs, stopped))
        finished = stopped | (budgets[batch.rows] <= batch.made + 1)
        ended = int(finished.sum())
        if ended:
            tokens = batch.drop(finished, tokens)
            if on_done is not None:
                on_done(ended)
        if len(tokens):
            batch.step(tokens)
    return _collect(history)


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
                    batch = _Batch(model, [prompt], budget, size=1)
                    batch.admit([0])
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
