"""Talking to a model in the terminal: answers appear word by word; `/reset`, `/model NAME` and `/quit` are commands.

When the input is no terminal (a pipe, a file), each line is a message and each answer is printed below the one before.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from trivium.config import UserError
from trivium.data.chat import render_prompt
from trivium.data.tokenizer import Tokenizer
from trivium.models.generate import stream
from trivium.models.hf import load_model, read_stop_ids
from trivium.models.transformer import Transformer
from trivium.runs.manifest import is_base, read_manifest
from trivium.runs.registry import latest_runs, model_folder

HELP = "/reset starts over, /model NAME talks to another model, /quit ends (or Ctrl-D); Ctrl-C stops an answer"

CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")
"""What a terminal would obey instead of showing it: a model's answer must not move the cursor."""


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A loaded model; a `base` one was never taught to converse: it goes on writing what is typed."""

    reference: str
    model: Transformer
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    base: bool

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the ids that the answer follows."""
        if not self.base:
            return render_prompt(self.tokenizer, messages)
        return [*self.tokenizer.prefix, *self.tokenizer.encode(messages[-1]["content"])]


def load_voice(workspace: Path, reference: str) -> Voice:
    """Return the model that `reference` names; raises UserError when there is none."""
    folder = model_folder(workspace, reference)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        model = load_model(folder, device=device, dtype=dtype)
        stop_ids = read_stop_ids(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{reference}: cannot talk to {folder}: {error}") from None
    tokenizer = Tokenizer.load(folder)
    manifest = read_manifest(folder.parent)
    return Voice(
        reference=reference,
        model=model.eval(),
        tokenizer=tokenizer,
        stop_ids=stop_ids | tokenizer.stop_ids,
        base=is_base(manifest),
    )


def chat(
    workspace: Path,
    model: str = "ppo@latest",
    *,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_tokens: int = 256,
    system: str = "",
    seed: int = 0,
    lines: TextIO | None = None,
) -> None:
    """Hold a conversation on the terminal until `/quit` or the end of the input (`lines`, by default stdin).

    With a seed, the same lines get the same answers. Raises UserError when `model` names none.
    """
    lines = lines or sys.stdin
    session = Session(workspace, load_voice(workspace, model), temperature, top_p, max_tokens, system, seed)
    if lines.isatty():
        print(f"{model}{' (a base model: it goes on writing what you type)' if session.voice.base else ''}. {HELP}")
    for line in _read(lines):
        text = line.strip()
        try:
            if text == "/quit":
                break
            if text.startswith("/"):
                session.command(text)
            elif text:
                session.answer(text)
        except UserError as error:
            print(error, flush=True)


class Session:
    """One conversation: what was said so far, and with whom."""

    def __init__(
        self, workspace: Path, voice: Voice, temperature: float, top_p: float, max_tokens: int, system: str, seed: int
    ) -> None:
        """Begin with nothing said but the system message, if any."""
        self.workspace, self.voice = workspace, voice
        self.temperature, self.top_p, self.max_tokens, self.seed = temperature, top_p, max_tokens, seed
        self.system = system
        self.turn = 0
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def command(self, text: str) -> None:
        """Carry out a line that begins with a slash. Raises UserError when the model it names is not there."""
        name, _, rest = text.partition(" ")
        if name == "/reset":
            self.reset()
            print("(a new conversation)", flush=True)
        elif name == "/model" and rest.strip():
            reference = rest.strip()
            # `/model dpo` is what people type; the newest finished run is what they mean.
            if reference in latest_runs(self.workspace):
                reference += "@latest"
            self.voice = load_voice(self.workspace, reference)
            self.reset()
            print(f"(now talking to {reference})", flush=True)
        elif name == "/model":
            print(f"(talking to {self.voice.reference}; there are: {', '.join(sorted(latest_runs(self.workspace)))})")
        else:
            print(HELP, flush=True)

    def answer(self, text: str) -> None:
        """Print the model's answer as it comes and remember it; Ctrl-C ends it early."""
        said = [*self.messages, {"role": "user", "content": text}]
        prompt = self.voice.prompt(said)
        context = self.voice.model.config.max_position_embeddings
        if len(prompt) >= context:
            raise UserError(f"(the conversation fills the model's {context} tokens; /reset starts over)")
        self.turn += 1
        tokens = stream(
            self.voice.model,
            prompt,
            max_new_tokens=min(self.max_tokens, context - len(prompt)),
            temperature=self.temperature,
            top_p=self.top_p,
            stop_ids=self.voice.stop_ids,
            seed=[self.seed, self.turn],
        )
        answer = ""
        try:
            for piece in _text(tokens, self.voice.tokenizer.decode, self.voice.stop_ids):
                answer += piece
                print(piece.translate(CONTROL), end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print(flush=True)
        self.messages = [*said, {"role": "assistant", "content": answer.strip()}]


def _text(
    tokens: Iterator[tuple[int, float]], decode: Callable[[list[int]], str], stop_ids: frozenset[int]
) -> Iterator[str]:
    """Yield the text of tokens as it becomes certain: half a character waits for its other half."""
    ids: list[int] = []
    shown = ""
    for token, _ in tokens:
        if token in stop_ids:
            break
        ids.append(token)
        whole = decode(ids).removesuffix("\ufffd")
        yield whole[len(shown) :]
        shown = whole
    yield decode(ids)[len(shown) :]


def _read(lines: TextIO) -> Iterator[str]:
    """Yield the lines of the input, with a prompt on a terminal; ends at Ctrl-D, and at Ctrl-C between answers."""
    with contextlib.suppress(KeyboardInterrupt, EOFError):
        while True:
            # `input` brings line editing, which only a terminal can use.
            line = input("> ") + "\n" if lines.isatty() else lines.readline()
            if not line:
                return
            yield line
    print(flush=True)
