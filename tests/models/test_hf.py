import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from trivium.config import UserError
from trivium.models import hf
from trivium.models.heads import ScalarModel
from trivium.models.hf import (
    load_config,
    load_model,
    load_scalar_model,
    read_extra,
    read_stop_ids,
    save_model,
)


def equal_weights(a, b) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_transformers_loads_what_is_saved(family, tokens, tmp_path):
    save_model(tmp_path, family, eos_token_id=7)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert theirs.config.model_type == family.config.model_type
    assert equal_weights(theirs, family)
    ids = tokens(2, 20)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, family.logits(family(ids)), atol=1e-5)
    assert theirs.generation_config.eos_token_id == 7
    assert theirs.generation_config.pad_token_id == 0
    assert theirs.dtype == torch.float32


def test_a_round_trip_is_bit_equal(family, tmp_path):
    save_model(tmp_path, family)
    loaded = load_model(tmp_path)
    assert equal_weights(loaded, family)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == family.config.tie_word_embeddings
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) != family.config.tie_word_embeddings


@pytest.mark.parametrize("shard", ["50KB", "10GB"])
def test_folders_of_transformers_are_read(family, reference, tokens, tmp_path, shard):
    theirs = reference(family)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "50KB")
    loaded = load_model(tmp_path)
    assert equal_weights(loaded, theirs)
    ids = tokens(2, 20)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, loaded.logits(loaded(ids)), atol=1e-5)


def test_dtype_is_kept_on_disk_and_chosen_at_load(tiny, tmp_path):
    model = tiny(tie_word_embeddings=True).to(torch.bfloat16)
    save_model(tmp_path, model)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert load_model(tmp_path).lm_head.weight.dtype == torch.float32
    assert equal_weights(load_model(tmp_path, dtype=torch.bfloat16), model)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_extra_and_stop_ids_come_back(tiny, tmp_path):
    model = tiny(eos_token_id=(2, 7))
    save_model(tmp_path, model, extra={"reward_mean": 0.25})
    assert read_extra(tmp_path) == {"reward_mean": 0.25}
    assert read_stop_ids(tmp_path) == {2, 7}
    assert load_config(tmp_path).eos_token_id == (2, 7)
    save_model(tmp_path, model, eos_token_id=7)
    assert read_extra(tmp_path) == {}
    assert read_stop_ids(tmp_path) == {7}
    (tmp_path / "generation_config.json").unlink()
    assert read_stop_ids(tmp_path) == {2, 7}


def test_other_files_stay_and_shards_of_an_older_model_go(tiny, reference, tmp_path):
    reference(tiny()).save_pretrained(tmp_path, max_shard_size="50KB")
    (tmp_path / "tokenizer.json").write_text("{}")
    newer = tiny(tie_word_embeddings=True)
    save_model(tmp_path, newer)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert equal_weights(load_model(tmp_path), newer)


@pytest.mark.parametrize("failing", range(4))
def test_an_interrupted_save_leaves_no_half_model(tiny, tmp_path, monkeypatch, failing):
    """Whichever of the writes fails, the folder holds the old model whole, the new one whole, or no model at all."""
    old, new = tiny(), tiny(tie_word_embeddings=True)
    save_model(tmp_path, old)
    calls = iter(range(100))

    def breaking(function):
        def call(*args, **kwargs):
            if next(calls) == failing:
                raise OSError("No space left on device")
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(hf, "save_file", breaking(save_file))
    monkeypatch.setattr(os, "replace", breaking(os.replace))
    with pytest.raises(OSError, match="No space"):
        save_model(tmp_path, new)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*"))
    if failing == 0:
        assert equal_weights(load_model(tmp_path), old)
    else:
        with pytest.raises(UserError, match=r"config\.json"):
            load_model(tmp_path)
    save_model(tmp_path, new)
    assert equal_weights(load_model(tmp_path), new)


class TestRefusals:
    def test_no_folder(self, tmp_path):
        with pytest.raises(UserError, match="not a model folder"):
            load_model(tmp_path / "nowhere")

    def test_pickled_weights(self, tiny, tmp_path):
        save_model(tmp_path, tiny())
        (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"model\.safetensors"):
            load_model(tmp_path)

    def test_missing_unknown_and_misshapen_tensors(self, tiny, tmp_path):
        save_model(tmp_path, tiny())
        tensors = load_file(tmp_path / "model.safetensors")
        for changed, named in [
            ({k: v for k, v in tensors.items() if k != "model.norm.weight"}, r"lacks .*model\.norm\.weight"),
            ({**tensors, "stranger": torch.zeros(1)}, "unknown .*stranger"),
            ({**tensors, "model.norm.weight": torch.zeros(3)}, r"wrongly shaped .*model\.norm\.weight"),
        ]:
            save_file(changed, tmp_path / "model.safetensors")
            with pytest.raises(UserError, match=named):
                load_model(tmp_path)

    def test_damaged_file(self, tiny, tmp_path):
        save_model(tmp_path, tiny())
        whole = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="damaged"):
            load_model(tmp_path)

    def test_an_index_that_points_outside(self, tiny, reference, tmp_path):
        reference(tiny()).save_pretrained(tmp_path, max_shard_size="50KB")
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}}))
        with pytest.raises(UserError, match="outside"):
            load_model(tmp_path)

    def test_one_kind_of_model_is_not_the_other(self, tiny, tmp_path):
        model = tiny()
        save_model(tmp_path / "lm", model)
        save_model(tmp_path / "rm", ScalarModel.from_transformer(model))
        with pytest.raises(UserError, match="reward model"):
            load_model(tmp_path / "rm")
        with pytest.raises(UserError, match="no reward model"):
            load_scalar_model(tmp_path / "lm")

    def test_tied_in_the_config_but_not_in_the_file(self, tiny, tmp_path):
        model = tiny()
        save_model(tmp_path, model)
        written = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**written, "tie_word_embeddings": True}))
        with pytest.raises(UserError, match="lm_head"):
            load_model(tmp_path)
