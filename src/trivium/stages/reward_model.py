"""The reward model: a separate network with a scalar head learns the rankings.

Reads   rankings from preferences.db (the collection of a collect_comparisons run); a chat model to start from
Writes  model/: a sequence classifier with one label, and in its config the mean and deviation of its raw scores;
        with LoRA its adapters too, in adapter/
Paper   Ouyang et al. 2022, arXiv 2203.02155, equation 1: all pairs of a prompt in one batch, weighted 1/C(K,2)
Watch   held-out accuracy between the annotators' ceiling (how often one foretells another) and what length alone gives
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from trivium.batches import LossOutput, PreferenceBatch, to_device
from trivium.config import ConfigError, Dial, Ref, UserError, bounds, one_of
from trivium.data.collate import PreferenceGroup, collate_preferences
from trivium.data.loader import RowLoader
from trivium.data.tokenizer import Tokenizer
from trivium.evals.ranked_pairs import Measured, by_disagreement, measure, scored_pairs
from trivium.losses.pairwise import bradley_terry, centering, plackett_luce
from trivium.models.adapter_folder import save_adapted
from trivium.models.heads import ScalarModel, score_at
from trivium.models.hf import CONFIG, WEIGHTS, load_model
from trivium.models.lora import LoraConfig, adapt, adapter_facts, training_flops
from trivium.preferences.agreement import agreement
from trivium.preferences.store import Store
from trivium.records import AnnotatorKind, to_dict
from trivium.rewards.learned import LearnedReward, combine
from trivium.runs.manifest import Run
from trivium.training.distributed import data_ranks, device_of, weight_dtype
from trivium.training.judgements import Judgements, data_facts, load_judgements, part_of, resampled
from trivium.training.loop import FitConfig, fit
from trivium.training.parallel import whole


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which judgements, by which loss, from which weights."""

    init: Ref = "sft@latest"
    """The network whose weights are copied under the scalar head."""
    comparisons: Ref = "collect_comparisons@latest"
    """The run whose collection of rankings is learned."""
    kinds: tuple[AnnotatorKind, ...] = ()
    """Only judgements of these kinds (human, ai, simulated); empty means all."""
    loss: str = "bradley_terry"
    """`bradley_terry` on derived pairs, or `plackett_luce` on the K-way rankings."""
    margin: float = 0.0
    """Lead in nats asked for per place between the two in the ranking (bradley_terry only); 0 means none."""
    center: float = 0.0
    """Weight of the squared sum of both scores of a pair, which holds them around zero; 0 means none."""
    ties: str = "drop"
    """`drop`: a tied pair teaches nothing. `equal`: it counts as half a win each way, and pulls the scores together."""
    weights: dict[str, float] = field(default_factory=dict)
    """What an annotator's rankings count for in training, by name; 1 where not named, 0 leaves them out."""
    annotator_weights: str = "named"
    """`named`: `weights` alone. `reliability`: times what the annotators' votes on shared pairs say of each."""
    member: int = 0
    """Which member of an ensemble: above 0, prompts weigh by a random draw and come in an order of the member's own."""
    ensemble: tuple[Ref, ...] = ()
    """Finished members, whose scores are averaged with this one's; they need the same rankings, split and seed."""
    pessimism: float = 0.0
    """Standard deviations between the ensemble's members that are taken off their mean; 0 means the mean."""
    max_rankings: int = 0
    """Train on at most this many rankings, a random part that a larger number holds too; 0 means all."""
    heldout_frac: float = 0.2
    """Fraction of the prompts kept for the held-out accuracy."""
    context: int = 512
    """Longest prompt with response, in tokens; groups with a longer one are left out and counted."""
    cut: bool = False
    """Cut the beginning of a prompt that is too long for `context` instead of leaving its group out."""
    fit: FitConfig = field(default_factory=FitConfig)
    """The training loop; its items are ranked groups."""
    lora: Dial[LoraConfig] = field(default_factory=LoraConfig)
    """Low-rank adapters, and the head, instead of the whole network; rank 0 means none."""

    def __post_init__(self) -> None:
        """Refuse an unknown loss, and a weight or margin that means nothing."""
        one_of(self, loss=("bradley_terry", "plackett_luce"), ties=("drop", "equal"))
        one_of(self, annotator_weights=("named", "reliability"))
        bounds(self, heldout_frac=(0.01, 0.9), context=(8, None), margin=(0.0, None), center=(0.0, None))
        bounds(self, member=(0, None), max_rankings=(0, None), pessimism=(0.0, None))
        for name, weight in self.weights.items():
            if not (isfinite(weight) and weight >= 0):
                raise ConfigError(f"weights.{name} = {weight} is out of range; it must be a number from 0 up")
        if self.margin and self.loss != "bradley_terry":
            raise ConfigError(f"margin = {self.margin} needs loss = 'bradley_terry'; plackett_luce knows no margin")
        if self.pessimism and not self.ensemble:
            raise ConfigError(f"pessimism = {self.pessimism} needs an ensemble, whose members can disagree; name some")


def objective(
    model: ScalarModel, loss: str, batch: PreferenceBatch, margin: float = 0.0, center: float = 0.0
) -> LossOutput:
    """Return the summed ranking loss of a batch of groups; a ranking counts once (times its weight), not per pair."""
    scores = scores_of(model, batch)
    chosen, rejected = scores[batch.pairs[:, 0]], scores[batch.pairs[:, 1]]
    if loss == "plackett_luce":
        losses = plackett_luce(scores, batch.ranks, batch.groups)
        total = (losses if batch.ranking_weights is None else losses * batch.ranking_weights).sum()
    else:
        places = batch.ranks[batch.pairs[:, 1]] - batch.ranks[batch.pairs[:, 0]]
        lead = margin * places.clamp(min=0) if margin else 0.0  # a soft label may contradict the places
        total = (bradley_terry(chosen, rejected, lead, batch.targets) * batch.weights).sum()
    if center:
        total = total + center * (centering(chosen, rejected) * batch.weights).sum()
    return LossOutput(total=total, metrics={"accuracy": ((chosen > rejected) * batch.weights).sum()})


def run(config: Config, run: Run) -> None:
    """Train, calibrate and save the reward model; measure it on held-out prompts."""
    tokenizer = Tokenizer.load(run.model("init"))
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
            ties=config.ties == "equal",
            weights=config.weights,
            cut=config.cut,
            by_reliability=config.annotator_weights == "reliability",
            soft=config.loss == "bradley_terry",
        )
    device = device_of(run.settings)
    members = load_members(run, tokenizer, device)
    backbone = load_model(run.model("init"), device=device, dtype=weight_dtype(run.settings))
    model = ScalarModel.from_transformer(backbone, zero_init=True).to(device)
    model = adapt(model, config.lora, seed=run.seed)
    train = resampled(part_of(judgements.train, config.max_rankings, run.seed), run.seed, config.member)
    loader = RowLoader(len(train), config.fit.batch_size, run.seed + 1009 * config.member)
    rank, size = data_ranks()

    def batches(step: int) -> Sequence[PreferenceBatch]:
        rows = loader.rows(step, rank, size)
        width = config.fit.micro_batch_size or len(rows)
        parts = ([train[r] for r in rows[i : i + width]] for i in range(0, len(rows), width))
        ties = config.ties == "equal"
        return [to_device(collate_preferences(part, tokenizer.pad_id, ties=ties), device) for part in parts]

    def evaluate(step: int) -> dict[str, float]:
        right, pairs = count_right(model, judgements.heldout, tokenizer.pad_id)
        return {"eval/accuracy": right / max(pairs, 1)}

    fit(
        run,
        model,
        partial(objective, model, config.loss, margin=config.margin, center=config.center),
        batches,
        config.fit,
        evaluate=evaluate,
        flops_per_item=training_flops(backbone.config, config.context, config.lora),
        tokens_in=lambda parts: sum(int(part.lengths.sum()) for part in parts),
    )
    with whole(model):
        if run.owner:
            run.note(steps=config.fit.steps, data=data_facts(collection, train))
            finish(config, run, model, replace(judgements, train=train), members, tokenizer)


def finish(
    config: Config,
    run: Run,
    model: ScalarModel,
    judgements: Judgements,
    members: Sequence[LearnedReward],
    tokenizer: Tokenizer,
) -> None:
    """Set the scale of the scores, measure them on held-out prompts (with the ensemble's, if any), and save it all."""
    train, heldout = judgements.train, judgements.heldout
    known, asked = (flat_scores(model, side, tokenizer.pad_id) for side in (train, heldout))
    mean, std = calibrate(known)
    table = scores_by_member(heldout, (asked - mean) / std, members)
    joint = combine(table, config.pessimism) * std if members else asked
    pairs = scored_pairs(heldout, joint.tolist())
    measured = measure(scored_pairs(train, known.tolist()), pairs, seed=run.seed)
    report(run, model, judgements, measured)
    run.note(reward_mean=mean, reward_std=std)
    extra = {"reward_mean": mean, "reward_std": std, "temperature": measured.temperature}
    if members:
        leads = np.stack([scored_pairs(heldout, scores).leads for scores in table.tolist()])
        run.note(disagreement=by_disagreement(pairs, leads))
        extra |= {"ensemble": save_members(run), "pessimism": config.pessimism}
    tokenizer.save(run.dir / "model")
    save_adapted(run.dir, model, extra=extra, eos_token_id=tokenizer.end_id)


def load_members(run: Run, tokenizer: Tokenizer, device: torch.device) -> list[LearnedReward]:
    """Return the finished members of the ensemble; raises UserError for one that reads another tokenizer's ids."""
    folders = [folder / "model" for folder in run.parents_of("ensemble")]
    for folder in folders:
        if Tokenizer.load(folder).fingerprint != tokenizer.fingerprint:
            raise UserError(f"{folder} has another tokenizer than init; an ensemble's members need the same one")
    return [LearnedReward.from_folder(folder, pad_id=tokenizer.pad_id, device=device) for folder in folders]


def save_members(run: Run) -> int:
    """Copy the other members into the model's folder, so that it stays whole when it moves; return how many."""
    folders = run.parents_of("ensemble")
    for number, folder in enumerate(folders):
        into = run.dir / "model" / f"ensemble-{number}"
        into.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            shutil.copyfile(folder / "model" / name, into / name)
    return len(folders)


def scores_by_member(groups: Sequence[PreferenceGroup], own: Tensor, members: Sequence[LearnedReward]) -> Tensor:
    """Return every member's calibrated score of every completion, float [members, N], this model's first."""
    rows = [[*group.prompt_ids, *ids] for group in groups for ids in group.completion_ids]
    return torch.stack([own, *(torch.tensor(member.score_ids(rows)) for member in members)])


def scores_of(model: ScalarModel, batch: PreferenceBatch) -> Tensor:
    """Return the raw score of each completion, float [N]: the scalar at its last token."""
    values = model(batch.tokens.input_ids, positions=batch.tokens.positions)
    return score_at(values, batch.lengths)


def report(run: Run, model: ScalarModel, judgements: Judgements, measured: Measured) -> None:
    """Record what the model is worth on held-out prompts, and beside it how often one annotator foretells another."""
    for (task, metric), figure in measured.figures.items():
        run.result(task, metric, figure.value, low=figure.low, high=figure.high, n=figure.n)
    found = agreement(judgements.heldout_rankings, seed=run.seed).ceiling
    run.note(
        num_parameters=sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name),
        kinds=judgements.kinds,
        num_heldout_rankings=len(judgements.heldout),
        dropped=judgements.dropped,
        cut=judgements.cut,
        reliability={name: to_dict(found) for name, found in judgements.reliability.items()},
        ceiling=to_dict(found) if found else None,
        **measured.facts,
        **adapter_facts(model),
    )


def score_groups(
    model: ScalarModel, groups: Sequence[PreferenceGroup], pad_id: int
) -> list[tuple[PreferenceBatch, Tensor]]:
    """Return batches of the groups with their raw scores, without gradients."""
    device = next(model.parameters()).device
    model.eval()
    scored = []
    # In fp32, as PPO will score: the calibration must be that of the scores it is used on.
    with torch.no_grad():
        for start in range(0, len(groups), 16):
            batch = to_device(collate_preferences(list(groups[start : start + 16]), pad_id), device)
            scored.append((batch, scores_of(model, batch).float().cpu()))
    return scored


def count_right(model: ScalarModel, groups: Sequence[PreferenceGroup], pad_id: int) -> tuple[int, int]:
    """Return (pairs ordered as the annotator did, pairs); equal scores count as wrong."""
    right = pairs = 0
    for batch, scores in score_groups(model, groups, pad_id):
        chosen, rejected = scores[batch.pairs[:, 0].cpu()], scores[batch.pairs[:, 1].cpu()]
        right += int((chosen > rejected).sum())
        pairs += len(chosen)
    return right, pairs


def flat_scores(model: ScalarModel, groups: Sequence[PreferenceGroup], pad_id: int) -> Tensor:
    """Return the raw scores of all completions of the groups, float [N], in their order."""
    return torch.cat([scores for _, scores in score_groups(model, groups, pad_id)])


def calibrate(scores: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of the raw scores of what the SFT model wrote.

    A reward of 0 then means "an ordinary SFT response", and the KL coefficient keeps its meaning across models.
    """
    return float(scores.mean()), max(float(scores.std(correction=0)), 1e-6)
