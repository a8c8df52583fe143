"""Chat templates: from roles to the control text that stands around each message's content.

A template is Jinja, as Hugging Face stores it. It is rendered **once per sequence of roles**, with a mark in place of
every content; what lies between the marks is control text, to be encoded with special tokens recognised, while the
contents are encoded as ordinary text. So nothing that a user types can become a control token, whatever the template.
Names and arguments of tool calls and descriptions of tools are contents too: whatever of them a template turns into
JSON stands as a mark.

A template's clock (`strftime_now`) is left out on purpose: a prompt must not change from one day to the next.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trivium.config import UserError

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ '<|system|>Tools:' }}"
    "{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{{ '<|end|>' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{% set called = call['function'] or call %}"
    "{{ '\\n' if message['content'] or not loop.first else '' }}"
    "{{ '<tool_call>\\n{\"name\": \"' + called['name'] + '\", \"arguments\": ' }}"
    "{{ called['arguments'] if called['arguments'] is string else called['arguments'] | tojson }}"
    "{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|end|>' }}{% endgeneration %}"
    "{% elif message['role'] in ['user', 'system', 'tool'] %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Trivium's own template; it needs the eight special tokens of `data.tokenizer`.

Tool calls are ordinary text in the form that Hermes and Qwen use, so that other servers can read them out.
"""

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For a foreign tokenizer without a template that has `<|im_start|>` and `<|im_end|>` (Qwen's base models)."""

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize + ':\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""For any other foreign tokenizer without a template: headers in ordinary words, the tokenizer's own eos ends a turn.

New control tokens would need new rows in the model's embedding, so none are made up.
"""

_MARK = re.compile("\ue000([0-9]+)(?::([0-9]+))?\ue001")
_AS_JSON = re.compile(r'\{\s*"(\ue000[0-9]+\ue001)": "\1"\s*\}')
_PROBE = "\u2003"
"""White space that no template writes itself: where it vanishes, the template strips the content on that side."""

TOOLS = -1
"""The `message` of a slot that holds the description of a tool."""


class Turn(NamedTuple):
    """The shape of a message: its role, whether it has a content of its own, and how many tool calls."""

    role: str
    says: bool = True
    calls: int = 0


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a piece of a message goes, and whether the template strips it on the left and on the right.

    `part` 0 is the content of message number `message`, 2k - 1 and 2k are name and arguments of its k-th tool call; of
    TOOLS, part k is the k-th tool. JSON that the template wants indented says by how many spaces.
    """

    message: int
    lstrip: bool
    rstrip: bool
    part: int = 0
    indent: int = 0

    def fill(self, content: str) -> str:
        """Return the content as the template would put it here."""
        content = content.lstrip() if self.lstrip else content
        content = content.rstrip() if self.rstrip else content
        return _to_json(json.loads(content), self.indent) if self.indent else content


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A rendered template without its contents: `control[i]` stands before `slots[i]`, the last one at the end."""

    control: tuple[str, ...]
    slots: tuple[Slot, ...]


@functools.lru_cache(maxsize=4096)
def skeleton(
    template: str,
    turns: tuple[str | Turn, ...],
    add_generation_prompt: bool,
    tokens: tuple[tuple[str, str], ...],
    num_tools: int = 0,
) -> Skeleton:
    """Return the control text that `template` puts around the pieces of messages of these shapes (a role is one).

    `tokens` are the special tokens by name (`bos_token`, ...). Raises UserError when the template is broken, refuses
    the roles, or has no place for a message, a tool call or a tool.
    """
    shapes = [turn if isinstance(turn, Turn) else Turn(turn) for turn in turns]
    places = [(TOOLS, part) for part in range(num_tools)]
    for message, turn in enumerate(shapes):
        places += [(message, 0)] if turn.says else []
        places += [(message, part) for part in range(1, 2 * turn.calls + 1)]
    plain = _render(template, shapes, places, "", add_generation_prompt, dict(tokens))
    probed = _render(template, shapes, places, _PROBE, add_generation_prompt, dict(tokens))
    pieces, probes = _MARK.split(plain), _MARK.split(probed)
    missing = set(range(len(places))) - {int(i) for i in pieces[1::3]}
    if missing:
        message, part = places[min(missing)]
        what = "tools" if message == TOOLS else "tool calls" if part else f"a message of role {shapes[message].role!r}"
        raise UserError(f"the chat template leaves out {what}; choose another template")
    slots = tuple(
        Slot(
            *places[int(index)][:1],
            lstrip=not before.endswith(_PROBE),
            rstrip=not after.startswith(_PROBE),
            part=places[int(index)][1],
            indent=int(indent or 0),
        )
        for index, indent, before, after in zip(pieces[1::3], pieces[2::3], probes[:-1:3], probes[3::3], strict=True)
    )
    return Skeleton(control=tuple(pieces[0::3]), slots=slots)


def _render(
    template: str,
    turns: Sequence[Turn],
    places: Sequence[tuple[int, int]],
    probe: str,
    add_generation_prompt: bool,
    tokens: Mapping[str, str],
) -> str:
    """Return the template rendered with a mark for each place, contents between two probes."""
    marks = {place: f"\ue000{number}\ue001" for number, place in enumerate(places)}
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        content = f"{probe}{marks[number, 0]}{probe}" if turn.says else ""
        messages.append({"role": turn.role, "content": content})
        calls = [(marks[number, 2 * k - 1], marks[number, 2 * k]) for k in range(1, turn.calls + 1)]
        if calls:
            functions = [{"name": name, "arguments": {mark: mark}} for name, mark in calls]
            messages[-1]["tool_calls"] = [{"type": "function", "function": each} for each in functions]
    tools: list[dict[str, str]] = [{mark: mark} for (message, _), mark in marks.items() if message == TOOLS]
    try:
        # Thinking is off on both sides, training and serving, so that both see the same prompt (Qwen3's templates).
        return _compile(template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
            tools=tools or None,
            documents=None,
            **tokens,
        )
    except (jinja2.TemplateError, TypeError) as error:
        roles = ", ".join(turn.role for turn in turns)
        raise UserError(f"the chat template refuses messages of roles {roles}: {error}") from None


@functools.lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _to_json
    return environment.from_string(template)


class _Generation(Extension):
    """Accepts `{% generation %}...{% endgeneration %}` and renders what it encloses."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the enclosed nodes as they are."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON without the HTML escapes of Jinja's own filter, which a model would have to learn.

    An object that stands for another (`{mark: mark}`) becomes the mark alone, with the indent it asks for.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _AS_JSON.sub(lambda found: found[1][:-1] + (f":{indent}" if indent else "") + "\ue001", text)
