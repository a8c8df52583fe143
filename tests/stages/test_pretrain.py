"""Pre-training on a few documents of the microworld: what is measured, what is left, and that it resumes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trivium.batches import IGNORE, TokenBatch
from trivium.config import ConfigError, UserError, build, facts
from trivium.data import microworld
from trivium.data.shards import open_shards, write_shards
from trivium.data.tokenizer import Tokenizer
from trivium.losses.cross_entropy import cross_entropy
from trivium.models.hf import load_model, read_stop_ids
from trivium.models.transformer import Transformer
from trivium.runs.events import read_events, read_metrics
from trivium.runs.manifest import Run
from trivium.stages import pretrain
from trivium.training.loop import FitConfig
from trivium.training.optim import OptimConfig

from .conftest import equal, saved_weights, story

CONFIG = pretrain.Config(
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=32,
    context=32,
    prompts=("The",),
    fit=FitConfig(steps=20, batch_size=8, log_every=1, eval_every=10, save_every=8, optim=OptimConfig(lr=1e-2)),
)
Make = Callable[[str], Run]


@pytest.fixture
def corpus(tmp_path: Path, tiny_tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Return the texts of both sides, which stand as shards in the workspace."""
    texts = [document.text for document in microworld.documents(3, num=66)]
    sides = {"train": texts[:60], "heldout": texts[60:]}
    folder = tmp_path / "train_tokenizer" / "train_tokenizer-0"
    tiny_tokenizer.save(folder / "tokenizer")
    for side, part in sides.items():
        write_shards(
            folder / "shards" / side,
            zip(tiny_tokenizer.encode_documents(part), (len(text.encode()) for text in part), strict=True),
            tokenizer_fingerprint=tiny_tokenizer.fingerprint,
            vocab_size=tiny_tokenizer.vocab_size,
        )
    return sides


@pytest.fixture
def make(stage_run: Callable[..., Run], corpus: dict[str, list[str]]) -> Make:
    """Return a maker of pre-training runs."""
    return lambda name: stage_run(name, {"corpus": "train_tokenizer-0"}, table="pretrain")


def test_loss_falls_and_the_folder_is_a_base_model(make: Make, tiny_tokenizer: Tokenizer) -> None:
    """The first loss is that of guessing; the model ends documents with <eos> and the manifest counts what it saw."""
    run = make("a")
    pretrain.run(CONFIG, run)
    curves = read_metrics(run.dir)
    assert curves["train/loss"][0][1] == pytest.approx(math.log(400), abs=0.15)
    assert curves["train/loss"][-1][1] < curves["train/loss"][0][1] - 0.6
    assert [step for step, _ in curves["eval/loss"]] == [10, 20]
    assert read_stop_ids(run.dir / "model") == {tiny_tokenizer.eos_id}
    assert Tokenizer.load(run.dir / "model").fingerprint == tiny_tokenizer.fingerprint
    manifest = run.finish("done")
    assert manifest.summary["num_parameters"] == sum(p.numel() for p in load_model(run.dir / "model").parameters())
    assert manifest.cost.tokens == 20 * 8 * 32
    assert manifest.cost.flops > 6 * manifest.summary["num_parameters"] * manifest.cost.tokens * 0.5
    samples = [e.value for e in read_events(run.dir, kind="sample")]
    assert [s["prompt"] for s in samples] == ["The", "The"]


def test_bits_per_byte_are_the_nats_of_the_heldout_text_over_its_bytes(
    make: Make, corpus: dict[str, list[str]], tiny_tokenizer: Tokenizer
) -> None:
    """One document at a time, its whole text in one row, gives the same figure as the packed rows."""
    run = make("bits")
    torch.manual_seed(0)
    model = Transformer(pretrain.model_config(dataclasses.replace(CONFIG, context=256), tiny_tokenizer))
    model.init_weights(7)
    shards = open_shards(
        run.workspace / "train_tokenizer" / "train_tokenizer-0" / "shards" / "heldout", tiny_tokenizer.fingerprint
    )
    nats = count = 0.0
    with torch.no_grad():
        for ids in tiny_tokenizer.encode_documents(corpus["heldout"]):
            row = torch.tensor([ids])
            losses = cross_entropy(model.logits(model(row[:, :-1])), row[:, 1:])
            nats, count = nats + float(losses.sum()), count + losses.numel()
    num_bytes = sum(len(text.encode()) for text in corpus["heldout"])
    # A context that holds everything in one row, so that no document is cut.
    measured = pretrain.heldout_loss(run, model, shards, context=shards.num_tokens)
    assert measured["eval/loss"] == pytest.approx(nats / count, rel=1e-5)
    assert measured["eval/bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_no_token_sees_another_document(tiny_tokenizer: Tokenizer) -> None:
    """Two documents packed into a row cost what they cost alone; changing one leaves the other's loss as it was."""
    model = Transformer(pretrain.model_config(CONFIG, tiny_tokenizer))
    model.init_weights(0)
    first, second = torch.arange(20, 28), torch.arange(50, 60)

    def packed(left: torch.Tensor, right: torch.Tensor, *, train: str) -> float:
        targets = [torch.cat([part[1:], torch.tensor([IGNORE])]) for part in (left, right)]
        keep = [t if name == train else torch.full_like(t, IGNORE) for t, name in zip(targets, "ab", strict=True)]
        batch = TokenBatch(
            input_ids=torch.cat([left, right])[None],
            targets=torch.cat(keep)[None],
            positions=torch.cat([torch.arange(len(left)), torch.arange(len(right))])[None],
            document_ids=torch.tensor([[0] * len(left) + [1] * len(right)]),
        )
        return pretrain.objective(model, 0.0, batch).total.item()

    def alone(ids: torch.Tensor) -> float:
        losses = cross_entropy(model.logits(model(ids[None, :-1])), ids[None, 1:])
        return losses.sum().item()

    assert packed(first, second, train="a") == pytest.approx(alone(first), rel=1e-5)
    assert packed(first, second, train="b") == pytest.approx(alone(second), rel=1e-5)
    assert packed(first + 100, second, train="b") == packed(first, second, train="b")


def test_cut_off_and_resumed_is_uninterrupted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in an evaluation after a checkpoint: weights, log, samples and result are as if never cut."""
    whole = make("whole")
    pretrain.run(CONFIG, whole)
    expected = whole.finish("done")
    continue_text = pretrain.continue_text

    def dying(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "continue_text", dying)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(CONFIG, make("cut"))
    monkeypatch.setattr(pretrain, "continue_text", continue_text)
    resumed = make("cut")
    pretrain.run(CONFIG, resumed)
    assert equal(saved_weights(whole), saved_weights(resumed))
    assert story(whole) == story(resumed)
    manifest = resumed.finish("done")
    assert (manifest.results, manifest.summary) == (expected.results, expected.summary)
    assert (manifest.cost.tokens, manifest.cost.flops) == (expected.cost.tokens, expected.cost.flops)


def test_micro_batches_change_memory_not_results(make: Make) -> None:
    """Eight rows at once or three at a time: the same weights to rounding."""
    runs = [make("one"), make("split")]
    fit = dataclasses.replace(CONFIG.fit, steps=3, optim=OptimConfig(kind="adamw", lr=1e-2, eps=1e-3))
    pretrain.run(dataclasses.replace(CONFIG, fit=fit), runs[0])
    pretrain.run(dataclasses.replace(CONFIG, fit=dataclasses.replace(fit, micro_batch_size=3)), runs[1])
    first, second = (saved_weights(run) for run in runs)
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_shapes_that_no_transformer_has_are_refused() -> None:
    """Heads must divide the width, key/value heads the heads."""
    with pytest.raises(ConfigError, match="hidden_size = 100 must divide"):
        pretrain.Config(hidden_size=100, num_heads=3)
    with pytest.raises(ConfigError, match="num_layers"):
        pretrain.Config(num_layers=0)


def test_a_corpus_smaller_than_a_batch_is_refused(make: Make) -> None:
    """Every step would be all of it, over and over; the sentence says how much would do."""
    large = dataclasses.replace(CONFIG, fit=dataclasses.replace(CONFIG.fit, batch_size=9999))
    with pytest.raises(UserError, match=r"too few for one batch of 9999 rows of 32: give at least 319,968"):
        pretrain.run(large, make("small"))


def test_depth_derives_what_the_recipe_leaves_open(
    make: Make, tiny_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Depth 2 is 128 wide with 20 tokens a parameter; width, steps and rate of the recipe's own win and are said."""
    run = make("dial")
    free = pretrain.resolve(build(pretrain.Config, {"depth": 2, "context": 32}, where="here"), tiny_tokenizer, run)
    assert (free.hidden_size, free.num_layers, free.num_heads, free.num_kv_heads) == (128, 2, 2, 1)
    size = pretrain.model_config(free, tiny_tokenizer).num_parameters()
    assert free.fit.steps * free.fit.batch_size * 32 == pytest.approx(20 * size, rel=0.01)
    assert "pretrain: depth 2, hidden_size 128, num_layers 2" in capsys.readouterr().err
    # 128 and 100 are also the defaults: a recipe that writes them means them.
    own = {"depth": 4, "hidden_size": 128, "fit": {"steps": 100, "optim": {"lr": 0.005}}}
    kept = pretrain.resolve(build(pretrain.Config, own, where="here"), tiny_tokenizer, run)
    assert (kept.hidden_size, kept.num_layers, kept.num_heads, kept.fit.steps) == (128, 4, 2, 100)
    assert (kept.fit.optim.lr, kept.depth, kept.given) == (0.005, 0, ())
    assert kept.fit.log_every == FitConfig().log_every
    flat = build(pretrain.Config, {"depth": 2, "num_layers": 5}, where="here")
    assert shape(pretrain.resolve(flat, tiny_tokenizer, make("flat"))) == (128, 5, 2), "width is the dial's"
    summary = run.finish("done").summary
    assert summary["given"] == ["fit.optim.lr", "fit.steps", "hidden_size"]
    assert summary["resolved"]["steps"] == 100
    assert summary["resolved"]["batch_size"] == kept.fit.batch_size


def shape(config: pretrain.Config) -> tuple[int, int, int]:
    """Return width, layers and heads."""
    return config.hidden_size, config.num_layers, config.num_heads


def test_a_run_by_depth_is_the_run_with_its_numbers_set_by_hand(make: Make, tiny_tokenizer: Tokenizer) -> None:
    """The same weights bit for bit: the dial fills in numbers and does nothing else."""
    dial = {"depth": 1, "context": 32, "hidden_size": 16, "prompts": [], "fit": {"steps": 3}}
    runs = [make("dial"), make("hand")]
    pretrain.run(build(pretrain.Config, dial, where="here"), runs[0])
    told = runs[0].finish("done").summary["resolved"]
    hand = pretrain.Config(
        context=32,
        prompts=(),
        **{name: told[name] for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads")},
        fit=FitConfig(
            steps=3, batch_size=told["batch_size"], optim=OptimConfig(lr=told["lr"], weight_decay=told["weight_decay"])
        ),
    )
    pretrain.run(hand, runs[1])
    assert equal(saved_weights(runs[0]), saved_weights(runs[1]))


def test_a_dial_that_is_off_leaves_no_trace() -> None:
    """Recipes from before the dial keep their fingerprints; under the dial, what is given tells runs apart."""
    off = facts(build(pretrain.Config, {"hidden_size": 64}, where="here"))
    assert not {"depth", "given", "tokens_per_parameter"} & set(off)
    assert off == {k: v for k, v in dataclasses.asdict(pretrain.Config(hidden_size=64)).items() if k in off}
    on = [facts(build(pretrain.Config, {"depth": 2, **own}, where="here")) for own in ({}, {"hidden_size": 128})]
    assert on[0] != on[1]


def test_a_dial_set_wrongly_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokens_per_parameter belongs to depth"):
        pretrain.Config(tokens_per_parameter=5.0)
    with pytest.raises(ConfigError, match="given: is filled in"):
        build(pretrain.Config, {"depth": 2, "given": ["fit.steps"]}, where="here")
    with pytest.raises(ConfigError, match="depth = -1"):
        pretrain.Config(depth=-1)
