"""What a reward model is least sure of is asked first, by hand and from the command line."""

import math

import pytest

from trivium.cli import main
from trivium.data.tokenizer import train
from trivium.models.config import ModelConfig
from trivium.models.heads import ScalarModel
from trivium.models.hf import save_model
from trivium.models.transformer import Transformer
from trivium.preferences.store import Store
from trivium.records import Completion, Conversation, Message
from trivium.rewards.uncertainty import entropy, uncertainties


class Scripted:
    """A reward model whose scores and deviations stand in the texts: "2.5" or "2.5/0.3"."""

    def rows_of(self, prompts, completions):
        return [completion.text for completion in completions]

    def mean_and_spread(self, rows):
        pairs = [row.partition("/")[::2] for row in rows]
        return [float(score) for score, _ in pairs], [float(spread or 0) for _, spread in pairs]

    def win_probability(self, first, second):
        return 1 / (1 + math.exp(second - first))


def task(*texts):
    prompt = Conversation(messages=(Message(role="user", content="?"),))
    return prompt, [Completion(prompt_id=prompt.id, text=text) for text in texts]


def test_entropy_by_hand():
    assert [entropy(0.5), entropy(0.0), entropy(1.0)] == [1.0, 0.0, 0.0]
    assert entropy(0.25) == pytest.approx(2 - 0.75 * math.log2(3))


def test_one_model_is_unsure_where_scores_are_near():
    """Two equal scores: 1 bit. 0, 0, 100: one pair of three is a coin, the others are sure."""
    found = uncertainties(Scripted(), [task("1", "1"), task("0", "100"), task("0", "0", "100")])
    assert found == pytest.approx([1.0, 0.0, 1 / 3], abs=1e-6)


def test_an_ensemble_is_unsure_where_its_members_disagree():
    found = uncertainties(Scripted(), [task("1/0.5", "1/0.1"), task("0/0", "9/0.2")])
    assert found == pytest.approx([0.3, 0.1])


def test_from_the_command_line_the_least_sure_comes_first(tmp_path, monkeypatch, capsys):
    shape = ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    tokenizer = train(["the cat sat on the mat and the dog ran " * 30], 280)
    tokenizer.save(tmp_path / "judge")
    save_model(tmp_path / "judge", ScalarModel.from_transformer(Transformer(shape).init_weights(3), seed=4))
    with Store(tmp_path / "preferences.db") as store:
        prompts = [Conversation(messages=(Message(role="user", content=f"the cat {n}"),)) for n in range(5)]
        texts = ["the dog ran", "the cat sat on the mat"]
        items = [(p, [Completion(prompt_id=p.id, text=text) for text in texts]) for p in prompts]
        store.add_tasks("c", items)
    monkeypatch.chdir(tmp_path)
    assert main(["database", "prioritise", "--workspace", str(tmp_path), "--model", "./judge"]) == 0
    assert "5 open tasks" in capsys.readouterr().out
    with Store(tmp_path / "preferences.db") as store:
        found = [each.priority for each in store.tasks("c")]
    assert len(set(found)) == 5 and all(0 < priority <= 1 for priority in found)
    assert main(["database", "prioritise", "--workspace", str(tmp_path), "--model", "./nowhere"]) == 2
