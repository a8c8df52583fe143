"""What keeps weights in bf16 learning? Pre-training under fp32, autocast, and four ways to update bf16 weights.

    python -m trivium run recipes/smoke.toml --workspace runs/smoke
    python bench/weights_in_bf16.py runs/smoke --kind muon --lr 1e-2 --steps 250 --seed 0

Prints the held-out loss of each way in nats per token. docs/concepts/precision.md has the figures.
"""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from pathlib import Path

import torch

from trivium.data.loader import PretrainLoader
from trivium.data.shards import open_shards
from trivium.data.tokenizer import Tokenizer
from trivium.models.transformer import Transformer
from trivium.stages.pretrain import Config, model_config, objective
from trivium.training import compensation, muon
from trivium.training.optim import OptimConfig, Optimizer
from trivium.training.schedule import lr_scale
from trivium.training.step import train_step

ROWS, CONTEXT = 8, 128
noise = torch.Generator().manual_seed(1)


@contextlib.contextmanager
def alone(parameter, state):
    """Round, and forget what that drops."""
    wide = parameter.float()
    yield wide
    parameter.copy_(wide)


@contextlib.contextmanager
def at_random(parameter, state):
    """Round up or down with the probability that keeps the mean."""
    wide = parameter.float()
    yield wide
    drawn = torch.randint(0, 1 << 16, wide.shape, dtype=torch.int32, generator=noise)
    parameter.copy_(((wide.view(torch.int32) + drawn) & -65536).view(torch.float32))


@contextlib.contextmanager
def remainder(parameter, state):
    """Kahan's summation, with the remainder in bf16."""
    kept = state.setdefault("remainder", torch.zeros_like(parameter))
    wide = parameter.float() + kept
    yield wide
    parameter.copy_(wide)
    kept.copy_(wide.sub_(parameter))


WAYS = {"lower half": compensation.widened, "remainder": remainder, "at random": at_random, "alone": alone}


def main() -> None:
    """Train once in each way and print the held-out loss."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("workspace", type=Path)
    options.add_argument("--kind", default="muon")
    options.add_argument("--lr", type=float, default=1e-2)
    options.add_argument("--steps", type=int, default=250)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    for way in ("fp32", "autocast", *WAYS):
        print(f"{chosen.kind} {way:<10} {trained(chosen, way):.4f}", flush=True)


def trained(chosen: argparse.Namespace, way: str) -> float:
    """Return the held-out loss after training in one way."""
    (corpus,) = (chosen.workspace / "train_tokenizer").iterdir()
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    train, heldout = (open_shards(corpus / "shards" / side, tokenizer.fingerprint) for side in ("train", "heldout"))
    config = Config(hidden_size=64, num_layers=3, num_heads=2, num_kv_heads=2, context=CONTEXT)
    model = Transformer(model_config(config, tokenizer)).init_weights(chosen.seed)
    if way in WAYS:
        model.bfloat16()
        compensation.widened = muon.widened = WAYS[way]
    precision = torch.autocast("cpu", torch.bfloat16) if way == "autocast" else contextlib.nullcontext()
    optimizer = Optimizer(model, OptimConfig(kind=chosen.kind, lr=chosen.lr))
    loader = PretrainLoader(train, CONTEXT, ROWS, chosen.seed)
    for step in range(chosen.steps):
        scale = lr_scale(optimizer.config.schedule, step, chosen.steps)
        batches = [loader.batch(step, 0, 1)]
        train_step(partial(objective, model, 0.0), batches, optimizer, lr_scale=scale, precision=precision)
    loss = tokens = 0.0
    with torch.no_grad(), precision:
        for batch in PretrainLoader(heldout, CONTEXT, 32, None).epoch_batches():
            loss += float(objective(model.eval(), 0.0, batch).total)
            tokens += float(batch.num_items)
    return loss / tokens


if __name__ == "__main__":
    main()
