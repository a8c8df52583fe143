"""PPO on a random network: what must hold before the first step, what must never move, and that it learns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from trivium.batches import LossOutput, RolloutBatch
from trivium.config import ConfigError, UserError
from trivium.losses.logprobs import masked_sum, token_logprobs
from trivium.models.hf import load_model
from trivium.rewards.learned import LearnedReward
from trivium.runs.events import read_events, read_metrics
from trivium.runs.manifest import Run
from trivium.stages import ppo
from trivium.training.optim import OptimConfig
from trivium.training.rollout import SampleConfig

from .conftest import Folders, equal, saved_weights, story

PROMPTS = ["Where is the mill?", "Tell me a story about a dog and a red hat.", "6 + 3 = ?", "Who are you?"]
CONFIG = ppo.Config(
    prompts=("prompts.jsonl",),
    iterations=4,
    batch_size=6,
    epochs=2,
    minibatches=2,
    save_every=2,
    missing_eos_penalty=0.0,
    optim=OptimConfig(kind="adamw", lr=1e-2, weight_decay=0.0),
    sampling=SampleConfig(max_new_tokens=6),
)

Make = Callable[..., Run]


@pytest.fixture
def make(stage_run: Make, folders: Folders, tmp_path) -> Make:
    """Return a maker of PPO runs."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return partial(stage_run, parents={"policy": folders.policy, "reward_model": folders.reward}, table="ppo")


def first_round(config: ppo.Config, run: Run):
    """Return a trainer and its first round, not yet trained on."""
    trainer = ppo.Trainer(config, run)
    trainer.controller.value = config.kl_coef
    rows, generated = trainer.sample(0)
    scores = trainer.score(rows, generated)
    return trainer, rows, generated, scores, trainer.shape(rows, generated, scores)


def gradients(model: torch.nn.Module, total: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_before_the_first_step_nothing_has_moved(make: Make, temperature: float) -> None:
    """KL 0, the generator's log-probabilities are the trainer's, the ratio is 1, values are 0."""
    sampling = SampleConfig(max_new_tokens=6, temperature=temperature)
    config = dataclasses.replace(CONFIG, sampling=sampling)
    trainer, _, generated, _, batch = first_round(config, make("start"))
    assert torch.equal(batch.old_logprobs, batch.ref_logprobs)
    assert batch.old_logprobs[~batch.mask].abs().max() == 0
    sampled = torch.tensor([x for g in generated for x in g.logprobs])
    assert (sampled - batch.old_logprobs[batch.mask]).abs().max() < 1e-5
    assert batch.mask.sum().item() == sum(len(g.token_ids) for g in generated)
    assert batch.values.abs().max() == 0
    output = ppo.objective(trainer.policy, config, batch)
    assert float(output.metrics["clip_frac"]) == 0
    assert output.total.item() == pytest.approx(-float(batch.advantages.sum()), abs=1e-4)
    assert float(output.metrics["approx_kl"]) == pytest.approx(0, abs=1e-5)
    # The objective's gradient is then the plain policy gradient: -A * grad log p.
    whole = gradients(trainer.policy, output.total)
    logits = trainer.policy.logits(trainer.policy(batch.tokens.input_ids, positions=batch.tokens.positions))
    logprobs = token_logprobs(logits, batch.tokens.targets, temperature)
    plain = gradients(trainer.policy, -(logprobs * batch.advantages).sum())
    assert all(torch.allclose(whole[name], plain[name], rtol=1e-3, atol=1e-4) for name in plain)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_objective_is_the_same_where_the_logits_of_prompts_are_never_formed(
    make: Make, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """As a large vocabulary has it: loss, gradient, share of clipped tokens, KL and entropy of the completions."""
    trainer, _, _, _, batch = first_round(CONFIG, make("chunks"))
    batch = dataclasses.replace(batch, old_logprobs=batch.old_logprobs - 0.3 * batch.mask * batch.advantages.sign())

    def outcome() -> tuple[LossOutput, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found = ppo.objective(trainer.policy, CONFIG, batch)
        return found, gradients(trainer.policy, found.total)

    whole, expected = outcome()
    monkeypatch.setattr("trivium.losses.cross_entropy.PLAIN_BYTES", 0)
    pieces, found = outcome()
    near = {"rel": 1e-5, "abs": 1e-5} if precision == "fp32" else {"rel": 0.02, "abs": 0.02}
    assert float(whole.metrics["clip_frac"]) > 0 and float(whole.metrics["entropy"]) > 1
    assert float(pieces.total.detach()) == pytest.approx(float(whole.total.detach()), **near)
    for name, figure in whole.metrics.items():
        assert float(pieces.metrics[name]) == pytest.approx(float(figure), **near), name
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=(1e-5 if precision == "fp32" else 0.03) * scale), name


def test_each_rows_rewards_are_its_score_less_its_kl(make: Make) -> None:
    """The score lands on the last sampled token; the KL of every token, and nothing else, stands beside it."""
    config = dataclasses.replace(CONFIG, kl_coef=0.3)
    trainer, rows, generated, scores, _ = first_round(config, make("rewards"))
    with torch.no_grad():
        for parameter in trainer.reference.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    batch = trainer.shape(rows, generated, scores)
    kl = masked_sum(batch.old_logprobs - batch.ref_logprobs, batch.mask)
    assert kl.abs().min() > 1e-4
    assert torch.allclose(batch.rewards.sum(-1), scores - 0.3 * kl, atol=1e-5)
    last = [int(row.nonzero().max()) for row in batch.mask]
    by_hand = -0.3 * (batch.old_logprobs - batch.ref_logprobs) * batch.mask
    by_hand[torch.arange(len(last)), last] += scores
    assert torch.allclose(batch.rewards, by_hand, atol=1e-6)
    # gamma = 1 and values 0: the return is lambda-weighted, at the last token exactly that token's reward.
    assert torch.allclose(batch.returns[torch.arange(len(last)), last], batch.rewards[torch.arange(len(last)), last])


def test_a_score_is_the_folders_calibrated_one_and_cut_completions_pay(make: Make, folders: Folders) -> None:
    """The trainer scores prompt and completion ids as LearnedReward does alone; only unfinished ones are fined."""
    config = dataclasses.replace(CONFIG, missing_eos_penalty=2.5)
    trainer, rows, generated, scores, _ = first_round(config, make("scores"))
    reward = LearnedReward.from_folder(folders.reward)
    assert (reward.mean, reward.std) == (0.25, 0.5)
    for row, one, score in zip(rows, generated, scores.tolist(), strict=True):
        alone = reward.score_ids([[*trainer.prompts.encoded[row], *one.token_ids]])[0]
        assert score == pytest.approx(alone - (2.5 if one.finish_reason != "stop" else 0.0), abs=1e-4)
    assert any(g.finish_reason != "stop" for g in generated)


@pytest.mark.parametrize("garbage", [1e6, -1e6, float("nan")])
def test_what_stands_at_masked_positions_changes_nothing(make: Make, garbage: float) -> None:
    """Garbage in every masked cell and other tokens behind each row's end: losses, gradients and metrics to the bit."""
    trainer, _, _, _, batch = first_round(CONFIG, make("garbage"))
    with torch.no_grad():  # away from ratio 1, so that the clip has something to do
        for parameter in trainer.policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.05)
    fields = ("old_logprobs", "ref_logprobs", "advantages", "returns", "values", "rewards")
    spoilt = {name: torch.where(batch.mask, getattr(batch, name), garbage) for name in fields}
    ends = torch.tensor([int(row.nonzero().max()) for row in batch.mask])
    behind = torch.arange(batch.mask.shape[1]) > ends[:, None]
    ids = torch.where(behind, 77, batch.tokens.input_ids)
    assert behind.any()
    dirty: RolloutBatch = dataclasses.replace(batch, tokens=dataclasses.replace(batch.tokens, input_ids=ids), **spoilt)
    clean_out, dirty_out = (ppo.objective(trainer.policy, CONFIG, b) for b in (batch, dirty))
    assert float(clean_out.metrics["clip_frac"]) > 0
    assert torch.equal(clean_out.total, dirty_out.total)
    assert all(torch.equal(clean_out.metrics[name], dirty_out.metrics[name]) for name in clean_out.metrics)
    grads = [gradients(trainer.policy, out.total) for out in (clean_out, dirty_out)]
    assert equal(*grads)
    values = [ppo.value_objective(trainer.value, CONFIG, b).total for b in (batch, dirty)]
    assert torch.equal(*values)
    assert equal(*(gradients(trainer.value, total) for total in values))


def test_a_run_moves_policy_and_value_and_nothing_else(make: Make, folders: Folders) -> None:
    """Reference and reward model are the folder's weights to the bit, and unused gradients reach neither."""
    run = make("frozen")
    trainer, rows, generated, _scores, batch = first_round(CONFIG, run)
    before = {name: p.clone() for name, p in trainer.reward.model.state_dict().items()}
    for round_ in range(2):
        metrics = trainer.update(batch, round_)
        trainer.record(batch, rows, generated, metrics, round_ + 1)
        rows, generated = trainer.sample(round_ + 1)
        batch = trainer.shape(rows, generated, trainer.score(rows, generated))
    original = dict(load_model(folders.policy).state_dict())
    assert equal(dict(trainer.reference.state_dict()), original)
    assert equal(dict(trainer.reward.model.state_dict()), before)
    assert not equal(dict(trainer.policy.state_dict()), original)
    assert all(p.grad is None for m in (trainer.reference, trainer.reward.model) for p in m.parameters())
    assert trainer.value.score.weight.abs().max() > 0
    assert read_metrics(run.dir)["rollout/kl"][0] == (1, 0.0)


def test_a_simple_taste_is_learned(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reward = share of tokens with an even id: from about a half to nearly always, and the log says so."""
    monkeypatch.setattr(
        LearnedReward,
        "score_ids",
        lambda self, rows: [sum(token % 2 == 0 for token in row[-2:]) / 2 for row in rows],
    )
    sampling = SampleConfig(max_new_tokens=2)
    config = dataclasses.replace(CONFIG, iterations=24, batch_size=32, kl_coef=0.0, save_every=100, sampling=sampling)
    run = make("bandit")
    ppo.run(config, run)
    scores = [value for _, value in read_metrics(run.dir)["rollout/score"]]
    assert scores[0] < 0.7
    assert sum(scores[-3:]) / 3 > 0.9
    manifest = run.finish("done")
    results = {result.metric: result.value for result in manifest.results}
    assert results["score"] == pytest.approx(sum(scores[-5:]) / 5)
    assert results["kl"] > 0


def test_with_a_strong_leash_and_no_reward_the_policy_comes_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started away from the reference, score 0 and a large coefficient: the KL falls to a fraction (row 37)."""
    monkeypatch.setattr(LearnedReward, "score_ids", lambda self, rows: [0.0] * len(rows))
    config = dataclasses.replace(
        CONFIG, iterations=16, batch_size=48, kl_coef=1.0, sampling=SampleConfig(max_new_tokens=2)
    )
    trainer = ppo.Trainer(config, make("leash"))
    trainer.controller.value = config.kl_coef
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.2)
    kls = []
    for round_ in range(config.iterations):
        rows, generated = trainer.sample(round_)
        batch = trainer.shape(rows, generated, trainer.score(rows, generated))
        kls.append(float(masked_sum(batch.old_logprobs - batch.ref_logprobs, batch.mask).mean()))
        trainer.update(batch, round_)
    assert kls[0] > 0.3
    assert sum(kls[-4:]) / 4 < 0.4 * sum(kls[:4]) / 4


def test_cut_off_at_any_round_and_resumed_is_uninterrupted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, metrics, samples, specimens, results and the controller are those of a run that was never cut."""
    config = dataclasses.replace(CONFIG, kl_target=0.5)
    whole = make("whole")
    ppo.run(config, whole)
    expected = whole.finish("done")
    record = ppo.Trainer.record
    for cut in range(1, 5):

        def dying(self, batch, rows, generated, metrics, step, cut=cut):
            if step == cut:  # sampled and updated, not yet in the log
                raise KeyboardInterrupt
            return record(self, batch, rows, generated, metrics, step)

        monkeypatch.setattr(ppo.Trainer, "record", dying)
        with pytest.raises(KeyboardInterrupt):
            ppo.run(config, make(f"cut{cut}"))
        monkeypatch.setattr(ppo.Trainer, "record", record)
        resumed = make(f"cut{cut}")
        ppo.run(config, resumed)
        assert equal(saved_weights(whole), saved_weights(resumed))
        assert story(whole) == story(resumed)
        manifest = resumed.finish("done")
        assert manifest.summary == expected.summary
        assert manifest.results == expected.results
        assert manifest.cost.tokens == expected.cost.tokens


def test_a_target_moves_the_coefficient_and_an_uneven_split_reports_true_means(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL 0 in round one is below the target, so the coefficient falls; five rows in four minibatches are four steps."""
    counts = []
    real = ppo.train_step
    monkeypatch.setattr(ppo, "train_step", lambda *a, **k: counts.append(1) or real(*a, **k))
    config = dataclasses.replace(CONFIG, iterations=2, batch_size=5, epochs=1, minibatches=4, kl_target=1.0)
    run = make("target")
    ppo.run(config, run)
    curve = [value for _, value in read_metrics(run.dir)["train/kl_coef"]]
    assert curve[0] == 0.05
    assert curve[1] < 0.05
    assert len(counts) == 2 * 4 * 2  # rounds, minibatches, networks
    assert run.finish("done").summary["steps"] == 8


def test_a_judge_is_recorded_beside_the_score_and_not_trained_on(make: Make, module_of) -> None:
    """`rollout/true_taste` is the judge's mean; the weights are those of a run without a judge."""
    name = module_of(length=lambda prompt, text: float(len(text)))
    runs = [make("judged"), make("plain")]
    config = dataclasses.replace(CONFIG, iterations=1)
    ppo.run(dataclasses.replace(config, judge=f"{name}:length"), runs[0])
    ppo.run(config, runs[1])
    assert "rollout/true_taste" in read_metrics(runs[0].dir)
    assert "rollout/true_taste" not in read_metrics(runs[1].dir)
    assert equal(*(saved_weights(run) for run in runs))


def test_the_specimen_holds_one_number_for_every_token(make: Make) -> None:
    """The walkthrough's columns have one length; sums over the KL and the log-probabilities agree."""
    run = make("specimen")
    ppo.run(dataclasses.replace(CONFIG, iterations=2), run)
    for event in read_events(run.dir, kind="specimen"):
        value = event.value
        columns = ("tokens", "logprobs", "ref_logprobs", "kl", "advantages", "values", "rewards")
        assert len({len(value[name]) for name in columns}) == 1
        gap = [a - b for a, b in zip(value["logprobs"], value["ref_logprobs"], strict=True)]
        assert value["kl"] == pytest.approx(gap, abs=2e-4)
        assert value["prompt"] in PROMPTS


def test_foreseeable_mistakes_are_one_sentence(make: Make, tmp_path) -> None:
    """No prompts, a greedy temperature, more minibatches than rows."""
    (tmp_path / "prompts.jsonl").write_text("")
    with pytest.raises(UserError, match="no prompts"):
        ppo.run(CONFIG, make("empty"))
    with pytest.raises(ConfigError, match="temperature"):
        SampleConfig(temperature=0.0)
    with pytest.raises(ConfigError, match="minibatches"):
        ppo.Config(batch_size=4, minibatches=5)


def test_prompts_that_leave_no_room_are_left_out_before_the_work_starts(make: Make, tmp_path) -> None:
    """A too long one among others is counted; alone it is one sentence, not a traceback in round forty."""
    long = json.dumps({"prompt": "the old mill " * 200}) + "\n"
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(long)
    run = make("some")
    ppo.run(dataclasses.replace(CONFIG, iterations=1), run)
    summary = run.finish("done").summary
    assert (summary["prompts_too_long"], summary["data"]["num_prompts"]) == (1, len(PROMPTS))
    (tmp_path / "prompts.jsonl").write_text(long)
    with pytest.raises(UserError, match="1 longer than the 506 tokens"):
        ppo.run(CONFIG, make("long"))
