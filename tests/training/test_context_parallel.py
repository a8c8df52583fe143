"""Rows whose positions are shared by ranks are the rows of one process: losses, norms, weights and checkpoints.

As in `test_ranks`, this file is started under torchrun (gloo, one thread each) once per number of ranks, and the tests
look at what it found.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trivium.batches import IGNORE, LossOutput, PreferenceBatch, RolloutBatch, TokenBatch, select_rows
from trivium.config import ConfigError, RunSettings
from trivium.models.config import ModelConfig
from trivium.models.heads import ScalarModel, TwoHeads
from trivium.models.lora import LoraConfig, adapt
from trivium.models.transformer import Transformer
from trivium.runs.events import read_metrics
from trivium.stages import dpo, grpo, ppo, pretrain, reward_model, sft
from trivium.training import distributed
from trivium.training.context_parallel import SharedRows, chunks_of
from trivium.training.distributed import autocast, data_ranks, joined, setup, share, world
from trivium.training.loop import FitConfig, fit
from trivium.training.optim import OptimConfig, Optimizer
from trivium.training.parallel import spread, whole
from trivium.training.step import train_step

from .test_ranks import close, open_run

ROOT = Path(__file__).parents[2]
PLAIN = RunSettings(device="cpu", precision="fp32", threads=1, rank_timeout_s=120)
BY_NAME = {
    "": PLAIN,
    "fsdp": dataclasses.replace(PLAIN, parallel="fsdp"),
    "recomputed": dataclasses.replace(PLAIN, activation_checkpointing=True),
    "bf16": dataclasses.replace(PLAIN, precision="bf16"),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"qk_norm": True, "tie_word_embeddings": True},
    "olmo2": {"post_norm": True},
    "windows": {
        "attention_bias": True,
        "sliding_window": 5,
        "layer_types": ("sliding_attention", "full_attention"),
    },
}
ROWS, LENGTH, STEPS, PAD = 6, 13, 5, 0


def tiny_model(family: str = "qwen3", seed: int = 0) -> Transformer:
    """Return a two-layer network with grouped queries."""
    config = ModelConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=22,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **FAMILIES[family],
    )
    return Transformer(config).init_weights(seed)


def global_batch(step: int, length: int = LENGTH) -> TokenBatch:
    """Return a step's rows: two packed documents, each cut elsewhere; targets thin out, so that shares are unequal."""
    ids = torch.randint(3, 30, (ROWS, length), generator=torch.Generator().manual_seed(step))
    targets, place = ids.roll(-1, 1).clone(), torch.arange(length)
    cuts = 2 + torch.arange(ROWS)[:, None] % (length - 3)
    documents = (place >= cuts).long()
    for row in range(ROWS):
        targets[row, 2 * row + 1 :] = IGNORE
    targets[place == cuts - 1] = IGNORE
    weights = (targets != IGNORE) * torch.rand(targets.shape, generator=torch.Generator().manual_seed(step))
    return TokenBatch(
        input_ids=ids,
        targets=targets,
        positions=place - documents * cuts,
        document_ids=documents,
        weights=weights,
        row_numbers=torch.arange(ROWS) + ROWS * step,
    )


def mine(batch: TokenBatch) -> list[TokenBatch]:
    """Return the micro-batches of this rank's group."""
    rank, size = data_ranks()
    return [select_rows(batch, rows) for rows in torch.arange(ROWS)[rank::size].split(2)]


def trained(folder: Path, settings: RunSettings, task: str = "pretrain", *, until: int = STEPS) -> dict[str, Any]:
    """Train in a folder, or die before step `until`; return what was logged and the weights.

    `task` is words: a family, `sft` (noise on embeddings, weighted targets), `lora`, `compiled`, `short` rows, `muon`.
    """
    setup(settings)
    words = task.split()
    model = tiny_model(next((word for word in words if word in FAMILIES), "qwen3"))
    if "lora" in words:
        model = adapt(model, LoraConfig(rank=2, alpha=8.0), seed=3)
    if "compiled" in words:
        model.model.compile_layers(backend="aot_eager")
    objective: Callable[[TokenBatch], LossOutput] = partial(pretrain.objective, model, 1e-3)
    if "sft" in words:
        objective = partial(sft.noisy_objective, model, 5.0, 7, PAD)
    optim = OptimConfig(lr=2e-3, kind="muon" if "muon" in words else "adamw", eps=1e-6, grad_clip=0.5)
    config = FitConfig(steps=STEPS, batch_size=ROWS, log_every=1, save_every=1, optim=optim)

    def batches(step: int) -> list[TokenBatch]:
        if step == until:
            raise KeyboardInterrupt
        batch = global_batch(step, 5 if "short" in words else LENGTH)
        return mine(batch if "sft" in words else dataclasses.replace(batch, weights=None))

    run = open_run(folder, settings)
    try:
        fit(run, model, objective, batches, config)
    except KeyboardInterrupt:
        return {}
    finally:
        run.events.close()
    with whole(model):
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    curves = read_metrics(run.dir)
    found = {name.split("/")[1]: [v for _, v in curves[name]] for name in ("train/loss", "train/grad_norm")}
    return found | {"weights": weights.tolist()}
