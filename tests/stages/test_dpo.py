"""DPO on a random network: ln 2 at the start, one reference for good, and the margin goes where the rankings point."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch

from trivium.config import ConfigError
from trivium.data.collate import PreferenceGroup, collate_preferences
from trivium.data.tokenizer import Tokenizer
from trivium.losses.logprobs import token_logprobs
from trivium.models.hf import load_model, read_stop_ids
from trivium.preferences.store import Store
from trivium.records import Completion
from trivium.runs.events import read_metrics
from trivium.runs.manifest import Run
from trivium.stages import dpo
from trivium.training.loop import FitConfig
from trivium.training.optim import OptimConfig

from .conftest import Folders, ask, equal, rank_into, saved_weights, story

COLLECTION = "collect_comparisons-0"
CONFIG = dpo.Config(
    heldout_frac=0.25,
    fit=FitConfig(
        steps=24,
        batch_size=8,
        log_every=1,
        eval_every=12,
        save_every=9,
        optim=OptimConfig(kind="adamw", lr=5e-3, weight_decay=0.0),
    ),
)
Make = Callable[..., Run]


@pytest.fixture
def make(stage_run: Make, folders: Folders, tmp_path, tiny_tokenizer: Tokenizer) -> Make:
    """Return a maker of DPO runs over 32 prompts; of three responses the one with more `river` is better."""
    rng = random.Random(1)
    words = "mill lamp dog king tree hat boat".split()
    judged = []
    for number in range(32):
        prompt = ask(f"Tell me about {rng.choice(words)} number {number}.")
        texts = [" ".join(["river"] * k + rng.choices(words, k=4 - k)) for k in (2, 1, 0)]
        completions = [Completion(prompt_id=prompt.id, text=text, policy="x") for text in texts]
        judged.append((prompt, completions, [0, 1, 2]))
    with Store(tmp_path / "preferences.db") as store:
        rank_into(store, COLLECTION, judged)
    return partial(stage_run, parents={"policy": folders.policy, "comparisons": COLLECTION}, table="dpo")


def groups() -> list[PreferenceGroup]:
    """Return three prompts with two and three completions of different lengths."""
    return [
        PreferenceGroup(prompt_ids=[1, 3, 50, 7, 4], completion_ids=[[61, 62, 7], [63, 7]], ranks=[0, 1]),
        PreferenceGroup(
            prompt_ids=[1, 3, 51, 52, 7, 4], completion_ids=[[64, 7], [65, 66, 67, 7], [68, 7]], ranks=[1, 0, 2]
        ),
        PreferenceGroup(prompt_ids=[1, 3, 7, 4], completion_ids=[[70, 71, 7], [72, 73, 74, 75, 7]], ranks=[1, 0]),
    ]


@pytest.fixture
def filled(make: Make, folders: Folders):
    """Return the model, and the groups with their reference log-probabilities, for `dpo` and for `ipo`."""
    model = load_model(folders.policy)
    run = make("filled")
    return model, {
        loss: dpo.with_reference(run, model, groups(), dataclasses.replace(CONFIG, loss=loss), 0)
        for loss in ("dpo", "ipo")
    }


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model a little away from where it was."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    return model


def test_the_loss_starts_at_ln_2_and_ipos_at_its_target_squared(filled) -> None:
    """Policy = reference: every margin 0 to 1e-6 (row 49)."""
    model, by_loss = filled
    for loss, start in (("dpo", math.log(2)), ("ipo", (1 / (2 * 0.1)) ** 2)):
        batch = collate_preferences(by_loss[loss], 0)
        config = dataclasses.replace(CONFIG, loss=loss)
        output = dpo.objective(model, config, batch)
        assert output.total.item() / 3 == pytest.approx(start, rel=1e-5)
        assert output.metrics["margin"].item() == pytest.approx(0, abs=1e-6)


def test_the_reference_is_the_sum_over_the_completion_alone_and_ipos_its_mean(filled) -> None:
    """Row by row, without padding: the log-probabilities of the completion's tokens given what precedes (row 47)."""
    model, by_loss = filled
    for group, mean_group in zip(by_loss["dpo"], by_loss["ipo"], strict=True):
        for ids, total, mean in zip(group.completion_ids, group.ref_logprobs, mean_group.ref_logprobs, strict=True):
            row = torch.tensor([[*group.prompt_ids, *ids]])
            with torch.no_grad():
                each = token_logprobs(model.logits(model(row[:, :-1])), row[:, 1:])[0, -len(ids) :]
            assert total == pytest.approx(each.sum().item(), abs=1e-4)
            assert mean == pytest.approx(each.mean().item(), abs=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_swapping_chosen_and_rejected_negates_the_margin(filled, loss: str) -> None:
    """Every pair turned round: margin -> -margin, and dpo's loss becomes that of the negated margin."""
    model, by_loss = filled
    moved(model)
    config = dataclasses.replace(CONFIG, loss=loss, beta=0.5)
    batch = collate_preferences(by_loss[loss], 0)
    turned = dataclasses.replace(batch, pairs=batch.pairs.flip(1))
    one, other = (dpo.objective(model, config, b) for b in (batch, turned))
    margin = one.metrics["margin"].item()
    assert abs(margin) > 1e-3
    assert other.metrics["margin"].item() == pytest.approx(-margin, rel=1e-5)
    if loss == "dpo":
        # softplus(-m) - softplus(m) = -m, summed with the pairs' weights
        assert one.total.item() - other.total.item() == pytest.approx(-margin, rel=1e-4)


def test_the_objective_is_the_papers_formula_written_out(filled) -> None:
    """-log sigmoid(beta * ((pw - rw) - (pl - rl))), pairs of a prompt averaged, prompts summed."""
    model, by_loss = filled
    reference = [group.ref_logprobs for group in by_loss["dpo"]]
    moved(model)
    policy = [g.ref_logprobs for g in with_policy(model)]
    by_hand = 0.0
    for group, now, then in zip(groups(), policy, reference, strict=True):
        pairs = [(i, j) for i, a in enumerate(group.ranks) for j, b in enumerate(group.ranks) if a < b]
        leads = [(now[i] - then[i]) - (now[j] - then[j]) for i, j in pairs]
        by_hand += sum(math.log1p(math.exp(-0.3 * lead)) for lead in leads) / len(leads)
    config = dataclasses.replace(CONFIG, beta=0.3)
    total = dpo.objective(model, config, collate_preferences(by_loss["dpo"], 0)).total.item()
    assert total == pytest.approx(by_hand, rel=1e-4)


def with_policy(model) -> list[PreferenceGroup]:
    batch = collate_preferences(groups(), 0)
    with torch.no_grad():
        sums = iter(dpo.completion_sums(model, batch, mean=False).tolist())
    return [dataclasses.replace(g, ref_logprobs=[next(sums) for _ in g.ranks]) for g in groups()]


def test_a_run_learns_the_rankings_and_computes_the_reference_once(
    make: Make, folders: Folders, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Margins grow, held-out pairs are ordered; the reference is read before the first step and never again."""
    calls = []
    with_reference = dpo.with_reference
    original = dict(load_model(folders.policy).state_dict())

    def noting(run, model, part, config, pad_id):
        calls.append(len(part))
        assert equal(dict(model.state_dict()), original)
        return with_reference(run, model, part, config, pad_id)

    monkeypatch.setattr(dpo, "with_reference", noting)
    run = make("learns")
    dpo.run(CONFIG, run)
    assert calls == [24, 8]
    curves = read_metrics(run.dir)
    assert curves["train/loss"][0][1] == pytest.approx(math.log(2), abs=1e-5)
    assert curves["train/margin"][0][1] == pytest.approx(0, abs=1e-5)
    assert curves["train/margin"][-1][1] > 0.3
    assert curves["eval/accuracy"][-1][1] > 0.9
    assert read_stop_ids(run.dir / "model") == {tiny_tokenizer.end_id}
    manifest = run.finish("done")
    result = next(r for r in manifest.results if r.metric == "accuracy")
    assert (result.n, result.value) == (8, pytest.approx(curves["eval/accuracy"][-1][1]))
    assert manifest.summary["data"]["num_pairs"] == 24 * 3


def test_cut_off_and_resumed_is_uninterrupted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at step 12, after the checkpoint of step 9; the resumed run's reference is still the SFT model."""
    whole = make("whole")
    dpo.run(CONFIG, whole)
    measure = dpo.measure

    def dying(*_: object) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(dpo, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        dpo.run(CONFIG, make("cut"))
    monkeypatch.setattr(dpo, "measure", measure)
    resumed = make("cut")
    dpo.run(CONFIG, resumed)
    assert equal(saved_weights(whole), saved_weights(resumed))
    assert story(whole) == story(resumed)


VARIANTS = {
    "dpo": {},
    "cdpo": {"label_smoothing": 0.1},
    "robust": {"loss": "robust", "label_smoothing": 0.1},
    "hinge": {"loss": "hinge"},
    "ipo": {"loss": "ipo"},
    "simpo": {"loss": "simpo", "beta": 2.0, "gamma": 0.5},
    "orpo": {"loss": "orpo", "beta": 0.5},
    "kto": {"loss": "kto", "undesirable_weight": 1.2},
    "length_normalised": {"length_normalised": True, "beta": 2.0},
    "with_nll": {"nll_coef": 0.2},
}


@pytest.mark.parametrize(
    ("variant", "start"),
    [("dpo", math.log(2)), ("cdpo", math.log(2)), ("robust", math.log(2)), ("hinge", 1.0), ("ipo", 25.0),
     ("length_normalised", math.log(2)), ("kto", (0.5 + 0.6) / 2)],
)  # fmt: skip
def test_at_the_reference_each_loss_is_its_known_number(make: Make, folders: Folders, variant, start) -> None:
    """Margins are 0 there, whatever the lengths; kto's desirable costs 1/2, its undesirable 1.2 / 2."""
    model = load_model(folders.policy)
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    batch = collate_preferences(dpo.with_reference(make("start"), model, groups(), config, 0), 0)
    output = dpo.objective(model, config, dataclasses.replace(batch, baseline=torch.zeros(())))
    assert output.total.item() / batch.num_items.item() == pytest.approx(start, rel=1e-5)
    assert output.metrics["margin"].item() == pytest.approx(0, abs=1e-6)


def completion_means(model) -> list[list[float]]:
    """Each group's mean log-probabilities per token, row by row and without padding."""
    found = []
    for group in groups():
        means = []
        for ids in group.completion_ids:
            row = torch.tensor([[*group.prompt_ids, *ids]])
            with torch.no_grad():
                means.append(token_logprobs(model.logits(model(row[:, :-1])), row[:, 1:])[0, -len(ids) :].mean().item())
        found.append(means)
    return found


@pytest.mark.parametrize("variant", ["simpo", "orpo", "with_nll"])
def test_what_needs_means_takes_them_over_the_completion_alone(folders: Folders, filled, variant) -> None:
    """The formulas written out on unpadded rows, pairs of a prompt averaged; no reference where there is none."""
    model, by_loss = filled
    moved(model)
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    by_hand = 0.0
    for group, means in zip(groups(), completion_means(model), strict=True):
        pairs = [(i, j) for i, a in enumerate(group.ranks) for j, b in enumerate(group.ranks) if a < b]
        for i, j in pairs:
            win, lose = means[i], means[j]
            if variant == "simpo":
                loss = math.log1p(math.exp(-(2.0 * (win - lose) - 0.5)))
            elif variant == "orpo":
                odds = [m - math.log1p(-math.exp(m)) for m in (win, lose)]
                loss = -win + 0.5 * math.log1p(math.exp(odds[1] - odds[0]))
            else:
                loss = -0.2 * win
            by_hand += loss / len(pairs)
    if variant == "with_nll":
        batch = collate_preferences(by_loss["dpo"], 0)
        by_hand += dpo.objective(model, CONFIG, batch).total.item()
    else:
        batch = collate_preferences(groups(), 0)
        assert batch.ref_logprobs is None
    assert dpo.objective(model, config, batch).total.item() == pytest.approx(by_hand, rel=1e-4)


def test_kto_judges_the_best_and_the_worst_each_by_itself(filled) -> None:
    """The formula on the rows' own sums; of three, the one in between costs nothing and gets no gradient."""
    model, by_loss = filled
    reference = [value for group in by_loss["dpo"] for value in group.ref_logprobs]
    moved(model)
    policy = [value for group in with_policy(model) for value in group.ref_logprobs]
    config = dataclasses.replace(CONFIG, loss="kto", beta=0.3, desirable_weight=0.9, undesirable_weight=1.2)
    baseline, by_hand, row = 0.4, 0.0, 0
    for group in groups():
        ends = [rank for rank in group.ranks if rank in (0, max(group.ranks))]
        for rank in group.ranks:
            gain = 0.3 * (policy[row] - reference[row] - baseline)
            if rank == 0:
                by_hand += 0.9 / (1 + math.exp(gain)) / len(ends)
            elif rank == max(group.ranks):
                by_hand += 1.2 / (1 + math.exp(-gain)) / len(ends)
            row += 1
    batch = dataclasses.replace(collate_preferences(by_loss["dpo"], 0), baseline=torch.tensor(baseline))
    output = dpo.objective(model, config, batch)
    assert output.total.item() == pytest.approx(by_hand, rel=1e-4)
    between = batch.tokens.targets[2]  # of the second group's ranks 1, 0, 2 the first row
    assert batch.ranks.tolist()[2] == 1 and (between >= 0).any()
    dirty = dataclasses.replace(batch, ref_logprobs=batch.ref_logprobs + 100 * (torch.arange(7) == 2))
    assert dpo.objective(model, config, dirty).total.item() == output.total.item()


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_loss_learns_the_rankings_as_a_stage(
    make: Make, monkeypatch: pytest.MonkeyPatch, variant: str, folders: Folders
) -> None:
    """Held-out pairs come out in order; what needs no reference never computes one, the others do before step 1."""
    asked = []
    with_reference = dpo.with_reference
    monkeypatch.setattr(dpo, "with_reference", lambda *args: asked.append(1) or with_reference(*args))
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    run = make(variant)
    dpo.run(config, run)
    assert len(asked) == {"simpo": 0, "orpo": 0, "kto": 4}.get(variant, 2)  # kto: strangers on both sides, too
    curves = read_metrics(run.dir)
    assert curves["eval/accuracy"][-1][1] > 0.85
    assert curves["train/margin"][-1][1] > curves["train/margin"][0][1]
    assert curves["train/loss"][-1][1] < curves["train/loss"][0][1]
    assert not equal(saved_weights(run), dict(load_model(folders.policy).state_dict()))
    assert {r.metric for r in run.finish("done").results} == {"accuracy"}


def test_kto_does_not_depend_on_how_a_step_is_split(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reference point for all micro-batches, of mismatched rows alone: 0 at first, then what the policy drifted."""
    seen = []
    objective = dpo.objective

    def noting(model, config, batch):
        seen.append(float(batch.baseline))
        return objective(model, config, batch)

    monkeypatch.setattr(dpo, "objective", noting)
    losses = []
    for width in (0, 3):
        fit = dataclasses.replace(CONFIG.fit, steps=6, micro_batch_size=width)
        run = make(f"width{width}")
        dpo.run(dataclasses.replace(CONFIG, loss="kto", fit=fit), run)
        losses.append([value for _, value in read_metrics(run.dir)["train/loss"]])
        parts = [seen[i : i + 3] for i in range(0, 18, 3)] if width else [[value] for value in seen[:6]]
        assert parts[0][0] == pytest.approx(0, abs=1e-4) and abs(parts[-1][0]) > 1e-3
        assert all(len(set(part)) == 1 for part in parts)
        seen.clear()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_kto_cut_off_and_resumed_is_uninterrupted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference point of a step is measured with the weights of that step, so nothing more has to be saved."""
    config = dataclasses.replace(CONFIG, loss="kto")
    whole = make("whole")
    dpo.run(config, whole)
    measure = dpo.measure

    def dying(*_: object) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(dpo, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        dpo.run(config, make("cut"))
    monkeypatch.setattr(dpo, "measure", measure)
    resumed = make("cut")
    dpo.run(config, resumed)
    assert equal(saved_weights(whole), saved_weights(resumed))
    assert story(whole) == story(resumed)


def test_options_that_would_be_ignored_are_refused() -> None:
    """Label smoothing has no meaning for IPO; half the labels flipped says nothing; beta must pull."""
    with pytest.raises(ConfigError, match="label_smoothing"):
        dpo.Config(loss="ipo", label_smoothing=0.1)
    with pytest.raises(ConfigError, match="beta"):
        dpo.Config(beta=0.0)
    with pytest.raises(ConfigError, match="label_smoothing"):
        dpo.Config(label_smoothing=0.5)


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ("label_smoothing", {"loss": "hinge", "label_smoothing": 0.1}),
        ("label_smoothing", {"loss": "simpo", "gamma": 0.5, "label_smoothing": 0.1}),
        ("label_smoothing", {"loss": "kto", "label_smoothing": 0.1}),
        ("label_smoothing", {"loss": "robust"}),
        ("length_normalised", {"loss": "ipo", "length_normalised": True}),
        ("length_normalised", {"loss": "kto", "length_normalised": True}),
        ("gamma", {"gamma": 0.5}),
        ("gamma", {"loss": "simpo"}),
        ("nll_coef", {"loss": "orpo", "nll_coef": 1.0}),
        ("nll_coef", {"loss": "kto", "nll_coef": 1.0}),
        ("desirable_weight", {"desirable_weight": 2.0}),
        ("undesirable_weight", {"loss": "orpo", "undesirable_weight": 2.0}),
        ("undesirable_weight", {"loss": "kto", "undesirable_weight": 0.0}),
        ("sigmoid", {"loss": "sigmoid"}),
    ],
)
def test_a_setting_that_means_nothing_to_the_loss_is_refused_by_name(named: str, settings: dict[str, object]) -> None:
    """Row 48: nothing is ignored in silence, and what a loss lacks is asked for."""
    with pytest.raises(ConfigError, match=named):
        dpo.Config(**settings)
