"""`trivium people` and `trivium database`, typed as the docs have them."""

import json

import pytest

from trivium.cli import main
from trivium.preferences.store import People, Store, versions
from trivium.records import Completion, Conversation, Message, Ranking


@pytest.fixture
def place(tmp_path):
    """A workspace with one ranked task."""
    with Store(tmp_path / "preferences.db") as store:
        prompt = Conversation(messages=(Message(role="user", content="Which?"),))
        answers = [Completion(prompt_id=prompt.id, text=text) for text in ("one", "two")]
        (task,) = store.add_tasks("c", [(prompt, answers)])
        groups = tuple((name,) for name in task.completion_ids)
        store.submit(Ranking(prompt_id=prompt.id, groups=groups, annotator="ann", kind="human"), "c")
    return tmp_path


def run(place, *words):
    return main([*words, "--workspace", str(place)])


def test_an_invitation_is_a_link_that_opens_an_account(place, capsys):
    assert run(place, "people", "invite", "ann", "--role", "lead", "--url", "http://host:1/", "--valid-days", "2") == 0
    link = capsys.readouterr().out.splitlines()[0]
    assert link.startswith("http://host:1/#invitation=")
    with Store(place / "preferences.db") as store:
        _, person = People(store).accept(link.partition("=")[2])
    assert (person.name, person.role) == ("ann", "lead")
    assert run(place, "people", "list") == 0
    assert capsys.readouterr().out.split() == ["ann", "lead", "signed", "in"]
    assert run(place, "people", "revoke", "ann") == 0
    assert run(place, "people", "list") == 0
    assert "revoked" in capsys.readouterr().out


def test_a_backup_comes_back_and_what_stood_there_is_kept(place, capsys):
    assert run(place, "database", "backup", str(place / "safe.db")) == 0
    with Store(place / "preferences.db") as store:
        expected = store.digest()
        People(store).invite("later")
    assert run(place, "database", "restore", str(place / "safe.db")) == 0
    assert "before-restore-0" in capsys.readouterr().out
    with Store(place / "preferences.db") as store:
        assert store.digest() == expected and People(store).all() == []


@pytest.mark.parametrize(("schema", "keys"), [("rankings", "ranking"), ("pairs", "chosen"), ("unpaired", "label")])
def test_each_schema_is_written(place, schema, keys, capsys):
    assert run(place, "database", "export", str(place / "out.jsonl"), "--schema", schema) == 0
    lines = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    assert f"{len(lines)} lines" in capsys.readouterr().out and all(keys in line for line in lines)


def test_down_and_up(place, capsys):
    assert run(place, "database", "downgrade", "1") == 0
    with versions.schema.make_engine(place / "preferences.db").connect() as connection:
        assert versions.version(connection, "p") == 1
    assert run(place, "database", "upgrade") == 0
    assert "schema 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["people"], "invite, list, revoke"),
        (["people", "invit"], "did you mean 'invite'"),
        (["people", "revoke", "nobody"], "nobody called 'nobody'"),
        (["people", "invite", "ann", "--valid-days", "0"], "above 0"),
        (["people", "invite", "ann", "--role", "king"], "--role"),
        (["database", "downgrade", "7"], "not to 7"),
        (["database", "restore", "missing.db"], "no backup"),
    ],
)
def test_a_mistake_is_one_sentence(place, capsys, words, said):
    assert (main(words) if len(words) < 2 else run(place, *words)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
