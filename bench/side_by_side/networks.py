"""The same network for both sides, the same random rows, and how a TRL trainer is stopped by a clock."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from side_by_side import Clock, Shape


def own_network(shape: Shape) -> Any:
    """Return Trivium's network, with random weights, as a run has it: freed memory kept."""
    from trivium.models.config import ModelConfig
    from trivium.models.transformer import Transformer
    from trivium.training.allocator import keep_freed_memory

    keep_freed_memory()
    return Transformer(ModelConfig(**shape.fields, eos_token_id=None)).init_weights(0)


def peer_network(shape: Shape, kind: str = "LlamaForCausalLM", **options: Any) -> Any:
    """Return transformers' network of the same shape."""
    import torch
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, kind)(peer_config(shape, **options))


def peer_config(shape: Shape, **options: Any) -> Any:
    """Return transformers' configuration of the shape; token 0 is padding, 1 the end."""
    from transformers import LlamaConfig

    return LlamaConfig(**shape.fields, pad_token_id=0, bos_token_id=2, eos_token_id=1, **options)


def adamw(lr: float = 1e-5) -> Any:
    """Return the optimizer both sides have: AdamW without decay, a constant rate, gradients clipped at norm 1."""
    from trivium.training.optim import OptimConfig

    return OptimConfig(kind="adamw", lr=lr, weight_decay=0.0)


def arguments(precision: str, **options: Any) -> dict[str, Any]:
    """Return what every TRL configuration gets: no logging, no saving, the same learning rate."""
    return {
        "output_dir": tempfile.mkdtemp(), "use_cpu": True, "bf16": precision == "bf16", "learning_rate": 1e-5,
        "lr_scheduler_type": "constant", "logging_strategy": "no", "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "dataloader_num_workers": 0, "max_steps": 100_000, "gradient_checkpointing": False,
        **options,
    }  # fmt: skip


def stop_by(clock: Clock, items: Callable[[], float]) -> Any:
    """Return a callback that ticks after each optimizer step with the items read since, and stops the trainer."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_training_stop = clock.tick(items())
            return control

    return Stop()


class Counted:
    """A collator that counts what it hands out, batch by batch."""

    def __init__(self, collator: Callable[[Any], Any], count: Callable[[Any], float]) -> None:
        self.collator, self.count, self.counts = collator, count, list[float]()

    def __call__(self, examples: Any) -> Any:
        self.counts.append(self.count(examples))
        return self.collator(examples)

    def take(self) -> float:
        """Return the count of the oldest batch not yet taken; the loader reads ahead."""
        return self.counts.pop(0)


def mixed_rows(shape: Shape, count: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """Return random rows of an eighth of the context to all of it, each with where its answer begins."""
    import numpy as np

    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(rng.integers(shape.context // 8, shape.context + 1))
        ids = rng.integers(8, shape.vocab_size, size=length).tolist()
        rows.append((ids, max(1, int(length * rng.uniform(0.25, 0.75)))))
    return rows


def pairs(shape: Shape, count: int, seed: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    """Return random (prompt, chosen, rejected): the prompt and the longer answer fit the context, lengths mixed."""
    import numpy as np

    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(8, shape.vocab_size, size=int(rng.integers(low, high + 1))).tolist()

    half = shape.context // 2
    return [(ids(half // 8, half), ids(half // 8, half), ids(half // 8, half)) for _ in range(count)]
