"""The reward that was learned from people's rankings: a scalar model, read at the last token, on a calibrated scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trivium.config import UserError
from trivium.data.chat import render_prompt
from trivium.data.tokenizer import Tokenizer
from trivium.models.heads import ScalarModel, score_at
from trivium.models.hf import load_scalar_model, read_extra
from trivium.records import Completion, Conversation

BATCH_TOKENS = 8192
"""Most tokens, padding included, in one forward pass."""


class LearnedReward:
    """Scores rows of token ids: `(raw - mean) / std`, so that the SFT model's own completions average 0 with spread 1.

    The raw score is the model's value at the last real token. Padding, its amount and the rows that share a batch do
    not change it. With a `tokenizer` it is also a Reward (of conversations and completions).
    """

    def __init__(
        self,
        model: ScalarModel,
        mean: float = 0.0,
        std: float = 1.0,
        pad_id: int = 0,
        tokenizer: Tokenizer | None = None,
        temperature: float = 1.0,
        members: Sequence[LearnedReward] = (),
        pessimism: float = 0.0,
    ) -> None:
        """Freeze the model; raises ValueError for a `std` or `temperature` that is not positive."""
        if not (std > 0 and temperature > 0):
            raise ValueError(f"std {std} or temperature {temperature} is not positive")
        self.model = model.eval().requires_grad_(False)
        self.mean, self.std, self.pad_id = mean, std, pad_id
        self.tokenizer, self.temperature = tokenizer, temperature
        self.members, self.pessimism = tuple(members), pessimism

    @classmethod
    def from_folder(
        cls, folder: Path, *, pad_id: int | None = None, device: str | torch.device = "cpu"
    ) -> LearnedReward:
        """Return the reward of a model folder: its scale (config.json, "trivium") and its tokenizer, if any.

        A reward model from elsewhere has no scale there and is taken as it is (mean 0, spread 1).
        """
        extra = read_extra(folder)
        tokenizer = Tokenizer.load(folder) if (Path(folder) / "tokenizer.json").is_file() else None
        if pad_id is None:
            pad_id = tokenizer.pad_id if tokenizer else 0
        model = load_scalar_model(folder, device=device)
        mean, std = float(extra.get("reward_mean", 0.0)), float(extra.get("reward_std", 1.0))
        others = [
            cls.from_folder(Path(folder) / f"ensemble-{number}", pad_id=pad_id, device=device)
            for number in range(int(extra.get("ensemble", 0)))
        ]
        heat, pessimism = float(extra.get("temperature", 1.0)), float(extra.get("pessimism", 0.0))
        return cls(model, mean, std, pad_id, tokenizer, heat, others, pessimism)

    def win_probability(self, first: float, second: float) -> float:
        """Return how probably an annotator prefers the response of score `first` to that of `second`, same prompt.

        `sigmoid(raw lead / temperature)`, with the temperature that was fitted on held-out judgements (1 for a model
        from elsewhere).
        """
        lead = (first - second) * self.std / self.temperature
        return float(torch.sigmoid(torch.tensor(lead, dtype=torch.float64)))

    def score_ids(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return the calibrated score of each row of ids (prompt and completion), in the rows' order.

        Of an ensemble: the members' mean, less `pessimism` times their spread. Raises UserError for a row that is empty
        or longer than the model's context.
        """
        if not self.members:
            return self._own_scores(rows)
        return [float(score) for score in combine(self._table(rows), self.pessimism)]

    def mean_and_spread(self, rows: Sequence[Sequence[int]]) -> tuple[list[float], list[float]]:
        """Return the members' mean score of each row and the standard deviation between them (0 for a single model)."""
        table = self._table(rows)
        mean = combine(table, 0.0)
        return mean.tolist(), (mean - combine(table, 1.0)).tolist()

    def _table(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return each member's scores, this model's first, float64 [members, rows]."""
        scores = [self._own_scores(rows), *(member.score_ids(rows) for member in self.members)]
        return torch.tensor(scores, dtype=torch.float64)

    @torch.no_grad()
    def _own_scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        context = self.model.config.max_position_embeddings
        device = next(self.model.parameters()).device
        for row in rows:
            if not 0 < len(row) <= context:
                raise UserError(f"the reward model reads 1 to {context} tokens, not {len(row)}; shorten max_new_tokens")
        scores = [0.0] * len(rows)
        for chosen in bucket([len(row) for row in rows], BATCH_TOKENS):
            lengths = torch.tensor([len(rows[i]) for i in chosen])
            ids = torch.full((len(chosen), int(lengths.max())), self.pad_id)
            for place, i in enumerate(chosen):
                ids[place, : len(rows[i])] = torch.tensor(rows[i])
            raw = score_at(self.model(ids.to(device)), lengths)
            for i, value in zip(chosen, raw.tolist(), strict=True):
                scores[i] = (value - self.mean) / self.std
        return scores

    def __call__(self, prompts: Sequence[Conversation], completions: Sequence[Completion]) -> list[float]:
        """Return the score of each completion; one without token ids is encoded and closed with the end of turn.

        Raises UserError when there is no tokenizer to encode prompts with.
        """
        return self.score_ids(self.rows_of(prompts, completions))

    def rows_of(self, prompts: Sequence[Conversation], completions: Sequence[Completion]) -> list[list[int]]:
        """Return the ids that are read for each completion: the prompt's and its own. Raises as calling it does."""
        if self.tokenizer is None:
            raise UserError("this reward model's folder has no tokenizer.json; save the tokenizer beside the model")
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = completion.token_ids or (*self.tokenizer.encode(completion.text), self.tokenizer.end_id)
            rows.append([*render_prompt(self.tokenizer, prompt), *ids])
        return rows


def combine(table: Tensor, pessimism: float) -> Tensor:
    """Return `mean - pessimism * deviation` over the members of scores [members, N]: [N].

    The deviation is the sample's (divided by members - 1), 0 for one member. Where models that learned the same
    judgements disagree, the score is a guess, and a policy seeks out the guesses that are too high (Coste et al. 2023,
    arXiv 2310.02743, section 3). Worked: scores 1 and 3 have mean 2 and deviation sqrt(2).
    """
    mean = table.mean(0)
    return mean - pessimism * table.std(0) if len(table) > 1 and pessimism else mean


def bucket(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of `lengths`, like lengths together, so that rows times the longest stays within the budget."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # Sorted, so the row that comes last is the longest.
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
