"""fp8 on two ranks, replicated and sharded (emulated, gloo): it runs, and learns what one process learns.

Started under torchrun this file trains; the test reads what it found. Each rank scales a tensor by the largest value of
its own rows, so ranks and one process round differently: losses agree to fp8's precision, not to fp32's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from trivium.batches import TokenBatch, select_rows
from trivium.config import RunSettings
from trivium.models.config import ModelConfig
from trivium.models.transformer import Transformer
from trivium.stages.pretrain import objective
from trivium.training.distributed import data_ranks, joined
from trivium.training.float8 import lower_products
from trivium.training.optim import OptimConfig, Optimizer
from trivium.training.parallel import spread
from trivium.training.step import train_step

FP8 = RunSettings(device="cpu", precision="fp8", threads=1, rank_timeout_s=60)
ROWS, STEPS = 6, 6


def losses_of(settings: RunSettings) -> list[float]:
    """Train for a few steps, each rank on its share of the rows, and return the losses."""
    config = ModelConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, qk_norm=True,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Transformer(config).init_weights(0)
    lower_products(model, dataclasses.replace(settings, precision="fp8"), emulate=True)
    # bf16 on a CPU would leave the emulation in fp32 and all else in bf16; the products are what is tried here.
    wholly = dataclasses.replace(settings, precision="fp32")
    trained = spread(model, partial(objective, model, 0.0), wholly)
    optimizer = Optimizer(model.train(), OptimConfig(kind="adamw", lr=1e-2))
    ids = torch.randint(3, 30, (ROWS, 14), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(input_ids=ids[:, :-1], targets=ids[:, 1:], positions=torch.arange(13).expand(ROWS, 13))
    rank, size = data_ranks()
    mine = select_rows(batch, torch.arange(ROWS)[rank::size])
    return [train_step(trained, [mine], optimizer, lr_scale=1.0).loss for _ in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_learn_what_one_process_learns(tmp_path: Path, parallel: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = [*launcher, __file__, str(tmp_path / "found.json"), parallel]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    alone = losses_of(FP8)
    assert alone[-1] < alone[0] - 0.2
    assert found == pytest.approx(alone, rel=0.02)


if __name__ == "__main__":
    layout = dataclasses.replace(FP8, parallel=sys.argv[2])
    with joined(layout):
        found = losses_of(layout)
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(found))
