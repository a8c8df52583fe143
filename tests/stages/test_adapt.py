"""Continued pre-training on a few documents: what it starts from, what it measures, and that it resumes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trivium.config import ConfigError, UserError
from trivium.data import microworld
from trivium.data.shards import open_shards, write_shards
from trivium.data.tokenizer import Tokenizer
from trivium.evals.perplexity import DocumentLoss
from trivium.models.hf import load_model, read_stop_ids
from trivium.records import EvalResult
from trivium.runs.events import read_metrics
from trivium.runs.manifest import Run
from trivium.stages import adapt
from trivium.training.loop import FitConfig
from trivium.training.optim import OptimConfig

from .conftest import Folders, equal, saved_weights, story

CONFIG = adapt.Config(
    context=32,
    heldout_tokens=2_000,
    prompts=("The",),
    fit=FitConfig(steps=12, batch_size=8, log_every=1, eval_every=6, save_every=5, optim=OptimConfig(lr=1e-2)),
)
Make = Callable[..., Run]
RECIPE = "Take {n} grams of flour and {n} eggs, stir for {n} minutes and bake the loaf until it is brown.".format


@pytest.fixture
def texts(tmp_path: Path, tiny_tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Return the held-out texts of both kinds: recipes are the domain, the microworld is general."""
    sides = {
        "domain": [RECIPE(n=number) for number in range(80)],
        "general": [document.text for document in microworld.documents(3, num=66)],
    }
    for kind, part in sides.items():
        folder = tmp_path / kind / f"{kind}-0"
        for side, some in (("train", part[:-6]), ("heldout", part[-6:])):
            write_shards(
                folder / "shards" / side,
                zip(tiny_tokenizer.encode_documents(some), (len(text.encode()) for text in some), strict=True),
                tokenizer_fingerprint=tiny_tokenizer.fingerprint,
                vocab_size=tiny_tokenizer.vocab_size,
            )
    return {kind: part[-6:] for kind, part in sides.items()}


@pytest.fixture
def make(stage_run: Callable[..., Run], texts: dict[str, list[str]], folders: Folders) -> Make:
    """Return a maker of runs that adapt the random chat model of `folders`."""
    parents = {"init": folders.policy, "corpus": "domain-0", "general": "general-0"}
    return lambda name, **changed: stage_run(name, parents | changed, table="adapt")


def figures(run: Run) -> dict[tuple[str, str, str], EvalResult]:
    """Return the run's results by task, metric and moment."""
    return {(r.task, r.metric, r.checkpoint): r for r in run.finish("done").results}


def bits_of(folder: Path, texts: list[str], tokenizer: Tokenizer) -> float:
    """Return a model's bits per byte, one whole document at a time: no packing, no windows, no stage."""
    model = load_model(folder)
    nats = 0.0
    with torch.no_grad():
        for ids in tokenizer.encode_documents(texts):
            row = torch.tensor([ids])
            logprobs = model.logits(model(row[:, :-1])).log_softmax(-1)
            nats -= float(logprobs.gather(-1, row[:, 1:, None]).sum())
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def test_before_is_the_start_model_and_after_is_the_one_that_is_saved(
    make: Make, texts: dict[str, list[str]], folders: Folders, tiny_tokenizer: Tokenizer
) -> None:
    """All four figures are those of the two folders; gain and forgetting are their differences."""
    run = make("a")
    # A context that holds every document whole, so that the reference needs no windows.
    adapt.run(dataclasses.replace(CONFIG, context=512), run)
    found = figures(run)
    for kind in ("domain", "general"):
        for when, folder in (("before", folders.policy), ("after", run.dir / "model")):
            expected = bits_of(folder, texts[kind], tiny_tokenizer)
            measured = found[f"{kind}@1", "bits_per_byte", when]
            assert measured.value == pytest.approx(expected, rel=1e-5)
            assert measured.low <= measured.value <= measured.high and measured.n == 6
    change = {kind: [found[f"{kind}@1", "bits_per_byte", w].value for w in ("before", "after")] for kind in texts}
    gain, forgetting = found["domain@1", "gain", ""], found["general@1", "forgetting", ""]
    assert gain.value == pytest.approx(change["domain"][0] - change["domain"][1]) and gain.value > 1.0
    assert forgetting.value == pytest.approx(change["general"][1] - change["general"][0])
    assert gain.low <= gain.value <= gain.high and forgetting.low <= forgetting.value <= forgetting.high


def test_gain_and_forgetting_by_hand(make: Make) -> None:
    """Two documents of 8 bytes: 16 and 8 bits before, 8 and 4 after, are 1.5 and 0.75 bits per byte, so 0.75 gained."""

    def cost(*bits: float) -> list[DocumentLoss]:
        return [DocumentLoss(nats=(b * math.log(2) / 2,) * 2, num_bytes=8) for b in bits]

    run = make("hand")
    adapt.report(run, {"domain": cost(16, 8), "general": cost(8, 8)}, {"domain": cost(8, 4), "general": cost(12, 16)})
    found = figures(run)
    values = {key: result.value for key, result in found.items()}
    assert values == pytest.approx(
        {
            ("domain@1", "bits_per_byte", "before"): 1.5,
            ("domain@1", "bits_per_byte", "after"): 0.75,
            ("domain@1", "gain", ""): 0.75,
            ("general@1", "bits_per_byte", "before"): 1.0,
            ("general@1", "bits_per_byte", "after"): 1.75,
            ("general@1", "forgetting", ""): 0.75,
        }
    )
    # Of two documents, resampling draws one twice at the extremes: 4 and 8 bits of 8 bytes gained.
    assert (found["domain@1", "gain", ""].low, found["domain@1", "gain", ""].high) == pytest.approx((0.5, 1.0))


def test_replay_holds_the_general_text(make: Make) -> None:
    """At equal domain rows, replay forgets less than half as much of what the model knew, and gains as much."""
    known = make("known", corpus="general-0")
    adapt.run(dataclasses.replace(CONFIG, replay_frac=0.0, fit=dataclasses.replace(CONFIG.fit, steps=60)), known)
    known.finish("done")
    changes = {}
    for frac, steps in ((0.0, 12), (0.5, 24)):
        run = make(f"replay-{frac}", init=known.dir / "model")
        fit = dataclasses.replace(CONFIG.fit, steps=steps, optim=OptimConfig(lr=5e-3))
        adapt.run(dataclasses.replace(CONFIG, replay_frac=frac, fit=fit), run)
        found = figures(run)
        changes[frac] = found["domain@1", "gain", ""].value, found["general@1", "forgetting", ""].value
        assert run.finish("done").summary["replayed_rows"] == frac * steps * 8
    assert changes[0.5][0] > 0.9 * changes[0.0][0] > 0.5
    assert changes[0.0][1] > 0.1 and changes[0.5][1] < 0.5 * changes[0.0][1]


def test_without_general_text_only_the_domain_is_measured(make: Make) -> None:
    """Then nothing is replayed either, and the rows are the domain's alone."""
    run = make("alone")
    adapt.run(dataclasses.replace(CONFIG, general="", replay_frac=0.0), run)
    assert {task for task, _, _ in figures(run)} == {"domain@1"}
    assert "eval/general_bits_per_byte" not in read_metrics(run.dir)
    summary = run.finish("done").summary
    shards = open_shards(run.workspace / "domain" / "domain-0" / "shards" / "train")
    assert summary["epochs"] == pytest.approx(12 * 8 * 32 / shards.num_tokens)
    assert summary["replayed_rows"] == 0 and "replay_epochs" not in summary


def test_the_kind_of_model_stays(make: Make, folders: Folders, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """An adapted chat model ends turns and keeps its tokenizer; what came of a base model is one."""
    run = make("chat")
    adapt.run(dataclasses.replace(CONFIG, fit=dataclasses.replace(CONFIG.fit, steps=1)), run)
    assert read_stop_ids(run.dir / "model") == {tiny_tokenizer.end_id} == read_stop_ids(folders.policy)
    assert Tokenizer.load(run.dir / "model").fingerprint == tiny_tokenizer.fingerprint
    assert run.finish("done").summary["is_base"] is False


def test_cut_off_and_resumed_is_uninterrupted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in an evaluation after a checkpoint: weights, log, samples and figures are as if never cut."""
    whole = make("whole")
    adapt.run(CONFIG, whole)
    expected = whole.finish("done")
    continue_text = adapt.continue_text

    def dying(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(adapt, "continue_text", dying)
    with pytest.raises(KeyboardInterrupt):
        adapt.run(CONFIG, make("cut"))
    monkeypatch.setattr(adapt, "continue_text", continue_text)
    resumed = make("cut")
    adapt.run(CONFIG, resumed)
    assert equal(saved_weights(whole), saved_weights(resumed))
    assert story(whole) == story(resumed)
    manifest = resumed.finish("done")
    assert (manifest.results, manifest.summary) == (expected.results, expected.summary)
    assert (manifest.cost.tokens, manifest.cost.flops) == (expected.cost.tokens, expected.cost.flops)


def test_a_fraction_that_is_none_and_replay_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"replay_frac = 1\.5: must be 0 to 1"):
        adapt.Config(replay_frac=1.5)
    with pytest.raises(ConfigError, match=r"replay_frac = -0\.1"):
        adapt.Config(replay_frac=-0.1)
    with pytest.raises(ConfigError, match=r"replay_frac = 0\.25 needs general text; name it in general, or set"):
        adapt.Config(general="")


@pytest.mark.parametrize("name", ["corpus", "general"])
def test_text_of_another_tokenizer_is_refused(make: Make, name: str, tmp_path: Path) -> None:
    """The sentence names the field, the run and the way out."""
    for side in ("train", "heldout"):
        folder = tmp_path / "other" / "other-0" / "shards" / side
        write_shards(folder, [([1, 2, 3], 3)], tokenizer_fingerprint="other", vocab_size=400)
    with pytest.raises(UserError, match=rf"{name}: other-0 was made with another tokenizer .* tokenizer = 'pretrain@"):
        adapt.run(CONFIG, make("other", **{name: "other-0"}))


def test_rows_longer_than_the_model_and_a_domain_below_a_batch_are_refused(make: Make) -> None:
    with pytest.raises(UserError, match="context = 1024: the model in init reads at most 512 tokens"):
        adapt.run(dataclasses.replace(CONFIG, context=1024), make("long"))
    large = dataclasses.replace(CONFIG, fit=dataclasses.replace(CONFIG.fit, batch_size=1000))
    with pytest.raises(UserError, match=r"too few for one batch of 750 rows of 32: give at least 24,000"):
        adapt.run(large, make("small"))
