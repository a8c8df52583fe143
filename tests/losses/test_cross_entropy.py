import math

import pytest
import torch
from torch.nn import functional

from trivium.batches import IGNORE
from trivium.losses.cross_entropy import cross_entropy, head_cross_entropy


def test_hand_worked_with_a_known_answer():
    # one-token answer: only its predecessor is trained; probabilities 1/2, 1/4, 1/4
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25]] * 3]))
    targets = torch.tensor([[IGNORE, 1, IGNORE]])
    assert cross_entropy(logits, targets).tolist()[0] == pytest.approx([0.0, math.log(4), 0.0])


def test_z_loss_by_hand():
    logits = torch.zeros(1, 1, 4)  # normaliser ln 4
    loss = cross_entropy(logits, torch.zeros(1, 1, dtype=torch.long), z_loss=0.1)
    assert loss.item() == pytest.approx(math.log(4) + 0.1 * math.log(4) ** 2)


def test_same_sum_and_gradient_as_transformers_and_torch():
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 13, generator=generator)
    labels = torch.randint(0, 13, (3, 6), generator=generator)
    labels[0, :3], labels[2, 4:] = IGNORE, IGNORE
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE)  # the one shift, done in the collator
    count = int((targets != IGNORE).sum())
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    mine = cross_entropy(ours, targets).sum() / count
    reference = loss_utils.ForCausalLMLoss(theirs, labels, vocab_size=13, num_items_in_batch=count)
    mine.backward()
    reference.backward()
    assert mine.item() == pytest.approx(reference.item(), abs=2e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_a_row_with_nothing_to_train_has_no_loss_and_no_gradient():
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = cross_entropy(logits, torch.full((1, 4), IGNORE))
    loss.sum().backward()
    assert (loss == 0).all() and (logits.grad == 0).all()


def test_garbage_at_masked_positions_never_shows():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 2, IGNORE, IGNORE], [3, 4, 0, IGNORE]])
    dirty = torch.where((targets == IGNORE).unsqueeze(-1), torch.tensor(1e6), logits)
    assert torch.equal(cross_entropy(logits, targets, 1e-4), cross_entropy(dirty, targets, 1e-4))


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
def test_a_batch_split_into_micro_batches_gives_the_same_gradient(splits):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(11, 6, generator=generator)
    hidden = torch.randn(8, 7, 6, generator=generator)
    targets = torch.randint(0, 11, (8, 7), generator=generator)
    for row in range(8):
        targets[row, row:] = IGNORE  # very unequal lengths: a mean of means would be far off
    count = (targets != IGNORE).sum()

    def gradient(pieces: int) -> torch.Tensor:
        leaf = weight.clone().requires_grad_()
        for h, t in zip(hidden.chunk(pieces), targets.chunk(pieces), strict=True):
            (cross_entropy(h @ leaf.T, t).sum() / count).backward()
        return leaf.grad

    whole = gradient(1)
    assert (gradient(splits) - whole).norm() / whole.norm() < 1e-5


@pytest.mark.parametrize("chunk", [1, 3, 6, 7, 100])
def test_chunked_head_equals_full_in_value_and_gradient(chunk):
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(2, 7, 6, generator=generator), torch.randn(11, 6, generator=generator)
    targets = torch.randint(0, 11, (2, 7), generator=generator)
    targets[1, 4:] = IGNORE
    outcomes = []
    for full in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = cross_entropy(h @ w.T, targets, 1e-3) if full else head_cross_entropy(h, w, targets, chunk, 1e-3)
        loss.sum().backward()
        outcomes.append((loss.detach(), h.grad, w.grad))
    for full, chunked in zip(*outcomes, strict=True):
        assert torch.allclose(full, chunked, atol=5e-6)


def test_a_chunk_of_zero_is_refused():
    with pytest.raises(ValueError, match="chunk 0"):
        head_cross_entropy(torch.zeros(1, 1, 2), torch.zeros(3, 2), torch.zeros(1, 1, dtype=torch.long), 0)
