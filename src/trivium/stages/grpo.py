"""Group-relative policy optimisation: the policy learns from rewards that can be checked, with no value model.

Reads   a chat model (start and frozen reference) and prompts whose meta holds a check, or any reward function
Writes  model/: a chat model; with LoRA its adapters too, in adapter/
Paper   Shao et al. 2024, arXiv 2402.03300; Liu et al. 2025, 2503.20783; RLOO 2402.14740; REINFORCE++ 2501.03262
Watch   rollout/reward rises; rollout/zero_variance_frac is the share of groups that teach nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from trivium.batches import IGNORE, LossOutput, RolloutBatch, select_rows, to_device
from trivium.config import CodeRef, ConfigError, Dial, InputPath, Ref, bounds, one_of
from trivium.data.loader import RowLoader
from trivium.data.tokenizer import Tokenizer
from trivium.losses.cross_entropy import head_logprobs
from trivium.losses.estimators import ESTIMATORS, completion_divisors, round_advantages
from trivium.losses.grpo import grpo
from trivium.losses.logprobs import masked_sum
from trivium.losses.ppo import kl_k1
from trivium.losses.reinforce import rloo
from trivium.models.adapter_folder import save_adapted
from trivium.models.generate import Generated
from trivium.models.lora import LoraConfig, adapter_facts, policy_and_reference, training_flops
from trivium.models.transformer import Transformer
from trivium.rewards.learned import LearnedReward
from trivium.rewards.weighted import WeightedRewards, as_completions
from trivium.runs.events import read_metrics
from trivium.runs.manifest import Run
from trivium.training.checkpoint import Checkpointer
from trivium.training.distributed import autocast, check_shares, device_of, over_ranks, share, weight_dtype
from trivium.training.guard import Guards
from trivium.training.optim import OptimConfig, Optimizer
from trivium.training.parallel import spread, whole
from trivium.training.rollout import (
    PromptSet,
    SampleConfig,
    completion_logprobs,
    log_samples,
    reference_logprobs,
    room_for_prompt,
    rows_over_ranks,
    sample_over_ranks,
    to_tokens,
    token_columns,
)
from trivium.training.schedule import lr_scale
from trivium.training.step import train_step


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is rewarded, and how groups become gradients."""

    policy: Ref = "sft@latest"
    """Where the policy starts; frozen, it is the reference too."""
    prompts: tuple[InputPath, ...] = ()
    """Files of prompts, or code that yields them; `meta` (other columns) holds what the reward needs."""
    options: dict[str, int] = field(default_factory=dict)
    """Passed to code in `prompts`."""
    rewards: dict[CodeRef, float] = field(default_factory=lambda: {"trivium.rewards.verifiable:check_reward": 1.0})
    """`module:attribute` of (prompts, completions) -> rewards, each with its weight."""
    reward_model: Dial[Ref] = ""
    """Its score is added with weight 1; with `rewards = {}` it is the whole reward. Empty: none."""
    iterations: int = 40
    """Rounds of sampling and updating."""
    prompts_per_round: int = 16
    """Different prompts in a round."""
    group_size: int = 8
    """Completions of each prompt."""
    minibatches: int = 2
    """Optimizer steps per round; one pass over its completions."""
    estimator: str = "grpo"
    """`grpo`, `rloo` (less the mean of the group's others) or `reinforce++` (normalised over the round, any group)."""
    scale: str = "std"
    """`std` divides by the group's standard deviation; `none`, with `constant` below, is Dr. GRPO. `grpo` only."""
    aggregate: str = "token"
    """What weighs the same: `token`, `completion`, or `constant` (sum / max_new_tokens each); `rloo` sums each."""
    beta: float = 0.02
    """Weight of the KL to the reference (nats): `grpo` has it in the loss (k3 times ratio), others in the reward."""
    clip_range: float = 0.2
    """How far the ratio of new to old probability may move before its gradient stops."""
    save_every: int = 10
    """Rounds between checkpoints."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, weight_decay=0.0))
    """Optimizer."""
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """How completions are sampled."""
    lora: Dial[LoraConfig] = field(default_factory=LoraConfig)
    """Low-rank adapters instead of the whole network; rank 0 means none."""

    def __post_init__(self) -> None:
        """Refuse values outside their range, and what would be ignored; a group of one has no baseline."""
        one_of(self, estimator=tuple(ESTIMATORS), scale=("std", "none"), aggregate=("token", "completion", "constant"))
        smallest = 1 if self.estimator == "reinforce++" else 2
        bounds(self, iterations=(1, None), prompts_per_round=(1, None), minibatches=(1, None), save_every=(1, None))
        bounds(self, beta=(0, None), clip_range=(1e-4, 1), group_size=(smallest, None))
        refuse_meaningless(self)


def objective(policy: Transformer, config: Config, batch: RolloutBatch) -> LossOutput:
    """Return the summed loss of a minibatch: the clipped ratio times the advantage, plus what KL the loss holds."""
    hidden = policy(batch.tokens.input_ids, positions=batch.tokens.positions)
    logprobs = head_logprobs(hidden, policy.lm_head.weight, batch.tokens.targets, config.sampling.temperature)
    new, old, ref, advantages = logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages
    if config.estimator == "rloo":
        loss = rloo(new, old, advantages, config.clip_range, batch.mask).unsqueeze(-1)
    else:
        beta = config.beta if config.estimator == "grpo" else 0.0  # the others have it in the reward
        loss = grpo(new, old, ref, advantages, config.clip_range, beta, batch.mask)
    return LossOutput(total=loss.sum() if batch.divisors is None else (loss.sum(-1) / batch.divisors).sum())


def run(config: Config, run: Run) -> None:
    """Sample groups, check them, compare within the group, update; round after round."""
    grpo = Trainer(config, run)
    saver = Checkpointer(run, modules=grpo.modules, optimizers=grpo.optimizers)
    checkpoint = saver.resume()
    start = checkpoint.step if checkpoint else 0
    grpo.guards.restore(checkpoint.state.get("guards", {}) if checkpoint else {})
    with saver, run.progress("rounds", config.iterations - start) as advance:
        for round_ in range(start, config.iterations):
            saver.check()
            with whole(grpo.policy):
                rows, generated = grpo.sample(round_)
                rewards = grpo.reward(rows, generated)
                batch = grpo.shape(rows, generated, rewards)
            loss = grpo.update(batch, round_)
            grpo.record(batch, rows, generated, loss, round_ + 1)
            advance(reward=float(rewards.mean()))
            if saver.is_due(round_ + 1, config.save_every, config.iterations):
                saver.save(round_ + 1, {"guards": grpo.guards.state()})
            saver.leave_if_asked(round_ + 1)
    with whole(grpo.policy):
        if run.owner:
            grpo.finish()


def refuse_meaningless(config: Config) -> None:
    """Raise ConfigError where nothing is rewarded, or for a setting that the estimator would ignore."""
    if not (config.rewards or config.reward_model):
        raise ConfigError("rewards = {}: name a reward, or a reward_model")
    for name in ("scale", "aggregate"):
        value = getattr(config, name)
        if value != getattr(Config, name) and name not in ESTIMATORS[config.estimator]:
            raise ConfigError(f"{name} = {value!r}: means nothing to estimator = {config.estimator!r}; leave it out")


class Trainer:
    """Policy and reference, and what is done with them each round."""

    def __init__(self, config: Config, run: Run) -> None:
        """Load the models, the prompts and the rewards."""
        self.config, self.run = config, run
        device, dtype = device_of(run.settings), weight_dtype(run.settings)
        folder = run.model("policy")
        self.tokenizer = Tokenizer.load(folder)
        self.policy, self.reference = policy_and_reference(
            folder, config.lora, device=device, dtype=dtype, seed=run.seed
        )
        self.modules = {"policy": self.policy}
        self.objective = spread(self.policy, partial(objective, self.policy, config), run.settings)
        self.optimizers = {"policy": Optimizer(self.policy, config.optim)}
        self.guards = Guards(run, self.modules)
        learned = [LearnedReward.from_folder(run.model("reward_model"), device=device)] if config.reward_model else []
        self.rewards = WeightedRewards(config.rewards, learned)
        self.stop = frozenset({self.tokenizer.end_id, self.tokenizer.eos_id})
        longest = room_for_prompt(self.policy, config.sampling)
        self.prompts = PromptSet(run, self.tokenizer, config.prompts, config.options, longest=longest)
        self.loader = RowLoader(len(self.prompts), min(config.prompts_per_round, len(self.prompts)), run.seed)
        groups = torch.arange(self.loader.batch_size).chunk(config.minibatches)
        smallest = {"the smallest minibatch": len(groups[-1]) * config.group_size}
        check_shares(prompts_per_round=self.loader.batch_size, **smallest)

    def sample(self, round_: int) -> tuple[list[int], list[Generated]]:
        """Return the prompt of each completion (a group is consecutive) and the sampled completions."""
        rows = [row for row in self.loader.rows(round_) for _ in range(self.config.group_size)]
        encoded = [self.prompts.encoded[row] for row in rows]
        seed = self.run.seed * 1_000_003 + round_
        sampling, group = self.config.sampling, self.config.group_size
        return rows, sample_over_ranks(self.policy, encoded, sampling, stop_ids=self.stop, seed=seed, group=group)

    def reward(self, rows: Sequence[int], generated: Sequence[Generated]) -> Tensor:
        """Return the weighted sum of the rewards, float [N]; each rank asks for those of its groups, once."""
        prompts = [self.prompts.prompts[row] for row in rows]
        completions = as_completions(prompts, generated, self.tokenizer, self.run.id)

        def compute(chosen: list[int]) -> Tensor:
            return self.rewards([prompts[i] for i in chosen], [completions[i] for i in chosen])

        return over_ranks(len(rows), compute, group=self.config.group_size)

    def shape(self, rows: Sequence[int], generated: Sequence[Generated], rewards: Tensor) -> RolloutBatch:
        """Return the round as tensors; advantages are those of the whole round, before it is split."""
        config, device = self.config, next(self.policy.parameters()).device
        prompts = [self.prompts.encoded[row] for row in rows]
        tokens = to_device(to_tokens(prompts, [g.token_ids for g in generated], self.tokenizer.pad_id), device)
        mask = tokens.targets != IGNORE
        temperature = config.sampling.temperature
        with autocast(self.run.settings):
            old = rows_over_ranks(tokens, partial(completion_logprobs, self.policy, temperature=temperature))
            reference = rows_over_ranks(tokens, partial(reference_logprobs, self.reference, temperature=temperature))
        kl, inside = kl_k1(old, reference).cpu(), mask.cpu()  # there a sum by groups is the same every time
        shaping = config.estimator, config.group_size, config.scale, config.beta
        advantages = round_advantages(rewards, kl, inside, *shaping)
        nothing = torch.zeros_like(old)
        return RolloutBatch(
            tokens=tokens,
            mask=mask,
            old_logprobs=old,
            ref_logprobs=reference,
            scores=rewards.to(device),
            advantages=advantages.to(device),
            returns=nothing,
            values=nothing,
            rewards=nothing,
            divisors=completion_divisors(config.estimator, config.aggregate, mask, config.sampling.max_new_tokens),
        )

    def update(self, batch: RolloutBatch, round_: int) -> float:
        """Take one pass over the round, group by group, and return the mean loss per token."""
        config = self.config
        scale = lr_scale(config.optim.schedule, round_, config.iterations)
        losses, skipped = [], 0
        groups = torch.arange(len(batch.scores)).view(-1, config.group_size)
        generator = torch.Generator().manual_seed(self.run.seed * 1_000_003 + round_)
        for part in torch.randperm(len(groups), generator=generator).chunk(config.minibatches):
            rows = groups[part].flatten()
            result = train_step(
                self.objective,
                [select_rows(batch, share(rows))],
                self.optimizers["policy"],
                lr_scale=scale,
                precision=autocast(self.run.settings),
            )
            losses.append(self.guards.take("policy", result, round_ + 1).loss)
            skipped += result.skipped
        if skipped:
            self.run.metric("train/skipped", skipped, round_ + 1)
        num_tokens = int((batch.tokens.input_ids != self.tokenizer.pad_id).sum())
        model, context = self.policy.config, batch.mask.shape[1]
        # Sampling, old and reference are one forward each, the update three (fewer with adapters).
        flops = 3 * model.flops_per_token(context) + training_flops(model, context, config.lora)
        self.run.spend(tokens=num_tokens, flops=flops * num_tokens)
        return sum(losses) / len(losses)

    def record(
        self, batch: RolloutBatch, rows: Sequence[int], generated: Sequence[Generated], loss: float, step: int
    ) -> None:
        """Log the round and keep a few of its completions."""
        scores = batch.scores.view(-1, self.config.group_size)
        figures = {
            "rollout/reward": float(batch.scores.mean()),
            "rollout/kl": float(masked_sum(batch.old_logprobs - batch.ref_logprobs, batch.mask).mean()),
            "rollout/length": sum(len(g.token_ids) for g in generated) / len(generated),
            "train/loss": loss,
        }
        if self.config.estimator != "reinforce++":  # which compares with the round, not within the group
            figures["rollout/zero_variance_frac"] = float((scores.amax(1) == scores.amin(1)).float().mean())
        for name, value in figures.items():
            self.run.metric(name, value, step)
        texts = [self.tokenizer.decode(g.token_ids) for g in generated]
        log_samples(self.run, self.prompts, rows, texts, batch.scores, step)
        if step % max(1, self.config.iterations // 20) == 0:
            columns = token_columns(self.tokenizer, batch, 0, ("old_logprobs", "ref_logprobs", "advantages"))
            columns["logprobs"] = columns.pop("old_logprobs")
            self.run.specimen(
                "rollout", {"prompt": self.prompts.text(rows[0]), "score": float(scores[0, 0])} | columns, step
            )

    def finish(self) -> None:
        """Save the policy and sum the run up."""
        config, run = self.config, self.run
        curves = read_metrics(run.dir)
        for name, metric in (("reward", "rollout/reward"), ("kl", "rollout/kl")):
            last = [value for _, value in curves[metric][-5:]]
            run.result(
                f"rollout_{name}@1",
                name,
                sum(last) / len(last),
                n=len(last) * self.loader.batch_size * config.group_size,
            )
        completions = config.iterations * self.loader.batch_size * config.group_size
        run.note(
            steps=config.iterations * config.minibatches,
            rounds=config.iterations,
            num_parameters=self.policy.config.num_parameters(),
            prompts_too_long=self.prompts.too_long,
            data={"name": ", ".join(config.prompts), "num_prompts": len(self.prompts), "num_completions": completions},
            **adapter_facts(self.policy),
        )
        self.tokenizer.save(run.dir / "model")
        save_adapted(run.dir, self.policy, eos_token_id=self.tokenizer.end_id)
