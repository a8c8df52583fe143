"""From completions to what PPO learns from: where the score lands, and what the settings are that nobody may have."""

from __future__ import annotations

import pytest
import torch

from trivium.batches import RolloutBatch
from trivium.config import ConfigError, RunSettings, build
from trivium.losses.logprobs import whiten
from trivium.losses.ppo import penalise_unfinished
from trivium.models.heads import ScalarModel
from trivium.models.transformer import Transformer
from trivium.training.experience import ExperienceConfig, Networks, experience
from trivium.training.rollout import SampleConfig, to_tokens

from .conftest import tiny_model

EOS, PAD = 2, 0
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def networks() -> Networks:
    """Return a policy that is its own reference, so that no KL stands beside a score, and a value model of zeros."""
    policy: Transformer = tiny_model()
    return Networks(policy=policy, reference=policy, value=ScalarModel.from_transformer(policy, zero_init=True))


def shaped(
    networks: Networks, completions: list[list[int]], scores: torch.Tensor, pad: int = PAD, **settings: object
) -> RolloutBatch:
    """Return completions of PROMPT, already scored, as experience."""
    tokens = to_tokens([PROMPT] * len(completions), completions, pad)
    config = ExperienceConfig(**{"kl_coef": 0.5} | settings)
    return experience(
        tokens, scores, networks, config, RunSettings(precision="fp32"), kl_coef=config.kl_coef, temperature=1.0
    )


@pytest.mark.parametrize("pad", [PAD, EOS])
@pytest.mark.parametrize(
    ("completion", "finish", "rewards"),
    [  # score 2, penalty 1.5 where the end was not sampled; the widest row has six tokens after the prompt
        ([EOS], "stop", [2.0]),  # the end first of all
        ([9, 8, EOS], "stop", [0, 0, 2.0]),  # the end in the middle of the row's width
        ([9, 8, 9, 8, 9, EOS], "stop", [0, 0, 0, 0, 0, 2.0]),  # the end at the length limit
        ([9, 8, 9, 8, 9, 8], "length", [0, 0, 0, 0, 0, 0.5]),  # no end: cut at the limit
        ([9, 8], "length", [0, 0.5]),  # no end: cut at the model's context, before the limit
        ([9, EOS, 8, EOS], "stop", [0, 0, 0, 2.0]),  # two ends: a token that did not stop it is one like others
        ([9, EOS, 8, 9], "length", [0, 0, 0, 0.5]),  # an end inside that did not stop it, and none at the end
        ([PAD, 9, EOS], "stop", [0, 0, 2.0]),  # a sampled pad is a token too
    ],
)
def test_the_score_of_eight_hand_cases(
    networks: Networks, completion: list[int], finish: str, rewards: list[float], pad: int
) -> None:
    """Exactly the score, less the penalty, on the last sampled token; nothing anywhere else (rows 34, 35).

    Also where rows are padded with the end token itself, which no tokenizer here does: places come from lengths.
    """
    filler = [9] * 6
    scores = penalise_unfinished(torch.tensor([2.0, 0.0]), torch.tensor([finish == "stop", True]), 1.5)
    batch = shaped(networks, [completion, filler], scores, pad)
    expected = [0.0] * (len(PROMPT) - 1) + rewards + [0.0] * (len(filler) - len(completion))
    assert batch.rewards[0].tolist() == expected
    assert int(batch.mask[0].sum()) == len(completion)
    # gamma 1, values 0: every token's return is lambda-weighted, the last one's exactly its reward.
    assert float(batch.returns[0][batch.mask[0]][-1]) == rewards[-1]


def test_whitened_rewards_keep_their_mean_and_advantages_do_not(networks: Networks) -> None:
    """Over the sampled tokens of the whole round, whatever the rows' lengths (row 40)."""
    completions = [[9, 8, EOS], [EOS], [9] * 6, [8, EOS]]
    scores = torch.tensor([2.0, -1.0, 0.5, 3.0])
    plain, white = (shaped(networks, completions, scores, whiten_rewards=on) for on in (False, True))
    mask = plain.mask
    assert torch.equal(white.rewards, whiten(plain.rewards, mask, shift_mean=False))
    assert white.rewards[mask].mean().item() == pytest.approx(plain.rewards[mask].mean().item(), abs=1e-6)
    assert plain.rewards[mask].mean().item() == pytest.approx(4.5 / 12)
    assert white.rewards[mask].std().item() == pytest.approx(1, abs=1e-4)
    for batch in (plain, white):
        assert batch.advantages[mask].mean().item() == pytest.approx(0, abs=1e-6)
        assert batch.advantages[mask].std().item() == pytest.approx(1, abs=1e-4)
        assert not batch.advantages[~mask].any()


@pytest.mark.parametrize("key", ["top_p", "top_k"])
def test_truncated_sampling_cannot_be_trained_on(key: str) -> None:
    """Its ratio would not be that of the policies (row 38); the setting does not exist."""
    with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
        build(SampleConfig, {key: 1}, where="[ppo] sampling")


def test_the_controllers_settings_need_a_target() -> None:
    """A horizon or a gain without a target would do nothing, so they are refused by name."""
    for settings in ({"kl_horizon": 5.0}, {"kl_gain": 2.0}):
        (name,) = settings
        with pytest.raises(ConfigError, match=f"{name} = .*set kl_target"):
            ExperienceConfig(**settings)
        ExperienceConfig(kl_target=1.0, **settings)


def test_the_controller_counts_its_horizon_in_rounds() -> None:
    """By default the 10 rounds of before: 20% in ten rounds of 64 completions, each far above the target."""
    controller = ExperienceConfig(kl_coef=0.1, kl_target=2.0).controller(64)
    assert controller.update(99.0, 64) == pytest.approx(0.1 * 1.02)
    faster = ExperienceConfig(kl_coef=0.1, kl_target=2.0, kl_horizon=4.0, kl_gain=1.0).controller(64)
    assert faster.update(2.2, 64) == pytest.approx(0.1 * 1.025 * 2.718281828**0.1)
    fixed = ExperienceConfig(kl_coef=0.1).controller(64)
    assert fixed.update(99.0, 64) == 0.1
