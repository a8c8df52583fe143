"""DPO and the reward model with adapters: one network is policy and reference, and the frozen part never moves."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trivium.data.tokenizer import Tokenizer
from trivium.models.adapter_folder import load_adapter
from trivium.models.hf import load_model, load_scalar_model, read_extra
from trivium.models.lora import LoraConfig, adapters_of
from trivium.preferences.store import Store
from trivium.records import Completion, write_jsonl
from trivium.runs.events import read_metrics
from trivium.runs.manifest import Run
from trivium.stages import dpo, reward_model, sft
from trivium.training.loop import FitConfig
from trivium.training.optim import OptimConfig

from .conftest import ask, equal, rank_into, saved_weights, story

COLLECTION = "collect_comparisons-0"
FIT = FitConfig(steps=16, batch_size=8, log_every=1, eval_every=8, save_every=6, optim=OptimConfig(lr=2e-2))
LORA = LoraConfig(rank=4)
Make = Callable[..., Run]


@pytest.fixture
def make(stage_run: Make, outspoken: Path, tmp_path, tiny_tokenizer: Tokenizer) -> Make:
    """Return a maker of runs over 32 prompts; of three responses the one with more `river` is better."""
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
    parents = {"policy": outspoken, "init": outspoken, "comparisons": COLLECTION}
    return partial(stage_run, parents=parents)


def test_dpo_starts_at_ln_2_from_an_sft_that_was_itself_lora(make: Make, tmp_path) -> None:
    """The reference is the merged SFT, not the base below it (row 43): the first loss is ln 2 to fp32's rounding."""
    write_jsonl(tmp_path / "talks.jsonl", [{"prompt": f"Where is {n}?", "response": f"At {n}."} for n in range(60)])
    tuned = make("sft", table="sft")
    sft.run(sft.Config(data=("talks.jsonl",), heldout_frac=0.2, fit=FIT, lora=LORA), tuned)
    run = make("dpo", parents={"policy": tuned.dir / "model", "comparisons": COLLECTION}, table="dpo")
    dpo.run(dpo.Config(heldout_frac=0.25, fit=FIT, lora=LORA), run)
    curves = read_metrics(run.dir)
    assert curves["train/loss"][0][1] == pytest.approx(math.log(2), abs=1e-6)
    assert curves["train/loss"][-1][1] < 0.6
    base = load_model(tuned.dir / "model")
    assert not equal(dict(base.state_dict()), dict(load_model(tuned.model("init")).state_dict()))
    adapted = load_adapter(run.dir / "adapter", base)
    for name, adapter in adapters_of(adapted).items():
        assert torch.equal(adapter.merged(), saved_weights(run)[f"{name}.weight"])


def test_the_reference_is_the_frozen_network_before_and_after(
    make: Make, outspoken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One network is loaded; what of it is frozen, tied embeddings included, is the folder's to the bit at the end."""
    seen: list[torch.nn.Module] = []
    load = dpo.load_model
    monkeypatch.setattr(dpo, "load_model", lambda *args, **kw: seen.append(load(*args, **kw)) or seen[-1])
    run = make("frozen", table="dpo")
    dpo.run(dpo.Config(heldout_frac=0.25, fit=FIT, lora=LORA), run)
    assert len(seen) == 1
    start, trained = load_model(outspoken).state_dict(), seen[0].state_dict()
    assert all(torch.equal(start[name], trained[name]) for name in start)
    assert all(bool(adapter.lora_B.any()) for adapter in adapters_of(seen[0]).values())
    assert seen[0].lm_head.weight is seen[0].model.embed_tokens.weight


def test_dpo_cut_off_and_resumed_is_uninterrupted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at step 8: the reference's log-probabilities are computed again, from the start and not from step 6."""
    config = dpo.Config(heldout_frac=0.25, fit=FIT, lora=LORA)
    whole = make("whole", table="dpo")
    dpo.run(config, whole)
    measure = dpo.measure

    def dying(*_: object) -> dict[str, float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(dpo, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        dpo.run(config, make("cut", table="dpo"))
    monkeypatch.setattr(dpo, "measure", measure)
    resumed = make("cut", table="dpo")
    dpo.run(config, resumed)
    assert equal(saved_weights(whole), saved_weights(resumed))
    assert story(whole) == story(resumed)


def test_a_reward_model_of_adapters_and_a_head_learns_and_is_whole(make: Make, outspoken: Path) -> None:
    """It ranks held-out prompts rightly; below the head only matrices of blocks differ from the start."""
    run = make("rm", table="reward_model")
    fit = dataclasses.replace(FIT, steps=40)
    reward_model.run(reward_model.Config(heldout_frac=0.25, fit=fit, lora=LORA), run)
    manifest = run.finish("done")
    assert manifest.results[0].value > 0.8
    model = load_scalar_model(run.dir / "model")
    assert manifest.summary["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert manifest.summary["lora"]["num_matrices"] == 14
    assert {"reward_mean", "reward_std"} <= read_extra(run.dir / "model").keys()
    before = {name: tensor for name, tensor in load_model(outspoken).state_dict().items() if name != "lm_head.weight"}
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith("proj.weight")
    }
    head = load_file(run.dir / "adapter" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(head, after["score.weight"])
    assert bool(head.any())
