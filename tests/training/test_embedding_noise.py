"""NEFTune's noise: the paper's formula, and numbers that belong to a row whatever stands around it."""

import dataclasses
import math

import pytest
import torch

from trivium.batches import TokenBatch
from trivium.data.packing import pack_rows
from trivium.training.embedding_noise import embedding_noise, noisy_embeddings

from .conftest import tiny_model

PAD, SIZE = 0, 16


def batch_of(lengths, width, first=0):
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = 5
    numbers = torch.arange(first, first + len(lengths))
    positions = torch.arange(width).repeat(len(lengths), 1)
    return TokenBatch(input_ids=ids, targets=ids, positions=positions, row_numbers=numbers)


def test_the_scale_is_alpha_over_the_root_of_length_times_size():
    """Uniform in +- alpha / sqrt(L d): every number within, the largest near it, the variance a third of its square.

    The largest of n = L d uniform numbers is below (1 - x) of the bound with probability (1 - x)^n: for n = 640 and
    x = 0.03 one in 3e8. The variance's relative standard error is sqrt(0.8 / n) = 3.5%; five of them are allowed.
    """
    batch = batch_of([40, 10], 40)
    noise = embedding_noise(batch, 5.0, SIZE, 1, PAD)
    for row, length in ((0, 40), (1, 10)):
        bound = 5 / math.sqrt(length * SIZE)
        assert float(noise[row, :length].abs().max()) <= bound
        variance = float(noise[row, :length].square().mean())
        assert variance == pytest.approx(bound**2 / 3, rel=5 * math.sqrt(0.8 / (length * SIZE)))
    assert float(noise[0].abs().max()) > 0.97 * 5 / math.sqrt(40 * SIZE)
    assert not noise[1, 10:].any()


def test_a_rows_noise_is_its_own():
    """The same whatever stands beside it, however wide the batch is, and in whichever micro-batch or rank it lands."""
    together = embedding_noise(batch_of([7, 9, 8], 9, first=4), 5.0, SIZE, 3, PAD)
    alone = embedding_noise(batch_of([9], 20, first=5), 5.0, SIZE, 3, PAD)
    assert torch.equal(together[1], alone[0, :9])
    again = embedding_noise(batch_of([7, 9, 8], 9, first=4), 5.0, SIZE, 4, PAD)
    assert not torch.equal(together[0, :7], again[0, :7])
    equally_long = embedding_noise(batch_of([7, 7], 7), 5.0, SIZE, 3, PAD)
    assert not torch.equal(*equally_long)
    with pytest.raises(ValueError, match="row_numbers"):
        embedding_noise(dataclasses.replace(batch_of([3], 3), row_numbers=None), 5.0, SIZE, 3, PAD)


def test_in_a_packed_row_a_conversation_counts_its_own_length():
    rows = [([5] * 5, [True] * 5), ([5] * 17, [True] * 17)]
    packed = dataclasses.replace(pack_rows([rows], PAD), row_numbers=torch.tensor([2]))
    noise = embedding_noise(packed, 5.0, SIZE, 1, PAD)[0]
    single = embedding_noise(batch_of([20], 20, 2), 5.0, SIZE, 1, PAD)
    # The same draws, scaled for 4 and for 16 tokens instead of for 20.
    torch.testing.assert_close(noise[:4], single[0, :4] * math.sqrt(20 / 4))
    torch.testing.assert_close(noise[4:], single[0, 4:] * math.sqrt(20 / 16))


def test_the_embeddings_are_what_is_changed_and_only_inside():
    """The noisy forward pass is a forward pass on embeddings plus noise; afterwards the model is as it was."""
    model = tiny_model()
    ids = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    noise = torch.rand(2, 6, SIZE, generator=torch.Generator().manual_seed(1)) - 0.5
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    plain = model(ids)
    with noisy_embeddings(model, noise):
        noisy = model(ids)
    assert torch.equal(seen[1], seen[0] + noise)
    assert not torch.equal(plain, noisy)
    assert torch.equal(model(ids), plain)
