import itertools
import json
import random
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from trivium.config import UserError
from trivium.records import Completion, Conversation, Message
from trivium.rewards.judge import OpenAIJudge, PairwiseJudge, as_reward, openai_annotators, parse_verdict

PROMPT = Conversation(messages=(Message(role="user", content="Tell me a joke."),))


def longer(prompt, first, second):
    return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[A]]", "A"), ("Because it is shorter: [[ b ]]", "B"), ("[[C]]", "tie"), ("[[tie]]", "tie"), ("A", "A"),
        (" b. ", "B"), ("**C**", "tie"), ("[[A]] or rather [[B]]", None), ("A good answer, so B", None), ("", None),
        ("[[D]]", None), ("A B", None), (None, None), (7, None), ("[[A]] and again [[A]]", "A"), ("[A]", "A"),
    ],
)  # fmt: skip
def test_verdicts(reply, verdict):
    assert parse_verdict(reply) == verdict


def test_both_orders_are_asked_and_an_even_judge_ranks_by_wins():
    asked = []

    def ask(prompt, first, second):
        asked.append((first, second))
        return longer(prompt, first, second)

    judge = PairwiseJudge(ask, name="length")
    assert judge.rank(PROMPT, ["aa", "a", "aaa", "bb"]) == [[2], [0, 3], [1]]
    assert len(asked) == judge.counts["asked"] == 12 and len(set(asked)) == 12
    assert judge.counts["malformed"] == judge.counts["disagreed"] == 0


def test_swapping_the_two_texts_negates_the_outcome():
    judge = PairwiseJudge(longer, name="length")
    assert judge.compare(PROMPT, "long", "x") == 1.0 == -judge.compare(PROMPT, "x", "long")


def test_a_judge_that_likes_the_first_place_says_nothing():
    judge = PairwiseJudge(lambda *_: "A", name="first")
    assert judge.compare(PROMPT, "a", "b") == 0.0
    assert judge.rank(PROMPT, ["a", "b", "c"]) == [[0, 1, 2]]
    assert judge.counts["disagreed"] == 4


def test_malformed_answers_are_counted_and_never_become_a_preference():
    rng = random.Random(53)
    replies = ["", "maybe", "[[A]][[B]]", None, "A is good but B too", "{}", "[[", "I refuse."]
    judge = PairwiseJudge(lambda *_: parse_verdict(rng.choice(replies)), name="broken")
    for _ in range(100):
        assert judge.compare(PROMPT, "a", "b") is None
    assert judge.counts == {"asked": 200, "malformed": 200, "disagreed": 0}
    assert judge.rank(PROMPT, ["a", "b", "c"]) == [[0, 1, 2]]


@pytest.mark.parametrize("seed", range(20))
def test_no_pair_is_ranked_that_was_not_judged(seed):
    rng = random.Random(seed)
    texts = ["a" * n for n in rng.sample(range(1, 9), 5)]
    failing = {frozenset(pair) for pair in itertools.combinations(texts, 2) if rng.random() < 0.3}
    judge = PairwiseJudge(lambda p, a, b: None if frozenset((a, b)) in failing else longer(p, a, b), name="gaps")
    groups = judge.rank(PROMPT, texts)
    assert sorted(i for group in groups for i in group) == list(range(5))
    for better, worse in itertools.combinations(groups, 2):
        assert not any(frozenset((texts[i], texts[j])) in failing for i in better for j in worse)


def test_a_judge_of_texts_is_a_reward():
    completions = [Completion(prompt_id="p", text=text) for text in ("ab", "abc")]
    assert as_reward(lambda prompt, text: len(text))([PROMPT, PROMPT], completions) == [2.0, 3.0]


class _Server(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        status, reply = self.server.replies.pop(0) if self.server.replies else (200, self.server.answer(body))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    made = HTTPServer(("127.0.0.1", 0), _Server)
    made.seen, made.replies = [], []
    made.answer = lambda body: json.dumps({"choices": [{"message": {"content": "[[A]]"}}]})
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def endpoint(server, **options):
    return OpenAIJudge("m", base_url=f"http://127.0.0.1:{server.server_port}/v1", backoff_s=0.0, **options)


def test_an_endpoint_is_asked_in_the_usual_way(server):
    def prefers_long(body):
        asked = body["messages"][0]["content"]
        return json.dumps(
            {"choices": [{"message": {"content": "[[A]]" if asked.index("wordy") < asked.index("terse") else "[[B]]"}}]}
        )

    server.answer = prefers_long
    judge = endpoint(server, api_key="secret", criterion="Which is longer?")
    assert judge.rank(PROMPT, ["terse", "wordy"]) == [[1], [0]]
    path, key, body = server.seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["model"] == "m" and body["temperature"] == 0 and "Which is longer?" in body["messages"][0]["content"]
    assert judge.kind == "ai"


def test_a_busy_server_is_asked_again_and_nonsense_is_malformed(server):
    server.replies += [(503, ""), (429, "")]
    judge = endpoint(server)
    assert judge.compare(PROMPT, "a", "b") == 0.0  # always the first: a tie, after two failures
    assert len(server.seen) == 4
    server.replies += [(200, "not json"), (200, '{"choices": []}')]
    assert judge.compare(PROMPT, "a", "b") is None
    assert judge.counts["malformed"] == 2


def test_a_refusal_is_not_repeated_and_the_key_is_not_shown(server):
    server.replies.append((401, "wrong key: secret"))
    with pytest.raises(UserError, match="HTTP 401") as caught:
        endpoint(server, api_key="secret").compare(PROMPT, "a", "b")
    assert "secret" not in str(caught.value) and len(server.seen) == 1


def test_nobody_there_ends_in_one_sentence():
    judge = OpenAIJudge("m", base_url="http://127.0.0.1:9/v1", retries=1, backoff_s=0.0, timeout_s=2)
    with pytest.raises(UserError, match="did not answer"):
        judge.compare(PROMPT, "a", "b")


def test_the_address_comes_from_the_environment_when_asked_and_must_be_http(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    judge = OpenAIJudge("m")  # making one contacts nobody
    with pytest.raises(UserError, match="OPENAI_BASE_URL"):
        judge.compare(PROMPT, "a", "b")
    monkeypatch.setenv("OPENAI_BASE_URL", "file:///etc")
    with pytest.raises(UserError, match="not http"):
        judge.compare(PROMPT, "a", "b")


def test_a_recipe_can_name_the_judge(monkeypatch):
    """`openai_annotators` is the model that the environment names; without one it says what to set."""
    monkeypatch.delenv("TRIVIUM_JUDGE_MODEL", raising=False)
    with pytest.raises(UserError, match="set TRIVIUM_JUDGE_MODEL"):
        openai_annotators(0)
    monkeypatch.setenv("TRIVIUM_JUDGE_MODEL", "my-model")
    (judge,) = openai_annotators(0)
    assert (judge.kind, judge.name) == ("ai", "my-model@judge")
