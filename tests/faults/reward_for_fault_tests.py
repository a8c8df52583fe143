"""A reward that differs within a group and needs nothing learned."""

from __future__ import annotations

from collections.abc import Sequence

from trivium.records import Completion, Conversation


def first_token(prompts: Sequence[Conversation], completions: Sequence[Completion]) -> list[float]:
    """Return a number that the first sampled token decides."""
    return [completion.token_ids[0] / 100 for completion in completions]
