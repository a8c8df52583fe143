"""A model at hand is asked: it writes as it samples, and its letters have exactly its probabilities."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from trivium.config import RunSettings
from trivium.data.chat import render_prompt
from trivium.data.tokenizer import Tokenizer, train
from trivium.models.config import ModelConfig
from trivium.models.generate import generate
from trivium.models.transformer import Transformer
from trivium.records import Conversation, Message, RunManifest
from trivium.runs.manifest import Run
from trivium.training.questions import LocalModel
from trivium.training.rollout import SampleConfig

TEXTS = ["A cat sat on the mat. B for a boat. Which is better? Answer with one letter and nothing else: A or B."]
SAMPLING = SampleConfig(max_new_tokens=6)


def ask(text: str) -> Conversation:
    """Return a prompt of one user message."""
    return Conversation(messages=(Message(role="user", content=text),))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Return a tokenizer of 300 tokens."""
    return train(TEXTS * 4, 300)


@pytest.fixture
def model(tokenizer: Tokenizer) -> Transformer:
    """Return a random model with a context of 96 tokens, lively enough to tell tokens apart."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=96,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    made = Transformer(config).init_weights(0)
    with torch.no_grad():
        made.lm_head.weight.mul_(20)
    return made.eval()


@pytest.fixture
def local(tmp_path, tokenizer: Tokenizer, model: Transformer) -> LocalModel:
    """Return the model as an assistant of a run with seed 2."""
    manifest = RunManifest(
        run_id="r-0", stage="r", table="r", status="running", fingerprint="f", config={}, parents={}, seed=2
    )
    run = Run(manifest, folder=tmp_path / "r", workspace=tmp_path, settings=RunSettings(seed=2), base=tmp_path)
    return LocalModel(run, tokenizer, model, SAMPLING)


def test_what_it_writes_is_what_it_samples_and_a_part_of_the_questions_gets_the_same_answers(
    local: LocalModel, tokenizer: Tokenizer, model: Transformer
) -> None:
    """Question n draws with its own numbers: asked again alone, as after a kill, it answers as it would have."""
    asked = {n: ask(f"Where is cat {n}?") for n in range(5)}
    found = dict(local.write(asked, 3))
    prompts = [render_prompt(tokenizer, talk) for talk in asked.values()]
    stop = frozenset({tokenizer.end_id, tokenizer.eos_id})
    with torch.no_grad():
        made = generate(model, prompts, max_new_tokens=6, temperature=1.0, stop_ids=stop, seed=2 * 101 + 3)
    assert found == {n: tokenizer.decode(one.token_ids) for n, one in enumerate(made)}
    assert len(set(found.values())) > 1
    assert dict(local.write({n: asked[n] for n in (4, 1)}, 3)) == {4: found[4], 1: found[1]}


def test_the_letters_have_the_probabilities_of_the_next_token(
    local: LocalModel, tokenizer: Tokenizer, model: Transformer
) -> None:
    """The reference is one plain forward pass of each question alone; batches pad, so equal to rounding only."""
    asked = {n: (ask("Which is better? " + "A boat. " * n), ask("not read")) for n in range(11)}
    found = dict(local.choose(asked))
    assert set(found) == set(asked)
    (a,), (b,) = tokenizer.encode("A"), tokenizer.encode("B")
    for n, (talk, _) in asked.items():
        ids = torch.tensor([render_prompt(tokenizer, talk)])
        with torch.no_grad():
            chances = torch.softmax(model.logits(model(ids))[0, -1].float(), -1)
        assert found[n] == pytest.approx((float(chances[a]), float(chances[b])), rel=1e-4)
    assert local.counts == {"asked": 11, "failed": 0}


def test_a_letter_of_several_tokens_has_the_probability_of_them_all(
    local: LocalModel, tokenizer: Tokenizer, model: Transformer
) -> None:
    """Where "A" were spelt by two tokens: the chance of the first, times that of the second after it."""
    (a,), (b,) = tokenizer.encode("A"), tokenizer.encode("B")
    spelt = SimpleNamespace(encode=lambda letter: [a, b] if letter == "A" else [b], pad_id=tokenizer.pad_id)
    question = ask("Which is better?")
    prompt = render_prompt(tokenizer, question)
    local.tokenizer = spelt  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trivium.training.questions.render_prompt", lambda *_: prompt)
        ((_, found),) = local.choose({0: (question, question)})
    with torch.no_grad():
        nats = torch.log_softmax(model.logits(model(torch.tensor([[*prompt, a]])))[0].float(), -1)
    assert found is not None
    assert found[0] == pytest.approx(math.exp(nats[len(prompt) - 1, a] + nats[len(prompt), b]), rel=1e-4)
    assert found[1] == pytest.approx(math.exp(nats[len(prompt) - 1, b]), rel=1e-4)


def test_what_has_no_room_has_failed_and_is_counted(local: LocalModel) -> None:
    long, short = ask("A boat. " * 60), ask("A boat.")
    assert local.fits(short) and not local.fits(long)
    written = dict(local.write({0: long, 1: short}, 1))
    assert written[0] is None and isinstance(written[1], str)
    assert dict(local.write({0: long}, 1)) == {0: None}
    chosen = dict(local.choose({0: (long, long), 1: (short, short)}))
    assert chosen[0] is None and chosen[1] is not None
    assert local.counts == {"asked": 5, "failed": 3}


def test_a_lively_sampler_is_needed_for_these_tests(local: LocalModel) -> None:
    """Another seed writes something else; else equal answers above would say nothing."""
    asked = {0: ask("Where is the cat?")}
    first = dict(local.write(asked, 1))
    local.run.manifest = dataclasses.replace(local.run.manifest, seed=3)
    assert dict(local.write(asked, 1)) != first
