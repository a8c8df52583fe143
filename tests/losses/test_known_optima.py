"""PPO and GRPO on problems small enough to be solved on paper: a bandit, and two steps of choosing.

With a price of KL the best policy is known in closed form: `p(y) ~ ref(y) exp(reward(y) / coef)` for whole answers y
(Ziegler et al. 2019, section 2). Everything random is drawn from one seed; tables of logits take the network's place.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trivium.losses.grpo import group_advantages, grpo
from trivium.losses.ppo import gae, kl_k1, policy_loss, shape_rewards, value_loss

ARMS = 4
REWARDS = torch.tensor([1.0, 0.2, -0.5, 0.6])
REFERENCE = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
COEF = 0.5


def best(rewards: Tensor, ref_logprobs: Tensor, coef: float) -> Tensor:
    """Return the probabilities of the answers (any shape) under the best policy at this price of KL."""
    return (ref_logprobs + rewards / coef).flatten().softmax(0).view_as(rewards)


def distance(found: Tensor, known: Tensor) -> float:
    """Return the total variation distance: 0 to 1."""
    return float((found - known).abs().sum() / 2)


def adam(*tables: Tensor) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return an optimizer whose rate falls to nothing, so that the noise of sampling averages out."""
    optimizer = torch.optim.Adam(tables, lr=0.05)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=ROUNDS)


ROUNDS = 200


def test_the_known_optimum_of_the_bandit_by_hand() -> None:
    """Weights ref * exp(r / 0.5): 0.1 e^2, 0.4 e^0.4, 0.3 e^-1, 0.2 e^1.2, which sum to 2.1101."""
    assert best(REWARDS, REFERENCE, COEF).tolist() == pytest.approx([0.3502, 0.2828, 0.0523, 0.3147], abs=1e-4)


def test_ppo_finds_the_bandits_optimum() -> None:
    """One step of choosing, KL in the reward, a value learned beside it, two clipped epochs a round."""
    generator = torch.Generator().manual_seed(0)
    logits, value = REFERENCE.clone().requires_grad_(), torch.zeros(1, requires_grad=True)
    optimizer, schedule = adam(logits, value)
    mask = torch.ones(256, 1, dtype=torch.bool)
    for _ in range(ROUNDS):
        old_policy, old_value = logits.detach().log_softmax(0), value.detach().expand(256, 1)
        arms = torch.multinomial(old_policy.exp(), 256, replacement=True, generator=generator)[:, None]
        old = old_policy[arms]
        rewards = shape_rewards(REWARDS[arms[:, 0]], kl_k1(old, REFERENCE[arms]), mask, COEF)
        advantages, returns = gae(rewards, old_value, mask, 1.0, 0.95)
        for _ in range(2):
            optimizer.zero_grad()
            loss = policy_loss(logits.log_softmax(0)[arms], old, advantages, 0.2, mask)
            loss = loss + value_loss(value.expand(256, 1), old_value, returns, 0.2, mask)
            loss.mean().backward()
            optimizer.step()
        schedule.step()
    known = best(REWARDS, REFERENCE, COEF)
    assert distance(REFERENCE.exp(), known) > 0.3
    # Sampling noise: 256 draws a round and a falling rate leave about 0.01.
    assert distance(logits.detach().softmax(0), known) < 0.04
    # The best policy's value is coef * log sum ref exp(r / coef) = 0.5 * log 2.1101.
    assert value.item() == pytest.approx(0.3734, abs=0.05)


def test_grpo_finds_the_bandits_optimum() -> None:
    """Groups of eight, KL in the loss with its ratio: the same optimum, because that is the reverse KL's gradient."""
    generator = torch.Generator().manual_seed(1)
    logits = REFERENCE.clone().requires_grad_()
    optimizer, schedule = adam(logits)
    groups = torch.arange(256) // 8
    for _ in range(ROUNDS):
        old_policy = logits.detach().log_softmax(0)
        arms = torch.multinomial(old_policy.exp(), 256, replacement=True, generator=generator)
        # A group's mean takes 1/8 of an arm's own reward with it: scaled back, so that the price of KL is COEF.
        advantages = group_advantages(REWARDS[arms], groups, "none") * 8 / 7
        for _ in range(2):
            optimizer.zero_grad()
            logprobs = logits.log_softmax(0)[arms]
            grpo(logprobs, old_policy[arms], REFERENCE[arms], advantages, 0.2, COEF).mean().backward()
            optimizer.step()
        schedule.step()
    assert distance(logits.detach().softmax(0), best(REWARDS, REFERENCE, COEF)) < 0.04


# Two steps: the second choice, among three, is made knowing the first. First choice 0 leads to the best pair and to the
# worst, which the reference takes, so a policy has to learn what to do next before it can prefer it.
PAIRS = torch.tensor([[2.0, -1.0, -1.0], [0.5, 0.5, 0.5]])
FIRST = torch.tensor([0.5, 0.5]).log()
SECOND = torch.tensor([[0.1, 0.45, 0.45], [0.4, 0.3, 0.3]]).log()


def two_steps(first: Tensor, second: Tensor, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` sampled pairs of choices under logits [2] and [2, 3]."""
    a = torch.multinomial(first.softmax(0), count, replacement=True, generator=generator)
    return a, torch.multinomial(second.softmax(1)[a], 1, generator=generator)[:, 0]


def logprobs_of(first: Tensor, second: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the log-probabilities [N, 2] of the two choices."""
    return torch.stack([first.log_softmax(0)[a], second.log_softmax(1)[a, b]], 1)


def joint(first: Tensor, second: Tensor) -> Tensor:
    """Return the probability of each pair."""
    return first.detach().softmax(0)[:, None] * second.detach().softmax(1)


@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_ppo_finds_the_optimum_of_two_steps(lam: float) -> None:
    """The reward comes after the second choice; credit reaches the first through GAE, or with lam 0 the value alone."""
    generator = torch.Generator().manual_seed(2)
    first, second = FIRST.clone().requires_grad_(), SECOND.clone().requires_grad_()
    start, after = torch.zeros(1, requires_grad=True), torch.zeros(2, requires_grad=True)
    optimizer, schedule = adam(first, second, start, after)
    mask = torch.ones(512, 2, dtype=torch.bool)
    for _ in range(ROUNDS):
        a, b = two_steps(first.detach(), second.detach(), generator, 512)
        old, ref = logprobs_of(first, second, a, b).detach(), logprobs_of(FIRST, SECOND, a, b)
        old_values = torch.stack([start.detach().expand(512), after.detach()[a]], 1)
        rewards = shape_rewards(PAIRS[a, b], kl_k1(old, ref), mask, COEF)
        advantages, returns = gae(rewards, old_values, mask, 1.0, lam)
        for _ in range(2):
            optimizer.zero_grad()
            values = torch.stack([start.expand(512), after[a]], 1)
            loss = policy_loss(logprobs_of(first, second, a, b), old, advantages, 0.2, mask)
            (loss + value_loss(values, old_values, returns, 0.2, mask)).sum(1).mean().backward()
            optimizer.step()
        schedule.step()
    known = best(PAIRS, FIRST[:, None] + SECOND, COEF)
    assert known[0].sum() > 0.6  # the first choice that looks worse under the reference
    assert (SECOND.softmax(1) * PAIRS).sum(1)[0] < (SECOND.softmax(1) * PAIRS).sum(1)[1]
    assert distance(joint(FIRST, SECOND), known) > 0.3
    assert distance(joint(first, second), known) < 0.05
    # After each first choice the value is that of the best play from there: coef * log sum ref exp(r / coef).
    expected = COEF * (SECOND + PAIRS / COEF).logsumexp(1)
    assert torch.allclose(after.detach(), expected, atol=0.1)


def test_grpo_without_a_price_finds_the_best_pair() -> None:
    """One advantage for both choices of a completion: nearly all the probability goes to the best pair."""
    generator = torch.Generator().manual_seed(3)
    first, second = FIRST.clone().requires_grad_(), SECOND.clone().requires_grad_()
    optimizer, schedule = adam(first, second)
    groups = torch.arange(512) // 8
    for _ in range(ROUNDS):
        a, b = two_steps(first.detach(), second.detach(), generator, 512)
        old = logprobs_of(first, second, a, b).detach()
        advantages = group_advantages(PAIRS[a, b], groups, "std")[:, None].expand(512, 2)
        for _ in range(2):
            optimizer.zero_grad()
            grpo(logprobs_of(first, second, a, b), old, old, advantages, 0.2, 0.0).sum(1).mean().backward()
            optimizer.step()
        schedule.step()
    assert joint(first, second)[0, 0] > 0.95
