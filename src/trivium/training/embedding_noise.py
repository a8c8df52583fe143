"""NEFTune: uniform noise on the embeddings while a model is fine-tuned, which makes it copy its few examples less.

`x + (alpha / sqrt(L d)) u`, u uniform in -1 to 1, for each of the L tokens of an example and each of the d dimensions
(Jain et al. 2023, arXiv 2310.05914, algorithm 1). L is the example's own length, padding and neighbours in a packed row
left out, as in the paper.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trivium.batches import TokenBatch
from trivium.models.transformer import Transformer


def embedding_noise(batch: TokenBatch, alpha: float, size: int, seed: int, pad_id: int) -> Tensor:
    """Return the noise of a batch, fp32 [B, T, size], 0 at pads.

    A row's numbers depend on (`seed`, its `row_numbers`) alone: neither on its neighbours, nor on how batches are split
    over micro-batches and ranks, nor on what was drawn before, so a resumed run draws what it would have drawn. Raises
    ValueError for a batch without row numbers.
    """
    if batch.row_numbers is None:
        raise ValueError("a batch needs row_numbers for noise of its own")
    rows, width = batch.input_ids.shape
    numbers, real = batch.row_numbers.tolist(), (batch.input_ids != pad_id).cpu()
    drawn = [np.random.default_rng([seed, 0x4EF7, n]).random((width, size), dtype=np.float32) for n in numbers]
    noise = torch.from_numpy(np.stack(drawn)) * 2 - 1
    documents = torch.zeros(rows, width, dtype=torch.int64) if batch.document_ids is None else batch.document_ids.cpu()
    same = (documents[:, :, None] == documents[:, None, :]) & real[:, None, :]
    lengths = same.sum(-1).clamp(min=1)
    scale = alpha / (lengths * size).sqrt() * real
    return noise * scale[:, :, None]


@contextlib.contextmanager
def noisy_embeddings(model: Transformer, noise: Tensor) -> Iterator[None]:
    """Add noise [B, T, hidden] to what the embedding gives, for the forward passes inside."""

    def add(_module: object, _inputs: object, output: Tensor) -> Tensor:
        return output + noise.to(device=output.device, dtype=output.dtype)

    handle = model.model.embed_tokens.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
