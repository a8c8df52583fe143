"""From a request to a prompt in ids that fits the model's context; what does not fit is refused before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trivium.apps.serve.api import ApiError
from trivium.apps.serve.engine import Served
from trivium.config import UserError
from trivium.data.chat import render_prompt

DEFAULT_MAX_TOKENS = 512
"""The longest answer when a request names no limit (less where the context leaves less)."""

BASE_STOP = "\nQuestion:"
"""Where a base model's answer ends: it would go on to make up the next question."""


def chat_prompt(served: Served, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Return the ids of a conversation up to the answer.

    A chat model gets its own template. A base model knows no turns: it gets plain text, `Question: … Answer:`, so that
    the difference which fine-tuning makes can be seen side by side.
    """
    said = (f"{m['content']}{m.get('tool_calls') or ''}" for m in messages)
    check_size(served, sum(len(text.encode("utf-8", "replace")) for text in said))
    if served.kind == "base":
        return completion_prompt(served, as_plain_text(messages))
    try:
        return render_prompt(served.tokenizer, messages)
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from None


def as_plain_text(messages: Sequence[dict[str, Any]]) -> str:
    """Return a conversation as text that a base model can continue with an answer."""
    heads = {"user": "Question: ", "assistant": "Answer: ", "system": "", "tool": ""}
    return "\n".join(heads[m["role"]] + m["content"].strip() for m in messages) + "\nAnswer:"


def completion_prompt(served: Served, text: str) -> list[int]:
    """Return the ids of a document that begins with `text`."""
    check_size(served, len(text.encode("utf-8", "replace")))
    ids = [*served.tokenizer.prefix, *served.tokenizer.encode(text)]
    # A model without BOS has learnt that a document follows the end of another.
    return ids or [served.tokenizer.eos_id]


def check_size(served: Served, num_bytes: int) -> None:
    """Refuse a text that cannot fit whatever its tokens are, before time is spent on tokenizing it."""
    if num_bytes > served.context * served.longest_piece:
        raise _too_long(f"the prompt of {num_bytes} bytes is longer than", served, param="messages")


def budget(served: Served, prompt: Sequence[int], max_tokens: int | None) -> int:
    """Return how many tokens the answer may have; raises ApiError 400 when prompt and answer do not fit."""
    room = served.context - len(prompt)
    wanted = 1 if max_tokens is None else max_tokens
    if wanted > room:
        raise _too_long(f"{len(prompt)} tokens of prompt and {wanted} of answer exceed", served, param="max_tokens")
    return min(room, DEFAULT_MAX_TOKENS) if max_tokens is None else max_tokens


def _too_long(what: str, served: Served, *, param: str) -> ApiError:
    message = f"{what} the context of {served.name!r}, {served.context} tokens"
    return ApiError(400, message, code="context_length_exceeded", param=param)
