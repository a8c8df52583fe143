"""A table of rewards is the weighted sum of its functions, each asked once, with the ids as they were sampled."""

import sys
import types

import pytest

from trivium.config import ConfigError
from trivium.data.tokenizer import train
from trivium.models.generate import Generated
from trivium.records import Completion, Conversation, Message
from trivium.rewards.weighted import WeightedRewards, as_completions

PROMPTS = [Conversation(messages=(Message(role="user", content=text),)) for text in ("one", "two")]


def test_the_sum_is_weight_times_reward_and_whole_numbers_are_rewards_too(monkeypatch):
    calls = []
    module = types.ModuleType("module_for_weighted_test")
    module.length = lambda prompts, completions: calls.append(len(completions)) or [len(c.text) for c in completions]
    module.half = lambda prompts, completions: [0.5 for _ in completions]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    rewards = WeightedRewards({f"{module.__name__}:length": 2.0, f"{module.__name__}:half": -1.0})
    tokenizer = train(["ab abc abcd"] * 3, 266)
    generated = [
        Generated(token_ids=tokenizer.encode(text), logprobs=[], finish_reason=reason)
        for text, reason in (("ab", "stop"), ("abcd", "length"))
    ]
    completions = as_completions(PROMPTS, generated, tokenizer, "grpo-1")
    assert [c.text for c in completions] == ["ab", "abcd"]
    assert [list(c.token_ids) for c in completions] == [g.token_ids for g in generated]
    assert [(c.prompt_id, c.policy, c.finish_reason) for c in completions] == [
        (PROMPTS[0].id, "grpo-1", "stop"),
        (PROMPTS[1].id, "grpo-1", "length"),
    ]
    assert rewards(PROMPTS, completions).tolist() == [2.0 * 2 - 0.5, 2.0 * 4 - 0.5]
    assert calls == [2]


def test_a_learned_reward_stands_beside_the_table_or_alone_with_weight_one():
    table = {"trivium.rewards.verifiable:ended": 2.0}
    cut = [Completion(prompt_id=prompt.id, text="a", policy="p", finish_reason="length") for prompt in PROMPTS]

    def learned(prompts, completions):
        return [0.25, -0.5]

    assert WeightedRewards({}, [learned])(PROMPTS, cut).tolist() == [0.25, -0.5]
    assert WeightedRewards(table, [learned])(PROMPTS, cut).tolist() == [-1.75, -2.5]


def test_a_reward_that_is_nowhere_is_named():
    with pytest.raises(ConfigError, match="no_such_module"):
        WeightedRewards({"no_such_module:f": 1.0})
