"""The moving average of the weights, by hand."""

from __future__ import annotations

import torch
from torch import nn

from trivium.training.average import Average


def one_weight() -> nn.Linear:
    """Return a network of one weight, which is 0."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def test_three_steps_by_hand() -> None:
    """Decay 0.5 from 0, weights 2, 4, 8: 0.5*0 + 0.5*2 = 1, then 2.5, then 5.25; exact in binary."""
    model = one_weight()
    average = Average(model, 0.5)
    seen = []
    for weight in (2.0, 4.0, 8.0):
        nn.init.constant_(model.weight, weight)
        average.update()
        seen.append(average.tensors()["weight"].item())
    assert seen == [1.0, 2.5, 5.25]


def test_it_is_kept_in_fp32_where_the_weights_are_not() -> None:
    """0.999 * 1 + 0.001 * 1.0078125 is no bf16 number; the average moves all the same, by the fp32 formula."""
    model = one_weight().to(torch.bfloat16)
    nn.init.ones_(model.weight)
    average = Average(model, 0.999)
    nn.init.constant_(model.weight, 1.0078125)
    average.update()
    value = average.tensors()["weight"]
    assert value.dtype is torch.float32
    # One rounding of fp32, 6e-8 relative, is the tolerance.
    assert abs(value.item() - (1.0 + 0.001 * 0.0078125)) < 1.2e-7 and value.item() != 1.0


def test_the_weights_come_back_to_the_bit_also_after_an_error() -> None:
    """Inside, the model has the average; outside, its own weights."""
    model = one_weight()
    average = Average(model, 0.5)
    nn.init.constant_(model.weight, 0.1)
    own = model.weight.detach().clone()
    average.update()
    try:
        with average.in_model():
            assert model.weight.item() == average.tensors()["weight"].item() != own.item()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.equal(model.weight, own)
    average.copy_to_model()
    assert model.weight.item() == average.tensors()["weight"].item()
