"""Rows of pre-training text beside another objective, so that a policy does not forget what it knew: PPO-ptx.

The loss is `main / items + coef * text / targets` (Ouyang et al. 2022, equation 2): each part is divided by its own
count, over all ranks. Text is one more micro-batch of a step, and its weight is known before the first backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trivium.batches import LossOutput, TokenBatch, to_device
from trivium.config import ConfigError, bounds
from trivium.data.loader import PretrainLoader
from trivium.data.shards import open_shards
from trivium.data.tokenizer import Tokenizer
from trivium.losses.cross_entropy import head_cross_entropy
from trivium.models.lora import LoraConfig, training_flops
from trivium.models.transformer import Transformer
from trivium.runs.manifest import Run
from trivium.training.distributed import all_reduce_sum, check_shares, data_ranks

ORDER = 2
"""Beside the seed, what the order of the text is drawn from: not the order in which pre-training read it."""


@dataclass(frozen=True, kw_only=True)
class PtxConfig:
    """How much the loss on pre-training text counts, and how much text each optimizer step reads."""

    coef: float = 0.0
    """Weight of the text's loss per token (nats) beside the policy's; 0 reads no text."""
    rows: int = 8
    """Rows of text in each optimizer step, over all ranks."""
    context: int = 128
    """Tokens in a row."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        bounds(self, coef=(0, None), rows=(1, None), context=(8, None))

    def __bool__(self) -> bool:
        """Tell whether any text is read."""
        return self.coef > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatch:
    """Rows of text to be trained beside the items of another batch, among which they are not counted.

    The step divides all it sums by the other batch's items. `scale`: float scalar, `items / targets` over all ranks,
    with which a sum over targets comes out as their mean; `coef` is what that mean counts for.
    """

    tokens: TokenBatch
    scale: Tensor
    coef: float

    @property
    def num_items(self) -> Tensor:
        """Nothing: the divisor of the step is the other batch's, int64 scalar."""
        return torch.zeros((), dtype=torch.int64, device=self.scale.device)


def text_objective(model: Transformer, batch: TextBatch) -> LossOutput:
    """Return the text's next-token cross-entropy (nats), summed, scaled, weighted; `ptx_loss` lacks the weight."""
    tokens = batch.tokens
    hidden = model(tokens.input_ids, positions=tokens.positions, document_ids=tokens.document_ids)
    loss = batch.scale * head_cross_entropy(hidden, model.lm_head.weight, tokens.targets).sum()
    return LossOutput(total=batch.coef * loss, metrics={"ptx_loss": loss})


class SideText:
    """The text that each optimizer step of a run reads: a function of seed and step; none where `coef` is 0."""

    def __init__(self, config: PtxConfig, run: Run, corpus: str, model: Transformer, tokenizer: Tokenizer) -> None:
        """Open the shards of the run that the stage's field `corpus` names.

        Raises ConfigError where a row is longer than the model's context or the rows are fewer than the ranks,
        UserError for shards of another tokenizer.
        """
        self.config, self.model = config, model.config
        self.loader: PretrainLoader | None = None
        if not config:
            return
        longest = model.config.max_position_embeddings
        if config.context > longest:
            raise ConfigError(f"ptx.context = {config.context}: the policy reads at most {longest} tokens; lower it")
        check_shares(**{"ptx.rows": config.rows})
        self.device = next(model.parameters()).device
        shards = open_shards(run.parent(corpus) / "shards" / "train", tokenizer.fingerprint)
        self.loader = PretrainLoader(shards, config.context, config.rows, (run.seed, ORDER), pad_id=tokenizer.pad_id)

    def beside(self, num_items: Tensor, step: int) -> Sequence[TextBatch]:
        """Return this rank's text of optimizer step `step`, to stand beside `num_items` items of its other batch.

        Empty where no text is read; all ranks must ask.
        """
        if self.loader is None:
            return ()
        tokens = to_device(self.loader.batch(step, *data_ranks()), self.device)
        items, targets = all_reduce_sum(torch.stack([num_items, tokens.num_items]).float())
        return (TextBatch(tokens=tokens, scale=items / targets.clamp(min=1), coef=self.config.coef),)

    def spend(self, run: Run, steps: int, lora: LoraConfig) -> None:
        """Add to a run's cost what training on the text of so many steps took."""
        if self.loader is not None:
            tokens = steps * self.config.rows * self.config.context
            run.spend(tokens=tokens, flops=tokens * training_flops(self.model, self.config.context, lora))
