"""Reward model, pairs per second, beside TRL's RewardTrainer: `bench/reward_model.py [OPTIONS]`.

Both train the same network with a scalar head on the same pairs of mixed lengths, 8 to a step, Bradley-Terry, AdamW.

    python3 bootstrap.py bench reward_model
"""

from __future__ import annotations

from functools import partial

from side_by_side import Bench, Clock, Task, main
from side_by_side.networks import adamw, arguments, own_network, pairs, peer_network, stop_by

PAIRS = 8
"""Pairs in a step: TRL's default."""
COUNT = 256


def own(task: Task, clock: Clock) -> None:
    """Take steps as the stage takes them."""
    from trivium.config import RunSettings
    from trivium.data.collate import PreferenceGroup, collate_preferences
    from trivium.data.loader import RowLoader
    from trivium.models.heads import ScalarModel
    from trivium.stages.reward_model import objective
    from trivium.training.distributed import autocast
    from trivium.training.optim import Optimizer
    from trivium.training.step import train_step

    groups = [
        PreferenceGroup(prompt_ids=prompt, completion_ids=[chosen, rejected], ranks=[0, 1])
        for prompt, chosen, rejected in pairs(task.shape, COUNT)
    ]
    model = ScalarModel.from_transformer(own_network(task.shape)).train()
    loader, optimizer = RowLoader(len(groups), PAIRS, 0), Optimizer(model, adamw())
    step = partial(train_step, partial(objective, model, "bradley_terry"), lr_scale=1.0)
    precision = autocast(RunSettings(precision=task.precision))
    for number in range(10**9):
        step([collate_preferences([groups[row] for row in loader.rows(number)], 0)], optimizer, precision=precision)
        if clock.tick(PAIRS):
            return


def trl(task: Task, clock: Clock) -> None:
    """Train with TRL's RewardTrainer on the same ids."""
    from datasets import Dataset
    from side_by_side.tokenizers import peer_tokenizer
    from trl import RewardConfig, RewardTrainer

    rows = [
        {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        for prompt, chosen, rejected in pairs(task.shape, COUNT)
    ]
    config = RewardConfig(**arguments(task.precision, per_device_train_batch_size=PAIRS), max_length=task.shape.context)
    trainer = RewardTrainer(
        model=peer_network(task.shape, "LlamaForSequenceClassification", num_labels=1), args=config,
        train_dataset=Dataset.from_list(rows), processing_class=peer_tokenizer(task.shape),
        callbacks=[stop_by(clock, lambda: PAIRS)],
    )  # fmt: skip
    trainer.train()


BENCH = Bench(
    name="reward_model",
    unit="pairs/s",
    cases=("pairs",),
    sides={"own": own, "trl": trl},
    script=__file__,
    settings={"optimizer": "AdamW on both sides", "pairs_per_step": PAIRS},
)

if __name__ == "__main__":
    main(BENCH, __doc__)
