"""Tokens back to text while they are still coming: characters split over tokens, and stop strings split over tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"
"""What an incomplete UTF-8 sequence decodes to."""

WINDOW = 64
"""How many tokens are decoded anew for each one that arrives, at most, unless the text is broken throughout."""


class TextStream:
    """Turns token ids into pieces of text that are safe to send.

    The pieces joined equal the text of all ids, cut before the first stop string. A piece never ends inside a
    character or inside what may yet become a stop string.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        """Start empty. `decode` leaves special tokens out; `stop` strings end the text and are not part of it."""
        self.stopped = False
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._taken = 0
        self._held = ""

    def feed(self, token: int) -> str:
        """Return the text that may be sent now that `token` has come; sets `stopped` when a stop string is complete."""
        self._ids.append(token)
        text = self._decode(self._ids)
        # Of an unfinished character only the last replacement mark can still change.
        whole = text.removesuffix(BROKEN)
        self._held += whole[self._taken :]
        self._taken = len(whole)
        if len(self._ids) >= WINDOW and whole == text:
            self._shorten(text)
        return self._release(final=False)

    def finish(self) -> str:
        """Return what was held back, now that no more tokens come."""
        self._held += self._decode(self._ids)[self._taken :]
        self._ids, self._taken = [], 0
        return self._release(final=True)

    def _shorten(self, text: str) -> None:
        """Forget tokens whose text is complete; a few stay, as some decoders treat a first token in its own way."""
        tail = self._ids[-8:]
        end = self._decode(tail)
        if text.endswith(end) and not end.startswith(BROKEN):
            self._ids, self._taken = tail, len(end)

    def _release(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = 0 if final else max((_overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
