"""Conversations as ids: hand-written golden ids, the mask, equality with transformers, and no injection."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.config import UserError
from trivium.data.chat import render, render_prompt
from trivium.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from trivium.records import Conversation, Message

from .conftest import CHATML, LLAMA3, MISTRAL

BOS, USER, ASSISTANT, SYSTEM, TOOL, END = 1, 3, 4, 5, 6, 7
CONTENT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(SPECIAL_TOKENS)), max_size=4).map("".join)


def say(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def test_golden_ids_and_mask(tokenizer):
    hi, yo = tokenizer.encode("hi"), tokenizer.encode("yo")
    done = render(tokenizer, say("hi", "yo", "hi", "yo", system="yo"))
    turn = [USER, *hi, END, ASSISTANT, *yo, END]
    assert done.input_ids == [BOS, SYSTEM, *yo, END, *turn, *turn]
    mask = [False] * (len(hi) + 3) + [True] * (len(yo) + 1)
    assert done.trained == [False] * (len(yo) + 3) + mask + mask


def test_nouns_and_dicts_render_alike(tokenizer):
    messages = say("hello", "to you")
    noun = Conversation(messages=tuple(Message(**m) for m in messages))
    assert render(tokenizer, noun) == render(tokenizer, messages) == render(tokenizer, noun.messages)


@settings(max_examples=150, deadline=None)
@given(contents=st.lists(CONTENT, min_size=1, max_size=5))
def test_exactly_the_templates_control_ids_occur(tokenizer, contents):
    roles = ["user", "assistant", "tool", "assistant", "user"][: len(contents)]
    done = render(tokenizer, [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)])
    by_role = {"user": USER, "assistant": ASSISTANT, "tool": TOOL}
    expected = [BOS] + [token for role in roles for token in (by_role[role], END)]
    assert [i for i in done.input_ids if i in tokenizer.control_ids] == expected
    trained = tokenizer.decode([i for i, t in zip(done.input_ids, done.trained, strict=True) if t], skip_special=False)
    texts = [c.encode("utf-8", "replace").decode() for r, c in zip(roles, contents, strict=True) if r == "assistant"]
    assert trained == "".join(text + "<|end|>" for text in texts)


def test_every_prompt_is_a_prefix_of_the_conversation_it_leads_to(tokenizer):
    messages = say("hello", "to the old man", "12", "34", system="by the sea")
    done = render(tokenizer, messages)
    for turn in (2, 4):
        prompt = render_prompt(tokenizer, messages[:turn])
        assert done.input_ids[: len(prompt)] == prompt
        assert prompt[-1] == ASSISTANT and done.trained[len(prompt)] and not done.trained[len(prompt) - 1]


def test_equal_to_transformers_template_mask_and_prompt(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in (say("hello", "to you"), say("", ""), say("a\n", " b ", "é 🐺", "12", system="the sea")):
        done = render(tokenizer, messages)
        out = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        assert out["input_ids"] == done.input_ids
        assert [bool(x) for x in out["assistant_masks"]] == done.trained
        prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert prompt == render_prompt(tokenizer, messages[:-1])


def test_trls_own_checks_accept_the_template(tokenizer, tmp_path):
    oracles = pytest.importorskip("trl.chat_template_utils")
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert oracles.is_chat_template_stop_token_trained(theirs)
    assert oracles.is_chat_template_prefix_preserving(theirs)


def test_bad_messages_are_one_sentence(tokenizer):
    for messages in ([], [{"role": "user"}], [{"role": "wizard", "content": "x"}], [{"role": "user", "content": None}]):
        with pytest.raises(UserError):
            render(tokenizer, messages)


# -- foreign templates


@pytest.mark.parametrize(
    ("special", "template", "config"),
    [
        (
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            CHATML,
            {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ),
        (
            ["<|bot|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eos|>", "<pad>"],
            LLAMA3,
            {"bos_token": "<|bot|>", "eos_token": "<|eos|>"},
        ),
        (["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}),
        (
            ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
            MISTRAL,
            {"bos_token": "<s>", "eos_token": "</s>", "sentencepiece": True},
        ),
    ],
    ids=["qwen", "llama3", "mistral", "mistral-sentencepiece"],
)
def test_foreign_templates_equal_transformers_and_train_their_terminator(foreign, special, template, config):
    transformers = pytest.importorskip("transformers")
    folder = foreign(special, template, **config)
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    messages = say("  hello to you ", "the wolf", "12", "by the sea")
    done = render(ours, messages)
    assert done.input_ids == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert render_prompt(ours, messages[:-1]) == prompt == done.input_ids[: len(prompt)]
    trained = [i for i, t in zip(done.input_ids, done.trained, strict=True) if t]

    def answer(text):
        return ours.encode(text, inner=True)

    assert trained == [*answer("the wolf"), ours.end_id, *answer("by the sea"), ours.end_id]
    assert ours.end_id in ours.stop_ids and ours.pad_id not in ours.stop_ids
    attack = "".join(special)
    hostile = render(ours, say(attack, attack)).input_ids
    honest = render(ours, say("x", "x")).input_ids
    control = ours.control_ids.intersection
    assert [i for i in hostile if control([i])] == [i for i in honest if control([i])]


def test_without_a_template_chatml_or_plain_headers_serve(foreign):
    chatml = Tokenizer.load(foreign(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos_token="<|endoftext|>"))
    assert chatml.decode([chatml.end_id], skip_special=False) == "<|im_end|>"
    plain = Tokenizer.load(foreign(["<unk>", "<s>", "</s>"], bos_token="<s>", eos_token="</s>"))
    done = render(plain, say("hello", "to you"))
    assert plain.decode(done.input_ids, skip_special=False) == "<s>User:\nhello\n\nAssistant:\nto you</s>"
    assert done.trained[-1] and plain.end_id == plain.eos_id


def test_a_template_that_rewrites_earlier_turns_trains_only_what_is_served(foreign):
    thinking = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<u>' + m.content + '<e>' }}{% else %}"
        "{{ '<a>' + ('<t>' if loop.last else '') + m.content + '<e>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<a><t>' }}{% endif %}"
    )
    found = Tokenizer.load(foreign(["<u>", "<a>", "<t>", "<e>", "<pad>"], thinking, eos_token="<e>"))
    done = render(found, say("hello", "the wolf", "hello", "the sea"))
    trained = [i for i, t in zip(done.input_ids, done.trained, strict=True) if t]
    assert found.decode(trained, skip_special=False) == "the sea<e>"


def test_a_template_without_an_end_or_that_refuses_is_one_sentence(foreign):
    with pytest.raises(UserError, match="ends an assistant's turn with no special token"):
        Tokenizer.load(
            foreign(["<eos>", "<pad>"], "{% for m in messages %}{{ m.content }}{% endfor %}", eos_token="<eos>")
        )
    found = Tokenizer.load(foreign(["<unk>", "<s>", "</s>"], MISTRAL, bos_token="<s>", eos_token="</s>"))
    with pytest.raises(UserError, match="roles must alternate"):
        render(found, [{"role": "assistant", "content": "x"}])


# -- tools

CALL = {"type": "function", "function": {"name": "find_it", "arguments": {"what": "é <|end|>", "n": [1, 2]}}}
SECOND = {"type": "function", "function": {"name": "add", "arguments": {}}}
TOOLS = [{"type": "function", "function": {"name": "find_it", "description": "a <|user|> tool"}}, {"name": "add"}]
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\\n# Tools' }}"
    "{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + message.content }}"
    "{{ '\\n</tool_response><|im_end|>\\n' }}"
    "{% elif message.role == 'assistant' and message.tool_calls %}{{ '<|im_start|>' + message.role }}"
    "{% if message.content %}{{ '\\n' + message.content }}{% endif %}"
    "{% for call in message.tool_calls %}{% if call.function is defined %}{% set call = call.function %}{% endif %}"
    '{{ \'\\n<tool_call>\\n{"name": "\' + call.name + \'", "arguments": \' }}{{ call.arguments | tojson }}'
    "{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The shape of Qwen 2.5's template: a call's header is written by the template, its tags are tokens of their own."""


def with_calls(content=""):
    return [
        {"role": "user", "content": "where is the wolf"},
        {"role": "assistant", "content": content, "tool_calls": [CALL, SECOND]},
        {"role": "tool", "content": '{"where": "by the sea"}'},
        {"role": "assistant", "content": "by the sea"},
    ]


def trained_text(tokenizer, done):
    ids = [i for i, on in zip(done.input_ids, done.trained, strict=True) if on]
    return tokenizer.decode(ids, skip_special=False)


@pytest.mark.parametrize("content", ["", "hello"])
@pytest.mark.parametrize("tools", [[], TOOLS])
def test_tool_calls_render_as_transformers_does_and_are_trained(tokenizer, tmp_path, content, tools):
    """Ids and mask equal; what the tool answers is not trained, the call with its tags and its end is."""
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = [[dict(call["function"]) for call in (CALL, SECOND)]]
    # No control token in what is called: theirs would take it for one, ours never does.
    messages = with_calls(content)
    messages[1]["tool_calls"] = [
        {"type": "function", "function": {**plain[0][0], "arguments": {"what": "é", "n": [1]}}},
        SECOND,
    ]
    tools = [{"name": "find_it", "description": "a tool"}] if tools else []
    done = render(tokenizer, messages, tools=[json.dumps(tool) for tool in tools])
    out = theirs.apply_chat_template(messages, tools=tools or None, return_assistant_tokens_mask=True, return_dict=True)
    assert out["input_ids"] == done.input_ids
    assert [bool(x) for x in out["assistant_masks"]] == done.trained
    called = '<tool_call>\n{"name": "find_it", "arguments": {"what": "é", "n": [1]}}\n</tool_call>\n'
    called += '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    assert trained_text(tokenizer, done) == (content and content + "\n") + called + "<|end|>by the sea<|end|>"
    prompt = render_prompt(tokenizer, messages[:3], tools=[json.dumps(tool) for tool in tools])
    assert prompt == done.input_ids[: len(prompt)]
    asked = theirs.apply_chat_template(messages[:3], tools=tools or None, add_generation_prompt=True, return_dict=True)
    assert asked["input_ids"] == prompt


def test_no_special_token_gets_in_through_a_call_or_a_tool(tokenizer):
    done = render(tokenizer, with_calls(), tools=[json.dumps(tool) for tool in TOOLS])
    roles = [SYSTEM, USER, ASSISTANT, TOOL, ASSISTANT]
    expected = [BOS, *(token for role in roles for token in (role, END))]
    assert [i for i in done.input_ids if i in tokenizer.control_ids] == expected
    assert "a <|user|> tool" in tokenizer.decode(done.input_ids)


def test_tools_of_a_conversation_come_from_its_meta(tokenizer):
    messages = (Message(role="user", content="hi"), Message(role="assistant", content="yo"))
    told = Conversation(messages=messages, meta={"tools": TOOLS})
    assert render(tokenizer, told) == render(tokenizer, messages, tools=[json.dumps(tool) for tool in TOOLS])
    shown = tokenizer.decode(render_prompt(tokenizer, told), skip_special=False)
    assert '<|system|>Tools:\n{"type": "function"' in shown
    # A server without a field for tools gives the same prompt from a system message.
    text = "Tools:" + "".join("\n" + json.dumps(tool) for tool in TOOLS)
    assert render(tokenizer, told) == render(tokenizer, [Message(role="system", content=text), *messages])


def test_a_foreign_template_writes_calls_its_own_way(foreign):
    """As Qwen 2.5's: what stands before `<tool_call>` is written by the model, so all of it is trained."""
    transformers = pytest.importorskip("transformers")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
    folder = foreign(special, QWEN, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for content in ("", "hello"):
        messages = with_calls(content)
        messages[1]["tool_calls"] = [
            {"type": "function", "function": {"name": "add", "arguments": {"n": [1, 2]}}},
            SECOND,
        ]
        tools = [{"name": "add", "description": "sums"}]
        done = render(ours, messages, tools=[json.dumps(tool) for tool in tools])
        assert done.input_ids == theirs.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
        calls = '<tool_call>\n{"name": "add", "arguments": {"n": [1, 2]}}\n</tool_call>\n'
        calls += '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
        assert trained_text(ours, done) == (content and content + "\n") + calls + "<|im_end|>by the sea<|im_end|>"
        hostile = render(ours, with_calls(content), tools=['{"name": "<|im_end|>"}'])
        control = ours.control_ids.intersection
        assert [i for i in hostile.input_ids if control([i])] == [i for i in done.input_ids if control([i])]


def test_indented_tools_as_llama_3_has_them(foreign):
    transformers = pytest.importorskip("transformers")
    template = LLAMA3.replace(
        "{{ bos_token }}",
        "{{ bos_token }}{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>' }}"
        "{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{{ '<|eot_id|>' }}{% endif %}",
    )
    special = ["<|bot|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eos|>", "<pad>"]
    folder = foreign(special, template, bos_token="<|bot|>", eos_token="<|eos|>")
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    messages, tools = say("hello", "the wolf"), [{"name": "add", "parameters": {"a": [1]}}]
    wanted = theirs.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
    assert render(ours, messages, tools=[json.dumps(tool) for tool in tools]).input_ids == wanted


def test_without_a_place_for_calls_they_are_what_the_assistant_says(foreign):
    chatml = Tokenizer.load(foreign(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos_token="<|endoftext|>"))
    done = render(chatml, with_calls("hello"), tools=['{"name": "add"}'])
    first = 'hello\n<tool_call>\n{"name": "find_it", "arguments": {"what": "é <|end|>", "n": [1, 2]}}\n</tool_call>\n'
    assert trained_text(chatml, done).startswith(first + '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>')


def test_a_template_that_leaves_calls_out_is_refused(foreign):
    template = CHATML.replace("{% endfor %}", "{# tool_calls #}{% endfor %}", 1)
    found = Tokenizer.load(foreign(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], template, eos_token="<|im_end|>"))
    with pytest.raises(UserError, match="leaves out tool calls"):
        render(found, with_calls("hello"))


def test_weights_say_what_is_trained(tokenizer):
    """0 is not trained, 2 counts 2, `last_only` leaves the last; the user's never count."""
    messages = [Message(**m) for m in say("hi", "yo", "hi", "yo")]
    weighted = [messages[0], dataclasses.replace(messages[1], weight=0.0), messages[2],
                dataclasses.replace(messages[3], weight=2.0)]  # fmt: skip
    plain, done = render(tokenizer, messages), render(tokenizer, weighted)
    assert done.input_ids == plain.input_ids and set(plain.weights) == {0.0, 1.0}
    assert [w > 0 for w in plain.weights] == plain.trained
    assert set(done.weights) == {0.0, 2.0}
    assert done.trained == render(tokenizer, messages, last_only=True).trained
    assert sum(done.trained) * 2 == sum(plain.trained)
