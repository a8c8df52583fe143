"""GRPO and RLOO end to end, completions per second, beside TRL's trainers: `bench/grpo.py [OPTIONS]`.

A round is 8 prompts with 8 samples each of up to 64 new tokens, a reward that costs nothing, the reference's
log-probabilities, and two optimizer steps of 32 completions each, on both sides from the same model folder.

    python3 bootstrap.py bench grpo
"""

from __future__ import annotations

from side_by_side import Bench, Clock, Task, main
from side_by_side.networks import adamw, arguments
from side_by_side.rollouts import GROUP, PROMPTS, REWARD, dataset, even_share, new_tokens, own_run, prepare, ticked

STEPS = 2
"""Optimizer steps per round."""


def own(task: Task, clock: Clock) -> None:
    """Do the stage's rounds, in the order of its `run`."""
    from trivium.stages.grpo import Config, Trainer
    from trivium.training.rollout import SampleConfig

    config = Config(
        prompts=("prompts.jsonl",), rewards={REWARD: 1.0}, prompts_per_round=PROMPTS, group_size=GROUP,
        minibatches=STEPS, estimator=task.case, beta=0.04, optim=adamw(1e-6),
        sampling=SampleConfig(max_new_tokens=new_tokens(task.shape)),
    )  # fmt: skip
    trainer = Trainer(config, own_run(task, "grpo"))
    for number in range(10**9):
        rows, generated = trainer.sample(number)
        batch = trainer.shape(rows, generated, trainer.reward(rows, generated))
        loss = trainer.update(batch, number)
        trainer.record(batch, rows, generated, loss, number + 1)
        if clock.tick(PROMPTS * GROUP):
            return


def trl(task: Task, clock: Clock) -> None:
    """Train with TRL's GRPOTrainer or RLOOTrainer."""
    import trl as library
    from transformers import AutoTokenizer, LlamaForCausalLM

    config_class, trainer_class = {
        "grpo": (library.GRPOConfig, library.GRPOTrainer),
        "rloo": (library.RLOOConfig, library.RLOOTrainer),
    }[task.case]
    config = config_class(
        **arguments(task.precision, per_device_train_batch_size=PROMPTS * GROUP // STEPS), beta=0.04,
        steps_per_generation=STEPS, num_generations=GROUP, max_completion_length=new_tokens(task.shape),
    )  # fmt: skip
    config.learning_rate = 1e-6
    trainer = trainer_class(
        model=LlamaForCausalLM.from_pretrained(task.folder / "policy"), reward_funcs=even_share, args=config,
        train_dataset=dataset(task), processing_class=AutoTokenizer.from_pretrained(task.folder / "policy"),
        callbacks=ticked(clock, STEPS),
    )  # fmt: skip
    trainer.train()


BENCH = Bench(
    name="grpo",
    unit="completions/s",
    cases=("grpo", "rloo"),
    sides={"own": own, "trl": trl},
    prepare=prepare,
    script=__file__,
    seconds=1.0,
    warm_up=1,
    settings={"optimizer": "AdamW on both sides", "steps_per_round": STEPS, "prompts": PROMPTS, "group": GROUP},
)

if __name__ == "__main__":
    main(BENCH, __doc__)
