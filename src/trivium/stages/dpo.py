"""Direct preference optimisation: the policy learns the rankings with no reward model and no sampling.

Reads   rankings from preferences.db; the SFT model: start, and frozen reference of the losses that have one
Writes  model/: a chat model; with LoRA its adapters too, in adapter/
Paper   Rafailov et al. 2023, arXiv 2305.18290, equation 7; of the other losses, see losses/dpo.py and its neighbours
Watch   train/margin grows, eval/accuracy with it; how far from the reference it went, evaluate says in nats
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from trivium.batches import LossOutput, PreferenceBatch, to_device
from trivium.config import ConfigError, Dial, Ref, bounds, one_of
from trivium.data.collate import PreferenceGroup, collate_preferences, mismatched
from trivium.data.loader import RowLoader
from trivium.data.tokenizer import Tokenizer
from trivium.evals.stats import wilson_interval
from trivium.losses.cross_entropy import head_logprobs
from trivium.losses.family import FAMILY, meaningful_to
from trivium.losses.kto import best_and_worst
from trivium.models.adapter_folder import save_adapted
from trivium.models.hf import load_model
from trivium.models.lora import LoraConfig, adapt, adapter_facts, training_flops
from trivium.models.transformer import Transformer
from trivium.preferences.store import Store
from trivium.records import AnnotatorKind
from trivium.runs.manifest import Run
from trivium.training.distributed import all_reduce_sum, autocast, data_ranks, device_of, weight_dtype
from trivium.training.judgements import Judgements, data_facts, load_judgements
from trivium.training.loop import FitConfig, fit
from trivium.training.parallel import whole


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which judgements, how strongly, from which model."""

    policy: Ref = "sft@latest"
    """Where the policy starts; frozen, it is the reference too."""
    comparisons: Ref = "collect_comparisons@latest"
    """The run whose collection of rankings is learned."""
    kinds: tuple[AnnotatorKind, ...] = ()
    """Only judgements of these kinds (human, ai, simulated); empty means all."""
    loss: str = "dpo"
    """`dpo` (label_smoothing > 0 makes it cDPO), `robust`, `hinge`, `ipo`, `simpo`, `orpo` or `kto`."""
    beta: float = 0.1
    """Strength of the pull towards the reference (IPO: tau; SimPO: scale of the reward; ORPO: weight of the odds)."""
    label_smoothing: float = 0.0
    """Assumed fraction of flipped labels; `dpo` and `robust` only."""
    length_normalised: bool = False
    """Whether `dpo`, `robust` or `hinge` take mean log-probabilities per token instead of sums; raise beta with it."""
    gamma: float = 0.0
    """Lead, in units of the reward, that `simpo` asks for; `simpo` only, which needs it."""
    nll_coef: float = 0.0
    """Weight of the chosen response's negative log-likelihood per token, added; `orpo` has it at 1, `kto` has none."""
    desirable_weight: float = 1.0
    """Weight of responses ranked best; `kto` only."""
    undesirable_weight: float = 1.0
    """Weight of responses ranked worst; `kto` only."""
    heldout_frac: float = 0.1
    """Fraction of the prompts kept for the held-out accuracy."""
    context: int = 512
    """Longest prompt with response, in tokens."""
    fit: FitConfig = field(default_factory=FitConfig)
    """The training loop; its items are ranked groups."""
    lora: Dial[LoraConfig] = field(default_factory=LoraConfig)
    """Low-rank adapters instead of the whole network; rank 0 means none."""

    def __post_init__(self) -> None:
        """Refuse combinations that would be ignored silently."""
        one_of(self, loss=tuple(FAMILY))
        bounds(self, beta=(1e-6, None), label_smoothing=(0, 0.499), heldout_frac=(0.01, 0.9), context=(8, None))
        bounds(
            self, gamma=(0, None), nll_coef=(0, None), desirable_weight=(1e-6, None), undesirable_weight=(1e-6, None)
        )
        refuse_meaningless(self)


def objective(model: Transformer, config: Config, batch: PreferenceBatch) -> LossOutput:
    """Return the summed loss of a batch of groups; every ranking weighs 1 however many pairs or responses it has."""
    kind = FAMILY[config.loss]
    sums = completion_sums(model, batch, mean=False)
    means = sums / batch.tokens.num_items_per_row
    sides = [means if per_token(config) else sums]
    if kind.uses_reference:
        assert batch.ref_logprobs is not None, "the reference's log-probabilities are computed before training"
        sides.append(batch.ref_logprobs)
    arguments = {name: getattr(config, name) for name in ("beta", *kind.arguments)}
    chosen, rejected = batch.pairs[:, 0], batch.pairs[:, 1]
    if kind.paired:
        weights = batch.weights
        loss, good, bad = kind.compute(*(side[rows] for side in sides for rows in (chosen, rejected)), **arguments)
        if config.nll_coef:
            loss = loss - config.nll_coef * means[chosen]
    else:
        desirable, weights = best_and_worst(batch.ranks, batch.groups)
        loss, rewards = kind.compute(*sides, desirable, batch.baseline, **arguments)
        good, bad = rewards[chosen], rewards[rejected]
    shares = batch.weights
    metrics = {"accuracy": ((good > bad) * shares).sum(), "margin": ((good - bad) * shares).sum()}
    return LossOutput(total=(loss * weights).sum(), metrics=metrics)


def run(config: Config, run: Run) -> None:
    """Train the policy on the judgements and save it."""
    tokenizer = Tokenizer.load(run.model("policy"))
    device = device_of(run.settings)
    start = load_model(run.model("policy"), device=device, dtype=weight_dtype(run.settings))
    model = adapt(start, config.lora, seed=run.seed)
    collection = run.parent("comparisons").name
    with Store(run.workspace / "preferences.db") as store:
        judgements = load_judgements(
            store,
            collection,
            tokenizer,
            kinds=config.kinds,
            heldout_frac=config.heldout_frac,
            context=config.context,
            seed=run.seed,
        )
    train, heldout, strangers, heldout_strangers = prepared(run, model, judgements, config, tokenizer.pad_id)
    loader = RowLoader(len(train), config.fit.batch_size, run.seed)
    rank, size = data_ranks()

    def batches(step: int) -> Sequence[PreferenceBatch]:
        rows = loader.rows(step, rank, size)
        others = [strangers[r] for r in rows] if strangers else []
        return micro_batches(run, model, config, [train[r] for r in rows], others, tokenizer.pad_id)

    def evaluate(step: int) -> dict[str, float]:
        return measure(run, model, config, heldout, tokenizer.pad_id, heldout_strangers)

    fit(
        run,
        model,
        partial(objective, model, config),
        batches,
        config.fit,
        evaluate=evaluate,
        flops_per_item=training_flops(model.config, config.context, config.lora),
        tokens_in=lambda parts: sum(int(part.lengths.sum()) for part in parts),
    )
    with whole(model):
        if not run.owner:
            return
        final = measure(run, model, config, heldout, tokenizer.pad_id, heldout_strangers)
        low, high = wilson_interval(final["eval/accuracy"] * len(heldout), len(heldout))
        run.result("implicit_reward@1", "accuracy", final["eval/accuracy"], low=low, high=high, n=len(heldout))
        run.note(
            steps=config.fit.steps,
            num_parameters=model.config.num_parameters(),
            dropped=judgements.dropped,
            kinds=judgements.kinds,
            data=data_facts(collection, train),
            **adapter_facts(model),
        )
        tokenizer.save(run.dir / "model")
        save_adapted(run.dir, model, eos_token_id=tokenizer.end_id)


def prepared(
    run: Run, model: Transformer, judgements: Judgements, config: Config, pad_id: int
) -> tuple[list[PreferenceGroup], ...]:
    """Return the groups to train on and the held-out ones, then both sides' `mismatched`, which KTO alone has.

    The reference's log-probabilities are filled in, where the loss has one.
    """
    kind = FAMILY[config.loss]
    train, heldout = list(judgements.train), list(judgements.heldout)
    others = [[] if kind.paired else mismatched(side, train, config.context) for side in (train, heldout)]
    sides = (train, heldout, *others)
    if not kind.uses_reference:
        return sides
    # Once, before any step: the reference never changes, so neither do its log-probabilities.
    return tuple(with_reference(run, model, side, config, pad_id) if side else side for side in sides)


def micro_batches(
    run: Run,
    model: Transformer,
    config: Config,
    groups: Sequence[PreferenceGroup],
    strangers: Sequence[PreferenceGroup],
    pad_id: int,
) -> list[PreferenceBatch]:
    """Return a step's groups in parts of `fit.micro_batch_size`; where there are strangers, with the reference point.

    That is the mean drift on the strangers of the whole step, on all ranks: a part's own would depend on the split.
    """
    width = config.fit.micro_batch_size or len(groups)
    parts = [collate_preferences(groups[i : i + width], pad_id) for i in range(0, len(groups), width)]
    if strangers:
        with whole(model):
            total, count = all_reduce_sum(drift(run, model, strangers, pad_id))
        parts = [dataclasses.replace(part, baseline=total / count) for part in parts]
    device = next(model.parameters()).device
    return [to_device(part, device) for part in parts]


def refuse_meaningless(config: Config) -> None:
    """Raise ConfigError for a setting that the loss would ignore, or that it lacks."""
    for name in ("label_smoothing", "length_normalised", "gamma", "nll_coef", "desirable_weight", "undesirable_weight"):
        value, losses = getattr(config, name), meaningful_to(name)
        if value != getattr(Config, name) and config.loss not in losses:
            raise ConfigError(
                f"{name} = {value!r}: means nothing to loss = {config.loss!r}, only to {', '.join(losses)}"
            )
    for loss, name, instead in (("robust", "label_smoothing", "dpo"), ("simpo", "gamma", "dpo with length_normalised")):
        if config.loss == loss and not getattr(config, name):
            raise ConfigError(f"{name} = 0: loss = {loss!r} needs it above 0; without it, take {instead}")


def per_token(config: Config) -> bool:
    """Tell whether the loss compares mean log-probabilities per token, not sums over the completion."""
    return FAMILY[config.loss].per_token or config.length_normalised


def completion_sums(model: Transformer, batch: PreferenceBatch, *, mean: bool) -> Tensor:
    """Return each completion's log-probability in nats, float [N]: summed (DPO) or per token (IPO)."""
    hidden = model(batch.tokens.input_ids, positions=batch.tokens.positions)
    sums = head_logprobs(hidden, model.lm_head.weight, batch.tokens.targets).sum(-1)
    return sums / batch.tokens.num_items_per_row if mean else sums


def with_reference(
    run: Run, model: Transformer, groups: Sequence[PreferenceGroup], config: Config, pad_id: int
) -> list[PreferenceGroup]:
    """Return the groups with the reference's log-probability of each completion filled in."""
    device = next(model.parameters()).device
    model.eval()
    filled = []
    with torch.no_grad(), autocast(run.settings):
        for start in range(0, len(groups), 16):
            part = list(groups[start : start + 16])
            batch = to_device(collate_preferences(part, pad_id), device)
            sums = completion_sums(model, batch, mean=per_token(config)).float().cpu()
            ends = np.cumsum([len(group.completion_ids) for group in part]).tolist()
            for group, start_row, end_row in zip(part, [0, *ends], ends, strict=False):
                filled.append(dataclasses.replace(group, ref_logprobs=sums[start_row:end_row].tolist()))
    return filled


def drift(run: Run, model: Transformer, groups: Sequence[PreferenceGroup], pad_id: int) -> Tensor:
    """Return the sum of log policy - log reference over the groups' completions (nats) and their number, float [2]."""
    device = next(model.parameters()).device
    model.eval()
    totals = torch.zeros(2)
    with torch.no_grad(), autocast(run.settings):
        for start in range(0, len(groups), 16):
            batch = to_device(collate_preferences(groups[start : start + 16], pad_id), device)
            assert batch.ref_logprobs is not None, "the reference's log-probabilities are computed before training"
            leads = completion_sums(model, batch, mean=False).float() - batch.ref_logprobs
            totals += torch.tensor([float(leads.sum()), len(leads)])
    return totals


def measure(
    run: Run,
    model: Transformer,
    config: Config,
    groups: Sequence[PreferenceGroup],
    pad_id: int,
    strangers: Sequence[PreferenceGroup] = (),
) -> dict[str, float]:
    """Return held-out loss and accuracy of the implicit reward, per prompt; `strangers`: the groups' `mismatched`."""
    device = next(model.parameters()).device
    model.eval()
    loss = right = prompts = 0.0
    total, count = drift(run, model, strangers, pad_id)
    baseline = total / count if strangers else None
    with torch.no_grad(), autocast(run.settings):
        for start in range(0, len(groups), 16):
            batch = dataclasses.replace(collate_preferences(groups[start : start + 16], pad_id), baseline=baseline)
            batch = to_device(batch, device)
            output = objective(model, config, batch)
            loss += float(output.total)
            right += float(output.metrics["accuracy"])
            prompts += float(batch.num_items)
    return {"eval/loss": loss / max(prompts, 1e-8), "eval/accuracy": right / max(prompts, 1e-8)}
