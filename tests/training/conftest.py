"""A run and a small network to train in tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trivium.config import RunSettings
from trivium.models.config import ModelConfig
from trivium.models.transformer import Transformer
from trivium.records import RunManifest
from trivium.runs.manifest import Run


def tiny_model(seed: int = 0) -> Transformer:
    """Return a two-layer network of about 6,000 parameters over 32 tokens."""
    config = ModelConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        qk_norm=True,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Transformer(config)
    model.init_weights(seed)
    return model


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[str], Run]:
    """Return a maker of runs, each in a folder of its name."""
    torch.set_num_threads(1)

    def make(name: str) -> Run:
        manifest = RunManifest(
            run_id=f"{name}-0", stage="pretrain", table=name, status="running", fingerprint="f" * 20, config={}
        )
        folder = tmp_path / name / f"{name}-0"
        return Run(manifest, folder=folder, workspace=tmp_path, settings=RunSettings(precision="fp32"), base=tmp_path)

    return make
