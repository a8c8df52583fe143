import math

import numpy as np
import pytest
import torch

from trivium.losses.grpo import grpo
from trivium.losses.logprobs import token_logprobs
from trivium.losses.ppo import (
    AdaptiveKL,
    gae,
    is_clipped,
    kl_k1,
    kl_k2,
    kl_k3,
    penalise_unfinished,
    policy_loss,
    shape_rewards,
    value_loss,
)

ONE = torch.ones(1, 1)


def test_estimators_by_hand():
    p, ref = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    assert kl_k1(p, ref).item() == pytest.approx(math.log(2))
    assert kl_k2(p, ref).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_k3(p, ref).item() == pytest.approx(0.5 - 1 + math.log(2))


def test_k1_and_k3_are_unbiased_in_value_by_enumeration():
    theta, phi = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    p, q = theta.log_softmax(0), phi.log_softmax(0)
    exact = (p.exp() * (p - q)).sum().item()
    assert (p.exp() * kl_k1(p, q)).sum().item() == pytest.approx(exact, abs=1e-6)
    assert (p.exp() * kl_k3(p, q)).sum().item() == pytest.approx(exact, abs=1e-6)
    assert (kl_k3(p, q) >= 0).all() and (kl_k2(p, q) >= 0).all()


def _gradient(expected_loss) -> torch.Tensor:
    """The gradient of a loss whose expectation over all 20 tokens under the (frozen) sampler is taken exactly."""
    theta, phi = torch.randn(2, 20, generator=torch.Generator().manual_seed(36))
    theta.requires_grad_()
    everything = torch.arange(20).unsqueeze(0)
    logprobs = token_logprobs(theta.expand(1, 20, 20), everything)
    ref = phi.log_softmax(0).unsqueeze(0)
    weight = logprobs.detach().exp()  # the probability with which each token is sampled
    expected_loss(logprobs, ref, weight).backward()
    return theta.grad


def test_where_a_kl_term_enters_decides_which_gradient_it_has():
    reverse = _gradient(lambda p, q, _: (p.exp() * (p - q)).sum())
    forward = _gradient(lambda p, q, _: (q.exp() * (q - p)).sum())
    assert (reverse - forward).norm() > 0.1

    k1_in_loss = _gradient(lambda p, q, w: (w * kl_k1(p, q)).sum())
    assert k1_in_loss.norm() < 1e-6, "k1 as a loss pulls nowhere"

    k2_in_loss = _gradient(lambda p, q, w: (w * kl_k2(p, q)).sum())
    assert torch.allclose(k2_in_loss, reverse, atol=1e-6)

    k3_in_loss = _gradient(lambda p, q, w: (w * kl_k3(p, q)).sum())
    assert torch.allclose(k3_in_loss, forward, atol=1e-6), "bare k3 follows the forward KL"

    zero = torch.zeros(1, 20)
    ratio_k3 = _gradient(lambda p, q, w: (w * grpo(p, p.detach(), q, zero, 0.2, beta=1.0)).sum())
    assert torch.allclose(ratio_k3, reverse, atol=1e-6)
    bare_k3 = _gradient(lambda p, q, w: (w * grpo(p, p.detach(), q, zero, 0.2, beta=1.0, kl_ratio=False)).sum())
    assert torch.allclose(bare_k3, forward, atol=1e-6)

    def k1_in_reward(p, q, w):
        everywhere = torch.ones(20, 1, dtype=torch.bool)
        rewards = shape_rewards(torch.zeros(20), kl_k1(p.detach(), q).T, everywhere, kl_coef=1.0)
        advantages, _ = gae(rewards, torch.zeros(20, 1), everywhere, 1.0, 1.0)
        return (w.T * policy_loss(p.T, p.T.detach(), advantages, 0.2)).sum()

    assert torch.allclose(_gradient(k1_in_reward), reverse, atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [  # score 2, kl 0.1 each, kl_coef 0.5: each sampled token costs 0.05
        ([0, 1, 1, 1, 0, 0], [0, -0.05, -0.05, 1.95, 0, 0]),  # an end token, then pads
        ([0, 0, 0, 1, 1, 1], [0, 0, 0, -0.05, -0.05, 1.95]),  # at the length limit, up to the last column
        ([0, 0, 1, 0, 0, 0], [0, 0, 1.95, 0, 0, 0]),  # the end token first of all
        ([0, 1, 1, 0, 0, 1], [0, -0.05, -0.05, 0, 0, 1.95]),  # a tool's answer in between
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),  # nothing sampled
        ([1, 1, 1, 1, 1, 1], [-0.05] * 5 + [1.95]),  # no prompt at all
        ([1, 0, 0, 0, 0, 0], [1.95, 0, 0, 0, 0, 0]),  # one token, in the first column
        ([0, 1, 0, 1, 0, 0], [0, -0.05, 0, 1.95, 0, 0]),  # two turns
    ],
)
def test_rewards_of_eight_hand_cases(mask, expected):
    mask = torch.tensor([mask], dtype=torch.bool)
    kl = torch.where(mask, 0.1, 1e6)
    rewards = shape_rewards(torch.tensor([2.0]), kl, mask, kl_coef=0.5)
    assert rewards.tolist()[0] == pytest.approx(expected)


def test_each_row_of_rewards_sums_to_score_less_kl():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 9, generator=generator) < 0.5
    mask[:, 4] = True
    kl, scores = torch.randn(6, 9, generator=generator), torch.randn(6, generator=generator)
    rewards = shape_rewards(scores, kl, mask, 0.3)
    expected = scores - 0.3 * torch.where(mask, kl, 0).sum(1)
    assert torch.allclose(rewards.sum(1), expected, atol=1e-6)


def test_unfinished_completions_pay_and_finished_ones_do_not():
    scores = penalise_unfinished(torch.tensor([1.0, 1.0, -3.0]), torch.tensor([True, False, False]), 0.5)
    assert scores.tolist() == [1.0, 0.5, -3.5]
    with pytest.raises(ValueError, match="negative"):
        penalise_unfinished(torch.zeros(1), torch.ones(1, dtype=torch.bool), -1.0)


def _rollout(seed: int):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(5, 11, generator=generator) < 0.6
    mask[:, 0], mask[:, -2:] = False, False
    return torch.randn(5, 11, generator=generator), torch.randn(5, 11, generator=generator), mask


def _definition(rewards, values, mask, gamma, lam):
    """The sum of the paper, in quadratic time, over the masked tokens of each row."""
    advantages = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        columns = [int(t) for t in mask[row].nonzero()]
        r, v = [float(rewards[row, t]) for t in columns], [float(values[row, t]) for t in columns] + [0.0]
        for i, t in enumerate(columns):
            for k in range(i, len(columns)):
                advantages[row, t] += (gamma * lam) ** (k - i) * (r[k] + gamma * v[k + 1] - v[k])
    return torch.tensor(advantages, dtype=torch.float32)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_its_definition(gamma, lam):
    for seed in range(10):
        rewards, values, mask = _rollout(seed)
        advantages, returns = gae(rewards, values, mask, gamma, lam)
        assert torch.allclose(advantages, _definition(rewards, values, mask, gamma, lam), atol=1e-5)
        assert torch.allclose(returns, torch.where(mask, advantages + values, 0.0), atol=1e-6)


def test_gae_by_hand_and_its_two_ends():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.5]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    # deltas 0, 0, 0.5; lam 0.5: 0.125, 0.25, 0.5
    assert gae(rewards, values, mask, 1.0, 0.5)[0].tolist()[0] == pytest.approx([0.125, 0.25, 0.5])
    # lam 1, gamma 1: return-to-go less value
    assert gae(rewards, values, mask, 1.0, 1.0)[0].tolist()[0] == pytest.approx([0.5, 0.5, 0.5])
    assert gae(rewards, values, mask, 1.0, 1.0)[1].tolist()[0] == pytest.approx([1.0, 1.0, 1.0])
    # lam 0: the one-step error
    assert gae(rewards, values, mask, 1.0, 0.0)[0].tolist()[0] == pytest.approx([0.0, 0.0, 0.5])


def test_gae_skips_what_was_not_sampled():
    rewards, values, mask = _rollout(3)
    clean = gae(torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0), mask, 0.97, 0.9)
    dirty = gae(torch.where(mask, rewards, 1e6), torch.where(mask, values, -1e6), mask, 0.97, 0.9)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b) and (a[~mask] == 0).all()
    # a tool's answer in the middle: as if its tokens were not there
    r, v = torch.tensor([[1.0, 9.0, 9.0, 2.0]]), torch.tensor([[0.3, 7.0, 7.0, 0.4]])
    holes = torch.tensor([[True, False, False, True]])
    short = gae(r[:, [0, 3]], v[:, [0, 3]], torch.ones(1, 2, dtype=torch.bool), 0.9, 0.8)[0]
    assert torch.equal(gae(r, v, holes, 0.9, 0.8)[0][:, [0, 3]], short)


def test_a_cut_completion_has_no_value_after_it_unless_given():
    rewards, values, mask = torch.zeros(1, 2), torch.tensor([[0.2, 0.6]]), torch.ones(1, 2, dtype=torch.bool)
    assert gae(rewards, values, mask, 1.0, 0.0)[0].tolist()[0] == pytest.approx([0.4, -0.6])
    given = gae(rewards, values, mask, 1.0, 0.0, bootstrap=torch.tensor([1.0]))[0]
    assert given.tolist()[0] == pytest.approx([0.4, 0.4])


def test_advantages_carry_no_gradient():
    values = torch.randn(1, 3, requires_grad=True)
    assert not gae(torch.ones(1, 3), values, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.9)[0].requires_grad


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [(1.0, 1.0, -1.0, False), (1.5, 1.0, -1.2, True), (1.5, -1.0, 1.5, False), (0.5, 1.0, -0.5, False),
     (0.5, -1.0, 0.8, True), (1.1, 2.0, -2.2, False)],
)  # fmt: skip
def test_policy_loss_by_hand(ratio, advantage, loss, clipped):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    out = policy_loss(logprobs, torch.zeros(1, 1), advantage * ONE, 0.2)
    out.sum().backward()
    assert out.item() == pytest.approx(loss, abs=1e-6)
    assert is_clipped(logprobs, torch.zeros(1, 1), advantage * ONE, 0.2).item() is clipped
    assert (logprobs.grad.item() == 0) is clipped


def test_at_ratio_one_the_loss_is_minus_the_advantage_and_the_gradient_reinforce():
    logprobs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantages = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    loss = policy_loss(logprobs, logprobs.detach(), advantages, 0.2)
    loss.sum().backward()
    assert torch.equal(loss, -advantages) and torch.allclose(logprobs.grad, -advantages)


@pytest.mark.parametrize("garbage", [1e6, -1e6])
def test_garbage_outside_the_mask_reaches_neither_loss_nor_gradient(garbage):
    generator = torch.Generator().manual_seed(9)
    mask = torch.rand(4, 6, generator=generator) < 0.5
    names = [torch.randn(4, 6, generator=generator) for _ in range(6)]

    def outcome(fill: float):
        tensors = [torch.where(mask, x, fill).requires_grad_() for x in names]
        logprobs, old, ref, advantages, values, returns = tensors
        losses = (
            policy_loss(logprobs, old, advantages, 0.2, mask),
            value_loss(values, old, returns, 0.2, mask),
            grpo(logprobs, old, ref, advantages, 0.2, 0.1, mask),
        )
        sum(loss.sum() for loss in losses).backward()
        return [*losses, logprobs.grad, values.grad]

    for clean, dirty in zip(outcome(0.0), outcome(garbage), strict=True):
        assert torch.equal(clean, dirty) and (clean[~mask] == 0).all()


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss"),
    [
        (0.5, 0.0, 1.0, 0.2, 0.32),
        (0.5, 0.0, 1.0, None, 0.125),
        (0.1, 0.0, 1.0, 0.2, 0.405),
        (-0.5, 0.0, 1.0, 0.2, 1.125),
    ],
)
def test_value_loss_by_hand(value, old, target, clip, loss):
    assert value_loss(value * ONE, old * ONE, target * ONE, clip).item() == pytest.approx(loss, abs=1e-6)


def test_the_controller_moves_at_most_a_fifth_per_horizon():
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    assert controller.update(600.0, 1000) == pytest.approx(0.12)
    assert controller.update(0.0, 500) == pytest.approx(0.12 * 0.9)
    assert controller.update(6.0, 1000) == pytest.approx(0.108)
    assert controller.update(6.6, 1000) == pytest.approx(0.108 * 1.1)
    fixed = AdaptiveKL(0.1, target=None, horizon=1000)
    assert fixed.update(99.0, 1000) == 0.1
    with pytest.raises(ValueError, match="positive"):
        AdaptiveKL(0.1, target=0.0, horizon=10)


def test_a_gain_answers_to_the_error_of_now_and_leaves_no_trace():
    controller = AdaptiveKL(0.1, target=2.0, horizon=100, gain=3.0)
    assert controller.update(2.2, 100) == pytest.approx(0.11 * math.exp(0.3))
    assert controller.update(2.0, 100) == pytest.approx(0.11), "at the target the price is what the past has made of it"
    assert controller.update(200.0, 100) == pytest.approx(0.11 * 1.2 * math.exp(3)), "as at twice the target"
    assert controller.update(-5.0, 100) == pytest.approx(0.11 * 1.2 * 0.8 * math.exp(-3))
    with pytest.raises(ValueError, match="gain -1"):
        AdaptiveKL(0.1, target=1.0, horizon=10, gain=-1.0)


def test_a_controller_goes_on_from_its_state():
    first, second = (AdaptiveKL(0.1, target=2.0, horizon=100, gain=1.5) for _ in range(2))
    for kl in (0.3, 2.9, 1.0):
        first.update(kl, 64)
    second.restore(first.state())
    assert second.value == first.value != first.level
    assert second.update(3.0, 64) == first.update(3.0, 64)


def _settled(gain: float, start: float, seed: int) -> float:
    """The mean KL of the last quarter of 40 rounds of a policy that answers late and noisily, as the demo's does.

    It moves up to 0.15 nats a round where KL is cheap, slower as its price nears what more KL is worth (0.2 at 1 nat,
    half of that for each nat further), and 4/5 of its speed is the last round's (momentum).
    """
    generator = torch.Generator().manual_seed(seed)
    controller = AdaptiveKL(start, target=2.0, horizon=10, gain=gain)
    kl = speed = 0.0
    seen = []
    for _ in range(40):
        seen.append(kl + 0.2 * math.sqrt(max(kl, 0.0) / 2) * torch.randn((), generator=generator).item())
        price = controller.update(seen[-1], 1)
        worth = 0.2 * 0.5 ** (kl - 1)
        speed = 0.8 * speed + 0.2 * 0.15 * math.tanh(2 * math.log(worth / max(price, 1e-9)))
        kl = max(kl + speed, 0.0)
    return sum(seen[-10:]) / 10


def test_in_a_model_of_training_a_gain_forgives_a_start_at_half_or_thrice_the_right_price():
    """The right price is 0.1 there. Without a gain, a start at half or thrice of it ends 40% above, 25% below."""
    off = {
        (gain, start): [_settled(gain, start, seed) / 2.0 - 1 for seed in range(20)]
        for gain in (0.0, 3.0)
        for start in (0.05, 0.1, 0.3)
    }
    assert max(abs(x) for start in (0.05, 0.1, 0.3) for x in off[3.0, start]) < 0.2
    assert min(off[0.0, 0.05]) > 0.4 and max(off[0.0, 0.3]) < -0.25
