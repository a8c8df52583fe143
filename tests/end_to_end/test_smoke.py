"""From raw text to a deployed chat model: every stage leaves what the next needs, and what it leaves is true."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from trivium.apps.report import comparable
from trivium.config import load_recipe
from trivium.models.hf import load_model
from trivium.pipeline import configs
from trivium.preferences.store import Store
from trivium.records import RunManifest, sha256_file
from trivium.runs.registry import latest_runs, list_runs

from .conftest import RECIPE, ROOT, finish, trivium

TABLES = [spec.table for spec in load_recipe(RECIPE).stages]


def test_every_recipe_is_valid() -> None:
    """Each shipped recipe parses and every key of it exists."""
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        assert configs(load_recipe(path))


def test_every_stage_is_done_and_linked(smoke: Path) -> None:
    """Every table has one finished run whose parents exist, whose artifacts hash to what the manifest says."""
    runs = latest_runs(smoke)
    assert sorted(runs) == sorted(TABLES)
    names = {manifest.run_id for _, manifest in runs.values()}
    for folder, manifest in runs.values():
        assert set(manifest.parents.values()) <= names
        assert (manifest.artifacts or manifest.results) and manifest.cost.seconds > 0
        for artifact in manifest.artifacts:
            assert sha256_file(folder / artifact.path) == artifact.sha256
        assert not list(folder.rglob("*.tmp")) and not (folder / "checkpoints").exists()


def test_simulated_judgements_are_called_so(smoke: Path) -> None:
    """Nothing in the database, the manifests or the report passes a script off as a person."""
    with Store(smoke / "preferences.db") as store:
        assert {ranking.kind for ranking in store.rankings()} == {"simulated"}
    assert latest_runs(smoke)["collect_comparisons"][1].summary["kinds"].keys() == {"simulated"}
    assert "simulated" in (smoke / "report" / "report.html").read_text().lower()


def test_a_second_run_does_nothing(smoke: Path) -> None:
    """Every stage is skipped, and the report's bytes stay."""
    before = (smoke / "report" / "report.json").read_bytes()
    code, _, err = finish(trivium("run", RECIPE, "--workspace", smoke))
    assert code == 0, err[-2000:]
    assert err.count("skipped") == len(TABLES)
    assert (smoke / "report" / "report.json").read_bytes() == before
    assert len(list_runs(smoke)) == len(TABLES)


def test_the_export_is_what_transformers_loads(smoke: Path) -> None:
    """Logits equal to 1e-5, the chat template equal to ours, the generation ends at the end of turn."""
    transformers = pytest.importorskip("transformers")
    folder = latest_runs(smoke)["export"][0] / "model"
    ours, theirs = load_model(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Tell me about <|end|> a fox."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    with torch.no_grad():
        difference = (ours.logits(ours(ids)) - theirs.eval()(ids).logits).abs().max()
    assert difference < 1e-5
    assert theirs.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")


def cells(workspace: Path) -> dict[str, Any]:
    """Return what the report measured, without what it cost and without the hashes of files that hold clock times."""
    return comparable(json.loads((workspace / "report" / "report.json").read_text()))


def manifest_of(workspace: Path, table: str) -> RunManifest | None:
    """Return the manifest of a table's run, if it has begun."""
    return next((m for _, m in list_runs(workspace) if m.table == table), None)


def run_with_a_kill_in_every_stage(recipe: Path, workspace: Path, reference: Path, *, threads: int) -> list[str]:
    """SIGKILL the recipe once in each stage, at a random instant of the time that the reference took for it; then let
    it come to its end. Return the tables in which the kill found it running.
    """
    rng = random.Random(0)
    seconds = {table: manifest.cost.seconds for table, (_, manifest) in latest_runs(reference).items()}
    killed = []
    for spec in load_recipe(recipe).stages:
        process = trivium("run", recipe, "--workspace", workspace, threads=threads)
        while process.poll() is None:
            if manifest_of(workspace, spec.table) is not None:
                time.sleep(rng.uniform(0.0, 0.9) * seconds[spec.table])
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    killed.append(spec.table)
                break
            time.sleep(0.01)
        process.communicate()
    code, _, err = finish(trivium("run", recipe, "--workspace", workspace, threads=threads), timeout=1800)
    assert code == 0, err[-3000:]
    return killed


def assert_same_outcome(workspace: Path, reference: Path) -> None:
    """Every figure of the report and every byte of the exported weights, and nothing left lying about."""
    assert cells(workspace) == cells(reference)
    assert not list(workspace.rglob("*.tmp"))
    weights = [
        sha256_file(latest_runs(place)["export"][0] / "model" / "model.safetensors") for place in (workspace, reference)
    ]
    assert weights[0] == weights[1]


@pytest.mark.timeout(600)
def test_killed_in_every_stage_it_ends_in_the_same_report(smoke: Path, tmp_path: Path) -> None:
    """The last run's report equals the uninterrupted one's."""
    killed = run_with_a_kill_in_every_stage(RECIPE, tmp_path / "killed", smoke, threads=1)
    assert len(killed) >= len(TABLES) - 2, f"only {killed} were still running when the kill came"
    assert_same_outcome(tmp_path / "killed", smoke)


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_demo_killed_in_every_stage_ends_in_the_same_report(tmp_path: Path) -> None:
    """The same of `python3 bootstrap.py demo`, at its own size and on all cores: about half an hour on two."""
    demo, whole = ROOT / "recipes" / "tiny.toml", tmp_path / "whole"
    code, _, err = finish(trivium("run", demo, "--workspace", whole, threads=0), timeout=1800)
    assert code == 0, err[-3000:]
    killed = run_with_a_kill_in_every_stage(demo, tmp_path / "killed", whole, threads=0)
    assert len(killed) >= len(TABLES) - 2, f"only {killed} were still running when the kill came"
    assert_same_outcome(tmp_path / "killed", whole)
