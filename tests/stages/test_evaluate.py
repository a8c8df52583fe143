"""The evaluate stage on tiny random models: what it measures, and that it measures the same twice."""

import json
import math

import pytest

from trivium.config import ConfigError, RunSettings, UserError
from trivium.data.shards import write_shards
from trivium.data.tokenizer import train
from trivium.models.config import ModelConfig
from trivium.models.heads import ScalarModel
from trivium.models.hf import save_model
from trivium.models.transformer import Transformer
from trivium.records import RunManifest, write_jsonl
from trivium.runs.events import read_events
from trivium.runs.manifest import Run, write_manifest
from trivium.stages import evaluate

TEXT = (
    "The cat sat on the mat. A dog ran to the red house. What is 2 + 3? The sum is 5. Yes, I can help you with that. "
)
ITEMS = (
    [
        {
            "id": f"g{i}",
            "task": "grammar",
            "kind": "choice",
            "context": c,
            "choices": [" sat.", " sits on."],
            "answer": i % 2,
        }
        for i, c in enumerate(["The cat", "A dog", "The house", "A sum"])
    ]
    + [
        {
            "id": f"{task}{i}",
            "task": task,
            "kind": "generate",
            "split": "example" if i == 0 else "test",
            "messages": [{"role": "user", "content": f"What is {i} + 3?{more}"}],
            "check": {"kind": "number", "answer": str(i + 3)},
            "ideal": f"The sum is {i + 3}.",
        }
        for task, more in (("sums", ""), ("sums_steps", " Think step by step."))
        for i in range(4)
    ]
    + [
        {
            "id": "s",
            "task": "style",
            "kind": "generate",
            "messages": [{"role": "user", "content": "Tell me."}],
            "check": {"kind": "taste"},
        }
    ]
)


def judge(prompt, text):
    """Longer is better: a taste that a test can predict."""
    return float(len(text))


def make_run(workspace, table, stage, parents=None, config=None):
    manifest = RunManifest(
        run_id=f"{table}-0123456789ab",
        stage=stage,
        table=table,
        status="running",
        fingerprint="f",
        config=config or {},
        parents=parents or {},
        started_at="2026-01-01T00:00:00+00:00",
        seed=7,
    )
    run = Run(
        manifest,
        folder=workspace / table / manifest.run_id,
        workspace=workspace,
        settings=RunSettings(device="cpu"),
        base=workspace,
    )
    write_manifest(run.dir, manifest)
    return run


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workspace")
    tokenizer = train([TEXT * 4] * 3, 300)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    for seed, table in enumerate(("pretrain", "sft", "ppo")):
        run = make_run(folder, table, table)
        if table == "ppo":
            for step in range(1, 5):
                run.metric("rollout/kl", float(step), step)
                run.metric("rollout/score", 0.1 * step, step)
                run.metric("rollout/true_taste", 0.5 if step < 4 else 0.2, step)
        tokenizer.save(run.dir / "model")
        save_model(run.dir / "model", Transformer(shape).init_weights(seed), eos_token_id=tokenizer.end_id)
        run.finish("done")
    reward = make_run(folder, "reward_model", "reward_model")
    tokenizer.save(reward.dir / "model")
    scalar = ScalarModel.from_transformer(Transformer(shape).init_weights(9))
    save_model(reward.dir / "model", scalar, extra={"reward_mean": 0.1, "reward_std": 0.5})
    reward.finish("done")
    corpus = make_run(folder, "train_tokenizer", "train_tokenizer")
    documents = [(ids, len(TEXT.encode())) for ids in tokenizer.encode_documents([TEXT] * 5)]
    write_shards(
        corpus.dir / "shards" / "heldout", documents, tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=300
    )
    corpus.finish("done")
    write_jsonl(folder / "items.jsonl", ITEMS)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"Tell me about the cat number {i}."} for i in range(12)])
    return folder


def examine(workspace, table="evaluate", **changes):
    tables = changes.pop("tables", ("pretrain", "sft", "ppo"))
    values = {
        "models": tuple(f"{t}@latest" for t in tables),
        "reward_model": "reward_model@latest",
        "tests": ("items.jsonl",),
        "win_rate_prompts": "prompts.jsonl",
        "max_new_tokens": 8,
        "judge": f"{__name__}:judge",
    }
    config = evaluate.Config(**values | changes)
    parents = {f"models.{i}": f"{t}-0123456789ab" for i, t in enumerate(tables)}
    parents |= {"reference": "sft-0123456789ab", "heldout": "train_tokenizer-0123456789ab"}
    parents |= {"reward_model": "reward_model-0123456789ab"} if config.reward_model else {}
    run = make_run(workspace, table, "evaluate", parents)
    evaluate.run(config, run)
    return run.finish("done"), run.dir


@pytest.fixture(scope="module")
def examined(workspace):
    return examine(workspace)


def figures(manifest):
    return {(r.checkpoint, r.task, r.metric): r for r in manifest.results}


def test_every_model_is_measured_on_every_task_with_an_interval(examined):
    found = figures(examined[0])
    for model in ("pretrain", "sft", "ppo"):
        for task, metric, n in (("grammar@1", "accuracy", 4), ("sums@1", "accuracy", 3), ("style@1", "score", 1)):
            assert found[model, task, metric].n == n
        accuracy = found[model, "grammar@1", "accuracy"]
        assert 0 <= accuracy.low <= accuracy.value <= accuracy.high <= 1
        bits = found[model, "bits_per_byte@1", "bits_per_byte"]
        assert bits.n == 5 and 1 < bits.value < 8
        assert found[model, "chain_of_thought@1", "accuracy_gain"].n == 3
    assert ("pretrain", "few_shot@1", "accuracy_gain") in found
    assert ("sft", "few_shot@1", "accuracy_gain") not in found


def test_win_rates_say_who_judged_and_the_reference_plays_nobody(examined):
    found = figures(examined[0])
    task = "win_rate_vs_sft@1"
    for model in ("pretrain", "ppo"):
        assert 0 <= found[model, task, "win_rate"].value <= 1
        assert 0 <= found[model, f"proxy_{task}", "win_rate"].value <= 1
        assert found[model, task, "win_rate"].n == 12
    assert ("sft", task, "win_rate") not in found and ("sft", task, "kl") not in found
    assert found["sft", task, "mean_length"].value > 0
    # this judge likes length and nothing else, and the figure says so
    assert found["ppo", "true_taste@1", "length_correlation"].value > 0.3
    assert -1 <= found["ppo", "proxy_reward@1", "length_correlation"].value <= 1
    # two unlike random models: the KL of eight tokens or fewer is finite; a base model reads another prompt
    assert math.isfinite(found["ppo", task, "kl"].value)
    assert ("pretrain", task, "kl") not in found


def test_a_second_run_gives_the_same_figures(examined, workspace):
    again, _ = examine(workspace, table="again")
    assert again.results == examined[0].results
    assert again.summary == examined[0].summary


def test_generations_stand_side_by_side(examined):
    kept = [event.value for event in read_events(examined[1], kind="specimen")]
    assert {"sums@1", "sums_steps@1", "style@1", "win_rate"} == {item["task"] for item in kept}
    for item in kept:
        assert set(item["outputs"]) == {"pretrain", "sft", "ppo"} and item["prompt"]
    assert next(item for item in kept if item["task"] == "sums@1")["passed"].keys() == {"pretrain", "sft", "ppo"}


def test_overoptimisation_is_read_from_the_policy_run(examined):
    curve = examined[0].summary["overoptimization"]["ppo"]
    assert curve["truth_lost"] == pytest.approx(0.3) and curve["proxy_gained"] > 0
    assert curve["peak_kl"] == 1.0
    assert "sft" not in examined[0].summary["overoptimization"]


def test_without_a_judge_the_win_rate_is_named_proxy_and_judged_tasks_are_not_measured(workspace):
    manifest, _ = examine(workspace, table="proxy", judge="", tables=("sft", "ppo"))
    found = figures(manifest)
    assert ("ppo", "win_rate_vs_sft@1", "win_rate") not in found
    assert ("ppo", "proxy_win_rate_vs_sft@1", "win_rate") in found
    assert manifest.summary["not_measured"] == {"style@1": "needs a judge"}
    assert manifest.summary["judged_by"] == "the reward model (proxy)"


def test_the_same_model_twice_has_no_kl_and_wins_about_half(workspace):
    target = workspace / "twin" / "twin-0123456789ab"
    target.mkdir(parents=True)
    source = workspace / "sft" / "sft-0123456789ab"
    (target / "model").symlink_to(source / "model")
    manifest = json.loads((source / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps(manifest | {"table": "twin", "run_id": "twin-0123456789ab"}))
    found = figures(examine(workspace, table="twins", tables=("twin",))[0])
    assert found["twin", "win_rate_vs_sft@1", "kl"].value == pytest.approx(0.0, abs=1e-4)
    rate = found["twin", "win_rate_vs_sft@1", "win_rate"]
    assert rate.low <= 0.5 <= rate.high


def test_bad_configurations_say_what_is_wrong(workspace):
    with pytest.raises(ConfigError, match="num_per_task"):
        evaluate.Config(num_per_task=0)
    with pytest.raises(UserError, match="second model named 'sft'"):
        examine(workspace, table="bad", tables=("sft", "sft"))


def test_without_tests_the_win_rates_are_still_measured(workspace):
    """Real data often brings prompts and no test items: that is less to report, not a mistake."""
    found = figures(examine(workspace, table="untested", tests=())[0])
    assert ("ppo", "proxy_win_rate_vs_sft@1", "win_rate") in found
    assert not any(task.startswith("grammar") for _, task, _ in found)
