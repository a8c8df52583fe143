"""Whatever a recipe can name as `module:attribute` works from outside the package; nothing is registered anywhere.

One recipe of a house next door: its own stage, source, reward, annotator, filter and test, run by the real pipeline.
"""

import json
import sys

import pytest

from trivium import cli
from trivium.preferences.store import Store
from trivium.records import read_jsonl
from trivium.runs.registry import latest_runs

OUTSIDE = '''
"""Code of a user's, in a module that Trivium has never heard of."""

import random
from dataclasses import dataclass

from trivium.records import Conversation, Document, Message

WORDS = "lamp table light people window garden river stone bread winter letter music road wood tower boat".split()


def documents(seed, *, num=40):
    rng = random.Random(f"{seed}-lamps")
    for number in range(num):
        yield Document(text=" ".join(rng.choices(WORDS, k=30)).capitalize() + ".")
    yield Document(text="Forbidden words stand in this otherwise quite ordinary line about lamps and tables.")


def prompts(seed, *, num=6):
    for number in range(num):
        yield Conversation(messages=(Message(role="user", content=f"How many lamps are {number} lamps?"),))


def no_forbidden_words(document):
    return "forbidden" if "Forbidden" in document.text else None


def short_is_good(prompts, completions):
    return [1.0 / (1 + len(completion.token_ids)) for completion in completions]


@dataclass
class LikesLong:
    name: str = "likes-long"
    kind: str = "simulated"

    def rank(self, prompt, texts, rng):
        return [[i] for i in sorted(range(len(texts)), key=lambda i: -len(texts[i]))]


def taste(prompt, text):
    return min(1.0, len(text) / 20)


def annotators(seed):
    return [LikesLong()]


def tests(seed, *, num_per_task=4):
    for number in range(num_per_task):
        yield {"id": f"lamp-{number}", "task": "lamps", "version": 1, "kind": "choice", "split": "test",
               "context": "A lamp gives", "choices": [" light", " soup"], "answer": 0}
'''

STAGE = '''
"""A stage of a user's: a model with random weights, so that the others have something to start from."""

from dataclasses import dataclass

from outside_house import documents
from trivium.data.tokenizer import train
from trivium.models.config import ModelConfig
from trivium.models.hf import save_model
from trivium.models.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 32


def transform(config):
    return train((d.text for d in documents(0)), 300)


def run(config, run):
    tokenizer = transform(config)
    shape = ModelConfig.from_depth(1, tokenizer.vocab_size, 128)
    model = Transformer(shape)
    model.init_weights(run.seed)
    tokenizer.save(run.dir / "model")
    save_model(run.dir / "model", model)
    run.note(width=config.width)
'''

RECIPE = """
[run]
name = "outside"
threads = 1

[data_prep]
sources = ["outside_house:documents"]
options = { num = 40 }
built_in_filters = false
filters = ["outside_house:no_forbidden_words"]

[start]
stage = "outside_stage"
width = 48

[collect_comparisons]
policy = "start@latest"
prompts = ["outside_house:prompts"]
options = { num = 4 }
num_responses = 2
annotators = "outside_house:annotators"
sampling = { max_new_tokens = 6 }

[grpo]
policy = "start@latest"
prompts = ["outside_house:prompts"]
options = { num = 4 }
rewards = { "outside_house:short_is_good" = 1.0 }
iterations = 1
prompts_per_round = 2
group_size = 3
sampling = { max_new_tokens = 6 }

[evaluate]
models = ["start@latest", "grpo@latest"]
reference = "start@latest"
heldout = ""
tests = ["outside_house:tests"]
num_per_task = 4
max_new_tokens = 6
win_rate_prompts = "outside_house:prompts"
win_rate_options = {}
num_win_rate_prompts = 4
judge = "outside_house:taste"
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Return the workspace of the recipe, run once from the command line."""
    folder = tmp_path_factory.mktemp("next door")
    (folder / "outside_house.py").write_text(OUTSIDE)
    (folder / "outside_stage.py").write_text(STAGE)
    (folder / "recipe.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        assert cli.main(["run", str(folder / "recipe.toml"), "--workspace", str(folder / "space")]) == 0
    for name in ("outside_house", "outside_stage"):
        sys.modules.pop(name, None)
    return folder / "space"


def test_a_source_gives_the_documents(workspace):
    counts = latest_runs(workspace)["data_prep"][1].summary["counts"]
    assert counts["read"] == 41


def test_a_filter_drops_with_its_own_reason(workspace):
    counts = latest_runs(workspace)["data_prep"][1].summary["counts"]
    assert counts["dropped"]["forbidden"] == 1


def test_a_stage_runs_and_its_artifacts_are_hashed(workspace):
    _, manifest = latest_runs(workspace)["start"]
    assert (manifest.stage, manifest.summary["width"]) == ("outside_stage", 48)
    assert "model/model.safetensors" in {artifact.path for artifact in manifest.artifacts}


def test_an_annotator_ranks(workspace):
    _, manifest = latest_runs(workspace)["collect_comparisons"]
    store = Store(workspace / "preferences.db")
    rankings = store.rankings(str(manifest.summary["collection"]))
    assert rankings and {(r.annotator, r.kind) for r in rankings} == {("likes-long", "simulated")}
    for ranking in rankings:
        lengths = [len(store.completion(identity).text) for (identity,) in ranking.groups]
        assert lengths == sorted(lengths, reverse=True)
    store.close()


def test_a_reward_is_what_grpo_records(workspace):
    folder, _ = latest_runs(workspace)["grpo"]
    rewards = [row["value"] for row in read_jsonl(folder / "events.jsonl") if row["name"] == "rollout/reward"]
    assert rewards and all(1 / 7 <= reward <= 1 / 2 for reward in rewards)


def test_a_test_of_ones_own_is_measured_with_its_interval(workspace):
    _, manifest = latest_runs(workspace)["evaluate"]
    found = [result for result in manifest.results if result.task.startswith("lamps@1")]
    assert found and found[0].n == 4 and 0 <= found[0].low <= found[0].value <= found[0].high <= 1


def test_the_report_names_the_stage_from_outside(workspace):
    report = json.loads((workspace / "report" / "report.json").read_text())
    assert "start" in json.dumps(report)


def test_a_judge_of_ones_own_gives_the_win_rates(workspace):
    _, manifest = latest_runs(workspace)["evaluate"]
    assert [result for result in manifest.results if result.metric == "win_rate" and result.checkpoint == "grpo"]
