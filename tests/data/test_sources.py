"""Reading: every line is accounted for, every schema becomes the same noun, every mistake is one sentence."""

import gzip
import json
import sys

import pytest

from trivium.config import UserError
from trivium.data.sources import Intake, load_conversations, load_documents, load_preferences, load_prompts
from trivium.data.sources import jsonl as jsonl_module
from trivium.data.sources.files import split_text
from trivium.records import Document, Message, ToolCall, read_jsonl

GOOD = b'{"text": "good"}'
BAD = {
    "cut off": (b'{"text": "x"', "not JSON", 13),
    "single quotes": (b"{'text': 'x'}", "not JSON", 2),
    "missing colon": (b'{"text" "x"}', "not JSON", 9),
    "control character": (b'{"text": "a\x01b"}', "not JSON", 12),
    "invalid UTF-8": (b'{"text": "\xc3\xa9\xff"}', "not UTF-8: byte 0xff", 12),
    "UTF-16": ('{"text": "x"}'.encode("utf-16"), "NUL byte", 4),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "byte order mark", 1),
    "NUL": (b'{"text": "a\x00b"}', "NUL byte", 12),
    "escaped NUL": (b'{"text": "a\\u0000b"}', "NUL character", 12),
    "lone high surrogate": (b'{"text": "\\ud83d"}', "lone surrogate", 11),
    "lone low surrogate in a key": (b'{"text": "x", "\\udc00": 1}', "lone surrogate", 16),
    "NaN": (b'{"text": "x", "score": NaN}', "not a finite number: NaN", 24),
    "infinity": (b'{"text": "x", "score": -Infinity}', "not a finite number: -Infinity", 24),
    "overflow": (b'{"text": "x", "score": 1e999}', "not a finite number: 1e999", 1),
    "array": (b'["text"]', "not a JSON object: found list", 1),
    "string": (b'"text"', "not a JSON object: found str", 1),
    "two objects": (GOOD + b" " + GOOD, "two objects on one line", 18),
    "duplicate key": (b'{"text": "x", "text": "y"}', "duplicate key: 'text'", 1),
    "nested duplicate": (b'{"text": "x", "meta": {"a": 1, "a": 2}}', "duplicate key: 'a'", 1),
    "no text": (b'{"txet": "x"}', "no 'text' in the record: it has txet", 1),
    "wrong type": (b'{"text": 5}', "wrong type: 'text' must be text, not int", 1),
    "null": (b'{"text": null}', "wrong type: 'text' must be text, not NoneType", 1),
    "too deep": (b'{"text": ' + b"[" * 100_000, "not JSON: nested too deeply", 1),
    "huge integer": (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "not JSON", 1),
    "blank": (b"   ", "blank line", 1),
}


def read(tmp_path, *specs, **options):
    intake = Intake(quarantine=tmp_path / "quarantine.jsonl", **options)
    return list(load_documents(specs, base=tmp_path, intake=intake)), intake


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named_and_its_neighbours_are_kept(tmp_path, kind):
    line, reason, column = BAD[kind]
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    documents, intake = read(tmp_path, "a.jsonl")
    assert [d.text for d in documents] == ["good", "good"]
    (entry,) = read_jsonl(tmp_path / "quarantine.jsonl")
    assert (entry["file"], entry["line"]) == ("a.jsonl", 2)
    assert entry["reason"].startswith(reason)
    assert entry["column"] == column
    assert (intake.read, intake.kept, intake.quarantined) == (3, 2, 1)
    with pytest.raises(UserError, match=rf"a\.jsonl:2:{column}: "):
        read(tmp_path, "a.jsonl", max_bad=0)


def test_a_thousand_bad_lines_in_many_are_all_found(tmp_path):
    lines, expected = [], []
    kinds = [line for kind, (line, _, _) in BAD.items() if kind != "too deep"]
    for number in range(1, 10_001):
        bad = number % 10 == 0
        lines.append(kinds[number % len(kinds)] if bad else b'{"text": "document %d"}' % number)
        expected += [number] if bad else []
    data = b"\n".join(lines) + b"\n" + GOOD
    for name, content in (("a.jsonl", data), ("b.jsonl.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(content)
        documents, intake = read(tmp_path, name)
        assert len(documents) == 9_001
        assert [entry["line"] for entry in intake.bad] == expected
        assert intake.files[name] == {"read": 10_001, "kept": 9_001, "quarantined": 1_000}
    with pytest.raises(UserError, match="more than max_bad = 999"):
        read(tmp_path, "a.jsonl", max_bad=999)
    read(tmp_path, "a.jsonl", max_bad=1000)


def test_a_line_without_end_is_rejected_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl_module, "MAX_LINE_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'\n{"text": "' + b"x" * 5000 + b'"}\n' + GOOD)
    documents, intake = read(tmp_path, "a.jsonl")
    assert len(documents) == 2 and intake.bad[0]["reason"].startswith("line too long") and intake.bad[0]["line"] == 2


def test_trailing_blank_lines_and_a_missing_last_newline_are_fine(tmp_path):
    for ending in (b"", b"\n", b"\n\n\r\n"):
        (tmp_path / "a.jsonl").write_bytes(GOOD + b"\r\n" + GOOD + ending)
        documents, intake = read(tmp_path, "a.jsonl", max_bad=0)
        assert len(documents) == 2 and intake.read == 2


def test_a_truncated_or_damaged_gzip_keeps_what_came_before(tmp_path):
    import random

    rng = random.Random(0)
    lines = [json.dumps({"text": f"{number} {rng.random()}"}) for number in range(5000)]
    whole = gzip.compress("\n".join(lines).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    documents, intake = read(tmp_path, "a.jsonl.gz")
    assert 1000 < len(documents) < 5000
    assert [d.text for d in documents] == [json.loads(line)["text"] for line in lines[: len(documents)]]
    assert intake.quarantined == 1 and intake.bad[0]["reason"].startswith("damaged gzip")
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip at all")
    documents, intake = read(tmp_path, "a.jsonl.gz")
    assert documents == [] and intake.quarantined == 1


def test_folders_hold_many_kinds_and_unknown_files_are_named(tmp_path):
    folder = tmp_path / "in put"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("plain é", encoding="utf-8")
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (folder / "b.md").write_text("# Title\r\n\r\nbody", newline="")
    (folder / "deep" / "c.json").write_text('[{"text": "one"}, {"text": "two"}, 3]')
    (folder / "d.json").write_text('{"text": "lines"}\n{"text": "too"}\n')
    (folder / "e.csv").write_text("no")
    (folder / ".hidden.txt").write_text("no")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "empty.txt").write_text("")
    documents, intake = read(tmp_path, "in put")
    assert [d.text for d in documents] == ["plain é", "# Title\n\nbody", "marked", "lines", "too", "one", "two"]
    assert documents[0].source == "in put/a.txt"
    assert intake.ignored == ["e.csv"]
    assert {entry["file"]: entry["reason"].split(":")[0] for entry in intake.bad} == {
        "in put/latin.txt": "not UTF-8",
        "in put/empty.txt": "empty file",
        "in put/deep/c.json": "not a JSON object",
    }
    assert intake.read == intake.kept + intake.quarantined == 10
    with pytest.raises(UserError, match=r"latin\.txt:1:4: not UTF-8: byte 0xe9 at offset 3"):
        read(tmp_path, "in put/latin.txt", max_bad=0)


def test_long_text_files_are_cut_at_blank_lines_without_loss():
    text = "\n\n".join(f"Paragraph {i}. " + "word " * 40 for i in range(300))
    pieces = list(split_text(text, 5000))
    assert "".join(pieces) == text and 10 < len(pieces) < 30
    assert all(piece.endswith("\n\n") for piece in pieces[:-1]) and all(len(p) <= 5000 for p in pieces)
    assert list(split_text("x" * 9000, 5000)) == ["x" * 9000]


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"text": ["one", None, "three"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    documents, intake = read(tmp_path, "a.parquet")
    assert [d.text for d in documents] == ["one", "three"] and documents[1].meta == {"n": 3}
    assert intake.bad[0]["line"] == 2
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    documents, intake = read(tmp_path, "a.parquet")
    assert documents == [] and intake.bad[0]["reason"].startswith("damaged parquet")


def test_html_gives_its_main_text(tmp_path):
    pytest.importorskip("trafilatura")
    prose = "The harbour was quiet that morning, and the boats lay still on the grey water. " * 6
    page = (
        f"<html><body><nav><a href='/'>Home</a></nav><article><p>{prose}</p></article><script>x</script></body></html>"
    )
    (tmp_path / "a.html").write_text(page)
    documents, _ = read(tmp_path, "a.html")
    assert documents[0].text.startswith("The harbour was quiet") and "Home" not in documents[0].text
    (tmp_path / "b.html").write_text("<html></html>")
    assert read(tmp_path, "b.html")[1].bad[0]["reason"].startswith("no main text")


def test_a_missing_optional_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'trivium\[data\]'"):
        read(tmp_path, "a.parquet")


def test_code_is_called_with_the_seed_and_the_options(tmp_path, monkeypatch):
    (tmp_path / "my_texts.py").write_text(
        "from trivium.records import Document\n"
        "def make(seed, *, num=1):\n"
        "    yield Document(text=f'seed {seed}')\n"
        "    yield from ({'text': str(i)} for i in range(num))\n"
        "    yield 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    intake = Intake()
    found = list(load_documents(["my_texts:make"], base=tmp_path, seed=7, options={"num": 2}, intake=intake))
    assert found == [Document(text="seed 7"), Document(text="0"), Document(text="1")]
    assert intake.bad[0]["file"] == "my_texts:make" and intake.bad[0]["line"] == 4


@pytest.mark.parametrize(
    ("spec", "match"),
    [("nothing.txt", "no file or folder at"), ("a.docx", "no reader for this kind"), ("folder", "holds no file")],
)
def test_wrong_specs_are_one_sentence(tmp_path, spec, match):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(UserError, match=match):
        read(tmp_path, spec)


# -- conversations, prompts, judgements


def load(tmp_path, loader, *rows, **options):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    intake = Intake()
    return list(loader(["rows.jsonl"], base=tmp_path, intake=intake, **options)), intake


def turns(conversation):
    return [(m.role, m.content) for m in conversation.messages]


def test_conversation_schemas_agree(tmp_path):
    expected = [("user", "hi"), ("assistant", "yo")]
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": "yo"},
            ]
        },
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"prompt": "hi", "completion": "yo"},
        {"prompt": [{"role": "user", "content": "hi"}], "response": [{"role": "assistant", "content": "yo"}]},
        {"instruction": "hi", "input": "", "output": "yo"},
    ]
    found, intake = load(tmp_path, load_conversations, *rows)
    assert [turns(c) for c in found] == [expected] * len(rows) and intake.quarantined == 0
    assert len({c.id for c in found}) == 1
    rich = {
        "instruction": "add",
        "input": "1 2",
        "output": "3",
        "system": "Be brief.",
        "history": [["a", "b"]],
        "kind": "sum",
    }
    (done,), _ = load(tmp_path, load_conversations, rich)
    assert turns(done) == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "add\n\n1 2"),
        ("assistant", "3"),
    ]
    assert done.meta == {"kind": "sum"}


def test_tool_calls_stay_calls(tmp_path):
    call = {"type": "function", "function": {"name": "find", "arguments": {"q": "é"}}}
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    (found,), _ = load(tmp_path, load_conversations, row)
    assert turns(found)[1] == ("assistant", "")
    assert found.messages[1].tool_calls == (ToolCall(name="find", arguments='{"q": "é"}'),)


def test_conversations_that_teach_nothing_or_are_malformed_are_quarantined(tmp_path):
    rows = [
        {"messages": []},
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "  "}]},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": ["x"]},
        {"messages": {"role": "user"}},
        {"text": "x"},
        {"instruction": "x", "output": "y", "history": "z"},
    ]
    found, intake = load(tmp_path, load_conversations, *rows)
    assert found == [] and intake.quarantined == intake.read == len(rows)


def test_prompts_end_with_the_user_and_carry_their_checks(tmp_path):
    check = {"kind": "number", "answer": "3"}
    rows = [
        {"prompt": "1 + 2?", "check": check},
        {"prompt": [{"role": "user", "content": "1 + 2?"}], "meta": {"check": check}},
        {"messages": [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}], "check": check},
    ]
    found, _ = load(tmp_path, load_prompts, *rows)
    assert [turns(p) for p in found] == [[("user", "1 + 2?")]] * 3
    assert [p.meta["check"] for p in found] == [check] * 3
    _, intake = load(tmp_path, load_prompts, {"prompt": [{"role": "assistant", "content": "x"}]}, {"question": "x"})
    assert intake.quarantined == 2


def test_judgement_schemas(tmp_path):
    a, b = [{"role": "assistant", "content": "A"}], [{"role": "assistant", "content": "B"}]
    transcript = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: more\n\nAssistant: "
    rows = [
        {"prompt": "q", "chosen": "B", "rejected": "A"},
        {"chosen": transcript + "B", "rejected": transcript + "A"},
        {"prompt": "q", "responses": [a, b], "rank": [2, 1]},
        {"prompt": "q", "responses": ["A", "B", "C", "D"], "ranking": [[1], [0, 3]], "annotator": "ann"},
        {"prompt": "q", "response_a": a, "response_b": b, "labels": {"x": "A", "y": "B", "z": "tie"}},
        {"prompt": "q", "responses": ["A", "B", "C"], "annotations": [{"annotator": "1", "rank": [1, 2, 2]}]},
        {"prompt": "q", "responses": ["A", "A", "B"], "rank": [3, 1, 2]},
    ]
    found, intake = load(tmp_path, load_preferences, *rows)
    assert intake.quarantined == 0
    assert [(j.responses, j.groups, j.annotator) for j in found] == [
        (["B", "A"], [[0], [1]], "dataset"),
        (["B", "A"], [[0], [1]], "dataset"),
        (["A", "B"], [[1], [0]], "dataset"),
        (["A", "B", "D"], [[1], [0, 2]], "ann"),
        (["A", "B"], [[0], [1]], "x"),
        (["A", "B"], [[1], [0]], "y"),
        (["A", "B"], [[0, 1]], "z"),
        (["A", "B", "C"], [[0], [1, 2]], "1"),
        (["A", "B"], [[0], [1]], "dataset"),
    ]
    assert turns(found[1].prompt) == [("user", "hi"), ("assistant", "yo"), ("user", "more")]


def test_malformed_judgements_are_quarantined(tmp_path):
    rows = [
        {"prompt": "q", "chosen": "A", "rejected": "A"},
        {"chosen": "\n\nHuman: a\n\nAssistant: A", "rejected": "\n\nHuman: b\n\nAssistant: B"},
        {"prompt": "q", "responses": ["A", "B"]},
        {"prompt": "q", "responses": ["A", "B"], "rank": [1]},
        {"prompt": "q", "responses": ["A", "B"], "rank": ["1", "2"]},
        {"prompt": "q", "responses": ["A", "B"], "ranking": [[0], [2]]},
        {"prompt": "q", "responses": ["A", "B"], "ranking": [[0], [0]]},
        {"prompt": "q", "responses": "AB", "rank": [1, 2]},
        {"prompt": "q", "response_a": "A", "response_b": "B", "labels": {"x": "C"}},
        {"prompt": "q", "response_a": "A", "response_b": "B"},
        {"prompt": "q", "completion": "A", "label": True},
    ]
    found, intake = load(tmp_path, load_preferences, *rows)
    assert found == [] and intake.quarantined == len(rows)


def test_weights_and_training_flags_of_messages(tmp_path):
    """OpenAI's 0 and 1, any positive number, `train: false`, ShareGPT's `loss`; an assistant's message only."""
    told = [{"weight": 0}, {"weight": 1}, {"weight": 2.5}, {"train": False}, {"train": True, "weight": 3}, {}]
    asked = {"role": "user", "content": "x"}
    rows = [{"messages": [asked, {"role": "assistant", "content": "y", **t}]} for t in told]
    rows.append({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y", "loss": False}]})
    found, _ = load(tmp_path, load_conversations, *rows)
    assert [c.messages[1].weight for c in found] == [0, 1, 2.5, 0, 3, 1, 0]
    bad = [{"weight": -1}, {"weight": "2"}, {"weight": True}, {"train": "no"}]
    wrong = [{"messages": [asked, {"role": "assistant", "content": "y", **b}]} for b in bad]
    wrong.append({"messages": [{**asked, "weight": 1}, {"role": "assistant", "content": "y"}]})
    found, intake = load(tmp_path, load_conversations, *wrong)
    assert not found and intake.quarantined == 5


def test_tools_and_calls_in_the_shapes_they_come_in(tmp_path):
    """Arguments as text or object, the bare function, ShareGPT's `function_call`; tools as a list or its JSON."""
    asked, tools = {"role": "user", "content": "x"}, [{"name": "find"}]
    bare = {"name": "find", "arguments": '{"q": 1}'}
    rows = [
        {"messages": [asked, {"role": "assistant", "content": None, "tool_calls": [bare]}], "tools": tools},
        {
            "conversations": [
                {"from": "human", "value": "x"},
                {"from": "function_call", "value": json.dumps({"name": "find", "arguments": {"q": 1}})},
            ],
            "tools": json.dumps(tools),
        },
    ]
    found, _ = load(tmp_path, load_conversations, *rows)
    assert [c.messages[1] for c in found] == [
        Message(role="assistant", content="", tool_calls=(ToolCall(name="find", arguments='{"q": 1}'),))
    ] * 2
    assert [c.meta["tools"] for c in found] == [tools, tools]
    for calls in (
        [{"name": ""}],
        [{"name": 'a"b'}],
        [{"name": "f", "arguments": "["}],
        [{"name": "f", "arguments": [1]}],
    ):
        row = {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": calls}]}
        found, intake = load(tmp_path, load_conversations, row)
        assert not found and intake.quarantined == 1, calls
