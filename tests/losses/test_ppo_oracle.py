"""PPO's arithmetic against an oracle that does it one number at a time, as TRL 1.12 does, its differences named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trivium.losses.logprobs import token_logprobs, whiten
from trivium.losses.ppo import gae, kl_k1, policy_loss, shape_rewards, value_loss

from . import ppo_oracle

WIDTH = 7
FULL, SHORT = [WIDTH] * 5, [7, 3, 1, 5, 6]


def drawn(lengths: list[int], seed: int):
    """Return random logprobs (old, new, reference), values (old, new), scores, and the mask of the real tokens."""
    generator = torch.Generator().manual_seed(seed)
    old, new, ref, values, moved = (torch.randn(len(lengths), WIDTH, generator=generator) for _ in range(5))
    mask = torch.arange(WIDTH) < torch.tensor(lengths)[:, None]
    return old, old + new / 3, ref, values, values + moved / 3, torch.randn(len(lengths), generator=generator), mask


def ours(old, ref, values, scores, mask, *, kl_coef: float, gamma: float, lam: float, whiten_rewards: bool):
    rewards = shape_rewards(scores, kl_k1(old, ref), mask, kl_coef)
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    return rewards, whiten(advantages, mask), returns


SETTINGS = [
    {"kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "whiten_rewards": False},
    {"kl_coef": 0.4, "gamma": 0.9, "lam": 0.7, "whiten_rewards": False},
    {"kl_coef": 0.2, "gamma": 1.0, "lam": 0.95, "whiten_rewards": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("lengths", "score_on_pad"), [(FULL, True), (FULL, False), (SHORT, False)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_round_is_the_oracles(lengths: list[int], score_on_pad: bool, settings, seed: int) -> None:
    """TRL's own arithmetic where no row has a pad; with pads, TRL's but for the place of the score."""
    old, new, ref, values, moved, scores, mask = drawn(lengths, seed)
    arrays = [x.double().numpy() for x in (old, ref, values, scores)]
    expected = ppo_oracle.shaped(*arrays, lengths, score_on_pad=score_on_pad, **settings)
    rewards, advantages, returns = ours(old, ref, values, scores, mask, **settings)
    for mine, theirs in ((rewards, expected.rewards), (advantages, expected.advantages), (returns, expected.returns)):
        assert np.allclose(mine.double().numpy(), theirs, atol=2e-5)  # fp32 sums of seven terms of size 1
    held = mask.numpy()
    policy = policy_loss(new, old, advantages, 0.2, mask)
    assert np.allclose(
        policy.numpy(),
        ppo_oracle.policy_losses(new.double().numpy(), arrays[0], expected.advantages, held, 0.2),
        atol=5e-5,
    )
    value = value_loss(moved, values, returns, 0.2, mask)
    assert np.allclose(
        value.numpy(),
        ppo_oracle.value_losses(moved.double().numpy(), arrays[2], expected.returns, expected.trained, 0.2),
        atol=1e-4,
    )


def test_where_a_row_has_pads_trl_gives_the_score_to_the_first_of_them() -> None:
    """The difference, and nothing else of it: rows without a pad agree, the others have one step more (row 35)."""
    old, _, ref, values, _, scores, mask = drawn(SHORT, 2)
    settings = {"kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "whiten_rewards": False}
    arrays = [x.double().numpy() for x in (old, ref, values, scores)]
    theirs = ppo_oracle.shaped(*arrays, SHORT, score_on_pad=True, **settings)
    rewards, _, returns = ours(old, ref, values, scores, mask, **settings)
    for row, length in enumerate(SHORT):
        moved = theirs.rewards[row] - rewards[row].double().numpy()
        expected = np.zeros(WIDTH)
        if length < WIDTH:
            expected[length - 1], expected[length] = -float(scores[row]), float(scores[row])
        assert np.allclose(moved, expected, atol=1e-5)
        assert np.allclose(theirs.returns[row], returns[row].double().numpy(), atol=1e-5) is (length == WIDTH)


def test_its_temperature_differs_by_a_ten_millionth() -> None:
    """Difference 2 is far below what fp32 can show: the same log-probabilities to 1e-5."""
    generator = torch.Generator().manual_seed(3)
    logits, targets = torch.randn(2, 5, 30, generator=generator), torch.randint(0, 30, (2, 5), generator=generator)
    for temperature in (0.5, 0.7, 1.5):
        theirs = torch.log_softmax(logits.double() / (temperature + 1e-7), -1).gather(-1, targets[..., None])[..., 0]
        assert torch.allclose(token_logprobs(logits, targets, temperature), theirs.float(), atol=1e-5)
