"""Pre-training: a Transformer learns to predict the next token of clean text.

Reads   the token shards and the tokenizer of a `train_tokenizer` run
Writes  model/ (Hugging Face layout, tokenizer included): a raw base model
Paper   Radford et al. 2019 (the objective); Touvron et al. 2023, arXiv 2302.13971 (the network);
        Jordan et al. 2024 (Muon)
Watch   train/loss and eval/bits_per_byte fall together; samples turn from noise to sentences
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from trivium.batches import LossOutput, TokenBatch, to_device
from trivium.config import ConfigError, Dial, Given, Ref, UserError, bounds
from trivium.data.loader import PretrainLoader
from trivium.data.shards import Shards, open_shards
from trivium.data.tokenizer import Tokenizer
from trivium.losses.cross_entropy import head_cross_entropy
from trivium.models.config import ModelConfig
from trivium.models.hf import save_model
from trivium.models.transformer import Transformer
from trivium.runs.manifest import Run
from trivium.training.compilation import compile_layers
from trivium.training.distributed import autocast, data_ranks, device_of, weight_dtype
from trivium.training.float8 import lower_products
from trivium.training.loop import FitConfig, fit
from trivium.training.parallel import whole
from trivium.training.rollout import chunks, continue_text
from trivium.training.scaling import budget_of, shape_of

DERIVED = frozenset("hidden_size num_layers num_heads num_kv_heads fit.steps fit.batch_size".split()) | {
    "fit.optim.lr",
    "fit.optim.weight_decay",
}
"""What `depth` decides, where the recipe does not."""

HELDOUT_TOKENS = 50_000
"""Held-out tokens that each evaluation reads: enough for two digits, little enough not to be felt."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to train, on which text, for how long."""

    corpus: Ref = "train_tokenizer@latest"
    """The run whose shards and tokenizer are used."""
    depth: Dial[int] = 0
    """One dial: layers, from which every size, the batch, the learning rate and the steps follow unless set; 0: off."""
    tokens_per_parameter: Dial[float] = 0.0
    """With `depth`: training tokens per parameter; 0 means 20, the compute-optimal number. More makes small models."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Blocks."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 2
    """Key/value heads; fewer than `num_heads` is grouped-query attention."""
    intermediate_size: int = 0
    """Width inside SwiGLU; 0 means 8/3 of hidden_size, rounded up to a multiple of 32."""
    qk_norm: bool = True
    """Normalise queries and keys per head (the Qwen3 layout); off gives the Llama layout."""
    attention_bias: bool = False
    """Biases on q, k and v (the Qwen2 layout)."""
    tie_embeddings: bool = True
    """Share the embedding with the output layer."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    context: int = 256
    """Tokens in a training row."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser (PaLM); 0 turns it off."""
    prompts: tuple[str, ...] = ("Once upon a time", "The")
    """Beginnings that are continued at each evaluation."""
    fit: FitConfig = field(default_factory=FitConfig)
    """The training loop."""
    given: Given = ()
    """With `depth`: the fields that the recipe sets and the dial leaves alone; filled in, not to be written."""

    def __post_init__(self) -> None:
        """Refuse shapes that no Transformer has."""
        bounds(self, depth=(0, 1000), tokens_per_parameter=(0, None))
        object.__setattr__(self, "given", tuple(name for name in self.given if self.depth and name in DERIVED))
        if self.tokens_per_parameter and not self.depth:
            raise ConfigError("tokens_per_parameter belongs to depth; set depth too, or set fit.steps instead")
        bounds(
            self,
            hidden_size=(8, None),
            num_layers=(1, None),
            num_heads=(1, None),
            num_kv_heads=(1, None),
            context=(8, None),
        )
        if self.depth:  # the shape is only known once the dial's part is filled in: see `resolve`
            return
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"hidden_size = {self.hidden_size} must divide by num_heads = {self.num_heads}, "
                f"and num_heads by num_kv_heads = {self.num_kv_heads}"
            )


def objective(model: Transformer, z_loss: float, batch: TokenBatch) -> LossOutput:
    """Return the summed next-token cross-entropy (nats) of a packed batch; no token sees another document."""
    hidden = model(batch.input_ids, positions=batch.positions, document_ids=batch.document_ids)
    return LossOutput(total=head_cross_entropy(hidden, model.lm_head.weight, batch.targets, z_loss).sum())


def run(config: Config, run: Run) -> None:
    """Train from random weights and save the base model."""
    corpus = run.parent("corpus")
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    config = resolve(config, tokenizer, run)
    train = open_shards(corpus / "shards" / "train", tokenizer.fingerprint)
    heldout = open_shards(corpus / "shards" / "heldout", tokenizer.fingerprint).head(HELDOUT_TOKENS)
    check_size(train, config)
    device = device_of(run.settings)
    model = Transformer(model_config(config, tokenizer))
    model.init_weights(run.seed)
    model.to(device, weight_dtype(run.settings))
    flops_per_item = 3 * model.config.flops_per_token(config.context)
    items = config.fit.steps * config.fit.batch_size * config.context
    lower_products(model, run.settings)
    compiled = compile_layers(model, run.settings, flops=items * flops_per_item)
    loader = PretrainLoader(train, config.context, config.fit.batch_size, run.seed)
    rank, size = data_ranks()

    def batches(step: int) -> Sequence[TokenBatch]:
        batch = to_device(loader.batch(step, rank, size), device)
        return list(chunks(batch, config.fit.micro_batch_size or len(batch.input_ids)))

    def evaluate(step: int) -> dict[str, float]:
        for prompt in config.prompts:
            run.sample("text", {"prompt": prompt, "text": continue_text(model, tokenizer, prompt)}, step)
        return heldout_loss(run, model, heldout, config.context)

    fit(
        run,
        model,
        partial(objective, model, config.z_loss),
        batches,
        config.fit,
        evaluate=evaluate,
        flops_per_item=flops_per_item,
        tokens_in=lambda parts: sum(part.input_ids.numel() for part in parts),
    )
    with whole(model):
        if not run.owner:
            return
        final = heldout_loss(run, model, heldout, config.context)
        run.result("heldout@1", "bits_per_byte", final["eval/bits_per_byte"], n=heldout.num_tokens)
        run.note(
            steps=config.fit.steps,
            num_parameters=model.config.num_parameters(),
            compiled=compiled,
            data={"name": "train_tokenizer shards", "num_documents": len(train), "tokens": train.num_tokens},
            epochs=config.fit.steps * config.fit.batch_size * config.context / max(1, train.num_tokens),
        )
        tokenizer.save(run.dir / "model")
        save_model(run.dir / "model", model, eos_token_id=tokenizer.eos_id)


def resolve(config: Config, tokenizer: Tokenizer, run: Run) -> Config:
    """Return the Config with what `depth` decides filled in (itself at depth 0), said in one line and in the summary.

    What a recipe sets itself stays as it is, and the rest follows from that: a width of one's own has its own batch,
    learning rate and number of steps.
    """
    if not config.depth:
        return config
    fit, optim = config.fit, config.fit.optim
    wide, heads = (getattr(config, name) if name in config.given else 0 for name in ("hidden_size", "num_heads"))
    shape = asdict(shape_of(config.depth, wide, heads))
    free = {name: value for name, value in shape.items() if name not in config.given}
    sized = replace(config, depth=0, tokens_per_parameter=0.0, **free)
    own = {name: value for name, value in _budget_fields(fit).items() if name in config.given}
    budget = budget_of(
        model_config(sized, tokenizer),
        config.context,
        config.tokens_per_parameter,
        **{name.rpartition(".")[2]: value for name, value in own.items()},
    )
    optim = replace(optim, lr=budget.lr, weight_decay=budget.weight_decay)
    resolved = replace(sized, fit=replace(fit, steps=budget.steps, batch_size=budget.batch_size, optim=optim))
    told = {"depth": config.depth, **{name: getattr(resolved, name) for name in shape}, **asdict(budget)}
    run.note(resolved=told, given=list(config.given))
    print(f"{run.manifest.table}: " + ", ".join(f"{name} {value:,}" for name, value in told.items()), file=sys.stderr)
    return resolved


def _budget_fields(fit: FitConfig) -> dict[str, Any]:
    """Return what `depth` decides of the loop, by the names in `given`."""
    return {
        "fit.batch_size": fit.batch_size,
        "fit.steps": fit.steps,
        "fit.optim.lr": fit.optim.lr,
        "fit.optim.weight_decay": fit.optim.weight_decay,
    }


def check_size(train: Shards, config: Config) -> None:
    """Raise UserError for a corpus that does not fill one batch: every step would repeat all of it."""
    needed = config.fit.batch_size * config.context
    if train.num_tokens < needed:
        raise UserError(
            f"the corpus has {train.num_tokens:,} tokens, too few for one batch of {config.fit.batch_size} rows of "
            f"{config.context}: give at least {needed:,}, or lower fit.batch_size or context"
        )


def model_config(config: Config, tokenizer: Tokenizer) -> ModelConfig:
    """Return the network's shape for this tokenizer."""
    inner = config.intermediate_size or 32 * math.ceil(config.hidden_size * 8 / 3 / 32)
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=inner,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=max(config.context, 512),
        rope_theta=config.rope_theta,
        tie_word_embeddings=config.tie_embeddings,
        qk_norm=config.qk_norm,
        attention_bias=config.attention_bias,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )


def heldout_loss(run: Run, model: Transformer, heldout: Shards, context: int) -> dict[str, float]:
    """Return loss (nats per predicted token) and bits per byte of the held-out documents, each token once."""
    device = next(model.parameters()).device
    loss = tokens = 0.0
    model.eval()
    with torch.no_grad(), autocast(run.settings):
        for batch in PretrainLoader(heldout, context, 32, None).epoch_batches():
            on_device = to_device(batch, device)
            loss += float(objective(model, 0.0, on_device).total)
            tokens += float(on_device.num_items)
    # All the documents' bytes, though their first token and the first of a window are given, not predicted.
    return {"eval/loss": loss / max(tokens, 1), "eval/bits_per_byte": loss / math.log(2) / max(1, heldout.num_bytes)}
