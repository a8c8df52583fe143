"""What SFT can be told beyond its defaults: weights of messages, the last answer alone, packing, noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch

from trivium.batches import IGNORE
from trivium.config import ConfigError, build, facts
from trivium.data import microworld
from trivium.data.tokenizer import Tokenizer
from trivium.losses.cross_entropy import cross_entropy
from trivium.models.hf import load_model
from trivium.records import write_jsonl
from trivium.runs.events import read_metrics
from trivium.runs.manifest import Run
from trivium.stages import sft
from trivium.training.loop import FitConfig
from trivium.training.optim import OptimConfig

from .conftest import Folders, equal, saved_weights, story

CONFIG = sft.Config(
    data=("talks.jsonl",),
    context=200,
    heldout_frac=0.2,
    fit=FitConfig(steps=6, batch_size=4, log_every=1, eval_every=4, save_every=3, optim=OptimConfig(lr=1e-2)),
)
ALL = dataclasses.replace(CONFIG, packing=True, neftune_alpha=5.0)
Make = Callable[..., Run]


@pytest.fixture
def make(stage_run: Make, folders: Folders, tmp_path) -> Make:
    """Return a maker of SFT runs over forty conversations of two turns, whose second answer counts three times."""
    talks = [talk.as_dicts() for talk in microworld.instructions(5, num=80)]
    rows = [{"messages": [*first, *second[:-1], {**second[-1], "weight": 3}]} for first, second in pairs(talks)]
    write_jsonl(tmp_path / "talks.jsonl", rows)
    return partial(stage_run, parents={"init": folders.policy}, table="sft")


def pairs(talks: list[list[dict]]) -> list[tuple[list[dict], list[dict]]]:
    return list(zip(talks[::2], talks[1::2], strict=True))


def test_a_messages_weight_multiplies_its_tokens_and_the_mean_divides_by_weights(
    make: Make, folders: Folders, tiny_tokenizer: Tokenizer
) -> None:
    """By hand, from the logits: sum of w_i loss_i over sum of w_i, 1 for the first answer, 3 for the second."""
    train, _, _ = sft.load_rows(CONFIG, make("weights"), tiny_tokenizer)
    batch = train.batch(range(5), tiny_tokenizer.pad_id)
    model = load_model(folders.policy)
    output = sft.objective(model, batch)
    losses = cross_entropy(model.logits(model(batch.input_ids)), batch.targets).detach()
    total = count = 0.0
    for row in range(5):
        turns = torch.cumsum((batch.targets[row] == tiny_tokenizer.end_id).int(), 0)
        for place in range(batch.targets.shape[1]):
            if batch.targets[row, place] != IGNORE:
                ended = int(turns[place]) - int(batch.targets[row, place] == tiny_tokenizer.end_id)
                total += (1, 3)[ended] * float(losses[row, place])
                count += (1, 3)[ended]
    assert float(batch.num_items) == count
    assert output.total.item() == pytest.approx(total, rel=1e-5)


def test_a_weight_of_zero_or_the_last_answer_alone_leaves_the_others_out(
    make: Make, tmp_path, tiny_tokenizer: Tokenizer
) -> None:
    """`train: false` on the first answer trains what `train_on = "last"` trains, and needs no weights at all."""
    talks = [talk.as_dicts() for talk in microworld.instructions(5, num=80)]
    plain = [[*first, *second] for first, second in pairs(talks)]
    write_jsonl(tmp_path / "talks.jsonl", [{"messages": messages} for messages in plain])
    last = dataclasses.replace(CONFIG, train_on="last")
    alone, _, _ = sft.load_rows(last, make("last"), tiny_tokenizer)
    whole, _, _ = sft.load_rows(CONFIG, make("whole"), tiny_tokenizer)
    off = [
        [m | ({"train": False} if m["role"] == "assistant" and m is not messages[-1] else {}) for m in messages]
        for messages in plain
    ]
    write_jsonl(tmp_path / "talks.jsonl", [{"messages": messages} for messages in off])
    masked, _, _ = sft.load_rows(CONFIG, make("masked"), tiny_tokenizer)
    assert alone.rows == masked.rows != whole.rows
    assert masked.weights is None is alone.weights
    for (ids, trained), (same, before) in zip(alone, whole, strict=True):
        assert ids == same
        spoken = tiny_tokenizer.decode([i for i, on in zip(ids, trained, strict=True) if on], skip_special=False)
        assert spoken.count("<|end|>") == 1 and sum(before) > sum(trained)


def test_defaults_train_every_answer_alike_without_weights(make: Make, tmp_path, tiny_tokenizer: Tokenizer) -> None:
    talks = [{"messages": talk.as_dicts()} for talk in microworld.instructions(5, num=40)]
    write_jsonl(tmp_path / "talks.jsonl", talks)
    train, heldout, _ = sft.load_rows(CONFIG, make("plain"), tiny_tokenizer)
    assert train.weights is None is heldout.weights
    assert train.batch([0, 1], tiny_tokenizer.pad_id).weights is None
    off = build(sft.Config, {"packing": False, "neftune_alpha": 0, "train_on": "all"}, where="[sft]")
    assert facts(off) == facts(sft.Config())
    assert {"packing", "train_on", "neftune_alpha"}.isdisjoint(facts(off))
    with pytest.raises(ConfigError, match=r"train_on = 'first': must be one of"):
        build(sft.Config, {"train_on": "first"}, where="[sft]")
    with pytest.raises(ConfigError, match=r"neftune_alpha = -1"):
        build(sft.Config, {"neftune_alpha": -1.0}, where="[sft]")


def test_packed_with_weights_and_noise_it_learns_and_says_what_it_saved(make: Make) -> None:
    run = make("packed")
    sft.run(ALL, run)
    curves = read_metrics(run.dir)
    assert curves["train/loss"][-1][1] < curves["train/loss"][0][1] - 0.15
    packing = run.finish("done").summary["packing"]
    assert packing["rows"] < run.manifest.summary["data"]["num_conversations"]
    assert 0 <= packing["padding_frac"] < 1 and 0 <= packing["padding_frac_unpacked"] < 1
    assert run.manifest.summary["epochs"] == 6 * 4 / packing["rows"]


def test_packed_and_noisy_cut_off_and_resumed_is_uninterrupted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the evaluation of step 4, after the checkpoint of step 3: the rest of the noise is the same."""
    whole = make("whole")
    sft.run(ALL, whole)
    respond = sft.respond

    def dying(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "respond", dying)
    with pytest.raises(KeyboardInterrupt):
        sft.run(ALL, make("cut"))
    monkeypatch.setattr(sft, "respond", respond)
    resumed = make("cut")
    sft.run(ALL, resumed)
    assert equal(saved_weights(whole), saved_weights(resumed))
    assert story(whole) == story(resumed)


def test_noise_changes_training_but_not_with_micro_batches_and_never_the_evaluation(make: Make) -> None:
    """A micro-batch of 1 row gives the whole batch's weights to rounding; the held-out loss of step 0 has no noise."""
    noisy = dataclasses.replace(CONFIG, neftune_alpha=20.0)
    still = dataclasses.replace(CONFIG.fit, steps=0)
    losses = []
    for name, config in (("a", dataclasses.replace(noisy, fit=still)), ("b", dataclasses.replace(CONFIG, fit=still))):
        run = make(f"still-{name}")
        sft.run(config, run)
        losses.append(run.finish("done").results[0].value)
    assert losses[0] == losses[1]
    runs = {}
    for name, config in (
        ("plain", CONFIG),
        ("noisy", noisy),
        ("split", dataclasses.replace(noisy, fit=dataclasses.replace(noisy.fit, micro_batch_size=1))),
    ):
        run = make(name)
        sft.run(config, run)
        runs[name] = [value for _, value in read_metrics(run.dir)["train/loss"]]
    # One optimizer step's rounding differs; AdamW carries it on, so six steps are compared to 1e-3 nats.
    assert runs["split"] == pytest.approx(runs["noisy"], abs=1e-3)
    assert abs(runs["plain"][0] - runs["noisy"][0]) > 1e-3
