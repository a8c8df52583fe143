import pytest

from trivium.config import UserError
from trivium.data.chat import render_prompt
from trivium.evals import players
from trivium.evals.generative import answer
from trivium.evals.players import Player, few_shot
from trivium.evals.tasks import Item, Task
from trivium.models.generate import Generated, generate
from trivium.records import Conversation, Message


def prompt(*texts):
    roles = ("user", "assistant")
    return Conversation(messages=tuple(Message(role=roles[i % 2], content=t) for i, t in enumerate(texts)))


def item(question, ideal="", check=None, split="test"):
    return Item(id=question, task="t@1", kind="generate", prompt=prompt(question), ideal=ideal, split=split,
                check=check or {"kind": "number", "answer": "5"})  # fmt: skip


EXAMPLES = (
    item("What is 1 + 1?", "The sum is 2.", split="example"),
    item("What is 4 + 4?", "The sum is 8.", split="example"),
)


def test_few_shot_by_hand():
    assert few_shot(prompt("What is 2 + 3?"), EXAMPLES[:1]) == (
        "Question: What is 1 + 1?\nAnswer: The sum is 2.\n\nQuestion: What is 2 + 3?\nAnswer:"
    )


def test_chat_models_read_their_template_and_base_models_plain_text(model, tokenizer):
    chat = Player(name="sft", model=model, tokenizer=tokenizer)
    assert chat.encode(prompt("hi"), EXAMPLES, 8) == render_prompt(tokenizer, prompt("hi"))
    base = Player(name="base", model=model, tokenizer=tokenizer, is_base=True)
    ids = base.encode(prompt("hi"), EXAMPLES[:1], 8)
    assert ids == [tokenizer.bos_id, *tokenizer.encode(few_shot(prompt("hi"), EXAMPLES[:1]))]
    both = base.encode(prompt("hi"), EXAMPLES, 8)
    room = model.config.max_position_embeddings - len(both)
    assert base.encode(prompt("hi"), EXAMPLES, room) == both
    assert base.encode(prompt("hi"), EXAMPLES, room + 1) == ids, "an example is left out rather than the answer cut"


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """Every prompt is answered with the same text, token by token, as far as the player lets it go on."""

    def install(text):
        def fake(model, prompts, *, max_new_tokens, on_token, stop_ids, **_):
            found = []
            for row in range(len(prompts)):
                ids = []
                for token in [*tokenizer.encode(text), tokenizer.end_id]:
                    ids.append(token)
                    if token in stop_ids or (on_token and on_token(row, token)) or len(ids) == max_new_tokens:
                        break
                found.append(Generated(token_ids=ids, logprobs=[0.0] * len(ids), finish_reason="stop"))
            return found

        monkeypatch.setattr(players, "generate", fake)

    return install


def test_a_base_model_is_stopped_and_cut_at_its_own_next_question(model, tokenizer, scripted):
    scripted(" The sum is 5.\n\nQuestion: What is 6 + 6?\nAnswer: 12")
    base = Player(name="base", model=model, tokenizer=tokenizer, is_base=True)
    made = base.write([[1, 9]], max_new_tokens=60, temperature=0.0)[0]
    assert base.text_of(made) == "The sum is 5."
    assert tokenizer.decode(made.token_ids).endswith("Question"), "it was stopped there, not only cut"
    tasks = [Task(name="t@1", items=(item("What is 2 + 3?"),), examples=EXAMPLES)]
    assert [a.grade for a in answer(base, tasks, max_new_tokens=60)["t@1"]] == [1.0]
    chat = Player(name="sft", model=model, tokenizer=tokenizer)
    assert [a.grade for a in answer(chat, tasks, max_new_tokens=60)["t@1"]] == [0.0], "a chat model's text is not cut"


def test_answers_come_back_in_the_order_of_their_items(model, tokenizer):
    chat = Player(name="sft", model=model, tokenizer=tokenizer)
    tasks = [
        Task(name="a@1", items=tuple(item(f"What is {i} + 3? {'Yes. ' * (7 - i)}") for i in range(5))),
        Task(name="b@1", items=tuple(item(f"Tell {i}", check={"kind": "words", "max": 9}) for i in range(3))),
    ]
    found = answer(chat, tasks, max_new_tokens=6)
    for task in tasks:
        for one, got in zip(task.items, found[task.name], strict=True):
            alone = generate(
                model,
                [render_prompt(tokenizer, one.prompt)],
                max_new_tokens=6,
                temperature=0.0,
                stop_ids=tokenizer.stop_ids,
            )[0]
            assert got.text == tokenizer.decode(alone.token_ids) and got.num_tokens == len(alone.token_ids)


def test_what_needs_a_judge_waits_for_one(model, tokenizer):
    chat = Player(name="sft", model=model, tokenizer=tokenizer)
    tasks = [Task(name="style@1", items=(item("Tell me.", check={"kind": "taste"}),))]
    assert answer(chat, tasks, max_new_tokens=4) == {}
    assert answer(chat, tasks, max_new_tokens=4, judge=lambda p, text: 0.25)["style@1"][0].grade == 0.25


def test_a_prompt_that_fills_the_context_is_named(model, tokenizer):
    chat = Player(name="sft", model=model, tokenizer=tokenizer)
    with pytest.raises(UserError, match="context of 128 of sft"):
        answer(chat, [Task(name="t@1", items=(item("The cat sat on the mat. " * 40),))], max_new_tokens=4)
