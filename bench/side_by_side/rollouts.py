"""What the benches that sample and train share: model folders, prompts, a reward and a run for Trivium's stages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from side_by_side import Clock, Shape, Task

PROMPTS, GROUP, NEW = 8, 8, 64
"""Prompts in a round, completions of each, and new tokens of each (fewer only where the end is drawn)."""
REWARD = "side_by_side.rollouts:even_share"


def prepare(shape: Shape, folder: Path) -> None:
    """Write a chat model with its tokenizer, a reward model on top of it, and prompts of 8 to 40 words."""
    import numpy as np

    from trivium.data.tokenizer import train
    from trivium.models.config import ModelConfig
    from trivium.models.heads import ScalarModel
    from trivium.models.hf import save_model
    from trivium.models.transformer import Transformer

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size=int(rng.integers(2, 7)))) for _ in range(shape.vocab_size)]
    tokenizer = train([" ".join(words[i : i + 50] * 3) for i in range(0, len(words), 50)], shape.vocab_size)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    model = Transformer(ModelConfig(**shape.fields, **ids)).init_weights(0)
    for name, made in (("policy", model), ("reward", ScalarModel.from_transformer(model, seed=1))):
        tokenizer.save(folder / name)
        save_model(folder / name, made, eos_token_id=tokenizer.end_id)
    longest = min(40, shape.context // 4)
    texts = [" ".join(rng.choice(words, size=int(rng.integers(longest // 4, longest)))) for _ in range(64)]
    lines = (json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in texts)
    (folder / "prompts.jsonl").write_text("".join(lines))


def even_share(prompts: Any, completions: Any, completion_ids: Any = None, **_: Any) -> list[float]:
    """Return the share of even token ids in each completion: a reward that costs nothing, in both sides' shapes."""
    rows = completion_ids if completion_ids is not None else [one.token_ids for one in completions]
    return [sum(token % 2 == 0 for token in row) / max(len(row), 1) for row in rows]


def own_run(task: Task, stage: str) -> Any:
    """Return a run of a stage whose parents are the prepared folders."""
    import tempfile

    from trivium.config import RunSettings
    from trivium.records import RunManifest
    from trivium.runs.manifest import Run
    from trivium.training.allocator import keep_freed_memory

    keep_freed_memory()
    workspace = Path(tempfile.mkdtemp())
    parents = {"policy": str(task.folder / "policy"), "reward_model": str(task.folder / "reward")}
    manifest = RunManifest(
        run_id=f"{stage}-bench", stage=stage, table=stage, status="running", fingerprint="f" * 20, config={},
        parents=parents, seed=0,
    )  # fmt: skip
    settings = RunSettings(precision=task.precision)
    return Run(manifest, folder=workspace / "run", workspace=workspace, settings=settings, base=task.folder)


def dataset(task: Task) -> Any:
    """Return the prompts as TRL's trainers want them."""
    from datasets import Dataset

    lines = (task.folder / "prompts.jsonl").read_text().splitlines()
    return Dataset.from_list([{"prompt": json.loads(line)["messages"]} for line in lines])


def new_tokens(shape: Shape) -> int:
    """Return the most tokens of a completion."""
    return min(NEW, shape.context)


def ticked(clock: Clock, steps_per_round: int) -> Sequence[Any]:
    """Return a function for `stop_by`'s place: TRL ends an optimizer step several times a round."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            if state.global_step % steps_per_round == 0:
                control.should_training_stop = clock.tick(PROMPTS * GROUP)
            return control

    return [Stop()]
