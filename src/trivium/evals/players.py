"""Models as they are examined: what each is given to read, and what counts as its answer.

A chat model gets a question through its chat template. A base model has never seen one: it gets plain text that shows a
few answered questions first, and what it writes after its answer is cut off.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trivium.config import UserError
from trivium.data.chat import render_prompt
from trivium.data.tokenizer import Tokenizer
from trivium.evals.tasks import Item
from trivium.models.generate import Generated, generate
from trivium.models.hf import load_model
from trivium.models.transformer import Transformer
from trivium.records import Conversation
from trivium.runs.manifest import is_base, read_manifest

BATCH_ROWS = 128
_NEXT_QUESTION = re.compile(r"\s*\n\s*Question\b")


@dataclass(frozen=True, kw_only=True)
class Player:
    """A model as it is examined: a chat model speaks its template, a base model continues text."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    is_base: bool = False
    on_done: Callable[[int], object] | None = None
    """Called with the number of completions that have ended, as they do, for whoever shows progress."""

    def encode(self, prompt: Conversation, examples: Sequence[Item], max_new_tokens: int) -> list[int]:
        """Return the ids to continue; examples are for base models, and only as many as leave room for the answer."""
        if not self.is_base:
            return render_prompt(self.tokenizer, prompt)
        room = self.model.config.max_position_embeddings - max_new_tokens
        for count in range(len(examples), -1, -1):
            ids = [*self.tokenizer.prefix, *self.tokenizer.encode(few_shot(prompt, examples[:count]))]
            if len(ids) <= room:
                break
        return ids

    def write(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, seed: Sequence[int] = (0,)
    ) -> list[Generated]:
        """Return a continuation of each prompt's ids; a base model stops where it starts a question of its own.

        Raises UserError for a prompt that fills the context.
        """
        context = self.model.config.max_position_embeddings
        longest = max(map(len, prompts), default=0)
        if longest >= context:
            raise UserError(f"a prompt of {longest} tokens leaves no room in the context of {context} of {self.name}")
        tails: dict[int, list[int]] = {}

        def asks_again(row: int, token: int) -> bool:
            tail = tails.setdefault(row, [])
            tail.append(token)
            return _NEXT_QUESTION.search(self.tokenizer.decode(tail[-8:])) is not None

        return generate(
            self.model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            stop_ids=self.tokenizer.stop_ids, batch_size=BATCH_ROWS, on_token=asks_again if self.is_base else None,
            on_done=self.on_done,
        )  # fmt: skip

    def text_of(self, generated: Generated) -> str:
        """Return what the player answered, without special tokens and without a base model's next question."""
        text = self.tokenizer.decode(generated.token_ids)
        return _NEXT_QUESTION.split(text, maxsplit=1)[0].strip() if self.is_base else text


def few_shot(prompt: Conversation, examples: Sequence[Item]) -> str:
    """Return the plain text that a base model continues: answered questions, then the one to answer."""
    shown = [f"Question: {_question(item.prompt)}\nAnswer: {item.ideal}\n\n" for item in examples]
    return "".join(shown) + f"Question: {_question(prompt)}\nAnswer:"


def _question(prompt: Conversation) -> str:
    """Return all that was said, one turn a line."""
    return "\n".join(message.content for message in prompt.messages)


def table_of(folder: Path) -> str:
    """Return what a model is called: its run's table, or the name of a Hugging Face folder."""
    manifest = read_manifest(folder)
    return manifest.table if manifest else folder.name


def load_player(
    folder: Path, device: torch.device | str = "cpu", on_done: Callable[[int], object] | None = None
) -> Player:
    """Return the model of a run's folder, or of a Hugging Face folder; see `is_base` for which are base models."""
    files = folder if (folder / "config.json").is_file() else folder / "model"
    manifest = read_manifest(folder)
    return Player(
        name=table_of(folder),
        model=load_model(files, device=device).requires_grad_(False).eval(),
        tokenizer=Tokenizer.load(files),
        is_base=is_base(manifest),
        on_done=on_done,
    )
