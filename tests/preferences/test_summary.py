import json

import numpy as np
import pytest

from trivium.preferences.store import Store
from trivium.preferences.summary import collection_summary
from trivium.records import Completion, Conversation, Message, Ranking


@pytest.fixture
def store(tmp_path):
    """Return a collection of 40 pairs by three people: two of one mind, the third the contrary on every fourth."""
    rng = np.random.default_rng(0)
    with Store(tmp_path / "preferences.db") as store:
        for number in range(40):
            prompt = Conversation(messages=(Message(role="user", content=f"question {number}"),))
            pair = [
                Completion(prompt_id=prompt.id, text=t * 10, policy=f"{t}@1") for t in (f"yes{number}", f"no{number}")
            ]
            store.add_tasks("round", [(prompt, pair)], overlap=3)
            for who in ("ann", "bob", "cid"):
                order = pair if who != "cid" or number % 4 else pair[::-1]
                shown = [pair[i].id for i in rng.permutation(2)]
                store.submit(
                    Ranking(
                        prompt_id=prompt.id,
                        groups=tuple((c.id,) for c in order),
                        annotator=who,
                        kind="human",
                        seconds=0.5 if who == "cid" else 20.0,
                        order_shown=tuple(shown),
                    ),
                    "round",
                )
        yield store


def test_a_lead_sees_who_differs_and_where(store):
    found = collection_summary(store, "round")
    assert found["progress"]["tasks"] == 40 and found["progress"]["done"] == 40
    # On 10 of 40 items one of three differs: 1 of 3 pairs of annotators agrees there.
    assert found["agreement"]["pairwise"]["value"] == pytest.approx((30 + 10 / 3) / 40)
    by_name = {one["annotator"]: one for one in found["annotators"]}
    assert list(by_name) == ["ann", "bob", "cid"]
    assert by_name["cid"]["agreement_with_others"] == pytest.approx(0.5)  # 30 items at 1, 10 at -1
    assert by_name["ann"]["agreement_with_others"] == pytest.approx(0.75)  # beside bob 1, beside cid 0.5
    assert by_name["cid"]["mean_seconds"] == 0.5 and by_name["cid"]["too_fast"]["value"] == 1
    assert by_name["ann"]["too_fast"]["value"] == 0
    assert by_name["cid"]["reliability"]["accuracy"] < 0.8 < by_name["ann"]["reliability"]["accuracy"]
    assert [(f["question"], f["annotator"]) for f in found["findings"] if f["alarm"] and f["question"] == "agreement"]


def test_disputed_items_are_those_that_were_contradicted(store):
    found = collection_summary(store, "round")["disputed"]
    assert len(found) == 10
    assert all(item["agreement"] == pytest.approx(-1 / 3) for item in found)
    assert {r["annotator"] for r in found[0]["rankings"]} == {"ann", "bob", "cid"}
    assert found[0]["prompt_id"] in {ranking.prompt_id for ranking in store.rankings("round")}


def test_it_is_json_and_empty_collections_have_one_too(store):
    assert json.loads(json.dumps(collection_summary(store, "round"), allow_nan=False))["kind"] == "human"
    nothing = collection_summary(store, "round", kind="ai")
    assert nothing["annotators"] == [] and nothing["disputed"] == [] and nothing["findings"] == []
    assert nothing["agreement"]["alpha"] is None
    json.dumps(nothing, allow_nan=False)


def test_the_summary_starts_without_torch():
    import subprocess
    import sys

    code = "import sys, trivium.preferences.summary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
