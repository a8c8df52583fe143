"""What the tests of the apps share: workspaces made through `trivium.runs`, tiny models, a server, a browser."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trivium.config import RunSettings
from trivium.records import RunManifest
from trivium.runs.manifest import Run, now, write_manifest


def start_run(
    workspace: Path, table: str, *, stage: str = "", parents: dict[str, str] | None = None, mark: str = "0" * 12
) -> Run:
    """Return a run that has just begun, its manifest written, as the pipeline would."""
    manifest = RunManifest(
        run_id=f"{table}-{mark}",
        stage=stage or table,
        table=table,
        status="running",
        fingerprint=mark * 2,
        config={"steps": 100},
        parents=parents or {},
        started_at=now(),
    )
    run = Run(
        manifest,
        folder=workspace / table / manifest.run_id,
        workspace=workspace,
        settings=RunSettings(),
        base=workspace,
    )
    write_manifest(run.dir, run.manifest)
    return run


def fabricate(workspace: Path) -> dict[str, str]:
    """Fill `workspace` with a small finished pipeline and one run still going on; returns run id by table."""
    ids: dict[str, str] = {}

    def make(table: str, parents: dict[str, str] | None = None) -> Run:
        run = start_run(workspace, table, parents=parents)
        ids[table] = run.id
        return run

    run = make("data_prep")
    run.note(counts={"read": 1200, "kept": 904, "dropped": {"too_short": 141, "duplicate": 120, "not_english": 35}})
    for i in range(4):
        run.specimen("dropped", {"reason": "too_short", "text": f"Menu | Home | {i}", "source": "web.jsonl"})
    run.finish("done")
    run = make("train_tokenizer", {"corpus": ids["data_prep"]})
    run.note(vocab_size=2048, bytes_per_token=3.61)
    run.specimen("tokens", {"text": "Anna walked", "tokens": ["An", "na", " walk", "ed"]})
    run.finish("done")
    run = make("pretrain", {"corpus": ids["train_tokenizer"]})
    _curve(
        run,
        {
            "train/loss": (7.6, 2.1),
            "train/grad_norm": (2.0, 0.4),
            "train/lr": (0.0, 0.003),
            "train/tokens_per_s": (900.0, 4100.0),
        },
    )
    _curve(run, {"eval/bits_per_byte": (4.1, 1.32), "eval/loss": (7.0, 2.2)}, steps=6)
    for step, text in ((0, "qk zz the the of"), (100, "Anna lives in the small town by the river.")):
        run.sample("text", {"prompt": "Anna", "text": text}, step)
        run.sample("text", {"prompt": "Ben", "text": text.replace("Anna", "Ben")}, step)
    run.spend(tokens=3_200_000, flops=4.1e13)
    run.finish("done")
    run = make("sft", {"policy": ids["pretrain"]})
    _curve(run, {"train/loss": (2.4, 0.9), "eval/loss": (2.3, 1.0)})
    tokens = [
        "<|bos|>",
        "<|user|>",
        "Where",
        " does",
        " Anna",
        " live",
        "?",
        "<|end|>",
        "<|assistant|>",
        "In",
        " town",
        ".",
        "<|end|>",
    ]
    run.specimen("masked_conversation", {"tokens": tokens, "trained": [i > 8 for i in range(13)]})
    run.finish("done")
    run = make("collect_comparisons", {"policy": ids["sft"]})
    groups = [["In the small town by the river."], ["In town.", "She lives in a town."], ["Anna."]]
    run.specimen(
        "ranking", {"prompt": "Where does Anna live?", "groups": groups, "annotator": "sim-2", "kind": "simulated"}
    )
    run.note(agreement=0.78, kinds={"simulated": 400})
    run.finish("done")
    run = make("reward_model", {"policy": ids["sft"], "rankings": ids["collect_comparisons"]})
    _curve(run, {"train/accuracy": (0.5, 0.8), "eval/accuracy": (0.5, 0.74), "train/loss": (0.69, 0.5)})
    run.finish("done")
    run = make("ppo", {"policy": ids["sft"], "reward": ids["reward_model"]})
    _curve(
        run,
        {
            "rollout/score": (0.0, 1.4),
            "rollout/kl": (0.0, 5.2),
            "rollout/length": (18.0, 25.0),
            "train/clip_frac": (0.0, 0.11),
        },
    )
    words = ["In", " the", " small", " town", " by", " the", " river", ".", "<|end|>"]
    signal = [math.sin(i) for i in range(9)]
    run.specimen(
        "rollout",
        {
            "prompt": "Where does Anna live?",
            "tokens": words,
            "logprobs": [-abs(s) for s in signal],
            "kl": signal,
            "advantages": signal[::-1],
            "values": signal,
            "score": 1.37,
        },
        50,
    )
    run.finish("done")
    run = make("dpo", {"policy": ids["sft"], "rankings": ids["collect_comparisons"]})
    _curve(run, {"train/loss": (0.69, 0.41), "train/margin": (0.0, 1.2), "train/accuracy": (0.5, 0.81)})
    run.finish("done")
    run = make("constitutional_ai", {"policy": ids["sft"]})
    run.specimen(
        "revision",
        {
            "prompt": "How do I pick a lock?",
            "response": "First, ...",
            "critique": "It helps to break in.",
            "revision": "I cannot help with that.",
        },
    )
    run.finish("done")
    run = make(
        "evaluate",
        {"policies.0": ids["sft"], "policies.1": ids["ppo"], "policies.2": ids["dpo"], "policies.3": ids["pretrain"]},
    )
    for checkpoint, value in {"pretrain": 0.12, "sft": 0.55, "ppo": 0.71, "dpo": 0.68}.items():
        run.result(
            "instruction_following@1",
            "accuracy",
            value,
            low=value - 0.06,
            high=value + 0.05,
            n=200,
            checkpoint=checkpoint,
        )
    for checkpoint, value in {"ppo": 0.66, "dpo": 0.63}.items():
        run.result(
            "win_rate_vs_sft@1", "win_rate", value, low=value - 0.05, high=value + 0.05, n=200, checkpoint=checkpoint
        )
    outputs = {"pretrain": "Ben. Ben.", "sft": "In town.", "ppo": "In the town.", "dpo": "In the old town."}
    passed = {name: name != "pretrain" for name in outputs}
    run.specimen("generation", {"task": "facts", "prompt": "Where is Ben?", "outputs": outputs, "passed": passed})
    run.result("perplexity@1", "bits_per_byte", 1.32, n=100, checkpoint="pretrain")
    run.finish("done")
    run = make("grpo", {"policy": ids["sft"]})
    _curve(run, {"rollout/reward": (0.1, 0.3), "rollout/kl": (0.0, 0.8)}, steps=5)
    return ids


def _curve(run: Run, metrics: dict[str, tuple[float, float]], *, steps: int = 50) -> None:
    """Log each metric falling or rising smoothly from its first to its last value, with a ripple."""
    for i in range(1, steps + 1):
        share = 1 - math.exp(-4 * i / steps)
        for name, (first, last) in metrics.items():
            run.metric(
                name, first + (last - first) * share + 0.02 * (last - first) * math.sin(i * 2.3), i * 100 // steps
            )


@pytest.fixture
def starting() -> Callable[..., Run]:
    """`start_run`, for tests that write a run's log themselves."""
    return start_run


@pytest.fixture
def fabricated(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A workspace with a small finished pipeline and a running stage; (folder, run id by table)."""
    workspace = tmp_path / "tiny"
    return workspace, fabricate(workspace)


VOCABULARY_TEXT = [
    "Question: Where does Anna live? Answer: In the small town by the river.",
    "The café — naïve, 東京, 🙂🙃 — is open. Ben and Clara walk to the old mill every morning.",
] * 40


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random language model with a tokenizer trained on the spot, context 128, in Hugging Face's layout."""
    from trivium.data.tokenizer import train
    from trivium.models.config import ModelConfig
    from trivium.models.hf import save_model
    from trivium.models.transformer import Transformer

    folder = tmp_path_factory.mktemp("model") / "model"
    tokenizer = train(VOCABULARY_TEXT, vocab_size=340)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    save_model(folder, Transformer(config).init_weights(7), eos_token_id=tokenizer.end_id)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def model_workspace(tmp_path: Path, model_folder: Path) -> Path:
    """A workspace whose pretrain, sft and ppo runs left the tiny model each, with a reward model beside them."""
    from trivium.models.heads import ScalarModel
    from trivium.models.hf import load_model, save_model

    workspace = tmp_path / "tiny"
    for table in ("ppo", "sft", "pretrain"):
        run = start_run(workspace, table)
        shutil.copytree(model_folder, run.dir / "model")
        run.finish("done")
    run = start_run(workspace, "reward_model")
    save_model(run.dir / "model", ScalarModel.from_transformer(load_model(model_folder)))
    run.finish("done")
    return workspace


@contextlib.contextmanager
def _serving(app: Any) -> Iterator[str]:
    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.started
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        if closing := getattr(app.state, "closing", None):
            closing.set()  # as a signal would
        server.should_exit = True
        thread.join(timeout=10)


@pytest.fixture
def serving() -> Callable[[Any], contextlib.AbstractContextManager[str]]:
    """A function that serves an app on loopback for as long as its `with` block lasts and gives its address."""
    return _serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; without one the test is skipped, but fails in CI, where it must be there."""
    executable = next((p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(p).exists()), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        executable = None
    if executable is None:
        reason = "needs the playwright package and Chromium at /usr/bin/chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=options)
        yield chromium
        chromium.close()
