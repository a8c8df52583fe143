import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from trivium.losses.grpo import group_advantages
from trivium.losses.ppo import kl_k1, policy_loss
from trivium.losses.reinforce import leave_one_out, normalised, penalised, returns_to_go, rloo


def test_leave_one_out_by_hand_and_by_its_definition():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.long)
    assert leave_one_out(rewards, groups).tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    generator = torch.Generator().manual_seed(0)
    rewards, groups = torch.randn(9, generator=generator), torch.tensor([4, 1, 4, 1, 4, 1, 1, 4, 1])
    for row in range(9):
        others = [float(rewards[i]) for i in range(9) if groups[i] == groups[row] and i != row]
        expected = float(rewards[row]) - sum(others) / len(others)
        assert leave_one_out(rewards, groups)[row].item() == pytest.approx(expected, abs=1e-6)


def test_leave_one_out_is_the_groups_mean_times_n_over_n_minus_1_and_sums_to_zero():
    generator = torch.Generator().manual_seed(1)
    rewards, groups = torch.randn(10, generator=generator), torch.tensor([0] * 3 + [1] * 7)
    advantages = leave_one_out(rewards, groups)
    factor = torch.tensor([3 / 2] * 3 + [7 / 6] * 7)
    assert torch.allclose(advantages, factor * group_advantages(rewards, groups, "none"), atol=1e-6)
    assert abs(advantages[:3].sum()) < 1e-6 and abs(advantages[3:].sum()) < 1e-6
    assert torch.allclose(leave_one_out(10 * rewards + 5, groups), 10 * advantages, atol=1e-5)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, -12.3])
def test_equal_rewards_teach_exactly_nothing(value):
    """To the last bit, though the mean of equal numbers need not equal them (row 51)."""
    rewards, groups = torch.full((7,), value), torch.zeros(7, dtype=torch.long)
    assert (leave_one_out(rewards, groups) == 0).all()
    assert (leave_one_out(torch.tensor([3.0, 5.0]), torch.tensor([0, 1])) == 0).all()
    mask = torch.arange(5) < torch.tensor([5, 1, 2, 3, 4, 5, 2]).unsqueeze(1)
    advantages = normalised(returns_to_go(rewards, torch.zeros(7, 5), mask, 0.3), mask)
    assert (advantages == 0).all()
    leaf = torch.full((7, 5), -1.0, requires_grad=True)
    rloo(leaf, leaf.detach(), advantages, 0.2, mask).sum().backward()
    assert (leaf.grad == 0).all()


def test_rewards_less_their_kl_by_hand():
    kl, mask = torch.tensor([[0.1, 0.3, 1e6]]), torch.tensor([[True, True, False]])
    assert penalised(torch.tensor([2.0]), kl, mask, 0.5).item() == pytest.approx(1.8)
    assert returns_to_go(torch.tensor([2.0]), kl, mask, 0.5).tolist()[0] == pytest.approx([1.8, 1.85, 0.0])


def test_returns_to_go_begin_at_the_penalised_score_and_shrink_to_the_last_tokens():
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(5, 8, generator=generator) < 0.6
    mask[:, 3] = True
    scores, kl = torch.randn(5, generator=generator), torch.randn(5, 8, generator=generator)
    returns = returns_to_go(scores, kl, mask, 0.4)
    first = returns.gather(1, mask.int().argmax(1, keepdim=True)).squeeze(1)
    assert torch.allclose(first, penalised(scores, kl, mask, 0.4), atol=1e-6)
    for row in range(5):
        inside = [int(t) for t in mask[row].nonzero()]
        for t in inside:
            later = sum(float(kl[row, i]) for i in inside if i >= t)
            assert returns[row, t].item() == pytest.approx(float(scores[row]) - 0.4 * later, abs=1e-5)


def test_normalised_over_the_tokens_of_the_round():
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(6, 7, generator=generator) < 0.5
    returns = 3 + 4 * torch.randn(6, 7, generator=generator)
    white = normalised(returns, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].std().item() == pytest.approx(1, abs=1e-5)
    assert (white[~mask] == 0).all()
    assert torch.allclose(normalised(10 * returns - 7, mask), white, atol=1e-5)
    assert torch.equal(normalised(returns, torch.zeros_like(mask)), torch.zeros(6, 7))


@pytest.mark.parametrize(
    ("log_ratios", "advantage", "loss"),
    [((0.05, 0.05), 1.0, -math.exp(0.1)), ((0.15, 0.15), 1.0, -1.2), ((0.15, 0.15), -1.0, math.exp(0.3)),
     ((-0.2, -0.2), -1.0, 0.8), ((0.3, -0.3), 2.0, -2.0)],
)  # fmt: skip
def test_rloo_by_hand_clips_the_whole_completion(log_ratios, advantage, loss):
    """Two tokens of 0.15 are within 0.2 each, and their completion is not; what cancels out has ratio 1."""
    logprobs = torch.tensor([[0.0, *log_ratios]])
    mask = torch.tensor([[False, True, True]])
    found = rloo(logprobs, torch.zeros(1, 3), advantage * mask.float(), 0.2, mask)
    assert found.shape == (1,) and found.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("garbage", [1e6, -1e6])
def test_garbage_outside_the_mask_reaches_nothing(garbage):
    """Row 40, for everything that reads a [B, T] tensor here: loss, gradient, advantages."""
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(4, 6, generator=generator) < 0.5
    mask[:, 2] = True
    made = [torch.randn(4, 6, generator=generator) for _ in range(3)]
    scores, advantage = torch.randn(4, generator=generator), torch.randn(4, 1, generator=generator)

    def outcome(fill: float):
        logprobs, old, kl = (torch.where(mask, x, fill).requires_grad_() for x in made)
        loss = rloo(logprobs, old, torch.where(mask, advantage, fill), 0.2, mask)
        loss.sum().backward()
        returns = returns_to_go(scores, kl.detach(), mask, 0.3)
        white = normalised(torch.where(mask, returns, fill), mask)
        return loss, logprobs.grad, penalised(scores, kl, mask, 0.3), returns, white

    for clean, dirty in zip(outcome(0.0), outcome(garbage), strict=True):
        assert torch.equal(clean, dirty)


# ------------------------------------------------------------------ where the KL enters: exact, by enumeration (row 36)

WORDS = 4


def _sequences():
    """Return the leaf of a policy over all two-token sequences, its per-token logprobs [16, 2], and a reference's."""
    generator = torch.Generator().manual_seed(36)
    theta = torch.randn(
        1 + WORDS, WORDS, generator=generator
    ).requires_grad_()  # the first token, then one row for each
    phi = torch.randn(1 + WORDS, WORDS, generator=generator)

    def logprobs(table):
        table = table.log_softmax(-1)
        first = table[0].repeat_interleave(WORDS)
        return torch.stack([first, table[1:].flatten()], 1)

    return theta, logprobs, logprobs(theta), logprobs(phi)


def _reverse_kl_gradient() -> torch.Tensor:
    theta, _, policy, reference = _sequences()
    (policy.sum(1).exp() * (policy - reference).sum(1)).sum().backward()
    return theta.grad


def test_rloos_kl_in_the_reward_has_the_gradient_of_the_reverse_kl():
    """Expected over every group of two independent samples: the baseline of the others adds no bias at all."""
    theta, _, policy, reference = _sequences()
    frozen, mask = policy.detach(), torch.ones(16, 2, dtype=torch.bool)
    rewards = penalised(torch.zeros(16), kl_k1(frozen, reference), mask, 1.0)
    chance = frozen.sum(1).exp()
    total = torch.zeros(())
    for one in range(16):
        for other in range(16):
            rows = torch.tensor([one, other])
            advantages = leave_one_out(rewards[rows], torch.zeros(2, dtype=torch.long))
            loss = rloo(policy[rows], frozen[rows], advantages[:, None].expand(2, 2), 0.2, mask[rows])
            total = total + chance[one] * chance[other] * loss.mean()
    total.backward()
    assert theta.grad.norm() > 0.1
    assert torch.allclose(theta.grad, _reverse_kl_gradient(), atol=1e-6)


def test_the_groups_own_mean_shrinks_that_gradient_by_n_minus_1_over_n():
    theta, _, policy, reference = _sequences()
    frozen, mask = policy.detach(), torch.ones(16, 2, dtype=torch.bool)
    rewards = penalised(torch.zeros(16), kl_k1(frozen, reference), mask, 1.0)
    chance = frozen.sum(1).exp()
    total = torch.zeros(())
    for one in range(16):
        for other in range(16):
            rows = torch.tensor([one, other])
            advantages = group_advantages(rewards[rows], torch.zeros(2, dtype=torch.long), "none")
            loss = rloo(policy[rows], frozen[rows], advantages[:, None].expand(2, 2), 0.2, mask[rows])
            total = total + chance[one] * chance[other] * loss.mean()
    total.backward()
    assert torch.allclose(theta.grad, _reverse_kl_gradient() / 2, atol=1e-6)


def test_returns_to_go_have_the_gradient_of_the_reverse_kl_token_by_token():
    """What came before a token is left out of its return: it adds variance and, on average, nothing."""
    theta, _, policy, reference = _sequences()
    frozen, mask = policy.detach(), torch.ones(16, 2, dtype=torch.bool)
    returns = returns_to_go(torch.zeros(16), kl_k1(frozen, reference), mask, 1.0)
    loss = policy_loss(policy, frozen, returns, 0.2, mask).sum(1)
    (frozen.sum(1).exp() * loss).sum().backward()
    assert torch.allclose(theta.grad, _reverse_kl_gradient(), atol=1e-6)


def test_normalising_over_the_round_only_scales_that_gradient():
    """For a uniform policy every sequence once is the exact expectation: the mean is a baseline, the std a factor."""
    theta, logprobs, _, reference = _sequences()
    with torch.no_grad():
        theta.zero_()
    policy, mask = logprobs(theta), torch.ones(16, 2, dtype=torch.bool)
    (policy.sum(1).exp() * (policy - reference).sum(1)).sum().backward()
    exact, theta.grad = theta.grad, None
    returns = returns_to_go(torch.zeros(16), kl_k1(policy.detach(), reference), mask, 1.0)
    policy = logprobs(theta)
    (policy_loss(policy, policy.detach(), normalised(returns, mask), 0.2, mask).sum() / 16).backward()
    assert torch.allclose(theta.grad * returns.std(), exact, atol=1e-6)


# ------------------------------------------------------------------------------------------------- against TRL's own


def test_rloo_is_trls_in_value_and_gradient():
    trainer = pytest.importorskip("trl.trainer.rloo_trainer").RLOOTrainer
    generator = torch.Generator().manual_seed(12)
    rows, length, n, beta = 8, 6, 4, 0.05
    mask = torch.arange(length) < torch.tensor([6, 3, 5, 1, 2, 4, 6, 2]).unsqueeze(1)
    logps = -torch.rand(rows, length, generator=generator) * 2
    old, ref = (logps + 0.1 * torch.randn(rows, length, generator=generator) for _ in range(2))
    scores = torch.randn(rows, generator=generator)
    # TRL computes these in the middle of sampling: reward less KL, then the mean of the others, written out.
    shaped = scores - beta * ((old - ref) * mask).sum(-1)
    grouped = shaped.view(-1, n)
    expected = shaped - ((grouped.sum(1, keepdim=True) - grouped) / (n - 1)).view(-1)
    advantages = leave_one_out(penalised(scores, kl_k1(old, ref), mask, beta), torch.arange(rows) // n)
    assert torch.allclose(advantages, expected, atol=2e-6)
    mine, theirs = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    same = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, device="cpu")
    holder = SimpleNamespace(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, epsilon_low=0.2, epsilon_high=0.2,
        accelerator=same, _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *a, **k: (theirs, torch.zeros_like(theirs), None),
    )  # fmt: skip
    ids = torch.zeros(rows, length, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": expected, "old_logps": (old * mask).sum(1),
    }  # fmt: skip
    reference = trainer._compute_loss(holder, None, inputs)
    loss = rloo(mine, old, advantages.unsqueeze(1) * mask, 0.2, mask).mean()
    loss.backward()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), abs=2e-6)
    assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)
