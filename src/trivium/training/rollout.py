"""Rollouts: sampled completions as the tensors that the update needs.

Token ids are the currency: what was sampled is what is scored and trained, never text encoded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trivium.batches import IGNORE, RolloutBatch, TokenBatch, select_rows
from trivium.config import CodeRef, ConfigError, Dial, UserError, bounds, load_attribute
from trivium.data.chat import render_prompt
from trivium.data.sources import load_prompts
from trivium.data.tokenizer import Tokenizer
from trivium.losses.cross_entropy import head_logprobs
from trivium.models.generate import Generated, generate
from trivium.models.heads import ScalarModel
from trivium.models.lora import adapters_off
from trivium.models.transformer import Transformer
from trivium.records import Conversation
from trivium.runs.manifest import Run
from trivium.training.distributed import over_ranks, world


class GenerateFn(Protocol):
    """The seam for another generation engine: the built-in one is `trivium.models.generate.generate`.

    The model is the policy as it is now: an engine with weights of its own takes these over first.
    """

    def __call__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        stop_ids: frozenset[int],
        seed: int,
        draws: Sequence[int] | None = None,
        on_done: Callable[[int], object] | None = None,
    ) -> list[Generated]:
        """Return one completion per prompt, with the log-probabilities (nats) of what it was sampled from.

        That is at `temperature`, from the whole vocabulary. A completion ends with the first token of `stop_ids`, which
        is part of it, or is cut after `max_new_tokens` or at the end of the model's context. Prompt i draws numbers
        that depend on (`seed`, i), or on (`seed`, `draws[i]`): the same numbers, the same completion, as far as the
        engine can. `on_done(n)`, where given, is called whenever n more completions have ended.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How completions are sampled; top-k and top-p are left out on purpose.

    Truncating the distribution while training on it makes the ratio of policies wrong (trl#6789), so only the
    temperature may be set, and log-probabilities everywhere are taken at it.
    """

    max_new_tokens: int = 64
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; above 0."""
    engine: Dial[CodeRef] = ""
    """`module:attribute` of another generation engine (`trivium.training.vllm:engine`); empty is the built-in one."""

    def __post_init__(self) -> None:
        """Refuse greedy decoding: a policy that explores nothing learns nothing."""
        bounds(self, max_new_tokens=(1, None))
        if not self.temperature > 0:
            raise ConfigError(f"temperature = {self.temperature}: must be above 0 (nothing is explored at 0)")


class PromptSet:
    """The prompts of a stage with their ids, as the generator wants them."""

    def __init__(
        self, run: Run, tokenizer: Tokenizer, specs: Sequence[str], options: Mapping[str, int], *, longest: int
    ) -> None:
        """Load and encode the prompts, each once; those of more than `longest` tokens are counted in `too_long`.

        Raises UserError when none is left.
        """
        prompts = load_prompts(
            specs,
            base=run.base,
            seed=run.seed,
            options=dict(options),
            strict=run.settings.strict,
            quarantine=run.dir / "quarantine-prompts.jsonl",
        )
        distinct = {prompt.id: prompt for prompt in prompts}
        pairs = [(prompt, render_prompt(tokenizer, prompt)) for prompt in distinct.values()]
        kept = [(prompt, ids) for prompt, ids in pairs if len(ids) <= longest]
        self.too_long = len(pairs) - len(kept)
        if not kept:
            raise UserError(
                f"no prompts in {', '.join(specs) or 'nothing'} ({self.too_long} longer than the {longest} tokens that "
                'leave room for a response); each line needs a "prompt" or "messages"'
            )
        self.prompts: list[Conversation] = [prompt for prompt, _ in kept]
        self.encoded = [ids for _, ids in kept]

    def __len__(self) -> int:
        """Return how many prompts there are."""
        return len(self.prompts)

    def text(self, row: int) -> str:
        """Return the last user message of a prompt, for people to look at."""
        return self.prompts[row].messages[-1].content


def room_for_prompt(model: Transformer, config: SampleConfig) -> int:
    """Return the longest prompt, in tokens, after which a whole completion still fits into the model's context."""
    return model.config.max_position_embeddings - config.max_new_tokens


def check_room(model: Transformer, prompts: Sequence[Sequence[int]]) -> None:
    """Raise UserError where a prompt leaves no room for an answer: before the work starts, not when it is drawn."""
    context, longest = model.config.max_position_embeddings, max(map(len, prompts), default=0)
    if longest >= context:
        raise UserError(
            f"a prompt of {longest} tokens fills the model's context of {context}; shorten it or leave it out"
        )


def engine_of(config: SampleConfig) -> GenerateFn:
    """Return what generates: the built-in engine, or the code that the recipe names.

    Raises ConfigError where that is nothing to call.
    """
    engine: GenerateFn = load_attribute(config.engine) if config.engine else generate
    if not callable(engine):
        raise ConfigError(f"engine = {config.engine!r}: a {type(engine).__name__} cannot be called; name a GenerateFn")
    return engine


def sample(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    *,
    stop_ids: frozenset[int],
    seed: int,
    draws: Sequence[int] | None = None,
    on_done: Callable[[int], object] | None = None,
) -> list[Generated]:
    """Return one sampled completion per prompt; the model is in eval mode while it samples.

    `draws[i]` is what prompt i's random numbers depend on, by default i. `on_done(n)` is called whenever n more
    completions have ended, for whoever shows progress. Raises UserError where a prompt fills the model's context.
    """
    check_room(model, prompts)
    model.eval()
    with torch.no_grad():
        return engine_of(config)(
            model,
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            stop_ids=stop_ids,
            seed=seed,
            draws=draws,
            on_done=on_done,
        )


def sample_over_ranks(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    *,
    stop_ids: frozenset[int],
    seed: int,
    group: int = 1,
) -> list[Generated]:
    """Return what `sample` does, on every rank, each having sampled its part: whole groups of `group` neighbours.

    Each prompt draws with the numbers of its place among all, so the samples do not depend on the number of ranks.
    """
    if world()[1] == 1:
        return sample(model, prompts, config, stop_ids=stop_ids, seed=seed)
    longest = config.max_new_tokens

    def compute(rows: list[int]) -> Tensor:
        made = sample(model, [prompts[row] for row in rows], config, stop_ids=stop_ids, seed=seed, draws=rows)
        # float64 holds token ids and float32 log-probabilities exactly, so that one gather carries all of it.
        packed = torch.zeros(len(rows), 2 + 2 * longest, dtype=torch.float64)
        for row, one in zip(packed, made, strict=True):
            count = len(one.token_ids)
            row[0], row[1] = count, one.finish_reason == "stop"
            row[2 : 2 + count] = torch.tensor(one.token_ids, dtype=torch.float64)
            row[2 + longest : 2 + longest + count] = torch.tensor(one.logprobs, dtype=torch.float64)
        return packed

    return [_unpacked(row, longest) for row in over_ranks(len(prompts), compute, group=group).tolist()]


def _unpacked(row: Sequence[float], longest: int) -> Generated:
    count = int(row[0])
    return Generated(
        token_ids=[int(token) for token in row[2 : 2 + count]],
        logprobs=list(row[2 + longest : 2 + longest + count]),
        finish_reason="stop" if row[1] else "length",
    )


def to_tokens(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int) -> TokenBatch:
    """Return prompt + completion rows [B, T], padded on the right, with targets on the completion tokens only.

    Worked: prompt `[5, 6]`, completion `[7, 2]` gives input_ids `[5, 6, 7]` and targets `[IGNORE, 7, 2]`: the last
    token of the completion is predicted but never read.
    """
    longest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True)) - 1
    input_ids = torch.full((len(prompts), longest), pad_id)
    targets = torch.full((len(prompts), longest), IGNORE)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = torch.tensor([*prompt, *completion])
        input_ids[row, : len(ids) - 1] = ids[:-1]
        targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    positions = torch.arange(longest).expand(len(prompts), longest)
    return TokenBatch(input_ids=input_ids, targets=targets, positions=positions)


def chunks(batch: TokenBatch, size: int) -> Iterator[TokenBatch]:
    """Yield the batch in pieces of at most `size` rows."""
    num_rows = len(batch.input_ids)
    for start in range(0, num_rows, size):
        yield select_rows(batch, torch.arange(start, min(start + size, num_rows)))


def continue_text(model: Transformer, tokenizer: Tokenizer, prompt: str) -> str:
    """Return a sampled continuation of `prompt`, always with the same random numbers, so that steps compare."""
    ids = [*tokenizer.prefix, *tokenizer.encode(prompt)]
    stop = frozenset({tokenizer.eos_id})
    generated = generate(model, [ids], max_new_tokens=60, temperature=0.8, stop_ids=stop, seed=0)[0]
    return tokenizer.decode(generated.token_ids)


def completion_logprobs(model: Transformer, tokens: TokenBatch, *, temperature: float = 1.0, rows: int = 32) -> Tensor:
    """Return the log-probability (nats) of every target [B, T], zero where there is none; no gradient is kept."""
    model.eval()
    with torch.no_grad():
        parts = [
            head_logprobs(
                model(part.input_ids, positions=part.positions), model.lm_head.weight, part.targets, temperature
            )
            for part in chunks(tokens, rows)
        ]
    return torch.cat(parts)


def reference_logprobs(reference: Transformer, tokens: TokenBatch, *, temperature: float = 1.0) -> Tensor:
    """Return `completion_logprobs` of the frozen reference; an adapted policy, its adapters off, is its own."""
    with adapters_off(reference):
        return completion_logprobs(reference, tokens, temperature=temperature)


def token_values(model: ScalarModel, tokens: TokenBatch) -> Tensor:
    """Return the model's value of every position [B, T]; no gradient is kept."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part.input_ids, positions=part.positions) for part in chunks(tokens, 32)])


def rows_over_ranks(tokens: TokenBatch, compute: Callable[[TokenBatch], Tensor]) -> Tensor:
    """Return `compute(tokens)` [B, T] on every rank, each having computed its part of the rows."""
    if world()[1] == 1:
        return compute(tokens)
    return over_ranks(len(tokens.input_ids), lambda rows: compute(select_rows(tokens, torch.tensor(rows))))


def token_columns(tokenizer: Tokenizer, batch: RolloutBatch, row: int, names: Sequence[str]) -> dict[str, list[object]]:
    """Return one completion of a RolloutBatch token by token with the named columns: a specimen for the walkthrough."""
    mask = batch.mask[row]
    ids = batch.tokens.targets[row][mask].tolist()
    columns: dict[str, list[object]] = {"tokens": list(tokenizer.pieces(ids))}
    for name in names:
        columns[name] = [round(x, 4) for x in getattr(batch, name)[row][mask].tolist()]
    return columns


def show_completion(
    run: Run, tokenizer: Tokenizer, batch: RolloutBatch, names: Sequence[str], prompt: str, step: int
) -> None:
    """Keep the first completion of a round token by token, with the named columns and its KL, for the walkthrough."""
    columns = token_columns(tokenizer, batch, 0, names)
    columns["logprobs"] = columns.pop("old_logprobs")
    kl = (batch.old_logprobs - batch.ref_logprobs)[0][batch.mask[0]]
    facts = {"prompt": prompt, "score": float(batch.scores[0])}
    run.specimen("rollout", facts | columns | {"kl": [round(x, 4) for x in kl.tolist()]}, step)


def log_samples(
    run: Run, prompts: PromptSet, rows: Sequence[int], texts: Sequence[str], scores: Tensor, step: int
) -> None:
    """Log the first three completions of a round with their scores, to look at as the run goes on."""
    for row, text, score in list(zip(rows, texts, scores.tolist(), strict=True))[:3]:
        run.sample("rollout", {"prompt": prompts.text(row), "text": text, "score": score}, step)
