"""A model behind a server: asked several at a time, failures counted, log-probabilities read where they are told."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trivium.config import UserError
from trivium.records import Conversation, Message
from trivium.rewards.endpoint import Endpoint, letters_of


def ask(text):
    return Conversation(messages=(Message(role="user", content=text),))


def said(text):
    return {"choices": [{"message": {"content": text}}]}


def listed(**nats):
    top = [{"token": token, "logprob": value} for token, value in nats.items()]
    return {"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": top}]}}]}


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((body, self.headers.get("Authorization")))
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        status, reply = self.server.answer(body)
        with self.server.lock:
            self.server.running -= 1
        self.send_response(status)
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    made.daemon_threads = True
    made.seen, made.running, made.most, made.lock = [], 0, 0, threading.Lock()
    made.answer = lambda body: (200, said(body["messages"][-1]["content"].upper()))
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def endpoint(server, **options):
    return Endpoint("m", base_url=f"http://127.0.0.1:{server.server_port}/v1", backoff_s=0.0, **options)


def test_every_question_gets_its_own_answer_a_bounded_number_at_once(server):
    """All threads wait for each other, so exactly `concurrency` are under way; seeds differ by question and step."""
    gate = threading.Barrier(3)

    def answer(body):
        gate.wait(20)
        return 200, said(body["messages"][-1]["content"].upper())

    server.answer = answer
    model = endpoint(server, api_key="secret", max_tokens=7, temperature=0.5, seed=3, concurrency=3)
    asked = {n: ask(f"question {n}") for n in (4, 0, 2, 7, 8, 9)}
    assert dict(model.write(asked, 1)) == {n: f"QUESTION {n}" for n in asked}
    assert server.most == 3 and len(server.seen) == 6
    body, key = server.seen[0]
    assert (key, body["model"], body["max_tokens"], body["temperature"]) == ("Bearer secret", "m", 7, 0.5)
    assert len({body["seed"] for body, _ in server.seen}) == 6
    assert model.counts == {"asked": 6, "failed": 0}


def test_a_question_that_is_refused_or_answered_by_nothing_has_failed_and_the_others_have_not(server):
    replies = {
        "long": (400, {"error": {"message": "too long"}}),
        "empty": (200, said("  ")),
        "odd": (200, {"choices": []}),
        "broken": (200, b"<html>"),
        "null": (200, said(None)),
        "fine": (200, said("yes")),
    }
    server.answer = lambda body: replies[body["messages"][0]["content"]]
    model = endpoint(server)
    asked = dict(enumerate(map(ask, replies)))
    assert dict(model.write(asked, 1)) == {0: None, 1: None, 2: None, 3: None, 4: None, 5: "yes"}
    assert model.counts == {"asked": 6, "failed": 5} and len(server.seen) == 6


def test_a_busy_server_is_asked_again(server):
    replies = [(503, {}), (429, {}), (200, said("there"))]
    server.answer = lambda _: replies.pop(0)
    assert dict(endpoint(server).write({0: ask("x")}, 1)) == {0: "there"}
    assert len(server.seen) == 3


def test_a_refused_key_ends_the_work_and_what_was_answered_is_kept(server):
    """One at a time: two answers, then 401; nothing is asked after it, and the key is in no message."""
    server.answer = lambda body: (401, {}) if len(server.seen) == 3 else (200, said("ok"))
    found = []
    with pytest.raises(UserError, match="HTTP 401") as caught:
        found.extend(endpoint(server, api_key="secret", concurrency=1).write({n: ask(str(n)) for n in range(6)}, 1))
    assert "secret" not in str(caught.value)
    assert found == [(0, "ok"), (1, "ok")] and len(server.seen) == 3


def test_nobody_there_and_no_address_are_one_sentence(monkeypatch):
    nobody = Endpoint("m", base_url="http://127.0.0.1:9/v1", retries=1, backoff_s=0.0, timeout_s=2)
    with pytest.raises(UserError, match="did not answer"):
        dict(nobody.write({0: ask("x")}, 1))
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match="OPENAI_BASE_URL"):
        dict(Endpoint("m").write({0: ask("x")}, 1))


def test_letters_among_the_listed_tokens():
    found = letters_of([("A", math.log(0.5)), (" A", math.log(0.1)), ("b", math.log(0.2)), ("Apple", -0.1), ("[[", -1)])
    assert found == pytest.approx((0.6, 0.2))
    assert letters_of([("The", 0.0)]) == (0.0, 0.0)


def test_choices_are_read_from_log_probabilities(server):
    server.answer = lambda body: (200, listed(A=math.log(0.6), B=math.log(0.3), C=-9.0))
    model = endpoint(server)
    assert dict(model.choose({5: (ask("letter?"), ask("words?"))})) == {5: pytest.approx((0.6, 0.3))}
    body, _ = server.seen[0]
    assert body["logprobs"] is True and body["top_logprobs"] == 20 and body["max_tokens"] == 1
    assert body["messages"][0]["content"] == "letter?"


@pytest.mark.parametrize("status", [200, 400])
def test_a_server_without_log_probabilities_is_asked_in_words_and_not_tried_again(server, status):
    def answer(body):
        if body.get("logprobs"):
            return status, said("A") if status == 200 else {"error": {}}
        return 200, said("I think so: [[B]]")

    server.answer = answer
    model = endpoint(server, concurrency=1)
    asked = {n: (ask("letter?"), ask("words?")) for n in range(4)}
    assert dict(model.choose(asked)) == dict.fromkeys(asked, (0.0, 1.0))
    assert sum(bool(body.get("logprobs")) for body, _ in server.seen) == 1 and len(server.seen) == 5


def test_200_malformed_answers_are_no_choice(server):
    """Row 53: neither prose, nor two verdicts, nor nonsense becomes a preference; all are counted."""
    replies = ["A is good, but B too", "[[A]] [[B]]", "", "[[D]]", "no", "I cannot judge that."]
    server.answer = lambda body: (200, said(None if body.get("logprobs") else replies[len(server.seen) % len(replies)]))
    model = endpoint(server)
    found = dict(model.choose({n: (ask("l"), ask("w")) for n in range(200)}))
    assert len(found) == 200 and set(found.values()) == {None}
    assert model.counts == {"asked": 200, "failed": 200}
