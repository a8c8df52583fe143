"""Rejection sampling: the policy answers each prompt many times, a reward picks the best, and that is what it learns.

Reads   the SFT model (start, and what KL is measured from), a reward model, prompts
Writes  model/: a chat model; with LoRA its adapters too, in adapter/
Paper   Dong et al. 2023, RAFT, arXiv 2304.06767, algorithm 1; Touvron et al. 2023, Llama 2, 2307.09288, section 3.2.3
Watch   rollout/picked_score less rollout/score: what a round has to teach; nothing holds rollout/kl but their number

Left out: the KL that RAFT may take off the reward, and Llama 2's picking among the samples of earlier rounds, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from trivium.batches import IGNORE, LossOutput, TokenBatch, select_rows, to_device
from trivium.config import CodeRef, ConfigError, Dial, InputPath, Ref, bounds, load_attribute
from trivium.data.loader import RowLoader
from trivium.data.tokenizer import Tokenizer
from trivium.evals.stats import mean_interval
from trivium.losses.cross_entropy import head_cross_entropy
from trivium.losses.ppo import penalise_unfinished
from trivium.models.adapter_folder import save_adapted
from trivium.models.generate import Generated
from trivium.models.lora import LoraConfig, adapter_facts, policy_and_reference, training_flops
from trivium.models.transformer import Transformer
from trivium.rewards.learned import LearnedReward
from trivium.rewards.selection import picked_rows
from trivium.runs.events import read_metrics
from trivium.runs.manifest import Run
from trivium.training.checkpoint import Checkpointer
from trivium.training.distributed import autocast, check_shares, device_of, over_ranks, share, weight_dtype
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
)
from trivium.training.schedule import lr_scale
from trivium.training.step import StepResult, train_step


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much is sampled, what of it is picked, and how long the policy learns from that."""

    policy: Ref = "sft@latest"
    """Where the policy starts; frozen, it is what KL is measured from."""
    reward_model: Ref = "reward_model@latest"
    """Scores completions."""
    prompts: tuple[InputPath, ...] = ()
    """Files of prompts, or code that yields them."""
    options: dict[str, int] = field(default_factory=dict)
    """Passed to code in `prompts`."""
    judge: CodeRef = ""
    """`module:attribute` of (prompt, text) -> float, recorded beside the score and never trained on."""
    rounds: int = 2
    """Rounds of sampling, from the newest policy, and learning."""
    prompts_per_round: int = 128
    """Different prompts in a round."""
    num_samples: int = 8
    """Completions of each prompt."""
    num_picked: int = 1
    """How many of them, the best by score, are learned."""
    min_score: float | None = None
    """Of these, only those that score at least this; none: all."""
    epochs: int = 2
    """Passes over what a round picked."""
    minibatches: int = 8
    """Optimizer steps per pass."""
    missing_eos_penalty: float = 1.0
    """Taken off the score of a completion that was cut at the length limit."""
    save_every: int = 1
    """Rounds between checkpoints."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-4, weight_decay=0.0))
    """Optimizer; the schedule runs over the steps of all rounds."""
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """How completions are sampled."""
    lora: Dial[LoraConfig] = field(default_factory=LoraConfig)
    """Low-rank adapters instead of the whole network; rank 0 means none."""

    def __post_init__(self) -> None:
        """Refuse values outside their range; picking all of the samples would be no selection."""
        bounds(self, rounds=(1, None), prompts_per_round=(1, None), num_samples=(2, None), epochs=(1, None))
        most = self.num_samples if self.min_score is not None else self.num_samples - 1
        bounds(self, num_picked=(1, most), minibatches=(1, self.prompts_per_round * self.num_picked))
        bounds(self, missing_eos_penalty=(0, None), save_every=(1, None))


def objective(policy: Transformer, batch: TokenBatch) -> LossOutput:
    """Return the summed cross-entropy (nats) of the picked completions' tokens, their end included."""
    hidden = policy(batch.input_ids, positions=batch.positions)
    return LossOutput(total=head_cross_entropy(hidden, policy.lm_head.weight, batch.targets).sum())


def run(config: Config, run: Run) -> None:
    """Sample, score, pick, record, learn; round after round."""
    trainer = Trainer(config, run)
    saver = Checkpointer(run, modules=trainer.modules, optimizers=trainer.optimizers)
    checkpoint = saver.resume()
    start = checkpoint.step if checkpoint else 0
    with saver, run.progress("rounds", config.rounds - start) as advance:
        for round_ in range(start, config.rounds):
            saver.check()
            with whole(trainer.policy):
                rows, generated = trainer.sample(round_)
                scores = trainer.score(rows, generated)
                kl = trainer.kl(rows, generated)
            picked = picked_rows(scores, config.num_samples, config.num_picked, config.min_score)
            trainer.show(rows, generated, scores, picked, round_ + 1)
            learned = trainer.learn(rows, generated, picked, round_)
            trainer.record(rows, generated, scores, picked, {"rollout/kl": float(kl.mean())} | learned, round_ + 1)
            advance(score=float(scores.mean()))
            if saver.is_due(round_ + 1, config.save_every, config.rounds):
                saver.save(round_ + 1)
            saver.leave_if_asked(round_ + 1)
    with whole(trainer.policy):
        trainer.finish()


def own_rows(batch: TokenBatch, rows: Tensor) -> TokenBatch:
    """Return this rank's share of the rows; where there are fewer rows than ranks, one that trains nothing."""
    mine = share(rows)
    if len(mine):
        return select_rows(batch, mine)
    spare = select_rows(batch, rows[:1])
    return dataclasses.replace(spare, targets=torch.full_like(spare.targets, IGNORE))


class Trainer:
    """Policy, reference and reward, and what is done with them each round."""

    def __init__(self, config: Config, run: Run) -> None:
        """Load the models and the prompts; raises UserError when there are none."""
        self.config, self.run = config, run
        self.device, dtype = device_of(run.settings), weight_dtype(run.settings)
        folder = run.model("policy")
        self.tokenizer = Tokenizer.load(folder)
        if Tokenizer.load(run.model("reward_model")).fingerprint != self.tokenizer.fingerprint:
            raise ConfigError(f"{run.id}: policy and reward model have different tokenizers; train one from the other")
        self.policy, self.reference = policy_and_reference(
            folder, config.lora, device=self.device, dtype=dtype, seed=run.seed
        )
        pad_id = self.tokenizer.pad_id
        self.reward = LearnedReward.from_folder(run.model("reward_model"), pad_id=pad_id, device=self.device)
        self.modules = {"policy": self.policy}
        self.objective = spread(self.policy, partial(objective, self.policy), run.settings)
        self.optimizers = {"policy": Optimizer(self.policy, config.optim)}
        self.judge = load_attribute(config.judge) if config.judge else None
        self.stop = frozenset({self.tokenizer.end_id, self.tokenizer.eos_id})
        longest = room_for_prompt(self.policy, config.sampling)
        self.prompts = PromptSet(run, self.tokenizer, config.prompts, config.options, longest=longest)
        self.loader = RowLoader(len(self.prompts), min(config.prompts_per_round, len(self.prompts)), run.seed)
        check_shares(prompts_per_round=self.loader.batch_size)

    def sample(self, round_: int, num: int = 0) -> tuple[list[int], list[Generated]]:
        """Return the prompt of each completion and the completions: `num` neighbours (0: as configured) per prompt."""
        num = num or self.config.num_samples
        # Round 0's prompts are looked at once more after the last round: what is compared then is not the prompts.
        rows = [row for row in self.loader.rows(round_ % self.config.rounds) for _ in range(num)]
        encoded = [self.prompts.encoded[row] for row in rows]
        seed, sampling = self.run.seed * 1_000_003 + round_, self.config.sampling
        return rows, sample_over_ranks(self.policy, encoded, sampling, stop_ids=self.stop, seed=seed, group=num)

    def score(self, rows: Sequence[int], generated: Sequence[Generated]) -> Tensor:
        """Return the reward model's calibrated scores [N]; unfinished completions are penalised."""
        ids = [self.prompts.encoded[row] + list(g.token_ids) for row, g in zip(rows, generated, strict=True)]
        finished = torch.tensor([g.finish_reason == "stop" for g in generated])
        scores = over_ranks(len(ids), lambda part: torch.tensor(self.reward.score_ids([ids[row] for row in part])))
        return penalise_unfinished(scores, finished, self.config.missing_eos_penalty)

    def kl(self, rows: Sequence[int], generated: Sequence[Generated]) -> Tensor:
        """Return log policy - log reference (nats) of the first completion of each prompt [P]: k1, summed."""
        first = [i for i in range(len(rows)) if i == 0 or rows[i] != rows[i - 1]]
        tokens = self.tokens(rows, generated, first)
        temperature = self.config.sampling.temperature
        with autocast(self.run.settings):
            ours = rows_over_ranks(tokens, partial(completion_logprobs, self.policy, temperature=temperature))
            theirs = rows_over_ranks(tokens, partial(reference_logprobs, self.reference, temperature=temperature))
        return (ours - theirs).sum(-1).cpu()

    def tokens(self, rows: Sequence[int], generated: Sequence[Generated], chosen: Sequence[int]) -> TokenBatch:
        """Return the chosen completions after their prompts, with targets on the completions only."""
        prompts = [self.prompts.encoded[rows[i]] for i in chosen]
        batch = to_tokens(prompts, [generated[i].token_ids for i in chosen], self.tokenizer.pad_id)
        return to_device(batch, self.device)

    def learn(
        self, rows: Sequence[int], generated: Sequence[Generated], picked: Sequence[int], round_: int
    ) -> dict[str, float]:
        """Take `epochs` passes over what was picked and return their mean figures; none where nothing was."""
        config, model = self.config, self.policy.config
        sampled = sum(len(self.prompts.encoded[row]) + len(g.token_ids) for row, g in zip(rows, generated, strict=True))
        self.run.spend(tokens=sampled, flops=2 * model.flops_per_token(128) * sampled)  # sampling and score
        if not picked:
            return {}
        batch = self.tokens(rows, generated, picked)
        generator = torch.Generator().manual_seed(self.run.seed * 1_000_003 + round_)
        schedule, total = config.optim.schedule, config.rounds * config.epochs * config.minibatches
        results: list[StepResult] = []
        for epoch in range(round_ * config.epochs, (round_ + 1) * config.epochs):
            parts = torch.randperm(len(picked), generator=generator).tensor_split(min(config.minibatches, len(picked)))
            for number, part in enumerate(parts):
                scale = lr_scale(schedule, epoch * config.minibatches + number, total)
                step = partial(train_step, lr_scale=scale, precision=autocast(self.run.settings))
                results.append(step(self.objective, [own_rows(batch, part)], self.optimizers["policy"]))
        trained = config.epochs * int((batch.input_ids != self.tokenizer.pad_id).sum())
        self.run.spend(flops=training_flops(model, batch.input_ids.shape[1], config.lora) * trained)
        figures = {
            "train/loss": sum(result.loss for result in results) / len(results),
            "train/grad_norm": sum(result.grad_norm for result in results) / len(results),
        }
        skipped = sum(result.skipped for result in results)
        return figures | ({"train/skipped": skipped} if skipped else {})

    def record(
        self,
        rows: Sequence[int],
        generated: Sequence[Generated],
        scores: Tensor,
        picked: Sequence[int],
        others: dict[str, float],
        step: int,
    ) -> None:
        """Log a round: all that was sampled beside what was picked of it."""
        figures = {
            "rollout/score": float(scores.mean()),
            "rollout/length": sum(len(g.token_ids) for g in generated) / len(generated),
            "rollout/unfinished_frac": sum(g.finish_reason != "stop" for g in generated) / len(generated),
            "rollout/picked_frac": len(picked) / (len(rows) // self.config.num_samples * self.config.num_picked),
        } | others
        if picked:
            figures["rollout/picked_score"] = float(scores[list(picked)].mean())
        if self.judge and self.run.owner:
            figures["rollout/true_taste"] = sum(self.tastes(rows, generated)) / len(rows)
        for name, value in figures.items():
            self.run.metric(name, value, step)

    def tastes(self, rows: Sequence[int], generated: Sequence[Generated]) -> list[float]:
        """Return the judge's grade of each completion."""
        assert self.judge is not None  # asked only where there is one
        texts = [self.tokenizer.decode(g.token_ids) for g in generated]
        return [float(self.judge(self.prompts.prompts[row], text)) for row, text in zip(rows, texts, strict=True)]

    def show(
        self, rows: Sequence[int], generated: Sequence[Generated], scores: Tensor, picked: Sequence[int], step: int
    ) -> None:
        """Keep two prompts of the round with all their completions, best first, and which of them were picked."""
        num, chosen = self.config.num_samples, set(picked)
        texts = [self.tokenizer.decode(g.token_ids) for g in generated[: 3 * num]]
        log_samples(self.run, self.prompts, rows[: 3 * num : num], texts[::num], scores[: 3 * num : num], step)
        for start in range(0, min(2 * num, len(texts)), num):
            order = sorted(range(start, start + num), key=lambda i: (-float(scores[i]), i))
            answers = [{"text": texts[i], "score": round(float(scores[i]), 4), "picked": i in chosen} for i in order]
            self.run.specimen("candidates", {"prompt": self.prompts.text(rows[start]), "answers": answers}, step)

    def finish(self) -> None:
        """Sample the first round's prompts once more, save the policy and sum up what was gained, for how much KL."""
        config, run = self.config, self.run
        rows, generated = self.sample(config.rounds, 1)
        after = {"score": self.score(rows, generated).tolist(), "kl": self.kl(rows, generated).tolist()}
        if not run.owner:
            return
        if self.judge:
            after["true_taste"] = self.tastes(rows, generated)
        for name, values in after.items():
            mean, low, high = mean_interval(values)
            run.result(f"rollout_{name}@1", name, mean, low=low, high=high, n=len(values))
        curves = read_metrics(run.dir)
        for name in ("score", "true_taste"):
            if name in after:
                before = curves[f"rollout/{name}"][0][1]
                run.result(f"rollout_{name}_before@1", name, before, n=len(rows) * config.num_samples)
        completions = config.rounds * self.loader.batch_size * config.num_samples
        run.note(
            steps=config.rounds * config.epochs * config.minibatches,
            rounds=config.rounds,
            num_parameters=self.policy.config.num_parameters(),
            prompts_too_long=self.prompts.too_long,
            data={"name": ", ".join(config.prompts), "num_prompts": len(self.prompts), "num_completions": completions},
            **adapter_facts(self.policy),
        )
        self.tokenizer.save(run.dir / "model")
        save_adapted(run.dir, self.policy, eos_token_id=self.tokenizer.end_id)
