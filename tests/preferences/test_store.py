import concurrent.futures
import json
import sqlite3
import subprocess
import sys

import pytest
import sqlalchemy as sa

from trivium.config import DiskFull, UserError
from trivium.preferences.demonstrations import demonstrations_of, digest_of, is_database
from trivium.preferences.store import AlreadyJudged, Refused, Store, UnknownTask, schema, versions
from trivium.records import Completion, Conversation, Demonstration, Message, Ranking, ToolCall

NASTY = "<script>alert(1)</script> \x00 \ud800 \u202e 😀"


def ask(text, answers=("a", "b", "c", "d"), policy="sft-1@9"):
    prompt = Conversation(messages=(Message(role="user", content=text),), source="test", meta={"check": {"n": 1}})
    return prompt, [
        Completion(prompt_id=prompt.id, text=f"{text} {a}", token_ids=(1, 2), logprobs=(-0.5, -1.25), policy=policy)
        for a in answers
    ]


def rank(task, order=(0, 1, 2, 3), annotator="ann", kind="human", **more):
    ids = task.completion_ids
    groups = tuple((ids[i],) if isinstance(i, int) else tuple(ids[j] for j in i) for i in order)
    return Ranking(prompt_id=task.prompt_id, groups=groups, annotator=annotator, kind=kind, **more)


def test_adding_twice_changes_nothing_and_survives_any_text(store):
    items = [ask("one"), ask(NASTY)]
    first = store.add_tasks("run-1", items, overlap=2)
    before = store.counts()
    assert store.add_tasks("run-1", items[:1]) + store.add_tasks("run-1", items[1:]) == first
    assert store.counts() == before
    assert before["prompts"] == 2 and before["completions"] == 8 and before["tasks"] == 2
    assert [t.position for t in first] == [0, 1] and first[0].overlap == 2
    prompt, answers = items[1]
    assert store.prompt(prompt.id) == prompt
    assert store.completions(first[1].completion_ids) == {a.id: a for a in answers}
    assert [t.collection for t in store.add_tasks("run-2", items)] == ["run-2", "run-2"]
    assert store.tasks("run-1") == first
    assert len(store.tasks()) == 4


def test_equal_completions_are_asked_about_once(store):
    tasks = store.add_tasks("c", [ask("p", "aab"), ask("q", "aaa")])
    assert [len(t.completion_ids) for t in tasks] == [2]
    other = ask("other")[1]
    with pytest.raises(Refused, match="answers prompt"):
        store.add_tasks("c", [(ask("p")[0], other)])


def test_a_ranking_comes_back_as_given(store):
    (task,) = store.add_tasks("c", [ask("p")])
    shown = tuple(reversed(task.completion_ids))
    given = rank(task, (2, (0, 3), 1), rationale=NASTY, seconds=3.5, order_shown=shown)
    assert store.submit(given, "c", "key-1") is True
    assert store.rankings("c") == [given]
    assert store.rankings("c")[0].id == given.id
    assert store.rankings("elsewhere") == []


def test_retry_is_stored_once_and_a_changed_mind_is_a_revision(store):
    (task,) = store.add_tasks("c", [ask("p")])
    first, second = rank(task), rank(task, (3, 2, 1, 0))
    assert store.submit(first, "c", "k1") is True
    assert store.submit(first, "c", "k1") is False
    assert store.submit(first, "c", "k2") is False
    with pytest.raises(Refused, match="used for a different"):
        store.submit(second, "c", "k1")
    with pytest.raises(AlreadyJudged):
        store.submit(second, "c", "k3")
    assert store.rankings() == [first]
    assert store.submit(second, "c", "k3", revise=True) is True
    assert store.rankings() == [second]
    assert store.counts()["rankings"] == 2
    assert store.submit(second, "c", "k3", revise=True) is False


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: {"groups": r.groups[:-1]}, "1 of 4 responses are not ranked"),
        (lambda r: {"groups": (*r.groups, r.groups[0])}, "ranked 2 times"),
        (lambda r: {"groups": (("nonsense",), *r.groups[1:])}, "not among those"),
        (lambda r: {"groups": (*r.groups, ())}, "empty place"),
        (lambda r: {"groups": r.groups[:2], "none_acceptable": True}, "2 of 4"),
        (lambda r: {"groups": ()}, "4 of 4"),
        (lambda r: {"kind": "robot"}, "kind 'robot'"),
        (lambda r: {"annotator": " "}, "name"),
        (lambda r: {"annotator": "x\n"}, "name"),
        (lambda r: {"seconds": float("nan")}, "seconds"),
        (lambda r: {"seconds": -1.0}, "seconds"),
        (lambda r: {"order_shown": r.groups[0]}, "order_shown"),
        (lambda r: {"rationale": "x" * 20_001}, "rationale"),
    ],
)
def test_what_is_no_ranking_of_the_task_is_refused_and_not_stored(tmp_path, change, reason):
    with Store(tmp_path / "p.db") as store:
        (task,) = store.add_tasks("c", [ask("p")])
        good = rank(task)
        fields = {name: getattr(good, name) for name in ("prompt_id", "groups", "annotator", "kind")}
        with pytest.raises(Refused, match=reason):
            store.submit(Ranking(**{**fields, **change(good)}), "c")
        assert store.counts()["rankings"] == 0


def test_none_acceptable_with_and_without_an_order(store):
    one, two = store.add_tasks("c", [ask("p"), ask("q")])
    assert store.submit(rank(one, (), none_acceptable=True), "c")
    assert store.submit(rank(two, none_acceptable=True), "c")
    assert [len(r.groups) for r in store.rankings("c")] == [0, 4]


def test_unknown_tasks_are_refused(store):
    (task,) = store.add_tasks("c", [ask("p")])
    with pytest.raises(UnknownTask):
        store.submit(rank(task), "other collection")
    with pytest.raises(UnknownTask):
        store.submit(rank(task), "c", task="nope")
    with pytest.raises(UnknownTask):
        store.task("../../etc/passwd")
    with pytest.raises(UnknownTask):
        store.skip("nope", "ann", "human", "unclear")
    with pytest.raises(UserError, match="has no prompt"):
        store.prompt("nope")
    with pytest.raises(UserError, match="has no prompt"):
        store.add_completions([Completion(prompt_id="nope", text="x")])


def test_one_prompt_with_two_tasks(store):
    prompt, answers = ask("p", "abcdef")
    first, second = store.add_tasks("c", [(prompt, answers[:3]), (prompt, answers[3:])])
    store.submit(rank(second, (2, 0, 1)), "c")
    assert [t.judgements for t in store.tasks("c")] == [0, 1]
    with pytest.raises(UnknownTask):
        store.submit(Ranking(prompt_id=prompt.id, groups=(), annotator="x", kind="human", none_acceptable=True), "c")
    empty = Ranking(prompt_id=prompt.id, groups=(), annotator="x", kind="human", none_acceptable=True)
    assert store.submit(empty, "c", task=first.id)


def test_open_tasks_per_annotator_and_kind(store):
    one, two, three = store.add_tasks("c", [ask("p"), ask("q"), ask("r")], overlap=2)
    store.submit(rank(one, annotator="bot", kind="simulated"), "c")
    store.submit(rank(one, annotator="a"), "c")
    store.skip(two.id, "a", "human", "unclear")
    assert store.skip(two.id, "a", "human", "again") is False
    assert [t.id for t in store.open_tasks("c", "a")] == [three.id]
    assert [t.id for t in store.open_tasks("c", "b")] == [one.id, two.id, three.id]
    store.submit(rank(one, annotator="b"), "c")
    assert [t.id for t in store.open_tasks("c", "c")] == [two.id, three.id]
    progress = store.progress("c")
    assert (progress.tasks, progress.done, progress.rankings, progress.skips) == (3, 1, 2, 1)
    assert progress.waiting == 2
    store.skip(two.id, "d", "human", "unclear")
    assert store.progress("c").waiting == 1  # both people wanted for `two` have passed on it
    mine = store.progress("c", annotator="a")
    assert (mine.done, mine.skips) == (1, 1)
    assert store.progress("c", "simulated").rankings == 1
    assert store.rankings("c", kinds=["simulated"])[0].annotator == "bot"
    assert store.rankings("c", kinds=[]) == []


def test_the_digest_is_of_the_judgements_alone(tmp_path):
    items = [ask("p"), ask("q")]
    digests, lists = [], []
    for number, backwards in enumerate((False, True)):
        with Store(tmp_path / f"{number}.db") as store:
            tasks = store.add_tasks("c", items)
            answers = [rank(tasks[0], (0, (1, 2), 3), "z"), rank(tasks[0], annotator="a"), rank(tasks[1])]
            if backwards:
                answers = [rank(tasks[0], (0, (2, 1), 3), "z", seconds=9.0, rationale="x"), *answers[1:]][::-1]
            for answer in answers:
                store.submit(answer, "c")
            digests.append(store.digest("c"))
            lists.append([(r.prompt_id, r.annotator) for r in store.rankings("c")])
            assert store.digest("c", ["ai"]) != digests[-1]
            assert store.digest("nothing") == store.digest("c", ["ai"])
    assert digests[0] == digests[1]
    assert lists[0] == lists[1]


def test_submit_many_is_all_or_nothing(store):
    tasks = store.add_tasks("c", [ask("p"), ask("q")])
    with pytest.raises(Refused):
        store.submit_many([(rank(tasks[0]), "1", ""), (rank(tasks[1], (0, 1)), "2", "")], "c")
    assert store.rankings() == []
    both = [(rank(tasks[0]), "1", ""), (rank(tasks[1]), "2", tasks[1].id)]
    assert store.submit_many(both, "c") == 2
    assert store.submit_many(both, "c") == 0


def test_demonstrations(store):
    prompt, _ = ask("p")
    ideal = Demonstration(prompt=prompt, response=NASTY, annotator="ann")
    assert store.add_demonstration(ideal) is True
    assert store.add_demonstration(ideal) is False
    assert store.demonstrations() == [ideal]
    with pytest.raises(Refused, match="empty"):
        store.add_demonstration(Demonstration(prompt=prompt, response=" ", annotator="ann"))


def test_demonstrations_are_conversations_wherever_the_database_is(store, request, tmp_path):
    """By a file's name or by a URL of PostgreSQL; a tool that was called before stays a call, with the prompt's id."""
    called = Message(role="assistant", content="", tool_calls=(ToolCall(name="find", arguments='{"q": "é"}'),))
    asked, told = Message(role="user", content="where?"), Message(role="tool", content="here")
    prompt = Conversation(messages=(asked, called, told), meta={"tools": [{"name": "find"}]})
    store.add_demonstration(Demonstration(prompt=prompt, response=NASTY, annotator="ann"))
    assert store.prompt(prompt.id) == prompt and store.prompt(prompt.id).id == prompt.id
    inside = request.node.callspec.params["store"] == "sqlite"
    spec = "a folder/preferences.db" if inside else request.getfixturevalue("postgres")
    assert is_database(spec)
    where = {"base": tmp_path, "workspace": tmp_path / "space"}
    (found,) = demonstrations_of(spec, **where)
    assert found.messages == (asked, called, told, Message(role="assistant", content=NASTY))
    assert found.meta == {"tools": [{"name": "find"}], "annotator": "ann"}
    before = digest_of(spec, **where)
    store.add_demonstration(Demonstration(prompt=prompt, response="another", annotator="ann"))
    assert digest_of(spec, **where) != before


def test_export_is_the_fields_schema(store, tmp_path):
    (task,) = store.add_tasks("c", [ask("p", "abc")])
    store.submit(rank(task, (2, (0, 1)), order_shown=task.completion_ids), "c")
    assert store.export_jsonl(tmp_path / "out.jsonl", "c") == 1
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert row["prompt"] == [{"role": "user", "content": "p"}]
    assert row["responses"] == ["p a", "p b", "p c"]
    assert row["ranking"] == [[2], [0, 1]]
    assert (row["annotator"], row["kind"], row["order_shown"]) == ("ann", "human", [0, 1, 2])
    assert row["created_at"].startswith("20")


STORM = pytest.param(200, 50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.mark.parametrize(("num_tasks", "num_people"), [(15, 6), STORM])
def test_r30_concurrent_annotators_lose_nothing_and_double_nothing(store, num_tasks, num_people):
    """In the soak 10,000 judgements of 50 people, each sent twice, and 50 tabs of one person at once."""
    tasks = store.add_tasks("c", [ask(f"p{i}") for i in range(num_tasks)], overlap=num_people)

    def work(person):
        # Everything is sent twice, as after a time-out.
        return sum(store.submit(rank(t, annotator=person), "c", f"{t.id}-{person}") for t in tasks for _ in range(2))

    people = [f"person {n}" for n in range(num_people)]
    with concurrent.futures.ThreadPoolExecutor(num_people) as pool:
        assert sum(pool.map(work, people)) == num_tasks * num_people
        # The same person in two tabs at once.
        assert sum(pool.map(work, ["twice"] * num_people)) == num_tasks
    assert store.counts()["rankings"] == num_tasks * (num_people + 1)
    assert {t.judgements for t in store.tasks("c")} == {num_people + 1}


def test_two_processes_share_a_database(tmp_path):
    path = tmp_path / "p.db"
    script = """
import sys
from trivium.preferences.store import Store
from trivium.records import Ranking
with Store(sys.argv[1]) as store:
    for task in store.tasks("c"):
        groups = tuple((name,) for name in task.completion_ids)
        store.submit(Ranking(prompt_id=task.prompt_id, groups=groups, annotator=sys.argv[2], kind="human"), "c")
assert "torch" not in sys.modules
"""
    with Store(path) as store:
        store.add_tasks("c", [ask(f"p{i}") for i in range(20)], overlap=9)
        workers = [subprocess.Popen([sys.executable, "-c", script, path, f"w{n}"]) for n in range(2)]
        assert [w.wait(60) for w in workers] == [0, 0]
        assert len(store.rankings("c")) == 40


def test_rankings_cannot_be_changed_or_deleted(tmp_path):
    with Store(tmp_path / "p.db") as store:
        (task,) = store.add_tasks("c", [ask("p")])
        store.submit(rank(task), "c")
    raw = sqlite3.connect(tmp_path / "p.db")
    assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    for statement in ("UPDATE rankings SET annotator = 'x'", "DELETE FROM rankings"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            raw.execute(statement)


def test_foreign_and_newer_databases_are_refused_in_one_sentence(tmp_path):
    Store(tmp_path / "new.db").close()
    raw = sqlite3.connect(tmp_path / "new.db")
    raw.execute("UPDATE trivium_schema SET version = 99")
    raw.commit()
    with pytest.raises(UserError, match="schema 99"):
        Store(tmp_path / "new.db")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE prompts (x)")
    other.commit()
    with pytest.raises(UserError, match="did not make"):
        Store(tmp_path / "other.db")
    (tmp_path / "text.db").write_text("this is not a database at all, only a text file\n" * 50)
    with pytest.raises(UserError, match="not a preference database"):
        Store(tmp_path / "text.db")
    with pytest.raises(UserError, match="no preference database"):
        Store(tmp_path / "missing.db", create=False)
    assert not (tmp_path / "missing.db").exists()
    for url in ("nonsense://", "://x"):
        with pytest.raises(UserError):
            Store(url)


def test_errors_of_the_machine_are_explained():
    full = sa.exc.OperationalError("x", {}, sqlite3.OperationalError("database or disk is full"))
    assert isinstance(schema.explain(full, "p.db"), DiskFull)
    locked = sa.exc.OperationalError("x", {}, sqlite3.OperationalError("database is locked"))
    assert "locked by another process" in str(schema.explain(locked, "p.db"))


def soft_of(task, *labels):
    return tuple((task.completion_ids[i], task.completion_ids[j], chance) for i, j, chance in labels)


def test_soft_labels_come_back_are_exported_and_are_part_of_what_was_said(store, tmp_path):
    (task,) = store.add_tasks("c", [ask("p", "abc")])
    judged = rank(task, ((0, 1), 2), kind="ai", soft=soft_of(task, (0, 1, 0.55), (0, 2, 0.9)))
    assert store.submit(judged, "c") and store.rankings("c") == [judged]
    store.export_jsonl(tmp_path / "out.jsonl", "c")
    assert json.loads((tmp_path / "out.jsonl").read_text())["soft"] == [[0, 1, 0.55], [0, 2, 0.9]]
    plain = rank(task, ((0, 1), 2), kind="ai")
    assert plain.id != judged.id
    with pytest.raises(AlreadyJudged):
        store.submit(plain, "c")
    before = store.digest("c")
    store.submit(rank(task, ((0, 1), 2), kind="ai", soft=soft_of(task, (0, 1, 0.55))), "c", revise=True)
    assert store.digest("c") != before


@pytest.mark.parametrize(
    "labels", [[(0, 1, 1.1)], [(0, 1, -0.1)], [(0, 1, float("nan"))], [(0, 0, 0.5)], [(0, 1, 0.5), (1, 0, 0.5)]]
)
def test_what_is_no_soft_label_is_refused(tmp_path, labels):
    with Store(tmp_path / "p.db") as store:
        (task,) = store.add_tasks("c", [ask("p", "abc")])
        with pytest.raises(Refused, match="soft label"):
            store.submit(rank(task, (0, 1, 2), soft=soft_of(task, *labels)), "c")
        with pytest.raises(Refused, match="soft label"):
            store.submit(rank(task, (0, 1, 2), soft=((task.completion_ids[0], "stranger", 0.5),)), "c")
        assert store.rankings("c") == []


def test_ids_and_digests_of_rankings_without_soft_labels_are_what_they_always_were(tmp_path):
    """Taken from version 1: run fingerprints and idempotency keys of old workspaces depend on them."""
    with Store(tmp_path / "p.db") as store:
        (task,) = store.add_tasks("c", [ask("p", "ab")])
        judged = rank(task, (1, 0))
        store.submit(judged, "c")
        assert judged.id == "9f39e5d7db325f8800d8"
        assert store.digest("c") == "726a7a8db65fd726b2134dcaad93072fd70d197ff20c946a2788797b84f704bf"


def test_a_database_of_version_1_is_opened_kept_and_written(store):
    """Its rankings stay to the letter, append-only as before, and soft labels can be added to it."""
    tasks = store.add_tasks("c", [ask("p", "abc"), ask("q", "abc")])
    with store._engine.begin() as connection:
        columns = [c.name for c in schema.rankings.columns if c.name not in ("soft", "adjudicates", "sequence")]
        old = rank(tasks[0], (2, 0, 1))
    store.submit(old, "c")
    location = store._engine.url.render_as_string(hide_password=False)
    versions.downgrade(location, 1)
    query = sa.text(f"SELECT {', '.join(columns)} FROM rankings")
    with store._engine.begin() as connection:
        rows = connection.execute(query).all()
    with Store(location) as again:
        assert again.rankings("c") == [old]
        new = rank(tasks[1], (0, 1, 2), kind="ai", soft=soft_of(tasks[1], (0, 1, 0.7)))
        again.submit(new, "c")
        assert again.rankings("c", ["ai"]) == [new]
        with again._engine.begin() as connection:
            assert connection.execute(query).all()[:1] == rows
            assert connection.scalar(sa.text("SELECT version FROM trivium_schema")) == 2
        if again._engine.dialect.name == "sqlite":
            with pytest.raises(sa.exc.IntegrityError, match="append-only"), again.writing() as connection:
                connection.execute(sa.text("UPDATE rankings SET soft = '[]'"))


def test_pairs_and_unpaired_labels_are_the_fields_schemas_and_come_back(store, tmp_path):
    """By hand: b > a = c is two pairs; good is the best group, bad the last, and none acceptable is all bad."""
    from trivium.data.sources import load_preferences

    first, second, third = store.add_tasks("c", [ask("p", "abc"), ask("q", "ab"), ask("r", "ab")])
    store.submit(rank(first, (1, (0, 2))), "c")
    store.submit(rank(second, ((0, 1),)), "c")
    store.submit(rank(third, (0, 1), none_acceptable=True), "c")
    assert store.export_jsonl(tmp_path / "pairs.jsonl", "c", schema="pairs") == 2 + 0 + 1
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [(x["chosen"][0]["content"], x["rejected"][0]["content"]) for x in lines[:2]] == [
        ("p b", "p a"),
        ("p b", "p c"),
    ]
    found = list(load_preferences("pairs.jsonl", base=tmp_path))
    assert [(j.responses, j.groups, j.annotator) for j in found[:1]] == [(["p b", "p a"], [[0], [1]], "ann")]
    assert store.export_jsonl(tmp_path / "labels.jsonl", "c", schema="unpaired") == 3 + 0 + 2
    labels = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [(x["completion"][0]["content"], x["label"]) for x in labels] == [
        ("p a", False), ("p b", True), ("p c", False), ("r a", False), ("r b", False)
    ]  # fmt: skip
