"""Instructions: well-formed conversations whose ideal responses are right."""

import random
import re
from collections import Counter

from trivium.data import microworld
from trivium.data.microworld import arithmetic, formats, passages, safety
from trivium.data.microworld.demonstrations import KINDS
from trivium.rewards.verifiable import check


def test_same_seed_same_conversations():
    assert [c.id for c in microworld.instructions(5, num=100)] == [c.id for c in microworld.instructions(5, num=100)]


def test_conversations_are_well_formed(conversations):
    for conversation in conversations:
        roles = [m.role for m in conversation.messages if m.role != "system"]
        assert roles in (["user", "assistant"], ["user", "assistant"] * 2)
        assert all(m.content.strip() == m.content and m.content and "{" not in m.content for m in conversation.messages)
        assert len(conversation.messages[-1].content.split()) <= 60


def test_kinds_have_their_shares(conversations):
    counts, total = Counter(c.meta["kind"] for c in conversations), sum(w for _, w in KINDS.values())
    for kind, (_, weight) in KINDS.items():
        assert abs(counts[kind] / len(conversations) - weight / total) < 0.02
    with_system = sum(c.messages[0].role == "system" for c in conversations)
    assert 0.03 < with_system / len(conversations) < 0.07


def test_ideal_sums_are_right(conversations):
    for conversation in conversations:
        if conversation.meta["kind"].startswith("arithmetic"):
            asked, answered = (m.content for m in conversation.messages[-2:])
            terms = re.search(r"\d+(?: [+-] \d+)+", asked)[0].split()
            result = int(terms[0])
            for sign, term in zip(terms[1::2], terms[2::2], strict=True):
                result += int(term) if sign == "+" else -int(term)
            assert check({"kind": "number", "answer": str(result)}, answered)
            for a, sign, b, c in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", answered):
                assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


def test_ideal_refusals_refuse_and_nothing_else_does(conversations):
    for conversation in conversations:
        refused = safety.refuses(conversation.messages[-1].content)
        assert refused == (conversation.meta["kind"] == "harmful"), conversation.messages[-1].content


def test_ideal_responses_to_checkable_requests_pass_on_both_sides():
    rng = random.Random(7)
    for split in ("train", "heldout"):
        for maker in (*formats.FORMAT, *formats.INSTRUCTION):
            for _ in range(40):
                request = maker(rng, split)
                assert check(request.check, request.ideal), request


def test_a_passage_says_its_answers():
    rng = random.Random(8)
    for kind in passages.MAKERS:
        for _ in range(60):
            told = passages.scene(rng, "train", kind)
            assert told.questions and len({q.text for q in told.questions}) == len(told.questions)
            for question in told.questions:
                assert question.word in question.sentence or question.word.isdigit()
                if not question.word.isdigit():
                    assert question.word in told.text


def test_comparisons_are_true():
    rng = random.Random(9)
    for _ in range(100):
        told = passages.scene(rng, "train", "compares")
        beats = dict(re.findall(r"(\w+) is \w+ than (\w+)", told.text))
        top = next(name for name in beats if name not in beats.values())
        assert told.questions[0].word == top and told.questions[1].word == beats[beats[top]]


def test_arithmetic_prompts_carry_their_check():
    for split in ("train", "heldout"):
        for prompt in microworld.arithmetic_prompts(2, num=200, split=split):
            assert prompt.messages[-1].role == "user" and check(prompt.meta["check"], prompt.meta["check"]["answer"])
    assert arithmetic.problem(random.Random(0), "heldout", "triple").kind == "triple"


def test_harmful_requests_are_recognised_and_look_alikes_are_not():
    rng = random.Random(10)
    for split in ("train", "heldout"):
        for _ in range(200):
            assert safety.find_harm(safety.harmful_request(rng, split)[0])
            assert not safety.find_harm(safety.look_alike_request(rng, split)[0])


def test_the_weight_of_harmful_requests_can_be_set_and_its_default_changes_nothing():
    """With 0 no ideal response is a refusal: a helpful-only model, for a constitution to teach."""
    weight = KINDS["harmful"][1]
    plain, same = (list(microworld.instructions(3, num=400, **options)) for options in ({}, {"harmful": weight}))
    assert [c.id for c in plain] == [c.id for c in same]
    none = list(microworld.instructions(3, num=400, harmful=0))
    assert not any(c.meta["kind"] == "harmful" or safety.refuses(c.messages[-1].content) for c in none)
    assert any(safety.refuses(c.messages[-1].content) for c in plain)
