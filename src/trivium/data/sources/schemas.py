"""From raw rows to nouns: the schemas that people's files come in.

Conversations: `{"messages"}`, `{"prompt", "completion" | "response"}`, Alpaca's `{"instruction", "input", "output"}`,
ShareGPT's `{"conversations": [{"from", "value"}]}`. Judgements: `{"prompt", "chosen", "rejected"}` (texts, messages, or
"Human:/Assistant:" transcripts), `{"prompt", "responses", "rank" | "ranking" | "annotations"}`,
`{"prompt", "response_a", "response_b", "labels"}`. Further columns become `meta`. All raise BadRecord with a reason.

A message may carry `tool_calls`, and an assistant's a `weight` (0 or more; OpenAI's 0 and 1) or `train: false`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast, get_args

from trivium.data.sources.annotation_tools import is_argilla, is_label_studio, read_argilla, read_label_studio
from trivium.data.sources.files import extract_html
from trivium.data.sources.intake import BadRecord
from trivium.records import AnnotatorKind, Conversation, Document, Message, Role, ToolCall, to_tool_calls

Row = Mapping[str, Any]

ROLES: dict[str, Role] = {
    **{name: "user" for name in ("user", "human", "prompter")},
    **{name: "assistant" for name in ("assistant", "gpt", "chatgpt", "bot", "model", "function_call")},
    **{name: "system" for name in ("system", "developer")},
    **{name: "tool" for name in ("tool", "function", "observation", "function_response", "ipython")},
}
"""What the sides of a conversation are called elsewhere."""

_TURN = re.compile(r"\n\n(Human|Assistant): ?")


class Judgement(NamedTuple):
    """One annotator's ranking: `groups` hold indices into `responses`, best first, a tie shares a group."""

    prompt: Conversation
    responses: list[str]
    groups: list[list[int]]
    annotator: str
    kind: AnnotatorKind = "human"


def to_document(row: Row) -> Document:
    """Return the document of a row with `text`, or with `html` whose main text is taken out."""
    if "text" in row:
        text = _string(row, "text")
    elif "html" in row:
        text = extract_html(_string(row, "html"))
    else:
        raise BadRecord(f"no 'text' in the record: it has {_keys(row)}")
    return Document(
        text=text,
        source=str(row.get("source", "")),
        license=str(row.get("license", "")),
        meta=_meta(row, "text", "html"),
    )


def to_conversation(row: Row) -> Conversation:
    """Return the conversation of a row, in whichever schema; it has at least one assistant message."""
    for key in ("messages", "conversations", "conversation"):
        if key in row:
            return _with_assistant(_conversation(to_messages(row[key]), row, key))
    for prompt, answer in (("prompt", "completion"), ("prompt", "response"), ("instruction", "output")):
        if prompt in row and answer in row:
            messages = [*_prompt_messages(row, prompt), *to_messages(row[answer], role="assistant")]
            return _with_assistant(_conversation(messages, row, prompt, answer, "input", "system", "history"))
    raise BadRecord(f"no 'messages' and no prompt with its completion: the record has {_keys(row)}")


def to_prompt(row: Row) -> Conversation:
    """Return the prompt of a row: its messages up to the last one of the user."""
    for key in ("prompt", "messages", "instruction"):
        if key in row:
            messages = _prompt_messages(row, key)
            break
    else:
        raise BadRecord(f"no 'prompt' in the record: it has {_keys(row)}")
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not messages or messages[-1].role not in ("user", "tool"):
        raise BadRecord("the prompt does not end with a user's message")
    return _conversation(messages, row, key, "input", "system", "history", "completion", "response", "output")


def to_judgements(row: Row) -> list[Judgement]:
    """Return every annotator's judgement in a row: of our own schemas, the field's, or an annotation tool's export."""
    tool = read_label_studio if is_label_studio(row) else read_argilla if is_argilla(row) else None
    if tool is not None:
        asked, texts, given = tool(row)
        prompt = to_prompt({"prompt": asked})
    elif "chosen" in row and "rejected" in row:
        prompt, texts = _chosen_rejected(row)
        given = [(str(row.get("annotator", "dataset")), [[0], [1]])]
    elif "response_a" in row and "response_b" in row:
        prompt, texts = to_prompt(row), [_answer(row["response_a"]), _answer(row["response_b"])]
        given = _labels(row)
    elif "responses" in row:
        if not isinstance(row["responses"], list):
            raise BadRecord("wrong type: 'responses' must be a list")
        prompt, texts = to_prompt(row), [_answer(item) for item in row["responses"]]
        given = _rankings(row, len(texts))
    else:
        raise BadRecord(f"no preference in the record: it has {_keys(row)}")
    prompt = Conversation(messages=prompt.messages, source=prompt.source)
    # Only our own exports say who judged; data sets that people publish as human preferences say nothing.
    kind = row.get("kind", "human")
    if kind not in get_args(AnnotatorKind):
        raise BadRecord(f"kind is {kind!r}, not human, ai or simulated")
    return [Judgement(prompt, *_without_copies(texts, groups), annotator, kind) for annotator, groups in given]


def to_messages(value: Any, *, role: Role = "user") -> list[Message]:
    """Return messages from a list of them (any of the known key and role names), or one of `role` from a text."""
    if isinstance(value, str):
        if value.startswith("\n\nHuman:"):
            parts = _TURN.split(value)[1:]
            return [
                Message(role=ROLES[who.lower()], content=text)
                for who, text in zip(parts[::2], parts[1::2], strict=True)
            ]
        return [Message(role=role, content=value)]
    if not isinstance(value, list) or not value:
        raise BadRecord(f"wrong type: messages must be a list or a text, not {type(value).__name__}")
    return [_message(item) for item in value]


def _message(item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise BadRecord(f"wrong type: a message must be an object, not {type(item).__name__}")
    name = item.get("role", item.get("from"))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadRecord(f"unknown role: {name!r}")
    content = item.get("content", item.get("value"))
    if isinstance(content, list):  # OpenAI's parts; only text has a place here
        texts = [p["text"] for p in content if isinstance(p, Mapping) and isinstance(p.get("text"), str)]
        content = "".join(texts) if len(texts) == len(content) else None
    calls = _tool_calls(item, name, content) if role == "assistant" else ()
    if calls and (content is None or (isinstance(name, str) and name.lower() == "function_call")):
        content = ""
    if not isinstance(content, str):
        raise BadRecord(f"wrong type: a message's content must be text, not {type(content).__name__}")
    return Message(role=role, content=content, tool_calls=calls, weight=_weight(item, role))


def _tool_calls(item: Mapping[str, Any], name: Any, content: Any) -> tuple[ToolCall, ...]:
    """Return what an assistant's message calls: OpenAI's `tool_calls`, or ShareGPT's role `function_call`."""
    try:
        if item.get("tool_calls"):
            return to_tool_calls(item["tool_calls"])
        if isinstance(name, str) and name.lower() == "function_call":
            return to_tool_calls(json.loads(content))
    except (ValueError, TypeError) as error:
        raise BadRecord(f"wrong tool call: {error}") from None
    return ()


def _weight(item: Mapping[str, Any], role: Role) -> float:
    """Return what a message counts for: its `weight`, 0 where `train` (or ShareGPT's `loss`) is false, else 1."""
    weight = item.get("weight")
    weight = 1 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise BadRecord(f"wrong weight: {weight!r} is not a number from 0 up")
    wanted = item.get("train", item.get("loss"))
    if wanted not in (None, True, False, 0, 1):
        raise BadRecord(f"wrong type: a message's 'train' must be true or false, not {wanted!r}")
    if role != "assistant":
        if wanted or item.get("weight"):
            raise BadRecord(f"wrong weight: only an assistant's message can be trained, not one of role {role!r}")
        return 1.0
    return 0.0 if wanted is not None and not wanted else float(weight)


def _prompt_messages(row: Row, key: str) -> list[Message]:
    """Return a prompt's messages, with Alpaca's `input`, `system` and `history` where they are given."""
    messages = to_messages(row[key])
    if key == "instruction":
        extra = row.get("input")
        if isinstance(extra, str) and extra.strip():
            messages = [Message(role="user", content=f"{messages[0].content}\n\n{extra}")]
        turns = [Message(role=r, content=str(t)) for pair in row.get("history") or [] for r, t in _turn_roles(pair)]
        messages = turns + messages
    system = row.get("system")
    if isinstance(system, str) and system:
        messages = [Message(role="system", content=system), *messages]
    return messages


def _turn_roles(pair: Any) -> list[tuple[Role, Any]]:
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise BadRecord("wrong type: 'history' must be a list of [user, assistant] pairs")
    return [("user", pair[0]), ("assistant", pair[1])]


def _conversation(messages: list[Message], row: Row, *used: str) -> Conversation:
    return Conversation(messages=tuple(messages), source=str(row.get("source", "")), meta=_meta(row, *used))


def _with_assistant(conversation: Conversation) -> Conversation:
    if not any(m.role == "assistant" and (m.content.strip() or m.tool_calls) for m in conversation.messages):
        raise BadRecord("no assistant message with any text, so nothing to learn from")
    return conversation


def _chosen_rejected(row: Row) -> tuple[Conversation, list[str]]:
    """Return prompt and both answers; without a `prompt`, it is what both sides have in common."""
    chosen, rejected = (to_messages(row[key], role="assistant") for key in ("chosen", "rejected"))
    if "prompt" in row:
        prompt = to_prompt(row)
    else:
        shared = chosen[:-1]
        if not shared or shared != rejected[:-1]:
            raise BadRecord("no 'prompt', and chosen and rejected do not share all but their last message")
        prompt = _conversation(shared, row)
    if not chosen or not rejected or chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise BadRecord("chosen and rejected must end with an assistant's message")
    return prompt, [chosen[-1].content, rejected[-1].content]


def _answer(value: Any) -> str:
    messages = to_messages(value, role="assistant")
    if messages[-1].role != "assistant":
        raise BadRecord("a response must end with an assistant's message")
    return messages[-1].content


def _labels(row: Row) -> list[tuple[str, list[list[int]]]]:
    """Return each annotator's verdict on a pair: A, B or tie."""
    verdicts = {"a": [[0], [1]], "b": [[1], [0]], "tie": [[0, 1]]}
    labels = row.get("labels")
    if not isinstance(labels, Mapping) or not labels:
        raise BadRecord("wrong type: 'labels' must be an object {annotator: 'A' | 'B' | 'tie'}")
    wrong = [label for label in labels.values() if str(label).lower() not in verdicts]
    if wrong:
        raise BadRecord(f"unknown label: {wrong[0]!r} (A, B or tie)")
    return [(str(annotator), verdicts[str(label).lower()]) for annotator, label in labels.items()]


def _rankings(row: Row, count: int) -> list[tuple[str, list[list[int]]]]:
    """Return each annotator's groups over `count` responses."""
    annotator = str(row.get("annotator") or "dataset")
    if "annotations" in row:
        items = row["annotations"]
        if not isinstance(items, list) or not all(isinstance(i, Mapping) and "rank" in i for i in items):
            raise BadRecord("wrong type: 'annotations' must be a list of {annotator, rank}")
        return [(str(i.get("annotator", annotator)), _by_rank(i["rank"], count)) for i in items]
    if "rank" in row:
        return [(annotator, _by_rank(row["rank"], count))]
    if "ranking" not in row:
        raise BadRecord("responses without a judgement: no 'rank', 'ranking' or 'annotations'")
    groups = [group if isinstance(group, list) else [group] for group in cast(list[Any], row["ranking"] or [])]
    flat = [index for group in groups for index in group]
    if not flat or any(type(i) is not int or not 0 <= i < count for i in flat) or len(set(flat)) < len(flat):
        raise BadRecord(f"wrong ranking: groups must hold each index 0..{count - 1} at most once")
    return [(annotator, [group for group in groups if group])]


def _by_rank(rank: Any, count: int) -> list[list[int]]:
    """Return groups from ranks (1 = best, equal = tie)."""
    if not isinstance(rank, list) or len(rank) != count or any(type(r) not in (int, float) for r in rank):
        raise BadRecord(f"wrong rank: it must be a list of {count} numbers, one per response")
    return [[i for i, r in enumerate(rank) if r == place] for place in sorted(set(rank))]


def _without_copies(texts: list[str], groups: list[list[int]]) -> tuple[list[str], list[list[int]]]:
    """Return distinct responses: of equal texts the best placed stays, since a text cannot be better than itself."""
    first: dict[str, int] = {}
    for group in groups:
        for index in group:
            first.setdefault(texts[index], index)
    kept = sorted(first.values())
    renumbered = [[kept.index(i) for i in group if first[texts[i]] == i] for group in groups]
    if len(kept) < 2:
        raise BadRecord("fewer than two different responses were judged")
    return [texts[i] for i in kept], [group for group in renumbered if group]


def _meta(row: Row, *used: str) -> dict[str, Any]:
    """Return the columns that no noun has a field for; an object called `meta` is merged in."""
    inner = row.get("meta")
    rest = {k: v for k, v in row.items() if k not in {*used, "source", "license", "meta", "tools"}}
    tools = _tools(row.get("tools")) if {"messages", "conversations", "conversation"} & set(used) else row.get("tools")
    rest |= {"tools": tools} if tools else {}
    return rest | (dict(inner) if isinstance(inner, Mapping) else {})


def _tools(value: Any) -> list[Any]:
    """Return what an assistant may call, as descriptions; some files hold their JSON as text."""
    try:
        value = json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError:
        raise BadRecord("wrong type: 'tools' is a text that is not JSON") from None
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRecord("wrong type: 'tools' must be a list of objects")
    return value


def _string(row: Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise BadRecord(f"wrong type: {key!r} must be text, not {type(value).__name__}")
    return value


def _keys(row: Row) -> str:
    return ", ".join(sorted(map(str, row))[:8]) or "no keys"
