"""Proximal policy optimisation: the policy is moved towards what the reward model prefers, on a leash of KL to the SFT.

Reads   the SFT model (start and frozen reference), a reward model, prompts
Writes  model/: the aligned chat model; with LoRA its adapters too, in adapter/
Paper   Schulman 2017, arXiv 1707.06347; Ouyang 2022, arXiv 2203.02155, eq. 2; Huang 2024, arXiv 2403.17031 (details)
Watch   rollout/score rises at a bounded rollout/kl, and rollout/true_taste with it: alone, it is over-optimisation
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from trivium.batches import IGNORE, LossOutput, RolloutBatch, select_rows, to_device
from trivium.config import CodeRef, ConfigError, Dial, InputPath, Ref, bounds, load_attribute
from trivium.data.loader import RowLoader
from trivium.data.tokenizer import Tokenizer
from trivium.losses import ppo as losses
from trivium.losses.logprobs import entropy, masked_mean, masked_sum, token_logprobs, whiten
from trivium.models.adapter_folder import save_adapted
from trivium.models.generate import Generated
from trivium.models.heads import ScalarModel
from trivium.models.lora import LoraConfig, adapter_facts, policy_and_reference, trained_copy, training_flops
from trivium.models.transformer import Transformer
from trivium.rewards.learned import LearnedReward
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
    token_values,
)
from trivium.training.schedule import lr_scale
from trivium.training.step import train_step


@dataclass(frozen=True, kw_only=True)
class Config:
    """The leash, the clip, and how much experience each update sees."""

    policy: Ref = "sft@latest"
    """Where the policy starts; frozen, it is the reference too."""
    reward_model: Ref = "reward_model@latest"
    """Scores completions; its backbone also starts the value model (InstructGPT, appendix C.4)."""
    prompts: tuple[InputPath, ...] = ()
    """Files of prompts, or code that yields them."""
    options: dict[str, int] = field(default_factory=dict)
    """Passed to code in `prompts`."""
    judge: CodeRef = ""
    """`module:attribute` of (prompt, text) -> float, recorded beside the score and never trained on."""
    iterations: int = 60
    """Rounds of sampling and updating."""
    batch_size: int = 64
    """Completions per round."""
    epochs: int = 2
    """Passes over each round's completions."""
    minibatches: int = 2
    """Optimizer steps per pass."""
    kl_coef: float = 0.05
    """Weight of the per-token KL (k1, nats) in the reward; where it starts when a target is set."""
    kl_target: float = 0.0
    """KL per completion (nats) that the adaptive controller holds; 0 keeps `kl_coef` fixed."""
    clip_range: float = 0.2
    """How far the ratio of new to old probability may move before its gradient stops."""
    clip_range_value: float = 0.2
    """How far a value may move from its old estimate."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    missing_eos_penalty: float = 1.0
    """Taken off the score of a completion that was cut at the length limit."""
    save_every: int = 10
    """Rounds between checkpoints."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, weight_decay=0.0))
    """Optimizer of policy and value model."""
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """How completions are sampled."""
    lora: Dial[LoraConfig] = field(default_factory=LoraConfig)
    """Low-rank adapters for policy and value model, on frozen weights; rank 0 means none."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        bounds(self, iterations=(1, None), batch_size=(2, None), epochs=(1, None), minibatches=(1, self.batch_size))
        bounds(self, kl_coef=(0, None), kl_target=(0, None), clip_range=(1e-4, 1), gamma=(0, 1), lam=(0, 1))
        bounds(self, missing_eos_penalty=(0, None), save_every=(1, None))


def objective(policy: Transformer, config: Config, batch: RolloutBatch) -> LossOutput:
    """Return the summed clipped policy loss of a minibatch, with how much was clipped and the entropy beside it."""
    logits = policy.logits(policy(batch.tokens.input_ids, positions=batch.tokens.positions))
    logprobs = token_logprobs(logits, batch.tokens.targets, config.sampling.temperature)
    loss = losses.policy_loss(logprobs, batch.old_logprobs, batch.advantages, config.clip_range, batch.mask)
    with torch.no_grad():
        clipped = losses.is_clipped(logprobs, batch.old_logprobs, batch.advantages, config.clip_range)
        figures = {"clip_frac": clipped.float(), "entropy": entropy(logits, config.sampling.temperature)}
        figures["approx_kl"] = losses.kl_k3(batch.old_logprobs, logprobs)
    return LossOutput(total=loss.sum(), metrics={name: each[batch.mask].sum() for name, each in figures.items()})


def run(config: Config, run: Run) -> None:
    """Sample, score, shape, update, record; round after round."""
    ppo = Trainer(config, run)
    saver = Checkpointer(run, modules=ppo.modules, optimizers=ppo.optimizers)
    checkpoint = saver.resume()
    ppo.controller.value = checkpoint.state["kl_coef"] if checkpoint else config.kl_coef
    ppo.guards.restore(checkpoint.state.get("guards", {}) if checkpoint else {})
    start = checkpoint.step if checkpoint else 0
    with saver, run.progress("rounds", config.iterations - start) as advance:
        for round_ in range(start, config.iterations):
            saver.check()
            with whole(ppo.policy, ppo.value):
                prompts, generated = ppo.sample(round_)
                batch = ppo.shape(prompts, generated, ppo.score(prompts, generated))
            metrics = ppo.update(batch, round_)
            kl = ppo.record(batch, prompts, generated, metrics, round_ + 1)
            ppo.controller.update(kl, config.batch_size)
            advance(score=float(batch.scores.mean()), kl=kl)
            if saver.is_due(round_ + 1, config.save_every, config.iterations):
                saver.save(round_ + 1, {"kl_coef": ppo.controller.value, "guards": ppo.guards.state()})
            saver.leave_if_asked(round_ + 1)
    with whole(ppo.policy):
        if run.owner:
            ppo.finish()


def value_objective(value_model: ScalarModel, config: Config, batch: RolloutBatch) -> LossOutput:
    """Return the summed clipped squared error of the value model against the returns."""
    values = value_model(batch.tokens.input_ids, positions=batch.tokens.positions)
    loss = losses.value_loss(values, batch.values, batch.returns, config.clip_range_value, batch.mask)
    return LossOutput(total=loss.sum())


class Trainer:
    """The four models of PPO and what is done with them each round."""

    def __init__(self, config: Config, run: Run) -> None:
        """Load the models and the prompts; raises UserError when there are none."""
        self.config, self.run = config, run
        check_shares(**{"batch_size / minibatches": config.batch_size // config.minibatches})
        device, dtype = device_of(run.settings), weight_dtype(run.settings)
        base = run.model("policy")
        self.tokenizer = Tokenizer.load(base)
        if Tokenizer.load(run.model("reward_model")).fingerprint != self.tokenizer.fingerprint:
            raise ConfigError(f"{run.id}: policy and reward model have different tokenizers; train one from the other")
        self.policy, self.reference = policy_and_reference(base, config.lora, device=device, dtype=dtype, seed=run.seed)
        self.reward = LearnedReward.from_folder(run.model("reward_model"), pad_id=self.tokenizer.pad_id, device=device)
        self.value = trained_copy(self.reward.model, config.lora, dtype=dtype, seed=run.seed + 1)
        torch.nn.init.zeros_(self.value.score.weight)  # every value starts at 0; only the features are the reward's
        self.modules = {"policy": self.policy, "value": self.value}
        self.objectives = {
            "policy": spread(self.policy, partial(objective, self.policy, config), run.settings),
            "value": spread(self.value, partial(value_objective, self.value, config), run.settings),
        }
        self.optimizers = {name: Optimizer(module, config.optim) for name, module in self.modules.items()}
        self.guards = Guards(run, self.modules)
        self.controller = losses.AdaptiveKL(config.kl_coef, config.kl_target or None, horizon=10 * config.batch_size)
        self.judge = load_attribute(config.judge) if config.judge else None
        self.stop = frozenset({self.tokenizer.end_id, self.tokenizer.eos_id})
        longest = room_for_prompt(self.policy, config.sampling)
        self.prompts = PromptSet(run, self.tokenizer, config.prompts, config.options, longest=longest)
        self.loader = RowLoader(len(self.prompts), config.batch_size, run.seed)

    def sample(self, round_: int) -> tuple[list[int], list[Generated]]:
        """Return which prompts this round uses and one completion of each, sampled from the policy."""
        rows = self.loader.rows(round_)
        encoded = [self.prompts.encoded[row] for row in rows]
        seed = self.run.seed * 1_000_003 + round_
        return rows, sample_over_ranks(self.policy, encoded, self.config.sampling, stop_ids=self.stop, seed=seed)

    def score(self, rows: Sequence[int], generated: Sequence[Generated]) -> Tensor:
        """Return the reward model's calibrated scores [B]; unfinished completions are penalised."""
        ids = [self.prompts.encoded[row] + list(g.token_ids) for row, g in zip(rows, generated, strict=True)]
        finished = torch.tensor([g.finish_reason == "stop" for g in generated])
        scores = over_ranks(len(ids), lambda part: torch.tensor(self.reward.score_ids([ids[row] for row in part])))
        return losses.penalise_unfinished(scores, finished, self.config.missing_eos_penalty)

    def shape(self, rows: Sequence[int], generated: Sequence[Generated], scores: Tensor) -> RolloutBatch:
        """Return the round as tensors: reference log-probabilities, KL in the reward, values, advantages, returns."""
        config, device = self.config, next(self.policy.parameters()).device
        prompts = [self.prompts.encoded[row] for row in rows]
        tokens = to_tokens(prompts, [g.token_ids for g in generated], self.tokenizer.pad_id)
        tokens, mask = to_device(tokens, device), (tokens.targets != IGNORE).to(device)
        temperature = config.sampling.temperature
        with autocast(self.run.settings):
            old = rows_over_ranks(tokens, partial(completion_logprobs, self.policy, temperature=temperature))
            reference = rows_over_ranks(tokens, partial(reference_logprobs, self.reference, temperature=temperature))
            values = rows_over_ranks(tokens, partial(token_values, self.value)).masked_fill(~mask, 0.0)
        rewards = losses.shape_rewards(scores.to(device), losses.kl_k1(old, reference), mask, self.controller.value)
        advantages, returns = losses.gae(rewards, values, mask, config.gamma, config.lam)
        return RolloutBatch(
            tokens=tokens,
            mask=mask,
            old_logprobs=old,
            ref_logprobs=reference,
            returns=returns,
            values=values,
            advantages=whiten(advantages, mask),
            rewards=rewards,
            scores=scores.to(device),
        )

    def update(self, batch: RolloutBatch, round_: int) -> dict[str, float]:
        """Take `epochs` passes of clipped updates over the round and return their mean metrics."""
        config = self.config
        scale = lr_scale(config.optim.schedule, round_, config.iterations)
        totals, steps = dict[str, float](), 0
        generator = torch.Generator().manual_seed(self.run.seed * 1_000_003 + round_)
        for _ in range(config.epochs):
            for rows in torch.randperm(len(batch.scores), generator=generator).tensor_split(config.minibatches):
                part = select_rows(batch, share(rows))
                step = partial(train_step, lr_scale=scale, precision=autocast(self.run.settings))
                took = {name: step(self.objectives[name], [part], self.optimizers[name]) for name in self.modules}
                policy, value = (self.guards.take(name, result, round_ + 1) for name, result in took.items())
                figures = {"policy_loss": policy.loss, "value_loss": value.loss, "grad_norm": policy.grad_norm}
                figures |= policy.metrics | {"skipped": float(policy.skipped or value.skipped)}
                for name, figure in figures.items():
                    totals[name] = totals.get(name, 0.0) + figure
                steps += 1
        num_tokens = int((batch.tokens.input_ids != self.tokenizer.pad_id).sum())
        model, context = self.policy.config, batch.mask.shape[1]
        # Sampling, reference, old policy, values and score are one forward each; each epoch trains two networks.
        flops = 5 * model.flops_per_token(context) + 2 * config.epochs * training_flops(model, context, config.lora)
        self.run.spend(tokens=num_tokens, flops=flops * num_tokens)
        return {name: total / steps for name, total in totals.items()}

    def record(
        self, batch: RolloutBatch, rows: list[int], generated: Sequence[Generated], metrics: dict[str, float], step: int
    ) -> float:
        """Log the round and return its mean KL per completion (nats)."""
        run = self.run
        kl = float(masked_sum(batch.old_logprobs - batch.ref_logprobs, batch.mask).mean())
        sampled = torch.tensor([logprob for g in generated for logprob in g.logprobs])
        gap = (sampled - batch.old_logprobs[batch.mask].cpu()).abs().max()
        figures = {
            "rollout/score": float(batch.scores.mean()),
            "rollout/kl": kl,
            "rollout/length": sum(len(g.token_ids) for g in generated) / len(generated),
            "rollout/unfinished_frac": sum(g.finish_reason != "stop" for g in generated) / len(generated),
            "rollout/logprob_gap": float(gap),
            "rollout/value": float(masked_mean(batch.values, batch.mask)),
            "train/kl_coef": self.controller.value,
        } | {f"train/{name}": value for name, value in metrics.items()}
        texts = [self.tokenizer.decode(g.token_ids) for g in generated]
        if self.judge and run.owner:
            tastes = [self.judge(self.prompts.prompts[row], text) for row, text in zip(rows, texts, strict=True)]
            figures["rollout/true_taste"] = sum(tastes) / len(tastes)
        for name, value in figures.items():
            run.metric(name, value, step)
        log_samples(run, self.prompts, rows, texts, batch.scores, step)
        if step % max(1, self.config.iterations // 20) == 0:
            self.show(batch, rows[0], step)
        return kl

    def show(self, batch: RolloutBatch, prompt: int, step: int) -> None:
        """Keep the round's first completion token by token, for the walkthrough."""
        names = ("old_logprobs", "ref_logprobs", "advantages", "values", "rewards")
        columns = token_columns(self.tokenizer, batch, 0, names)
        columns["logprobs"] = columns.pop("old_logprobs")
        kl = (batch.old_logprobs - batch.ref_logprobs)[0][batch.mask[0]]
        facts = {"prompt": self.prompts.text(prompt), "score": float(batch.scores[0])}
        self.run.specimen("rollout", facts | columns | {"kl": [round(x, 4) for x in kl.tolist()]}, step)

    def finish(self) -> None:
        """Save the policy and sum the run up: what was gained, and for how much KL."""
        config, run = self.config, self.run
        curves = read_metrics(run.dir)
        for name, metric in (("score", "rollout/score"), ("kl", "rollout/kl"), ("true_taste", "rollout/true_taste")):
            if metric in curves:
                last = [value for _, value in curves[metric][-5:]]
                run.result(f"rollout_{name}@1", name, sum(last) / len(last), n=len(last) * config.batch_size)
        completions = config.iterations * config.batch_size
        run.note(
            steps=config.iterations * config.epochs * config.minibatches,
            rounds=config.iterations,
            num_parameters=self.policy.config.num_parameters(),
            prompts_too_long=self.prompts.too_long,
            kl_coef=self.controller.value,
            data={"name": ", ".join(config.prompts), "num_prompts": len(self.prompts), "num_completions": completions},
            **adapter_facts(self.policy),
        )
        self.tokenizer.save(run.dir / "model")
        save_adapted(run.dir, self.policy, eos_token_id=self.tokenizer.end_id)
