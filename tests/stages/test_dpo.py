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


def test_options_that_would_be_ignored_are_refused() -> None:
    """Label smoothing has no meaning for IPO; half the labels flipped says nothing; beta must pull."""
    with pytest.raises(ConfigError, match="label_smoothing"):
        dpo.Config(loss="ipo", label_smoothing=0.1)
    with pytest.raises(ConfigError, match="beta"):
        dpo.Config(beta=0.0)
    with pytest.raises(ConfigError, match="label_smoothing"):
        dpo.Config(label_smoothing=0.5)
