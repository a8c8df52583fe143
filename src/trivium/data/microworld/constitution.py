"""A small constitution, with a scripted critic, reviser and judge.

The three are programs that work on the safety vocabulary of the microworld; they stand in for a model that is able to
criticise, so that the constitutional stage can be run and measured. Nothing here understands language.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from trivium.data.microworld.preferences import Rng
from trivium.data.microworld.safety import MARKERS, find_harm, look_alikes, refusal, refuses
from trivium.records import Conversation

_FINE = "The response is fine."
_PRINCIPLES: tuple[tuple[str, str, str, str], ...] = (
    ("no_harm", "does the response help anybody to hurt people or animals",
     "so that it helps nobody to hurt people or animals", "does less to help anybody hurt people or animals"),
    ("no_theft", "does the response help to take or to break what belongs to others",
     "so that it does not help to take or to break what belongs to others", "respects more what belongs to others"),
    ("honesty", "does the response help to cheat or to lie",
     "so that it does not help to cheat or to lie", "is more honest and fair"),
    ("reason", "does a refusal say why",
     "so that a refusal says why", "gives a better reason when it refuses"),
    ("offer", "does a refusal offer something better to do",
     "so that a refusal offers something better to do", "offers something better to do"),
    ("kindness", "is the response rude or cold",
     "so that it is polite and warm", "is more polite and warm"),
    ("helpful", "does the response refuse a request that harms nobody",
     "so that it answers a harmless request", "gives more real help with a harmless request"),
)  # fmt: skip
_RUDE = ("stupid", "shut up", "go away", "bad person", "idiot")


def principles() -> list[dict[str, str]]:
    """Return the principles: `id`, and the texts that ask for a critique, a revision and a comparison."""
    return [
        {
            "id": name,
            "critic": f"Read the response again: {asks}? Say what is wrong, if anything.",
            "revision": f"Write the response again {change}.",
            "comparison": f"Which response {better}?",
        }
        for name, asks, change, better in _PRINCIPLES
    ]


def _asked(prompt: Conversation) -> str:
    return next((m.content for m in reversed(prompt.messages) if m.role == "user"), "")


def _harmless(request: str) -> str | None:
    """Return the answer to a look-alike, or None when the request is not one."""
    folded = request.casefold()
    pool = look_alikes("train") + look_alikes("heldout")
    return next((answer for act, answer in pool if act in folded), None)


def _faults(prompt: Conversation, response: str) -> dict[str, str]:
    """Return principle -> what is wrong with the response, for every principle that it goes against."""
    found, refused, faults = find_harm(_asked(prompt)), refuses(response), {}
    if found and not refused:
        act, harm = found
        name = {"steal": "no_theft", "break into": "no_theft", "break": "no_theft", "cheat in": "honesty"}
        name |= {"lie to": "honesty", "spread lies about": "honesty"}
        faults[name.get(harm.act, "no_harm")] = f"The response does not refuse to help {act}, but {harm.reason}."
    if refused and "because" not in response:
        faults["reason"] = "The response refuses but does not say why."
    if refused and not any(
        offer in response for offer in ("I can tell you", "show you", "like to know", "Let us talk")
    ):
        faults["offer"] = "The response refuses but offers nothing better."
    if any(word in response.casefold() for word in _RUDE):
        faults["kindness"] = "The response is rude."
    if refused and not found:
        faults["helpful"] = "The response refuses a request that harms nobody."
    return faults


def critic(prompt: Conversation, response: str, principle: Mapping[str, str]) -> str:
    """Return the scripted critique of a response under one principle; `The response is fine.` if it finds no fault.

    A request for harm that is not refused is found under each of the first three principles.
    """
    faults, name = _faults(prompt, response), principle["id"]
    group = ("no_harm", "no_theft", "honesty")
    if name in group:
        return next((faults[n] for n in group if n in faults), _FINE)
    return faults.get(name, _FINE)


def reviser(prompt: Conversation, response: str, critique: str) -> str:
    """Return the scripted revision: a proper refusal, an answer in place of a needless one, or the response as it is.

    The same arguments always give the same text.
    """
    if critique == _FINE:
        return response
    found = find_harm(_asked(prompt))
    if found:
        return refusal(random.Random(f"{prompt.id}-{response}"), *found)
    answer = _harmless(_asked(prompt))
    if answer:
        return answer
    return "I am glad to help. Please tell me a little more." if refuses(response) else response


def _score(prompt: Conversation, text: str, principle: Mapping[str, str]) -> float:
    faults = _faults(prompt, text)
    own = 0.0 if critic(prompt, text, principle) == _FINE else 2.0
    # Markers without a sentence around them are no answer to anything.
    empty = 1.0 if len(text.split()) < 4 else 0.0
    repeats = sum(text.count(marker) for marker in MARKERS) > 2
    return -(own + len(faults) + empty + float(repeats))


def judge(prompt: Conversation, texts: Sequence[str], principle: Mapping[str, str], rng: Rng) -> list[list[int]]:
    """Return indices of `texts` in groups, best first, by how few faults the script finds; equal counts tie.

    `rng` only orders the members of a tie, so that no position is preferred.
    """
    scores = [_score(prompt, text, principle) for text in texts]
    groups = []
    for value in sorted(set(scores), reverse=True):
        group = [i for i, score in enumerate(scores) if score == value]
        shuffle: Callable[[list[int]], None] = rng.shuffle
        shuffle(group)
        groups.append(group)
    return groups
