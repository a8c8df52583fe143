"""Constitutional AI with critic and judge behind an OpenAI-compatible server, which is Trivium's own."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from trivium.apps.serve import create_app
from trivium.data import microworld
from trivium.data.chat import render_prompt
from trivium.data.tokenizer import train
from trivium.models.config import ModelConfig
from trivium.models.hf import save_model
from trivium.models.transformer import Transformer
from trivium.preferences.store import Store
from trivium.records import read_jsonl, write_jsonl
from trivium.runs.registry import latest_runs

from .conftest import finish, trivium

NUM_PROMPTS = 6
RECIPE = """
[run]
name = "served"
precision = "fp32"

[constitutional_ai]
policy = "{model}"
prompts = ["prompts.jsonl"]
principles = "principles.json"
critic_endpoint = "tiny"
judge_endpoint = "tiny"
few_shot = 1
num_responses = 2
sampling = {{ max_new_tokens = 8 }}
fit = {{ steps = 2, batch_size = 4 }}
"""


class Counting:
    """The app, with every question to the model written down; from number `hold_at` on they wait for `go`."""

    def __init__(self, app: Any) -> None:
        """Wrap the app; nothing is held up at first."""
        self.app, self.asked, self.hold_at = app, [], 10**9
        self.held, self.go = threading.Event(), threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, its body read first."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        message = await receive()
        while message.get("more_body"):
            more = await receive()
            message = {**more, "body": message["body"] + more["body"]}
        self.asked.append(json.loads(message["body"]))
        if len(self.asked) >= self.hold_at and not self.go.is_set():
            self.held.set()
            await asyncio.to_thread(self.go.wait, 60)  # until the one who asks has been killed
        given = iter([message])

        async def again() -> Any:
            return next(given, None) or await receive()

        await self.app(scope, again, send)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random chat model that says A or B rather often, so that it can be taken for a judge."""
    texts = [m.content for talk in microworld.instructions(0, num=150) for m in talk.messages]
    tokenizer = train(texts, 400)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    made = Transformer(config).init_weights(0)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made.model.embed_tokens.weight.mul_(25)  # else all hidden states are nearly one
        # Where an answer begins, either letter has a logit of about 6 (two thirds of the probability together), give or
        # take what the question says.
        begin = made(torch.tensor([render_prompt(tokenizer, [{"role": "user", "content": "Hello!"}])]))[0, -1]
        for letter, sign in (("A", 1.0), ("B", -1.0)):
            row = 1.5 * begin / begin.norm() + sign * 0.3 * direction
            made.lm_head.weight[tokenizer.encode(letter)[0]] = row
    folder = tmp_path_factory.mktemp("served") / "tiny"
    tokenizer.save(folder)
    save_model(folder, made, eos_token_id=tokenizer.end_id)
    return folder


@pytest.fixture
def server(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    """Serve the model on a free port, and name the address in the environment as a user would."""
    counting = Counting(create_app({"tiny": model}))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        host = uvicorn.Server(uvicorn.Config(counting, log_level="error", lifespan="on"))
        thread = threading.Thread(target=host.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{bound.getsockname()[1]}/v1")
        yield counting
        host.should_exit = True
        thread.join(20)


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    """Return a recipe with its prompts and principles beside it."""
    prompts = microworld.red_team_prompts(0, num=NUM_PROMPTS, split="train")
    write_jsonl(tmp_path / "prompts.jsonl", ({"messages": p.as_dicts()} for p in prompts))
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("qacCrR")]
    rules = {"principles": microworld.principles(), "few_shot_chats": [chat]}
    (tmp_path / "principles.json").write_text(json.dumps(rules))
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(model=model))
    return path


def artifacts(workspace: Path) -> tuple[list[dict[str, Any]], bytes, str]:
    """Return the revisions, the tuned weights, and the digest of the judgements of the newest run."""
    folder, manifest = latest_runs(workspace)["constitutional_ai"]
    with Store(workspace / "preferences.db") as store:
        digest = store.digest(manifest.run_id)
    weights = (folder / "model" / "model.safetensors").read_bytes()
    return list(read_jsonl(folder / "revisions.jsonl")), weights, digest


@pytest.mark.timeout(600)
def test_critiques_revisions_and_judgements_come_from_the_server_and_a_killed_run_asks_only_what_is_missing(
    server: Counting, recipe: Path, tmp_path: Path
) -> None:
    """Killed in the middle of the comparisons: the same files as uninterrupted, and no answered question again."""
    code, _, err = finish(trivium("run", recipe, "--workspace", tmp_path / "whole"))
    assert code == 0, err[-3000:]
    rows, weights, digest = artifacts(tmp_path / "whole")
    asked = server.asked
    letters = [body for body in asked if body.get("logprobs")]
    critiques = [body for body in asked if len(body["messages"]) == 4 + 3]
    revisions = [body for body in asked if len(body["messages"]) == 6 + 5]
    assert len(rows) == len(critiques) == len(revisions) == NUM_PROMPTS
    assert all(body["messages"][0]["content"] == "q" for body in critiques + revisions)
    told = {body["messages"][-2]["content"] for body in revisions}
    assert told == {row["critique"] for row in rows} and len(told) > 1
    assert all(row["revision"].strip() for row in rows)
    assert len(letters) == len(asked) - 2 * NUM_PROMPTS > NUM_PROMPTS
    _, manifest = latest_runs(tmp_path / "whole")["constitutional_ai"]
    assert manifest.summary["judged"]["asked"] == len(letters) and manifest.summary["judged"]["malformed"] == 0
    assert manifest.summary["kinds"] == {"ai": NUM_PROMPTS}
    with Store(tmp_path / "whole" / "preferences.db") as store:
        soft = [chance for ranking in store.rankings(manifest.run_id) for _, _, chance in ranking.soft]
    assert len(soft) == len(letters) / 2 and all(0 < chance < 1 for chance in soft) and len(set(soft)) > 5

    total, before = len(asked), 2 * NUM_PROMPTS + len(letters) // 2
    server.asked, server.hold_at = [], before
    cut = trivium("run", recipe, "--workspace", tmp_path / "cut")
    assert server.held.wait(120)
    cut.send_signal(signal.SIGKILL)
    cut.communicate()
    server.go.set()
    (kept,) = (tmp_path / "cut").glob("constitutional_ai/*/checkpoints/answers.jsonl")
    answered = len(list(read_jsonl(kept))) - 2 * NUM_PROMPTS  # the policy's own responses were not asked here
    assert before - 8 <= answered < before  # at most four were on their way, as many perhaps not yet written down
    server.asked = []
    code, _, err = finish(trivium("run", recipe, "--workspace", tmp_path / "cut"))
    assert code == 0, err[-3000:]
    assert len(server.asked) == total - answered
    assert artifacts(tmp_path / "cut") == (rows, weights, digest)
