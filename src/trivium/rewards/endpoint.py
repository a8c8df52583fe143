"""A model behind an OpenAI-compatible `/chat/completions`: a server of your own (`trivium serve`), or a provider's.

Nothing is contacted before the first question. Address and key come from the arguments, else from OPENAI_BASE_URL and
OPENAI_API_KEY; the key is read when it is needed and is never stored or shown.
"""

from __future__ import annotations

import json
import math
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from trivium.config import UserError
from trivium.records import Conversation
from trivium.rewards.verdicts import Choice, parse_verdict

Q = TypeVar("Q")
A = TypeVar("A")

UNANSWERABLE = (400, 413, 422)
"""What a server says to a question that it will not answer, such as one too long for it; others may still be fine."""
LONGEST_WAIT_S = 60.0
"""The most that a server's Retry-After is heeded."""


class NotAnswered(UserError):
    """The server gave no answer; `status` is its HTTP status, 0 where it could not be reached."""

    def __init__(self, message: str, status: int) -> None:
        """Take the sentence for people, and the status."""
        super().__init__(message)
        self.status = status


class _Skipped(Exception):
    """A question that was not asked, because an error had ended the work."""


class Endpoint:
    """Asks a server, several questions at a time; `counts` says how many were `asked` and how many `failed`.

    A question that the server refuses, or whose answer is not in the expected shape, has failed: it is answered by
    None and never by a guess. A server that is away, or refuses the key, ends the work with UserError.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str = "",
        api_key: str = "",
        max_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
        timeout_s: float = 60.0,
        retries: int = 3,
        backoff_s: float = 1.0,
        concurrency: int = 4,
    ) -> None:
        """Ask `model`; at most `concurrency` questions are on their way at once."""
        self.model, self.max_tokens, self.temperature, self.seed = model, max_tokens, temperature, seed
        self.timeout_s, self.retries, self.backoff_s, self.concurrency = timeout_s, retries, backoff_s, concurrency
        self.counts = {"asked": 0, "failed": 0}
        self.problem = ""
        """What the server said to the last question that it refused."""
        self._base_url, self._api_key = base_url, api_key
        self._gives_logprobs = True
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def price(self, number: int) -> tuple[int, float]:
        """Return (0, 0.0): what a server computes is not this run's cost."""
        return 0, 0.0

    def fits(self, _: Conversation) -> bool:
        """Return True: how long a conversation the server takes is for the server to say."""
        return True

    def write(self, asked: Mapping[int, Conversation], purpose: int) -> Iterator[tuple[int, str | None]]:
        """Yield (number, what the model wrote), as the answers come; `purpose` keeps the seeds of the steps apart."""

        def one(number: int, conversation: Conversation) -> str | None:
            seed = (self.seed * 101 + purpose) * 100_003 + number
            options = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": seed % 2**31}
            text = _content(self.reply(conversation, **options))
            return text if text and text.strip() else None

        return self._each(asked, one)

    def choose(self, asked: Mapping[int, tuple[Conversation, Conversation]]) -> Iterator[tuple[int, Choice | None]]:
        """Yield (number, probabilities of the letters A and B).

        A question is given twice: for one letter, whose log-probabilities are read, and in words, for a server that
        tells none: that answer's verdict (`[[A]]`, `[[B]]`, `[[C]]`) is then all or nothing, or half and half.
        """

        def one(_: int, question: tuple[Conversation, Conversation]) -> Choice | None:
            letter, words = question
            if self._gives_logprobs:
                listed = self._listed(letter)
                if listed is not None:
                    return letters_of(listed)
            reply = self.reply(words, temperature=0, max_tokens=self.max_tokens)
            if reply is not None:  # it answers, but not with log-probabilities: the rest is asked in words at once
                self._gives_logprobs = False
            verdict = parse_verdict(_content(reply))
            return None if verdict is None else {"A": (1.0, 0.0), "B": (0.0, 1.0), "tie": (0.5, 0.5)}[verdict]

        return self._each(asked, one)

    def reply(self, conversation: Conversation, **options: Any) -> Any:
        """Return the server's answer to one conversation as JSON, or None where it is none, or it was refused."""
        body = {"model": self.model, "messages": conversation.as_dicts(), **options}
        try:
            return json.loads(self.post(body))
        except NotAnswered as error:
            if error.status not in UNANSWERABLE:
                raise
            self.problem = str(error)
        except ValueError:
            self.problem = f"{self.model!r} answered something that is not JSON"
        return None

    def post(self, body: Mapping[str, Any]) -> bytes:
        """Return the reply's body; waits and tries again while the server is busy or away.

        Raises UserError for an address that is none, NotAnswered for a refusal and when the last try failed.
        """
        address = (self._base_url or os.environ.get("OPENAI_BASE_URL", "")).rstrip("/")
        if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
            raise UserError(
                f"the address {address!r} of the model {self.model!r} is not http(s); "
                "set OPENAI_BASE_URL, e.g. http://host/v1"
            )
        key = self._api_key or os.environ.get("OPENAI_API_KEY", "")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = json.dumps(body).encode()
        problem, status, wait_s = "", 0, 0.0
        for attempt in range(self.retries + 1):
            if attempt and self._stopped.wait(max(self.backoff_s * 2 ** (attempt - 1), wait_s)):
                break
            request = urllib.request.Request(f"{address}/chat/completions", data=data, headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    reply: bytes = response.read()
                    return reply
            except urllib.error.HTTPError as error:
                problem, status, wait_s = f"HTTP {error.code}", error.code, _retry_after(error)
                error.close()
                if error.code < 500 and error.code not in (408, 409, 429):
                    break  # asking again would be answered the same
            except (OSError, ValueError) as error:
                problem, status, wait_s = str(getattr(error, "reason", error)), 0, 0.0
        raise NotAnswered(
            f"the model {self.model!r} at {address} did not answer ({problem}); check address, key and model", status
        )

    def _listed(self, question: Conversation) -> list[tuple[str, float]] | None:
        """Return the tokens that may stand first in the answer, with their nats; None where the server lists none."""
        wanted = {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        reply = self.reply(question, **wanted)
        try:
            listed = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            return [(str(entry["token"]), float(entry["logprob"])) for entry in listed] or None
        except (ValueError, KeyError, IndexError, TypeError):
            return None

    def _each(self, asked: Mapping[int, Q], one: Callable[[int, Q], A | None]) -> Iterator[tuple[int, A | None]]:
        """Yield (number, answer) as they come; after an error no more is asked, what was on its way is kept."""
        self._stopped.clear()
        failure: UserError | None = None

        def unless_stopped(number: int, question: Q) -> A | None:
            # Looked at in the worker: before the error is heard of elsewhere, the next question could be on its way.
            if self._stopped.is_set():
                raise _Skipped
            try:
                return one(number, question)
            except UserError:
                self._stopped.set()
                raise

        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        try:
            futures = {pool.submit(unless_stopped, number, question): number for number, question in asked.items()}
            for future in as_completed(futures):
                try:
                    answer = future.result()
                except _Skipped:
                    continue
                except UserError as error:
                    failure = failure or error
                    continue
                self.counts["asked"] += 1
                self.counts["failed"] += answer is None
                yield futures[future], answer
        finally:
            self._stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if failure:
            raise failure


def letters_of(listed: Iterable[tuple[str, float]]) -> Choice:
    """Return the probabilities of A and B among listed (token, nats).

    A token counts that is the letter but for case, spaces and marks around it; a letter that is not listed counts
    nothing.
    """
    chance = {"A": 0.0, "B": 0.0}
    for token, nats in listed:
        letter = token.strip(" \n\t([*\"'.)]").upper()
        if letter in chance:
            chance[letter] += math.exp(min(nats, 0.0))
    return chance["A"], chance["B"]


def _content(reply: Any) -> str | None:
    """Return the text of an answer, or None where there is none."""
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return text if isinstance(text, str) else None


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Return the seconds after which the server wants to be asked again, 0 where it names none."""
    try:
        return min(max(float(error.headers.get("Retry-After", 0)), 0.0), LONGEST_WAIT_S)
    except ValueError:  # a date: rare, and the back-off will do
        return 0.0
