"""The nouns on disk: what passes between stages, people and pages.

Frozen, slotted, keyword-only dataclasses; ids are content hashes, so equal things are equal everywhere.
Standard library only, so that anything (a page, a script, a test) can read a run without torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tempfile
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

ID_LENGTH = 20
"""Hex digits kept of a content hash: 80 bits, so a collision among a billion items has odds below 1e-6."""

AnnotatorKind = Literal["human", "ai", "simulated"]
Role = Literal["system", "user", "assistant", "tool"]


_FUNCTION = re.compile(r"[\w.-]+")


def content_id(*parts: object) -> str:
    """Return the first ID_LENGTH hex digits of SHA-256 over the canonical JSON of `parts`."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # Lone surrogates can reach us from user files; they must hash, not crash.
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:ID_LENGTH]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One piece of raw or cleaned text, where it came from, and under which licence."""

    text: str
    source: str = ""
    license: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The hash of the text alone: the same text from two places is the same document."""
        return content_id("document", self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function that the assistant asks for; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation.

    `weight` is what the turn counts for where it is trained, 0 for not at all; only an assistant's ever is.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages in order. A *prompt* is a Conversation that ends in a user message.

    `meta` carries columns for rewards and checks (for instance the expected answer); it is not part of the id.
    """

    messages: tuple[Message, ...]
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The hash of the roles and contents, tool calls included."""
        said = [[m.role, m.content, *([c.name, c.arguments] for c in m.tool_calls)] for m in self.messages]
        return content_id("conversation", said)

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the messages in the schema that everybody uses: `[{"role", "content"}]`, and `tool_calls` if any."""
        return [{"role": m.role, "content": m.content} | _calls_as_dicts(m) for m in self.messages]


def _calls_as_dicts(message: Message) -> dict[str, Any]:
    found = [{"name": c.name, "arguments": json.loads(c.arguments)} for c in message.tool_calls]
    return {"tool_calls": [{"type": "function", "function": each} for each in found]} if found else {}


def to_tool_calls(value: Any) -> tuple[ToolCall, ...]:
    """Return the calls of a message's `tool_calls`: `[{"type": "function", "function": {"name", "arguments"}}]`.

    The inner object alone will do, and arguments may be an object or, as from OpenAI, the text of one.
    Raises ValueError.
    """
    calls = []
    for item in value if isinstance(value, list | tuple) else [value]:
        function = item.get("function", item) if isinstance(item, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not _FUNCTION.fullmatch(name):
            raise ValueError(f"a tool call needs the name of a function (letters, digits, '_', '-', '.'), not {name!r}")
        arguments = function.get("arguments") or {}
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, Mapping) else ""
        except (ValueError, TypeError):
            text = ""
        if not text:
            raise ValueError(f"the arguments of the tool call {name} must be a JSON object")
        calls.append(ToolCall(name=name, arguments=text))
    return tuple(calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One response of a policy (`"run_id@step"`) to a prompt, as it was sampled.

    `token_ids` and `logprobs` (nats, of the sampling distribution) are the currency between generator, scorer
    and trainer; `text` is for display and for judges.
    """

    prompt_id: str
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    policy: str = ""
    finish_reason: Literal["stop", "length", ""] = ""

    @property
    def id(self) -> str:
        """The hash of prompt, text and policy: sampling the same text twice gives one completion."""
        return content_id("completion", self.prompt_id, self.text, self.policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """A judgement as it was given: the stored truth, from which every Comparison is derived.

    `groups` holds completion ids, best first; a tie shares a group. `order_shown` is the order on the screen. `soft`
    holds (first, second, probability that the first is better) of pairs whose judge said how sure it was; `groups` then
    holds what both orders of asking agreed on.
    """

    prompt_id: str
    groups: tuple[tuple[str, ...], ...]
    annotator: str
    kind: AnnotatorKind
    none_acceptable: bool = False
    rationale: str = ""
    seconds: float = 0.0
    order_shown: tuple[str, ...] = ()
    soft: tuple[tuple[str, str, float], ...] = ()

    @property
    def id(self) -> str:
        """The hash of who said what about which prompt."""
        said = (self.prompt_id, self.groups, self.annotator, self.kind, self.none_acceptable)
        # Only where there are soft labels, so that the ids of all other rankings stay what they were.
        return content_id("ranking", *said, *((self.soft,) if self.soft else ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A pair derived from a Ranking: `chosen` was placed above `rejected`."""

    prompt: Conversation
    chosen: Completion
    rejected: Completion
    ranking_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """The ideal response to a prompt, which a person wrote or edited."""

    prompt: Conversation
    response: str
    annotator: str

    @property
    def id(self) -> str:
        """The hash of the prompt, the response and who wrote it."""
        return content_id("demonstration", self.prompt.id, self.response, self.annotator)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled completion with what reinforcement learning made of it."""

    prompt: Conversation
    completion: Completion
    reward: float
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    group: str = ""
    advantage: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """One measured figure: `task` is `name@version`; `low` and `high` bound the 95% interval; `n` items."""

    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    seed: int = 0
    checkpoint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of a run's log: a metric's value at a step, a sample of text, or a notice of something unusual."""

    run_id: str
    step: int
    time: float
    kind: Literal["metric", "sample", "notice", "specimen"]
    name: str
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A file that a run leaves behind, by its path inside the run's folder."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a run used: tokens processed, floating-point operations, seconds, peak memory, energy where readable."""

    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    energy_joules: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunManifest:
    """Everything needed to say what a run was, what it came from and what it left.

    `parents` maps a Config field to the run id (or the folder) that it resolved to; `inputs` maps input files to
    their SHA-256. `fingerprint` covers stage, config, parents, inputs, seed and version: equal fingerprints mean
    that running again would give the same artifacts.
    """

    run_id: str
    stage: str
    table: str
    status: Literal["running", "stopped", "waiting", "done", "failed"]
    fingerprint: str
    config: Mapping[str, Any]
    parents: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    artifacts: tuple[Artifact, ...] = ()
    results: tuple[EvalResult, ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    code: Mapping[str, Any] = field(default_factory=dict)
    host: Mapping[str, Any] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    started_at: str = ""
    finished_at: str = ""
    message: str = ""


R = TypeVar("R")


def to_dict(record: object) -> dict[str, Any]:
    """Return the record as plain JSON-able data."""
    return dataclasses.asdict(record)  # type: ignore[call-overload,no-any-return]


def from_dict(cls: type[R], data: Mapping[str, Any]) -> R:
    """Return a record of type `cls` from plain data, nested records and tuples included.

    Raises ValueError for a missing or an unknown field, naming it.
    """
    hints = typing.get_type_hints(cls)
    unknown = set(data) - set(hints)
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {sorted(unknown)[0]!r}")
    try:
        return cls(**{name: _revive(hints[name], value) for name, value in data.items()})
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from error


def _revive(hint: Any, value: Any) -> Any:
    """Turn JSON lists and objects back into the tuples and records that `hint` asks for."""
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_revive(typing.get_args(hint)[0], item) for item in value)
    if origin is types.UnionType and value is not None:
        return _revive(next(a for a in typing.get_args(hint) if a is not type(None)), value)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value)
    return value


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file so that its final name only ever holds the whole content, also after a power cut.

    Raises OSError (a full disk, say) with the old content untouched and no temporary file left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSON Lines atomically and return how many there were."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    atomic_write(path, "".join(line + "\n" for line in lines))
    return len(lines)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON Lines file that Trivium wrote (users' files go through `data.sources`).

    A last line without its newline is what a killed writer leaves: it is passed over.
    """
    with path.open(encoding="utf-8", errors="surrogatepass") as handle:
        for line in handle:
            if line.endswith("\n"):
                yield json.loads(line)
