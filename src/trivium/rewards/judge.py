"""Judges: who says which of two responses is better, and what is made of it when the answer is unsure.

A judge leans towards a place (first or last), so every pair is asked in both orders. Both orders name the same
response: a preference. They disagree, or say tie: a tie. An answer that cannot be read is neither: it is counted, and
the pair is left unjudged.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, Literal

from trivium.config import UserError
from trivium.records import AnnotatorKind, Completion, Conversation
from trivium.rewards.constitution import DEFAULT_COMPARISON, comparison_prompt
from trivium.rewards.verifiable import Reward

JudgeFn = Callable[[Conversation, str], float]
"""Grades one response to a prompt (the evaluate stage's `judge`): a higher number is better."""

Verdict = Literal["A", "B", "tie"]
AskFn = Callable[[Conversation, str, str], Verdict | None]
"""Asked once, in one order: which of two responses is better; None when the answer cannot be read."""

_VERDICT = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
_ALONE = re.compile(r"\W*(A|B|C|tie)\W*", re.IGNORECASE)


def parse_verdict(reply: object) -> Verdict | None:
    """Return what a reply says: `[[A]]`, `[[B]]`, `[[C]]` anywhere in it, or the letter alone; else None.

    A reply that names two different verdicts, or none, is malformed; nothing is guessed from its prose.
    """
    if not isinstance(reply, str):
        return None
    alone = _ALONE.fullmatch(reply.strip())
    named = {found.upper() for found in _VERDICT.findall(reply)} or ({alone[1].upper()} if alone else set())
    if len(named) != 1:
        return None
    return {"A": "A", "B": "B", "C": "tie", "TIE": "tie"}[named.pop()]  # type: ignore[return-value]


class PairwiseJudge:
    """Makes a ranking out of single questions; fits where the collect_comparisons stage expects an annotator.

    `counts` says how many questions were `asked`, how many answers were `malformed`, and how many pairs the two orders
    `disagreed` on (the judge's position bias).
    """

    def __init__(self, ask: AskFn, *, name: str, kind: AnnotatorKind = "ai") -> None:
        """Judge by `ask`, under the name and kind that rankings are stored with."""
        self.ask = ask
        self.name = name
        self.kind: AnnotatorKind = kind
        self.counts = {"asked": 0, "malformed": 0, "disagreed": 0}

    def compare(self, prompt: Conversation, first: str, second: str) -> float | None:
        """Return 1 if `first` is better in both orders, -1 if `second` is, 0 for a tie, None when an answer failed."""
        forward = self._one(prompt, first, second)
        backward = self._one(prompt, second, first)
        if forward is None or backward is None:
            return None
        mirrored = {"A": "B", "B": "A", "tie": "tie"}[backward]
        if forward != mirrored:
            self.counts["disagreed"] += 1
            return 0.0
        return {"A": 1.0, "B": -1.0, "tie": 0.0}[forward]

    def _one(self, prompt: Conversation, first: str, second: str) -> Verdict | None:
        verdict = self.ask(prompt, first, second)
        self.counts["asked"] += 1
        self.counts["malformed"] += verdict is None
        return verdict

    def rank(self, prompt: Conversation, texts: Sequence[str], rng: object = None) -> list[list[int]]:
        """Return groups of indices into `texts`, best first, by their share of wins over the others (a tie is half).

        Equal shares make a group. Texts whose comparison failed are put into one group, so that no failed answer can
        turn into a preference; where nothing else is left, all share one group, which says nothing.
        """
        pairs = itertools.combinations(range(len(texts)), 2)
        outcome = {(i, j): self.compare(prompt, texts[i], texts[j]) for i, j in pairs}
        cluster = _clusters(len(texts), [pair for pair, result in outcome.items() if result is None])
        points: dict[int, list[float]] = {name: [] for name in cluster}
        for (i, j), result in outcome.items():
            if result is not None and cluster[i] != cluster[j]:
                points[cluster[i]].append((1 + result) / 2)
                points[cluster[j]].append((1 - result) / 2)
        share = [sum(points[name]) / max(len(points[name]), 1) for name in cluster]
        return [[i for i in range(len(texts)) if share[i] == s] for s in sorted(set(share), reverse=True)]


def _clusters(count: int, failed: list[tuple[int, int]]) -> list[int]:
    """Return a cluster name per index; the two indices of a failed pair get the same."""
    cluster = list(range(count))
    for i, j in failed:
        old, new = cluster[j], cluster[i]
        cluster = [new if name == old else name for name in cluster]
    return cluster


class OpenAIJudge(PairwiseJudge):
    """A judge behind an OpenAI-compatible `/chat/completions`: a server of your own, or a provider's.

    Nothing is contacted before the first question. Address and key come from the arguments, else from OPENAI_BASE_URL
    and OPENAI_API_KEY; the key is read when it is needed and is never stored or shown.
    """

    def __init__(
        self,
        model: str,
        *,
        criterion: str = DEFAULT_COMPARISON,
        base_url: str = "",
        api_key: str = "",
        timeout_s: float = 60.0,
        retries: int = 3,
        backoff_s: float = 1.0,
    ) -> None:
        """Judge with `model` by `criterion` (the question asked about both responses)."""
        super().__init__(self._ask, name=f"{model}@judge", kind="ai")
        self.model = model
        self.criterion = criterion
        self.timeout_s, self.retries, self.backoff_s = timeout_s, retries, backoff_s
        self._base_url, self._api_key = base_url, api_key

    def _ask(self, prompt: Conversation, first: str, second: str) -> Verdict | None:
        question = comparison_prompt(prompt, first, second, self.criterion)
        reply = self._post({"model": self.model, "messages": question.as_dicts(), "temperature": 0, "max_tokens": 512})
        try:
            return parse_verdict(json.loads(reply)["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError):
            return None

    def _post(self, body: dict[str, Any]) -> bytes:
        """Return the reply's body; waits and tries again while the server is busy or away.

        Raises UserError for an address that is none, a refused key, and when the last try failed.
        """
        address = (self._base_url or os.environ.get("OPENAI_BASE_URL", "")).rstrip("/")
        if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
            raise UserError(f"the judge's address {address!r} is not http(s); set OPENAI_BASE_URL, e.g. http://host/v1")
        key = self._api_key or os.environ.get("OPENAI_API_KEY", "")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = json.dumps(body).encode()
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff_s * 2 ** (attempt - 1))
            request = urllib.request.Request(f"{address}/chat/completions", data=data, headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    reply: bytes = response.read()
                    return reply
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                error.close()
                if error.code < 500 and error.code not in (408, 409, 429):
                    break  # asking again would be answered the same
            except (OSError, ValueError) as error:
                problem = str(getattr(error, "reason", error))
        raise UserError(
            f"the judge {self.model!r} at {address} did not answer ({problem}); check address, key and model"
        )


def openai_annotators(seed: int) -> list[OpenAIJudge]:
    """Return the AI judge that TRIVIUM_JUDGE_MODEL names, as the only annotator; `seed` is not used (it is greedy).

    In a recipe: `annotators = "trivium.rewards.judge:openai_annotators"`; the address comes from OPENAI_BASE_URL.
    Raises UserError when no model is named.
    """
    model = os.environ.get("TRIVIUM_JUDGE_MODEL", "")
    if not model:
        raise UserError("no AI judge is named; set TRIVIUM_JUDGE_MODEL to a model that OPENAI_BASE_URL serves")
    return [OpenAIJudge(model)]


def as_reward(judge: JudgeFn) -> Reward:
    """Return a Reward that grades every completion's text by `judge`."""

    def reward(prompts: Sequence[Conversation], completions: Sequence[Completion]) -> list[float]:
        return [float(judge(prompt, c.text)) for prompt, c in zip(prompts, completions, strict=True)]

    return reward
