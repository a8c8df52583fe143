"""GRPO on a random network: groups stay whole, equal rewards teach nothing, and what is rewarded grows."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch

from trivium.config import ConfigError, UserError, facts
from trivium.losses.logprobs import masked_sum, token_logprobs
from trivium.models.hf import load_model
from trivium.records import write_jsonl
from trivium.rewards.learned import LearnedReward
from trivium.runs.events import read_events, read_metrics
from trivium.runs.manifest import Run
from trivium.stages import grpo
from trivium.training.optim import OptimConfig
from trivium.training.rollout import SampleConfig

from .conftest import Folders, equal, saved_weights, story

ADAMW = OptimConfig(kind="adamw", lr=1e-2, weight_decay=0.0)
CONFIG = grpo.Config(
    prompts=("prompts.jsonl",),
    iterations=4,
    prompts_per_round=3,
    group_size=4,
    minibatches=2,
    save_every=2,
    optim=ADAMW,
    sampling=SampleConfig(max_new_tokens=5),
)
Make = Callable[..., Run]


def even(prompts, completions) -> list[float]:
    """Return the share of even ids in each completion."""
    return [sum(i % 2 == 0 for i in c.token_ids) / len(c.token_ids) for c in completions]


@pytest.fixture
def make(stage_run: Make, folders: Folders, tmp_path) -> Make:
    """Return a maker of GRPO runs over five prompts."""
    rows = [{"prompt": f"{n} + 3 = ?", "check": {"kind": "number", "answer": str(n + 3)}} for n in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return partial(stage_run, parents={"policy": folders.policy}, table="grpo")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_equal_rewards_move_nothing(make: Make, folders: Folders, module_of, kind: str, beta: float) -> None:
    """Every reward 0.3, policy at the reference: advantages exactly 0, KL exactly 0, weights equal to the bit."""
    name = module_of(same=lambda prompts, completions: [0.3] * len(completions))
    optim = dataclasses.replace(ADAMW, kind=kind)
    config = dataclasses.replace(CONFIG, rewards={f"{name}:same": 1.0}, optim=optim, beta=beta)
    run = make("equal")
    grpo.run(config, run)
    assert equal(saved_weights(run), dict(load_model(folders.policy).state_dict()))
    curves = read_metrics(run.dir)
    assert {value for _, value in curves["rollout/zero_variance_frac"]} == {1.0}
    assert {value for _, value in curves["rollout/kl"]} == {0.0}


def test_groups_stay_whole_through_sampling_and_minibatches(
    make: Make, module_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every minibatch holds whole groups; a round gives every drawn prompt exactly group_size completions (row 52)."""
    seen: list[list[int]] = []
    rounds: list[tuple[list[int], torch.Tensor]] = []
    select, shape = grpo.select_rows, grpo.Trainer.shape

    def noting_rows(batch, rows):
        seen[-1] += rows.tolist()
        for group in rows.view(-1, CONFIG.group_size).tolist():
            assert group == list(range(group[0], group[0] + CONFIG.group_size))
            assert group[0] % CONFIG.group_size == 0
        return select(batch, rows)

    def noting_round(self, rows, generated, rewards):
        batch = shape(self, rows, generated, rewards)
        seen.append([])
        rounds.append((list(rows), batch.advantages))
        return batch

    monkeypatch.setattr(grpo, "select_rows", noting_rows)
    monkeypatch.setattr(grpo.Trainer, "shape", noting_round)
    grpo.run(dataclasses.replace(CONFIG, rewards={f"{module_of(even=even)}:even": 1.0}), make("groups"))
    for (rows, advantages), used in zip(rounds, seen, strict=True):
        assert sorted(used) == list(range(12))  # each completion is trained on once
        for start in range(0, 12, 4):
            assert len(set(rows[start : start + 4])) == 1
            assert float(advantages[start : start + 4].amax(1).sum() + advantages[start : start + 4].amin(1).sum()) == (
                pytest.approx(0, abs=1e-4)
            )
    drawn = Counter(row for rows, _ in rounds for row in rows)
    assert sum(drawn.values()) == 4 * 12
    assert set(drawn) == set(range(5))
    # Two epochs of five prompts are ten of the twelve groups: nobody falls behind by more than one group.
    assert {count // 4 for count in drawn.values()} <= {2, 3}


def test_the_first_minibatch_is_the_plain_group_policy_gradient(make: Make) -> None:
    """At ratio 1 and KL 0 the gradient is that of -A log p; the advantages of a group sum to 0 (row 51)."""
    config = dataclasses.replace(CONFIG, scale="none", beta=0.1)
    trainer = grpo.Trainer(config, make("gradient"))
    rows, generated = trainer.sample(0)
    rewards = torch.tensor(even([], [type("C", (), {"token_ids": g.token_ids}) for g in generated]))
    batch = trainer.shape(rows, generated, rewards)
    centred = rewards.view(-1, 4) - rewards.view(-1, 4).mean(1, keepdim=True)
    assert torch.allclose(batch.advantages[batch.mask], centred.flatten()[:, None].expand_as(batch.mask)[batch.mask])
    grads = []
    for total in (
        lambda: grpo.objective(trainer.policy, config, batch).total,
        lambda: -(logprobs_of(trainer, batch) * batch.advantages).sum(),
    ):
        trainer.policy.zero_grad()
        total().backward()
        grads.append({name: p.grad.clone() for name, p in trainer.policy.named_parameters()})
    assert all(torch.allclose(grads[0][name], grads[1][name], rtol=1e-3, atol=1e-5) for name in grads[0])


def logprobs_of(trainer: grpo.Trainer, batch) -> torch.Tensor:
    logits = trainer.policy.logits(trainer.policy(batch.tokens.input_ids, positions=batch.tokens.positions))
    return token_logprobs(logits, batch.tokens.targets)


def test_what_is_rewarded_grows(make: Make, module_of) -> None:
    """Reward = share of even ids, from about a half towards one; the manifest sums the last rounds up."""
    config = dataclasses.replace(
        CONFIG,
        iterations=24,
        prompts_per_round=4,
        group_size=8,
        minibatches=4,
        beta=0.0,
        save_every=100,
        rewards={f"{module_of(even=even)}:even": 1.0},
        sampling=SampleConfig(max_new_tokens=2),
    )
    run = make("learns")
    grpo.run(config, run)
    curve = [value for _, value in read_metrics(run.dir)["rollout/reward"]]
    assert curve[0] < 0.7
    assert sum(curve[-3:]) / 3 > 0.85
    manifest = run.finish("done")
    assert {r.metric: r.value for r in manifest.results}["reward"] == pytest.approx(sum(curve[-5:]) / 5)
    assert manifest.summary["data"]["num_completions"] == 24 * 32


VARIANTS = {
    "dr_grpo": {"scale": "none", "aggregate": "constant"},
    "grpo_per_completion": {"aggregate": "completion"},
    "rloo": {"estimator": "rloo"},
    "reinforce++": {"estimator": "reinforce++"},
    "one_each": {"estimator": "reinforce++", "group_size": 1, "prompts_per_round": 5, "aggregate": "completion"},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_what_is_rewarded_grows_with_every_estimator(make: Make, module_of, variant: str) -> None:
    """As above. One completion each of five prompts is a sixth of the samples, and gets more rounds."""
    shape = {"iterations": 24, "prompts_per_round": 4, "group_size": 8, "minibatches": 4, "save_every": 100}
    if variant == "one_each":
        shape |= {"iterations": 120, "minibatches": 1}
    config = dataclasses.replace(CONFIG, **shape, beta=0.0, sampling=SampleConfig(max_new_tokens=2))
    config = dataclasses.replace(config, rewards={f"{module_of(even=even)}:even": 1.0}, **VARIANTS[variant])
    run = make(variant)
    grpo.run(config, run)
    curves = read_metrics(run.dir)
    curve = [value for _, value in curves["rollout/reward"]]
    assert sum(curve[:3]) / 3 < 0.7
    assert sum(curve[-3:]) / 3 > 0.85
    assert ("rollout/zero_variance_frac" in curves) is (config.estimator != "reinforce++")
    assert run.finish("done").summary["data"]["num_completions"] == config.iterations * (
        5 if config.group_size < 2 else 32
    )


@pytest.mark.parametrize("estimator", ["rloo", "reinforce++"])
def test_equal_rewards_move_nothing_where_the_kl_is_a_reward(
    make: Make, folders: Folders, module_of, estimator
) -> None:
    """At the reference the KL is exactly 0, so the advantages are, and the weights stay equal to the bit (row 51)."""
    name = module_of(same=lambda prompts, completions: [0.3] * len(completions))
    config = dataclasses.replace(CONFIG, rewards={f"{name}:same": 1.0}, estimator=estimator, beta=0.5)
    run = make(estimator)
    grpo.run(config, run)
    assert equal(saved_weights(run), dict(load_model(folders.policy).state_dict()))


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"one_each"}))
def test_the_first_minibatch_of_each_is_its_weighted_policy_gradient(make: Make, variant: str) -> None:
    """At ratio 1 and KL 0: -A log p, summed and divided by tokens, by a completion's tokens, by the limit, or by 1."""
    config = dataclasses.replace(CONFIG, beta=0.1, **VARIANTS[variant])
    trainer = grpo.Trainer(config, make("gradient"))
    rows, generated = trainer.sample(0)
    generated[0] = dataclasses.replace(generated[0], token_ids=generated[0].token_ids[:2])
    rewards = torch.tensor(even([], [type("C", (), {"token_ids": g.token_ids}) for g in generated]))
    batch = trainer.shape(rows, generated, rewards)
    lengths = batch.mask.sum(1)
    assert len(set(lengths.tolist())) > 1
    grouped = rewards.view(-1, 4)
    each = rewards.repeat_interleave(lengths)  # a round's tokens, for reinforce++
    advantages, weights, items = {
        "dr_grpo": (grouped - grouped.mean(1, keepdim=True), torch.full((12,), 1 / 5), 12),
        "grpo_per_completion": (
            (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4), 1 / lengths, 12
        ),
        "rloo": (grouped - (grouped.sum(1, keepdim=True) - grouped) / 3, torch.ones(12), 12),
        "reinforce++": ((grouped - each.mean()) / each.std(), torch.ones(12), int(lengths.sum())),
    }[variant]  # fmt: skip
    assert int(batch.num_items) == items
    grads = []
    for total in (
        lambda: grpo.objective(trainer.policy, config, batch).total,
        lambda: -(logprobs_of(trainer, batch).sum(1) * advantages.flatten() * weights).sum(),
    ):
        trainer.policy.zero_grad()
        total().backward()
        grads.append({name: p.grad.clone() for name, p in trainer.policy.named_parameters()})
    assert max(float(grad.abs().max()) for grad in grads[1].values()) > 1e-2
    assert all(torch.allclose(grads[0][name], grads[1][name], rtol=1e-3, atol=1e-5) for name in grads[0])


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_split_over_ranks_adds_up_to_the_whole(make: Make, variant: str) -> None:
    """Totals and items of any two parts of a round are those of the round: the step divides once, by all of them."""
    config = dataclasses.replace(CONFIG, beta=0.1, **VARIANTS[variant])
    trainer = grpo.Trainer(config, make("split"))
    rows, generated = trainer.sample(0)
    generated[0] = dataclasses.replace(generated[0], token_ids=generated[0].token_ids[:1])
    batch = trainer.shape(rows, generated, torch.linspace(0, 1, len(rows)).square())
    whole = grpo.objective(trainer.policy, config, batch).total
    parts = [grpo.select_rows(batch, torch.arange(start, len(rows), 2)) for start in (0, 1)]
    assert sum(int(part.num_items) for part in parts) == int(batch.num_items)
    total = sum(grpo.objective(trainer.policy, config, part).total.item() for part in parts)
    assert total == pytest.approx(whole.item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce++"])
def test_the_leash_pulls_a_policy_back(make: Make, module_of, estimator: str) -> None:
    """No reward, a large beta, a policy that starts away from the reference: its KL falls (row 37)."""
    name = module_of(none=lambda prompts, completions: [0.0] * len(completions))
    config = dataclasses.replace(
        CONFIG,
        iterations=16 if estimator == "grpo" else 32,  # a KL that is sampled, not differentiated, is noisier
        prompts_per_round=5,
        group_size=8,
        beta=1.0,
        rewards={f"{name}:none": 1.0},
        estimator=estimator,
    )
    trainer = grpo.Trainer(config, make("leash"))
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.2)
    kls = []
    for round_ in range(config.iterations):
        rows, generated = trainer.sample(round_)
        batch = trainer.shape(rows, generated, trainer.reward(rows, generated))
        kls.append(float(masked_sum(batch.old_logprobs - batch.ref_logprobs, batch.mask).mean()))
        trainer.update(batch, round_)
    assert kls[0] > 0.3
    assert sum(kls[-4:]) / 4 < 0.4 * sum(kls[:4]) / 4
    assert equal(dict(trainer.reference.state_dict()), dict(load_model(trainer.run.model("policy")).state_dict()))


def test_cut_off_at_any_round_and_resumed_is_uninterrupted(
    make: Make, module_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, log, results and summary are those of a run that was never cut."""
    config = dataclasses.replace(CONFIG, rewards={f"{module_of(even=even)}:even": 1.0})
    whole = make("whole")
    grpo.run(config, whole)
    expected = whole.finish("done")
    record = grpo.Trainer.record
    for cut in range(1, 5):

        def dying(self, batch, rows, generated, loss, step, cut=cut):
            if step == cut:
                raise KeyboardInterrupt
            return record(self, batch, rows, generated, loss, step)

        monkeypatch.setattr(grpo.Trainer, "record", dying)
        with pytest.raises(KeyboardInterrupt):
            grpo.run(config, make(f"cut{cut}"))
        monkeypatch.setattr(grpo.Trainer, "record", record)
        resumed = make(f"cut{cut}")
        grpo.run(config, resumed)
        assert equal(saved_weights(whole), saved_weights(resumed))
        assert story(whole) == story(resumed)
        manifest = resumed.finish("done")
        assert (manifest.summary, manifest.results) == (expected.summary, expected.results)


def test_rewards_are_weighted_and_see_prompts_and_sampled_ids(make: Make, module_of) -> None:
    """The sum is weight times reward; completions carry the sampled ids, the text and the prompt's check."""
    seen = []

    def looking(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [1 for _ in completions]  # whole numbers are rewards, too

    name = module_of(looking=looking, even=even)
    config = dataclasses.replace(CONFIG, rewards={f"{name}:looking": 0.5, f"{name}:even": 2.0})
    trainer = grpo.Trainer(config, make("weights"))
    rows, generated = trainer.sample(0)
    total = trainer.reward(rows, generated)
    shares = [sum(i % 2 == 0 for i in g.token_ids) / len(g.token_ids) for g in generated]
    assert total.tolist() == pytest.approx([0.5 + 2 * share for share in shares])
    for (prompt, completion), one in zip(seen, generated, strict=True):
        assert completion.token_ids == tuple(one.token_ids)
        assert completion.prompt_id == prompt.id
        assert completion.text == trainer.tokenizer.decode(one.token_ids)
        assert prompt.meta["check"]["kind"] == "number"


def test_a_reward_model_is_the_reward_that_rejection_sampling_and_ppo_have(make: Make, folders: Folders) -> None:
    """Its calibrated score of the sampled ids, alone or beside the table; without it the facts say nothing of it."""
    parents = {"policy": folders.policy, "reward_model": folders.reward}
    table = {"trivium.rewards.verifiable:ended": 0.5}
    alone = dataclasses.replace(CONFIG, rewards={}, reward_model="reward_model@latest")
    trainer = grpo.Trainer(alone, make("learned", parents=parents))
    rows, generated = trainer.sample(0)
    ids = [trainer.prompts.encoded[row] + g.token_ids for row, g in zip(rows, generated, strict=True)]
    expected = torch.tensor(LearnedReward.from_folder(folders.reward).score_ids(ids))
    assert torch.allclose(trainer.reward(rows, generated), expected, atol=1e-6)
    both = grpo.Trainer(dataclasses.replace(alone, rewards=table), make("both", parents=parents))
    cut = torch.tensor([g.finish_reason == "length" for g in generated])
    assert torch.allclose(both.reward(rows, generated), expected - 0.5 * cut, atol=1e-6)
    assert "reward_model" not in facts(CONFIG) and facts(alone)["reward_model"] == "reward_model@latest"
    with pytest.raises(ConfigError, match="name a reward, or a reward_model"):
        dataclasses.replace(CONFIG, rewards={})


def test_the_default_reward_reads_the_prompts_check(make: Make) -> None:
    """Out of the box, a completion earns 1 exactly when it passes the check of its prompt."""
    trainer = grpo.Trainer(CONFIG, make("check"))
    rows, generated = trainer.sample(0)
    right = trainer.tokenizer.encode(trainer.prompts.prompts[rows[0]].meta["check"]["answer"])
    generated[0] = dataclasses.replace(generated[0], token_ids=right, logprobs=[0.0] * len(right))
    rewards = trainer.reward(rows, generated)
    assert float(rewards[0]) == 1.0
    assert set(rewards.tolist()) <= {0.0, 1.0}


def test_fewer_prompts_than_a_round_wants_are_each_used_once(make: Make, module_of, tmp_path) -> None:
    """Two prompts for rounds of three: the round shrinks, no prompt is doubled within it."""
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a b"}, {"prompt": "c d"}])
    config = dataclasses.replace(CONFIG, iterations=2, minibatches=4, rewards={f"{module_of(even=even)}:even": 1.0})
    run = make("few")
    trainer = grpo.Trainer(config, run)
    assert sorted(trainer.sample(0)[0]) == [0] * 4 + [1] * 4
    grpo.run(config, run)
    assert len(read_metrics(run.dir)["train/loss"]) == 2
    assert all(len(e.value["tokens"]) == len(e.value["logprobs"]) for e in read_events(run.dir, kind="specimen"))


def test_foreseeable_mistakes_are_one_sentence(make: Make, tmp_path) -> None:
    """A group of one has no baseline; rewards that cannot be found are named; no prompts, no run."""
    with pytest.raises(ConfigError, match="group_size"):
        grpo.Config(group_size=1)
    with pytest.raises(ConfigError, match="no_such_module"):
        grpo.Trainer(dataclasses.replace(CONFIG, rewards={"no_such_module:f": 1.0}), make("missing"))
    (tmp_path / "prompts.jsonl").write_text("")
    with pytest.raises(UserError, match="no prompts"):
        grpo.run(CONFIG, make("empty"))


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ("scale", {"estimator": "rloo", "scale": "none"}),
        ("scale", {"estimator": "reinforce++", "scale": "none"}),
        ("aggregate", {"estimator": "rloo", "aggregate": "completion"}),
        ("group_size", {"estimator": "rloo", "group_size": 1}),
        ("aggregate", {"aggregate": "sequence"}),
        ("reinforce", {"estimator": "reinforce"}),
    ],
)
def test_a_setting_that_means_nothing_to_the_estimator_is_refused_by_name(named: str, settings) -> None:
    """Row 48's rule: nothing is ignored in silence."""
    with pytest.raises(ConfigError, match=named):
        grpo.Config(**settings)
