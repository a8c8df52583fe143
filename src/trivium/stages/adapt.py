"""Continued pre-training: a model learns a domain from its text, and what that costs it elsewhere is measured.

Reads   a model; shards of the domain's text and of general text, both made with that model's tokenizer
Writes  model/: the adapted model; results: bits per byte before and after, the gain and the forgetting
Paper   Gururangan et al. 2020, arXiv 2004.10964 (the domain's text); Ibrahim et al. 2024, arXiv 2403.08763 (replay)
Watch   the gain beside the forgetting: replay costs rows and should take away more of the second than of the first

The objective is pre-training's. What differs is where it starts, which text it reads, and that it is measured twice.
Left out: new tokens for the domain; replay of text that the model itself wrote; adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from trivium.batches import LossOutput, TokenBatch, to_device
from trivium.config import ConfigError, Ref, UserError, bounds
from trivium.data.loader import PretrainLoader, ReplayLoader
from trivium.data.shards import Shards, open_shards
from trivium.data.tokenizer import Tokenizer
from trivium.evals.perplexity import DocumentLoss, bits_per_byte, bits_saved, document_losses
from trivium.losses.cross_entropy import head_cross_entropy
from trivium.models.hf import load_model, read_stop_ids, save_model
from trivium.models.transformer import Transformer
from trivium.runs.manifest import Run, is_base, read_manifest
from trivium.training.compilation import compile_layers
from trivium.training.distributed import data_ranks, decide, device_of, weight_dtype
from trivium.training.float8 import lower_products
from trivium.training.loop import FitConfig, fit
from trivium.training.optim import OptimConfig
from trivium.training.parallel import whole
from trivium.training.rollout import chunks, continue_text

METRICS = {"domain": "eval/domain_bits_per_byte", "general": "eval/general_bits_per_byte"}
"""The two kinds of text, and where each is followed."""

GENERAL = 1
"""Beside the seed, what the order of the general text is drawn from: not the order in which pre-training read it."""

Losses = Mapping[str, Sequence[DocumentLoss]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model learns which text, and how much of the general it reads again meanwhile."""

    init: Ref = "pretrain@latest"
    """The model to start from: a run, or a local Hugging Face folder of one of the five families."""
    corpus: Ref = "domain_tokens@latest"
    """The domain's text: a `train_tokenizer` run whose `tokenizer` is the model in `init`."""
    general: Ref = "train_tokenizer@latest"
    """General text, tokenised alike, to replay and to measure forgetting on; empty: neither, with `replay_frac = 0`."""
    replay_frac: float = 0.25
    """Fraction of the training rows that are general text; the first n rows hold exactly the whole part of it."""
    context: int = 256
    """Tokens in a training row."""
    heldout_tokens: int = 50_000
    """Held-out tokens of each kind of text that are measured, whole documents from the first on."""
    prompts: tuple[str, ...] = ()
    """Beginnings that are continued at each evaluation."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(optim=OptimConfig(lr=1e-3)))
    """The training loop."""

    def __post_init__(self) -> None:
        """Refuse a fraction that is none, and replay of nothing."""
        bounds(self, replay_frac=(0, 1), context=(8, None), heldout_tokens=(1, None))
        if self.replay_frac and not self.general:
            raise ConfigError(
                f"replay_frac = {self.replay_frac} needs general text; name it in general, or set replay_frac = 0"
            )


def objective(model: Transformer, batch: TokenBatch) -> LossOutput:
    """Return the summed next-token cross-entropy (nats) of a packed batch, domain and general rows alike."""
    hidden = model(batch.input_ids, positions=batch.positions, document_ids=batch.document_ids)
    return LossOutput(total=head_cross_entropy(hidden, model.lm_head.weight, batch.targets).sum())


def run(config: Config, run: Run) -> None:
    """Measure, train, measure again, and save the adapted model."""
    tokenizer = Tokenizer.load(run.model("init"))
    train, heldout = open_texts(config, run, tokenizer)
    device = device_of(run.settings)
    model = load_model(run.model("init"), device=device, dtype=weight_dtype(run.settings))
    check_fits(config, train["domain"], model)
    before: dict[str, Sequence[DocumentLoss]] = {}
    decide(lambda: before.update(losses(model, heldout, config)))  # rank 0's alone, for which the others wait
    flops_per_item = 3 * model.config.flops_per_token(config.context)
    rows = config.fit.steps * config.fit.batch_size
    lower_products(model, run.settings)
    compiled = compile_layers(model, run.settings, flops=rows * config.context * flops_per_item)
    loader = mixed(config, train, run.seed)
    rank, size = data_ranks()

    def batches(step: int) -> Sequence[TokenBatch]:
        batch = to_device(loader.batch(step, rank, size), device)
        return list(chunks(batch, config.fit.micro_batch_size or len(batch.input_ids)))

    def evaluate(step: int) -> dict[str, float]:
        for prompt in config.prompts:
            run.sample("text", {"prompt": prompt, "text": continue_text(model, tokenizer, prompt)}, step)
        return {METRICS[k]: bits_per_byte(v, run.seed)[0] for k, v in losses(model, heldout, config).items()}

    fit(
        run,
        model,
        partial(objective, model),
        batches,
        config.fit,
        evaluate=evaluate,
        flops_per_item=flops_per_item,
        tokens_in=lambda parts: sum(part.input_ids.numel() for part in parts),
    )
    with whole(model):
        if not run.owner:
            return
        report(run, before, losses(model, heldout, config))
        run.note(
            steps=config.fit.steps,
            num_parameters=model.config.num_parameters(),
            compiled=compiled,
            is_base=is_base(read_manifest(run.parent("init"))),
            data={"name": "domain shards", "num_documents": len(train["domain"]), "tokens": train["domain"].num_tokens},
            **passes(train, config.context, rows, loader.num_replayed(rows)),
        )
        tokenizer.save(run.dir / "model")
        save_model(run.dir / "model", model, eos_token_id=end_of(run, tokenizer))


def open_texts(config: Config, run: Run, tokenizer: Tokenizer) -> tuple[dict[str, Shards], dict[str, Shards]]:
    """Return the training and the held-out side of the domain's text and, where there is some, of the general.

    Raises UserError for text that another tokenizer was used on.
    """
    train: dict[str, Shards] = {}
    heldout: dict[str, Shards] = {}
    for kind, name in (("domain", "corpus"), ("general", "general")):
        if not getattr(config, name):
            continue
        folder = run.parent(name) / "shards"
        for side, into in (("train", train), ("heldout", heldout)):
            into[kind] = open_shards(folder / side)
        if train[kind].fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{name}: {folder.parent.name} was made with another tokenizer than the model in init knows; "
                f"make it by a train_tokenizer table with tokenizer = {config.init!r}"
            )
    return train, {kind: shards.head(config.heldout_tokens) for kind, shards in heldout.items()}


def check_fits(config: Config, domain: Shards, model: Transformer) -> None:
    """Raise UserError for a row longer than the model reads, and for a domain that does not fill a batch's part."""
    longest = model.config.max_position_embeddings
    if config.context > longest:
        raise UserError(f"context = {config.context}: the model in init reads at most {longest} tokens; set that")
    rows = config.fit.batch_size * (1 - config.replay_frac)
    if domain.num_tokens < rows * config.context:
        raise UserError(
            f"the domain has {domain.num_tokens:,} tokens, too few for one batch of {rows:g} rows of {config.context}: "
            f"give at least {round(rows * config.context):,}, or lower fit.batch_size or context"
        )


def mixed(config: Config, train: Mapping[str, Shards], seed: int) -> ReplayLoader:
    """Return the rows to train on: the domain's, and general ones among them."""
    domain = PretrainLoader(train["domain"], config.context, config.fit.batch_size, seed)
    general = None
    if "general" in train:
        general = PretrainLoader(train["general"], config.context, config.fit.batch_size, (seed, GENERAL))
    return ReplayLoader(domain, general, config.replay_frac)


def losses(model: Transformer, heldout: Mapping[str, Shards], config: Config) -> Losses:
    """Return what each held-out document of each kind of text costs the model, always the same ones."""
    model.eval()
    return {
        kind: document_losses(model, shards, context=config.context, max_tokens=config.heldout_tokens)
        for kind, shards in heldout.items()
    }


def report(run: Run, before: Losses, after: Losses) -> None:
    """Record bits per byte before and after, what the domain gained and what was forgotten of the general text."""
    for kind, change in (("domain", "gain"), ("general", "forgetting")):
        if kind not in before:
            continue
        n = len(before[kind])
        for when, measured in (("before", before[kind]), ("after", after[kind])):
            value, low, high = bits_per_byte(measured, run.seed)
            run.result(f"{kind}@1", "bits_per_byte", value, low=low, high=high, n=n, checkpoint=when)
        better, worse = (before, after) if kind == "general" else (after, before)
        value, low, high = bits_saved(worse[kind], better[kind], run.seed)
        run.result(f"{kind}@1", change, value, low=low, high=high, n=n)


def passes(train: Mapping[str, Shards], context: int, rows: int, replayed: int) -> dict[str, float]:
    """Return how many rows were replayed, and how often training went over each kind of text."""
    facts = {"replayed_rows": replayed, "epochs": (rows - replayed) * context / train["domain"].num_tokens}
    if replayed:
        facts["replay_epochs"] = replayed * context / train["general"].num_tokens
    return facts


def end_of(run: Run, tokenizer: Tokenizer) -> int:
    """Return the token that ends a generation as it did in the model at the start: a turn's end, or a document's."""
    return tokenizer.end_id if tokenizer.end_id in read_stop_ids(run.model("init")) else tokenizer.eos_id
