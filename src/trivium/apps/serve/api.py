"""What goes over the wire: OpenAI's requests, answers, chunks and errors. The only place that knows pydantic."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Listed = tuple[tuple[str, float], Sequence[tuple[str, float]]]
"""A token of an answer and the likeliest ones in its place, each as (text, nats)."""

MAX_MESSAGES = 1000
"""Messages of one conversation: rendering is linear in them, and no context holds more."""


class ApiError(Exception):
    """A request that cannot be answered, with what OpenAI's clients expect to be told."""

    def __init__(self, status: int, message: str, *, code: str = "", param: str = "", retry_after_s: int = 0) -> None:
        """Take the HTTP status, one sentence, OpenAI's code, the parameter at fault and when to come back."""
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {"Retry-After": str(retry_after_s)} if retry_after_s else {}

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param or None, "code": self.code or None}}


Stop = Annotated[str, Field(min_length=1, max_length=200)]


class TextPart(BaseModel):
    """A part of a message's content; only text is understood."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message; content is text, or a list of text parts, or nothing beside `tool_calls`."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def says_something(self) -> ChatMessage:
        """Refuse a message without content, unless it calls a tool."""
        if self.content is None and not (self.tool_calls and self.role == "assistant"):
            raise ValueError("content is missing")
        return self

    def plain(self) -> dict[str, Any]:
        """Return role, content and calls as the chat template takes them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        calls = {"tool_calls": self.tool_calls} if self.tool_calls else {}
        return {"role": "system" if self.role == "developer" else self.role, "content": text} | calls


class StreamOptions(BaseModel):
    """What a stream carries beside its text."""

    include_usage: bool = False


class Sampling(BaseModel):
    """What both kinds of request share. Unknown fields are passed over, as OpenAI's clients send many."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def refuse_unsupported(self) -> None:
        """Raise ApiError for what would change the answer but is not done here: silence would be a wrong answer."""
        if self.n not in (None, 1):
            raise ApiError(400, "n must be 1: ask again for another answer", code="unsupported_value", param="n")
        extra = self.model_extra or {}
        for name, harmless in UNSUPPORTED.items():
            if extra.get(name) not in harmless:
                raise ApiError(
                    400, f"{name!r} is not supported by this server", code="unsupported_parameter", param=name
                )


UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
}
"""Fields that are refused unless they hold a value that asks for nothing."""


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    def refuse_unsupported(self) -> None:
        """Raise ApiError for what is not done here: log-probabilities in a stream, too, are told only at its end."""
        super().refuse_unsupported()
        if self.logprobs and self.stream:
            raise ApiError(
                400, "logprobs are not streamed here: leave one out", code="unsupported_value", param="stream"
            )
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs = true", code="invalid_value", param="top_logprobs")

    def wanted_logprobs(self) -> int | None:
        """Return how many likeliest tokens are to be listed for each token, None for no list at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    """POST /v1/completions; the prompt is one text (token ids are refused: they could spell control tokens)."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]

    def text(self) -> str:
        """Return the prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


def parse_chat(body: bytes) -> ChatRequest:
    """Return the request; raises ApiError 400 naming the field and what is wrong with it."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _bad_request(error) from None
    request.refuse_unsupported()
    if request.messages[-1].role == "assistant":
        raise ApiError(400, "the last message must not be the assistant's own", param="messages")
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """Return the request; raises ApiError 400 naming the field and what is wrong with it."""
    try:
        request = CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise _bad_request(error) from None
    request.refuse_unsupported()
    return request


def _bad_request(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # A field's place may repeat names of ours (unions); the first part is the name the client knows.
    param = str(first["loc"][0]) if first["loc"] else ""
    where = f"{param}: " if param else ""
    return ApiError(400, f"{where}{first['msg']}", code="invalid_value" if param else "invalid_json", param=param)


def _listed(own: tuple[str, float], top: Sequence[tuple[str, float]]) -> dict[str, Any]:
    return _token(*own) | {"top_logprobs": [_token(*other) for other in top]}


def _token(text: str, nats: float) -> dict[str, Any]:
    # -9999 is what OpenAI's clients know for "as good as never"; JSON has no minus infinity.
    return {"token": text, "logprob": max(nats, -9999.0), "bytes": list(text.encode("utf-8", "replace"))}


class Answer:
    """Builds the answer to one request, whole or in chunks."""

    def __init__(self, model: str, prompt_tokens: int, *, chat: bool) -> None:
        """Fix id and time, which all chunks share."""
        self.chat = chat
        self.prompt_tokens = prompt_tokens
        prefix, self.kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """Return the counts; the token that ended the answer is among them, as it was drawn like the others."""
        total = self.prompt_tokens + completion_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}

    def whole(
        self, text: str, reason: str, completion_tokens: int, listed: Sequence[Listed] | None = None
    ) -> dict[str, Any]:
        """Return the answer to a request that does not stream, with the tokens' log-probabilities where `listed`."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        told = None if listed is None else {"content": [_listed(*entry) for entry in listed], "refusal": None}
        choice = {"index": 0, **said, "logprobs": told, "finish_reason": reason}
        return {**self.head, "object": self.kind, "choices": [choice], "usage": self.usage(completion_tokens)}

    def chunk(self, text: str = "", reason: str | None = None, *, first: bool = False) -> dict[str, Any]:
        """Return one chunk of a stream."""
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {"content": text} if text else {}
        said = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return {**self.head, "object": self._chunk_kind, "choices": [choice]}

    def last(self, completion_tokens: int) -> dict[str, Any]:
        """Return the chunk that carries the usage."""
        return {**self.head, "object": self._chunk_kind, "choices": [], "usage": self.usage(completion_tokens)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else self.kind
