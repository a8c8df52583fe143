"""Exports of annotation tools become judgements; what is cancelled, discarded or unclear does not."""

import json

import pytest

from trivium.data.sources import load_preferences
from trivium.data.sources.intake import BadRecord
from trivium.data.sources.schemas import to_judgements


def pairwise(selected, who=1, **more):
    result = {"type": "pairwise", "from_name": "pw", "to_name": "answer1,answer2", "value": {"selected": selected}}
    return {"completed_by": who, "was_cancelled": False, "result": [result]} | more


PAIR = {"prompt": "Which?", "answer1": "one", "answer2": "two"}
ITEMS = [{"id": "x", "title": "X", "body": "first"}, {"id": "y", "body": "second"}, {"id": "z", "html": "third"}]


def test_label_studios_pairwise_by_several_people():
    row = {
        "id": 7,
        "data": PAIR,
        "annotations": [
            pairwise("left"),
            pairwise("right", {"id": 3, "email": "ann@example.org"}),
            pairwise("right", 4, was_cancelled=True),
        ],
    }
    found = to_judgements(row)
    assert [(j.annotator, j.groups) for j in found] == [("1", [[0], [1]]), ("ann@example.org", [[1], [0]])]
    assert found[0].responses == ["one", "two"] and found[0].kind == "human"
    assert [m.content for m in found[0].prompt.messages] == ["Which?"]


def test_label_studios_pairwise_with_objects_of_other_names():
    """`to_name` holds the names of the objects on the screen, which need not be those of the data."""
    row = {"data": {"prompt": "Which?", "text1": "one", "text2": "two"}, "annotations": [pairwise("right")]}
    (found,) = to_judgements(row)
    assert (found.responses, found.groups) == (["one", "two"], [[1], [0]])


def test_label_studios_ranker():
    result = {
        "type": "ranker",
        "from_name": "rank",
        "to_name": "answers",
        "value": {"ranker": {"rank": ["z", "x", "y"]}},
    }
    row = {"data": {"prompt": "Which?", "answers": ITEMS}, "annotations": [{"completed_by": 2, "result": [result]}]}
    (found,) = to_judgements(row)
    assert (found.responses, found.groups) == (["first", "second", "third"], [[2], [0], [1]])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"data": PAIR, "annotations": []}, "no Pairwise or Ranker"),
        ({"data": PAIR, "annotations": [pairwise("middle")]}, "selects 'middle'"),
        (
            {"data": PAIR | {"answer1": 1, "answer3": "x", "answer4": "y"}, "annotations": [pairwise("left")]},
            "which of the data",
        ),
        ({"data": {"answer1": "one", "answer2": "two"}, "annotations": [pairwise("left")]}, "call it 'prompt'"),
        ({"fields": {"prompt": "p", "a": "1", "b": "2"}, "responses": []}, "no submitted ranking"),
        ({"fields": {"a": "1", "b": "2"}, "responses": {"q": [{"value": ["a", "b"]}]}}, "call it 'prompt'"),
    ],
)
def test_what_is_no_judgement_says_why(row, reason):
    with pytest.raises(BadRecord, match=reason):
        to_judgements(row)


def test_a_ranker_must_order_each_item_once():
    for value in ({"rank": ["x", "y"]}, {"rank": ["x", "y", "y"]}, {"best": ["x"], "worst": ["y", "z"]}):
        result = {"type": "ranker", "value": {"ranker": value}}
        row = {"data": {"prompt": "p", "items": ITEMS}, "annotations": [{"completed_by": 1, "result": [result]}]}
        with pytest.raises(BadRecord):
            to_judgements(row)


FIELDS = {"prompt": "Which?", "response1": "one", "response2": "two", "response3": "three"}


def test_argillas_first_version_with_ranks_and_ties():
    ranking = [{"value": "response1", "rank": 2}, {"value": "response2", "rank": 1}, {"value": "response3", "rank": 2}]
    row = {
        "fields": FIELDS,
        "responses": [
            {
                "user_id": "u1",
                "status": "submitted",
                "values": {"order": {"value": ranking}, "why": {"value": "clear"}},
            },
            {"user_id": "u2", "status": "discarded", "values": {"order": {"value": ranking}}},
        ],
    }
    (found,) = to_judgements(row)
    assert (found.annotator, found.responses, found.groups) == ("u1", ["one", "two", "three"], [[1], [0, 2]])


def test_argillas_second_version_with_an_order_and_with_a_label():
    ordered = {"order": [{"user_id": "u1", "value": ["response3", "response1", "response2"]}]}
    (found,) = to_judgements({"fields": FIELDS, "responses": ordered})
    assert found.groups == [[2], [0], [1]]
    two = {name: FIELDS[name] for name in ("prompt", "response1", "response2")}
    label = {
        "better": [{"user_id": "u1", "value": "response2", "status": "submitted"}, {"user_id": "u2", "value": "both"}]
    }
    (found,) = to_judgements({"fields": two, "responses": label})
    assert (found.responses, found.groups) == (["one", "two"], [[1], [0]])


def test_an_export_is_read_from_its_file(tmp_path):
    """Label Studio writes one JSON array; a task without a judgement is quarantined, the others are kept."""
    rows = [{"data": PAIR, "annotations": [pairwise("left")]}, {"data": PAIR, "annotations": []}]
    (tmp_path / "export.json").write_text(json.dumps(rows))
    found = list(load_preferences("export.json", base=tmp_path, quarantine=tmp_path / "bad.jsonl"))
    assert len(found) == 1 and "Pairwise" in (tmp_path / "bad.jsonl").read_text()
