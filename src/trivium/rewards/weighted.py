"""A table of rewards as one: functions named in a recipe, each times its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trivium.config import load_attribute
from trivium.data.tokenizer import Tokenizer
from trivium.models.generate import Generated
from trivium.records import Completion, Conversation
from trivium.rewards.verifiable import Reward


class WeightedRewards:
    """The sum of several rewards of (prompts, completions), each times its weight."""

    def __init__(self, table: Mapping[str, float], learned: Sequence[Reward] = ()) -> None:
        """Load the functions, `"module:attribute"` each; raises ConfigError where one cannot be found.

        `learned`: rewards that are there already, each with weight 1.
        """
        self._parts: list[tuple[Reward, float]] = [(load_attribute(name), weight) for name, weight in table.items()]
        self._parts += [(reward, 1.0) for reward in learned]

    def __call__(self, prompts: Sequence[Conversation], completions: Sequence[Completion]) -> Tensor:
        """Return the weighted sum for each completion, fp32 [N]; every function is asked once, for all of them."""
        parts = [weight * torch.tensor(function(prompts, completions)) for function, weight in self._parts]
        return torch.stack([part.float() for part in parts]).sum(0)


def as_completions(
    prompts: Sequence[Conversation], generated: Sequence[Generated], tokenizer: Tokenizer, policy: str
) -> list[Completion]:
    """Return what was sampled as records, which is what rewards are given: the sampled ids, and the text they spell."""
    return [
        Completion(
            prompt_id=prompt.id,
            text=tokenizer.decode(one.token_ids),
            token_ids=tuple(one.token_ids),
            policy=policy,
            finish_reason=one.finish_reason,
        )
        for prompt, one in zip(prompts, generated, strict=True)
    ]
