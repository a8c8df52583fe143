"""R32: leases, repeats and questions with known answers."""

import concurrent.futures
import random

import pytest

from trivium.config import UserError
from trivium.preferences.assign import next_task, order
from trivium.preferences.store import Full, Task
from trivium.preferences.store.assignment import REPEAT_AFTER

from .test_store import ask, rank


def judge(store, task, name, **more):
    places = range(len(task.completion_ids))
    return store.submit(rank(task, places, annotator=name), task.collection, task=task.id, **more)


def test_a_lease_keeps_the_place_until_it_runs_out(store):
    store.add_tasks("c", [ask("p")], overlap=1)
    task, left = next_task(store, "ann")
    assert left == 1
    assert next_task(store, "bob") == (None, 0)
    assert next_task(store, "ann")[0] == task, "a reload shows the same task"
    store.lease([task], "ann", seconds=-1.0)
    assert next_task(store, "bob")[0] == task
    assert judge(store, task, "bob", within_overlap=True)
    with pytest.raises(Full):
        judge(store, task, "ann", within_overlap=True)
    assert len(store.rankings()) == 1
    assert judge(store, task, "bob", within_overlap=True) is False, "a repeat of what is stored is not one too many"


def test_a_late_answer_counts_while_there_is_still_a_place(store):
    store.add_tasks("c", [ask("p")], overlap=2)
    task, _ = next_task(store, "ann")
    store.lease([task], "ann", seconds=-1.0)
    assert judge(store, task, "bob") and judge(store, task, "ann", within_overlap=True)


def test_skipping_gives_the_place_back(store):
    store.add_tasks("c", [ask("p")], overlap=1)
    task, _ = next_task(store, "ann")
    store.skip(task.id, "ann", "human", "cannot judge")
    assert next_task(store, "bob")[0] == task


def test_r32_fifty_annotators_crash_and_come_back(store):
    """Each task gets exactly its overlap, no annotator with work to do is sent away, nothing is judged twice."""
    overlap, num_tasks = 3, 40
    store.add_tasks("c", [ask(f"p{n}") for n in range(num_tasks)], overlap=overlap)

    def work(number):
        rng, name = random.Random(number), f"person {number}"
        given = 0
        while True:
            task, _ = next_task(store, name)
            if task is None:
                return given
            if rng.random() < 0.3:  # closed the browser; the lease runs out
                store.lease([task], name, seconds=-1.0)
                continue
            try:
                given += judge(store, task, name, within_overlap=True)
            except Full:
                continue

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        given = list(pool.map(work, range(50)))
    assert sum(given) == overlap * num_tasks
    assert {task.judgements for task in store.tasks("c")} == {overlap}


def test_a_repeat_comes_back_to_who_judged_it_after_others_and_trains_nothing(store):
    tasks = store.add_tasks("c", [ask(f"p{n}") for n in range(REPEAT_AFTER + 2)], overlap=2)
    assert store.add_repeats("c", 1.0) == len(tasks)
    assert store.add_repeats("c", 1.0) == 0
    assert {t.purpose for t in store.open_tasks("c", "ann")} == {"rank"}
    for task in tasks[: REPEAT_AFTER + 1]:
        judge(store, task, "ann")
    again = [t for t in store.open_tasks("c", "ann") if t.purpose == "repeat"]
    assert [t.repeat_of for t in again] == [tasks[0].id]
    assert again[0].completion_ids == tasks[0].completion_ids
    assert not [t for t in store.open_tasks("c", "bob") if t.purpose == "repeat"]
    before = store.digest("c")
    judge(store, again[0], "ann")
    assert store.digest("c") == before
    (row,) = store.ranking_rows("c", purposes=("repeat",))
    assert row["repeat_of"] == tasks[0].id
    with pytest.raises(UserError, match="between 0 and 1"):
        store.add_repeats("c", 1.5)


def test_about_the_fraction_that_was_asked_for_is_repeated(store):
    store.add_tasks("c", [ask(f"p{n}") for n in range(300)])
    assert 300 * 0.1 - 17 < store.add_repeats("c", 0.1) < 300 * 0.1 + 17  # three standard deviations


def test_gold_is_asked_of_everybody_and_newcomers_qualify_first(store):
    store.add_tasks("c", [ask("p")], overlap=1)
    question = (*ask("known"), [[2], [0, 1], [3]])
    assert store.add_known("c", [question]) == 1 and store.add_known("c", [question]) == 0
    assert store.add_known("c", [question], "qualify") == 1
    for name in ("ann", "bob"):
        found = order(store.open_tasks("c", name), name)
        assert found[0].purpose == "qualify"
        assert {t.purpose for t in found} == {"rank", "gold", "qualify"}
        judge(store, found[0], name)
        (gold,) = (t for t in store.open_tasks("c", name) if t.purpose == "gold")
        assert gold.gold == tuple(tuple(gold.completion_ids[place] for place in group) for group in ([2], [0, 1], [3]))
        judge(store, gold, name)
    assert store.rankings("c") == []
    assert len(store.ranking_rows("c", purposes=("gold", "qualify"))) == 4
    with pytest.raises(UserError, match="place each"):
        store.add_known("c", [(*ask("other"), [[0], [1]])])


def test_what_teaches_most_is_asked_first(store):
    tasks = store.add_tasks("c", [ask(f"p{n}") for n in range(6)], overlap=3)
    store.set_priorities({tasks[4].id: 2.0, tasks[1].id: 1.0})
    judge(store, tasks[4], "bob")
    assert [t.id for t in order(store.open_tasks("c", "ann"), "ann")][:2] == [tasks[4].id, tasks[1].id]


def test_special_questions_are_few_and_at_no_fixed_place():
    def task(number, purpose="rank"):
        about = {"collection": "c", "prompt_id": "p", "completion_ids": ("a", "b"), "overlap": 9}
        return Task(id=f"{purpose}{number}", position=number, purpose=purpose, **about)

    gold = [task(n, "gold") for n in range(200)]
    first = [order([*gold, *(task(n) for n in range(left))], "ann")[0].purpose for left in range(1, 501)]
    assert 0.15 - 0.048 < first.count("gold") / 500 < 0.15 + 0.048  # three standard deviations


def test_flags_are_kept_once_and_only_of_what_was_asked(store):
    (task,) = store.add_tasks("c", [ask("p")])
    assert store.flag(task.id, task.completion_ids[1], "ann", "dangerous")
    assert not store.flag(task.id, task.completion_ids[1], "ann", "dangerous")
    with pytest.raises(UserError, match="no response"):
        store.flag(task.id, "other", "ann", "")
    assert store.counts()["flags"] == 1
