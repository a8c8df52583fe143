"""Which task an annotator sees next."""

from __future__ import annotations

from collections.abc import Sequence

from trivium.preferences.qualification import shut_out
from trivium.preferences.store import Store, Task
from trivium.records import AnnotatorKind, content_id

SPECIAL_SHARE = 0.15
"""How often a repeat or a question with a known answer is asked, while there are some."""


def order(tasks: Sequence[Task], annotator: str) -> list[Task]:
    """Return the tasks in the order in which this annotator should be asked them.

    Qualification questions come first. Of the ordinary ones come those from which most is learned (`priority`), then
    those with the fewest judgements; among equals the order is a shuffle of the annotator's own, by hash: two people
    who start together then rarely sit over the same task, nobody's habits line up with the order of the data, and a
    reload shows the same task again. Now and then, by a hash again, a repeat or a gold question stands in front:
    nothing tells it from the others.
    """

    def place(task: Task) -> tuple[float, int, str]:
        return -task.priority, task.judgements, content_id("assign", task.id, annotator)

    entry = sorted((task for task in tasks if task.purpose == "qualify"), key=place)
    ordinary = sorted((task for task in tasks if task.purpose == "rank"), key=place)
    special = sorted((task for task in tasks if task.purpose in ("gold", "repeat")), key=place)
    draw = int(content_id("special", annotator, len(ordinary), len(special))[:8], 16) / 2**32
    if special and draw < SPECIAL_SHARE:
        return [*entry, special[0], *ordinary, *special[1:]]
    return [*entry, *ordinary, *special]


def next_task(
    store: Store, annotator: str, *, collection: str | None = None, kind: AnnotatorKind = "human"
) -> tuple[Task | None, int]:
    """Return the task this annotator should judge next, leased to them, and how many are left (None and 0: nothing).

    Left are tasks with a place: fewer judgements of this kind, and leases of others, than their overlap, which the
    annotator has neither judged nor skipped. Who has failed a collection's qualification is asked nothing more of it.
    """
    shut = shut_out(store, annotator, collection, kind)
    found = [task for task in store.open_tasks(collection, annotator, kind) if task.collection not in shut]
    tasks = order(found, annotator)
    taken = store.lease(tasks, annotator, kind)
    return taken, len(tasks) if taken else 0


def order_shown(task: Task, annotator: str) -> tuple[str, ...]:
    """Return the task's completions in the order this annotator sees them: random, yet the same at every reload.

    A pure function of task and annotator, so that the page need not be trusted with it.
    """
    return tuple(sorted(task.completion_ids, key=lambda name: content_id("shown", task.id, annotator, name)))
