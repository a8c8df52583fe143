"""The lead's review: what is shown follows from the judgements, and a decision counts in their place."""

import json
import random

import pytest
from fastapi.testclient import TestClient

from trivium.apps.rank import create_app
from trivium.preferences.store import People, Store
from trivium.preferences.summary import collection_summary
from trivium.records import Completion, Conversation, Message, Ranking

ORIGIN = "http://127.0.0.1:8765"


def fill(store, num_tasks=12, seed=0):
    """Three annotators agree on the order of the texts, but on the first task all contradict each other."""
    items = []
    for number in range(num_tasks):
        prompt = Conversation(messages=(Message(role="user", content=f"Question {number}"),))
        texts = [f"answer {k} **to** {number}" for k in range(3)]
        items.append((prompt, [Completion(prompt_id=prompt.id, text=t, policy="sft") for t in texts]))
    tasks = store.add_tasks("c", items, overlap=3)
    rng = random.Random(seed)
    for name in ("ann", "bob", "cyd"):
        for number, task in enumerate(tasks):
            order = list(task.completion_ids)
            if number == 0:
                turn = ("ann", "bob", "cyd").index(name)
                order = order[::-1] if turn == 1 else order[turn:] + order[:turn]
            groups = tuple((each,) for each in order)
            ranking = Ranking(
                prompt_id=task.prompt_id, groups=groups, annotator=name, kind="human", seconds=5 + rng.random(),
                order_shown=tuple(rng.sample(order, 3)),
            )  # fmt: skip
            store.submit(ranking, "c", task=task.id)
    return tasks


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "preferences.db") as opened:
        yield opened


def client_of(app):
    client = TestClient(app, base_url=ORIGIN, raise_server_exceptions=False)
    client.headers["origin"] = ORIGIN
    client.headers["x-csrf-token"] = client.get("/api/session").json()["token"]
    return client


def test_the_summary_is_the_collections_with_the_disputed_task_to_be_read(store):
    tasks = fill(store)
    store.add_repeats("c", 1.0)  # the same prompts and responses once more: not what is decided about
    store.flag(tasks[3].id, tasks[3].completion_ids[1], "ann", "rude")
    found = client_of(create_app(store)).get("/api/review").json()
    expected = json.loads(json.dumps(collection_summary(store, "c")))
    assert {name: found[name] for name in ("progress", "agreement", "annotators", "findings")} == {
        name: expected[name] for name in ("progress", "agreement", "annotators", "findings")
    }
    (disputed,) = found["disputed"]
    assert disputed["task"] == tasks[0].id
    assert disputed["messages"][0]["content"] == "Question 0"
    assert [r["text"] for r in disputed["responses"]] == [f"answer {k} **to** 0" for k in range(3)]
    assert disputed["rankings"][0] == {"annotator": "ann", "groups": [[0], [1], [2]]}
    assert found["flags"] == [{"text": "answer 1 **to** 3", "annotator": "ann", "reason": "rude"}]


def test_a_decision_stands_in_the_place_of_the_judgements_and_changes_no_measure(store):
    tasks = fill(store)
    client = client_of(create_app(store))
    before = collection_summary(store, "c")
    body = {"task": tasks[0].id, "lead": "Lea", "groups": [[2], [0, 1]], "rationale": "checked", "key": "k"}
    assert client.post("/api/adjudicate", json=body).json() == {"stored": True}
    assert client.post("/api/adjudicate", json=body).json() == {"stored": False}
    about = [r for r in store.rankings("c") if r.prompt_id == tasks[0].prompt_id]
    ids = tasks[0].completion_ids
    assert [(r.annotator, r.groups) for r in about] == [("Lea", ((ids[2],), (ids[0], ids[1])))]
    assert len(store.rankings("c")) == 3 * 11 + 1
    assert len(store.ranking_rows("c", adjudicated=False)) == 3 * 12
    after = collection_summary(store, "c")
    assert {k: after[k] for k in ("agreement", "annotators", "disputed")} == {
        k: before[k] for k in ("agreement", "annotators", "disputed")
    }
    again = body | {"groups": [[0], [1], [2]], "key": "k2"}
    assert client.post("/api/adjudicate", json=again).json() == {"stored": True}
    (last,) = [r for r in store.rankings("c") if r.prompt_id == tasks[0].prompt_id]
    assert last.groups == tuple((name,) for name in ids)
    assert store.counts()["rankings"] == 36 + 2, "append-only: nothing was overwritten"
    lines = client.get("/api/export", params={"name": "c"}).text.splitlines()
    assert sum(json.loads(line)["annotator"] == "Lea" for line in lines) == 1 and len(lines) == 34


def test_a_lead_who_ranked_too_is_measured_by_what_they_ranked(store):
    tasks = fill(store)
    ids = tasks[0].completion_ids
    decided = Ranking(
        prompt_id=tasks[0].prompt_id, groups=((ids[1],), (ids[0],), (ids[2],)), annotator="ann", kind="human"
    )
    before = store.ranking_rows("c", adjudicated=False)
    assert store.adjudicate(decided, "c", "key", task=tasks[0].id)
    assert store.ranking_rows("c", adjudicated=False) == before
    assert [r.groups for r in store.rankings("c") if r.prompt_id == tasks[0].prompt_id] == [decided.groups]


def test_the_review_is_a_leads(store):
    tasks = fill(store)
    app = create_app(store, accounts=True, hosts=None)
    people = People(store)
    clients = {}
    for name, role in (("ann", "annotator"), ("Lea", "lead"), ("Ada", "admin")):
        clients[name] = client_of(app)
        clients[name].post("/api/join", json={"token": people.invite(name, role)})
    clients["nobody"] = client_of(app)
    body = {"task": tasks[0].id, "lead": "Lea", "groups": [[0], [1], [2]], "key": "k"}
    statuses = {
        name: [
            client.get("/api/review").status_code,
            client.get("/api/export").status_code,
            client.post("/api/adjudicate", json=body).status_code,
        ]
        for name, client in clients.items()
    }
    assert statuses == {
        "ann": [403, 403, 403],
        "Lea": [200, 200, 200],
        "Ada": [200, 200, 403],  # an admin may, but under their own name
        "nobody": [401, 401, 401],
    }


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"groups": [[0], [1]]}, 422),
        ({"groups": [[0], [1], [7]]}, 422),
        ({"groups": [[0], [0], [1]]}, 422),
        ({"task": "unknown"}, 404),
        ({"lead": ""}, 422),
        ({"extra": 1}, 422),
    ],
)
def test_what_is_no_decision_is_refused(store, change, status):
    tasks = fill(store)
    client = client_of(create_app(store))
    body = {"task": tasks[0].id, "lead": "Lea", "groups": [[0], [1], [2]], "key": "k"} | change
    assert client.post("/api/adjudicate", json=body).status_code == status
    assert store.counts()["rankings"] == 36


def test_other_collections_are_not_shown_and_nothing_is_said_plainly(store):
    client = client_of(create_app(store))
    assert client.get("/api/review").status_code == 404
    fill(store)
    only = client_of(create_app(store, collection="c"))
    assert only.get("/api/review", params={"name": "d"}).status_code == 404
    assert only.get("/api/review", params={"name": "c"}).json()["collections"] == ["c"]
    assert client_of(create_app(store, collection="d")).get("/api/review").status_code == 404
