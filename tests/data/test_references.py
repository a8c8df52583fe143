"""Golden ids, which no change may move unseen (row 7), and the prompt that two answers share, as TRL finds it."""

from __future__ import annotations

import pytest

from trivium.data.chat import render, render_prompt
from trivium.data.sources.schemas import to_judgements
from trivium.data.tokenizer import Tokenizer

TALK = [
    {"role": "system", "content": "by the sea"},
    {"role": "user", "content": "hello to the old man"},
    {"role": "assistant", "content": "12 wolves, é"},
]
GOLDEN = [1, 5, 278, 266, 309, 7, 3, 293, 275, 266, 295, 294, 7, 4]
ANSWER = [24, 25, 269, 268, 93, 76, 90, 19, 228, 135, 110, 7]


def test_golden_ids_of_training_and_of_serving(tokenizer: Tokenizer) -> None:
    """The same numbers on every machine and after every change: models that were trained on them are out there."""
    done = render(tokenizer, TALK)
    assert done.input_ids == GOLDEN + ANSWER
    assert done.trained == [False] * len(GOLDEN) + [True] * len(ANSWER)
    assert render_prompt(tokenizer, TALK[:2]) == GOLDEN


@pytest.mark.parametrize("turns", [1, 3])
def test_the_shared_prompt_is_trls(turns: int) -> None:
    """Without a `prompt`, it is what both conversations have in common."""
    extract = pytest.importorskip("trl.data_utils").extract_prompt
    talk = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(turns)]
    row = {side: [*talk, {"role": "assistant", "content": f"a {side} answer"}] for side in ("chosen", "rejected")}
    theirs = extract(row)
    (judged,) = to_judgements(row)
    assert judged.prompt.as_dicts() == theirs["prompt"] == talk
    assert judged.responses == [side[0]["content"] for side in (theirs["chosen"], theirs["rejected"])]
