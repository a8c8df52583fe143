"""Judges: who says which of two responses is better, and what is made of it when the answer is unsure.

A judge leans towards a place (first or last), so every pair is asked in both orders. Both orders name the same
response: a preference. They disagree, or say tie: a tie. An answer that cannot be read is neither: it is counted, and
the pair is left unjudged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence

from trivium.config import UserError
from trivium.records import AnnotatorKind, Completion, Conversation
from trivium.rewards.constitution import DEFAULT_COMPARISON, comparison_prompt
from trivium.rewards.endpoint import Endpoint
from trivium.rewards.verdicts import Verdict, grouped, pairs_of, parse_verdict
from trivium.rewards.verifiable import Reward

JudgeFn = Callable[[Conversation, str], float]
"""Grades one response to a prompt (the evaluate stage's `judge`): a higher number is better."""

AskFn = Callable[[Conversation, str, str], Verdict | None]
"""Asked once, in one order: which of two responses is better; None when the answer cannot be read."""


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

        Texts whose comparison failed share a group; see `verdicts.grouped`.
        """
        pairs = pairs_of(len(texts))
        return grouped(len(texts), {(i, j): self.compare(prompt, texts[i], texts[j]) for i, j in pairs})


class OpenAIJudge(PairwiseJudge):
    """A judge behind an OpenAI-compatible `/chat/completions`, asked as `rewards.endpoint.Endpoint` asks.

    Its verdicts are read from its words; the constitutional_ai stage reads log-probabilities.
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
        self.endpoint = Endpoint(
            model, base_url=base_url, api_key=api_key, timeout_s=timeout_s, retries=retries, backoff_s=backoff_s
        )

    def _ask(self, prompt: Conversation, first: str, second: str) -> Verdict | None:
        question = comparison_prompt(prompt, first, second, self.criterion)
        body = {"model": self.model, "messages": question.as_dicts(), "temperature": 0, "max_tokens": 512}
        reply = self.endpoint.post(body)
        try:
            return parse_verdict(json.loads(reply)["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError):
            return None


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
