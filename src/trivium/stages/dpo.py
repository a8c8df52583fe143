"""Direct preference optimisation: the policy learns the rankings with no reward model and no sampling.

Reads   rankings from preferences.db; the SFT model, which is both start and frozen reference
Writes  model/: a chat model
Paper   Rafailov et al. 2023, arXiv 2305.18290, equation 7; IPO: Azar et al. 2023, arXiv 2310.12036, equation 17
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
from trivium.config import Ref, bounds, one_of
from trivium.data.collate import PreferenceGroup, collate_preferences
from trivium.data.loader import RowLoader
from trivium.data.tokenizer import Tokenizer
from trivium.evals.stats import wilson_interval
from trivium.losses import dpo as losses
from trivium.losses.logprobs import token_logprobs
from trivium.models.hf import load_model, save_model
from trivium.models.transformer import Transformer
from trivium.preferences.store import Store
from trivium.records import AnnotatorKind
from trivium.runs.manifest import Run
from trivium.training.distributed import autocast, device_of, weight_dtype, world
from trivium.training.judgements import data_facts, load_judgements
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
    """`dpo` (label_smoothing > 0 makes it cDPO) or `ipo`."""
    beta: float = 0.1
    """Strength of the pull towards the reference (in IPO: the regularisation tau)."""
    label_smoothing: float = 0.0
    """Assumed fraction of flipped labels (cDPO); `dpo` only."""
    heldout_frac: float = 0.1
    """Fraction of the prompts kept for the held-out accuracy."""
    context: int = 512
    """Longest prompt with response, in tokens."""
    fit: FitConfig = field(default_factory=FitConfig)
    """The training loop; its items are ranked groups."""

    def __post_init__(self) -> None:
        """Refuse combinations that would be ignored silently."""
        one_of(self, loss=("dpo", "ipo"))
        bounds(self, beta=(1e-6, None), label_smoothing=(0, 0.499), heldout_frac=(0.01, 0.9), context=(8, None))
        if self.loss == "ipo":
            bounds(self, label_smoothing=(0, 0))


def objective(model: Transformer, config: Config, batch: PreferenceBatch) -> LossOutput:
    """Return the summed loss of all pairs of a batch of groups; every ranking weighs 1 however many pairs it has."""
    policy = completion_sums(model, batch, mean=config.loss == "ipo")
    assert batch.ref_logprobs is not None, "the reference's log-probabilities are computed before training"
    chosen, rejected = batch.pairs[:, 0], batch.pairs[:, 1]
    reference = batch.ref_logprobs
    terms = (policy[chosen], policy[rejected], reference[chosen], reference[rejected])
    if config.loss == "ipo":
        loss, good, bad = losses.ipo(*terms, beta=config.beta)
    else:
        loss, good, bad = losses.dpo(*terms, beta=config.beta, label_smoothing=config.label_smoothing)
    weights = batch.weights
    metrics = {"accuracy": ((good > bad) * weights).sum(), "margin": ((good - bad) * weights).sum()}
    return LossOutput(total=(loss * weights).sum(), metrics=metrics)


def run(config: Config, run: Run) -> None:
    """Train the policy on the judgements and save it."""
    tokenizer = Tokenizer.load(run.model("policy"))
    device = device_of(run.settings)
    model = load_model(run.model("policy"), device=device, dtype=weight_dtype(run.settings))
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
    # Once, before any step: the reference never changes, so neither do its log-probabilities.
    train = with_reference(run, model, judgements.train, config, tokenizer.pad_id)
    heldout = with_reference(run, model, judgements.heldout, config, tokenizer.pad_id)
    loader = RowLoader(len(train), config.fit.batch_size, run.seed)
    rank, size = world()

    def batches(step: int) -> Sequence[PreferenceBatch]:
        rows = loader.rows(step, rank, size)
        width = config.fit.micro_batch_size or len(rows)
        return [
            to_device(collate_preferences([train[r] for r in rows[i : i + width]], tokenizer.pad_id), device)
            for i in range(0, len(rows), width)
        ]

    def evaluate(step: int) -> dict[str, float]:
        return measure(run, model, config, heldout, tokenizer.pad_id)

    fit(
        run,
        model,
        partial(objective, model, config),
        batches,
        config.fit,
        evaluate=evaluate,
        flops_per_item=3 * model.config.flops_per_token(config.context),
        tokens_in=lambda parts: sum(int(part.lengths.sum()) for part in parts),
    )
    with whole(model):
        if not run.owner:
            return
        final = measure(run, model, config, heldout, tokenizer.pad_id)
        low, high = wilson_interval(final["eval/accuracy"] * len(heldout), len(heldout))
        run.result("implicit_reward@1", "accuracy", final["eval/accuracy"], low=low, high=high, n=len(heldout))
        run.note(
            steps=config.fit.steps,
            num_parameters=model.config.num_parameters(),
            dropped=judgements.dropped,
            kinds=judgements.kinds,
            data=data_facts(collection, train),
        )
        tokenizer.save(run.dir / "model")
        save_model(run.dir / "model", model, eos_token_id=tokenizer.end_id)


def completion_sums(model: Transformer, batch: PreferenceBatch, *, mean: bool) -> Tensor:
    """Return each completion's log-probability in nats, float [N]: summed (DPO) or per token (IPO)."""
    logits = model.logits(model(batch.tokens.input_ids, positions=batch.tokens.positions))
    sums = token_logprobs(logits, batch.tokens.targets).sum(-1)
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
            sums = completion_sums(model, batch, mean=config.loss == "ipo").float().cpu()
            ends = np.cumsum([len(group.completion_ids) for group in part]).tolist()
            for group, start_row, end_row in zip(part, [0, *ends], ends, strict=False):
                filled.append(dataclasses.replace(group, ref_logprobs=sums[start_row:end_row].tolist()))
    return filled


def measure(
    run: Run, model: Transformer, config: Config, groups: Sequence[PreferenceGroup], pad_id: int
) -> dict[str, float]:
    """Return held-out loss and accuracy of the implicit reward, per prompt."""
    device = next(model.parameters()).device
    model.eval()
    loss = right = prompts = 0.0
    with torch.no_grad(), autocast(run.settings):
        for start in range(0, len(groups), 16):
            batch = to_device(collate_preferences(list(groups[start : start + 16]), pad_id), device)
            output = objective(model, config, batch)
            loss += float(output.total)
            right += float(output.metrics["accuracy"])
            prompts += float(batch.num_items)
    return {"eval/loss": loss / max(prompts, 1e-8), "eval/accuracy": right / max(prompts, 1e-8)}
