"""Model folders: what Hugging Face transformers writes is read, and what is written transformers reads.

A folder may already hold other files (the tokenizer's). Every file appears under its name only when whole, and
`config.json` comes last: a folder without it is not a model, so an interrupted save is never mistaken for one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trivium.models.config import ModelConfig, ModelError
from trivium.models.families import read_config, write_config
from trivium.models.heads import ScalarModel
from trivium.models.transformer import Transformer
from trivium.records import atomic_write, fsync_folder

CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
EXTRA = "trivium"
"""The key of config.json under which Trivium keeps what transformers has no place for."""


def save_model(
    folder: Path,
    model: Transformer | ScalarModel,
    *,
    eos_token_id: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors`, in the dtype the weights have.

    `eos_token_id`: what ends generation, for a chat model the end of a turn (default: the config's). `extra`: kept
    under "trivium" in config.json, read back by `read_extra`. Raises OSError (a full disk) with no config.json left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    scalar = isinstance(model, ScalarModel)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings and not scalar:
        del tensors["lm_head.weight"]
    dtype = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    written = write_config(config, "ForSequenceClassification" if scalar else "ForCausalLM", dtype)
    if extra:
        written[EXTRA] = dict(extra)
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": written["eos_token_id"] if eos_token_id is None else eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    temporary = _write_weights(folder, tensors)
    try:
        # From here until the new config.json stands, the folder is no model: old config and new weights never meet.
        (folder / CONFIG).unlink(missing_ok=True)
        (folder / INDEX).unlink(missing_ok=True)
        for shard in folder.glob("model-*-of-*.safetensors"):
            shard.unlink()
        os.replace(temporary, folder / WEIGHTS)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    atomic_write(folder / GENERATION, _json(generation))
    atomic_write(folder / CONFIG, _json(written))


def load_model(folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Transformer:
    """Return the language model in a folder, on `device` in `dtype`; raises ModelError for what is not one."""
    folder = Path(folder)
    config = load_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    tensors = _load_tensors(folder, device, dtype)
    if "score.weight" in tensors:
        raise ModelError(f"{folder} holds a reward model, not a language model; name the folder of a language model.")
    if config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        embedding = tensors["model.embed_tokens.weight"]
        if not torch.equal(tensors.setdefault("lm_head.weight", embedding), embedding):
            raise ModelError(f"{folder}: config.json ties the embeddings, but lm_head.weight is another matrix.")
    _fill(model, tensors, folder)
    model.tie_weights()
    return model


def load_scalar_model(
    folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ScalarModel:
    """Return the reward (or value) model in a folder; raises ModelError for what is not one."""
    folder = Path(folder)
    with torch.device("meta"):
        model = ScalarModel(load_config(folder))
    tensors = _load_tensors(folder, device, dtype)
    if "score.weight" not in tensors:
        raise ModelError(f"{folder} holds no reward model: there is no score.weight among its tensors.")
    tensors.pop("lm_head.weight", None)
    _fill(model, tensors, folder)
    return model


def load_config(folder: Path) -> ModelConfig:
    """Return the shape of the model in a folder, without reading its weights."""
    return read_config(_read_json(Path(folder) / CONFIG))


def read_extra(folder: Path) -> dict[str, Any]:
    """Return what `save_model` was given as `extra`; empty for a folder that others wrote."""
    return dict(_read_json(Path(folder) / CONFIG).get(EXTRA) or {})


def read_stop_ids(folder: Path) -> frozenset[int]:
    """Return the ids that end generation: those of generation_config.json, else config.json's."""
    path = Path(folder) / GENERATION
    eos = _read_json(path).get("eos_token_id") if path.exists() else None
    if eos is None:
        return load_config(folder).eos_token_ids
    return frozenset([eos] if isinstance(eos, int) else eos)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} is not a model folder: it has no {path.name}.") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return value


def _write_weights(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Return the temporary file beside the final one that now durably holds the tensors."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{WEIGHTS}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        fsync_folder(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # how safetensors reports a full disk
            raise OSError(f"{folder / WEIGHTS} could not be written: {error}") from error
        raise
    return temporary


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        names = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{folder / INDEX} names files outside its folder.")
        files = [folder / name for name in names]
    else:
        files = [folder / WEIGHTS]
    for file in files:
        if not file.exists():
            raise ModelError(f"{folder} lacks {file.name}; only safetensors weights are read (never pickled ones).")
    return files


def _read_shards(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            way_out = "run the stage that wrote it again, or copy it anew"
            raise ModelError(f"{file} is damaged ({error}); {way_out}.") from None


def _load_tensors(folder: Path, device: str | torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return all tensors, copied: what a file maps into memory must not change when the file does."""
    return {
        name: tensor.to(device=device, dtype=dtype, copy=True)
        for name, tensor in _read_shards(folder)
        if not name.endswith("rotary_emb.inv_freq")  # old exports carry this constant
    }


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Give a model made on the meta device its tensors; every name and shape must fit exactly."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for problem, names in (
        ("lacks", sorted(wanted.keys() - tensors.keys())),
        ("has unknown", sorted(tensors.keys() - wanted.keys())),
        ("has wrongly shaped", sorted(n for n in wanted.keys() & tensors.keys() if tensors[n].shape != wanted[n])),
    ):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(f"{folder} {problem} tensors for its config.json: {shown}.")
    model.load_state_dict(dict(tensors), assign=True)
    model.requires_grad_(True)
