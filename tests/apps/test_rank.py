import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

import trivium.apps.rank as rank_package
import trivium.apps.rank.app as rank_app
from trivium.apps.rank import create_app, serve
from trivium.apps.rank.security import MAX_BODY_BYTES
from trivium.config import UserError
from trivium.preferences.assign import order_shown
from trivium.preferences.store import Store
from trivium.records import Completion, Conversation, Message

ORIGIN = "http://127.0.0.1:8765"
POLICIES = ("secret-sft@10", "secret-ppo@20")


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "preferences.db") as opened:
        items = []
        for index in range(2):
            prompt = Conversation(messages=(Message(role="user", content=f"Question {index} \ud800"),))
            texts = ["one", "two", "three \x00 \ud800", "<img src=x onerror=alert(1)>"]
            answers = [
                Completion(prompt_id=prompt.id, text=t, policy=POLICIES[n % 2], finish_reason="length")
                for n, t in enumerate(texts)
            ]
            items.append((prompt, answers))
        opened.add_tasks("c", items, overlap=2)
        yield opened


@pytest.fixture
def client(store):
    client = TestClient(create_app(store, collection="c"), base_url=ORIGIN, raise_server_exceptions=False)
    client.headers["origin"] = ORIGIN
    client.headers["x-csrf-token"] = client.get("/api/session").json()["token"]
    return client


def body(client, **more):
    task = client.get("/api/task", params={"annotator": "ann"}).json()["task"]
    return {"task": task["id"], "annotator": "ann", "groups": [[2], [0, 3], [1]], "key": "k1", **more}


def test_a_ranking_goes_into_the_database_as_human_in_the_order_shown(client, store):
    given = body(client, seconds=4.5, rationale="clearer")
    assert client.post("/api/rank", json=given).json() == {"stored": True}
    assert client.post("/api/rank", json=given).json() == {"stored": False}
    (ranking,) = store.rankings("c")
    shown = order_shown(store.task(given["task"]), "ann")
    assert ranking.groups == ((shown[2],), (shown[0], shown[3]), (shown[1],))
    assert (ranking.kind, ranking.annotator, ranking.order_shown) == ("human", "ann", shown)
    assert (ranking.seconds, ranking.rationale) == (4.5, "clearer")
    progress = client.get("/api/task", params={"annotator": "ann"}).json()["progress"]
    assert (progress["done"], progress["left"], progress["mean_seconds"]) == (1, 1, 4.5)


def test_the_page_is_blind_and_in_a_random_order_that_a_reload_keeps(client, store):
    answer = client.get("/api/task", params={"annotator": "ann"})
    assert "secret" not in answer.text and "policy" not in answer.text
    assert answer.json() == client.get("/api/task", params={"annotator": "ann"}).json()
    task = store.task(answer.json()["task"]["id"])
    texts = [store.completion(name).text for name in order_shown(task, "ann")]
    assert [r["text"] for r in answer.json()["task"]["responses"]] == texts
    assert answer.json()["task"]["responses"][0]["cut_off"] is True
    orders = {order_shown(task, f"annotator {n}") for n in range(20)}
    assert len(orders) > 5


def test_skip_and_demonstration_and_the_end(client, store):
    given = body(client)
    assert client.post("/api/skip", json={"task": given["task"], "annotator": "ann", "reason": "unclear"}).json()[
        "stored"
    ]
    other = body(client)
    assert other["task"] != given["task"]
    ideal = {"task": other["task"], "annotator": "ann", "response": "Better: <b>so</b>."}
    assert client.post("/api/demonstration", json=ideal).json() == {"stored": True}
    assert store.demonstrations()[0].response == "Better: <b>so</b>."
    client.post("/api/rank", json={**other, "groups": [], "none_acceptable": True})
    assert store.rankings("c")[0].none_acceptable is True
    end = client.get("/api/task", params={"annotator": "ann"}).json()
    assert end["task"] is None
    assert (end["progress"]["done"], end["progress"]["left"], end["progress"]["skipped"]) == (1, 0, 1)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"groups": [[0], [1], [2]]}, 422),
        ({"groups": [[0], [1], [2], [4]]}, 422),
        ({"groups": [[0], [1], [2], [2]]}, 422),
        ({"groups": [[0], [1], [2], [-1]]}, 422),
        ({"groups": "0123"}, 422),
        ({"groups": [[0], [1], [2], [3.5]]}, 422),
        ({"kind": "simulated"}, 422),
        ({"annotator": ""}, 422),
        ({"annotator": "a\u0000b"}, 422),
        ({"annotator": "\ud800"}, 422),
        ({"seconds": -1}, 422),
        ({"seconds": 1e9}, 422),
        ({"task": "0" * 20}, 404),
        ({"task": "../../etc/passwd"}, 422),
        ({"key": ""}, 422),
    ],
)
def test_what_is_no_ranking_is_refused_in_a_sentence(client, store, change, status):
    # Sent as raw ASCII JSON: the client library itself cannot encode a lone surrogate.
    answer = client.post(
        "/api/rank", content=json.dumps({**body(client), **change}), headers={"content-type": "application/json"}
    )
    assert answer.status_code == status
    assert len(answer.json()["error"]["message"]) > 10
    assert store.counts()["rankings"] == 0


def test_a_second_opinion_of_the_same_annotator_is_a_conflict(client, store):
    given = body(client)
    client.post("/api/rank", json=given)
    answer = client.post("/api/rank", json={**given, "groups": [[0], [1], [2], [3]], "key": "k2"})
    assert answer.status_code == 409
    assert store.counts()["rankings"] == 1


def test_tasks_of_another_collection_are_not_served(store):
    client = TestClient(create_app(store, collection="other"), base_url=ORIGIN)
    assert client.get("/api/task", params={"annotator": "a"}).json()["task"] is None
    headers = {"origin": ORIGIN, "x-csrf-token": client.get("/api/session").json()["token"]}
    skipped = {"task": store.tasks("c")[0].id, "annotator": "a", "reason": "x"}
    assert client.post("/api/skip", json=skipped, headers=headers).status_code == 404


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"origin": "https://evil.example"}, 403, "origin"),
        ({"origin": "http://127.0.0.1:9999"}, 403, "origin"),
        ({"origin": "null"}, 403, "origin"),
        ({"origin": ""}, 403, "origin"),
        ({"x-csrf-token": ""}, 403, "token"),
        ({"x-csrf-token": "0" * 64}, 403, "token"),
        ({"x-csrf-token": "ü".encode("latin-1")}, 403, "token"),
        ({"cookie": "trivium_rank=" + "0" * 64}, 403, "token"),
        ({"host": "evil.example"}, 421, "host"),
        ({"host": "evil.example:8765"}, 421, "host"),
        ({"host": "[oops"}, 421, "host"),
    ],
)
def test_cross_site_requests_store_nothing(client, store, headers, status, code):
    given = body(client)
    if "cookie" in headers:
        client.cookies.clear()
    answer = client.post("/api/rank", json=given, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert store.counts()["rankings"] == 0


def test_a_token_of_another_session_is_refused(client, store):
    client.cookies.clear()
    assert client.post("/api/rank", json=body(client)).status_code == 403
    assert store.counts()["rankings"] == 0


def test_big_bodies_are_refused_with_and_without_a_length(client):
    huge = b"x" * (MAX_BODY_BYTES + 1)
    assert client.post("/api/rank", content=huge).json()["error"]["code"] == "size"
    assert client.post("/api/rank", content=iter([huge])).status_code == 413
    assert client.post("/api/rank", content=b"x", headers={"content-length": "-1"}).status_code == 413


def test_headers_methods_and_json_errors(client):
    for path in ("/", "/static/page.js", "/api/session", "/nothing", "/static/../app.py", "/static/%2e%2e/app.py"):
        answer = client.get(path)
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; base-uri 'none'")
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
    assert client.get("/static/%2e%2e/app.py").status_code == 404
    assert client.get("/nothing").json()["error"]["code"] == "http"
    assert client.get("/api/rank").status_code == 405
    assert client.get("/api/task").status_code == 422
    assert client.post("/api/rank", content=b"{", headers={"content-type": "application/json"}).status_code == 422
    cookie = TestClient(client.app, base_url=ORIGIN).get("/").headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie


def test_a_fault_of_ours_is_json_too_and_shows_nothing_of_the_inside(client, store, monkeypatch):
    monkeypatch.setattr(Store, "progress", lambda *a: 1 / 0)
    answer = client.get("/api/task", params={"annotator": "a"})
    assert answer.status_code == 500
    assert "division" not in answer.text
    assert "content-security-policy" in answer.headers


def test_nothing_inline_and_no_html_from_data():
    folder = Path(rank_package.__file__).parent
    html = (folder / "templates" / "rank.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*\ssrc=)", html)
    assert "http://" not in html and "https://" not in html
    for script in (folder / "static").glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://", script.read_text()
        )


def test_the_page_escapes_the_given_name(store):
    client = TestClient(create_app(store, annotator='"><script>alert(1)</script>'), base_url=ORIGIN)
    assert "<script>alert" not in client.get("/").text


def test_serve_explains_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no preference database"):
        serve(tmp_path)
    Store(tmp_path / "preferences.db").close()
    with pytest.raises(UserError, match="no responses to rank"):
        serve(tmp_path)


def test_serve_explains_a_taken_port(store, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="--port"):
            serve(tmp_path, port=taken.getsockname()[1])


def test_an_acknowledged_ranking_outlives_a_killed_server(store, tmp_path):
    code = "import sys; from pathlib import Path; from trivium.apps.rank import serve; serve(Path(sys.argv[1]), port=0)"
    for number, (stop, name) in enumerate(((signal.SIGKILL, "ann"), (signal.SIGINT, "bob"))):
        server = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
        try:
            url = server.stdout.readline().split()[-1].rstrip("/")
            with httpx.Client(base_url=url, headers={"origin": url}) as client:
                client.headers["x-csrf-token"] = client.get("/api/session").json()["token"]
                given = {**body(client), "annotator": name}
                assert client.post("/api/rank", json=given).json() == {"stored": True}
            server.send_signal(stop)
            server.wait(20)
        finally:
            server.kill()
            server.stdout.close()
        assert store.counts()["rankings"] == number + 1


def test_ranking_and_preferences_need_no_torch():
    modules = "trivium.apps.rank, trivium.preferences.store, trivium.preferences.assign, trivium.preferences.bias"
    code = f"import sys, {modules}\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_an_answer_does_not_stand_behind_all_who_ask_for_a_task(serving, store, monkeypatch):
    """Fetches that hang, more than the server has threads for everything else, and an answer that comes meanwhile."""
    free, hanging = threading.Event(), threading.Semaphore(0)
    found = rank_app.next_task(store, "ann", collection="c")

    def hangs(*_, **__):
        hanging.release()
        assert free.wait(30)
        return found

    before = set(threading.enumerate())
    with serving(create_app(store, collection="c")) as address:
        token = httpx.get(f"{address}/api/session")
        client = httpx.Client(
            base_url=address, cookies=token.cookies, headers={"origin": address, "x-csrf-token": token.json()["token"]}
        )
        monkeypatch.setattr(rank_app, "next_task", hangs)
        ask = {"params": {"annotator": "bob"}, "timeout": 60}
        people = [threading.Thread(target=httpx.get, args=[f"{address}/api/task"], kwargs=ask) for _ in range(60)]
        try:
            for person in people:
                person.start()
            assert all(hanging.acquire(timeout=20) for _ in range(rank_app.FETCHES))
            given = {"task": found[0].id, "annotator": "ann", "groups": [[2], [0, 3], [1]], "key": "k1"}
            assert client.post("/api/rank", json=given, timeout=10).json() == {"stored": True}
            assert not hanging.acquire(blocking=False), "no more of them at a time"
        finally:
            free.set()
        for person in people:
            person.join()
    left = [thread for thread in threading.enumerate() if thread not in before and thread.name.startswith("fetch")]
    for thread in left:
        thread.join(10)
    assert not any(thread.is_alive() for thread in left), "the server's threads end with it"
