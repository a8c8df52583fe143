"""The export: equal logits and chat template in transformers, a card of what was measured, no foreign folder lost."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from trivium.config import RunSettings, UserError
from trivium.data.chat import render, render_prompt
from trivium.data.tokenizer import Tokenizer, train
from trivium.models.config import ModelConfig
from trivium.models.hf import load_model, save_model
from trivium.models.transformer import Transformer
from trivium.records import RunManifest
from trivium.runs.manifest import Run
from trivium.stages import export
from trivium.stages.export import Config, model_card, probe, publish, refuse_foreign

TEXTS = [
    f"The {thing} of {place} is {what}."
    for thing in ("harbour", "mill", "road")
    for place in ("Tolmin", "Bovec")
    for what in ("old", "small")
]


def start(workspace: Path, table: str, parents: dict | None = None, **facts) -> Run:
    manifest = RunManifest(
        run_id=f"{table}-{'0' * 12}",
        stage=table,
        table=table,
        status="running",
        fingerprint=table,
        config={},
        parents=parents or {},
        seed=3,
        started_at="2025-01-01T00:00:00+00:00",
        **facts,
    )
    return Run(
        manifest,
        folder=workspace / table / manifest.run_id,
        workspace=workspace,
        settings=RunSettings(),
        base=workspace,
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TEXTS * 4, 270)


def save(folder: Path, tokenizer: Tokenizer, **shape) -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id, **sizes, **shape,
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(5)
    tokenizer.save(folder)
    save_model(folder, model, eos_token_id=tokenizer.end_id)


@pytest.fixture
def workspace(tmp_path, tokenizer) -> Path:
    """Return a workspace with everything that a PPO model is made from, and an evaluation of it."""
    place = tmp_path / "tiny"
    prep = start(place, "data_prep", inputs={"trivium.data.microworld:documents": "ab" * 32})
    (prep.dir / "train.jsonl").write_text(
        '{"text": "a", "license": "CC0"}\n{"text": "b", "license": ""}\n{"text": "c", "license": "CC0"}\n'
    )
    prep.finish("done")
    base = start(place, "pretrain", {"corpus": prep.id})
    base.note(steps=700)
    base.finish("done")
    collect = start(place, "collect_comparisons", {"policy": base.id})
    collect.note(kinds={"simulated": 800, "human": 2})
    collect.finish("done")
    ppo = start(place, "ppo", {"policy": base.id, "comparisons": collect.id})
    save(ppo.dir / "model", tokenizer, qk_norm=True)
    ppo.note(steps=240)
    ppo.finish("done")
    judged = start(place, "evaluate", {"models.0": base.id, "models.1": ppo.id})
    judged.result("win_rate_vs_sft@1", "win_rate", 0.684, low=0.62, high=0.744, n=240, checkpoint="ppo")
    judged.note(judged_by="trivium.data.microworld:taste")
    judged.result("grammar@1", "accuracy", 0.931, n=100, checkpoint="pretrain")
    judged.finish("done")
    return place


def exported(workspace: Path, **config) -> Run:
    run = start(workspace, "export", {"model": "ppo-" + "0" * 12})
    export.run(Config(**config), run)
    run.finish("done")
    return run


def test_transformers_loads_the_folder_with_equal_logits(workspace):
    from transformers import AutoModelForCausalLM

    folder = exported(workspace).dir / "model"
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 270, size=(3, 40)))
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ours = load_model(folder).eval()
    with torch.no_grad():
        difference = (theirs(ids).logits - ours.logits(ours(ids))).abs().max()
    assert difference < 1e-5
    assert theirs.generation_config.eos_token_id == 7  # the end of a turn, not of a document


def test_transformers_renders_the_same_conversation(workspace, tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported(workspace).dir / "model")
    messages = [{"role": "user", "content": "Where is the mill?"}, {"role": "assistant", "content": "In Tolmin."}]
    whole = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    rendered = render(tokenizer, messages)
    assert whole["input_ids"] == rendered.input_ids
    assert whole["assistant_masks"] == [int(t) for t in rendered.trained]
    asked = theirs.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert asked == render_prompt(tokenizer, messages[:1])


def test_the_manifest_records_the_parity_and_the_lineage(workspace):
    run = exported(workspace)
    result = run.manifest.results[0]
    assert (result.task, result.value) == ("export_parity@1", 0.0)
    assert run.manifest.summary["lineage"] == [
        f"{t}-{'0' * 12}" for t in ("data_prep", "pretrain", "collect_comparisons", "ppo")
    ]
    names = {artifact.path for artifact in run.manifest.artifacts}
    assert names == {f"model/{n}" for n in (
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    )}  # fmt: skip


def test_an_export_that_differs_is_refused_and_removed(workspace, monkeypatch):
    def corrupted(folder, model, **facts):
        with torch.no_grad():
            model.model.embed_tokens.weight[5, 0] += 1e-3
        save_model(folder, model, **facts)

    monkeypatch.setattr(export, "save_model", corrupted)
    run = start(workspace, "export", {"model": "ppo-" + "0" * 12})
    with pytest.raises(UserError, match="differs"):
        export.run(Config(), run)
    assert not (run.dir / "model").exists()


def test_the_probe_tells_models_apart(workspace, tokenizer, tmp_path):
    save(tmp_path / "other", tokenizer, qk_norm=True, rope_theta=5_000.0)
    first = load_model(workspace / "ppo" / ("ppo-" + "0" * 12) / "model")
    assert torch.equal(probe(first), probe(first))
    assert not torch.equal(probe(first), probe(load_model(tmp_path / "other")))


def test_the_card_names_data_licences_judges_and_what_was_measured_on_this_model_only(workspace):
    card = (exported(workspace).dir / "model" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "800 rankings by SIMULATED annotators (programs, not people)" in card
    assert "2 rankings by people" in card
    assert "| win_rate_vs_sft@1 | win_rate | 0.684 | 0.620 to 0.744 | 240 |" in card
    assert "judged by trivium.data.microworld:taste (SIMULATED" in card
    assert "grammar" not in card  # measured on another model
    assert "CC0: 2 documents; not stated: 1 documents" in card
    assert "trivium.data.microworld:documents" in card
    assert "pretrain-000000000000` (pretrain, 700 steps, seed 3) from `data_prep-000000000000`" in card


def test_a_model_that_nobody_measured_or_ranked_says_so(tmp_path, tokenizer):
    save(tmp_path / "llama", tokenizer)
    run = start(tmp_path, "export", {"model": str(tmp_path / "llama")})
    card = model_card(run, [], num_parameters=12)
    assert "Not evaluated before it was exported." in card
    assert "No rankings went into this model." in card
    assert str(tmp_path) not in card


def test_a_half_precision_model_stays_one(tmp_path, tokenizer):
    save(tmp_path / "full", tokenizer)
    half = load_model(tmp_path / "full", dtype=torch.bfloat16)
    tokenizer.save(tmp_path / "half")
    save_model(tmp_path / "half", half)
    assert export.transform(tmp_path / "half", tmp_path / "out", "card") == 0.0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "out")]
    assert sizes[0] == sizes[1]


def test_the_copy_at_output_is_whole_and_a_second_export_replaces_it(workspace, tmp_path):
    run = exported(workspace, output=str(tmp_path / "my models" / "tiny"))
    copy = tmp_path / "my models" / "tiny"
    for path in (run.dir / "model").iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes()
    (copy / "stale.txt").write_text("from the first export")
    shutil.rmtree(run.dir)
    exported(workspace, output=str(copy))
    assert not (copy / "stale.txt").exists()
    assert [path.name for path in copy.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize("content", ["somebody's notes", "---\nlibrary_name: transformers\n---\n# another model"])
def test_a_folder_of_somebody_else_is_never_overwritten(workspace, tmp_path, content):
    other = tmp_path / "precious"
    other.mkdir()
    (other / "README.md").write_text(content)
    with pytest.raises(UserError, match="no Trivium export"):
        exported(workspace, output=str(other))
    assert (other / "README.md").read_text() == content
    assert not (workspace / "export" / ("export-" + "0" * 12) / "model").exists()  # refused before any work


def test_a_file_in_the_place_of_output_is_refused_and_an_empty_folder_is_not(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError):
        refuse_foreign(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    refuse_foreign(tmp_path / "empty")
    refuse_foreign(tmp_path / "new")


def test_a_copy_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    new, old = tmp_path / "new", tmp_path / "old"
    for folder, text in ((new, "new"), (old, "old")):
        folder.mkdir()
        (folder / "config.json").write_text(text)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.shutil, "copyfile", full)
    with pytest.raises(OSError, match="space"):
        publish(new, old)
    assert (old / "config.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
