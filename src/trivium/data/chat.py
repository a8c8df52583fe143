"""Conversations as ids, the one way for training, preferences, rollouts, evaluation and serving.

    <|bos|> <|user|> hi <|end|> <|assistant|> yo <|end|>
    trained:  0     0    0   0       0         1    1

Special tokens come from the template alone: contents, and the template's plain words around them, are encoded as
ordinary text, so no special token typed by a user takes effect. An assistant's content is encoded on its own, because
generation starts there; only where a merge would have crossed that border do ids differ from `apply_chat_template`.

A call of a tool is the assistant's own: it is trained with all that the template writes around it. What a tool answers
is a message of role `tool`, and like every message that is not the assistant's never trained.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trivium.config import UserError
from trivium.data.templates import CHAT_TEMPLATE, TOOLS, Skeleton, Slot, Turn, skeleton
from trivium.data.tokenizer import Tokenizer
from trivium.records import Conversation, Message, ToolCall, to_tool_calls

__all__ = ["CHAT_TEMPLATE", "Rendered", "render", "render_prompt"]

Messages = Conversation | Sequence[Message | Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation's ids; `trained[i]` says that token i is of an assistant's turn that is trained, its end included.

    `weights[i]` is what that turn counts for, 0 where nothing is trained.
    """

    input_ids: list[int]
    trained: list[bool]
    weights: list[float]


def render(tokenizer: Tokenizer, messages: Messages, *, tools: Sequence[str] = (), last_only: bool = False) -> Rendered:
    """Return the ids of a whole conversation, with the assistant's turns and their terminators marked as trained.

    An assistant turn is trained only where what stands before it equals what a server would have sent at that point
    (some foreign templates rewrite earlier turns), and where its weight is above 0; with `last_only` only the last one
    is. `tools` are JSON texts of what may be called, by default those of the conversation's `meta`. Raises UserError
    when the template refuses the roles.
    """
    parts = _Parts(tokenizer, messages, tools)
    frame = parts.frame(len(parts.turns), add_generation_prompt=False)
    last = max((i for i, turn in enumerate(parts.turns) if turn.role == "assistant"), default=0)
    weights = [0.0 if last_only and i < last else weight for i, weight in enumerate(parts.weights)]
    writer = _Writer(tokenizer)
    for position, control, slots in _messages_of(frame):
        if not slots or slots[0].message == TOOLS or parts.turns[slots[0].message].role != "assistant":
            writer.others(control, [slot.fill(parts.text(slot)) for slot in slots], frame.control[position + 1 :])
            continue
        message = slots[0].message
        head = _head_as_served(parts, frame, position, message)
        weight = 0.0 if head is None else weights[message]
        writer.control(control if head is None else control[: len(head)])
        own = "" if head is None else control[len(head) :]
        writer.answer(own, [s.fill(parts.text(s)) for s in slots], frame.control[position + 1 :], weight=weight)
    return writer.done()


def render_prompt(tokenizer: Tokenizer, messages: Messages, *, tools: Sequence[str] = ()) -> list[int]:
    """Return the ids of a conversation up to and including the header of the assistant's next turn.

    For any conversation, `render(...).input_ids` starts with the prompt of the messages before its trained turn.
    """
    parts = _Parts(tokenizer, messages, tools)
    frame = parts.frame(len(parts.turns), add_generation_prompt=True)
    writer = _Writer(tokenizer)
    for position, control, slots in _messages_of(frame):
        texts, between = [slot.fill(parts.text(slot)) for slot in slots], frame.control[position + 1 :]
        if not slots or slots[0].message == TOOLS or parts.turns[slots[0].message].role != "assistant":
            writer.others(control, texts, between)
        else:
            head = _head_as_served(parts, frame, position, slots[0].message) or control
            writer.control(head)
            writer.answer(control[len(head) :], texts, between, weight=0.0)
    return writer.done().input_ids


def _messages_of(frame: Skeleton) -> Iterator[tuple[int, str, list[Slot]]]:
    """Yield the number of each message's first slot, the control text before it and the message's slots.

    What stands after the last message comes with no slots.
    """
    position = 0
    for _, found in itertools.groupby(frame.slots, key=lambda slot: slot.message):
        slots = list(found)
        yield position, frame.control[position], slots
        position += len(slots)
    yield position, frame.control[position], []


def _head_as_served(parts: _Parts, frame: Skeleton, position: int, message: int) -> str | None:
    """Return the control text before an assistant's turn up to where generation would start, None where it would not.

    That is all of the text before a content; a call of a tool comes with text that the model has to write itself.
    """
    if not message:
        return None
    served, control = parts.frame(message, add_generation_prompt=True), frame.control[position]
    head = served.control[-1]
    before = served.control[:-1] == frame.control[:position] and served.slots == frame.slots[:position]
    starts = control.startswith(head) if parts.turns[message].calls else control == head
    return head if before and starts else None


class _Parts:
    """A conversation taken apart: the shape, the weight and the pieces of each message."""

    def __init__(self, tokenizer: Tokenizer, messages: Messages, tools: Sequence[str]) -> None:
        """Raise UserError for a message that lacks role or content."""
        self._tokenizer = tokenizer
        own = messages.meta.get("tools") if isinstance(messages, Conversation) else None
        self._tools = list(tools or _as_json(own))
        # A template that knows no tools at all cannot show them; calls are then part of what the assistant says.
        if "tools" not in tokenizer.template:
            self._tools = []
        items = messages.messages if isinstance(messages, Conversation) else messages
        self.turns: list[Turn] = []
        self.weights: list[float] = []
        self._pieces: list[list[str]] = []
        for item in items:
            message = item if isinstance(item, Message) else _message(item)
            calls, content = message.tool_calls, message.content
            if calls and "tool_calls" not in tokenizer.template:
                content, calls = "\n".join([*([content] if content else []), *map(_spelled, calls)]), ()
            says = bool(content) or not calls
            self.turns.append(Turn(message.role, says, len(calls)))
            self.weights.append(message.weight)
            self._pieces.append([content, *(text for call in calls for text in (call.name, call.arguments))])
        if not self.turns:
            raise UserError("a conversation needs at least one message")

    def frame(self, num_messages: int, *, add_generation_prompt: bool) -> Skeleton:
        """Return what the template puts around the first so many messages."""
        tokens = tuple(self._tokenizer.tokens.items())
        turns = tuple(self.turns[:num_messages])
        return skeleton(self._tokenizer.template, turns, add_generation_prompt, tokens, len(self._tools))

    def text(self, slot: Slot) -> str:
        """Return the piece that belongs into a slot."""
        return self._tools[slot.part] if slot.message == TOOLS else self._pieces[slot.message][slot.part]


class _Writer:
    """Collects ids: plain words of the template and contents wait in `_text`, to be encoded together."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._weights: list[float] = []
        self._text = ""
        self._ending = 0.0
        """The weight of what belongs to the end of a trained turn: up to and including the next special token."""
        self._called = False
        """Whether that turn calls a tool; special tokens may then close the call before one ends the turn."""

    def control(self, text: str) -> None:
        """Add a template's text, in which special tokens count."""
        parts = self._tokenizer.split_control(text)
        end = self._tokenizer.end_id if self._called and self._tokenizer.end_id in parts else None
        for part in parts:
            if isinstance(part, str):
                self._text += part
            else:
                self._flush(self._ending)
                self._put([part], self._ending)
                self._ending = self._ending if end not in (None, part) else 0.0
                end = None if end == part else end
        self._called = False

    def others(self, head: str, texts: Sequence[str], between: Sequence[str]) -> None:
        """Add what somebody else than the assistant said, after its header: never trained."""
        self.control(head)
        for number, text in enumerate(texts):
            if number:
                self.control(between[number - 1])
            self._ending = 0.0
            self._text += text

    def answer(self, own: str, texts: Sequence[str], between: Sequence[str], *, weight: float) -> None:
        """Add what the assistant said, encoded on its own, with what the template writes before and between."""
        self._flush(self._ending)
        for number, text in enumerate(texts):
            for part in self._tokenizer.split_control(between[number - 1] if number else own):
                if isinstance(part, str):
                    self._text += part
                else:
                    self._flush(weight)
                    self._put([part], weight)
            self._text += text
        self._flush(weight)
        self._ending, self._called = weight, len(texts) > 1 or bool(own)

    def done(self) -> Rendered:
        """Return everything."""
        # Words after the last special token (a new line, say) end no turn.
        self._flush(0.0)
        return Rendered(input_ids=self._ids, trained=[w > 0 for w in self._weights], weights=self._weights)

    def _flush(self, weight: float) -> None:
        if self._text:
            self._put(self._tokenizer.encode(self._text, inner=bool(self._ids)), weight)
            self._text = ""

    def _put(self, ids: list[int], weight: float) -> None:
        self._ids += ids
        self._weights += [weight] * len(ids)


def _message(item: Mapping[str, Any]) -> Message:
    """Return a message from its JSON. Raises UserError where it lacks role or content."""
    role, content = item.get("role"), item.get("content")
    try:
        calls = to_tool_calls(item["tool_calls"]) if item.get("tool_calls") else ()
    except ValueError as error:
        raise UserError(str(error)) from None
    content = "" if content is None and calls else content
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(
            f"a message needs a role and a content, both text; got role {role!r} and {type(content).__name__}"
        )
    return Message(role=role, content=content, tool_calls=calls)  # type: ignore[arg-type]  # the template judges roles


def _as_json(tools: Any) -> list[str]:
    return [json.dumps(tool, ensure_ascii=False) for tool in tools or () if isinstance(tool, Mapping)]


def _spelled(call: ToolCall) -> str:
    """Return a call as our own template writes it."""
    return f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>'
