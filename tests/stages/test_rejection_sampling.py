"""Rejection sampling on a random network: what is picked is what is learned, and the policy comes to write it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial

import pytest
import torch

from trivium.batches import IGNORE
from trivium.config import ConfigError, UserError
from trivium.losses.logprobs import token_logprobs
from trivium.models.generate import Generated
from trivium.models.hf import load_model
from trivium.models.lora import LoraConfig
from trivium.runs.events import read_events, read_metrics
from trivium.runs.manifest import Run
from trivium.stages import rejection_sampling
from trivium.stages.rejection_sampling import Config, Trainer
from trivium.training import distributed
from trivium.training.optim import OptimConfig
from trivium.training.rollout import SampleConfig
from trivium.training.schedule import ScheduleConfig

from .conftest import Folders, equal, saved_weights, story

PROMPTS = ["Where is the mill?", "Tell me a story about a dog and a red hat.", "6 + 3 = ?", "Who are you?"]
CONSTANT = ScheduleConfig(kind="constant", warmup_frac=0.0)
CONFIG = Config(
    prompts=("prompts.jsonl",),
    rounds=3,
    prompts_per_round=3,
    num_samples=4,
    epochs=2,
    minibatches=2,
    missing_eos_penalty=0.0,
    optim=OptimConfig(kind="adamw", lr=1e-2, weight_decay=0.0),
    sampling=SampleConfig(max_new_tokens=6),
)
Make = Callable[..., Run]


@pytest.fixture
def make(stage_run: Make, folders: Folders, tmp_path) -> Make:
    """Return a maker of runs over four prompts."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    parents = {"policy": folders.policy, "reward_model": folders.reward}
    return partial(stage_run, parents=parents, table="rejection_sampling")


def share_of_even(rows: list[list[int]]) -> list[float]:
    """Return the share of even ids in each row's last tokens: a reward that a random network can learn."""
    return [sum(i % 2 == 0 for i in row[-6:]) / 6 for row in rows]


def test_before_the_first_update_nothing_has_moved(make: Make) -> None:
    """The first round's KL is 0 to the bit, its samples are the start's, its score their mean."""
    run = make("start")
    trainer = Trainer(CONFIG, run)
    rows, generated = trainer.sample(0)
    assert [rows.count(row) for row in dict.fromkeys(rows)] == [4, 4, 4]
    assert rows == sorted(rows, key=rows.index)  # neighbours
    assert trainer.kl(rows, generated).tolist() == [0.0, 0.0, 0.0]
    scores = trainer.score(rows, generated)
    rejection_sampling.run(CONFIG, run)
    curves = read_metrics(run.dir)
    assert curves["rollout/kl"][0] == (1, 0.0)
    assert curves["rollout/score"][0][1] == pytest.approx(float(scores.mean()))
    assert curves["rollout/picked_score"][0][1] == pytest.approx(float(scores.view(3, 4).amax(1).mean()))


def test_a_step_is_the_gradient_of_the_picked_completions_likelihood(make: Make) -> None:
    """The batch holds the picked rows, targets on their own tokens alone, and the loss is their mean -log p."""
    trainer = Trainer(dataclasses.replace(CONFIG, minibatches=1, epochs=1), make("gradient"))
    rows, generated = trainer.sample(0)
    picked = [1, 6, 8]
    batch = trainer.tokens(rows, generated, picked)
    for place, i in enumerate(picked):
        assert batch.targets[place][batch.targets[place] != IGNORE].tolist() == generated[i].token_ids
        prompt = trainer.prompts.encoded[rows[i]]
        assert batch.input_ids[place, : len(prompt)].tolist() == prompt
    with torch.no_grad():
        logits = trainer.policy.logits(trainer.policy(batch.input_ids, positions=batch.positions))
        expected = -token_logprobs(logits, batch.targets).sum() / (batch.targets != IGNORE).sum()
    figures = trainer.learn(rows, generated, picked, 0)
    assert figures["train/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_what_the_reward_likes_becomes_what_the_policy_writes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Picked for even ids over eight rounds, it samples them far more often; the reference has not moved."""
    monkeypatch.setattr(rejection_sampling.LearnedReward, "score_ids", lambda self, rows: share_of_even(rows))
    config = dataclasses.replace(CONFIG, rounds=8, prompts_per_round=4, num_samples=8)
    run = make("learns")
    rejection_sampling.run(config, run)
    manifest = run.finish("done")
    results = {result.task: result for result in manifest.results}
    assert results["rollout_score_before@1"].value < 0.65
    assert results["rollout_score@1"].value > results["rollout_score_before@1"].value + 0.15
    assert results["rollout_kl@1"].value > 0.5
    assert manifest.summary["rounds"] == 8 and manifest.summary["data"]["num_completions"] == 8 * 4 * 8


def test_each_round_samples_from_the_newest_policy(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second round's samples are those of the weights that the first left, not of the start."""
    seen: list[list[Generated]] = []
    sample = Trainer.sample

    def noting(self, round_, num=0):
        rows, generated = sample(self, round_, num)
        seen.append(generated)
        return rows, generated

    monkeypatch.setattr(Trainer, "sample", noting)
    run = make("newest")
    rejection_sampling.run(dataclasses.replace(CONFIG, rounds=2), run)
    fresh = Trainer(CONFIG, make("fresh"))
    assert [g.token_ids for g in sample(fresh, 0)[1]] == [g.token_ids for g in seen[0]]
    assert [g.token_ids for g in sample(fresh, 1)[1]] != [g.token_ids for g in seen[1]]


def test_what_stays_above_the_floor_is_learned_and_nothing_else(make: Make, folders: Folders) -> None:
    """A floor that nothing reaches leaves the weights as they were, to the bit, and says so in every round."""
    run = make("floor")
    rejection_sampling.run(dataclasses.replace(CONFIG, min_score=1e9), run)
    assert equal(saved_weights(run), dict(load_model(folders.policy).state_dict()))
    curves = read_metrics(run.dir)
    assert [value for _, value in curves["rollout/picked_frac"]] == [0.0, 0.0, 0.0]
    assert "train/loss" not in curves and "rollout/picked_score" not in curves


def test_specimens_show_all_completions_best_first_with_what_was_picked(make: Make) -> None:
    """Two prompts a round; the picked one leads, scores descend, and each prompt has all of its completions."""
    run = make("shown")
    rejection_sampling.run(CONFIG, run)
    kept = [event.value for event in read_events(run.dir, kind="specimen")]
    assert len(kept) == 6
    for value in kept:
        scores = [answer["score"] for answer in value["answers"]]
        assert len(scores) == 4 and scores == sorted(scores, reverse=True)
        assert [answer["picked"] for answer in value["answers"]] == [True, False, False, False]
        assert value["prompt"] in PROMPTS


def test_cut_off_at_any_round_and_resumed_is_uninterrupted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, log, results and summary are those of a run that was never cut."""
    config = dataclasses.replace(CONFIG, optim=OptimConfig(lr=1e-2))  # Muon's momentum, too
    whole = make("whole")
    rejection_sampling.run(config, whole)
    expected = whole.finish("done")
    learn = Trainer.learn
    for cut in range(3):

        def dying(self, rows, generated, picked, round_, cut=cut):
            if round_ == cut:
                raise KeyboardInterrupt
            return learn(self, rows, generated, picked, round_)

        monkeypatch.setattr(Trainer, "learn", dying)
        with pytest.raises(KeyboardInterrupt):
            rejection_sampling.run(config, make(f"cut{cut}"))
        monkeypatch.setattr(Trainer, "learn", learn)
        resumed = make(f"cut{cut}")
        rejection_sampling.run(config, resumed)
        assert equal(saved_weights(whole), saved_weights(resumed))
        assert story(whole) == story(resumed)
        manifest = resumed.finish("done")
        assert (manifest.summary, manifest.results) == (expected.summary, expected.results)


def test_the_judge_is_recorded_and_changes_nothing(make: Make, module_of) -> None:
    """The same weights with and without it; its mean is logged each round, and before and after in the manifest."""
    plain, judged = make("plain"), make("judged")
    rejection_sampling.run(CONFIG, plain)
    name = module_of(length=lambda prompt, text: float(len(text)))
    rejection_sampling.run(dataclasses.replace(CONFIG, judge=f"{name}:length"), judged)
    assert equal(saved_weights(plain), saved_weights(judged))
    assert len(read_metrics(judged.dir)["rollout/true_taste"]) == 3
    tasks = {result.task for result in judged.finish("done").results}
    assert {"rollout_true_taste@1", "rollout_true_taste_before@1", "rollout_kl@1"} <= tasks


def test_with_adapters_the_frozen_weights_stay(make: Make, outspoken, stage_run: Make, folders: Folders) -> None:
    """At the start KL is 0; after learning it is not, and with the adapters off the policy is the start, to the bit."""
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2))
    run = make("adapters", parents={"policy": outspoken, "reward_model": folders.reward})
    trainer = Trainer(config, run)
    rows, generated = trainer.sample(0)
    assert trainer.kl(rows, generated).abs().max() == 0
    before = trainer.reference is trainer.policy
    picked = rejection_sampling.picked_rows(trainer.score(rows, generated), 4, 1, None)
    trainer.learn(rows, generated, picked, 0)
    assert before and trainer.kl(rows, generated).abs().max() > 0
    rejection_sampling.run(config, run)
    assert (run.dir / "adapter").is_dir() and run.finish("done").summary["lora"]


def test_the_unfinished_lose_their_penalty(make: Make) -> None:
    """Scores of completions cut at the length limit are lower by exactly the penalty."""
    trainer = Trainer(dataclasses.replace(CONFIG, missing_eos_penalty=2.5), make("penalty"))
    rows, generated = trainer.sample(0)
    generated[0] = dataclasses.replace(generated[0], finish_reason="length")
    cut = trainer.score(rows, generated)[0]
    generated[0] = dataclasses.replace(generated[0], finish_reason="stop")
    assert float(trainer.score(rows, generated)[0] - cut) == pytest.approx(2.5, abs=1e-5)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_for_which_no_row_is_left_trains_on_nothing(make: Make, monkeypatch, rank: int) -> None:
    """Two picked rows for three ranks: two get one each, the third a row without targets, so that none waits."""
    trainer = Trainer(CONFIG, make(f"rank{rank}"))
    rows, generated = trainer.sample(0)
    batch = trainer.tokens(rows, generated, [0, 4])
    monkeypatch.setattr(distributed, "world", lambda: (rank, 3))
    mine = rejection_sampling.own_rows(batch, torch.tensor([1, 0]))
    assert len(mine.input_ids) == 1
    assert int(mine.num_items) == [len(generated[4].token_ids), len(generated[0].token_ids), 0][rank]


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ("num_picked", {"num_samples": 4, "num_picked": 4}),
        ("num_samples", {"num_samples": 1}),
        ("rounds", {"rounds": 0}),
        ("minibatches", {"prompts_per_round": 2, "minibatches": 3}),
        ("missing_eos_penalty", {"missing_eos_penalty": -1.0}),
    ],
)
def test_values_that_select_nothing_are_refused_by_name(named: str, settings) -> None:
    """All of a prompt's samples are no selection, unless a floor selects."""
    with pytest.raises(ConfigError, match=named):
        Config(**settings)
    assert Config(num_samples=4, num_picked=4, min_score=0.0)


def test_foreseeable_mistakes_are_one_sentence(make: Make, tmp_path, tiny_tokenizer) -> None:
    """No prompts; a reward model of another tokenizer."""
    (tmp_path / "prompts.jsonl").write_text("")
    with pytest.raises(UserError, match="no prompts"):
        Trainer(CONFIG, make("empty"))
