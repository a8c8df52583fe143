"""A network that says one number per token: the reward model and PPO's value model."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from trivium.models.config import ModelConfig
from trivium.models.transformer import Decoder, Transformer


class ScalarModel(nn.Module):
    """A decoder with a scalar head; `state_dict()` has the keys of transformers' `...ForSequenceClassification`.

    transformers scores a row at its rightmost token that is not `pad_token_id`; `score_at` with the true lengths is
    the same number as long as no row ends in a pad of its own.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Make the network with torch's initial weights and a head of zeros."""
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    @property
    def backbone(self) -> Decoder:
        """The network below the head."""
        return self.model

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return a value for every token, float32 [B, T]; the arguments are those of `Transformer.forward`."""
        hidden: Tensor = self.model(
            input_ids, positions=positions, document_ids=document_ids, attention_mask=attention_mask
        )
        return self.read(hidden)

    def read(self, hidden: Tensor) -> Tensor:
        """Return the values float32 [B, T] that the head gives hidden states [B, T, H] of its backbone."""
        # Not through nn.Linear: autocast would round rewards and values to bfloat16, that is to three digits.
        return (hidden.float() * self.score.weight[0].float()).sum(-1)

    @classmethod
    def from_transformer(
        cls, transformer: Transformer, *, zero_init: bool | float = False, seed: int = 0
    ) -> ScalarModel:
        """Return a scalar model that starts from a copy of a language model's weights (nothing is shared).

        `zero_init`: True gives a head of zeros (every value 0 at first: a value model); False a normal one of
        standard deviation 1 / sqrt(hidden_size + 1) (1909.08593: a reward model); a number is the deviation itself.
        """
        with torch.device("meta"):
            made = cls(transformer.config)
        weight = transformer.model.embed_tokens.weight
        made.model = copy.deepcopy(transformer.model)
        std = 1 / math.sqrt(transformer.config.hidden_size + 1) if zero_init is False else float(zero_init)
        if zero_init is True:
            std = 0.0
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(1, transformer.config.hidden_size, generator=generator) * std
        made.score.weight = nn.Parameter(drawn.to(weight))
        return made.train(transformer.training)

    @classmethod
    def beside(cls, transformer: Transformer) -> ScalarModel:
        """Return a scalar model on the very network of a language model (one trunk, two heads); its head says 0."""
        with torch.device("meta"):
            made = cls(transformer.config)
        made.model = transformer.model
        weight = transformer.model.embed_tokens.weight
        made.score.weight = nn.Parameter(torch.zeros_like(weight[:1], requires_grad=True))
        return made.train(transformer.training)


class TwoHeads(nn.Module):
    """A language model and a scalar model on one trunk, as one module: what is trained when they share it."""

    def __init__(self, policy: Transformer, value: ScalarModel) -> None:
        """Hold both; raises ValueError where their trunks are two."""
        super().__init__()
        if value.model is not policy.model:
            raise ValueError("the scalar model has a trunk of its own; make it with ScalarModel.beside")
        self.config = policy.config
        self.policy = policy
        self.value = value


def score_at(values: Tensor, lengths: Tensor) -> Tensor:
    """Return each row's value at its last real token, [B]: values [B, T] right-padded, lengths int64 [B] >= 1."""
    return values.gather(1, (lengths - 1)[:, None].to(values.device))[:, 0]
