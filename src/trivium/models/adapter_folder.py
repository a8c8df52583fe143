"""Adapter folders: what PEFT writes is read, and what is written PEFT reads; the model beside it stays whole.

A folder holds `adapter_model.safetensors` and, last, `adapter_config.json`, without which it is no adapter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trivium.models.config import ModelError, require
from trivium.models.heads import ScalarModel
from trivium.models.hf import save_model
from trivium.models.lora import MATRICES, M, adapters_of, attach, freeze, merged, rank_and_alpha, targets_in
from trivium.models.transformer import Transformer
from trivium.records import atomic_write

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before a parameter's name."""

READ = frozenset({"r", "lora_alpha", "peft_type", "use_rslora", "init_lora_weights"})
HARMLESS = frozenset(
    {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}  # the tensors say which
    | {"lora_dropout", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}  # how A and B were drawn
)
"""Keys of `adapter_config.json` that change nothing of what an adapter computes; any other that is set is refused."""

PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""Ways to draw A and B, by name; the others that PEFT has take something out of the frozen matrices as well."""


def save_adapted(
    folder: Path,
    model: M,
    *,
    eos_token_id: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `model/`, whole and plain, with a model's adapters merged into it, and beside it `adapter/` if it has any.

    `eos_token_id` and `extra` are those of `save_model`.
    """
    if adapters_of(model):
        save_adapter(folder / "adapter", model)
    save_model(folder / "model", merged(model), eos_token_id=eos_token_id, extra=extra)


def save_adapter(folder: Path, model: Transformer | ScalarModel) -> None:
    """Write a model's adapters as PEFT does: `adapter_model.safetensors`, then `adapter_config.json`.

    A scalar model's head goes with them. Raises ModelError for a model without adapters, OSError for a full disk.
    """
    adapters = adapters_of(model)
    if not adapters:
        raise ModelError("This model has no adapters to save.")
    rank, alpha = rank_and_alpha(adapters)
    tensors = {
        f"{PREFIX}{name}.{part}.weight": getattr(adapter, part).detach().cpu().contiguous()
        for name, adapter in adapters.items()
        for part in ("lora_A", "lora_B")
    }
    is_scalar = isinstance(model, ScalarModel)
    if isinstance(model, ScalarModel):
        tensors[f"{PREFIX}score.weight"] = model.score.weight.detach().cpu().contiguous()
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in adapters)
    everywhere = len(adapters) == len(kinds) * model.config.num_hidden_layers
    written = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_scalar else "CAUSAL_LM",
        "base_model_name_or_path": None,  # the run's manifest names it; a path would be true on one machine only
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": list(kinds) if everywhere else list(adapters),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": ["score"] if is_scalar else None,
        "inference_mode": True,
    }
    (folder / CONFIG).unlink(missing_ok=True)  # until the new one stands, the folder is no adapter
    atomic_write(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    atomic_write(folder / CONFIG, json.dumps(written, indent=2) + "\n")


def load_adapter(folder: Path, model: M) -> M:
    """Return the model itself with the adapters of a PEFT folder on it, frozen apart from them.

    `rank` and `alpha` are the folder's, the matrices those it has tensors for. Raises ModelError for what is not such a
    folder, for another kind of adapter, for tensors of another network, and for a model that has adapters.
    """
    folder = Path(folder)
    rank, scale = _read_adapter_config(folder, is_scalar=isinstance(model, ScalarModel))
    tensors = _read_adapter(folder)
    known = dict(targets_in(model, MATRICES["both"]))
    wanted: dict[str, list[int]] = {}
    names = {name.rpartition(".lora_")[0] for name in tensors} - {""}
    for name in sorted(names):
        require(name in known, f"{folder} has {name}, where this network can have no adapter.")
        outputs, inputs = known[name].weight.shape
        wanted |= {f"{name}.lora_A.weight": [rank, inputs], f"{name}.lora_B.weight": [outputs, rank]}
    head = tensors.pop("score.weight", None)
    if isinstance(model, ScalarModel) and head is not None:
        tensors["score.weight"], wanted["score.weight"] = head, list(model.score.weight.shape)
    for name, shape in wanted.items():  # all before any: what is refused has changed nothing
        require(name in tensors, f"{folder} lacks {name}.")
        found = list(tensors[name].shape)
        require(found == shape, f"{folder}: {name} is {found}, and this network needs {shape}.")
    freeze(model)
    for name in sorted(names):
        made = attach(model, name, known[name], rank, scale)
        with torch.no_grad():
            made.lora_A.copy_(tensors[f"{name}.lora_A.weight"])
            made.lora_B.copy_(tensors[f"{name}.lora_B.weight"])
    if isinstance(model, ScalarModel) and head is not None:
        with torch.no_grad():
            model.score.weight.copy_(head)
    return model


def _read_adapter_config(folder: Path, *, is_scalar: bool) -> tuple[int, float]:
    """Return (rank, scale) of an adapter's config, or raise ModelError naming what is not computed here."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except FileNotFoundError:
        raise ModelError(f"{folder} is not an adapter folder: it has no {CONFIG}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read as the config of an adapter ({error!r}).") from None
    start = config.get("init_lora_weights", True)
    require(
        not isinstance(start, str) or start in PLAIN_STARTS, f"{path}: init_lora_weights = {start!r} changes W too."
    )
    require(config.get("peft_type") == "LORA", f"{path}: peft_type {config.get('peft_type')!r} is not LORA.")
    for key, value in config.items():
        if key == "modules_to_save" and is_scalar and set(value or ()) <= {"score", "classifier"}:
            continue  # PEFT trains the head of a classifier along, and saves it
        off = key in READ | HARMLESS or not value or (key == "bias" and value == "none")
        require(off, f"{path}: {key} = {value!r} is not supported.")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder by our names, A's and B's and a classifier's head only."""
    path = folder / WEIGHTS
    require(path.is_file(), f"{folder} lacks {WEIGHTS}; only safetensors weights are read (never pickled ones).")
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            tensors = {name.removeprefix(PREFIX): opened.get_tensor(name).clone() for name in opened.keys()}
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged ({error}); copy it anew.") from None
    for name in tensors:
        known = name.endswith((".lora_A.weight", ".lora_B.weight")) or name == "score.weight"
        require(known, f"{path} has {name}, which is no part of such an adapter.")
    return tensors
