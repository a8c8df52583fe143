import math

import pytest
import torch

from trivium.batches import IGNORE
from trivium.losses.logprobs import entropy, masked_mean, masked_sum, token_logprobs, whiten


def test_hand_worked_logprobs_at_two_temperatures():
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, math.log(3.0)]]])  # probabilities 1/4 and 3/4
    targets = torch.tensor([[1, 0]])
    assert token_logprobs(logits, targets).tolist()[0] == pytest.approx([-0.287682, -1.386294], abs=1e-6)
    # at temperature 1/2 the odds are squared: 9 to 1
    assert token_logprobs(logits, targets, 0.5).tolist()[0] == pytest.approx([math.log(0.9), math.log(0.1)], abs=1e-6)


def test_greedy_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature 0"):
        token_logprobs(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long), 0.0)


def test_masked_positions_are_zero_and_garbage_there_changes_nothing():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5, 7, generator=generator)
    targets = torch.randint(0, 7, (3, 5), generator=generator)
    targets[0, 3:], targets[2, :2] = IGNORE, IGNORE
    dirty = torch.where((targets == IGNORE).unsqueeze(-1), torch.tensor(1e6), logits)
    results = []
    for version in (logits, dirty):
        leaf = version.clone().requires_grad_()
        out = token_logprobs(leaf, targets)
        out.sum().backward()
        results.append((out.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[0][0][targets == IGNORE] == 0).all()


def test_uniform_and_certain_distributions_have_known_entropy():
    logits = torch.tensor([[[0.0] * 8, [1000.0] + [0.0] * 7]])
    assert entropy(logits).tolist()[0] == pytest.approx([math.log(8), 0.0], abs=1e-6)


def test_half_precision_logits_are_worked_in_fp32():
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(2)).bfloat16()
    targets = torch.ones(2, 3, dtype=torch.long)
    out = token_logprobs(logits, targets)
    assert out.dtype == torch.float32
    assert torch.allclose(out, logits.double().log_softmax(-1)[..., 1].float(), atol=1e-6)


def test_masked_reductions_by_hand():
    x = torch.tensor([[1.0, 2.0, 1e6], [4.0, 1e6, 1e6]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_sum(x, mask).tolist() == [3.0, 4.0]
    assert masked_mean(x, mask).item() == pytest.approx(7 / 3)
    assert masked_mean(x, torch.zeros_like(mask)).item() == 0.0


def test_whitening_by_hand_and_against_garbage():
    x = torch.tensor([[1.0, 3.0, 1e6], [5.0, 1e6, 1e6]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # mean 3, unbiased variance (4 + 0 + 4) / 2 = 4
    assert whiten(x, mask).flatten().tolist() == pytest.approx([-1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    assert whiten(x, mask, shift_mean=False).flatten().tolist() == pytest.approx([2.0, 3.0, 0.0, 4.0, 0.0, 0.0])
    assert torch.equal(whiten(x, mask), whiten(torch.where(mask, x, -7.0), mask))


def test_same_as_trl():
    reference = pytest.importorskip("trl.trainer.utils")
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 9, 50, generator=generator) * 3
    targets = torch.randint(0, 50, (4, 9), generator=generator)
    assert torch.allclose(token_logprobs(logits, targets), reference.selective_log_softmax(logits, targets), atol=1e-6)
    assert torch.allclose(entropy(logits), reference.entropy_from_logits(logits), atol=2e-6)
