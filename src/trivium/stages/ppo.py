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

from trivium.batches import LossOutput, RolloutBatch, select_rows, to_device
from trivium.config import CodeRef, ConfigError, Dial, InputPath, Ref, bounds, load_attribute
from trivium.data.loader import RowLoader
from trivium.data.tokenizer import Tokenizer
from trivium.losses import ppo as losses
from trivium.losses.cross_entropy import head_logprobs_and_entropy
from trivium.losses.logprobs import masked_mean, masked_sum
from trivium.models.adapter_folder import save_adapted
from trivium.models.generate import Generated
from trivium.models.heads import ScalarModel
from trivium.models.lora import adapter_facts, policy_and_reference, trained_copy
from trivium.models.transformer import Transformer
from trivium.rewards.learned import LearnedReward
from trivium.runs.events import read_metrics
from trivium.runs.manifest import Run
from trivium.training.actor_critic import ActorCritic, UpdateConfig
from trivium.training.checkpoint import Checkpointer
from trivium.training.distributed import autocast, check_shares, device_of, over_ranks, share, weight_dtype
from trivium.training.experience import ExperienceConfig, Networks, experience
from trivium.training.parallel import whole
from trivium.training.rollout import (
    PromptSet,
    SampleConfig,
    log_samples,
    room_for_prompt,
    sample_over_ranks,
    show_completion,
    to_tokens,
)
from trivium.training.schedule import lr_scale
from trivium.training.side_text import PtxConfig, SideText, TextBatch, text_objective
from trivium.training.step import train_step


@dataclass(frozen=True, kw_only=True)
class Config(ExperienceConfig, UpdateConfig):
    """The models and how much experience each round brings; the leash and the update are the two parents'."""

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
    save_every: int = 10
    """Rounds between checkpoints."""
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """How completions are sampled."""
    ptx: Dial[PtxConfig] = field(default_factory=PtxConfig)
    """Pre-training text beside the completions, so that the policy does not forget it (PPO-ptx); off at `coef` 0."""
    ptx_corpus: Dial[Ref] = ""
    """With `ptx`: the `train_tokenizer` run whose text that is."""

    def __post_init__(self) -> None:
        """Refuse values outside their range, and a weight on text of which there is none."""
        ExperienceConfig.__post_init__(self)
        UpdateConfig.__post_init__(self)
        bounds(self, iterations=(1, None), batch_size=(2, None), minibatches=(1, self.batch_size), save_every=(1, None))
        if bool(self.ptx) != bool(self.ptx_corpus):
            raise ConfigError(
                f"ptx.coef = {self.ptx.coef}, ptx_corpus = {self.ptx_corpus!r}: one without the other means nothing; "
                'set both (ptx_corpus = "train_tokenizer@latest") or neither'
            )


def objective(
    policy: Transformer, config: Config, batch: RolloutBatch | TextBatch, hidden: Tensor | None = None
) -> LossOutput:
    """Return the summed clipped policy loss of a minibatch, with how much was clipped and the entropy beside it.

    `hidden` [B, T, H]: the policy's hidden states, where they are known already. Text has its own loss (PPO-ptx).
    """
    if isinstance(batch, TextBatch):
        return text_objective(policy, batch)
    if hidden is None:
        hidden = policy(batch.tokens.input_ids, positions=batch.tokens.positions)
    head = policy.lm_head.weight
    logprobs, spread = head_logprobs_and_entropy(hidden, head, batch.tokens.targets, config.sampling.temperature)
    loss = losses.policy_loss(logprobs, batch.old_logprobs, batch.advantages, config.clip_range, batch.mask)
    with torch.no_grad():
        clipped = losses.is_clipped(logprobs, batch.old_logprobs, batch.advantages, config.clip_range)
        approx_kl = losses.kl_k3(batch.old_logprobs, logprobs)
        figures = {"clip_frac": clipped.float(), "entropy": spread, "approx_kl": approx_kl}
    return LossOutput(total=loss.sum(), metrics={name: each[batch.mask].sum() for name, each in figures.items()})


def run(config: Config, run: Run) -> None:
    """Sample, score, shape, update, record; round after round."""
    ppo = Trainer(config, run)
    saver = Checkpointer(run, modules=ppo.modules, optimizers=ppo.optimizers)
    checkpoint = saver.resume()
    if checkpoint:
        ppo.controller.restore(checkpoint.state)
        ppo.trained.guards.restore(checkpoint.state["guards"])
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
                saver.save(round_ + 1, ppo.controller.state() | {"guards": ppo.trained.guards.state()})
            saver.leave_if_asked(round_ + 1)
    with whole(ppo.policy):
        if run.owner:
            ppo.finish()


def value_objective(value_model: ScalarModel, config: Config, batch: RolloutBatch) -> LossOutput:
    """Return the summed clipped squared error of the value model against the returns."""
    values = value_model(batch.tokens.input_ids, positions=batch.tokens.positions)
    loss = losses.value_loss(values, batch.values, batch.returns, config.clip_range_value, batch.mask)
    return LossOutput(total=loss.sum())


def joint_objective(
    policy: Transformer, value_model: ScalarModel, config: Config, batch: RolloutBatch | TextBatch
) -> LossOutput:
    """Return the policy's loss plus the weighted value loss, both read off one pass through the shared trunk."""
    if isinstance(batch, TextBatch):
        return text_objective(policy, batch)
    hidden = policy(batch.tokens.input_ids, positions=batch.tokens.positions)
    acting = objective(policy, config, batch, hidden)
    values = value_model.read(hidden)
    loss = losses.value_loss(values, batch.values, batch.returns, config.clip_range_value, batch.mask).sum()
    parts = {"policy_loss": acting.total, "value_loss": loss}
    return LossOutput(total=acting.total + config.value_weight * loss, metrics=parts | dict(acting.metrics))


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
        if config.shared_trunk:
            self.value = ScalarModel.beside(self.policy)
            objectives = {"policy": partial(joint_objective, self.policy, self.value, config)}
        else:
            self.value = trained_copy(self.reward.model, config.lora, dtype=dtype, seed=run.seed + 1)
            torch.nn.init.zeros_(self.value.score.weight)  # every value starts at 0; only the features are the reward's
            objectives = {"policy": partial(objective, self.policy, config)}
            objectives["value"] = partial(value_objective, self.value, config)
        self.text = SideText(config.ptx, run, "ptx_corpus", self.policy, self.tokenizer)
        self.trained = ActorCritic(self.policy, self.value, objectives, config, run)
        self.modules, self.optimizers = self.trained.modules, self.trained.optimizers
        self.controller = config.controller(config.batch_size)
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
        prompts = [self.prompts.encoded[row] for row in rows]
        tokens = to_tokens(prompts, [g.token_ids for g in generated], self.tokenizer.pad_id)
        return experience(
            to_device(tokens, next(self.policy.parameters()).device),
            scores,
            Networks(policy=self.policy, reference=self.reference, value=self.value),
            self.config,
            self.run.settings,
            kl_coef=self.controller.value,
            temperature=self.config.sampling.temperature,
        )

    def update(self, batch: RolloutBatch, round_: int) -> dict[str, float]:
        """Take `epochs` passes of clipped updates over the round, or fewer, and return the steps' mean metrics."""
        config, trained = self.config, self.trained
        scale = lr_scale(config.optim.schedule, round_, config.iterations)
        take = partial(train_step, lr_scale=scale, precision=autocast(self.run.settings))
        totals, steps = dict[str, float](), 0
        for rows in trained.minibatches(len(batch.scores), seed=self.run.seed * 1_000_003 + round_):
            part = select_rows(batch, share(rows))
            text = self.text.beside(part.num_items, round_ * config.epochs * config.minibatches + steps)
            policy, value = trained.step(take, part, text, round_ + 1)
            unmixed = policy.loss - config.ptx.coef * policy.metrics.get("ptx_loss", 0.0)
            figures = {"policy_loss": unmixed, "value_loss": value.loss, "grad_norm": policy.grad_norm}
            figures |= policy.metrics | {"skipped": float(policy.skipped or value.skipped)}
            totals = {name: totals.get(name, 0.0) + figure for name, figure in figures.items()}
            steps += 1
            # A mean over the tokens of all ranks, so that all of them leave together.
            if 0 < config.max_approx_kl < figures["approx_kl"]:
                break
        self.spend(batch, steps)
        metrics = {"num_steps": float(steps)} if config.max_approx_kl else {}
        return {name: total / steps for name, total in totals.items()} | metrics

    def spend(self, batch: RolloutBatch, steps: int) -> None:
        """Add what a round of so many optimizer steps cost."""
        num_tokens = int((batch.tokens.input_ids != self.tokenizer.pad_id).sum())
        model, context, passes = self.policy.config, batch.mask.shape[1], steps / self.config.minibatches
        # Sampling, reference, old policy, values and score are one forward each; each epoch trains every network.
        flops = 5 * model.flops_per_token(context) + self.trained.flops_per_token(context, passes=passes)
        self.run.spend(tokens=num_tokens, flops=flops * num_tokens)
        self.text.spend(self.run, steps, self.config.lora)

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
            names = ("old_logprobs", "ref_logprobs", "advantages", "values", "rewards")
            show_completion(run, self.tokenizer, batch, names, self.prompts.text(rows[0]), step)
        return kl

    def finish(self) -> None:
        """Save the policy and sum the run up: what was gained, and for how much KL."""
        config, run = self.config, self.run
        curves = read_metrics(run.dir)
        for name, metric in (("score", "rollout/score"), ("kl", "rollout/kl"), ("true_taste", "rollout/true_taste")):
            if metric in curves:
                last = [value for _, value in curves[metric][-5:]]
                run.result(f"rollout_{name}@1", name, sum(last) / len(last), n=len(last) * config.batch_size)
        completions = config.iterations * config.batch_size
        planned = [(0, config.iterations * config.epochs * config.minibatches)]
        run.note(
            steps=int(sum(taken for _, taken in curves.get("train/num_steps", planned))),
            rounds=config.iterations,
            num_parameters=self.policy.config.num_parameters(),
            prompts_too_long=self.prompts.too_long,
            kl_coef=self.controller.value,
            data={"name": ", ".join(config.prompts), "num_prompts": len(self.prompts), "num_completions": completions},
            **adapter_facts(self.policy),
        )
        self.tokenizer.save(run.dir / "model")
        save_adapted(run.dir, self.policy, eos_token_id=self.tokenizer.end_id)
