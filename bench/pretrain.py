"""Pre-training, tokens per second, side by side with the Trainer of transformers: `bench/pretrain.py [OPTIONS]`.

Own and peer train the same network on the same token ids. "As run" is each as its users run it; "tuned" gives both the
same allocator settings and compiles both.

    python3 bootstrap.py bench pretrain                     # both shapes, three processes each, fp32 and bf16
    python3 bootstrap.py bench pretrain --cases tiny --seconds 5 --processes 1

Prints the table and writes bench/results/pretrain.json (see bench/side_by_side).
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from side_by_side import SHAPES, Bench, Clock, Shape, Task, main
from side_by_side.networks import arguments, own_network, peer_network, stop_by


def documents(shape: Shape, count: int) -> list[list[int]]:
    """Return random documents of two and a half rows: speed does not depend on what the ids say."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.integers(8, shape.vocab_size, size=shape.context * 5 // 2).tolist() for _ in range(count)]


def own(task: Task, clock: Clock) -> None:
    """Take steps as the pretrain stage takes them."""
    from trivium.config import RunSettings
    from trivium.data.loader import PretrainLoader
    from trivium.data.shards import open_shards, write_shards
    from trivium.stages.pretrain import objective
    from trivium.training.compilation import compile_layers
    from trivium.training.distributed import autocast
    from trivium.training.optim import OptimConfig, Optimizer
    from trivium.training.step import train_step

    shape = SHAPES[task.case]
    settings = RunSettings(precision=task.precision, compile="on" if task.tuned else "auto")
    folder = Path(tempfile.mkdtemp()) / "shards"
    rows = ((ids, 4 * len(ids)) for ids in documents(shape, 400))
    write_shards(folder, rows, tokenizer_fingerprint="bench", vocab_size=shape.vocab_size)
    loader = PretrainLoader(open_shards(folder), shape.context, shape.batch_size, 0)
    model = own_network(shape).train()
    compile_layers(model, settings)
    optimizer = Optimizer(model, OptimConfig())
    step = partial(train_step, partial(objective, model, 0.0), lr_scale=1.0)
    for number in range(10**9):
        step([loader.batch(number)], optimizer, precision=autocast(settings))
        if clock.tick(shape.tokens):
            return


def trainer(task: Task, clock: Clock) -> None:
    """Train with transformers' Trainer on packed rows of the same ids, as its documentation shows."""
    import torch
    from transformers import Trainer, TrainingArguments

    shape = SHAPES[task.case]
    stream = torch.tensor(documents(shape, 400)).flatten()
    rows = stream[: len(stream) // shape.context * shape.context].view(-1, shape.context)
    how = {"per_device_train_batch_size": shape.batch_size, "learning_rate": 3e-3, "lr_scheduler_type": "linear"}
    Trainer(
        model=peer_network(shape),
        args=TrainingArguments(**arguments(task.precision, **how, torch_compile=task.tuned)),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[stop_by(clock, lambda: shape.tokens)],
    ).train()


BENCH = Bench(
    name="pretrain",
    unit="tokens/s",
    cases=("tiny", "small"),
    sides={"own": own, "trainer": trainer},
    packages=("torch", "transformers"),
    script=__file__,
    precisions=("fp32", "bf16"),
    seconds=20.0,
    settings={"optimizer": "own: Muon and AdamW; trainer: AdamW", "tuned": "compiled too"},
)

if __name__ == "__main__":
    main(BENCH, __doc__)
