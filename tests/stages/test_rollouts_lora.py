"""PPO and GRPO with adapters: the reference is the policy with its adapters off, and nothing frozen ever moves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from trivium.models.adapter_folder import load_adapter
from trivium.models.hf import load_model, load_scalar_model
from trivium.models.lora import LoraConfig, adapters_of
from trivium.records import write_jsonl
from trivium.runs.events import read_metrics
from trivium.runs.manifest import Run
from trivium.stages import grpo, ppo, sft
from trivium.training.loop import FitConfig
from trivium.training.optim import OptimConfig
from trivium.training.rollout import SampleConfig, completion_logprobs

from .conftest import Folders, equal, saved_weights, story

OPTIM = OptimConfig(lr=2e-2, weight_decay=0.0)
LORA = LoraConfig(rank=4)
PPO = ppo.Config(
    prompts=("prompts.jsonl",),
    iterations=4,
    batch_size=6,
    save_every=2,
    missing_eos_penalty=0.0,
    optim=OPTIM,
    sampling=SampleConfig(max_new_tokens=6),
    lora=LORA,
)
GRPO = grpo.Config(
    prompts=("prompts.jsonl",),
    iterations=4,
    prompts_per_round=3,
    group_size=4,
    save_every=2,
    optim=OPTIM,
    sampling=SampleConfig(max_new_tokens=5),
    lora=LORA,
)
Make = Callable[..., Run]


def even(prompts, completions) -> list[float]:
    """Return the share of even ids in each completion."""
    return [sum(i % 2 == 0 for i in c.token_ids) / len(c.token_ids) for c in completions]


@pytest.fixture
def make(stage_run: Make, folders: Folders, outspoken: Path, tmp_path) -> Make:
    """Return a maker of runs over five prompts."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n} + 3 = ?"}) + "\n" for n in range(5)))
    return partial(stage_run, parents={"policy": outspoken, "reward_model": folders.reward})


def stage_of(kind: str, module_of):
    """Return (stage, its config with adapters)."""
    if kind == "ppo":
        return ppo, PPO
    return grpo, dataclasses.replace(GRPO, rewards={f"{module_of(even=even)}:even": 1.0})


@pytest.fixture
def lora_sft(make: Make, outspoken: Path, tmp_path):
    """Return the model folder of an SFT that was itself LoRA."""
    write_jsonl(tmp_path / "talks.jsonl", [{"prompt": f"Where is {n}?", "response": f"At {n}."} for n in range(60)])
    run = make("sft", parents={"init": outspoken}, table="sft")
    fit = FitConfig(steps=10, batch_size=8, optim=OPTIM)
    sft.run(sft.Config(data=("talks.jsonl",), heldout_frac=0.2, fit=fit, lora=LORA), run)
    return run.dir / "model"


def test_before_the_first_step_the_policy_is_its_reference(
    make: Make, folders: Folders, outspoken: Path, lora_sft
) -> None:
    """From an SFT that was itself LoRA: KL 0 to the bit, and the reference is that SFT, not its base (row 43)."""
    run = make("start", parents={"policy": lora_sft, "reward_model": folders.reward}, table="ppo")
    trainer = ppo.Trainer(PPO, run)
    trainer.controller.value = 0.1
    rows, generated = trainer.sample(0)
    batch = trainer.shape(rows, generated, trainer.score(rows, generated))
    assert torch.equal(batch.old_logprobs, batch.ref_logprobs)
    for folder, is_it in ((lora_sft, True), (outspoken, False)):
        alone = completion_logprobs(load_model(folder), batch.tokens)
        assert (bool((alone - batch.ref_logprobs).abs().max() < 1e-6)) is is_it
    assert batch.values.abs().max() == 0
    sampled = torch.tensor([x for g in generated for x in g.logprobs])
    assert (sampled - batch.old_logprobs[batch.mask]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_the_reference_does_not_move_and_is_no_second_copy(
    make: Make, outspoken: Path, module_of, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """After all rounds: the policy has moved away, and its reference still is the folder's model, to the bit."""
    stage, config = stage_of(kind, module_of)
    trainers: list[ppo.Trainer | grpo.Trainer] = []
    batches = []
    shape = stage.Trainer.shape

    def spying(self, *arguments):
        trainers.append(self)
        batches.append(shape(self, *arguments))
        return batches[-1]

    monkeypatch.setattr(stage.Trainer, "shape", spying)
    run = make("moves", table=kind)
    stage.run(config, run)
    trainer, last = trainers[0], batches[-1]
    assert trainer.reference is trainer.policy
    start = load_model(outspoken)
    assert torch.equal(last.ref_logprobs, completion_logprobs(start, last.tokens))
    assert (last.old_logprobs - last.ref_logprobs).abs().max() > 1e-3
    frozen, trained = start.state_dict(), trainer.policy.state_dict()
    assert all(torch.equal(frozen[name], trained[name]) for name in frozen)
    assert read_metrics(run.dir)["rollout/kl"][0][1] == 0
    adapted = load_adapter(run.dir / "adapter", start)
    for name, adapter in adapters_of(adapted).items():
        assert bool(adapter.lora_B.any())
        assert torch.equal(adapter.merged(), saved_weights(run)[f"{name}.weight"])
    assert run.finish("done").summary["lora"]["rank"] == 4


def test_the_value_model_is_adapters_and_a_head_on_the_frozen_reward_model(make: Make, folders: Folders) -> None:
    """Reward and value share their frozen tensors; a round moves the value's own, and the reward not at all."""
    trainer = ppo.Trainer(PPO, make("value", table="ppo"))
    trainer.controller.value = 0.1
    rows, generated = trainer.sample(0)
    scores = trainer.score(rows, generated)
    before = {name: p.detach().clone() for name, p in trainer.value.named_parameters()}
    trainer.update(trainer.shape(rows, generated, scores), 0)
    moved = {name for name, p in trainer.value.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"score.weight"} | {
        f"{n}.{part}" for n in adapters_of(trainer.value) for part in ("lora_A", "lora_B")
    }
    assert equal(dict(trainer.reward.model.state_dict()), dict(load_scalar_model(folders.reward).state_dict()))
    assert torch.equal(trainer.score(rows, generated), scores)
    shared = {p.data_ptr() for p in trainer.reward.model.parameters()} & {
        p.data_ptr() for p in trainer.value.parameters()
    }
    assert len(shared) == len(list(trainer.reward.model.model.parameters()))


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_cut_off_and_resumed_is_uninterrupted(
    make: Make, module_of, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Killed in the fourth round, after the checkpoint of the second: equal to the bit, log included."""
    stage, config = stage_of(kind, module_of)
    whole = make("whole", table=kind)
    stage.run(config, whole)
    update = stage.Trainer.update

    def dying(self, batch, round_):
        if round_ == 3:
            raise KeyboardInterrupt
        return update(self, batch, round_)

    monkeypatch.setattr(stage.Trainer, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        stage.run(config, make("cut", table=kind))
    monkeypatch.setattr(stage.Trainer, "update", update)
    resumed = make("cut", table=kind)
    stage.run(config, resumed)
    assert equal(saved_weights(whole), saved_weights(resumed))
    assert story(whole) == story(resumed)


def test_what_is_rewarded_grows(make: Make, module_of) -> None:
    """GRPO with adapters alone raises the share of even ids from a half to well above."""
    _, config = stage_of("grpo", module_of)
    run = make("grows", table="grpo")
    grpo.run(dataclasses.replace(config, iterations=16, beta=0.0), run)
    rewards = [value for _, value in read_metrics(run.dir)["rollout/reward"]]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
