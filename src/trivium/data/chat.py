"""Conversations as ids, the one way for training, preferences, rollouts, evaluation and serving.

    <|bos|> <|user|> hi <|end|> <|assistant|> yo <|end|>
    trained:  0     0    0   0       0         1    1

Special tokens come from the template alone: contents, and the template's plain words around them, are encoded as
ordinary text, so no special token typed by a user takes effect. An assistant's content is encoded on its own, because
generation starts there; only where a merge would have crossed that border do ids differ from `apply_chat_template`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trivium.config import UserError
from trivium.data.templates import CHAT_TEMPLATE, Skeleton, skeleton
from trivium.data.tokenizer import Tokenizer
from trivium.records import Conversation, Message

__all__ = ["CHAT_TEMPLATE", "Rendered", "render", "render_prompt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation's ids; `trained[i]` says that token i is an assistant's content or the end of its turn."""

    input_ids: list[int]
    trained: list[bool]


def render(tokenizer: Tokenizer, messages: Conversation | Sequence[Message | Mapping[str, str]]) -> Rendered:
    """Return the ids of a whole conversation, with the assistant's turns and their terminators marked as trained.

    An assistant turn is trained only where what stands before it equals what a server would have sent at that point
    (some foreign templates rewrite earlier turns). Raises UserError when the template refuses the roles.
    """
    roles, contents = _split(messages)
    frame = _skeleton(tokenizer, roles, add_generation_prompt=False)
    writer = _Writer(tokenizer)
    for position, control in enumerate(frame.control):
        writer.control(control)
        if position < len(frame.slots):
            slot = frame.slots[position]
            text = slot.fill(contents[slot.message])
            if roles[slot.message] == "assistant":
                writer.answer(text, trained=_as_served(tokenizer, roles[: slot.message], frame, position))
            else:
                writer.content(text)
    return writer.done()


def render_prompt(tokenizer: Tokenizer, messages: Conversation | Sequence[Message | Mapping[str, str]]) -> list[int]:
    """Return the ids of a conversation up to and including the header of the assistant's next turn.

    For any conversation, `render(...).input_ids` starts with the prompt of the messages before its trained turn.
    """
    roles, contents = _split(messages)
    frame = _skeleton(tokenizer, roles, add_generation_prompt=True)
    writer = _Writer(tokenizer)
    writer.control(frame.control[0])
    for slot, control in zip(frame.slots, frame.control[1:], strict=True):
        text = slot.fill(contents[slot.message])
        if roles[slot.message] == "assistant":
            writer.answer(text, trained=False)
        else:
            writer.content(text)
        writer.control(control)
    return writer.done().input_ids


class _Writer:
    """Collects ids: plain words of the template and contents wait in `_text`, to be encoded together."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._trained: list[bool] = []
        self._text = ""
        self._ending = False
        """Whether what comes belongs to the end of a trained turn: up to and including the next special token."""

    def control(self, text: str) -> None:
        """Add a template's text, in which special tokens count."""
        for part in self._tokenizer.split_control(text):
            if isinstance(part, str):
                self._text += part
            else:
                self._flush(self._ending)
                self._put([part], self._ending)
                self._ending = False

    def content(self, text: str) -> None:
        """Add what somebody else than the assistant said: never trained."""
        self._ending = False
        self._text += text

    def answer(self, text: str, *, trained: bool) -> None:
        """Add what the assistant said."""
        self._flush(self._ending)
        self._text = text
        self._flush(trained)
        self._ending = trained

    def done(self) -> Rendered:
        """Return everything."""
        # Words after the last special token (a new line, say) end no turn.
        self._flush(False)
        return Rendered(input_ids=self._ids, trained=self._trained)

    def _flush(self, trained: bool) -> None:
        if self._text:
            self._put(self._tokenizer.encode(self._text, inner=bool(self._ids)), trained)
            self._text = ""

    def _put(self, ids: list[int], trained: bool) -> None:
        self._ids += ids
        self._trained += [trained] * len(ids)


def _split(messages: Conversation | Sequence[Message | Mapping[str, str]]) -> tuple[tuple[str, ...], list[str]]:
    """Return roles and contents. Raises UserError for a message that lacks one of them."""
    items = messages.messages if isinstance(messages, Conversation) else messages
    roles, contents = [], []
    for item in items:
        role, content = (
            (item.role, item.content) if isinstance(item, Message) else (item.get("role"), item.get("content"))
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f"a message needs a role and a content, both text; got role {role!r} and {type(content).__name__}"
            )
        roles.append(role)
        contents.append(content)
    if not roles:
        raise UserError("a conversation needs at least one message")
    return tuple(roles), contents


def _skeleton(tokenizer: Tokenizer, roles: tuple[str, ...], *, add_generation_prompt: bool) -> Skeleton:
    return skeleton(tokenizer.template, roles, add_generation_prompt, tuple(tokenizer.tokens.items()))


def _as_served(tokenizer: Tokenizer, before: tuple[str, ...], frame: Skeleton, position: int) -> bool:
    """Tell whether the frame before a turn is the prompt that generation would start from."""
    if not before:
        return False
    served = _skeleton(tokenizer, before, add_generation_prompt=True)
    return served.control == frame.control[: position + 1] and served.slots == frame.slots[:position]
