"""`bench/people_loop.py` and `bench/rank_load.py` at toy size: the loop with people, and nothing lost under fire."""

import importlib.util
import sys
from pathlib import Path

import pytest

from trivium.preferences.store import Store, schema

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
[run]
name = "people"
seed = 0
precision = "fp32"
[data_prep]
sources = ["trivium.data.microworld:documents"]
options = { num = 600 }
heldout_frac = 0.05
[train_tokenizer]
vocab_size = 512
[pretrain]
hidden_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 1
context = 128
fit = { steps = 8, batch_size = 8, log_every = 4, eval_every = 8, save_every = 8 }
[sft]
data = ["trivium.data.microworld:instructions"]
options = { num = 60 }
fit = { steps = 8, batch_size = 8, log_every = 4, eval_every = 8, save_every = 8 }
[collect_comparisons]
prompts = ["trivium.data.microworld:preference_prompts"]
options = { num = 16 }
annotators = "people"
overlap = 2
repeat_frac = 0.2
sampling = { max_new_tokens = 16 }
[reward_model]
heldout_frac = 0.3
fit = { steps = 4, batch_size = 4, log_every = 2, save_every = 4 }
[dpo]
heldout_frac = 0.3
fit = { steps = 4, batch_size = 4, log_every = 2, save_every = 4 }
[ppo]
prompts = ["trivium.data.microworld:preference_prompts"]
options = { num = 16 }
iterations = 2
batch_size = 8
sampling = { max_new_tokens = 16 }
[new_against_old]
stage = "collect_comparisons"
policy = "ppo@latest"
against = "sft@latest"
prompts = ["trivium.data.microworld:preference_prompts"]
options = { num = 12 }
num_responses = 2
annotators = "people"
sampling = { max_new_tokens = 16 }
"""


def load(name):
    """Return a script of bench/ as a module."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"bench_{name}"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(300)
def test_from_invitation_to_a_blind_comparison_without_touching_a_file(tmp_path):
    """Every prompt gets its two rankings, the lead's decision counts, the policies trained on it are compared blind."""
    (tmp_path / "small.toml").write_text(SMALL)
    bench = load("people_loop")
    workspace = tmp_path / "w"
    words = ["--recipe", str(tmp_path / "small.toml"), "--workspace", str(workspace), "--port", "8797"]
    found = bench.run(bench.parse(words))
    with Store(workspace / "preferences.db") as store:
        first, second = store.collections()
        assert {t.judgements for t in store.tasks(first) if t.purpose == "rank"} == {2}
        assert {t.judgements for t in store.tasks(second)} == {1}
        rows = [*store.ranking_rows(first, purposes=("rank", "repeat"), adjudicated=False), *store.ranking_rows(second)]
        assert sum(found["ranked"].values()) == len(rows)
        assert {row["annotator"] for row in rows} <= {"ann", "bob", "cyd"}
        decided = [row for row in store.ranking_rows(first) if row["adjudicates"]]
        assert [row["annotator"] for row in decided] == ["lea"] * min(found["disputed"], 1)
    assert 0 <= found["win_rate"]["low"] <= found["win_rate"]["value"] <= found["win_rate"]["high"] <= 1


STORM = pytest.param((50, 200, 50), id="storm", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])
"""10,000 judgements by 50 annotators, the server killed 50 times."""


@pytest.mark.parametrize("size", [pytest.param((8, 12, 2), id="breeze"), STORM])
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_r31_no_acknowledged_judgement_is_lost_and_none_doubled(database, size, request, tmp_path):
    """So many annotators, tasks for each, and kills."""
    bench = load("rank_load")
    annotators, tasks, kills = size
    words = ["--annotators", str(annotators), "--tasks", str(tasks), "--kills", str(kills)]
    words += ["--results", str(tmp_path / "r.json")]
    if database == "postgres":
        location = request.getfixturevalue("postgres")
        engine = schema.make_engine(location)
        schema.metadata.drop_all(engine)
        engine.dispose()
        words += ["--database", location]
    figures = bench.run(bench.parse(words))
    assert (figures["judgements"], figures["lost"], figures["doubled"]) == (annotators * tasks, 0, 0)
