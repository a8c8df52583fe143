"""recipes/from_hf.toml: from a foreign model folder of each family to an aligned model, tokenizer and all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trivium.config import ConfigError, Recipe, Waiting, load_recipe
from trivium.data.microworld import instructions, preference_prompts
from trivium.pipeline import run_recipe
from trivium.runs.registry import latest_runs

from .conftest import ROOT

transformers = pytest.importorskip("transformers")
FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "olmo2": "Olmo2"}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def foreign_model(folder: Path, family: str) -> None:
    """Save a random two-layer model of the family with a tokenizer that is not ours (ChatML, no BOS)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [m.content for c in instructions(0, num=200) for m in c.messages]
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    config = getattr(transformers, f"{FAMILIES[family]}Config")(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, eos_token_id=2, pad_token_id=0, bos_token_id=None,
        head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"{FAMILIES[family]}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe_for(tmp_path: Path, family: str) -> tuple[Recipe, dict[str, dict[str, Any]]]:
    """Return the shipped recipe with its two paths pointed here, and what makes it small."""
    foreign_model(tmp_path / "model", family)
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"messages": c.as_dicts()} for c in instructions(1, num=60)]
    (data / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": c.messages[-1].content} for c in preference_prompts(1, num=16)]
    (data / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    text = (ROOT / "recipes" / "from_hf.toml").read_text()
    path = tmp_path / "from_hf.toml"
    path.write_text(text)
    fit = {"steps": 3, "batch_size": 4, "micro_batch_size": 2}
    sampling = {"max_new_tokens": 8}
    return load_recipe(path), {
        "sft": {"fit": fit, "heldout_frac": 0.2},
        "collect_comparisons": {"sampling": sampling, "num_responses": 3},
        "reward_model": {"fit": fit, "heldout_frac": 0.3},
        "ppo": {"iterations": 2, "batch_size": 4, "sampling": sampling},
        "dpo": {"fit": fit, "heldout_frac": 0.3},
        "evaluate": {"num_win_rate_prompts": 4, "max_new_tokens": 8},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_starts_from_a_local_folder(tmp_path: Path, family: str) -> None:
    """The tuned model loads in transformers, family kept, with the tokenizer and template it came with."""
    recipe, small = recipe_for(tmp_path, family)
    run_recipe(recipe, workspace=tmp_path / "w", only=["sft"], overrides=small)
    folder = latest_runs(tmp_path / "w")["sft"][0] / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == family
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = [{"role": "user", "content": "Hello."}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n"


def test_the_whole_recipe_once_people_have_ranked(tmp_path: Path) -> None:
    """It waits for people; with annotators in their place it goes on to an exported model."""
    recipe, small = recipe_for(tmp_path, "qwen2")
    with pytest.raises(Waiting, match="prompts to rank; run `trivium rank"):
        run_recipe(recipe, workspace=tmp_path / "w", overrides=small)
    small["collect_comparisons"]["annotators"] = "trivium.data.microworld:annotators"
    done = run_recipe(recipe, workspace=tmp_path / "w", overrides=small)
    assert set(done) == {"sft", "collect_comparisons", "reward_model", "ppo", "dpo", "evaluate", "export"}
    assert done["collect_comparisons"].summary["kinds"].keys() == {"simulated"}


def test_a_folder_that_holds_no_model_is_named(tmp_path: Path) -> None:
    """One sentence, before any work."""
    recipe, small = recipe_for(tmp_path, "llama")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no Hugging Face model folder at .*model"):
        run_recipe(recipe, workspace=tmp_path / "w", overrides=small)
