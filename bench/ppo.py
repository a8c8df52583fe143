"""PPO end to end, completions per second, beside TRL 1.12, the last with PPO: `bench/ppo.py [OPTIONS]`.

A round is 64 prompts with a completion each of up to 64 new tokens, a learned reward, values, the reference's
log-probabilities and KL, and two passes of two optimizer steps over policy and value model, on both sides from the same
folders. TRL 1.12 needs a folder of its own; without it the peer's cell stays open:

    pip install --no-deps --target FOLDER trl==1.12.0
    python3 bootstrap.py bench ppo --trl-1-12 FOLDER
"""

from __future__ import annotations

import os
import sys

from side_by_side import Bench, Clock, Task, main
from side_by_side.networks import adamw, arguments
from side_by_side.rollouts import GROUP, PROMPTS, new_tokens, own_run, prepare

BATCH, STEPS, EPOCHS = PROMPTS * GROUP, 2, 2
PEER = "TRIVIUM_BENCH_TRL_1_12"
"""The variable in which the processes are told the folder of TRL 1.12."""


class TimeIsUp(Exception):
    """Ends a trainer that does not ask whether to stop."""


def own(task: Task, clock: Clock) -> None:
    """Do the stage's rounds, in the order of its `run`."""
    from trivium.stages.ppo import Config, Trainer
    from trivium.training.rollout import SampleConfig

    config = Config(
        prompts=("prompts.jsonl",), batch_size=BATCH, epochs=EPOCHS, minibatches=STEPS, optim=adamw(1e-6),
        sampling=SampleConfig(max_new_tokens=new_tokens(task.shape)),
    )  # fmt: skip
    trainer = Trainer(config, own_run(task, "ppo"))
    for number in range(10**9):
        prompts, generated = trainer.sample(number)
        batch = trainer.shape(prompts, generated, trainer.score(prompts, generated))
        metrics = trainer.update(batch, number)
        trainer.record(batch, prompts, generated, metrics, number + 1)
        if clock.tick(BATCH):
            return


def trl(task: Task, clock: Clock) -> None:
    """Train with the PPOTrainer of TRL 1.12."""
    sys.path.insert(0, os.environ[PEER])
    import json

    import transformers
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if clock.tick(BATCH):
                raise TimeIsUp
            return control

    tokenizer = AutoTokenizer.from_pretrained(task.folder / "policy", padding_side="left")
    texts = [json.loads(line)["messages"] for line in (task.folder / "prompts.jsonl").read_text().splitlines()]
    how = {"add_generation_prompt": True, "return_dict": True}
    rows = [{"input_ids": tokenizer.apply_chat_template(text, **how)["input_ids"]} for text in texts]
    options = arguments(task.precision, per_device_train_batch_size=BATCH, learning_rate=1e-6)
    del options["max_steps"]
    config = PPOConfig(
        **options, total_episodes=10**6, num_mini_batches=STEPS, num_ppo_epochs=EPOCHS, num_sample_generations=0,
        response_length=new_tokens(task.shape), temperature=1.0, stop_token="eos", missing_eos_penalty=1.0,
        local_rollout_forward_batch_size=BATCH,
    )  # fmt: skip
    policy, reference = (LlamaForCausalLM.from_pretrained(task.folder / "policy") for _ in range(2))
    reward, value = (LlamaForSequenceClassification.from_pretrained(task.folder / "reward") for _ in range(2))
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
        value_model=value, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:1]),
        callbacks=[Stop()],
    )  # fmt: skip
    try:
        trainer.train()
    except TimeIsUp:
        return


BENCH = Bench(
    name="ppo",
    unit="completions/s",
    cases=("ppo",),
    sides={"own": own, "trl": trl},
    packages=("torch", "transformers"),
    prepare=prepare,
    script=__file__,
    seconds=1.0,
    warm_up=1,
    settings={"optimizer": "AdamW on both sides", "epochs": EPOCHS, "steps_per_epoch": STEPS, "peer": "trl 1.12.0"},
)

if __name__ == "__main__":
    words = sys.argv[1:]
    if "--trl-1-12" in words:
        place = words.index("--trl-1-12")
        os.environ[PEER] = words[place + 1]
        del words[place : place + 2]
    if PEER not in os.environ and "--sides" not in words:
        print("no --trl-1-12 FOLDER: the peer's cell stays open")
        words += ["--sides", "own"]
    main(BENCH, __doc__, words)
