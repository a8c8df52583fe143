"""Which task an annotator sees next."""

from __future__ import annotations

from trivium.preferences.store import Store, Task
from trivium.records import AnnotatorKind, content_id


def order(tasks: list[Task], annotator: str) -> list[Task]:
    """Return the tasks, those with the fewest judgements first.

    Among equals the order is a shuffle of the annotator's own, by hash: two people who start together then rarely sit
    over the same task, nobody's habits line up with the order of the data, and a reload shows the same task again.
    """
    return sorted(tasks, key=lambda task: (task.judgements, content_id("assign", task.id, annotator)))


def next_task(
    store: Store, annotator: str, *, collection: str | None = None, kind: AnnotatorKind = "human"
) -> tuple[Task | None, int]:
    """Return the task this annotator should judge next (None: nothing is left for them) and how many are left.

    Left are tasks with fewer judgements of this kind than their overlap which the annotator has neither judged nor
    skipped. Nothing is reserved: two annotators at once may give a task more judgements than wanted, which harms none.
    """
    tasks = order(store.open_tasks(collection, annotator, kind), annotator)
    return (tasks[0] if tasks else None), len(tasks)


def order_shown(task: Task, annotator: str) -> tuple[str, ...]:
    """Return the task's completions in the order this annotator sees them: random, yet the same at every reload.

    A pure function of task and annotator, so that the page need not be trusted with it.
    """
    return tuple(sorted(task.completion_ids, key=lambda name: content_id("shown", task.id, annotator, name)))
