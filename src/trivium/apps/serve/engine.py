"""Generation behind the API: one worker thread, many answers at once, token by token in turn.

Every answer is a batch of its own, so what others ask can never change it; the worker gives each running answer one
token per round. Whoever goes away is forgotten within a round. What does not fit waits in a bounded line.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from trivium.apps.serve.api import Listed
from trivium.apps.serve.text import TextStream
from trivium.config import UserError
from trivium.data.tokenizer import Tokenizer
from trivium.models.generate import stream
from trivium.models.hf import load_model, read_stop_ids
from trivium.models.transformer import Transformer
from trivium.runs.manifest import is_base, read_manifest

SLOTS = 8
"""Answers that run at once."""

LINE = 32
"""Answers that may wait; the next is told to come back."""

FinishReason = Literal["stop", "length", "error", "shutdown"]


class Busy(Exception):
    """The line is full, or the server is shutting down (`closing`)."""

    def __init__(self, *, closing: bool) -> None:
        """Say which of the two it is."""
        super().__init__("the server is shutting down" if closing else "too many requests are waiting; try again soon")
        self.closing = closing


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model that answers: `kind` says whether it was taught to converse or only to continue text."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    kind: Literal["chat", "base"]
    stop_ids: frozenset[int]
    stage: str
    run_id: str
    longest_piece: int

    @property
    def context(self) -> int:
        """How many tokens prompt and answer may have together."""
        return self.model.config.max_position_embeddings


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What the worker reports: a piece of text, or (with `reason`) the end. `tokens` counts those drawn so far.

    `listed` comes with the end where it was asked for: for each token of the answer its nats, and the likeliest ones'.
    """

    text: str = ""
    reason: FinishReason | None = None
    tokens: int = 0
    listed: list[Listed] | None = None


@dataclass(kw_only=True)
class Job:
    """One answer in the making. `pieces` is filled from the worker; `cancel` makes the worker forget it."""

    served: Served
    prompt: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    top_logprobs: int | None = None
    ids: list[int] = field(default_factory=list)
    pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    cancelled: bool = False
    drawn: int = 0

    def cancel(self) -> None:
        """Ask the worker to stop; it does so before the next token."""
        self.cancelled = True

    def report(self, piece: Piece) -> None:
        """Hand a piece to the event loop (called in the worker)."""
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.cancelled = True


class Engine:
    """The worker thread and its line."""

    def __init__(self, *, slots: int = SLOTS, line: int = LINE) -> None:
        """Prepare; the thread starts with the first job."""
        self.slots, self.line = slots, line
        self._waiting: deque[Job] = deque()
        self._running: list[tuple[Job, Iterator[tuple[int, float]], TextStream]] = []
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._end_at: float | None = None

    @property
    def load(self) -> tuple[int, int]:
        """How many answers are running and how many wait."""
        return len(self._running), len(self._waiting)

    def submit(self, job: Job) -> None:
        """Put a job in line. Raises Busy when the line is full or the server closes."""
        with self._change:
            if self._end_at is not None:
                raise Busy(closing=True)
            # What was cancelled while waiting must not keep others out.
            self._waiting = deque(j for j in self._waiting if not j.cancelled)
            if len(self._waiting) >= self.line + max(0, self.slots - len(self._running)):
                raise Busy(closing=False)
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
                self._thread.start()
            self._change.notify()

    def drain(self, grace_s: float) -> None:
        """Take no more jobs and end what still runs after `grace_s` seconds; safe to call from a signal handler."""
        if self._end_at is None:
            self._end_at = time.monotonic() + grace_s

    def close(self) -> None:
        """End everything now and wait for the worker to be gone."""
        self._end_at = time.monotonic()
        with self._change:
            self._change.notify()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _work(self) -> None:
        # One core stays with the web server: a starved event loop delays every stream, not only one.
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
        while self._admit():
            ending = self._end_at is not None and time.monotonic() >= self._end_at
            for entry in list(self._running):
                if ending:
                    entry[0].report(Piece(reason="shutdown", tokens=entry[0].drawn))
                    self._running.remove(entry)
                elif not self._advance(*entry):
                    self._running.remove(entry)

    def _admit(self) -> bool:
        """Move waiting jobs into free slots, sleeping while there is nothing to do; False when it is time to go."""
        with self._change:
            while not self._running and not self._waiting:
                if self._end_at is not None:
                    return False
                self._change.wait(timeout=0.5)
            while self._waiting and len(self._running) < self.slots:
                job = self._waiting.popleft()
                if not job.cancelled:
                    self._running.append((job, _tokens(job), TextStream(job.served.tokenizer.decode, job.stop)))
        return True

    @staticmethod
    def _advance(job: Job, tokens: Iterator[tuple[int, float]], text: TextStream) -> bool:
        """Draw one token of a job and report; returns whether the job goes on."""
        if job.cancelled:
            return False
        try:
            token = next(tokens, (None, 0.0))[0]
            if token is not None:
                job.drawn += 1
            stop = token in job.served.stop_ids
            if token is not None and not stop:
                job.ids.append(token)
            # A stop token is a sign, not text, also where a foreign tokenizer does not call it special.
            piece = "" if token is None or stop else text.feed(token)
            ended = stop or text.stopped or token is None or job.drawn >= job.max_tokens
            if ended and not text.stopped:
                piece += text.finish()
            reason: FinishReason = "stop" if stop or text.stopped else "length"
            listed = list_tokens(job, job.top_logprobs) if ended and job.top_logprobs is not None else None
        except Exception:  # one broken answer must not end the others
            traceback.print_exc(file=sys.stderr)
            job.report(Piece(reason="error", tokens=job.drawn))
            return False
        if piece or ended:
            job.report(Piece(text=piece, reason=reason if ended else None, tokens=job.drawn, listed=listed))
        return not ended


def list_tokens(job: Job, num: int) -> list[Listed]:
    """Return, for each token of a job's answer, its log-probability (nats) and those of the `num` likeliest tokens.

    They are the model's own, at temperature 1 and without top-p, whatever the answer was drawn with. Read in one pass
    over prompt and answer, so that nobody else's answer is slower for it token by token.
    """
    if not job.ids:
        return []
    model, pieces = job.served.model, job.served.tokenizer.pieces
    ids = torch.tensor([[*job.prompt, *job.ids][:-1]], device=next(model.parameters()).device)
    with torch.no_grad():
        hidden = model(ids)[:, len(job.prompt) - 1 :]
        nats = torch.log_softmax(model.logits(hidden).float()[0], -1).cpu()
    own = nats.gather(-1, torch.tensor(job.ids)[:, None])[:, 0].tolist()
    likeliest = nats.topk(num, -1)
    rows = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    tops = [list(zip(pieces(found), values, strict=True)) for found, values in rows]
    return list(zip(zip(pieces(job.ids), own, strict=True), tops, strict=True))


def _tokens(job: Job) -> Iterator[tuple[int, float]]:
    # Made on the first `next`, so that a mistake in the arguments is the job's and not the worker's.
    yield from stream(
        job.served.model,
        job.prompt,
        max_new_tokens=job.max_tokens,
        temperature=job.temperature,
        top_p=job.top_p,
        stop_ids=job.served.stop_ids,
        seed=job.seed,
    )


def load(name: str, folder: Path) -> Served:
    """Return the model in a Hugging Face folder, on the GPU in bfloat16 where there is one.

    See `is_base` for which are base models; all others are taken for chat models. Raises UserError for a folder
    that holds no language model.
    """
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        model = load_model(folder, device=device, dtype=dtype)
        stop_ids = read_stop_ids(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot serve {name!r} from {folder}: {error}") from None
    tokenizer = Tokenizer.load(folder)
    manifest = read_manifest(folder.parent)
    stage = manifest.stage if manifest else ""
    return Served(
        name=name,
        model=model.eval(),
        tokenizer=tokenizer,
        kind="base" if is_base(manifest) else "chat",
        stop_ids=stop_ids | tokenizer.stop_ids,
        stage=stage,
        run_id=manifest.run_id if manifest else "",
        longest_piece=max(
            len(piece.encode("utf-8", "replace")) for piece in tokenizer.pieces(range(tokenizer.vocab_size))
        ),
    )
