import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from trivium.losses.kto import best_and_worst, kto

ZERO = torch.zeros(())


def test_hand_worked_both_ways_round_the_reference_point():
    policy, reference = torch.tensor([3.0, 3.0, 0.0]), torch.zeros(3)
    desirable = torch.tensor([True, False, True])
    loss, reward = kto(policy, reference, desirable, torch.tensor(1.0), beta=0.5)
    # r - z = 2, 2, -1, times beta
    assert loss.tolist() == pytest.approx([0.268941, 0.731059, 0.622459], abs=1e-6)
    assert reward.tolist() == [1.5, 1.5, 0.0]


def test_at_the_reference_every_completion_costs_half_its_weight():
    logprobs = torch.tensor([-3.0, -70.0])
    loss, reward = kto(logprobs, logprobs, torch.tensor([True, False]), ZERO, 0.1, 1.0, 1.5)
    assert loss.tolist() == [0.5, 0.75] and (reward == 0).all()


def test_a_negative_baseline_counts_as_none_and_no_gradient_passes_it():
    """KL is never negative, its estimate can be; and as a constant it has no gradient (row 36: it is no penalty)."""
    policy = torch.tensor([0.4, -0.2], requires_grad=True)
    baseline = torch.tensor(0.3, requires_grad=True)
    desirable = torch.tensor([True, False])
    below, at = (kto(policy, torch.zeros(2), desirable, torch.tensor(z), 1.0)[0] for z in (-5.0, 0.0))
    assert torch.equal(below, at)
    loss, reward = kto(policy, torch.zeros(2), desirable, baseline, 1.0)
    loss.sum().backward()
    assert baseline.grad is None and not reward.requires_grad
    assert policy.grad[0] < 0 < policy.grad[1]


def test_turning_the_label_round_gives_the_other_share_of_the_weight():
    generator = torch.Generator().manual_seed(2)
    policy, reference = torch.randn(2, 6, generator=generator)
    labels = torch.tensor([True, False, True, True, False, False])
    one, other = (kto(policy, reference, each, torch.tensor(0.2), 0.7)[0] for each in (labels, ~labels))
    assert torch.allclose(one + other, torch.ones(6), atol=1e-6)  # sigmoid(x) + sigmoid(-x) = 1


def test_a_saturated_completion_keeps_its_gradient():
    """sigmoid(-x), not 1 - sigmoid(x), which in fp32 is exactly 0 from x = 17 on."""
    policy = torch.tensor([20.0], requires_grad=True)
    loss = kto(policy, torch.zeros(1), torch.tensor([True]), ZERO, 1.0)[0]
    assert loss.item() == pytest.approx(math.exp(-20), rel=1e-5)


def test_nonsense_is_refused():
    one = torch.ones(1)
    for beta, good, bad in ((0.0, 1.0, 1.0), (0.1, 0.0, 1.0), (0.1, 1.0, -1.0)):
        with pytest.raises(ValueError, match="positive"):
            kto(one, one, one.bool(), ZERO, beta, good, bad)


def test_best_and_worst_by_hand():
    ranks = torch.tensor([0, 1, 2, 0, 1, 1, 0, 0, 1, 0])
    groups = torch.tensor([7, 7, 7, 3, 3, 3, 5, 5, 9, 9])  # the third group is one tie; the fourth has its best last
    desirable, weights = best_and_worst(ranks, groups)
    assert weights.tolist() == pytest.approx([1 / 2, 0, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 0, 0, 1 / 2, 1 / 2])
    assert desirable[weights > 0].tolist() == [True, False, True, False, False, False, True]


@pytest.mark.parametrize(("good", "bad"), [(1.0, 1.0), (1.3, 0.7)])
@pytest.mark.parametrize("drift", [0.4, -0.4])
def test_same_as_trl_in_value_and_gradient(good, bad, drift):
    """Its own loss on given per-token log-probabilities; the model is a stand-in that returns them."""
    trainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    generator = torch.Generator().manual_seed(8)
    rows, length, beta = 6, 5, 0.3
    mask = torch.ones(rows, length + 1, dtype=torch.long)
    mask[:, 0], mask[2, :3] = 0, 0
    inside = mask[:, 1:].bool()
    logps = torch.where(inside, -torch.rand(rows, length, generator=generator), 0.0)
    stray = torch.where(inside, -torch.rand(rows, length, generator=generator), 0.0)
    refs = logps.sum(1) + 0.5 * torch.randn(rows, generator=generator)
    stray_refs = stray.sum(1) - drift + 0.1 * torch.randn(rows, generator=generator)
    labels = torch.tensor([True, False, True, True, False, True])
    theirs = logps.clone().requires_grad_()
    kl_ids, ids = torch.ones_like(mask), torch.zeros_like(mask)

    def model(input_ids, **_):
        flat = torch.zeros_like(logps)
        return SimpleNamespace(log_probs=stray if input_ids is kl_ids else theirs, entropy=flat, mean_logits=flat)

    holder = SimpleNamespace(
        model=SimpleNamespace(training=True), calculate_KL=True, aux_loss_enabled=False, precompute_ref_logps=True,
        loss_type="kto", beta=beta, desirable_weight=good, undesirable_weight=bad, _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    holder._compute_kl_logps = lambda m, batch: trainer._compute_kl_logps(holder, m, batch)
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(mask), "completion_mask": mask, "label": labels,
        "KL_input_ids": kl_ids, "KL_attention_mask": torch.ones_like(mask), "KL_completion_mask": mask,
        "ref_logps": refs, "ref_KL_logps": stray_refs,
    }  # fmt: skip
    reference = trainer._compute_loss(holder, model, inputs, False)
    mine = logps.clone().requires_grad_()
    baseline = (stray.sum(1) - stray_refs).mean()
    loss, reward = kto(mine.sum(1), refs, labels, baseline, beta, good, bad)
    loss.mean().backward()
    reference.backward()
    assert loss.mean().item() == pytest.approx(float(reference), abs=1e-6)
    assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)
    assert holder._metrics["train"]["rewards/chosen"][0] == pytest.approx(reward[labels].mean().item(), abs=1e-6)
    assert holder._metrics["train"]["kl"][0] == pytest.approx(max(baseline.item(), 0), abs=1e-6)
