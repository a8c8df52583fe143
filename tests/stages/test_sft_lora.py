"""Fine-tuning with adapters: what moves, what is left behind, and that cut off and resumed is uninterrupted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from trivium.config import ConfigError, build, facts
from trivium.data import microworld
from trivium.data.tokenizer import Tokenizer
from trivium.models.adapter_folder import load_adapter
from trivium.models.hf import load_model, read_stop_ids
from trivium.models.lora import LoraConfig
from trivium.records import write_jsonl
from trivium.runs.events import read_metrics
from trivium.runs.manifest import Run
from trivium.stages import sft
from trivium.training import checkpoint_folder
from trivium.training.loop import FitConfig
from trivium.training.optim import OptimConfig

from .conftest import equal, saved_weights, story

CONFIG = sft.Config(
    data=("talks.jsonl",),
    context=96,
    heldout_frac=0.2,
    fit=FitConfig(steps=12, batch_size=8, log_every=1, eval_every=6, save_every=5, optim=OptimConfig(lr=2e-2)),
    lora=LoraConfig(rank=4),
)
Make = Callable[..., Run]


@pytest.fixture
def make(stage_run: Make, outspoken: Path, tmp_path) -> Make:
    """Return a maker of SFT runs over fifty conversations."""
    write_jsonl(tmp_path / "talks.jsonl", [{"messages": t.as_dicts()} for t in microworld.instructions(5, num=50)])
    return partial(stage_run, parents={"init": outspoken}, table="sft")


def adapters_in(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.dir / "adapter" / "adapter_model.safetensors")


def test_a_run_learns_and_leaves_a_plain_model_with_the_adapter_beside_it(
    make: Make, outspoken: Path, tiny_tokenizer: Tokenizer
) -> None:
    """Only matrices of blocks differ from the start; start plus adapter is the model, for us and for PEFT."""
    run = make("run")
    sft.run(CONFIG, run)
    curves = read_metrics(run.dir)
    assert curves["train/loss"][-1][1] < curves["train/loss"][0][1] - 0.2
    assert read_stop_ids(run.dir / "model") == {tiny_tokenizer.end_id}
    start, model = load_model(outspoken), load_model(run.dir / "model")
    before, after = start.state_dict(), model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith("proj.weight")
    }
    ids = torch.randint(5, 400, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.logits(model(ids))
        ours = load_adapter(run.dir / "adapter", load_model(outspoken))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(outspoken)
        theirs = peft.PeftModel.from_pretrained(theirs, run.dir / "adapter").eval()
        for logits in (ours.logits(ours(ids)), theirs(input_ids=ids).logits):
            torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    manifest = run.finish("done")
    assert {"adapter/adapter_config.json", "model/model.safetensors"} <= {a.path for a in manifest.artifacts}
    told = manifest.summary["lora"]
    assert told == {
        "rank": 4,
        "alpha": 16.0,
        "num_matrices": 14,
        "num_trainable": sum(tensor.numel() for tensor in adapters_in(run).values()),
    }
    # Per layer, width 16, queries 16, keys 8, MLP 32: 4 (32 + 24 + 24 + 32 + 3 * 48).
    assert told["num_trainable"] == 2 * 4 * 256
    assert manifest.summary["num_parameters"] == start.config.num_parameters()


def test_cut_off_and_resumed_is_uninterrupted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the evaluation of step 6, after the checkpoint of step 5: weights, adapters and log equal to the bit.

    A checkpoint holds the adapters and their two moments, and nothing of what is frozen.
    """
    whole = make("whole")
    sft.run(CONFIG, whole)
    respond = sft.respond

    def dying(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "respond", dying)
    with pytest.raises(KeyboardInterrupt):
        sft.run(CONFIG, make("cut"))
    monkeypatch.setattr(sft, "respond", respond)
    resumed = make("cut")
    kept, _ = checkpoint_folder.read(checkpoint_folder.listing(resumed.dir / "checkpoints")[-1])
    weights = {name for name in kept if name.startswith("model/")}
    assert len(weights) == 2 * 14
    assert all(name.endswith(("lora_A", "lora_B")) for name in weights)
    # Two moments of A and B each, and a count of steps.
    assert sum(t.numel() for n, t in kept.items() if "#optimizer" in n) == 2 * 2 * 4 * 256 + len(weights)
    sft.run(CONFIG, resumed)
    assert equal(saved_weights(whole), saved_weights(resumed))
    assert equal(adapters_in(whole), adapters_in(resumed))
    assert story(whole) == story(resumed)


def test_an_average_of_adapters_is_exported_merged(make: Make) -> None:
    """With `ema_decay` the adapters left behind are the average, and the model beside them is merged from it."""
    plain, averaged = make("plain"), make("averaged")
    sft.run(CONFIG, plain)
    sft.run(dataclasses.replace(CONFIG, fit=dataclasses.replace(CONFIG.fit, ema_decay=0.9)), averaged)
    assert not equal(adapters_in(plain), adapters_in(averaged))
    start = load_model(averaged.model("init"))
    name = "model.layers.0.mlp.up_proj"
    a, b = (adapters_in(averaged)[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    wanted = start.state_dict()[f"{name}.weight"] + 4.0 * b @ a  # alpha / rank = 16 / 4
    torch.testing.assert_close(saved_weights(averaged)[f"{name}.weight"], wanted, rtol=1e-6, atol=1e-6)


def test_without_a_rank_there_is_no_adapter_and_the_run_is_the_one_it_was(make: Make) -> None:
    """Rank 0 whatever else is set: no folder, nothing in the manifest, and the identity of no such table."""
    run = make("none")
    sft.run(dataclasses.replace(CONFIG, lora=LoraConfig(alpha=3.0, targets="mlp")), run)
    assert not (run.dir / "adapter").exists()
    assert "lora" not in run.finish("done").summary
    off = build(sft.Config, {"lora": {"rank": 0, "targets": "mlp"}}, where="[sft]")
    assert facts(off) == facts(sft.Config())
    assert "lora" not in facts(off)
    on = build(sft.Config, {"lora": {"rank": 2}}, where="[sft]")
    assert facts(on)["lora"] == {"rank": 2, "alpha": 16.0, "targets": "both"}


def test_foreseeable_mistakes_are_one_sentence(make: Make) -> None:
    """A rank that no key matrix can have, a target that does not exist: what it is and what it may be."""
    with pytest.raises(
        ConfigError, match=r"lora\.rank = 9: model\.layers\.0\.self_attn\.k_proj is 8 x 16, so 8 is the"
    ):
        sft.run(dataclasses.replace(CONFIG, lora=LoraConfig(rank=9)), make("rank"))
    with pytest.raises(ConfigError, match=r"\[sft\] lora: targets = 'all': must be one of attention, mlp, both"):
        build(sft.Config, {"lora": {"rank": 2, "targets": "all"}}, where="[sft]")
