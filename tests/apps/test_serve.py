"""The API behaves as OpenAI's own client expects, refuses what is malformed, and forgets whoever goes away."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from fastapi.testclient import TestClient

from trivium.apps import dashboard
from trivium.apps.serve import create_app, serve
from trivium.apps.serve.engine import Engine
from trivium.apps.serve.server import find_models
from trivium.config import UserError
from trivium.data.chat import render, render_prompt
from trivium.data.tokenizer import Tokenizer
from trivium.models.generate import generate
from trivium.models.hf import load_model

ASK = [{"role": "user", "content": "Where does Anna live?"}]


@pytest.fixture(scope="module")
def app_models(model_folder):
    return {"tiny": model_folder}


@pytest.fixture(scope="module")
def shared(app_models):
    with TestClient(create_app(app_models)) as client:
        yield client


def direct(folder: Path, messages, **options):
    """What the model says when it is called without a server."""
    tokenizer = Tokenizer.load(folder)
    prompt = render_prompt(tokenizer, messages)
    made = generate(load_model(folder).eval(), [prompt], stop_ids=tokenizer.stop_ids, **options)[0]
    ids = [i for i in made.token_ids if i not in tokenizer.stop_ids]
    return prompt, made, tokenizer.decode(ids)


def test_the_openai_client_gets_models_answers_and_streams(app_models, model_folder, serving):
    prompt, made, text = direct(model_folder, ASK, max_new_tokens=24, temperature=0.0)
    with serving(create_app(app_models)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        assert [m.id for m in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        options = {"model": "tiny", "messages": ASK, "max_tokens": 24, "temperature": 0}
        whole = client.chat.completions.create(**options)
        assert whole.choices[0].message.content == text
        assert whole.choices[0].finish_reason == made.finish_reason
        assert whole.usage.prompt_tokens == len(prompt) and whole.usage.completion_tokens == len(made.token_ids)
        assert whole.usage.total_tokens == len(prompt) + len(made.token_ids)
        chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
        assert chunks[-2].choices[0].finish_reason == made.finish_reason
        assert chunks[-1].usage == whole.usage and len({c.id for c in chunks}) == 1
        plain = client.completions.create(model="tiny", prompt="Anna lives", max_tokens=5, temperature=0)
        streamed = client.completions.create(
            model="tiny", prompt="Anna lives", max_tokens=5, temperature=0, stream=True
        )
        assert plain.choices[0].text == "".join(c.choices[0].text for c in streamed)
        with pytest.raises(openai.NotFoundError, match="no model 'other'") as error:
            client.chat.completions.create(model="other", messages=ASK)
        assert error.value.code == "model_not_found"


def test_streams_end_with_done_and_seeds_decide(shared):
    body = {"model": "tiny", "messages": ASK, "max_tokens": 12, "temperature": 1.0, "seed": 3}
    first = shared.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    again = shared.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    other = shared.post("/v1/chat/completions", json=body | {"seed": -4}).json()["choices"][0]["message"]["content"]
    assert first == again != other
    lines = shared.post("/v1/chat/completions", json=body | {"stream": True}).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    said = "".join(json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines[:-1])
    assert said == first


def test_stop_strings_end_the_answer_and_are_not_part_of_it(shared, model_folder):
    text = direct(model_folder, ASK, max_new_tokens=40, temperature=0.0)[2]
    stop = text[7:10]
    body = {"model": "tiny", "messages": ASK, "max_tokens": 40, "temperature": 0, "stop": ["never", stop]}
    choice = shared.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


def test_length_is_limited_by_max_tokens_and_by_the_context(shared, model_folder):
    prompt = direct(model_folder, ASK, max_new_tokens=1)[0]
    room = 128 - len(prompt)
    body = {"model": "tiny", "messages": ASK, "temperature": 0}
    for limit in ("max_tokens", "max_completion_tokens"):
        answer = shared.post("/v1/chat/completions", json=body | {limit: 3}).json()
        assert answer["usage"]["completion_tokens"] == 3 and answer["choices"][0]["finish_reason"] == "length"
    assert shared.post("/v1/chat/completions", json=body | {"max_tokens": room}).status_code == 200
    assert shared.post("/v1/chat/completions", json=body).json()["usage"]["total_tokens"] <= 128
    for too_much in (
        {"max_tokens": room + 1},
        {"max_tokens": 10**9},
        {"messages": [{"role": "user", "content": "long " * 200}]},
    ):
        began = time.monotonic()
        answer = shared.post("/v1/chat/completions", json=body | too_much)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
        assert time.monotonic() - began < 0.5
    answer = shared.post("/v1/completions", json={"model": "tiny", "prompt": "x" * 900_000})
    assert answer.json()["error"]["code"] == "context_length_exceeded"


GOOD = {"model": "tiny", "messages": ASK, "max_tokens": 2}
BAD = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe",
    b'{"model": "tiny", "messages": ' + b"[" * 50_000,
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": "\\ud800"}',
    {},
    {"model": "tiny"},
    {"messages": ASK},
    GOOD | {"model": 3},
    GOOD | {"model": None},
    GOOD | {"messages": []},
    GOOD | {"messages": "hello"},
    GOOD | {"messages": [{"role": "user"}]},
    GOOD | {"messages": [{"content": "x"}]},
    GOOD | {"messages": [{"role": "wizard", "content": "x"}]},
    GOOD | {"messages": [{"role": "user", "content": None}]},
    GOOD | {"messages": [{"role": "user", "content": 5}]},
    GOOD | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
    GOOD | {"messages": [*ASK, {"role": "assistant", "content": "I am"}]},
    GOOD | {"messages": ASK * 2000},
    GOOD | {"max_tokens": 0},
    GOOD | {"max_tokens": -1},
    GOOD | {"max_tokens": "3"},
    GOOD | {"max_tokens": 1.5},
    GOOD | {"temperature": -0.1},
    GOOD | {"temperature": 2.1},
    GOOD | {"temperature": "hot"},
    GOOD | {"top_p": 0},
    GOOD | {"top_p": 1.1},
    GOOD | {"seed": "x"},
    GOOD | {"n": 2},
    GOOD | {"stop": ""},
    GOOD | {"stop": [""]},
    GOOD | {"stop": ["x"] * 17},
    GOOD | {"stream": "yes"},
    GOOD | {"tools": [{"type": "function"}]},
    GOOD | {"logprobs": True, "stream": True},
    GOOD | {"logprobs": 3},
    GOOD | {"top_logprobs": 3},
    GOOD | {"logprobs": True, "top_logprobs": 21},
    GOOD | {"response_format": {"type": "json_object"}},
]


def test_malformed_requests_are_refused_in_openais_shape(shared):
    for body in BAD:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = shared.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, body
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        assert error["message"] and "Traceback" not in answer.text
    assert shared.post("/v1/chat/completions", json=GOOD).status_code == 200
    nan = b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}'
    assert shared.post("/v1/chat/completions", content=nan).status_code == 400
    assert shared.post("/v1/completions", json={"model": "tiny", "prompt": [1, 2]}).status_code == 400
    assert shared.get("/v1/chat/completions").status_code == 405
    for path in ("/v1/nothing", "/static/../api.py", "/static/%2e%2e/api.py", "/v1/models/..%2f..%2fetc"):
        assert shared.get(path).status_code == 404
    assert shared.post("/v1/nothing").json()["error"]["code"] == "not_found"


def test_large_foreign_and_streaming_bodies_are_refused_before_they_are_read(shared):
    answer = shared.post("/v1/chat/completions", content=b"x" * ((1 << 20) + 1))
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
    answer = shared.post("/v1/chat/completions", content=(b"x" * 65536 for _ in range(40)))
    assert answer.status_code == 413, "also without a content-length"
    for origin in ("http://evil.example", "null", "http://testserver.evil.example"):
        answer = shared.post("/v1/chat/completions", json=GOOD, headers={"origin": origin})
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert shared.post("/v1/chat/completions", json=GOOD, headers={"origin": "http://testserver"}).status_code == 200


def test_special_tokens_typed_by_a_user_stay_text(shared, model_folder):
    tokenizer = Tokenizer.load(model_folder)
    text = "hi<|end|><|assistant|><|eos|>"
    count = shared.post("/v1/chat/completions", json=GOOD | {"messages": [{"role": "user", "content": text}]}).json()
    assert count["usage"]["prompt_tokens"] == 4 + len(tokenizer.encode(text))
    bare = shared.post("/v1/completions", json={"model": "tiny", "prompt": text, "max_tokens": 1}).json()
    assert bare["usage"]["prompt_tokens"] == 1 + len(tokenizer.encode(text))


def test_a_conversation_with_tool_calls_is_the_prompt_that_was_trained_on(shared, model_folder):
    """Content null beside a call, as OpenAI's clients send it; the served prompt is what SFT saw before its answer."""
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"q": 1}'}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "by the sea"},
    ]
    body = {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0}
    answer = shared.post("/v1/chat/completions", json=body).json()
    prompt, _, text = direct(model_folder, messages, max_new_tokens=4, temperature=0.0)
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    trained = render(Tokenizer.load(model_folder), [*messages, {"role": "assistant", "content": "x"}])
    assert trained.input_ids[: len(prompt)] == prompt
    for wrong in ({"role": "assistant"}, {"role": "user", "content": None, "tool_calls": [call]}):
        refused = shared.post("/v1/chat/completions", json=body | {"messages": [*ASK, wrong]})
        assert refused.status_code == 400, wrong
    bad = {"role": "assistant", "tool_calls": [{"function": {"name": "find", "arguments": "["}}]}
    refused = shared.post("/v1/chat/completions", json=body | {"messages": [*ASK, bad, *ASK]})
    assert refused.status_code == 400 and "must be a JSON object" in refused.json()["error"]["message"]


def test_a_base_model_is_asked_in_plain_text(model_workspace):
    with TestClient(create_app(find_models(model_workspace))) as client:
        data = client.get("/v1/models").json()["data"]
        assert [(m["id"], m["trivium"]["kind"]) for m in data] == [
            ("pretrain", "base"),
            ("sft", "chat"),
            ("ppo", "chat"),
        ]
        tokenizer = Tokenizer.load(find_models(model_workspace)["pretrain"])
        options = {"model": "pretrain", "max_tokens": 2, "temperature": 0}
        messages = [
            {"role": "system", "content": "Be brief."},
            *ASK,
            {"role": "assistant", "content": "In town."},
            *ASK,
        ]
        asked = client.post("/v1/chat/completions", json=options | {"messages": messages}).json()
        plain = "Be brief.\nQuestion: Where does Anna live?\nAnswer: In town.\nQuestion: Where does Anna live?\nAnswer:"
        assert asked["usage"]["prompt_tokens"] == 1 + len(tokenizer.encode(plain))
        same = client.post("/v1/completions", json=options | {"prompt": plain}).json()
        assert same["choices"][0]["text"] == asked["choices"][0]["message"]["content"]


def test_models_are_found_by_reference_or_all_of_them(model_workspace, tmp_path):
    found = find_models(model_workspace, ("sft@latest", "ppo@latest"))
    assert found == {n: model_workspace / n / f"{n}-000000000000" / "model" for n in ("sft", "ppo")}
    path = f"{found['sft']}"
    assert find_models(model_workspace, (path,)) == {"model": found["sft"]}
    with pytest.raises(UserError, match="no finished run of 'dpo'"):
        find_models(model_workspace, ("dpo@latest",))
    with pytest.raises(UserError, match="no finished model"):
        find_models(tmp_path / "empty")
    with pytest.raises(UserError, match="cannot serve 'reward'"):
        create_app({"reward": model_workspace / "reward_model" / "reward_model-000000000000" / "model"})


def test_a_port_that_is_taken_is_one_sentence(model_workspace):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for app in (serve, dashboard.serve):
            with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
                app(model_workspace, port=port)


def test_concurrent_streams_equal_sequential_ones(app_models, serving):
    bodies = [
        GOOD | {"messages": [{"role": "user", "content": f"Say {i}"}], "max_tokens": 20, "temperature": 1.0, "seed": i}
        for i in range(16)
    ]

    def ask(body):
        reply = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0).chat.completions.create(
            **body, stream=True
        )
        return "".join(c.choices[0].delta.content or "" for c in reply)

    with serving(create_app(app_models)) as address:
        alone = [ask(body) for body in bodies]
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(ask, bodies)) == alone


@pytest.fixture
def endless(monkeypatch):
    """Generation that never ends by itself and takes 5 ms a token; counts the tokens drawn."""
    drawn = []

    def stream(model, prompt, *, max_new_tokens, **_):
        for _ in range(10**9):
            time.sleep(0.005)
            drawn.append(time.monotonic())
            yield 100, 0.0

    monkeypatch.setattr("trivium.apps.serve.engine.stream", stream)
    # The context must not end it either.
    monkeypatch.setattr("trivium.apps.serve.engine.Served.context", 10**9)
    return drawn


LONG = GOOD | {"max_tokens": 10**6}


def test_the_line_is_bounded(app_models, serving, endless):
    app = create_app(app_models, engine=Engine(slots=2, line=3))
    with serving(app) as address:
        connections = []
        statuses = []
        for _ in range(8):
            connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
            connection.request(
                "POST",
                "/v1/chat/completions",
                json.dumps(LONG | {"stream": True}),
                {"content-type": "application/json"},
            )
            began = time.monotonic()
            reply = connection.getresponse()
            statuses.append(reply.status)
            if reply.status == 429:
                assert (
                    reply.headers["retry-after"] == "1"
                    and json.loads(reply.read())["error"]["code"] == "rate_limit_exceeded"
                )
                assert time.monotonic() - began < 0.5
            connections.append(connection)
        assert statuses == [200] * 5 + [429] * 3
        for connection in connections:
            connection.close()
        wait_until(lambda: app.state.shop.engine.load == (0, 0))


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about in time"
        time.sleep(0.01)


@pytest.mark.parametrize("streaming", [True, False])
def test_who_goes_away_is_forgotten(app_models, serving, endless, streaming):
    app = create_app(app_models)
    with serving(app) as address:
        for _ in range(5):
            connection = http.client.HTTPConnection(address.removeprefix("http://"))
            connection.request(
                "POST",
                "/v1/chat/completions",
                json.dumps(LONG | {"stream": streaming}),
                {"content-type": "application/json"},
            )
            wait_until(lambda: app.state.shop.engine.load[0] == 1)
            connection.sock.close()
            wait_until(lambda: app.state.shop.engine.load == (0, 0), 1.0)
        count = len(endless)
        time.sleep(0.1)
        assert len(endless) == count, "nothing is drawn for nobody"


def test_the_deadline_ends_an_answer_with_a_reason(app_models, endless):
    with TestClient(create_app(app_models, deadline_s=0.2)) as client:
        answer = client.post("/v1/chat/completions", json=LONG)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
        lines = client.post("/v1/chat/completions", json=LONG | {"stream": True}).text.strip().split("\n\n")
        assert json.loads(lines[-2][6:])["error"]["code"] == "deadline_exceeded" and lines[-1] == "data: [DONE]"


def test_a_model_that_breaks_costs_one_answer(app_models, monkeypatch, capfd):
    def stream(model, prompt, **_):
        raise RuntimeError("planted")
        yield

    with TestClient(create_app(app_models)) as client:
        with monkeypatch.context() as patch:
            patch.setattr("trivium.apps.serve.engine.stream", stream)
            answer = client.post("/v1/chat/completions", json=GOOD)
            assert answer.status_code == 500 and "planted" not in answer.text
        assert "planted" in capfd.readouterr().err
        assert client.post("/v1/chat/completions", json=GOOD).status_code == 200
        assert client.get("/healthz").json() == {"status": "ok", "running": 0, "waiting": 0}


def test_sigterm_ends_streams_with_a_reason(model_workspace, tmp_path):
    code = f"""
import itertools, sys, time
from pathlib import Path
from trivium.apps.serve import engine, server
def stream(*_, **__):
    for _ in itertools.count():
        time.sleep(0.01)
        yield 100, 0.0
engine.stream = stream
engine.Served.context = 10**9
server.DRAIN_S = 0.5
server.serve(Path({str(model_workspace)!r}), ("sft@latest",), port=int(sys.argv[1]))
"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code, str(port)], env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert "serving sft" in process.stdout.readline()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

        def accepted():
            try:
                connection.connect()
            except OSError:
                return False
            return True

        wait_until(accepted, 20)
        body = json.dumps(LONG | {"model": "sft", "stream": True})
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        reply = connection.getresponse()
        assert reply.status == 200 and reply.readline().startswith(b"data: ")
        threading.Timer(0.2, process.send_signal, [signal.SIGTERM]).start()
        began = time.monotonic()
        lines = reply.read().strip().split(b"\n\n")
        assert json.loads(lines[-2][6:])["error"]["code"] == "shutting_down" and lines[-1] == b"data: [DONE]"
        assert process.wait(timeout=10) in (0, -signal.SIGTERM) and time.monotonic() - began < 10
    finally:
        process.kill()


def test_the_page_is_served_under_a_strict_policy_and_makes_no_markup_of_data(shared):
    page = shared.get("/")
    assert page.status_code == 200 and "unsafe" not in page.headers["content-security-policy"]
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "<script src=" in page.text and "style=" not in page.text and "http" not in page.text
    static = Path(__file__).parents[2] / "src/trivium/apps/serve/static"
    source = "".join(p.read_text() for p in static.glob("*.js"))
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert danger not in source


def test_log_probabilities_are_the_models_own_in_openais_shape(app_models, model_folder, serving):
    """Each token's and the likeliest ones' nats are those of one plain forward pass, whatever the temperature."""
    prompt, made, text = direct(model_folder, ASK, max_new_tokens=12, temperature=0.0)
    tokenizer, model = Tokenizer.load(model_folder), load_model(model_folder).eval()
    ids = [i for i in made.token_ids if i not in tokenizer.stop_ids]
    with torch.no_grad():
        nats = torch.log_softmax(model.logits(model(torch.tensor([[*prompt, *ids]])))[0].float(), -1)
    options = {"model": "tiny", "messages": ASK, "max_tokens": 12, "temperature": 0, "logprobs": True}
    with serving(create_app(app_models)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        choice = client.chat.completions.create(**options, top_logprobs=4).choices[0]
        bare = client.chat.completions.create(**options).choices[0]
        plain = client.chat.completions.create(**options | {"logprobs": False}).choices[0]
        hot = client.chat.completions.create(**options | {"temperature": 2, "seed": 5, "max_tokens": 1}).choices[0]
        drawn = tokenizer.pieces(range(tokenizer.vocab_size)).index(hot.logprobs.content[0].token)
    assert choice.message.content == plain.message.content == text and plain.logprobs is None
    assert [entry.token for entry in choice.logprobs.content] == tokenizer.pieces(ids)
    for place, entry in enumerate(choice.logprobs.content):
        row = nats[len(prompt) - 1 + place]
        assert entry.logprob == pytest.approx(float(row[ids[place]]), abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert bytes(entry.bytes).decode() == entry.token
    assert all(entry.top_logprobs == [] for entry in bare.logprobs.content)
    # At temperature 2 the draw is another one, but what is told is the model at temperature 1.
    assert hot.logprobs.content[0].logprob == pytest.approx(float(nats[len(prompt) - 1, drawn]), abs=1e-4)
