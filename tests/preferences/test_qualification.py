"""Questions with known answers, by hand, and what becomes of who fails them."""

import pytest

from trivium.preferences.assign import next_task
from trivium.preferences.comparisons import wins_by_prompt, with_a_choice
from trivium.preferences.qualification import pairs_right, shut_out, standing
from trivium.records import Completion, Ranking

from .test_store import ask


@pytest.mark.parametrize(
    ("given", "known", "expected"),
    [
        ("b|ac", "a|b|c", (1.5, 3)),
        ("a|b|c", "a|b|c", (3.0, 3)),
        ("c|b|a", "a|b|c", (0.0, 3)),
        ("a|b|c", "ab|c", (2.0, 2)),
        ("abc", "a|b|c", (1.5, 3)),
        ("", "a|b", (0.0, 1)),
        ("a|b", "ab", (0.0, 0)),
    ],
)
def test_pairs_right_by_hand(given, known, expected):
    def groups(text):
        return [list(group) for group in text.split("|") if group]

    assert pairs_right(groups(given), groups(known)) == expected


def test_who_fails_is_asked_nothing_more_and_who_passes_is(store):
    store.add_tasks("c", [ask("p")], overlap=5)
    store.describe("c", instructions="Prefer *short* ones.", pass_mark=0.7)
    assert store.description("c") == ("Prefer *short* ones.", 0.7)
    assert store.description("other") == ("", 0.0)
    store.add_known("c", [(*ask(f"known {n}"), [[0], [1], [2], [3]]) for n in range(2)], "qualify")
    for name, places, right in (("good", (0, 1, 2, 3), 1.0), ("bad", (3, 2, 1, 0), 0.0), ("half", (2, 3, 0, 1), 1 / 3)):
        for number in range(2):
            task, _ = next_task(store, name)
            assert task.purpose == "qualify"
            found = standing(store, name, "c")
            assert (found.asked, found.answered, found.passed) == (2, number, None)
            known = [each for (each,) in task.gold]
            groups = tuple((known[place],) for place in places)
            store.submit(
                Ranking(prompt_id=task.prompt_id, groups=groups, annotator=name, kind="human"), "c", task=task.id
            )
        found = standing(store, name, "c")
        assert found.right == pytest.approx(right) and found.passed is (right >= 0.7)
        task, left = next_task(store, name)
        assert (task is not None, left) == ((True, 1) if right >= 0.7 else (False, 0))
        assert shut_out(store, name, None) == (frozenset() if right >= 0.7 else {"c"})
    assert store.progress("c").tasks == 1, "questions about annotators are no part of the work to be done"


def test_nothing_to_qualify_for_shuts_nobody_out(store):
    (task,) = store.add_tasks("c", [ask("p")])
    assert standing(store, "ann", "c").passed is True
    assert next_task(store, "ann")[0] == task


def test_wins_by_prompt_by_hand(store):
    prompt, (a, b, c, d) = ask("p")
    policy = {a.id: "new", b.id: "old", c.id: "new", d.id: "old"}
    first = Ranking(prompt_id=prompt.id, groups=((a.id,), (b.id, c.id), (d.id,)), annotator="x", kind="human")
    second = Ranking(prompt_id=prompt.id, groups=((d.id,), (b.id,), (c.id,), (a.id,)), annotator="y", kind="human")
    other = Ranking(prompt_id="q", groups=((b.id,), (d.id,)), annotator="x", kind="human")
    # a beats b and d, c ties with b and beats d: 3.5 of 4; then 0 of 4. Two old ones alone are no comparison.
    assert wins_by_prompt([first, second, other], policy, "new", "old") == ([3.5], [8.0])


def test_what_has_one_text_is_no_choice():
    prompt, _ = ask("p")

    def made(*texts):
        return [Completion(prompt_id=prompt.id, text=text) for text in texts]

    found = with_a_choice([prompt] * 6, made("a", "a", " ", "a", "b", "a"), 3)
    assert [[c.text for c in completions] for _, completions in found] == [["a", "b"]]
