import math

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from trivium.batches import IGNORE
from trivium.losses.cross_entropy import cross_entropy, head_cross_entropy, total_cross_entropy


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


def head_inputs(rows: int = 2, length: int = 9, width: int = 6, vocabulary: int = 11):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(rows, length, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    targets = torch.randint(0, vocabulary, (rows, length), generator=generator)
    targets[1, 4:] = IGNORE
    return hidden, weight, targets


def head_outcome(hidden, weight, targets, z_loss, chunk):
    """Return loss and gradients of a loss that counts 0.37 times; chunk 0 is the full logits."""
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    if chunk:
        loss = head_cross_entropy(h, w, targets, chunk, z_loss)
    else:
        loss = cross_entropy(functional.linear(h, w), targets, z_loss).sum()
    (0.37 * loss).backward()
    return loss.detach(), h.grad, w.grad


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [1, 7, 17, 18, 100])
def test_chunked_head_equals_full_in_value_and_gradient(chunk, z_loss):
    """Row 28: chunks of 1, 7, T - 1 and T of the T = 18 positions, and more; 5 of them not trained."""
    hidden, weight, targets = head_inputs()
    full = head_outcome(hidden, weight, targets, z_loss, 0)
    chunked = head_outcome(hidden, weight, targets, z_loss, chunk)
    for expected, found in zip(full, chunked, strict=True):
        assert (found - expected).norm() <= 2e-6 * expected.norm()
    assert (chunked[1][targets == IGNORE] == 0).all()


@pytest.mark.parametrize("chunk", [1, 7, 17, 18])
def test_chunked_head_under_autocast(chunk):
    """bf16 products over fp32 weights; the weight's gradient stays as near to fp32's as that of the full logits.

    The bar is bf16's own rounding (2^-8) with its accumulations; a sum of chunks in bf16 is what it excludes.
    """
    hidden, weight, targets = head_inputs(rows=4, length=64, width=32, vocabulary=50)
    exact = head_outcome(hidden, weight, targets, 1e-3, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full = head_outcome(hidden, weight, targets, 1e-3, 0)
        found = head_outcome(hidden, weight, targets, 1e-3, chunk)
    assert found[0].dtype == found[2].dtype == torch.float32
    assert (found[0] - exact[0]).abs() <= 5e-3 * exact[0]
    for index in (1, 2):
        error, usual = ((x[index] - exact[index]).norm() / exact[index].norm() for x in (found, full))
        assert error <= 1.5 * usual <= 1e-2


def test_the_sum_over_chunks_is_in_float32():
    """4,096 chunks of one position: each adds a half, which a sum in bf16 would stop adding at 128."""
    hidden = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16)
    targets = torch.zeros(1, 4096, dtype=torch.long)
    found = head_outcome(hidden, weight, targets, 0.0, 1)[2].float()
    assert found.flatten().tolist() == pytest.approx([-2048 * 0.37, 2048 * 0.37], rel=2**-7)


@pytest.mark.skipif(not hasattr(functional, "linear_cross_entropy"), reason="torch before 2.13")
def test_the_same_as_torchs_own():
    hidden, weight, targets = head_inputs()
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = functional.linear_cross_entropy(h.flatten(0, 1), w, targets.flatten(), reduction="sum")
    (0.37 * loss).backward()
    found = head_outcome(hidden, weight, targets, 0.0, 5)
    for expected, ours in zip((loss.detach(), h.grad, w.grad), found, strict=True):
        assert (ours - expected).norm() <= 2e-6 * expected.norm()


def test_one_of_the_two_may_be_frozen():
    hidden, weight, targets = head_inputs()
    _, to_hidden, to_weight = head_outcome(hidden, weight, targets, 0.0, 4)
    alone = hidden.clone().requires_grad_()
    (0.37 * head_cross_entropy(alone, weight, targets, 4)).backward()
    assert torch.equal(alone.grad, to_hidden)
    head = weight.clone().requires_grad_()
    (0.37 * head_cross_entropy(hidden, head, targets, 4)).backward()
    assert torch.equal(head.grad, to_weight)


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor made inside holds."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("trained", [True, False])
def test_the_logits_of_all_positions_are_never_there(trained):
    """512 positions and 1,000 words are 512,000 logits; under a limit of 64 KB no tensor holds more than 16,384."""
    hidden, weight, targets = head_inputs(rows=2, length=256, width=8, vocabulary=1000)
    h, w = hidden.requires_grad_(trained), weight.requires_grad_(trained)

    def largest(limit_bytes: int) -> tuple[int, torch.Tensor]:
        with Largest() as seen:
            total = total_cross_entropy(
                h, w, targets, logits=lambda x: functional.linear(x, w).float(), limit_bytes=limit_bytes
            )
            if trained:
                total.backward()
        return seen.numbers, total.detach()

    whole, expected = largest(512 * 1000 * 4)
    chunked, found = largest(64 * 1024)
    assert whole == 512_000
    assert chunked <= 16_384
    assert found.item() == pytest.approx(expected.item(), rel=2e-6)


def test_small_logits_take_the_plain_path_to_the_bit():
    hidden, weight, targets = head_inputs()
    plain = cross_entropy(functional.linear(hidden, weight), targets, 1e-3).sum()
    assert torch.equal(
        total_cross_entropy(hidden, weight, targets, logits=lambda x: functional.linear(x, weight), z_loss=1e-3), plain
    )


def test_a_chunk_of_zero_is_refused():
    with pytest.raises(ValueError, match="chunk 0"):
        head_cross_entropy(torch.zeros(1, 1, 2), torch.zeros(3, 2), torch.zeros(1, 1, dtype=torch.long), 0)
