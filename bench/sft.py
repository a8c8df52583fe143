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


def packed(rows: list[tuple[list[int], int]], context: int) -> list[list[tuple[list[int], int]]]:
    """Return the rows in bins of at most `context` tokens: longest first, each into the fullest bin that has room."""
    bins: list[list[tuple[list[int], int]]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda each: -len(each[0])):
        fits = [place for place, left in enumerate(room) if left >= len(row[0])]
        if fits:
            place = min(fits, key=lambda each: room[each])
            bins[place].append(row)
            room[place] -= len(row[0])
        else:
            bins.append([row])
            room.append(context - len(row[0]))
    return bins


def packed_batch(bins: list[list[tuple[list[int], int]]], context: int):
    """Return bins as a batch in which a document sees itself alone."""
    import torch

    from trivium.batches import IGNORE, TokenBatch

    ids, positions = (torch.zeros(len(bins), context, dtype=torch.long) for _ in range(2))
    targets, documents = torch.full_like(ids, IGNORE), torch.full_like(ids, -1)
    for place, rows in enumerate(bins):
        at = 0
        for number, (row, answer) in enumerate(rows):
            end = at + len(row)
            ids[place, at:end], positions[place, at:end] = torch.tensor(row), torch.arange(len(row))
            targets[place, at + answer - 1 : end - 1] = torch.tensor(row[answer:])
            documents[place, at:end] = number
            at = end
    return TokenBatch(input_ids=ids, targets=targets, positions=positions, document_ids=documents)


def own(task: Task, clock: Clock) -> None:
    """Take steps as the stage takes them."""
    from trivium.config import RunSettings
    from trivium.data.collate import pad_rows
    from trivium.data.loader import RowLoader
    from trivium.stages.sft import objective
    from trivium.training.distributed import autocast
    from trivium.training.optim import Optimizer
    from trivium.training.step import train_step

    shape, rows = task.shape, mixed_rows(task.shape, ROWS)
    model = own_network(shape).train()
    step = partial(train_step, partial(objective, model), lr_scale=1.0)
    precision, optimizer = autocast(RunSettings(precision=task.precision)), Optimizer(model, adamw())
    if task.case == "padded":
        masked = [(ids, [place >= answer for place in range(len(ids))]) for ids, answer in rows]
        sizes = [len(ids) for ids, _ in rows]
        loader = RowLoader(len(rows), shape.batch_size, 0, lengths=sizes)
    else:
        bins = packed(rows, shape.context)
        sizes = [sum(len(ids) for ids, _ in each) for each in bins]
        loader = RowLoader(len(bins), shape.batch_size, 0)
    for number in range(10**9):
        chosen = loader.rows(number)
        if task.case == "padded":
            batch = pad_rows([masked[row] for row in chosen], 0)
        else:
            batch = packed_batch([bins[row] for row in chosen], shape.context)
        step([batch], optimizer, precision=precision)
        if clock.tick(sum(sizes[row] for row in chosen)):
            return


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
