import pytest
import torch

from trivium.losses.estimators import ESTIMATORS, completion_divisors, round_advantages
from trivium.losses.grpo import grpo
from trivium.losses.ppo import kl_k1
from trivium.losses.reinforce import rloo

from .test_grpo import _trl

PAIR = torch.tensor([1.0, 0.0]), torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)


def test_one_group_of_two_by_hand():
    expected = {("grpo", "none"): 0.5, ("grpo", "std"): 0.5 / (0.5**0.5 + 1e-4), ("rloo", "std"): 1.0}
    for (estimator, scale), value in expected.items():
        found = round_advantages(*PAIR, estimator, 2, scale, 0.1)
        assert found.flatten().tolist() == pytest.approx([value, -value], abs=1e-6)
    assert round_advantages(*PAIR, "reinforce++", 2, "std", 0.1).flatten().tolist() == pytest.approx(
        [0.5**0.5, -(0.5**0.5)], abs=1e-6
    )


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_the_kl_is_in_the_advantages_of_all_but_grpo(estimator):
    """GRPO has it in the loss; a completion that is further from the reference earns less in the others."""
    rewards, mask = torch.zeros(4), torch.ones(4, 3, dtype=torch.bool)
    kl = torch.tensor([0.1, 0.2, 0.3, 0.4]).unsqueeze(1).expand(4, 3)
    advantages = round_advantages(rewards, kl, mask, estimator, 4, "std", 0.5)
    if estimator == "grpo":
        assert (advantages == 0).all()
    else:
        assert (advantages[:-1, 0] > advantages[1:, 0]).all()
    assert (round_advantages(rewards, kl, mask, estimator, 4, "std", 0.0) == 0).all()


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_each_token_has_its_completions_advantage_and_pads_have_none(estimator):
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 1, 4, 5]).unsqueeze(1)
    kl = torch.zeros(6, 5)
    advantages = round_advantages(torch.randn(6, generator=generator), kl, mask, estimator, 3, "none", 0.2)
    assert (advantages[~mask] == 0).all() and advantages.dtype == torch.float32
    for row, inside in zip(advantages, mask, strict=True):
        assert (row[inside] == row[0]).all() and row[0] != 0


def test_only_reinforce_plus_plus_compares_prompts_with_each_other():
    """Two prompts, one always right and one always wrong: groups learn nothing, the round does."""
    rewards, mask = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.ones(4, 1, dtype=torch.bool)
    for estimator in ESTIMATORS:
        advantages = round_advantages(rewards, torch.zeros(4, 1), mask, estimator, 2, "std", 0.0)
        assert bool((advantages != 0).all()) is (estimator == "reinforce++")


@pytest.mark.parametrize(
    ("aggregate", "loss_type", "scale"),
    [
        ("token", "dapo", "std"),
        ("token", "bnpo", "std"),
        ("completion", "grpo", "std"),
        ("constant", "dr_grpo", "none"),
    ],
)
def test_each_aggregate_is_the_loss_type_of_trl(aggregate, loss_type, scale):
    """The step divides the sum by the items: tokens, or completions where there are divisors."""
    generator = torch.Generator().manual_seed(13)
    rows, length, beta = 6, 8, 0.07
    logps = -torch.rand(rows, length, generator=generator) * 2
    old, ref = (logps + 0.3 * torch.randn(rows, length, generator=generator) for _ in range(2))
    mask = torch.arange(length) < torch.tensor([7, 3, 5, 1, 8, 2]).unsqueeze(1)
    rewards = torch.randn(rows, generator=generator)
    advantages = round_advantages(rewards, kl_k1(old, ref), mask, "grpo", 3, scale, beta)
    mine, theirs = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    per_token = grpo(mine, old, ref, advantages, 0.2, beta, mask)
    divisors = completion_divisors("grpo", aggregate, mask, length)
    loss = per_token.sum() / mask.sum() if divisors is None else (per_token.sum(-1) / divisors).sum() / rows
    reference = _trl(loss_type, theirs, old, ref, advantages[:, 0], mask, beta, True)
    loss.backward()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), abs=2e-6)
    assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)


def test_rloo_sums_over_a_completion_whatever_its_length():
    mask = torch.arange(4) < torch.tensor([1, 4]).unsqueeze(1)
    assert completion_divisors("rloo", "token", mask, 9).tolist() == [1.0, 1.0]
    assert completion_divisors("grpo", "token", mask, 9) is None
    assert completion_divisors("grpo", "completion", mask, 9).tolist() == [1.0, 4.0]
    assert completion_divisors("reinforce++", "constant", mask, 9).tolist() == [9.0, 9.0]


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_bandit_of_known_optimum_is_solved(estimator, beta):
    """Ten arms, noisy rewards, a uniform reference. Without KL the best arm takes all. With it the optimum of
    E[r] - beta KL is softmax(r / beta) for GRPO and RLOO, which keep the reward's scale; REINFORCE++ divides reward and
    KL alike, so it has the same one.
    """
    generator = torch.Generator().manual_seed(5)
    means = torch.linspace(0, 1, 10)[torch.randperm(10, generator=generator)]
    theta = torch.zeros(10, requires_grad=True)
    uniform = torch.full((10,), -torch.log(torch.tensor(10.0)).item())
    group, rounds, average = 16, 400, torch.zeros(10)
    optimizer = torch.optim.Adam([theta], lr=0.03)
    mask = torch.ones(4 * group, 1, dtype=torch.bool)
    for round_ in range(rounds):
        with torch.no_grad():
            policy = theta.log_softmax(0)
        arms = torch.multinomial(policy.exp(), len(mask), replacement=True, generator=generator)
        rewards = means[arms] + 0.1 * torch.randn(len(mask), generator=generator)
        old, ref = policy[arms].unsqueeze(1), uniform[arms].unsqueeze(1)
        advantages = round_advantages(rewards, kl_k1(old, ref), mask, estimator, group, "none", beta)
        new = theta.log_softmax(0)[arms].unsqueeze(1)
        if estimator == "rloo":
            loss = rloo(new, old, advantages, 0.2, mask)
        else:
            loss = grpo(new, old, ref, advantages, 0.2, beta if estimator == "grpo" else 0.0, mask)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        if round_ >= rounds - 150:  # Adam never rests: the mean of the last rounds is where it is
            average += theta.detach().softmax(0) / 150
    if beta:
        optimum = (means / beta).softmax(0)
        assert (average - optimum).abs().max() < 0.05  # 0.22 at its highest; 0.1 each where it started
    else:
        assert average[means.argmax()] > 0.9
