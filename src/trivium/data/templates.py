"""Chat templates: from roles to the control text that stands around each message's content.

A template is Jinja, as Hugging Face stores it. It is rendered **once per sequence of roles**, with a mark in place of
every content; what lies between the marks is control text, to be encoded with special tokens recognised, while the
contents are encoded as ordinary text. So nothing that a user types can become a control token, whatever the template.

A template's clock (`strftime_now`) is left out on purpose: a prompt must not change from one day to the next.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trivium.config import UserError

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% elif message['role'] in ['user', 'system', 'tool'] %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Trivium's own template; it needs the eight special tokens of `data.tokenizer`."""

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

_MARK = re.compile("\ue000([0-9]+)\ue001")
_PROBE = "\u2003"
"""White space that no template writes itself: where it vanishes, the template strips the content on that side."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one message's content goes, and whether the template strips it on the left and on the right."""

    message: int
    lstrip: bool
    rstrip: bool

    def fill(self, content: str) -> str:
        """Return the content as the template would put it here."""
        content = content.lstrip() if self.lstrip else content
        return content.rstrip() if self.rstrip else content


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A rendered template without its contents: `control[i]` stands before `slots[i]`, the last one at the end."""

    control: tuple[str, ...]
    slots: tuple[Slot, ...]


@functools.lru_cache(maxsize=4096)
def skeleton(
    template: str, roles: tuple[str, ...], add_generation_prompt: bool, tokens: tuple[tuple[str, str], ...]
) -> Skeleton:
    """Return the control text that `template` puts around contents of messages with these roles.

    `tokens` are the special tokens by name (`bos_token`, ...). Raises UserError when the template is broken, refuses
    the roles, or has no place for a message.
    """
    marks = [f"\ue000{i}\ue001" for i in range(len(roles))]
    plain = _render(template, roles, marks, add_generation_prompt, dict(tokens))
    probed = _render(template, roles, [_PROBE + m + _PROBE for m in marks], add_generation_prompt, dict(tokens))
    pieces, probes = _MARK.split(plain), _MARK.split(probed)
    missing = set(range(len(roles))) - {int(i) for i in pieces[1::2]}
    if missing:
        raise UserError(
            f"the chat template leaves out a message of role {roles[min(missing)]!r}; choose another template"
        )
    slots = tuple(
        Slot(int(index), lstrip=not before.endswith(_PROBE), rstrip=not after.startswith(_PROBE))
        for index, before, after in zip(pieces[1::2], probes[:-1:2], probes[2::2], strict=True)
    )
    return Skeleton(control=tuple(pieces[0::2]), slots=slots)


def _render(
    template: str, roles: Sequence[str], contents: Sequence[str], add_generation_prompt: bool, tokens: Mapping[str, str]
) -> str:
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    try:
        # Thinking is off on both sides, training and serving, so that both see the same prompt (Qwen3's templates).
        return _compile(template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
            tools=None,
            documents=None,
            **tokens,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise UserError(f"the chat template refuses messages of roles {', '.join(roles)}: {error}") from None


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
    """Return JSON without the HTML escapes of Jinja's own filter, which a model would have to learn."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
