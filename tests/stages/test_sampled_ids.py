"""Row 16: trained ids are the sampled ids, also where no text leads back to them.

A random network samples what no tokenizer would write: cut characters, words in unusual pieces, control tokens. Decoded
and encoded again nearly all become other ids, which is what would be trained if text were the currency.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trivium.batches import IGNORE
from trivium.data.tokenizer import Tokenizer
from trivium.models.generate import Generated
from trivium.preferences.store import Store
from trivium.records import Completion, write_jsonl
from trivium.runs.manifest import Run
from trivium.stages import collect_comparisons, grpo, ppo
from trivium.training.judgements import completion_ids
from trivium.training.rollout import SampleConfig, to_tokens

from .conftest import Folders

SAMPLING = SampleConfig(max_new_tokens=12, temperature=1.5)
Make = Callable[..., Run]


def changed(tokenizer: Tokenizer, made: list[Generated]) -> int:
    """Return how many completions come back from text as other ids."""
    return sum(tokenizer.encode(tokenizer.decode(one.token_ids)) != list(one.token_ids) for one in made)


@pytest.fixture
def make(stage_run: Make, folders: Folders, tmp_path: Path) -> Make:
    """Return a maker of runs over four prompts."""
    write_jsonl(tmp_path / "prompts.jsonl", ({"prompt": f"Count to {n}."} for n in range(4)))
    parents = {"policy": folders.policy, "reward_model": folders.reward}
    return lambda name, table: stage_run(name, parents, table=table)


@pytest.mark.parametrize("stage", [ppo, grpo], ids=["ppo", "grpo"])
def test_what_was_sampled_is_what_is_trained(
    make: Make, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, module_of: Make, stage: object
) -> None:
    """Target by target, in every minibatch that reaches the step."""
    made: list[Generated] = []
    trained: list[list[int]] = []
    sample, step = stage.Trainer.sample, stage.train_step

    def sampling(self: object, round_: int) -> tuple[list[int], list[Generated]]:
        rows, generated = sample(self, round_)
        made.extend(generated)
        return rows, generated

    def stepping(objective: object, parts: list, optimizer: object, **named: object) -> object:
        for part in parts:
            trained.extend([token for token in row if token != IGNORE] for row in part.tokens.targets.tolist())
        return step(objective, parts, optimizer, **named)

    monkeypatch.setattr(stage.Trainer, "sample", sampling)
    monkeypatch.setattr(stage, "train_step", stepping)
    shared = {"prompts": ("prompts.jsonl",), "iterations": 2, "sampling": SAMPLING}
    if stage is ppo:
        ppo.run(ppo.Config(**shared, batch_size=6, epochs=1), make("ids", "ppo"))
        made = [one for one in made for _ in ("policy", "value")]
    else:
        name = module_of(first=lambda prompts, completions: [c.token_ids[0] / 100 for c in completions])
        config = grpo.Config(**shared, prompts_per_round=4, group_size=3, rewards={f"{name}:first": 1.0})
        grpo.run(config, make("ids", "grpo"))
    assert changed(tiny_tokenizer, made) > len(made) / 2, "the tokenizer is no adversary"
    assert sorted(trained) == sorted(list(one.token_ids) for one in made)


def test_stored_judgements_keep_the_sampled_ids(make: Make, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    """From sampling through the database to the rows of reward model and DPO."""
    config = collect_comparisons.Config(
        prompts=("prompts.jsonl",),
        num_responses=3,
        annotators="trivium.data.microworld:annotators",
        overlap=1,
        sampling=SAMPLING,
    )
    run = make("asked", "collect_comparisons")
    collect_comparisons.run(config, run)
    with Store(tmp_path / "preferences.db") as store:
        named = {c for ranking in store.rankings(run.id) for group in ranking.groups for c in group}
        kept = [store.completion(identity) for identity in sorted(named)]
    again = [tiny_tokenizer.encode(completion.text) for completion in kept]
    assert sum(list(c.token_ids) != ids for c, ids in zip(kept, again, strict=True)) > len(kept) / 2
    assert all(completion_ids(completion, tiny_tokenizer) == list(completion.token_ids) for completion in kept)


def test_ids_that_do_not_spell_the_text_are_not_believed(tiny_tokenizer: Tokenizer) -> None:
    """Another tokenizer's ids, and ids out of range: the text is encoded and closed with the end of the turn."""
    text = "the mill"
    wanted = [*tiny_tokenizer.encode(text), tiny_tokenizer.end_id]
    for ids in ((9, 10, 11), (10**6,), ()):
        assert completion_ids(Completion(prompt_id="p", text=text, token_ids=ids), tiny_tokenizer) == wanted


def test_targets_hold_the_very_ids() -> None:
    """By hand: prompt 5 6, completion 7 2."""
    batch = to_tokens([[5, 6]], [[7, 2]], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7]] and batch.targets.tolist() == [[IGNORE, 7, 2]]
