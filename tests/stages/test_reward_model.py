"""The reward model: it learns an obvious preference, and its score depends on nothing but prompt and completion."""

from __future__ import annotations

import dataclasses
import itertools
import random
import shutil
import types
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import pytest
import torch

from trivium.config import ConfigError, UserError
from trivium.data.chat import render_prompt
from trivium.data.collate import PreferenceGroup, collate_preferences
from trivium.data.tokenizer import Tokenizer
from trivium.evals.calibration import calibration_error, fit_temperature
from trivium.evals.ranked_pairs import scored_pairs
from trivium.models.heads import ScalarModel
from trivium.models.hf import load_model, load_scalar_model, read_extra
from trivium.preferences.comparisons import split_by_prompt
from trivium.preferences.reliability import reliability
from trivium.preferences.store import Store
from trivium.records import Completion, Ranking
from trivium.rewards.learned import LearnedReward
from trivium.runs.events import read_metrics
from trivium.runs.manifest import Run
from trivium.stages import reward_model
from trivium.training.judgements import cut_prompt, load_judgements, part_of, resampled
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


def groups_of(ranks: list[list[int]]) -> list[PreferenceGroup]:
    """Return groups of random rows whose prompts and completions differ in length."""
    rng = random.Random(3)

    def row(low: int, high: int) -> list[int]:
        return [rng.randrange(8, 390) for _ in range(rng.randint(low, high))]

    return [
        PreferenceGroup(prompt_ids=[1, *row(2, 9)], completion_ids=[[*row(1, 12), 7] for _ in order], ranks=order)
        for order in ranks
    ]


@pytest.mark.parametrize(("margin", "center"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.01), (0.7, 0.01)])
def test_same_loss_and_gradient_as_trls_reward_trainer(
    folders: Folders, tiny_tokenizer: Tokenizer, margin: float, center: float
) -> None:
    """TRL's own compute_loss on transformers' model of the same weights, in fp32: to 1e-6, and 1e-5 of a gradient."""
    reward_trainer = pytest.importorskip("trl.trainer.reward_trainer")
    from transformers import AutoModelForSequenceClassification

    groups = groups_of([[0, 1]] * 4 + [[1, 0]] * 2)
    ours = load_scalar_model(folders.reward)
    batch = collate_preferences(groups, tiny_tokenizer.pad_id)
    output = reward_model.objective(ours, "bradley_terry", batch, margin=margin, center=center)
    loss = output.total / batch.num_items
    loss.backward()
    theirs = AutoModelForSequenceClassification.from_pretrained(folders.reward, attn_implementation="eager")
    rows = [[[*g.prompt_ids, *g.completion_ids[g.ranks.index(rank)]] for rank in (0, 1)] for g in groups]
    collator = reward_trainer.DataCollatorForPreference(pad_token_id=tiny_tokenizer.pad_id)
    examples = [{"chosen_ids": chosen, "rejected_ids": rejected, "margin": margin} for chosen, rejected in rows]
    inputs = collator(examples)

    def same(value: torch.Tensor) -> torch.Tensor:
        return value

    holder = types.SimpleNamespace(
        model=theirs.train(),
        args=types.SimpleNamespace(center_rewards_coefficient=center or None),
        accelerator=types.SimpleNamespace(gather=same, gather_for_metrics=same),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    if not margin:
        del inputs["margin"]
    reference = reward_trainer.RewardTrainer.compute_loss(holder, theirs, inputs)
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), abs=1e-6)
    assert (output.metrics["accuracy"] / batch.num_items).item() == holder._metrics["train"]["accuracy"][0]
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        gap = (parameter.grad - expected[name]).abs().max()
        assert gap <= 1e-5 * expected[name].abs().max(), (name, gap)


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_a_ranking_of_weight_three_is_three_of_it_and_twice_all_weights_is_the_same(
    folders: Folders, tiny_tokenizer: Tokenizer, loss: str
) -> None:
    """Weighing is repeating: the mean loss and its gradient are those of the ranking written down three times."""
    first, second = groups_of([[0, 1, 2], [1, 0, 1]])
    found = []
    for groups in (
        [dataclasses.replace(first, weight=3.0), second],
        [first, second, first, first],
        [dataclasses.replace(g, weight=w * 2.0) for g, w in ((first, 3), (second, 1))],
    ):
        model = load_scalar_model(folders.reward)
        batch = collate_preferences(groups, tiny_tokenizer.pad_id)
        mean = reward_model.objective(model, loss, batch).total / batch.num_items
        mean.backward()
        found.append((mean.item(), model.score.weight.grad))
    for mean, gradient in found[1:]:
        assert mean == pytest.approx(found[0][0], abs=1e-6)
        assert torch.allclose(gradient, found[0][1], atol=1e-6)


def test_a_margin_grows_with_the_places_between_and_a_tie_asks_for_none(
    folders: Folders, tiny_tokenizer: Tokenizer
) -> None:
    """Ranks 0, 1, 1, 3 are places 0, 1, 1, 2: leads of 1, 1, 2, 1, 1 margins, by hand from the scores."""
    model = load_scalar_model(folders.reward)
    (group,) = groups_of([[0, 1, 1, 3]])
    a, b, c, d = LearnedReward(load_scalar_model(folders.reward)).score_ids(
        [[*group.prompt_ids, *ids] for ids in group.completion_ids]
    )
    asked = [a - b - 0.5, a - c - 0.5, a - d - 1.0, b - d - 0.5, c - d - 0.5]
    soft = [torch.nn.functional.softplus(-torch.tensor(lead)).item() for lead in asked]
    batch = collate_preferences([group], tiny_tokenizer.pad_id)
    total = reward_model.objective(model, "bradley_terry", batch, margin=0.5).total.item()
    assert total == pytest.approx(sum(soft) / 5, abs=1e-5)
    even = [torch.nn.functional.softplus(torch.tensor(sign * (b - c))).item() / 2 for sign in (1, -1)]
    batch = collate_preferences([group], tiny_tokenizer.pad_id, ties=True)
    total = reward_model.objective(model, "bradley_terry", batch, margin=0.5).total.item()
    assert total == pytest.approx((sum(soft) + sum(even)) / 6, abs=1e-5)


def test_ties_pull_scores_together_and_are_trained_on_only_where_asked(
    make: Make, tmp_path, tiny_tokenizer: Tokenizer
) -> None:
    """A second collection of single ties: left out and counted by default, half a win each way with `equal`."""
    with Store(tmp_path / "preferences.db") as store:
        tied = [(prompt, completions, [0, 0, 1, 1]) for prompt, completions, _ in judged(tiny_tokenizer, prompts=8)]
        one = [(prompt, completions, [0] * 4) for prompt, completions, _ in judged(tiny_tokenizer, prompts=16)[8:]]
        rank_into(store, "ties", tied + one)
        load = partial(load_judgements, store, "ties", tiny_tokenizer, kinds=(), heldout_frac=0.25, context=512, seed=0)
        plain, equal = load(), load(ties=True)
    assert plain.heldout == equal.heldout
    assert len(plain.train) < len(equal.train)
    assert plain.dropped - equal.dropped == len(equal.train) - len(plain.train)
    assert {tuple(g.ranks) for g in equal.train} == {(0, 0, 1, 1), (0, 0, 0, 0)}


def test_weights_go_by_annotator_to_the_training_side_alone(make: Make, tmp_path, tiny_tokenizer: Tokenizer) -> None:
    """Zero leaves rankings out of training; a name nobody has is refused with those there are."""
    with Store(tmp_path / "preferences.db") as store:
        annotator = store.rankings(COLLECTION)[0].annotator
        load = partial(
            load_judgements, store, COLLECTION, tiny_tokenizer, kinds=(), heldout_frac=0.25, context=512, seed=0
        )
        plain, double = load(), load(weights={annotator: 2.0})
        assert {g.weight for g in plain.train} == {g.weight for g in double.heldout} == {1.0}
        assert {g.weight for g in double.train} == {2.0}
        with pytest.raises(UserError, match=f"'nobody', who ranked nothing in .*{annotator}"):
            load(weights={"nobody": 1.0})
        with pytest.raises(UserError, match="none for the training side"):
            load(weights={annotator: 0.0})


def test_weights_by_reliability_are_measured_on_the_training_side(make: Make, tmp_path, tiny_tokenizer: Tokenizer):
    """Three annotators judge every prompt, one of them by chance: the weights are those of the training rankings."""
    rng = random.Random(0)
    items = judged(tiny_tokenizer, prompts=30)
    with Store(tmp_path / "preferences.db") as store:
        store.add_tasks("crowd", [(prompt, completions) for prompt, completions, _ in items], overlap=3)
        for who in ("anna", "ben", "spam"):
            for prompt, completions, ranks in items:
                order = sorted(completions, key=lambda c: ranks[completions.index(c)])
                if who == "spam":
                    rng.shuffle(order)
                groups = tuple((c.id,) for c in order)
                store.submit(Ranking(prompt_id=prompt.id, groups=groups, annotator=who, kind="simulated"), "crowd")
        load = partial(
            load_judgements, store, "crowd", tiny_tokenizer, kinds=(), heldout_frac=0.25, context=512, seed=0
        )
        plain, found, twice = load(), load(by_reliability=True), load(by_reliability=True, weights={"anna": 0.5})
        train, _ = split_by_prompt(store.rankings("crowd"), fraction=0.25, seed=0)
        with pytest.raises(UserError, match="no two annotators judged the same"):
            load_judgements(
                store, COLLECTION, tiny_tokenizer, kinds=(), heldout_frac=0.25, context=512, seed=0, by_reliability=True
            )
    expected = reliability(train)
    assert found.reliability == expected and not plain.reliability
    assert expected["spam"].weight < 0.4 < 1 < expected["anna"].weight
    weights = sorted(g.weight for g in found.train)
    assert weights == sorted(expected[r.annotator].weight for r in train if expected[r.annotator].weight > 0)
    assert sum(weights) / len(train) == pytest.approx(1)
    assert {g.weight for g in found.heldout} == {g.weight for g in plain.train} == {1.0}
    assert sum(g.weight for g in found.train) - sum(g.weight for g in twice.train) == pytest.approx(
        sum(r.annotator == "anna" for r in train) * expected["anna"].weight / 2
    )


def test_weights_by_reliability_reach_the_loss_and_the_manifest(make: Make, tmp_path, tiny_tokenizer: Tokenizer):
    """Another model than with equal weights, and what was measured of each stands in the summary."""
    with Store(tmp_path / "preferences.db") as store:
        for prompt, completions, ranks in judged(tiny_tokenizer):
            for who, turned in (("anna", False), ("ben", False), ("contrary", True)):
                order = sorted(completions, key=lambda c: ranks[completions.index(c)], reverse=turned)
                groups = tuple((c.id,) for c in order)
                store.submit(Ranking(prompt_id=prompt.id, groups=groups, annotator=who, kind="simulated"), COLLECTION)
    short = dataclasses.replace(CONFIG, fit=dataclasses.replace(CONFIG.fit, steps=10))
    plain, weighted = make("plain"), make("weighted")
    reward_model.run(short, plain)
    reward_model.run(dataclasses.replace(short, annotator_weights="reliability"), weighted)
    states = [dict(load_scalar_model(run.dir / "model").state_dict()) for run in (plain, weighted)]
    assert not equal(*states)
    found = weighted.finish("done").summary["reliability"]
    assert found["contrary"]["weight"] == 0 and found["anna"]["accuracy"] > 0.9
    assert plain.finish("done").summary["reliability"] == {}


def test_a_prompt_that_is_too_long_is_cut_at_its_beginning(make: Make, tmp_path, tiny_tokenizer: Tokenizer) -> None:
    """Every group fits, the first token and the prompt's end stay, the completions are whole, and it is counted."""
    worked = PreferenceGroup(prompt_ids=[1, 2, 3, 4, 5], completion_ids=[[6, 7], [8, 9, 10]], ranks=[0, 1])
    assert cut_prompt(worked, 6).prompt_ids == [1, 4, 5]
    assert cut_prompt(worked, 8) == worked
    assert cut_prompt(worked, 4) == worked  # one token of prompt would be no prompt: the caller drops the group
    run = make("cut")
    whole = sides(run, tiny_tokenizer)
    limit = max(len(g.prompt_ids) + max(map(len, g.completion_ids)) for g in whole.train) - 6
    with Store(run.workspace / "preferences.db") as store:
        load = partial(load_judgements, store, COLLECTION, tiny_tokenizer, kinds=(), heldout_frac=0.25, seed=run.seed)
        found = load(context=limit, cut=True)
    assert (len(found.train), len(found.heldout), found.dropped) == (30, 10, 0)
    pairs = list(zip([*whole.train, *whole.heldout], [*found.train, *found.heldout], strict=True))
    assert found.cut == sum(before != after for before, after in pairs) > 0
    for before, after in pairs:
        assert before.completion_ids == after.completion_ids and before.prompt_id == after.prompt_id
        assert after.prompt_ids[0] == before.prompt_ids[0]
        tail = len(after.prompt_ids) - 1
        assert list(after.prompt_ids[1:]) == list(before.prompt_ids[-tail:])


def test_a_part_of_the_rankings_lies_within_every_larger_part(make: Make, tiny_tokenizer: Tokenizer) -> None:
    """Curves over the number of rankings then differ by what was added; 0 or more than there are is all of them."""
    run = make("parts")
    train = sides(run, tiny_tokenizer).train
    parts = [part_of(train, num, 4) for num in (5, 12, 29)]
    assert [len(part) for part in parts] == [5, 12, 29]
    names = [[g.prompt_id for g in part] for part in (*parts, train)]
    for smaller, larger in itertools.pairwise(names):
        assert [name for name in larger if name in smaller] == smaller
    assert part_of(train, 0, 4) == part_of(train, 99, 4) == train
    assert part_of(train, 5, 5) != parts[0]
    reward_model.run(dataclasses.replace(CONFIG, max_rankings=5, fit=dataclasses.replace(CONFIG.fit, steps=2)), run)
    assert run.finish("done").summary["data"]["num_rankings"] == 5


def test_members_differ_by_the_weights_and_order_drawn_for_them(make: Make, tiny_tokenizer: Tokenizer) -> None:
    """Member 0 is the data itself; others weigh prompts by draws of mean 1, one a prompt, the same each time."""
    train = sides(make("draws"), tiny_tokenizer).train
    train = (*train, dataclasses.replace(train[0], ranks=[3, 2, 1, 0], weight=2.0))
    assert resampled(train, 0, 0) == train
    first, again, second = resampled(train, 0, 1), resampled(train, 0, 1), resampled(train, 0, 2)
    assert first == again != second
    assert first[-1].weight == 2 * first[0].weight
    assert len({g.weight for g in first}) == len(train)
    many = [dataclasses.replace(train[0], prompt_id=str(n)) for n in range(4000)]
    # Exponential draws of mean 1 have deviation 1: a standard error of 0.016.
    assert sum(g.weight for g in resampled(many, 3, 1)) / 4000 == pytest.approx(1, abs=0.06)


def test_an_ensemble_is_measured_saved_whole_and_scored_as_one(
    make: Make, stage_run: Make, folders: Folders, tiny_tokenizer: Tokenizer
) -> None:
    """The last table joins finished members; what is saved scores their mean, and its folder may move."""
    fit = dataclasses.replace(CONFIG.fit, steps=6)
    member = make("one")
    reward_model.run(dataclasses.replace(CONFIG, fit=fit, member=1), member)
    parents = {"init": folders.policy, "comparisons": COLLECTION, "ensemble.0": member.manifest.run_id}
    run = stage_run("all", parents, table="reward_model")
    reward_model.run(dataclasses.replace(CONFIG, fit=fit, ensemble=("one@latest",), pessimism=0.5), run)
    summary = run.finish("done").summary
    moved = run.workspace / "elsewhere"
    shutil.copytree(run.dir / "model", moved)
    shutil.rmtree(member.dir)
    joint = LearnedReward.from_folder(moved)
    assert (len(joint.members), joint.pessimism) == (1, 0.5)
    heldout = sides(run, tiny_tokenizer).heldout
    rows = [[*g.prompt_ids, *c] for g in heldout for c in g.completion_ids]
    mean, spread = (torch.tensor(x) for x in joint.mean_and_spread(rows))
    assert torch.allclose(torch.tensor(joint.score_ids(rows)), mean - 0.5 * spread, atol=1e-6)
    pairs = scored_pairs(heldout, joint.score_ids(rows))
    accuracy = next(r.value for r in run.finish("done").results if r.task == "pairwise_accuracy@1")
    assert accuracy == (pairs.leads > 0).mean()
    assert summary["disagreement"]["members"] == 2 and summary["disagreement"]["mean_spread"] > 0
    assert joint.temperature == pytest.approx(fit_temperature(pairs.leads * joint.std), rel=1e-3)


def test_the_manifest_says_how_sure_how_long_and_what_length_alone_gives(make: Make, tiny_tokenizer: Tokenizer) -> None:
    """Every figure is that of the saved model on the held-out side, and the temperature is in its config (row 33)."""
    run = make("measured")
    reward_model.run(CONFIG, run)
    manifest = run.finish("done")
    figures = {(r.task, r.metric): r for r in manifest.results}
    assert {task for task, _ in figures} == {
        "pairwise_accuracy@1", "length_matched_accuracy@1", "length_only_accuracy@1", "gain_over_length_only@1",
        "reward_length_correlation@1", "calibration@1",
    }  # fmt: skip
    assert [r for r in manifest.results if not r.low <= r.value <= r.high + 1e-9] == []
    reward = LearnedReward.from_folder(run.dir / "model")
    found = sides(run, tiny_tokenizer)
    raw = [
        reward.std * x for x in reward.score_ids([[*g.prompt_ids, *c] for g in found.heldout for c in g.completion_ids])
    ]
    pairs = scored_pairs(found.heldout, raw)
    assert figures["pairwise_accuracy@1", "accuracy"].value == (pairs.leads > 0).mean()
    assert figures["calibration@1", "ece_before"].value == pytest.approx(
        calibration_error(pairs.leads, pairs.prompts.tolist()).value, abs=1e-3
    )
    assert (
        reward.temperature == manifest.summary["temperature"] == pytest.approx(fit_temperature(pairs.leads), rel=1e-3)
    )
    assert manifest.summary["length_rule"] in ("longer", "shorter")
    assert sum(figure["n"] for figure in manifest.summary["by_length"].values()) == len(pairs) == 60


def test_foreseeable_mistakes_are_one_sentence(make: Make) -> None:
    """No rankings of the wanted kind, nothing within the context, an unknown loss, a weight or margin of no meaning."""
    with pytest.raises(UserError, match=r"no rankings \(human\)"):
        reward_model.run(dataclasses.replace(CONFIG, kinds=("human",)), make("human"))
    with pytest.raises(UserError, match="context = 9"):
        reward_model.run(dataclasses.replace(CONFIG, context=9), make("short"))
    with pytest.raises(ConfigError, match="bradley_terry"):
        reward_model.Config(loss="bradley")
    with pytest.raises(ConfigError, match="drop"):
        reward_model.Config(ties="half")
    with pytest.raises(ConfigError, match="annotator_weights"):
        reward_model.Config(annotator_weights="measured")
    with pytest.raises(ConfigError, match=r"weights.ann = -1"):
        reward_model.Config(weights={"ann": -1.0})
    with pytest.raises(ConfigError, match="margin"):
        reward_model.Config(loss="plackett_luce", margin=0.5)
    with pytest.raises(ConfigError, match="ensemble"):
        reward_model.Config(pessimism=1.0)


def soften(run: Run, tokenizer: Tokenizer, chance: float, collection: str) -> None:
    """Store, beside the rankings of 40 prompts, how sure their judge was of every better one: `chance`."""
    with Store(run.workspace / "preferences.db") as store:
        for prompt, completions, ranks in judged(tokenizer):
            ids = [c.id for c in completions]
            pairs = itertools.combinations(range(len(ids)), 2)
            soft = tuple((ids[i], ids[j], chance if ranks[i] < ranks[j] else 1 - chance) for i, j in pairs)
            groups = tuple((ids[ranks.index(place)],) for place in sorted(ranks))
            store.add_tasks(collection, [(prompt, completions)])
            said = Ranking(prompt_id=prompt.id, groups=groups, annotator="model", kind="ai", soft=soft)
            store.submit(said, collection)


def test_soft_labels_are_trained_on_and_the_held_out_side_stays_an_order(
    make: Make, folders: Folders, tiny_tokenizer: Tokenizer
) -> None:
    """The objective is the cross-entropy with the probabilities, each ranking counting once."""
    run = make("soft")
    soften(run, tiny_tokenizer, 0.7, "soft-0")
    with Store(run.workspace / "preferences.db") as store:
        options = {"kinds": (), "heldout_frac": 0.25, "context": 512, "seed": 0}
        found = load_judgements(store, "soft-0", tiny_tokenizer, soft=True, **options)
        hard = load_judgements(store, "soft-0", tiny_tokenizer, **options)
    assert all(len(group.soft) == 6 for group in found.train) and not any(group.soft for group in found.heldout)
    assert [dataclasses.replace(group, soft=()) for group in found.train] == list(hard.train)
    batch = collate_preferences(found.train[:3], tiny_tokenizer.pad_id)
    model = ScalarModel.from_transformer(load_model(folders.policy), seed=1)
    with torch.no_grad():
        scores = reward_model.scores_of(model, batch)
        lead = scores[batch.pairs[:, 0]] - scores[batch.pairs[:, 1]]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(lead, torch.full_like(lead, 0.7), reduction="none")
        total = reward_model.objective(model, "bradley_terry", batch).total
    assert float(total) == pytest.approx(float(loss.sum() / 6), rel=1e-5)
    assert float(batch.num_items) == pytest.approx(3)


def test_a_judge_who_is_less_sure_teaches_smaller_leads(
    make: Make, folders: Folders, tiny_tokenizer: Tokenizer
) -> None:
    """The same orders at 95% and at 60%: both are learned, and the leads follow the log-odds 2.94 and 0.41."""
    leads = {}
    for chance in (0.95, 0.6):
        run = make(f"sure{chance}")
        run.manifest = dataclasses.replace(
            run.manifest, parents=run.manifest.parents | {"comparisons": f"soft-{chance}"}
        )
        soften(run, tiny_tokenizer, chance, f"soft-{chance}")
        reward_model.run(CONFIG, run)
        facts = run.finish("done")
        assert facts.summary["data"]["num_soft"] == 6 * 30
        (accuracy,) = (r.value for r in facts.results if r.task == "pairwise_accuracy@1")
        assert accuracy > 0.8
        with Store(run.workspace / "preferences.db") as store:
            heldout = load_judgements(
                store, f"soft-{chance}", tiny_tokenizer, kinds=(), heldout_frac=0.25, context=512, seed=0
            ).heldout
        model = load_scalar_model(run.dir / "model")
        scores = reward_model.flat_scores(model, heldout, tiny_tokenizer.pad_id)
        found = scored_pairs(heldout, scores.tolist()).leads
        leads[chance] = sum(found) / len(found)
    assert 0.2 < leads[0.6] < 0.9 < leads[0.95]
