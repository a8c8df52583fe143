"""Exports of annotation tools, as rows of our own schema: Label Studio's tasks, Argilla's records.

Both leave open what the fields are called: the prompt is the field named `prompt`, `instruction` or `question`, the
responses are those that the judgement names. Cancelled, discarded and draft answers are no judgements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trivium.data.sources.intake import BadRecord

PROMPTS = ("prompt", "instruction", "question", "messages", "conversation", "context")
"""What the field with the prompt is called, the likeliest first."""

Given = list[tuple[str, list[list[int]]]]
"""Each annotator with groups of places among the responses, best first."""


def is_label_studio(row: Mapping[str, Any]) -> bool:
    """Tell whether a row is a task of Label Studio's JSON export."""
    return isinstance(row.get("data"), Mapping) and isinstance(row.get("annotations"), list)


def is_argilla(row: Mapping[str, Any]) -> bool:
    """Tell whether a row is a record of Argilla: version 1 lists whole responses, version 2 answers by question."""
    return isinstance(row.get("fields"), Mapping) and isinstance(row.get("responses"), Mapping | list)


def read_label_studio(row: Mapping[str, Any]) -> tuple[Any, list[str], Given]:
    """Return (prompt, responses, judgements) of a task judged with Pairwise or Ranker.

    Pairwise names two objects in `to_name` and says `left` or `right`; the texts are the data of these names. Ranker
    orders the ids of a list in the data, one group for each. Raises BadRecord where neither is there.
    """
    data = row["data"]
    texts: list[str] = []
    given: Given = []
    for annotation in row["annotations"]:
        if not isinstance(annotation, Mapping) or annotation.get("was_cancelled"):
            continue
        for result in annotation.get("result") or []:
            found = _pairwise(result, data) or _ranker(result, data)
            if found is None:
                continue
            if texts and texts != found[0]:
                raise BadRecord("the annotations of one task are about different responses")
            texts = found[0]
            given.append((_who(annotation.get("completed_by")), found[1]))
    if not given:
        raise BadRecord("no Pairwise or Ranker judgement in the annotations")
    return _prompt(data), texts, given


def _who(person: Any) -> str:
    if isinstance(person, Mapping):
        person = person.get("email") or person.get("id")
    return str(person or "dataset")


def _pairwise(result: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[list[str], list[list[int]]] | None:
    if result.get("type") != "pairwise":
        return None
    names = [name.strip() for name in str(result.get("to_name", "")).split(",")]
    sides = {"left": [[0], [1]], "right": [[1], [0]], "tie": [[0, 1]]}
    selected = (result.get("value") or {}).get("selected")
    if len(names) != 2 or selected not in sides:
        raise BadRecord(f"a Pairwise result selects {selected!r} of {names}, not left or right of two")
    texts = [data.get(name) for name in names]
    if not all(isinstance(text, str) for text in texts):
        # Where the objects are not called as their data, the two other texts of the task are meant, in order.
        texts = [value for key, value in data.items() if isinstance(value, str) and key not in PROMPTS]
        if len(texts) != 2:
            raise BadRecord(f"which of the data are the two texts? there is no {names[0]!r} and {names[1]!r}")
    return [str(text) for text in texts], sides[selected]


def _ranker(result: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[list[str], list[list[int]]] | None:
    if result.get("type") != "ranker":
        return None
    lists = [value for value in data.values() if isinstance(value, list) and value and isinstance(value[0], Mapping)]
    if len(lists) != 1 or not all("id" in item for item in lists[0]):
        raise BadRecord("a Ranker task needs one list of items with ids in its data")
    ids = [str(item["id"]) for item in lists[0]]
    texts = [str(item.get("body") or item.get("html") or item.get("title") or "") for item in lists[0]]
    ordered = (result.get("value") or {}).get("ranker")
    columns = list(ordered.values()) if isinstance(ordered, Mapping) else []
    if len(columns) != 1 or not isinstance(columns[0], list):
        raise BadRecord("a Ranker result in buckets is no order of the items")
    named = [str(name) for name in columns[0]]
    if sorted(named) != sorted(ids):
        raise BadRecord("a Ranker result must order each item once")
    return texts, [[ids.index(name)] for name in named]


def read_argilla(row: Mapping[str, Any]) -> tuple[Any, list[str], Given]:
    """Return (prompt, responses, judgements) of a record with a ranking question, or a choice between fields.

    A ranking names fields with their ranks (version 1) or orders them (version 2); a label names the better field.
    Raises BadRecord where no submitted answer does.
    """
    fields = {str(name): value for name, value in row["fields"].items() if isinstance(value, str)}
    answers = list(_answers(row["responses"]))
    judged = [(who, order) for who, value in answers if (order := _named_order(value, fields)) is not None]
    if not judged:
        raise BadRecord("no submitted ranking of the record's fields among its responses")
    names = [name for name in fields if any(name in {n for group in order for n in group} for _, order in judged)]
    whole = [name for name in fields if name not in PROMPTS]
    if len(names) < 2:  # a label names the better one alone; the others are what it was chosen from
        names = whole
    given: Given = []
    for who, order in judged:
        placed = {name for group in order for name in group}
        rest = [name for name in names if name not in placed]
        groups = [[names.index(name) for name in group] for group in order] + (
            [[*map(names.index, rest)]] if rest else []
        )
        given.append((who, groups))
    return _prompt(row["fields"]), [fields[name] for name in names], given


def _answers(responses: Any) -> Iterator[tuple[str, Any]]:
    """Yield (user, value) of every submitted answer to any question."""
    if isinstance(responses, Mapping):  # version 2: by question
        for given in responses.values():
            for answer in given if isinstance(given, list) else []:
                if isinstance(answer, Mapping) and answer.get("status", "submitted") == "submitted":
                    yield str(answer.get("user_id") or "dataset"), answer.get("value")
        return
    for response in responses:  # version 1: by user
        if isinstance(response, Mapping) and response.get("status", "submitted") == "submitted":
            for answer in (response.get("values") or {}).values():
                if isinstance(answer, Mapping):
                    yield str(response.get("user_id") or "dataset"), answer.get("value")


def _named_order(value: Any, fields: Mapping[str, str]) -> list[list[str]] | None:
    """Return groups of field names, best first, or None where a value names no fields."""
    if isinstance(value, str):
        return [[value]] if value in fields else None
    if not isinstance(value, Sequence) or not value:
        return None
    if all(isinstance(each, str) for each in value):
        return [[each] for each in value] if all(each in fields for each in value) else None
    if all(isinstance(each, Mapping) and each.get("value") in fields and "rank" in each for each in value):
        ranks = sorted({each["rank"] for each in value})
        return [[each["value"] for each in value if each["rank"] == rank] for rank in ranks]
    return None


def _prompt(fields: Mapping[str, Any]) -> Any:
    for name in PROMPTS:
        if fields.get(name):
            return fields[name]
    raise BadRecord(f"no prompt among the fields ({', '.join(map(str, list(fields)[:8]))}); call it 'prompt'")
