"""PPO beyond its defaults: one trunk with two heads, pre-training text beside completions, rounds that end early."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from trivium.batches import RolloutBatch, select_rows
from trivium.config import ConfigError, UserError
from trivium.data.microworld import documents
from trivium.data.shards import write_shards
from trivium.data.tokenizer import Tokenizer
from trivium.losses.cross_entropy import cross_entropy
from trivium.models.hf import load_model
from trivium.models.lora import LoraConfig, adapters_of
from trivium.rewards.learned import LearnedReward
from trivium.runs.events import read_metrics
from trivium.runs.manifest import Run
from trivium.stages import ppo
from trivium.training.optim import OptimConfig
from trivium.training.rollout import SampleConfig, completion_logprobs
from trivium.training.side_text import PtxConfig
from trivium.training.step import train_step

from .conftest import Folders, equal, saved_weights, story

PROMPTS = ["Where is the mill?", "Tell me a story about a dog and a red hat.", "6 + 3 = ?", "Who are you?"]
CONFIG = ppo.Config(
    prompts=("prompts.jsonl",),
    iterations=4,
    batch_size=6,
    save_every=2,
    optim=OptimConfig(kind="adamw", lr=1e-2, weight_decay=0.0),
    sampling=SampleConfig(max_new_tokens=6),
)
SHARED = dataclasses.replace(CONFIG, shared_trunk=True, value_coef=0.5)
TEXT = {"ptx": PtxConfig(coef=0.7, rows=3, context=16), "ptx_corpus": "train_tokenizer-text"}
Make = Callable[..., Run]


@pytest.fixture
def make(stage_run: Make, folders: Folders, tmp_path: Path, tiny_tokenizer: Tokenizer) -> Make:
    """Return a maker of PPO runs, in whose workspace there is tokenised text."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    texts = [document.text for document in documents(0, num=12)]
    write_shards(
        tmp_path / "train_tokenizer" / "train_tokenizer-text" / "shards" / "train",
        [(ids, len(text)) for ids, text in zip(tiny_tokenizer.encode_documents(texts), texts, strict=True)],
        tokenizer_fingerprint=tiny_tokenizer.fingerprint,
        vocab_size=tiny_tokenizer.vocab_size,
    )
    parents = {"policy": folders.policy, "reward_model": folders.reward, "ptx_corpus": "train_tokenizer-text"}
    return partial(stage_run, parents=parents, table="ppo")


def first_round(config: ppo.Config, run: Run) -> tuple[ppo.Trainer, RolloutBatch]:
    """Return a trainer and its first round, not yet trained on."""
    trainer = ppo.Trainer(config, run)
    rows, generated = trainer.sample(0)
    return trainer, trainer.shape(rows, generated, trainer.score(rows, generated))


def nudge(model: torch.nn.Module, seed: int) -> None:
    """Move every weight a little, so that ratios are not 1 and values not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def gradients(model: torch.nn.Module, total: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradient of a loss with respect to each weight, zeros where there is none."""
    model.zero_grad()
    total.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def applied(trainer: ppo.Trainer, part: RolloutBatch, step: int, name: str = "policy") -> dict[str, torch.Tensor]:
    """Return the gradient that a whole optimizer step of a network would apply, text included."""
    optimizer = trainer.optimizers[name]
    found: dict[str, torch.Tensor] = {}

    def noting() -> torch.Tensor:
        for n, p in trainer.modules[name].named_parameters():
            found[n] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        return torch.tensor(math.inf)  # so that nothing moves

    text = trainer.text.beside(part.num_items, step) if name == "policy" else ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "clip", noting)
        train_step(trainer.trained.objectives[name], [*text, part], optimizer, lr_scale=1.0)
    return found


# ------------------------------------------------------------------------------------------- pre-training text (row 44)


@pytest.mark.parametrize("base", [CONFIG, SHARED], ids=["two networks", "shared trunk"])
def test_the_gradient_is_ppos_plus_gamma_times_the_texts(make: Make, base: ppo.Config) -> None:
    """Each by its own tokens (row 44), in either arrangement; in a shared trunk the value's part is there as well."""
    trainer, batch = first_round(dataclasses.replace(base, **TEXT), make("ptx"))
    nudge(trainer.modules["policy"], 1)
    part = select_rows(batch, torch.tensor([0, 2, 3, 5]))
    (text,) = trainer.text.beside(part.num_items, 3)
    tokens = text.tokens
    assert tokens.num_items != part.num_items, "or the two divisors could not be told apart"
    module = trainer.modules["policy"]
    acting = ppo.objective(trainer.policy, trainer.config, part).total / part.mask.sum()
    if base.shared_trunk:
        forecasts = trainer.value(part.tokens.input_ids, positions=part.tokens.positions)
        error = (forecasts - part.returns).square()
        held = forecasts.clamp(part.values - 0.2, part.values + 0.2)
        error = torch.maximum(error, (held - part.returns).square()) / 2
        acting = acting + 0.5 * error[part.mask].sum() / part.mask.sum()
    of_ppo = gradients(module, acting)
    logits = trainer.policy.logits(
        trainer.policy(tokens.input_ids, positions=tokens.positions, document_ids=tokens.document_ids)
    )
    of_text = gradients(module, cross_entropy(logits, tokens.targets).sum() / tokens.num_items)
    found = applied(trainer, part, 3)
    assert max(float(g.abs().max()) for g in of_text.values()) > 1e-3
    for name, gradient in found.items():
        assert torch.allclose(gradient, of_ppo[name] + 0.7 * of_text[name], rtol=1e-4, atol=1e-6), name


def test_a_value_model_of_its_own_reads_no_text(make: Make) -> None:
    """Its gradient is that of its forecasts alone: text is what a policy may forget, and values know none."""
    with_text, batch = first_round(dataclasses.replace(CONFIG, **TEXT), make("with"))
    without, _ = first_round(CONFIG, make("without"))
    assert equal(applied(with_text, batch, 0, "value"), applied(without, batch, 0, "value"))
    assert not equal(applied(with_text, batch, 0), applied(without, batch, 0))


def test_each_step_reads_other_rows_and_any_run_the_same(make: Make) -> None:
    """Which text a step reads follows from seed and step, so a resumed run reads what it would have read."""
    trainers = [ppo.Trainer(dataclasses.replace(CONFIG, **TEXT), make(name)) for name in ("a", "b")]
    read = [[t.text.beside(torch.tensor(5), step)[0].tokens.input_ids for step in range(3)] for t in trainers]
    assert all(torch.equal(a, b) for a, b in zip(*read, strict=True))
    assert not torch.equal(read[0][0], read[0][1])
    assert read[0][0].shape == (3, 16)


def test_text_keeps_what_ppo_alone_forgets(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward for even ids wrecks the text's loss; with a weight on text the loss falls instead, as the log says."""
    monkeypatch.setattr(
        LearnedReward, "score_ids", lambda self, rows: [sum(i % 2 == 0 for i in row[-3:]) / 3 for row in rows]
    )
    losses = []
    for name, coef in (("kept", 2.0), ("forgot", 1e-12)):
        ptx = PtxConfig(coef=coef, rows=8, context=32)
        config = dataclasses.replace(CONFIG, iterations=8, batch_size=16, **(TEXT | {"ptx": ptx}))
        run = make(name)
        ppo.run(config, run)
        losses.append([value for _, value in read_metrics(run.dir)["train/ptx_loss"]])
    kept, forgot = losses
    assert kept[0] == pytest.approx(math.log(400), rel=0.1), "a random network knows nothing of 400 tokens"
    assert kept[-1] < kept[0] - 0.5
    assert forgot[-1] > kept[-1] + 0.5


def test_text_is_paid_for_and_the_policys_loss_is_told_without_it(make: Make) -> None:
    """Tokens and FLOPs of the text are in the run's cost; `policy_loss` of the first step is that without text."""
    runs = [make("with"), make("without")]
    one = dataclasses.replace(CONFIG, iterations=1, epochs=1, minibatches=1)
    ppo.run(dataclasses.replace(one, **TEXT), runs[0])
    ppo.run(one, runs[1])
    costs = [run.finish("done").cost for run in runs]
    assert costs[0].tokens - costs[1].tokens == 3 * 16
    assert costs[0].flops > costs[1].flops
    curves = [read_metrics(run.dir) for run in runs]
    loss = [curve["train/policy_loss"][0][1] for curve in curves]
    assert loss[0] == pytest.approx(loss[1], abs=1e-5)
    assert curves[0]["train/ptx_loss"][0][1] > 1 and "train/ptx_loss" not in curves[1]


def test_text_that_cannot_be_read_is_refused_by_name(make: Make, tmp_path: Path) -> None:
    """A weight without text, text without a weight, rows longer than the model reads, another tokenizer's text."""
    for half in ({"ptx": TEXT["ptx"]}, {"ptx_corpus": "train_tokenizer@latest"}):
        with pytest.raises(ConfigError, match="one without the other"):
            dataclasses.replace(CONFIG, **half)
    with pytest.raises(ConfigError, match=r"ptx.context = 4096: the policy reads at most 512"):
        ppo.Trainer(dataclasses.replace(CONFIG, **(TEXT | {"ptx": PtxConfig(coef=1, context=4096)})), make("long"))
    place = tmp_path / "train_tokenizer" / "train_tokenizer-other" / "shards" / "train"
    write_shards(place, [([1, 2, 3], 3)], tokenizer_fingerprint="f" * 64, vocab_size=9)
    run = make("other")
    run.manifest.parents["ptx_corpus"] = "train_tokenizer-other"
    with pytest.raises(UserError, match="was made with tokenizer ffff"):
        ppo.Trainer(dataclasses.replace(CONFIG, **TEXT), run)


# --------------------------------------------------------------------------------------------- one trunk with two heads


def test_a_shared_trunk_is_one_network_whose_values_start_at_0(make: Make) -> None:
    """The value head reads the policy's own hidden states: no second copy, values 0, KL 0, nothing clipped (row 42)."""
    trainer, batch = first_round(SHARED, make("start"))
    assert trainer.value.model is trainer.policy.model
    assert set(trainer.modules) == set(trainer.optimizers) == {"policy"}
    names = {name for name, _ in trainer.modules["policy"].named_parameters()}
    assert names == {f"policy.{n}" for n, _ in trainer.policy.named_parameters()} | {"value.score.weight"}
    assert batch.values.abs().max() == 0
    assert torch.equal(batch.old_logprobs, batch.ref_logprobs)
    output = ppo.joint_objective(trainer.policy, trainer.value, SHARED, batch)
    assert float(output.metrics["clip_frac"]) == 0
    # value_coef 0.5 of half the squared return, beside minus the advantages.
    expected = -batch.advantages.sum() + 0.5 * (batch.returns.square() / 2).sum()
    assert output.total.item() == pytest.approx(float(expected), abs=1e-4)
    assert len(trainer.optimizers["policy"].parameters) == len(names)


def test_the_joint_loss_is_the_two_losses_weighted(make: Make) -> None:
    """Total, gradient and reported parts are those of `objective` and `value_objective`, the value's by value_coef."""
    trainer, batch = first_round(SHARED, make("joint"))
    module = trainer.modules["policy"]
    nudge(module, 2)
    acting = ppo.objective(trainer.policy, SHARED, batch)
    forecast = ppo.value_objective(trainer.value, SHARED, batch)
    joint = ppo.joint_objective(trainer.policy, trainer.value, SHARED, batch)
    assert joint.metrics["policy_loss"].item() == pytest.approx(acting.total.item(), abs=1e-5)
    assert joint.metrics["value_loss"].item() == pytest.approx(forecast.total.item(), rel=1e-5)
    parts = [gradients(module, output.total) for output in (acting, forecast)]
    for name, gradient in gradients(module, joint.total).items():
        assert torch.allclose(gradient, parts[0][name] + 0.5 * parts[1][name], rtol=1e-4, atol=1e-5), name
    assert float(parts[1]["policy.model.layers.0.mlp.down_proj.weight"].abs().max()) > 0, "values teach the trunk"


@pytest.mark.parametrize("garbage", [1e6, float("nan")])
def test_what_stands_at_masked_positions_of_a_shared_trunk_changes_nothing(make: Make, garbage: float) -> None:
    """Loss, gradient and metrics to the bit, as with two networks (row 40)."""
    trainer, batch = first_round(SHARED, make("garbage"))
    nudge(trainer.modules["policy"], 3)
    fields = ("old_logprobs", "ref_logprobs", "advantages", "returns", "values", "rewards")
    spoilt = {name: torch.where(batch.mask, getattr(batch, name), garbage) for name in fields}
    clean, dirty = (
        ppo.joint_objective(trainer.policy, trainer.value, SHARED, b)
        for b in (batch, dataclasses.replace(batch, **spoilt))
    )
    assert torch.equal(clean.total, dirty.total)
    assert all(torch.equal(clean.metrics[name], dirty.metrics[name]) for name in clean.metrics)
    assert equal(*(gradients(trainer.modules["policy"], out.total) for out in (clean, dirty)))


def test_a_shared_trunk_learns_what_is_rewarded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Share of even ids from a half to nearly all, and the value head comes to expect it; the reference stays."""
    monkeypatch.setattr(
        LearnedReward, "score_ids", lambda self, rows: [sum(i % 2 == 0 for i in row[-2:]) / 2 for row in rows]
    )
    sampling = SampleConfig(max_new_tokens=2)
    config = dataclasses.replace(
        SHARED, iterations=24, batch_size=32, kl_coef=0.0, save_every=100, missing_eos_penalty=0.0, sampling=sampling
    )
    run = make("even")
    ppo.run(config, run)
    curves = read_metrics(run.dir)
    scores = [value for _, value in curves["rollout/score"]]
    assert scores[0] < 0.7 and sum(scores[-3:]) / 3 > 0.9
    values = [value for _, value in curves["rollout/value"]]
    assert values[0] == 0 and values[-1] == pytest.approx(scores[-1], abs=0.3)


def test_adapters_on_a_shared_trunk(make: Make, outspoken: Path, folders: Folders) -> None:
    """The reference is the trunk without adapters; adapters and the value head move, frozen weights do not (row 43)."""
    config = dataclasses.replace(SHARED, lora=LoraConfig(rank=4))
    run = make("lora", parents={"policy": outspoken, "reward_model": folders.reward})
    trainer, batch = first_round(config, run)
    assert trainer.reference is trainer.policy
    assert torch.equal(batch.old_logprobs, batch.ref_logprobs)
    before = {n: p.detach().clone() for n, p in trainer.modules["policy"].named_parameters()}
    trainer.update(batch, 0)
    after = dict(trainer.modules["policy"].named_parameters())
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    adapters = {f"policy.{n}.{part}" for n in adapters_of(trainer.policy) for part in ("lora_A", "lora_B")}
    assert moved == adapters | {"value.score.weight"}
    rows, generated = trainer.sample(1)
    batch = trainer.shape(rows, generated, trainer.score(rows, generated))
    assert torch.equal(batch.ref_logprobs, completion_logprobs(load_model(outspoken), batch.tokens))
    assert not torch.equal(batch.old_logprobs, batch.ref_logprobs)


def test_a_weight_of_values_needs_a_shared_trunk() -> None:
    """A value model with an optimizer of its own has no loss to be weighted in."""
    with pytest.raises(ConfigError, match=r"value_coef = 0\.5 means nothing.*shared_trunk = true"):
        dataclasses.replace(CONFIG, value_coef=0.5)
    assert dataclasses.replace(CONFIG, shared_trunk=True).value_weight == 0.1


# ------------------------------------------------------------------------------ rounds that end early, and resuming


def test_a_round_ends_with_the_step_that_notices(make: Make) -> None:
    """A bound that the first step's policy has not reached and the second's has: two steps, three with a wider one."""
    trainer, batch = first_round(dataclasses.replace(CONFIG, epochs=3), make("measured"))
    measured = []
    for rows in trainer.trained.minibatches(len(batch.scores), seed=0):
        result, _ = trainer.trained.step(
            partial(train_step, lr_scale=1.0), select_rows(batch, rows), trainer.text.beside(batch.num_items, 0), 1
        )
        measured.append(result.metrics["approx_kl"])
    assert measured[0] == pytest.approx(0, abs=1e-6) and measured[1] > 1e-6
    assert len(measured) == 3 * 2
    for name, bound, steps in (("first", measured[1] / 2, 2), ("never", 1e9, 6), ("off", 0.0, 6)):
        config = dataclasses.replace(CONFIG, epochs=3, iterations=1, max_approx_kl=bound)
        run = make(name)
        ppo.run(config, run)
        curves = read_metrics(run.dir)
        assert run.finish("done").summary["steps"] == steps
        assert ("train/num_steps" in curves) is (bound > 0)
        if bound:
            assert curves["train/num_steps"] == [(1, float(steps))]


def test_a_round_that_ends_early_costs_less_and_moves_less(make: Make) -> None:
    """One of four steps: fewer FLOPs, and the weights are those after that one step."""
    runs = {name: make(name) for name in ("early", "full")}
    for name, bound in (("early", 1e-12), ("full", 0.0)):
        ppo.run(dataclasses.replace(CONFIG, iterations=1, max_approx_kl=bound), runs[name])
    costs = {name: run.finish("done").cost for name, run in runs.items()}
    assert costs["early"].flops < costs["full"].flops and costs["early"].tokens == costs["full"].tokens
    assert not equal(saved_weights(runs["early"]), saved_weights(runs["full"]))


VARIANTS = {
    "two networks": dataclasses.replace(CONFIG, kl_target=0.5, kl_gain=2.0),
    "shared": dataclasses.replace(SHARED, kl_target=0.5, kl_gain=2.0, max_approx_kl=1e-3, whiten_rewards=True, **TEXT),
    "adapters": dataclasses.replace(SHARED, lora=LoraConfig(rank=4), **TEXT),
}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_cut_off_and_resumed_is_uninterrupted(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """Weights, log, controller, and the optimizer state of every network, all to the bit (row 45)."""
    config = dataclasses.replace(VARIANTS[name], optim=dataclasses.replace(CONFIG.optim, kind=kind))
    trainers: list[ppo.Trainer] = []
    build = ppo.Trainer.__init__

    def noting(self, *arguments) -> None:
        build(self, *arguments)
        trainers.append(self)

    monkeypatch.setattr(ppo.Trainer, "__init__", noting)
    whole = make("whole")
    ppo.run(config, whole)
    update = ppo.Trainer.update

    def dying(self, batch, round_):
        if round_ == 3:
            raise KeyboardInterrupt
        return update(self, batch, round_)

    monkeypatch.setattr(ppo.Trainer, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        ppo.run(config, make("cut"))
    monkeypatch.setattr(ppo.Trainer, "update", update)
    resumed = make("cut")
    ppo.run(config, resumed)
    assert equal(saved_weights(whole), saved_weights(resumed))
    assert story(whole) == story(resumed)
    first, _, last = trainers
    assert first.controller.state() == last.controller.state()
    assert set(first.optimizers) == ({"policy", "value"} if name == "two networks" else {"policy"})
    for network, optimizer in first.optimizers.items():
        state = optimizer.tensors()
        assert any(key.endswith("exp_avg") for key in state)
        assert equal(state, last.optimizers[network].tensors())
        assert equal(
            {n: p.detach() for n, p in first.modules[network].named_parameters()},
            {n: p.detach() for n, p in last.modules[network].named_parameters()},
        )


def test_one_step_is_adams_formula_and_the_recipe_holds_its_numbers(make: Make) -> None:
    """`w -= lr * m / (sqrt(v) + eps)` after bias correction, eps outside the root (row 46), at the schedule's rate."""
    optim = OptimConfig(kind="adamw", lr=1e-2, weight_decay=0.0, eps=1e-3, grad_clip=0.0)
    config = dataclasses.replace(CONFIG, epochs=1, minibatches=1, iterations=20, optim=optim)
    trainer, batch = first_round(config, make("formula"))
    before = {n: p.detach().clone() for n, p in trainer.policy.named_parameters()}
    total = ppo.objective(trainer.policy, config, batch).total / batch.mask.sum()
    gradient = gradients(trainer.policy, total)
    trainer.update(batch, 15)
    # wsd over 20 rounds, the second ten decaying from 1 to 0.05: at the sixth of them 0.05 + 0.95 * 0.4.
    rate = 1e-2 * (0.05 + 0.95 * 0.4)
    for name, parameter in trainer.policy.named_parameters():
        # The first step's moments, corrected, are the gradient and its square.
        expected = before[name] - rate * gradient[name] / (gradient[name].abs() + 1e-3)
        assert torch.allclose(parameter, expected, atol=1e-6), name
    written = dataclasses.asdict(config)["optim"]
    assert (written["eps"], written["beta1"], written["beta2"]) == (1e-3, 0.9, 0.95)
    assert written["schedule"]["kind"] == "wsd"


@pytest.mark.parametrize("base", [CONFIG, SHARED], ids=["two networks", "shared trunk"])
def test_a_minibatch_in_parts_is_the_minibatch(make: Make, base: ppo.Config) -> None:
    """Unequal micro-batches add up to the whole's gradient, text beside them or not: one division, by all tokens."""
    trainer, batch = first_round(dataclasses.replace(base, **TEXT), make("parts"))
    nudge(trainer.modules["policy"], 4)
    text = trainer.text.beside(batch.num_items, 0)
    parts = [select_rows(batch, torch.tensor(rows)) for rows in ([0, 1, 2, 3], [4], [5])]
    found = []
    for micro_batches in ([batch], parts):
        optimizer = trainer.optimizers["policy"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimizer, "step", lambda scale: None)
            result = train_step(trainer.trained.objectives["policy"], [*text, *micro_batches], optimizer, lr_scale=1.0)
        found.append((result, {n: p.grad.clone() for n, p in trainer.modules["policy"].named_parameters()
                               if p.grad is not None}))  # fmt: skip
    (whole, first), (split, second) = found
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)
    assert split.metrics == pytest.approx(whole.metrics, rel=1e-4, abs=1e-6)
    for name, gradient in first.items():
        assert torch.allclose(gradient, second[name], rtol=1e-4, atol=1e-6), name


def test_the_rounds_minibatches_are_each_row_once_an_epoch(make: Make) -> None:
    """Five rows in two minibatches, three epochs: six steps, every epoch a permutation, orders differing."""
    trainer, _ = first_round(dataclasses.replace(CONFIG, epochs=3), make("order"))
    steps = [rows.tolist() for rows in trainer.trained.minibatches(5, seed=7)]
    assert [len(rows) for rows in steps] == [3, 2] * 3
    epochs = [steps[i] + steps[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
