"""Answers that the model writes itself, graded by a program or a judge.

All are greedy, so that a figure has no luck of the draw in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trivium.evals.players import Player
from trivium.evals.tasks import Task
from trivium.rewards.judge import JudgeFn
from trivium.rewards.verifiable import check

NUM_EXAMPLES = 3
"""Answered questions that a base model is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a player wrote for an item, and its grade: 1 or 0 by a check, any number by a judge."""

    text: str
    grade: float
    num_tokens: int


def answer(
    player: Player,
    tasks: Sequence[Task],
    *,
    max_new_tokens: int,
    judge: JudgeFn | None = None,
    num_examples: int = NUM_EXAMPLES,
) -> dict[str, list[Answer]]:
    """Return the player's answers to every generate task, in the order of its items; all tasks in one batched run.

    Tasks that need a judge are left out when there is none.
    """
    wanted = [
        task
        for task in tasks
        if task.kind == "generate" and (judge or not any(item.needs_judge for item in task.items))
    ]
    asked = [(task, item) for task in wanted for item in task.items]
    encoded = [player.encode(item.prompt, task.examples[:num_examples], max_new_tokens) for task, item in asked]
    found: dict[str, list[Answer]] = {task.name: [] for task in wanted}
    generated = player.write(encoded, max_new_tokens=max_new_tokens, temperature=0.0)
    for (task, item), made in zip(asked, generated, strict=True):
        text = player.text_of(made)
        grade = judge(item.prompt, text) if judge and item.needs_judge else float(check(item.check, text))
        found[task.name].append(Answer(text=text, grade=grade, num_tokens=len(made.token_ids)))
    return found
