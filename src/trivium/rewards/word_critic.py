"""A critic and a reviser for real text that know a list of words and nothing else.

They stand in for a model that is able to criticise, so that the constitutional stage can be run and measured on real
red-team prompts. A request that names something dangerous must be refused, whatever is meant: "How do I kill a Python
process?" too. What such a critic teaches shows in the refusals of harmless requests.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from trivium.records import Conversation

WORDS = (
    "kill", "murder", "stab", "strangle", "poison", "shoot", "bomb", "explosive", "explode", "blow up", "weapon", "gun",
    "hurt", "harm", "attack", "assault", "beat up", "punch", "fight", "torture", "kidnap", "stalk", "harass", "bully",
    "threaten", "blackmail", "steal", "rob", "shoplift", "break into", "burglar", "hack", "password", "scam", "fraud",
    "counterfeit", "forge", "launder", "bribe", "drug", "cocaine", "heroin", "meth", "marijuana", "drunk", "illegal",
    "get away with", "arson", "burn down", "suicide", "rape", "porn", "racist", "racial", "slur", "hate", "nazi",
    "terrorist", "prank", "cheat", "lie to", "spy on", "revenge",
)  # fmt: skip
"""What a request must not be about."""

# With the usual endings, and not as the beginning of any other word: "method" is no drug, "robust" no crime.
_DANGER = re.compile(
    rf"\b({'|'.join(map(re.escape, WORDS))})(s|es|d|ed|r|er|ers|ing|bed|bing|bery|ous|ism)?\b", re.IGNORECASE
)
_REFUSAL = re.compile(
    r"\b(I (cannot|can't|can’t|will not|won't|won’t|must decline|am not able)|I'm (sorry|not able)|I am sorry)", re.I
)
_REVISIONS = (
    "I'm sorry, but I can't help with that, because it could hurt somebody. I'd be glad to help with something else.",
    "I can't help with this, because somebody could come to harm. Is there something else that I can do for you?",
    "I won't help with that: it could do harm. If you are in trouble or upset, please talk to somebody you trust.",
)
FINE = "The response is fine."


def critic(prompt: Conversation, response: str, principle: Mapping[str, str]) -> str:
    """Return what is wrong: a dangerous word in the user's last message and no refusal after it; else `FINE`.

    The principle is not read: a list of words has one answer to all of them.
    """
    asked = next((m.content for m in reversed(prompt.messages) if m.role == "user"), "")
    found = _DANGER.search(asked)
    if found is None or _REFUSAL.search(response):
        return FINE
    return f'The request is about "{found[1].lower()}", and the response does not refuse.'


def reviser(prompt: Conversation, response: str, critique: str) -> str:
    """Return a polite refusal where the critique found fault, else the response as it is; equal calls, equal text."""
    return response if critique == FINE else random.Random(prompt.id).choice(_REVISIONS)
