"""Supervised fine-tuning, real (not padding) tokens per second, beside TRL's SFTTrainer: `bench/sft.py [OPTIONS]`.

Both train the same network on the same conversations of mixed lengths, 16 to a step, on the answers' tokens alone,
with AdamW. `padded`: as each does it by default (Trivium puts rows of like length together). `packed`: rows of the
full context, each document seeing itself alone in Trivium's; TRL packs by its own best fit.

    python3 bootstrap.py bench sft
"""

from __future__ import annotations

from functools import partial

from side_by_side import Bench, Clock, Task, main
from side_by_side.networks import Counted, adamw, arguments, mixed_rows, own_network, peer_network, stop_by

ROWS = 512


def own(task: Task, clock: Clock) -> None:
    """Take steps as the stage takes them."""
    from trivium.config import RunSettings
    from trivium.stages.sft import objective
    from trivium.training.distributed import autocast
    from trivium.training.optim import Optimizer
    from trivium.training.step import train_step

    model = own_network(task.shape).train()
    dealt = deal(task, mixed_rows(task.shape, ROWS))
    step = partial(train_step, partial(objective, model), lr_scale=1.0)
    precision, optimizer = autocast(RunSettings(precision=task.precision)), Optimizer(model, adamw())
    for number in range(10**9):
        step([dealt.batch(number)], optimizer, precision=precision)
        if clock.tick(real_tokens(dealt, number)):
            return


def deal(task: Task, rows: list[tuple[list[int], int]]):
    """Return the stage's own dealer of batches: one conversation to a row, or packed."""
    from trivium.data.conversations import Deal, Side

    masked = [(ids, [place >= answer for place in range(len(ids))]) for ids, answer in rows]
    context = task.shape.context if task.case == "packed" else 0
    return Deal(Side(rows=masked), task.shape.batch_size, 0, 0, context=context)


def real_tokens(dealt, number: int) -> int:
    """Return the tokens of the conversations in a step's batch, padding left out."""
    chosen = dealt.loader.rows(number)
    if dealt.packs:
        chosen = [row for place in chosen for row in dealt.packs[place]]
    return sum(len(dealt.side.rows[row][0]) for row in chosen)


def trl(task: Task, clock: Clock) -> None:
    """Train with TRL's SFTTrainer on the same ids and labels."""
    from datasets import Dataset
    from side_by_side.tokenizers import peer_tokenizer
    from trl import SFTConfig, SFTTrainer

    shape = task.shape
    rows = [{"input_ids": ids, "labels": [-100] * answer + ids[answer:]} for ids, answer in mixed_rows(shape, ROWS)]
    config = SFTConfig(
        **arguments(task.precision, per_device_train_batch_size=shape.batch_size),
        max_length=shape.context,
        packing=task.case == "packed",
    )
    trainer = SFTTrainer(
        model=peer_network(shape), args=config, train_dataset=Dataset.from_list(rows),
        processing_class=peer_tokenizer(shape),
    )  # fmt: skip
    counted = Counted(trainer.data_collator, lambda examples: sum(len(each["input_ids"]) for each in examples))
    trainer.data_collator = counted
    trainer.add_callback(stop_by(clock, counted.take))
    trainer.train()


BENCH = Bench(
    name="sft",
    unit="real tokens/s",
    cases=("padded", "packed"),
    sides={"own": own, "trl": trl},
    script=__file__,
    settings={"optimizer": "AdamW on both sides", "rows": ROWS},
)

if __name__ == "__main__":
    main(BENCH, __doc__)
