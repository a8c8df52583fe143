import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from trivium.losses.dpo import dpo, hinge, ipo, robust_dpo

ZERO = torch.zeros(3)


def test_hand_worked_margins():
    loss, win, lose = dpo(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, -1.0, -1.0]), ZERO, ZERO, beta=0.5)
    assert loss.tolist() == pytest.approx([0.6931, 0.3133, 0.1269], abs=5e-5)
    assert win.tolist() == [0.0, 0.5, 1.5] and lose.tolist() == [0.0, -0.5, -0.5]


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_at_the_reference_the_loss_is_ln_2_and_the_rewards_are_0(beta):
    chosen, rejected = torch.tensor([-5.0, -700.0, -1.0]), torch.tensor([-9.0, -3.0, -44.0])
    loss, win, lose = dpo(chosen, rejected, chosen, rejected, beta)
    assert loss.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert (win == 0).all() and (lose == 0).all()


def test_three_meanings_of_label_smoothing():
    h = torch.tensor([2.0])  # beta 1, so -log sigmoid(2) = 0.126928 and -log sigmoid(-2) = 2.126928
    zero = torch.zeros(1)
    assert dpo(h, zero, zero, zero, 1.0)[0].item() == pytest.approx(0.126928, abs=1e-6)
    assert dpo(h, zero, zero, zero, 1.0, 0.1)[0].item() == pytest.approx(0.9 * 0.126928 + 0.1 * 2.126928, abs=1e-6)
    assert robust_dpo(h, zero, zero, zero, 1.0, 0.1)[0].item() == pytest.approx(
        (0.9 * 0.126928 - 0.1 * 2.126928) / 0.8, abs=1e-6
    )
    for unaware in (hinge, ipo):
        with pytest.raises(ValueError, match="label_smoothing"):
            unaware(h, zero, zero, zero, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"0\.5"):
        dpo(h, zero, zero, zero, 1.0, 0.5)


def test_conservative_optimum_is_a_finite_margin():
    h = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)  # logit(1 - 0.1)
    zero = torch.zeros(1)
    dpo(h, zero, zero, zero, 1.0, 0.1)[0].sum().backward()
    assert h.grad.item() == pytest.approx(0.0, abs=1e-7)


def test_robust_is_unbiased_under_flipped_labels():
    h, zero, e = torch.tensor([0.7]), torch.zeros(1), 0.2
    right, flipped = robust_dpo(h, zero, zero, zero, 1.0, e)[0], robust_dpo(zero, h, zero, zero, 1.0, e)[0]
    assert (0.8 * right + 0.2 * flipped).item() == pytest.approx(dpo(h, zero, zero, zero, 1.0)[0].item(), abs=1e-6)


def test_swapped_pair_gives_the_loss_of_the_negated_margin():
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(4, generator=generator) for _ in range(4))
    margin = 0.3 * ((a - c) - (b - d))
    assert torch.allclose(dpo(b, a, d, c, 0.3)[0], -torch.nn.functional.logsigmoid(-margin), atol=1e-6)


def test_a_neutral_token_on_both_sides_adds_to_sums_but_not_to_means():
    # summed log-probabilities: the chosen 2 tokens of -1, the rejected 2 of -2; both get a third, rated +0.5 and -0.5
    def losses(extra: int) -> tuple[float, float]:
        n = 2 + extra
        chosen, rejected = torch.tensor([-2.0 + 0.5 * extra]), torch.tensor([-4.0 - 0.5 * extra])
        zero = torch.zeros(1)
        summed = dpo(chosen, rejected, zero, zero, 0.1)
        meaned = ipo(chosen / n, rejected / n, zero, zero, 0.1)
        return (summed[1] - summed[2]).item() / 0.1, (meaned[1] - meaned[2]).item() / 0.1

    assert losses(0)[0] == pytest.approx(2.0, abs=1e-5) and losses(1)[0] == pytest.approx(3.0, abs=1e-5)
    assert losses(0)[1] == pytest.approx(1.0, abs=1e-5) and losses(2)[1] == pytest.approx(1.0, abs=1e-5)


def test_hinge_by_hand_and_its_flat_side():
    h = torch.tensor([-1.0, 0.0, 1.0, 2.0, 5.0], requires_grad=True)
    zero = torch.zeros(5)
    loss = hinge(h, zero, zero, zero, 0.5)[0]
    loss.sum().backward()
    assert loss.tolist() == [1.5, 1.0, 0.5, 0.0, 0.0]  # a margin of 1 / beta is enough
    assert h.grad.tolist()[:3] == [-0.5] * 3 and h.grad[4] == 0


def test_ipo_by_hand():
    zero = torch.zeros(2)
    loss = ipo(torch.tensor([0.0, 6.0]), torch.tensor([0.0, 1.0]), zero, zero, 0.1)[0]
    assert loss.tolist() == pytest.approx([25.0, 0.0], abs=1e-4)  # the target is a lead of 1 / (2 beta) = 5


@pytest.mark.parametrize("loss", [dpo, robust_dpo, hinge, ipo])
def test_beta_must_be_positive(loss):
    with pytest.raises(ValueError, match="beta"):
        loss(ZERO, ZERO, ZERO, ZERO, 0.0)


def test_gradient_reaches_the_policy_only_and_rewards_are_detached():
    leaves = [torch.randn(3, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(2)]
    loss, win, lose = dpo(leaves[0], leaves[1], ZERO, ZERO, 0.1)
    loss.sum().backward()
    assert (leaves[0].grad < 0).all() and (leaves[1].grad > 0).all()
    assert not win.requires_grad and not lose.requires_grad


def _trl(loss_type: str, smoothing: float, logps: torch.Tensor, refs: torch.Tensor, mask: torch.Tensor, beta: float):
    """TRL's own loss on given per-token log-probabilities: the model is a stand-in that returns them."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    holder = SimpleNamespace(
        model=SimpleNamespace(training=True), ref_model=None, accelerator=accelerator, aux_loss_enabled=False,
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=beta,
        loss_types=[loss_type], loss_weights=[1.0], label_smoothing=smoothing, use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip

    def model(**_):
        flat = torch.zeros_like(logps)
        return SimpleNamespace(log_probs=logps, entropy=flat, mean_logits=flat, is_top1=flat.bool())

    ref_sums = refs.sum(1)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": ref_sums[: len(refs) // 2],
        "ref_rejected_logps": ref_sums[len(refs) // 2 :],
    }
    return trainer._compute_loss(holder, model, inputs, False)


@pytest.mark.parametrize(
    ("loss_type", "ours", "smoothing"),
    [
        ("sigmoid", dpo, 0.0),
        ("sigmoid_norm", dpo, 0.0),
        ("robust", robust_dpo, 0.2),
        ("hinge", hinge, 0.0),
        ("ipo", ipo, 0.0),
    ],
)
def test_same_as_trl(loss_type, ours, smoothing):
    generator = torch.Generator().manual_seed(6)
    pairs, length, beta = 4, 7, 0.2
    mask = torch.ones(2 * pairs, length + 1, dtype=torch.long)
    for row in range(2 * pairs):
        mask[row, : 1 + row % 3] = 0
    shifted = mask[:, 1:].bool()
    logps = -torch.rand(2 * pairs, length, generator=generator) * shifted
    refs = -torch.rand(2 * pairs, length, generator=generator) * shifted
    reference = _trl(loss_type, smoothing, logps, refs, mask, beta)
    sums, ref_sums = logps.sum(1), refs.sum(1)
    if loss_type in ("ipo", "sigmoid_norm"):
        sums, ref_sums = sums / mask.sum(1), ref_sums / mask.sum(1)
    half = pairs
    loss = ours(sums[:half], sums[half:], ref_sums[:half], ref_sums[half:], beta, smoothing)[0]
    assert loss.mean().item() == pytest.approx(float(reference), abs=2e-6)
