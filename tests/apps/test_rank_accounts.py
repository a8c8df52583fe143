"""R27: with accounts, who may answer, under which name, and what a wrong token gets."""

import logging

import pytest
from fastapi.testclient import TestClient

from trivium.apps.rank import create_app, serve
from trivium.apps.rank.access import COOKIE, MAX_FAILURES
from trivium.config import UserError
from trivium.preferences.store import People, Store
from trivium.records import Completion, Conversation, Message

ORIGIN = "http://127.0.0.1:8765"


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "preferences.db") as opened:
        prompt = Conversation(messages=(Message(role="user", content="Which?"),))
        answers = [Completion(prompt_id=prompt.id, text=text, policy="sft") for text in ("one", "two")]
        opened.add_tasks("c", [(prompt, answers)], overlap=2)
        yield opened


@pytest.fixture
def app(store):
    return create_app(store, accounts=True, hosts=None)


def browser(app):
    client = TestClient(app, base_url=ORIGIN, raise_server_exceptions=False)
    client.headers["origin"] = ORIGIN
    client.headers["x-csrf-token"] = client.get("/api/session").json()["token"]
    return client


def joined(app, store, name, role="annotator"):
    client = browser(app)
    answer = client.post("/api/join", json={"token": People(store).invite(name, role)})
    assert answer.json() == {"name": name, "role": role}
    return client


def answer_for(client, name):
    task = client.get("/api/task", params={"annotator": name}).json()["task"]
    return {"task": task["id"], "annotator": name, "groups": [[1], [0]], "key": "k"}


def test_an_invitation_signs_in_by_a_cookie_that_no_script_reads(app, store):
    client = browser(app)
    before = client.get("/api/session").json()
    assert before["accounts"] is True and before["person"] is None
    token = People(store).invite("ann")
    answer = client.post("/api/join", json={"token": token})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and token.lower() not in cookie
    assert client.get("/api/session").json()["person"] == {"name": "ann", "role": "annotator"}
    assert client.post("/api/rank", json=answer_for(client, "ann")).json() == {"stored": True}
    assert client.post("/api/leave", json={}).json() == {"left": True}
    assert client.get("/api/session").json()["person"] is None
    assert client.get("/api/task", params={"annotator": "ann"}).status_code == 401


def test_without_a_session_and_under_another_name_nothing_is_shown_or_stored(app, store, caplog):
    ann, bob, stranger = joined(app, store, "ann"), joined(app, store, "bob"), browser(app)
    mine = answer_for(ann, "ann")
    posts = [
        ("/api/rank", mine),
        ("/api/skip", {"task": mine["task"], "annotator": "ann", "reason": "x"}),
        ("/api/flag", {"task": mine["task"], "annotator": "ann", "response": 0}),
        ("/api/demonstration", {"task": mine["task"], "annotator": "ann", "response": "x"}),
    ]
    before = store.counts()
    with caplog.at_level(logging.WARNING):
        for client, status, code in ((stranger, 401, "signed_out"), (bob, 403, "not_yours")):
            assert client.get("/api/task", params={"annotator": "ann"}).status_code == status
            for path, body in posts:
                answer = client.post(path, json=body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert store.counts() == before
    assert "POST /api/rank refused: 403 not_yours" in caplog.text


def test_revoked_in_the_middle_of_a_task(app, store):
    client = joined(app, store, "ann")
    mine = answer_for(client, "ann")
    People(store).revoke("ann")
    assert client.post("/api/rank", json=mine).status_code == 401
    assert store.counts()["rankings"] == 0


def test_a_session_from_before_the_invitation_is_not_kept(app, store):
    """Fixation: whatever cookie an attacker had planted, signing in makes a new one."""
    client = browser(app)
    client.cookies.set(COOKIE, "planted", domain="127.0.0.1")
    client.post("/api/join", json={"token": People(store).invite("ann")})
    assert People(store).whose("planted") is None
    assert client.cookies.get(COOKIE, domain="127.0.0.1") != "planted" or len(client.cookies) > 1


def test_a_thousand_guesses_are_locked_out_after_ten_and_the_signed_in_go_on(app, store):
    ann = joined(app, store, "ann")
    attacker = browser(app)
    statuses = [attacker.post("/api/join", json={"token": f"guess {n}"}).status_code for n in range(1000)]
    assert statuses == [401] * MAX_FAILURES + [429] * (1000 - MAX_FAILURES)
    locked = attacker.post("/api/join", json={"token": People(store).invite("bob")})
    assert locked.status_code == 429 and int(locked.headers["retry-after"]) > 0
    assert ann.post("/api/rank", json=answer_for(ann, "ann")).json() == {"stored": True}


def test_guessed_sessions_are_locked_out_too(app):
    client = TestClient(app, base_url=ORIGIN)
    statuses = []
    for n in range(MAX_FAILURES + 3):
        client.cookies.clear()
        client.cookies.set(COOKIE, f"guess {n}")
        statuses.append(client.get("/api/task", params={"annotator": "ann"}).status_code)
    assert statuses == [401] * MAX_FAILURES + [429] * 3


def test_a_wrong_session_is_taken_away_from_the_browser(app):
    client = TestClient(app, base_url=ORIGIN)
    client.cookies.set(COOKIE, "old")
    answer = client.get("/api/session")
    assert "max-age=0" in answer.headers["set-cookie"].lower()


def test_without_accounts_there_is_nothing_to_join(store):
    client = browser(create_app(store))
    assert client.get("/api/session").json()["accounts"] is False
    assert client.post("/api/join", json={"token": "x"}).status_code == 404
    assert client.post("/api/leave", json={}).json() == {"left": True}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org", ""])
def test_where_others_can_reach_it_accounts_are_needed(store, tmp_path, host):
    with pytest.raises(UserError, match="trivium people invite"):
        serve(tmp_path, host=host)
