from trivium.preferences.assign import next_task, order_shown
from trivium.preferences.store import Store
from trivium.records import Completion, Conversation, Message, Ranking


def fill(store, number, overlap):
    items = []
    for index in range(number):
        prompt = Conversation(messages=(Message(role="user", content=f"prompt {index}"),))
        items.append((prompt, [Completion(prompt_id=prompt.id, text=t) for t in "abcd"]))
    return store.add_tasks("c", items, overlap=overlap)


def judge(store, task, annotator):
    groups = tuple((name,) for name in order_shown(task, annotator))
    store.submit(Ranking(prompt_id=task.prompt_id, groups=groups, annotator=annotator, kind="human"), "c")


def test_fewest_judgements_first_until_the_overlap_is_reached(tmp_path):
    with Store(tmp_path / "p.db") as store:
        fill(store, 6, overlap=2)
        people = ["x", "y", "z"]
        given = 0
        spread = []
        while True:
            moved = False
            for person in people:
                task, left = next_task(store, person, collection="c")
                if task is not None:
                    assert left >= 1
                    judge(store, task, person)
                    given, moved = given + 1, True
                    counts = [t.judgements for t in store.tasks("c")]
                    spread.append(max(counts) - min(counts))
            if not moved:
                break
        assert given == 12
        assert {t.judgements for t in store.tasks("c")} == {2}
        assert spread[5] == 0  # after six judgements every task has one
        assert next_task(store, "x", collection="c") == (None, 0)


def test_the_next_task_and_the_order_are_stable_per_annotator_and_differ_between_them(tmp_path):
    with Store(tmp_path / "p.db") as store:
        tasks = fill(store, 40, overlap=1)
        assert next_task(store, "x") == next_task(store, "x")
        firsts = {next_task(store, f"person {n}")[0].id for n in range(10)}
        assert len(firsts) > 5
        assert order_shown(tasks[0], "x") == order_shown(tasks[0], "x")
        # Each completion is shown first about equally often: 400 draws, 4 places, five standard deviations.
        first = [order_shown(t, f"p{n}")[0] == t.completion_ids[0] for t in tasks for n in range(10)]
        assert abs(sum(first) / len(first) - 0.25) < 5 * (0.25 * 0.75 / len(first)) ** 0.5
