"""Adapters go to PEFT and come back: the same logits in all families, and what is no such adapter refused by name."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from trivium.models.adapter_folder import load_adapter, save_adapted, save_adapter
from trivium.models.config import ModelError
from trivium.models.heads import ScalarModel, score_at
from trivium.models.hf import load_model, load_scalar_model, save_model
from trivium.models.lora import LoraConfig, adapt, adapters_of
from trivium.models.transformer import Transformer

from .conftest import FAMILIES

CONFIG = LoraConfig(rank=3, alpha=5.0)


def learned(model, config: LoraConfig = CONFIG):
    """Return the model adapted, with an A and a B that matter."""
    adapt(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.lora_B.copy_(0.2 * torch.randn(adapter.lora_B.shape, generator=generator))
    return model


def plain(model: Transformer) -> Transformer:
    """Return a copy of a network."""
    made = Transformer(model.config)
    made.load_state_dict(model.state_dict())
    return made.eval()


def logits_of(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(ids))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest number: fp32 sums in another order."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.filterwarnings("error::UserWarning")  # how PEFT says that a tensor is missing or unknown
def test_peft_loads_what_is_written_here(family, tokens, reference, tmp_path):
    """`PeftModel.from_pretrained(their model, our folder)` gives our logits, and writes the same tensors again."""
    base = plain(family)
    model = learned(family)
    save_adapter(tmp_path / "ours", model)
    theirs = peft.PeftModel.from_pretrained(reference(base), tmp_path / "ours").eval()
    ids = tokens(2, 12)
    with torch.no_grad():
        close(logits_of(model, ids), theirs(input_ids=ids).logits)
    theirs.save_pretrained(tmp_path / "again")
    ours, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "again"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    first, second = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "again"))
    assert {key: first[key] for key in ("r", "lora_alpha", "task_type")} == {
        key: second[key] for key in ("r", "lora_alpha", "task_type")
    }
    assert set(first["target_modules"]) == set(second["target_modules"])


CHOICES = {
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["lm_head"], "init_lora_weights": "gaussian"},
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "pattern": {"target_modules": r".*\.layers\.1\.mlp\.(up|down)_proj"},
    "some-layers": {"target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [0, 2], "use_rslora": True},
}


@pytest.mark.parametrize(
    ("family", "choice"),
    [(name, "all-linear") for name in FAMILIES] + [("qwen3", choice) for choice in list(CHOICES)[1:]],
    indirect=["family"],
)
def test_what_peft_writes_is_loaded_here_and_written_back(family, choice, tokens, reference, tmp_path):
    """Any choice of matrices; loaded, the logits are PEFT's, and saved again PEFT reads it as before."""
    base = plain(family)
    wrapped = peft.get_peft_model(
        reference(base), peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, task_type="CAUSAL_LM", **CHOICES[choice])
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    wrapped.eval().save_pretrained(tmp_path / "theirs")
    model = load_adapter(tmp_path / "theirs", plain(family))
    ids = tokens(2, 12)
    with torch.no_grad():
        wanted = wrapped(input_ids=ids).logits
    close(logits_of(model, ids), wanted)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.{part}" for name in adapters_of(model) for part in ("lora_A", "lora_B")
    }
    save_adapter(tmp_path / "ours", model)
    again = peft.PeftModel.from_pretrained(reference(base), tmp_path / "ours").eval()
    with torch.no_grad():
        close(again(input_ids=ids).logits, wanted)


def test_the_model_beside_an_adapter_is_whole_and_plain(tiny, tokens, tmp_path):
    """`model/` loads here and in transformers as any other and computes what the adapted network does."""
    model = learned(tiny(tie_word_embeddings=True))
    save_adapted(tmp_path, model, eos_token_id=7)
    ids = tokens(2, 12)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert theirs.generation_config.eos_token_id == 7
    with torch.no_grad():
        close(theirs(input_ids=ids).logits, logits_of(model, ids))
    close(logits_of(load_model(tmp_path / "model"), ids), logits_of(model, ids))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    save_adapted(tmp_path / "none", tiny())
    assert not (tmp_path / "none" / "adapter").exists()


def test_a_scalar_model_s_adapter_has_its_head_and_is_peft_s_too(tiny, tokens, tmp_path):
    """A classifier of one label: PEFT's scores at the last token are ours, here, there and back."""
    bare = ScalarModel.from_transformer(tiny(), seed=2)
    save_model(tmp_path / "base", bare)
    model = learned(bare)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(5))
    save_adapted(tmp_path, model)
    ids = tokens(3, 10)
    with torch.no_grad():
        wanted = score_at(model(ids), torch.full((3,), 10))
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        close(theirs(input_ids=ids).logits[:, 0], wanted)
        theirs.save_pretrained(tmp_path / "again")
        for folder in ("adapter", "again"):
            loaded = load_adapter(tmp_path / folder, load_scalar_model(tmp_path / "base"))
            close(score_at(loaded(ids), torch.full((3,), 10)), wanted)
        close(score_at(load_scalar_model(tmp_path / "model")(ids), torch.full((3,), 10)), wanted)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not LORA"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save = \['embed_tokens'\] is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern = .* is not supported"),
        ({"a_key_of_next_year": 1}, "a_key_of_next_year = 1 is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes W too"),
        ({"r": "many"}, "cannot be read as the config of an adapter"),
        ({"r": 2}, r"lora_A\.weight is \[3, 48\], and this network needs \[2, 48\]"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_name(tiny, tmp_path, changes, said):
    """Each in one sentence that names the key, and the network stays as it was."""
    save_adapter(tmp_path, learned(tiny()))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    model = tiny()
    with pytest.raises(ModelError, match=said):
        load_adapter(tmp_path, model)
    assert not adapters_of(model)
    assert all(p.requires_grad for p in model.parameters())


def test_tensors_that_do_not_fit_are_refused_by_name(tiny, tmp_path):
    """Another network's size, a missing half, embeddings, a damaged file, no folder at all."""
    with pytest.raises(ModelError, match="is not an adapter folder: it has no adapter_config"):
        load_adapter(tmp_path / "nowhere", tiny())
    with pytest.raises(ModelError, match="no adapters to save"):
        save_adapter(tmp_path, tiny())
    save_adapter(tmp_path, learned(tiny()))
    with pytest.raises(ModelError, match=r"layers\.2\.[\w.]+, where this network can have no adapter"):
        load_adapter(tmp_path, tiny(num_hidden_layers=2))
    with pytest.raises(
        ModelError, match=r"mlp\.down_proj\.lora_A\.weight is \[3, 48\], and this network needs \[3, 40\]"
    ):
        load_adapter(tmp_path, tiny(intermediate_size=40))
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    lost = tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
    save_file(tensors, weights)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.self_attn\.q_proj\.lora_B\.weight"):
        load_adapter(tmp_path, tiny())
    save_file(tensors | {"base_model.model.lm_head.lora_B.weight": lost}, weights)
    with pytest.raises(ModelError, match="lm_head, where this network can have no adapter"):
        load_adapter(tmp_path, tiny())
    save_file(tensors | {"base_model.model.model.embed_tokens.lora_embedding_A": lost}, weights)
    with pytest.raises(ModelError, match="lora_embedding_A, which is no part of such an adapter"):
        load_adapter(tmp_path, tiny())
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(ModelError, match="is damaged"):
        load_adapter(tmp_path, tiny())
    weights.unlink()
    with pytest.raises(ModelError, match=r"lacks adapter_model\.safetensors"):
        load_adapter(tmp_path, tiny())
