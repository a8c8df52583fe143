"""Supervised fine-tuning: which tokens are trained, which conversations are left out, and what is left behind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from trivium.batches import IGNORE
from trivium.config import UserError
from trivium.data import microworld
from trivium.data.collate import pad_rows
from trivium.data.tokenizer import Tokenizer
from trivium.losses.cross_entropy import cross_entropy
from trivium.models.hf import load_model, read_stop_ids
from trivium.records import write_jsonl
from trivium.runs.events import read_events, read_metrics
from trivium.runs.manifest import Run
from trivium.stages import sft
from trivium.training.loop import FitConfig
from trivium.training.optim import OptimConfig

from .conftest import Folders, equal, saved_weights, story

CONFIG = sft.Config(
    data=("talks.jsonl",),
    context=96,
    heldout_frac=0.2,
    fit=FitConfig(steps=12, batch_size=8, log_every=1, eval_every=6, save_every=5, optim=OptimConfig(lr=1e-2)),
)
Make = Callable[..., Run]


@pytest.fixture
def talks() -> list[dict]:
    """Return conversations of the microworld, a two-turn one among them."""
    rows = [{"messages": talk.as_dicts()} for talk in microworld.instructions(5, num=50)]
    return [{"messages": [*rows[0]["messages"], *rows[1]["messages"]]}, *rows[2:]]


@pytest.fixture
def make(stage_run: Make, folders: Folders, tmp_path, talks: list[dict]) -> Make:
    """Return a maker of SFT runs."""
    write_jsonl(tmp_path / "talks.jsonl", talks)
    return partial(stage_run, parents={"init": folders.policy}, table="sft")


def test_only_what_the_assistant_says_and_its_end_of_turn_is_trained(
    make: Make, talks: list[dict], tiny_tokenizer: Tokenizer
) -> None:
    """Decoded, the targets of a row are exactly the assistant's texts with their terminators (rows 3 and 5)."""
    train, heldout, _ = sft.load_rows(dataclasses.replace(CONFIG, context=400), make("masks"), tiny_tokenizer)
    assert len(train) + len(heldout) == len(talks)
    batch = pad_rows([*train, *heldout], tiny_tokenizer.pad_id)
    trained = [tiny_tokenizer.decode(row[row != IGNORE].tolist(), skip_special=False) for row in batch.targets]
    wanted = ["".join(m["content"] + "<|end|>" for m in talk["messages"] if m["role"] == "assistant") for talk in talks]
    assert sorted(trained) == sorted(wanted)
    assert (batch.targets != tiny_tokenizer.pad_id).all()


def test_too_long_conversations_are_left_out_whole_and_counted(
    make: Make, talks: list[dict], tiny_tokenizer: Tokenizer
) -> None:
    """A row of context + 1 tokens fits (its last is only predicted); one more does not; nothing is cut."""
    whole, _ = rows_of(make("all"), tiny_tokenizer, context=400)
    lengths = sorted(len(ids) for ids, _ in whole)
    limit = lengths[len(lengths) // 2] - 1
    short, facts = rows_of(make("short"), tiny_tokenizer, context=limit)
    assert sorted(len(ids) for ids, _ in short) == [n for n in lengths if n <= limit + 1]
    assert facts["too_long"] == sum(n > limit + 1 for n in lengths) > 0
    assert all(ids[-1] == tiny_tokenizer.end_id for ids, _ in short)


def rows_of(run: Run, tokenizer: Tokenizer, *, context: int):
    train, heldout, facts = sft.load_rows(dataclasses.replace(CONFIG, context=context), run, tokenizer)
    return [*train, *heldout], facts


def test_the_split_is_by_prompt(make: Make, tmp_path, tiny_tokenizer: Tokenizer) -> None:
    """Five answers to each of forty prompts: all five stand on one side, about a fifth of the prompts held out."""
    write_jsonl(
        tmp_path / "talks.jsonl",
        [{"prompt": f"Question {n}?", "response": f"Answer {k}."} for k in range(5) for n in range(40)],
    )
    train, heldout, _ = sft.load_rows(CONFIG, make("split"), tiny_tokenizer)
    sides = [{tiny_tokenizer.decode(ids).partition("Answer")[0] for ids, _ in side} for side in (train, heldout)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 40
    assert len(train) == 5 * len(sides[0])
    assert 2 <= len(sides[1]) <= 16


def test_the_loss_is_that_of_the_assistants_tokens(make: Make, folders: Folders, tiny_tokenizer: Tokenizer) -> None:
    """The batched, padded objective equals each conversation alone; what pads hold does not matter."""
    rows, _ = rows_of(make("loss"), tiny_tokenizer, context=96)
    model = load_model(folders.policy)
    total = sft.objective(model, pad_rows(rows[:6], tiny_tokenizer.pad_id)).total.item()
    assert sft.objective(model, pad_rows(rows[:6], 99)).total.item() == total
    alone = 0.0
    for ids, trained in rows[:6]:
        row = torch.tensor([ids])
        losses = cross_entropy(model.logits(model(row[:, :-1])), row[:, 1:])[0]
        alone += losses[torch.tensor(trained[1:])].sum().item()
    assert total == pytest.approx(alone, rel=1e-5)


def test_a_run_learns_and_leaves_a_chat_model(make: Make, talks: list[dict], tiny_tokenizer: Tokenizer) -> None:
    """Loss falls on both sides, generation will stop at the end of a turn, the masks are shown."""
    run = make("run")
    sft.run(CONFIG, run)
    curves = read_metrics(run.dir)
    assert curves["train/loss"][-1][1] < curves["train/loss"][0][1] - 0.6
    assert curves["eval/loss"][-1][1] < math.log(400) - 0.3
    assert read_stop_ids(run.dir / "model") == {tiny_tokenizer.end_id}
    manifest = run.finish("done")
    assert manifest.results[0].value == pytest.approx(curves["eval/loss"][-1][1])
    assert manifest.summary["skipped_too_long"] > 0
    counted = manifest.summary["data"]["num_conversations"] + manifest.results[0].n
    assert counted + manifest.summary["skipped_too_long"] == len(talks)
    shown = [event.value for event in read_events(run.dir, kind="specimen")]
    assert all(len(s["tokens"]) == len(s["trained"]) for s in shown)
    said = {m["content"] for talk in talks for m in talk["messages"] if m["role"] == "assistant"}
    first = "".join(t for t, on in zip(shown[0]["tokens"], shown[0]["trained"], strict=True) if on)
    assert first.removesuffix("<|end|>") in said


def test_cut_off_and_resumed_is_uninterrupted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the evaluation of step 6, after the checkpoint of step 5."""
    whole = make("whole")
    sft.run(CONFIG, whole)
    respond = sft.respond

    def dying(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "respond", dying)
    with pytest.raises(KeyboardInterrupt):
        sft.run(CONFIG, make("cut"))
    monkeypatch.setattr(sft, "respond", respond)
    resumed = make("cut")
    sft.run(CONFIG, resumed)
    assert equal(saved_weights(whole), saved_weights(resumed))
    assert story(whole) == story(resumed)


def test_conversations_without_an_answer_to_train_on_are_counted(
    make: Make, tmp_path, talks: list[dict], tiny_tokenizer: Tokenizer
) -> None:
    """An assistant that speaks first has been asked nothing: the row has no target, so it is left out and counted."""
    write_jsonl(tmp_path / "talks.jsonl", [*talks, {"messages": [{"role": "assistant", "content": "Hello."}]}])
    train, heldout, facts = sft.load_rows(dataclasses.replace(CONFIG, context=400), make("none"), tiny_tokenizer)
    assert len(train) + len(heldout) == len(talks)
    assert facts["untrained"] == 1


def test_missing_data_is_one_sentence(make: Make, tmp_path) -> None:
    """No file, no line, everything too long, nothing held out: each says what to change."""
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        sft.run(dataclasses.replace(CONFIG, data=("nowhere.jsonl",)), make("a"))
    with pytest.raises(UserError, match="0 conversations to train on"):
        sft.run(dataclasses.replace(CONFIG, data=()), make("b"))
    with pytest.raises(UserError, match=r"longer than context = 9"):
        sft.run(dataclasses.replace(CONFIG, context=9), make("c"))
    write_jsonl(tmp_path / "talks.jsonl", [{"prompt": "Who?", "response": "Me."}])
    with pytest.raises(UserError, match="heldout_frac"):
        sft.run(CONFIG, make("d"))
