"""The nouns: equal content has equal ids, everything survives JSON, and no write leaves half a file."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium import records
from trivium.records import (
    ID_LENGTH,
    Completion,
    Conversation,
    Demonstration,
    Document,
    Message,
    Ranking,
    RunManifest,
    atomic_write,
    content_id,
    from_dict,
    read_jsonl,
    sha256_file,
    to_dict,
    write_jsonl,
)

NOUNS = [value for value in vars(records).values() if isinstance(value, type) and dataclasses.is_dataclass(value)]

text = st.text(st.characters(), max_size=8)  # lone surrogates included
numbers = st.floats(allow_nan=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
    max_leaves=4,
)


def of(hint: typing.Any) -> st.SearchStrategy[typing.Any]:
    """Return a strategy for a field's type; it knows every type that the nouns use."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return noun(hint)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(of(arguments[0]), max_size=2).map(tuple)
    if arguments and type(None) in arguments:
        return st.none() | of(next(a for a in arguments if a is not type(None)))
    if origin is not None:  # Mapping
        return st.dictionaries(text, json_values if arguments[1] is typing.Any else of(arguments[1]), max_size=2)
    simple = {str: text, int: st.integers(-(2**53), 2**53), float: numbers, bool: st.booleans()}
    return simple.get(hint, json_values)


def noun(cls: type) -> st.SearchStrategy[typing.Any]:
    """Return a strategy for a record."""
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{field.name: of(hints[field.name]) for field in dataclasses.fields(cls)})


def test_every_noun_is_under_test() -> None:
    """A new record is covered as soon as it is written."""
    assert {cls.__name__ for cls in NOUNS} >= {"Document", "Ranking", "Comparison", "Rollout", "Event", "RunManifest"}


@pytest.mark.parametrize("cls", NOUNS, ids=lambda cls: cls.__name__)
def test_every_record_survives_json(cls: type) -> None:
    """from_dict(to_dict(x)) == x, through JSON text and nested records too; ids are the same before and after."""

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(noun(cls))
    def check(record: typing.Any) -> None:
        assert from_dict(cls, to_dict(record)) == record
        again = from_dict(cls, json.loads(json.dumps(to_dict(record), ensure_ascii=False)))
        assert again == record
        assert getattr(again, "id", None) == getattr(record, "id", None)

    check()


@pytest.mark.parametrize("cls", NOUNS, ids=lambda cls: cls.__name__)
def test_records_are_frozen_and_take_names_only(cls: type) -> None:
    """Nothing changes after it was made; no positional argument can be mistaken for another."""
    assert cls.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))
    assert hasattr(cls, "__slots__")


def conversation(*contents: str, **facts: typing.Any) -> Conversation:
    return Conversation(messages=tuple(Message(role="user", content=c) for c in contents), **facts)


def test_ids_are_of_the_content_alone() -> None:
    """Where it came from does not matter, what it says does; a boundary between parts is part of the content."""
    assert Document(text="a", source="x", license="MIT").id == Document(text="a", meta={"k": 1}).id
    assert Document(text="a").id != Document(text="b").id
    assert conversation("a", source="x", meta={"answer": 1}).id == conversation("a").id
    assert conversation("ab").id != conversation("a", "b").id
    assert conversation("a").id != Conversation(messages=(Message(role="system", content="a"),)).id
    one = Completion(prompt_id="p", text="t", policy="sft@final", token_ids=(1, 2), logprobs=(-0.5, -0.1))
    assert one.id == dataclasses.replace(one, token_ids=(), finish_reason="stop").id
    for change in ({"prompt_id": "q"}, {"text": "u"}, {"policy": "ppo@final"}):
        assert dataclasses.replace(one, **change).id != one.id
    ranking = Ranking(prompt_id="p", groups=(("a", "b"), ("c",)), annotator="Ada", kind="human")
    assert ranking.id == dataclasses.replace(ranking, seconds=4.0, rationale="why", order_shown=("c", "a", "b")).id
    for change in (
        {"groups": (("a",), ("b",), ("c",))}, {"annotator": "Bob"}, {"kind": "simulated"}, {"none_acceptable": True},
    ):  # fmt: skip
        assert dataclasses.replace(ranking, **change).id != ranking.id
    ideal = Demonstration(prompt=conversation("a"), response="r", annotator="Ada")
    assert ideal.id == Demonstration(prompt=conversation("a", source="x"), response="r", annotator="Ada").id
    assert len({Document(text="a").id, conversation("a").id, one.id, ranking.id, ideal.id}) == 5


def test_content_id_is_pinned_and_canonical() -> None:
    """Ids are on people's disks: the function may never change. Key order and tuple or list do not matter."""
    assert content_id("document", "hello") == "9dd7b332236d7b45bbb4"
    assert len(content_id()) == ID_LENGTH
    assert content_id({"a": 1, "b": (1, 2)}) == content_id({"b": [1, 2], "a": 1})
    assert content_id("ab", "c") != content_id("a", "bc")
    assert content_id(1) != content_id("1")
    assert content_id("\ud800") != content_id("\udfff")  # lone surrogates hash, too


def test_as_dicts_is_the_common_schema() -> None:
    """Role and content, in order."""
    talk = Conversation(messages=(Message(role="user", content="a"), Message(role="assistant", content="b")))
    assert talk.as_dicts() == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_unknown_and_missing_fields_are_named() -> None:
    """A file of another version says so instead of losing data."""
    with pytest.raises(ValueError, match="Message has no field 'name'"):
        from_dict(Message, {"role": "user", "content": "a", "name": "x"})
    with pytest.raises(ValueError, match="content"):
        from_dict(Message, {"role": "user"})
    with pytest.raises(ValueError, match="Artifact has no field 'size'"):
        from_dict(
            RunManifest,
            {"run_id": "a", "stage": "b", "table": "c", "status": "done", "fingerprint": "d", "config": {},
             "artifacts": [{"path": "x", "sha256": "0", "bytes": 1, "size": 1}]},
        )  # fmt: skip


# -- files


def test_atomic_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    """Text as UTF-8, bytes as they are, readable by others, nothing left beside it."""
    path = tmp_path / "a" / "b.txt"
    atomic_write(path, "é\n\ud800")
    assert path.read_bytes() == "é\n".encode() + b"\xed\xa0\x80"
    atomic_write(path, b"\x00\r\n")
    assert path.read_bytes() == b"\x00\r\n"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


@pytest.mark.parametrize("broken", ["fsync", "replace", "chmod"])
def test_a_failed_write_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Whatever fails on the way (a full disk), the file is as before."""
    path = tmp_path / "file.json"
    atomic_write(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, "new and longer")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_failed_row_leaves_the_old_file(tmp_path: Path) -> None:
    """Rows are produced before anything is written."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise RuntimeError("died")

    with pytest.raises(RuntimeError):
        write_jsonl(path, rows())
    assert list(read_jsonl(path)) == [{"a": 1}]


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.dictionaries(text, json_values, max_size=2), max_size=4))
def test_json_lines_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    """Any text is one line, surrogates and line separators included."""
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    assert write_jsonl(path, rows) == len(rows)
    assert list(read_jsonl(path)) == rows
    assert path.read_bytes().count(b"\n") == len(rows)


def test_a_last_line_without_its_end_is_passed_over(tmp_path: Path) -> None:
    """What a killed writer leaves is not a row, even if it could be parsed."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert list(read_jsonl(path)) == [{"a": 1}]


def test_sha256_of_a_file(tmp_path: Path) -> None:
    """The well-known digest of `abc`."""
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
