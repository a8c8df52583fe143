"""The reward model: it learns an obvious preference, and its score depends on nothing but prompt and completion."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch

from trivium.config import ConfigError, UserError
from trivium.data.chat import render_prompt
from trivium.data.collate import PreferenceGroup, collate_preferences
from trivium.data.tokenizer import Tokenizer
from trivium.models.heads import ScalarModel
from trivium.models.hf import load_model, load_scalar_model, read_extra
from trivium.preferences.store import Store
from trivium.records import Completion
from trivium.rewards.learned import LearnedReward
from trivium.runs.events import read_metrics
from trivium.runs.manifest import Run
from trivium.stages import reward_model
from trivium.training.judgements import load_judgements
from trivium.training.loop import FitConfig
from trivium.training.optim import OptimConfig

from .conftest import Folders, ask, equal, rank_into, story

COLLECTION = "collect_comparisons-0"
CONFIG = reward_model.Config(
    heldout_frac=0.25,
    fit=FitConfig(
        steps=40,
        batch_size=8,
        log_every=5,
        eval_every=20,
        save_every=15,
        optim=OptimConfig(kind="adamw", lr=1e-2, weight_decay=0.0),
    ),
)
Make = Callable[..., Run]


def judged(tokenizer: Tokenizer, *, prompts: int = 40, responses: int = 4, seed: int = 0):
    """Return prompts whose responses are ranked by how many of their words are `river`, of 0, 1, 2, ..."""
    rng = random.Random(seed)
    words = "mill lamp dog king tree hat boat".split()
    items = []
    for number in range(prompts):
        prompt = ask(f"Tell me about {rng.choice(words)} number {number}.")
        completions = []
        for count in range(responses):
            said = ["river"] * count + rng.choices(words, k=6 - count)
            rng.shuffle(said)
            text = " ".join(said)
            ids = (*tokenizer.encode(text), tokenizer.end_id)
            completions.append(Completion(prompt_id=prompt.id, text=text, token_ids=ids, policy="sft@final"))
        items.append((prompt, completions, list(reversed(range(responses)))))
    return items


@pytest.fixture
def make(stage_run: Make, folders: Folders, tmp_path, tiny_tokenizer: Tokenizer) -> Make:
    """Return a maker of reward model runs over a collection of 40 ranked prompts."""
    with Store(tmp_path / "preferences.db") as store:
        rank_into(store, COLLECTION, judged(tiny_tokenizer))
    return partial(stage_run, parents={"init": folders.policy, "comparisons": COLLECTION}, table="reward_model")


def sides(run: Run, tokenizer: Tokenizer, context: int = 512):
    """Return the judgements as the stage loads them."""
    with Store(run.workspace / "preferences.db") as store:
        return load_judgements(
            store, COLLECTION, tokenizer, kinds=(), heldout_frac=CONFIG.heldout_frac, context=context, seed=run.seed
        )


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_an_obvious_preference_is_learned_and_calibrated(make: Make, tiny_tokenizer: Tokenizer, loss: str) -> None:
    """Held-out accuracy above 0.9; on training completions the saved scale gives mean 0 and deviation 1 (row 31)."""
    run = make("learns")
    reward_model.run(dataclasses.replace(CONFIG, loss=loss), run)
    manifest = run.finish("done")
    accuracy = next(r for r in manifest.results if r.metric == "accuracy")
    assert accuracy.value > 0.9
    assert accuracy.low < accuracy.value <= accuracy.high + 1e-9
    assert accuracy.n == 10 * 6
    assert manifest.summary["kinds"] == ("simulated",)
    data = manifest.summary["data"]
    assert (data["num_rankings"], data["num_pairs"]) == (30, 30 * 6)
    reward = LearnedReward.from_folder(run.dir / "model")
    extra = read_extra(run.dir / "model")
    assert (reward.mean, reward.std) == (extra["reward_mean"], extra["reward_std"])
    train = sides(run, tiny_tokenizer).train
    scores = torch.tensor(reward.score_ids([[*g.prompt_ids, *c] for g in train for c in g.completion_ids]))
    assert abs(scores.mean()) < 1e-3
    assert scores.std(correction=0) == pytest.approx(1, abs=1e-3)


def test_what_ppo_scores_is_what_was_trained_and_neither_padding_nor_company_matters(
    make: Make, folders: Folders, tiny_tokenizer: Tokenizer
) -> None:
    """Trainer's path, LearnedReward's path and a row alone give one number (rows 29 and 32)."""
    model = ScalarModel.from_transformer(load_model(folders.policy), seed=5)
    groups = list(sides(make("paths"), tiny_tokenizer).heldout)
    rows = [[*g.prompt_ids, *c] for g in groups for c in g.completion_ids]
    rows[0] = [*rows[0], tiny_tokenizer.end_id, tiny_tokenizer.user_id]  # an end of turn inside is no end
    reward = LearnedReward(model, 0.0, 1.0, tiny_tokenizer.pad_id)
    together = torch.tensor(reward.score_ids(rows))
    alone = torch.tensor([reward.score_ids([row])[0] for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)
    other = torch.tensor(LearnedReward(model, 0.0, 1.0, pad_id=77).score_ids(rows))
    assert torch.equal(together, other)
    batch = collate_preferences(groups, tiny_tokenizer.pad_id)
    trained = reward_model.scores_of(model, batch).detach()
    assert torch.allclose(trained[1:], together[1:], atol=1e-5)
    prompt = ask("Tell me about king number 3.")
    completion = Completion(prompt_id=prompt.id, text="the river")
    whole = LearnedReward(model, 0.0, 1.0, tiny_tokenizer.pad_id, tiny_tokenizer)([prompt], [completion])[0]
    ids = [*render_prompt(tiny_tokenizer, prompt), *tiny_tokenizer.encode("the river"), tiny_tokenizer.end_id]
    assert whole == pytest.approx(reward.score_ids([ids])[0], abs=1e-6)


def test_every_prompt_weighs_one_however_many_were_ranked(folders: Folders, tiny_tokenizer: Tokenizer) -> None:
    """Two responses or five: the batch's loss is the sum of each prompt's mean over its pairs (row 30)."""
    model = ScalarModel.from_transformer(load_model(folders.policy), seed=5)
    groups = [
        PreferenceGroup(
            prompt_ids=[1, 3, 40 + k, 7, 4],
            completion_ids=[[60 + k + j, 90 + 3 * j, 7] for j in range(k)],
            ranks=list(range(k)) if k < 4 else [0, 1, 1, 2, 2],
            ref_logprobs=None,
        )
        for k in (2, 3, 5)
    ]
    batch = collate_preferences(groups, tiny_tokenizer.pad_id)
    assert float(batch.num_items) == pytest.approx(3)
    total = reward_model.objective(model, "bradley_terry", batch).total.item()
    by_hand = 0.0
    for group in groups:
        scores = LearnedReward(model).score_ids([[*group.prompt_ids, *c] for c in group.completion_ids])
        pairs = [scores[i] - scores[j] for i, a in enumerate(group.ranks) for j, b in enumerate(group.ranks) if a < b]
        by_hand += sum(torch.nn.functional.softplus(-torch.tensor(lead)).item() for lead in pairs) / len(pairs)
    assert total == pytest.approx(by_hand, rel=1e-4)
    model.requires_grad_(True)
    turned = collate_preferences([groups[2], groups[0], groups[1]], tiny_tokenizer.pad_id)
    assert reward_model.objective(model, "bradley_terry", turned).total.item() == pytest.approx(total, rel=1e-5)


def test_no_prompt_stands_on_both_sides_and_long_groups_are_counted(make: Make, tiny_tokenizer: Tokenizer) -> None:
    """Several rankings of one prompt go together; what exceeds the context is dropped whole and counted."""
    run = make("sides")
    found = sides(run, tiny_tokenizer)
    texts = [{tuple(g.prompt_ids) for g in side} for side in (found.train, found.heldout)]
    assert not texts[0] & texts[1]
    assert (len(found.train), len(found.heldout), found.dropped) == (30, 10, 0)
    lengths = sorted(len(g.prompt_ids) + max(map(len, g.completion_ids)) for g in (*found.train, *found.heldout))
    limit = lengths[len(lengths) // 2]
    short = sides(run, tiny_tokenizer, context=limit)
    assert len(short.train) + len(short.heldout) == sum(n <= limit for n in lengths)
    assert short.dropped == sum(n > limit for n in lengths)


def test_before_training_every_score_is_zero_and_the_backbone_is_a_copy(make: Make, folders: Folders) -> None:
    """A head of zeros starts at ln 2 per prompt; the SFT model's folder is not touched."""
    run = make("start")
    fit = dataclasses.replace(CONFIG.fit, steps=1, log_every=1, optim=OptimConfig(lr=0.0, weight_decay=0.0))
    before = dict(load_model(folders.policy).state_dict())
    reward_model.run(dataclasses.replace(CONFIG, fit=fit), run)
    assert read_metrics(run.dir)["train/loss"][0][1] == pytest.approx(0.693147, abs=1e-5)
    assert load_scalar_model(run.dir / "model").score.weight.abs().max() == 0
    backbone = load_scalar_model(run.dir / "model").model.state_dict()
    assert all(torch.equal(value, before[f"model.{name}"]) for name, value in backbone.items())


def test_transformers_loads_it_as_a_sequence_classifier_with_equal_scores(
    make: Make, tiny_tokenizer: Tokenizer
) -> None:
    """Raw score of ours = their one logit, padded rows included."""
    from transformers import AutoModelForSequenceClassification

    run = make("hf")
    fit = dataclasses.replace(CONFIG.fit, steps=3)
    reward_model.run(dataclasses.replace(CONFIG, fit=fit), run)
    theirs = AutoModelForSequenceClassification.from_pretrained(run.dir / "model", attn_implementation="eager").eval()
    assert theirs.config.num_labels == 1
    ours = LearnedReward.from_folder(run.dir / "model")
    groups = sides(run, tiny_tokenizer).heldout[:2]
    batch = collate_preferences(list(groups), tiny_tokenizer.pad_id)
    assert len(set(batch.lengths.tolist())) > 1
    with torch.no_grad():
        mask = torch.arange(batch.tokens.input_ids.shape[1]) < batch.lengths[:, None]
        logits = theirs(input_ids=batch.tokens.input_ids, attention_mask=mask.long()).logits[:, 0]
    scores = torch.tensor(ours.score_ids([[*g.prompt_ids, *c] for g in groups for c in g.completion_ids]))
    assert torch.allclose((logits - ours.mean) / ours.std, scores, atol=1e-4)


def test_cut_off_and_resumed_is_uninterrupted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at step 20, after the checkpoint of step 15: weights, scale, log and result are the same."""
    whole = make("whole")
    reward_model.run(CONFIG, whole)
    count_right = reward_model.count_right

    def dying(*_: object) -> tuple[int, int]:
        raise KeyboardInterrupt

    monkeypatch.setattr(reward_model, "count_right", dying)
    with pytest.raises(KeyboardInterrupt):
        reward_model.run(CONFIG, make("cut"))
    monkeypatch.setattr(reward_model, "count_right", count_right)
    resumed = make("cut")
    reward_model.run(CONFIG, resumed)
    weights = [dict(load_scalar_model(run.dir / "model").state_dict()) for run in (whole, resumed)]
    assert equal(*weights)
    assert story(whole) == story(resumed)
    ends = [run.finish("done") for run in (whole, resumed)]
    assert (ends[0].summary, ends[0].results) == (ends[1].summary, ends[1].results)


def test_foreseeable_mistakes_are_one_sentence(make: Make) -> None:
    """No rankings of the wanted kind, nothing within the context, an unknown loss."""
    with pytest.raises(UserError, match=r"no rankings \(human\)"):
        reward_model.run(dataclasses.replace(CONFIG, kinds=("human",)), make("human"))
    with pytest.raises(UserError, match="context = 9"):
        reward_model.run(dataclasses.replace(CONFIG, context=9), make("short"))
    with pytest.raises(ConfigError, match="bradley_terry"):
        reward_model.Config(loss="bradley")
