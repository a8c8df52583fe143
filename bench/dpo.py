"""Direct preference optimisation, pairs per second, beside TRL's DPOTrainer: `bench/dpo.py [OPTIONS]`.

Both train the same network on the same pairs of mixed lengths, 8 to a step, with AdamW; the reference's
log-probabilities are counted: one forward pass per pair on each side, which both keep where the pairs come again.

    python3 bootstrap.py bench dpo
"""

from __future__ import annotations

from functools import partial

from side_by_side import Bench, Clock, Task, main
from side_by_side.networks import adamw, arguments, own_network, pairs, peer_network, stop_by
from side_by_side.rollouts import own_run

PAIRS = 8
"""Pairs in a step: TRL's default."""
COUNT = 2048
"""More than are trained on in the time, so that none comes again."""


def own(task: Task, clock: Clock) -> None:
    """Take steps as the stage takes them, each with the reference's forward pass over its pairs before it."""
    from trivium.data.collate import PreferenceGroup, collate_preferences
    from trivium.data.loader import RowLoader
    from trivium.stages.dpo import Config, objective, with_reference
    from trivium.training.distributed import autocast
    from trivium.training.optim import Optimizer
    from trivium.training.step import train_step

    groups = [
        PreferenceGroup(prompt_ids=prompt, completion_ids=[chosen, rejected], ranks=[0, 1])
        for prompt, chosen, rejected in pairs(task.shape, COUNT)
    ]
    config, run = Config(), own_run(task, "dpo")
    model, reference = own_network(task.shape), own_network(task.shape).requires_grad_(False)
    loader, optimizer = RowLoader(len(groups), PAIRS, 0), Optimizer(model, adamw())
    step = partial(train_step, partial(objective, model, config), lr_scale=1.0)
    for number in range(10**9):
        part = with_reference(run, reference, [groups[row] for row in loader.rows(number)], config, 0)
        model.train()
        step([collate_preferences(part, 0)], optimizer, precision=autocast(run.settings))
        if clock.tick(PAIRS):
            return


def trl(task: Task, clock: Clock) -> None:
    """Train with TRL's DPOTrainer on the same ids."""
    from datasets import Dataset
    from side_by_side.tokenizers import peer_tokenizer
    from trl import DPOConfig, DPOTrainer

    def words(ids: list[int]) -> str:  # DPOTrainer wants text
        return " ".join(f"w{index}" for index in ids)

    rows = [
        {"prompt": words(prompt) + " ", "chosen": words(chosen), "rejected": words(rejected)}
        for prompt, chosen, rejected in pairs(task.shape, COUNT)
    ]
    config = DPOConfig(
        **arguments(task.precision, per_device_train_batch_size=PAIRS), beta=0.1, max_length=task.shape.context
    )
    trainer = DPOTrainer(
        model=peer_network(task.shape), ref_model=peer_network(task.shape), args=config,
        train_dataset=Dataset.from_list(rows), processing_class=peer_tokenizer(task.shape),
        callbacks=[stop_by(clock, lambda: PAIRS)],
    )  # fmt: skip
    trainer.train()


BENCH = Bench(
    name="dpo",
    unit="pairs/s",
    cases=("pairs",),
    sides={"own": own, "trl": trl},
    script=__file__,
    settings={"optimizer": "AdamW on both sides", "pairs_per_step": PAIRS, "beta": 0.1},
)

if __name__ == "__main__":
    main(BENCH, __doc__)
