"""Questions to a model at hand: it writes answers, or its probability of a letter is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from trivium.batches import to_device
from trivium.data.chat import render_prompt
from trivium.data.tokenizer import Tokenizer
from trivium.models.transformer import Transformer
from trivium.records import Conversation
from trivium.runs.manifest import Run
from trivium.training.rollout import SampleConfig, completion_logprobs, sample, to_tokens

ROWS = 16
"""Rows of a forward pass that reads letters: long questions, and logits for every position."""


class LocalModel:
    """Asks a model in memory; `counts` says how many questions were `asked`, and how many `failed` for their length."""

    def __init__(self, run: Run, tokenizer: Tokenizer, model: Transformer, sampling: SampleConfig) -> None:
        """Remember with what to answer; samples follow from the run's seed."""
        self.run, self.tokenizer, self.model, self.sampling = run, tokenizer, model, sampling
        self.counts = {"asked": 0, "failed": 0}
        self.problem = "they leave no room in the model's context"
        self._prices: dict[int, int] = {}

    def fits(self, conversation: Conversation) -> bool:
        """Tell whether a whole answer has room behind the conversation."""
        room = self.model.config.max_position_embeddings - self.sampling.max_new_tokens
        return len(render_prompt(self.tokenizer, conversation)) <= room

    def write(self, asked: Mapping[int, Conversation], purpose: int) -> Iterator[tuple[int, str | None]]:
        """Yield (number, one sampled answer) of each conversation, None for one that fills the context.

        Question n draws with numbers of its own, whoever else is asked; `purpose` keeps those of the steps apart.
        """
        encoded = {number: render_prompt(self.tokenizer, conversation) for number, conversation in asked.items()}
        fitting = [n for n, ids in encoded.items() if len(ids) < self.model.config.max_position_embeddings]
        self._count(encoded, fitting)
        yield from ((number, None) for number in encoded if number not in set(fitting))
        if not fitting:
            return
        stop = frozenset({self.tokenizer.end_id, self.tokenizer.eos_id})
        prompts = [encoded[number] for number in fitting]
        with self.run.progress(_label(purpose), len(prompts)) as advance:
            generated = sample(
                self.model,
                prompts,
                self.sampling,
                stop_ids=stop,
                seed=self.run.seed * 101 + purpose,
                draws=fitting,
                on_done=advance,
            )
        self._pay({n: len(encoded[n]) + len(made.token_ids) for n, made in zip(fitting, generated, strict=True)})
        for number, made in zip(fitting, generated, strict=True):
            yield number, self.tokenizer.decode(made.token_ids)

    def choose(
        self, asked: Mapping[int, tuple[Conversation, Conversation]]
    ) -> Iterator[tuple[int, tuple[float, float] | None]]:
        """Yield (number, probabilities of the letters A and B as the answer's beginning), exact; None for no room.

        Of each question the first form, which asks for a letter, is used. A letter of several tokens has the
        probability of them all.
        """
        options = [self.tokenizer.encode(letter) for letter in "AB"]
        encoded = {number: render_prompt(self.tokenizer, question[0]) for number, question in asked.items()}
        room = self.model.config.max_position_embeddings - max(map(len, options))
        # Neighbours in length share a batch, so that little of it is padding.
        fitting = sorted((n for n, ids in encoded.items() if len(ids) <= room), key=lambda n: (len(encoded[n]), n))
        self._count(encoded, fitting)
        yield from ((number, None) for number in encoded if number not in set(fitting))
        device = next(self.model.parameters()).device
        with self.run.progress("comparisons", len(fitting)) as advance:
            for start in range(0, len(fitting), ROWS // 2):
                part = fitting[start : start + ROWS // 2]
                prompts = [encoded[number] for number in part for _ in options]
                tokens = to_device(to_tokens(prompts, options * len(part), self.tokenizer.pad_id), device)
                nats = completion_logprobs(self.model, tokens, rows=ROWS).sum(-1).tolist()
                self._pay({number: len(options) * len(encoded[number]) for number in part})
                advance(len(part))
                for place, number in enumerate(part):
                    yield number, (math.exp(nats[2 * place]), math.exp(nats[2 * place + 1]))

    def _count(self, asked: Mapping[int, object], fitting: list[int]) -> None:
        self._prices = {}
        self.counts["asked"] += len(asked)
        self.counts["failed"] += len(asked) - len(fitting)

    def price(self, number: int) -> tuple[int, float]:
        """Return the tokens and FLOPs that the last answer to a question cost; one that failed cost nothing."""
        tokens = self._prices.get(number, 0)
        return tokens, self.model.config.flops_per_token(128) * tokens

    def _pay(self, tokens: Mapping[int, int]) -> None:
        self._prices |= tokens
        total = sum(tokens.values())
        self.run.spend(tokens=total, flops=self.model.config.flops_per_token(128) * total)


def _label(purpose: int) -> str:
    """Return what a step writes: responses first, then critiques and revisions by turns."""
    return "responses" if purpose == 0 else "critiques" if purpose % 2 else "revisions"
