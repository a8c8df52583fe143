"""Domain adaptation as a user does it: a folder of text, one command, and a report of what it gained and cost."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from trivium.models.hf import read_stop_ids
from trivium.runs.registry import latest_runs

from .conftest import finish, trivium

pytestmark = pytest.mark.timeout(400)

FIT = "batch_size = 8, log_every = 10, eval_every = 20, save_every = 20, optim = { lr = 1e-2 }"
RECIPE = f"""
[run]
seed = 0
precision = "fp32"

[data_prep]
sources = ["trivium.data.microworld:documents"]
options = {{ num = 300 }}
heldout_frac = 0.05

[train_tokenizer]
vocab_size = 400

[pretrain]
hidden_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 2
context = 64
prompts = []
fit = {{ steps = 60, {FIT} }}

[domain]
stage = "data_prep"
sources = ["folder"]
near_duplicates = 0
heldout_frac = 0.2

[domain_tokens]
stage = "train_tokenizer"
corpus = "domain@latest"
tokenizer = "pretrain@latest"

[adapt]
context = 64
replay_frac = 0.5
fit = {{ steps = 60, {FIT} }}

[sft]
init = "adapt@latest"
data = ["trivium.data.microworld:instructions"]
options = {{ num = 60 }}
fit = {{ steps = 2, {FIT} }}
"""
WORDS = "grind the beans pour water slowly over filter wait until cup warm then serve with milk and a spoon".split()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with the recipe and, beside it, a folder of text files about one thing."""
    rng = random.Random(0)
    (tmp_path / "folder").mkdir()
    for number in range(40):
        said = [" ".join(rng.sample(WORDS, 12)).capitalize() + "." for _ in range(6)]
        (tmp_path / "folder" / f"note-{number}.txt").write_text(" ".join(said) + "\n")
    (tmp_path / "domain.toml").write_text(RECIPE)
    return tmp_path


def test_a_folder_of_text_is_learned_and_the_report_says_what_was_forgotten(place: Path) -> None:
    """The domain costs fewer bits; both changes stand in the report with intervals; the result is fine-tuned as any."""
    workspace = place / "workspace"
    code, out, err = finish(trivium("run", place / "domain.toml", "--workspace", workspace))
    assert code == 0, err[-3000:]
    runs = latest_runs(workspace)
    adapted = runs["adapt"][1]
    shown = {c["column"]: c for c in json.loads((workspace / "report" / "report.json").read_text())["cells"]
             if c["table"] == "adaptation"}  # fmt: skip
    results = {(r.task, r.metric, r.checkpoint): r for r in adapted.results}
    gain, forgetting = results["domain@1", "gain", ""], results["general@1", "forgetting", ""]
    assert gain.low is not None and 0.5 < gain.low < gain.value
    assert (shown["gain"]["value"], shown["gain"]["low"]) == (gain.value, gain.low)
    assert (shown["forgetting"]["value"], shown["forgetting"]["run"]) == (forgetting.value, adapted.run_id)
    assert "Domain adaptation: gain beside forgetting" in out
    for page in ("report.html", "report.md"):
        assert "Domain adaptation: gain beside forgetting" in (workspace / "report" / page).read_text()
    before = results["general@1", "bits_per_byte", "before"].value
    assert before == pytest.approx(runs["pretrain"][1].results[0].value, rel=0.05)  # cut into other windows there
    assert adapted.summary["is_base"] is True
    ends = [read_stop_ids(runs[table][0] / "model") for table in ("pretrain", "adapt", "sft")]
    assert ends[0] == ends[1] != ends[2]
    assert runs["sft"][1].parents["init"] == adapted.run_id
    fingerprints = {runs[table][1].summary["tokenizer"] for table in ("train_tokenizer", "domain_tokens")}
    assert len(fingerprints) == 1


def test_an_empty_folder_is_one_sentence(place: Path) -> None:
    for path in (place / "folder").iterdir():
        path.unlink()
    code, _, err = finish(trivium("run", place / "domain.toml", "--workspace", place / "workspace", "--only", "domain"))
    assert code == 2
    assert "folder holds no file that can be read; known kinds" in err and "Traceback" not in err
