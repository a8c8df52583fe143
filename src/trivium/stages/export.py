"""Export: a finished model leaves the workspace as a Hugging Face folder that says what it is.

Reads   a model of the workspace, the manifests of everything that it was made from, the figures of evaluate runs
Writes  model/: weights, configuration, tokenizer, chat template and README.md (the model card); and a copy of it at
        `output`, where one is named
Paper   Mitchell et al. 2019, arXiv 1810.03993 (model cards)
Watch   logits on fixed random ids, before and after: they must be equal, bit for bit, or nothing is exported

The folder loads in transformers, vLLM and llama.cpp's converter without code of ours. Writing GGUF itself is left out
for now; llama.cpp's `convert_hf_to_gguf.py` reads this folder.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trivium.config import Ref, UserError, is_code
from trivium.data.tokenizer import Tokenizer
from trivium.models.hf import GENERATION, load_config, load_model, save_model
from trivium.models.transformer import Transformer
from trivium.records import EvalResult, RunManifest, atomic_write, fsync_folder, read_jsonl
from trivium.runs.manifest import Run, read_manifest
from trivium.runs.registry import latest_runs

CARD = "README.md"
MADE_BY = "- trivium-export"
"""The line of a model card (a tag) by which a folder is known as one that this stage wrote and may replace."""
NUM_ROWS, NUM_TOKENS = 4, 32
"""The size of the batch of random ids on which logits are compared."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model goes where."""

    model: Ref = "ppo@latest"
    """The language model to export."""
    output: str = ""
    """A folder to copy it to, relative to the recipe; an earlier export there is replaced, anything else is refused."""


def transform(source: Path, target: Path, card: str) -> float:
    """Write the model in `source` with its tokenizer and its card to `target`; return the largest logit difference.

    The difference is taken between the source and what is read back from `target`, on fixed random ids. Raises
    UserError, and leaves no `target` that could pass for a model, when it is not exactly 0.
    """
    tokenizer = Tokenizer.load(source)
    save_model(target, load_model(source, dtype=stored_dtype(source)))
    if (source / GENERATION).is_file():  # what ends a turn, and how to sample, as the model was tuned for
        atomic_write(target / GENERATION, (source / GENERATION).read_bytes())
    tokenizer.save(target)
    atomic_write(target / CARD, card)
    before, after = probe(load_model(source)), probe(load_model(target))
    difference = float((before - after).abs().max())
    if difference != 0.0 or Tokenizer.load(target).fingerprint != tokenizer.fingerprint:
        shutil.rmtree(target)
        raise UserError(f"the exported model differs from {source} (logits by {difference:g}); nothing was exported")
    return difference


def run(config: Config, run: Run) -> None:
    """Export, compare, describe, and copy to where it was asked for."""
    source = run.model("model")
    output = run.input(config.output) if config.output else None
    if output is not None:
        refuse_foreign(output)
    ancestors = lineage(run)
    card = model_card(run, ancestors, num_parameters=load_config(source).num_parameters())
    difference = transform(source, run.dir / "model", card)
    run.result("export_parity@1", "max_logit_difference", difference, n=NUM_ROWS * NUM_TOKENS)
    if output is not None:
        publish(run.dir / "model", output)
    run.note(
        num_parameters=load_config(source).num_parameters(),
        lineage=[manifest.run_id for manifest in ancestors],
        bytes=sum(path.stat().st_size for path in (run.dir / "model").iterdir()),
        output=str(output or ""),
    )


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype that config.json states, so that an export is neither larger nor coarser than its source."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), None)
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def probe(model: Transformer) -> Tensor:
    """Return the logits, float [NUM_ROWS, NUM_TOKENS, vocab_size], on ids that are always the same."""
    model.eval()
    shape = (NUM_ROWS, min(NUM_TOKENS, model.config.max_position_embeddings))
    ids = np.random.default_rng(20_240_229).integers(0, model.config.vocab_size, size=shape)
    with torch.no_grad():
        return model.logits(model(torch.from_numpy(ids)))


# -- where it goes


def refuse_foreign(folder: Path) -> None:
    """Raise UserError when `folder` holds something that this stage did not write."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    card = folder / CARD
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()[:20] if card.is_file() else []
    if MADE_BY not in lines:
        raise UserError(f"{folder} holds something that is no Trivium export; name another output, or move it away")


def publish(model: Path, output: Path) -> None:
    """Copy the folder `model` to `output` so that the name only ever holds a whole model."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp"))
    old = temporary.with_suffix(".old")
    try:
        for path in sorted(model.iterdir()):
            shutil.copyfile(path, temporary / path.name)
            with (temporary / path.name).open("rb") as handle:
                os.fsync(handle.fileno())
        temporary.chmod(0o755)
        fsync_folder(temporary)
        if output.exists():
            os.replace(output, old)  # a folder that is not empty cannot be replaced in one step
        os.replace(temporary, output)
        fsync_folder(output.parent)
    except BaseException:
        if old.exists() and not output.exists():
            os.replace(old, output)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


# -- what it says of itself


def lineage(run: Run) -> list[RunManifest]:
    """Return the manifests of all runs that the exported model was made from, the oldest first."""
    found: dict[str, RunManifest] = {}

    def visit(parents: Mapping[str, str]) -> None:
        for name in parents.values():
            manifest = None if os.sep in name else read_manifest(run.workspace / name.rsplit("-", 1)[0] / name)
            if manifest is not None and name not in found:
                visit(manifest.parents)
                found[name] = manifest

    visit(run.manifest.parents)
    return list(found.values())


def measured(run: Run, model_id: str) -> list[tuple[EvalResult, RunManifest]]:
    """Return what the newest evaluate runs measured on exactly this model, each figure with its run."""
    table = model_id.rsplit("-", 1)[0]
    return [
        (result, manifest)
        for _, manifest in latest_runs(run.workspace).values()
        if manifest.stage == "evaluate" and model_id in manifest.parents.values()
        for result in manifest.results
        if result.checkpoint == table
    ]


def model_card(run: Run, ancestors: list[RunManifest], *, num_parameters: int) -> str:
    """Return README.md: what the model is, from which data and judgements, what was measured, what it is not for."""
    origin = next(iter(run.manifest.parents.values()))
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", MADE_BY, "---"]
    title = Path(origin).name if os.sep in origin else origin.rsplit("-", 1)[0]
    text = [
        *front, "", f"# {title}, {num_parameters:,} parameters", "",
        f"Exported by Trivium {run.manifest.code.get('version', '')} from `{Path(origin).name}`.", "",
        "## How it was made", "", *(_made(manifest) for manifest in ancestors), "",
        "## Judgements", "", _judgements(ancestors), "",
        "## Data and licences", "", *_data(run, ancestors), "",
        "## Measured", "", *_figures(measured(run, origin)), "",
        "## Limits", "",
        "The figures are from held-out items of the same kind as the training data, for one trained model. "
        "Nothing else was",
        "tested: not other topics or languages, not long conversations, not safety beyond the refusal task where "
        "it is listed.", "",
    ]  # fmt: skip
    return "\n".join(text)


def _made(manifest: RunManifest) -> str:
    steps = manifest.summary.get("steps")
    parents = ", ".join(f"`{Path(name).name}`" for name in manifest.parents.values())
    return f"- `{manifest.run_id}` ({manifest.stage}{f', {steps} steps' if steps else ''}, seed {manifest.seed})" + (
        f" from {parents}" if parents else ""
    )


def _judgements(ancestors: list[RunManifest]) -> str:
    kinds: dict[str, int] = {}
    for manifest in ancestors:
        given = manifest.summary.get("kinds")
        if isinstance(given, dict):
            for kind, number in given.items():
                kinds[kind] = kinds.get(kind, 0) + int(number)
    if not kinds:
        return "No rankings went into this model."
    names = {"simulated": "SIMULATED annotators (programs, not people)", "ai": "AI judges", "human": "people"}
    listed = "; ".join(f"{number} rankings by {names.get(kind, kind)}" for kind, number in sorted(kinds.items()))
    return f"{listed[0].upper()}{listed[1:]}."


def _data(run: Run, ancestors: list[RunManifest]) -> list[str]:
    lines = []
    licences: Counter[str] = Counter()
    for manifest in ancestors:
        facts = manifest.summary.get("data")
        facts = facts if isinstance(facts, dict) else {}
        sizes = "".join(f", {n:,} {key.removeprefix('num_')}" for key, n in facts.items() if isinstance(n, int))
        for name, digest in manifest.inputs.items():
            if not name.startswith("judgements:"):
                shown = name if is_code(name) or name.startswith("hf:") else Path(name).name
                lines.append(f"- {manifest.stage}: `{shown}` (SHA-256 {digest[:12]}){sizes}")
        corpus = run.workspace / manifest.table / manifest.run_id / "train.jsonl"
        if manifest.stage == "data_prep" and corpus.is_file():
            licences.update(row.get("license") or "not stated" for row in read_jsonl(corpus))
    counted = "; ".join(f"{name}: {number:,} documents" for name, number in sorted(licences.items()))
    terms = (
        f"Licences of the pre-training text: {counted}." if counted else "The licences of the data were not recorded."
    )
    return [*(lines or ["- not recorded"]), "", terms]


def _figures(results: list[tuple[EvalResult, RunManifest]]) -> list[str]:
    if not results:
        return ["Not evaluated before it was exported."]
    rows = ["| task | metric | value | 95% interval | n |", "|---|---|---|---|---|"]
    for result, _ in results:
        bounds = (result.low, result.high)
        known = all(isinstance(b, float | int) and math.isfinite(b) for b in bounds)
        interval = f"{result.low:.3f} to {result.high:.3f}" if known else ""
        value = "" if result.value is None else f"{result.value:.3f}"
        rows.append(f"| {result.task} | {result.metric} | {value} | {interval} | {result.n or ''} |")
    said = []
    for manifest in {manifest.run_id: manifest for _, manifest in results}.values():
        judge = str(manifest.summary.get("judged_by") or "nobody")
        simulated = " (SIMULATED: a program's hidden taste, not people's)" if "microworld" in judge else ""
        said.append(f"Measured by `{manifest.run_id}`; win rates, taste and style judged by {judge}{simulated}.")
    return [*rows, "", *said]
