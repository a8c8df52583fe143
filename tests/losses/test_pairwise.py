import itertools
import math

import numpy as np
import pytest
import torch

from trivium.losses.pairwise import bradley_terry, centering, plackett_luce


def test_hand_worked_margins():
    lead = torch.tensor([0.0, 1.0, 2.0])
    assert bradley_terry(lead, torch.zeros(3)).tolist() == pytest.approx([0.6931, 0.3133, 0.1269], abs=5e-5)
    # a margin of 1 takes one nat off every lead
    assert bradley_terry(lead, torch.zeros(3), margin=1.0).tolist() == pytest.approx([1.3133, 0.6931, 0.3133], abs=5e-5)


def test_swapping_the_sides_negates_the_margin_and_the_gradient():
    scores = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.allclose(
        bradley_terry(scores[0], scores[1]) - bradley_terry(scores[1], scores[0]), scores[1] - scores[0], atol=1e-6
    )


def test_same_as_trl_reward_trainer_formula():
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randn(5, generator=generator), torch.randn(5, generator=generator)
    reference = -torch.nn.functional.logsigmoid(chosen - rejected - 0.3)
    assert torch.allclose(bradley_terry(chosen, rejected, 0.3), reference, atol=2e-7)


def test_far_apart_scores_stay_finite():
    assert bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4])).item() == pytest.approx(2e4)


def test_plackett_luce_by_hand():
    scores = torch.log(torch.tensor([3.0, 2.0, 1.0]))
    loss = plackett_luce(scores, torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.long))
    assert loss.tolist() == pytest.approx([math.log(3)])  # 3/6 * 2/3 * 1/1 = 1/3


def test_two_items_are_bradley_terry():
    scores = torch.randn(6, generator=torch.Generator().manual_seed(2))
    groups = torch.tensor([0, 0, 1, 1, 7, 7])
    loss = plackett_luce(scores, torch.tensor([0, 1, 1, 0, 0, 1]), groups)
    expected = bradley_terry(scores[[0, 3, 4]], scores[[1, 2, 5]])
    assert torch.allclose(loss, expected, atol=1e-6)


def test_likelihoods_of_all_orders_sum_to_one_and_row_order_does_not_matter():
    scores = torch.randn(4, generator=torch.Generator().manual_seed(3))
    groups = torch.zeros(4, dtype=torch.long)
    orders = [torch.tensor(order) for order in itertools.permutations(range(4))]
    assert sum(math.exp(-plackett_luce(scores, ranks, groups).item()) for ranks in orders) == pytest.approx(1, abs=1e-5)
    ranks, shuffle = orders[5], torch.tensor([2, 0, 3, 1])
    assert plackett_luce(scores, ranks, groups).item() == pytest.approx(
        plackett_luce(scores[shuffle], ranks[shuffle], groups).item(), abs=1e-6
    )


def test_ties_by_hand_and_pull_together():
    # b and c tie for second: ln(3 + 2 + 1) - ln 3, then each from {b, c}: 2 ln(2 + 1) - ln 2 - ln 1
    scores = torch.log(torch.tensor([3.0, 2.0, 1.0]))
    loss = plackett_luce(scores, torch.tensor([0, 1, 1]), torch.zeros(3, dtype=torch.long))
    assert loss.item() == pytest.approx(math.log(2) + 2 * math.log(3) - math.log(2))
    tied = torch.tensor([1.0, -1.0], requires_grad=True)
    plackett_luce(tied, torch.tensor([0, 0]), torch.zeros(2, dtype=torch.long)).sum().backward()
    assert tied.grad[0] > 0 > tied.grad[1]


def test_all_pairs_of_a_prompt_weigh_one_like_instructgpt():
    scores = torch.tensor([2.0, 1.0, 0.0], requires_grad=True)
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2]])
    losses = bradley_terry(scores[pairs[:, 0]], scores[pairs[:, 1]])
    assert (losses / 3).sum().item() == pytest.approx((0.313262 + 0.126928 + 0.313262) / 3, abs=1e-6)


def _minimise(loss_of, num_items: int) -> np.ndarray:
    scores = torch.zeros(num_items, requires_grad=True)
    solver = torch.optim.LBFGS([scores], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = loss_of(scores)
        loss.backward()
        return loss

    solver.step(closure)
    # A line search ends where fp32 sees no change in the loss, about 3e-4 from the optimum; the gradient sees further.
    found = scores.detach()
    for _ in range(3):
        curvature = torch.autograd.functional.hessian(loss_of, found)
        gradient = torch.autograd.functional.jacobian(loss_of, found)
        found = found - torch.linalg.pinv(curvature, rtol=1e-4) @ gradient
    return (found - found.mean()).numpy()


def test_optimum_of_pairs_is_that_of_choix():
    choix = pytest.importorskip("choix")
    rng = np.random.default_rng(0)
    strength = np.array([0.0, 0.4, -0.5, 1.0, 0.2])
    pairs = []
    for _ in range(300):
        a, b = rng.choice(5, size=2, replace=False)
        wins = rng.random() < 1 / (1 + math.exp(strength[b] - strength[a]))
        pairs.append((a, b) if wins else (b, a))
    index = torch.tensor(pairs)
    ours = _minimise(lambda s: bradley_terry(s[index[:, 0]], s[index[:, 1]]).mean(), 5)
    reference = choix.ilsr_pairwise(5, [(int(a), int(b)) for a, b in pairs], alpha=0.0)
    assert np.abs(ours - (reference - reference.mean())).max() < 1e-4


def test_optimum_of_rankings_is_that_of_choix():
    choix = pytest.importorskip("choix")
    rng = np.random.default_rng(1)
    strength = np.array([0.0, 0.8, -0.5, 0.3])
    rankings = [[int(i) for i in np.argsort(-(strength + rng.gumbel(size=4)))] for _ in range(120)]
    items = torch.tensor(rankings).flatten()
    ranks, groups = torch.arange(4).repeat(120), torch.arange(120).repeat_interleave(4)
    ours = _minimise(lambda s: plackett_luce(s[items], ranks, groups).mean(), 4)
    reference = choix.ilsr_rankings(4, rankings, alpha=0.0)
    assert np.abs(ours - (reference - reference.mean())).max() < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_optimum_of_both_is_that_of_choix_by_its_other_solvers(seed):
    """`opt_pairwise` and `opt_rankings` minimise the same likelihoods by Newton's method: to 1e-4, centred."""
    choix = pytest.importorskip("choix")
    rng = np.random.default_rng([seed, 7])
    strength = rng.normal(size=5)
    rankings = [[int(i) for i in np.argsort(-(strength + rng.gumbel(size=5)))] for _ in range(80)]
    pairs = [(ranking[a], ranking[b]) for ranking in rankings for a, b in [sorted(rng.choice(5, 2, replace=False))]]
    index, items = torch.tensor(pairs), torch.tensor(rankings).flatten()
    ranks, groups = torch.arange(5).repeat(80), torch.arange(80).repeat_interleave(5)
    for ours, theirs in (
        (
            _minimise(lambda s: bradley_terry(s[index[:, 0]], s[index[:, 1]]).mean(), 5),
            choix.opt_pairwise(5, pairs, alpha=0.0, tol=1e-10),
        ),
        (
            _minimise(lambda s: plackett_luce(s[items], ranks, groups).mean(), 5),
            choix.opt_rankings(5, rankings, alpha=0.0, tol=1e-10),
        ),
    ):
        assert np.abs(ours - (theirs - theirs.mean())).max() < 1e-4


def test_centering_by_hand_and_by_its_gradient():
    assert centering(torch.tensor([2.0, 0.5]), torch.tensor([1.0, -0.5])).tolist() == [9, 0]
    scores = torch.tensor([2.0, 1.0], requires_grad=True)
    centering(scores[:1], scores[1:]).sum().backward()
    assert scores.grad.tolist() == [6, 6]


def test_a_soft_target_is_cross_entropy_with_it():
    """By hand: a lead of 1 with p = 3/4 costs 0.3133 + 1/4; at p = 1/2 neither side is favoured."""
    lead, zero = torch.tensor([1.0, 1.0, -1.0]), torch.zeros(3)
    target = torch.tensor([0.75, 0.5, 0.5])
    assert bradley_terry(lead, zero, 0.0, target).tolist() == pytest.approx([0.5633, 0.8133, 0.8133], abs=5e-5)
    generator = torch.Generator().manual_seed(4)
    chosen, rejected, p = (
        torch.randn(9, generator=generator),
        torch.randn(9, generator=generator),
        torch.rand(9, generator=generator),
    )
    reference = torch.nn.functional.binary_cross_entropy_with_logits(chosen - rejected, p, reduction="none")
    assert torch.allclose(bradley_terry(chosen, rejected, 0.0, p), reference, atol=1e-6)


def test_a_target_of_one_is_the_hard_loss_to_the_bit():
    generator = torch.Generator().manual_seed(5)
    chosen, rejected = (30 * torch.randn(2, 200, generator=generator)).unbind()
    for margin in (0.0, 0.7):
        hard = bradley_terry(chosen, rejected, margin)
        assert torch.equal(bradley_terry(chosen, rejected, margin, torch.ones(200)), hard)


def test_a_soft_target_is_met_at_its_log_odds():
    p = torch.tensor([0.6, 0.75, 0.99])
    lead = torch.log(p / (1 - p)).requires_grad_()
    bradley_terry(lead, torch.zeros(3), 0.0, p).sum().backward()
    assert lead.grad.abs().max() < 1e-6
