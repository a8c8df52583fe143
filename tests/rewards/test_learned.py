import numpy as np
import pytest
import torch

from trivium.config import UserError
from trivium.data.chat import render_prompt
from trivium.data.tokenizer import train
from trivium.models.config import ModelConfig
from trivium.models.heads import ScalarModel
from trivium.models.hf import save_model
from trivium.models.transformer import Transformer
from trivium.records import Completion, Conversation, Message
from trivium.rewards import learned
from trivium.rewards.learned import LearnedReward, bucket, combine


@pytest.fixture(scope="module")
def model():
    shape = ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return ScalarModel.from_transformer(Transformer(shape).init_weights(3), seed=4)


@pytest.fixture(scope="module")
def tokenizer():
    return train(["the cat sat on the mat and the dog ran " * 30], 280)


def rows(seed, count=9):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]


def test_the_score_is_the_value_at_the_last_real_token(model):
    reward = LearnedReward(model, mean=0.5, std=2.0)
    for ids, score in zip(rows(0), reward.score_ids(rows(0)), strict=True):
        raw = model(torch.tensor([ids]))[0, -1].item()
        assert score == pytest.approx((raw - 0.5) / 2.0, abs=1e-6)


def test_neither_padding_nor_batch_mates_nor_order_change_a_score(model, monkeypatch):
    reward, texts = LearnedReward(model), rows(1)
    together = reward.score_ids(texts)
    alone = [reward.score_ids([ids])[0] for ids in texts]
    assert together == pytest.approx(alone, abs=1e-6)
    assert reward.score_ids(texts[::-1]) == pytest.approx(together[::-1], abs=1e-6)
    for pad_id in (2, 299):
        assert LearnedReward(model, pad_id=pad_id).score_ids(texts) == pytest.approx(together, abs=1e-6)
    monkeypatch.setattr(learned, "BATCH_TOKENS", 50)
    assert reward.score_ids(texts) == pytest.approx(together, abs=1e-6)


def test_an_end_token_inside_the_prompt_does_not_end_the_reading(model):
    reward = LearnedReward(model)
    first, second = reward.score_ids([[1, 7, 2, 9, 11, 2], [1, 7, 2, 9, 12, 2]])
    assert first != second


def test_saved_and_loaded_it_gives_the_same_scores(model, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    save_model(tmp_path, model, extra={"reward_mean": -0.25, "reward_std": 3.0})
    loaded = LearnedReward.from_folder(tmp_path)
    assert (loaded.mean, loaded.std, loaded.pad_id) == (-0.25, 3.0, tokenizer.pad_id)
    ours = LearnedReward(model, -0.25, 3.0).score_ids(rows(2))
    assert loaded.score_ids(rows(2)) == ours


def test_text_and_ids_of_the_same_completion_score_alike(model, tokenizer):
    """The trainer's path (ids) and the judge's path (text) must read the very same tokens."""
    reward = LearnedReward(model, tokenizer=tokenizer)
    prompt = Conversation(messages=(Message(role="user", content="the cat"),))
    ids = [*tokenizer.encode("the dog ran"), tokenizer.end_id]
    texts = [
        Completion(prompt_id=prompt.id, text="the dog ran"),
        Completion(prompt_id=prompt.id, text="", token_ids=tuple(ids)),
    ]
    scores = reward([prompt, prompt], texts)
    assert scores[0] == scores[1] == reward.score_ids([[*render_prompt(tokenizer, prompt), *ids]])[0]


def test_it_never_learns_and_refuses_what_it_cannot_read(model):
    reward = LearnedReward(model)
    assert not any(p.requires_grad for p in reward.model.parameters()) and not reward.model.training
    with pytest.raises(UserError, match="1 to 64 tokens, not 65"):
        reward.score_ids([[1] * 65])
    with pytest.raises(UserError, match="not 0"):
        reward.score_ids([[]])
    with pytest.raises(UserError, match="tokenizer"):
        reward([], [])
    with pytest.raises(ValueError, match="std"):
        LearnedReward(model, std=0.0)


def test_buckets_hold_every_row_once_within_the_budget():
    lengths = [7, 1, 30, 7, 12, 90, 2]
    batches = list(bucket(lengths, 40))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 40 for batch in batches)
    assert list(bucket([], 40)) == []


def test_the_probability_of_a_win_is_that_of_the_raw_lead_at_the_fitted_temperature(model, tokenizer, tmp_path):
    """Scores 2 and 0 at spread 3 are 6 nats apart: at a temperature of 4 that is sigmoid(1.5); swapped, the rest."""
    reward = LearnedReward(model, std=3.0, temperature=4.0)
    assert reward.win_probability(2.0, 0.0) == pytest.approx(0.817574, abs=1e-6)
    assert reward.win_probability(0.0, 2.0) == pytest.approx(1 - 0.817574, abs=1e-6)
    assert reward.win_probability(1.0, 1.0) == 0.5
    save_model(tmp_path, model, extra={"reward_std": 3.0, "temperature": 4.0})
    assert LearnedReward.from_folder(tmp_path).win_probability(2.0, 0.0) == reward.win_probability(2.0, 0.0)
    with pytest.raises(ValueError, match="temperature"):
        LearnedReward(model, temperature=0.0)


def test_an_ensemble_scores_the_mean_less_what_its_members_disagree_by(model, tokenizer, tmp_path):
    """Members' calibrated scores by hand; saved beside the model they are found again; one member has no spread."""
    others = [LearnedReward(ScalarModel.from_transformer(Transformer(model.config).init_weights(9), seed=s), 0.1 * s)
              for s in (5, 6)]  # fmt: skip
    texts = rows(3)
    table = np.array([each.score_ids(texts) for each in (LearnedReward(model, 0.5, 2.0), *others)])
    mean, spread = table.mean(0), table.std(0, ddof=1)
    ensemble = LearnedReward(model, 0.5, 2.0, members=others, pessimism=0.75)
    assert ensemble.score_ids(texts) == pytest.approx(mean - 0.75 * spread, abs=1e-6)
    found = ensemble.mean_and_spread(texts)
    assert found[0] == pytest.approx(mean, abs=1e-6) and found[1] == pytest.approx(spread, abs=1e-6)
    assert spread.min() > 0
    for number, other in enumerate(others):
        save_model(tmp_path / f"ensemble-{number}", other.model, extra={"reward_mean": other.mean})
    facts = {"reward_mean": 0.5, "reward_std": 2.0, "ensemble": 2, "pessimism": 0.75}
    save_model(tmp_path, model, extra=facts)
    assert LearnedReward.from_folder(tmp_path).score_ids(texts) == ensemble.score_ids(texts)
    alone = LearnedReward(model, 0.5, 2.0, pessimism=0.75)
    assert alone.mean_and_spread(texts) == (alone.score_ids(texts), [0.0] * len(texts))


def test_the_deviation_is_the_samples_own():
    """Scores 1 and 3: mean 2, deviation sqrt(2)."""
    table = torch.tensor([[1.0], [3.0]])
    assert combine(table, 0.0).item() == 2
    assert combine(table, 1.0).item() == pytest.approx(2 - 2**0.5)
