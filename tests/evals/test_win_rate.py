import copy
import math

import numpy as np
import pytest
import torch

from trivium.evals.players import Player
from trivium.evals.win_rate import grade, kl_to, length_controlled, sample_completions, win_rate
from trivium.models.transformer import Transformer
from trivium.records import Conversation, Message
from trivium.rewards.judge import as_reward

PROMPTS = [Conversation(messages=(Message(role="user", content=f"The cat {i}"),)) for i in range(24)]


def player(model, tokenizer, name="sft", is_base=False):
    return Player(name=name, model=model, tokenizer=tokenizer, is_base=is_base)


def test_samples_follow_from_their_seed(model, tokenizer):
    def ids(seed):
        sample = sample_completions(player(model, tokenizer), PROMPTS, max_new_tokens=6, temperature=1.0, seed=seed)
        return [c.token_ids for c in sample.completions]

    assert ids((0, 1)) == ids((0, 1)) != ids((0, 2))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_a_policy_has_no_kl_to_itself_at_any_temperature(model, tokenizer, temperature):
    sample = sample_completions(
        player(model, tokenizer), PROMPTS, max_new_tokens=6, temperature=temperature, seed=(0, 1)
    )
    assert kl_to(model, sample, temperature) == pytest.approx((0.0, 0.0, 0.0), abs=1e-4)


def test_the_estimate_is_the_exact_kl_of_the_first_token(model, tokenizer):
    other = Transformer(model.config).init_weights(99).requires_grad_(False).eval()
    other.lm_head.weight *= 8
    prompts = PROMPTS[:1] * 3000
    sample = sample_completions(player(other, tokenizer), prompts, max_new_tokens=1, temperature=1.0, seed=(0, 1))
    ids = torch.tensor([sample.encoded[0]])
    p, q = (m.logits(m(ids))[0, -1].double().log_softmax(-1) for m in (other, model))
    exact = float((p.exp() * (p - q)).sum())
    value, low, high = kl_to(model, sample, 1.0)
    assert value > 0 and low < exact < high and high - low < 0.2 * exact


def test_no_kl_where_it_has_no_meaning(model, tokenizer):
    base = sample_completions(
        player(model, tokenizer, is_base=True), PROMPTS, max_new_tokens=4, temperature=1.0, seed=(0, 1)
    )
    greedy = sample_completions(player(model, tokenizer), PROMPTS, max_new_tokens=4, temperature=0.0, seed=(0, 1))
    assert kl_to(model, base, 1.0) is None and kl_to(model, greedy, 0.0) is None


def test_the_better_policy_wins_and_swapping_mirrors(model, tokenizer):
    better = copy.deepcopy(model)
    wanted = tokenizer.encode(" cat")[-1]
    with torch.no_grad():
        better.lm_head.weight[wanted] += 3 * better.model.norm.weight.mean() * torch.sign(better.lm_head.weight.mean(0))
    ours = sample_completions(player(better, tokenizer, "ppo"), PROMPTS, max_new_tokens=6, temperature=1.0, seed=(0, 2))
    theirs = sample_completions(player(model, tokenizer), PROMPTS, max_new_tokens=6, temperature=1.0, seed=(0, 1))
    judge = as_reward(lambda prompt, text: text.count("a"))
    a, b = grade(ours, judge), grade(theirs, judge)
    forward, backward = win_rate(a, b, 0), win_rate(b, a, 0)
    assert forward[0] == pytest.approx(1 - backward[0]) and forward[1] == pytest.approx(1 - backward[2])


def test_length_control_takes_away_what_length_alone_won():
    rng = np.random.default_rng(0)
    n = 400
    theirs = rng.integers(20, 40, n)
    ours = theirs + rng.integers(-20, 41, n)  # longer on average
    by_length = [float(x) for x in ours], [float(x) for x in theirs]  # the judge only looks at length
    raw = win_rate(*by_length, 0)
    controlled = length_controlled(*by_length, ours.tolist(), theirs.tolist(), 0)
    assert raw[0] > 0.6 and abs(controlled[0] - 0.5) < 0.1 and controlled[1] < 0.5 < controlled[2] + 0.05


def test_length_control_changes_nothing_where_length_plays_no_part():
    rng = np.random.default_rng(1)
    n = 400
    ours, theirs = (rng.random(n) < 0.7).astype(float), np.full(n, 0.5)
    lengths, other = rng.integers(10, 50, n).tolist(), rng.integers(10, 50, n).tolist()
    raw, controlled = (
        win_rate(ours.tolist(), theirs.tolist(), 0),
        length_controlled(ours.tolist(), theirs.tolist(), lengths, other, 0),
    )
    assert controlled == pytest.approx(raw, abs=0.02)
    equal = length_controlled(ours.tolist(), theirs.tolist(), [5] * n, [5] * n, 0)
    assert equal[0] == pytest.approx(raw[0], abs=0.005)


def test_length_control_survives_extremes():
    assert length_controlled([1.0] * 9, [0.0] * 9, list(range(9)), [0] * 9, 0)[0] > 0.8
    assert math.isnan(length_controlled([], [], [], [], 0)[0])
