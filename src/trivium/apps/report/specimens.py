"""What the stages kept to be looked at: a few real items of each, chosen by a rule and not by how well they look."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trivium.apps.report.cells import finite, mapping, shorten, visible, words
from trivium.apps.report.model_tables import checkpoints
from trivium.apps.report.sources import Sources, task_name, write_kind

MAX_TOKENS = 120
MAX_TEXT = 600
MAX_SIDE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhibit:
    """Some specimens of one kind: `kind` names the template's block, `items` are what it shows."""

    kind: str
    title: str
    explanation: str
    run: str = ""
    items: tuple[dict[str, Any], ...] = field(default=())


def exhibits(sources: Sources) -> list[Exhibit]:
    """Return what there is to show, in the order of the pipeline; an exhibit without items says that there is none."""
    return [
        _dropped(sources),
        _masked(sources),
        _ranked(sources),
        _rollout(sources),
        _revision(sources),
        _side_by_side(sources),
    ]


def _pick(sources: Sources, stage: str, name: str, limit: int) -> tuple[str, list[dict[str, Any]]]:
    """Return the run and its first `limit` specimens of a name that are what they should be: objects."""
    source = sources.find(stage)
    if source is None:
        return "", []
    found = [value for value in source.specimens(name) if isinstance(value, dict)]
    return source.manifest.run_id, found[:limit]


def _text(item: dict[str, Any], key: str) -> str:
    value = item.get(key, "")
    if isinstance(value, list):  # a prompt given as messages
        value = "\n".join(str(m.get("content", m)) if isinstance(m, dict) else str(m) for m in value)
    if isinstance(value, dict):
        value = _text(value, "messages")
    return shorten(visible(value), MAX_TEXT)


def _dropped(sources: Sources) -> Exhibit:
    run, _ = _pick(sources, "data_prep", "dropped", 0)
    source = sources.find("data_prep")
    by_reason: dict[str, dict[str, Any]] = {}
    for item in source.specimens("dropped") if source else []:
        if isinstance(item, dict):
            by_reason.setdefault(str(item.get("reason", "")), item)
    items = tuple(
        {
            "reason": visible(reason).replace("_", " "),
            "text": shorten(_text(item, "text"), 320),
            "source": _text(item, "source"),
        }
        for reason, item in list(by_reason.items())[:6]
    )
    return Exhibit(
        kind="dropped",
        title="Documents that were dropped",
        explanation="The first document that each rule took out. A rule that takes out good text would show here.",
        run=run,
        items=items,
    )


def _tokens(item: dict[str, Any], key: str = "tokens") -> list[str]:
    tokens = item.get(key)
    return [visible(t) for t in tokens[:MAX_TOKENS]] if isinstance(tokens, list) else []


def _masked(sources: Sources) -> Exhibit:
    run, found = _pick(sources, "sft", "masked_conversation", 1)
    items = []
    for item in found:
        tokens = _tokens(item)
        trained = list(item.get("trained") or [])[: len(tokens)]
        trained += [False] * (len(tokens) - len(trained))
        left = max(0, len(item.get("tokens") or []) - len(tokens))
        items.append(
            {"tokens": [{"text": t, "trained": bool(on)} for t, on in zip(tokens, trained, strict=True)], "left": left}
        )
    return Exhibit(
        kind="masked",
        title="A conversation as fine-tuning sees it",
        explanation=(
            "The marked tokens are the ones the model is trained to produce: the response and the end of "
            "the turn, never the request."
        ),
        run=run,
        items=tuple(items),
    )


def _ranked(sources: Sources) -> Exhibit:
    run, found = _pick(sources, "collect_comparisons", "ranking", 20)
    # Of the rankings kept, one that tells the most: the largest number of distinct places.
    found = sorted(found, key=lambda item: -len(_groups(item)))[:1]
    items = tuple(
        {
            "prompt": _text(item, "prompt"),
            "groups": [[shorten(visible(text), MAX_TEXT) for text in group] for group in _groups(item)],
            "annotator": _text(item, "annotator"),
            "kind": write_kind(str(item.get("kind", ""))) or "unrecorded",
        }
        for item in found
    )
    return Exhibit(
        kind="ranked",
        title="A ranked group",
        explanation=(
            "Responses to one prompt in the order that an annotator gave them, best first; a tie shares a place."
        ),
        run=run,
        items=items,
    )


def _groups(item: dict[str, Any]) -> list[list[str]]:
    groups = item.get("groups")
    return [[str(t) for t in g] for g in groups if isinstance(g, list)] if isinstance(groups, list) else []


def _rollout(sources: Sources) -> Exhibit:
    run, found = _pick(sources, "ppo", "rollout", 20)
    items = [_rollout_item(item) for item in found[-1:]]  # the last kept one: a policy that has learned something
    return Exhibit(
        kind="rollout",
        title="A PPO rollout, token by token",
        explanation="KL is what a token costs for being likelier under the policy than under the SFT model; the "
        "score arrives once, at the end; the advantage says whether a token is made likelier (positive) or less "
        "likely (negative).",
        run=run,
        items=tuple(items),
    )


def _rollout_item(item: dict[str, Any]) -> dict[str, Any]:
    tokens = _tokens(item)[:48]
    columns = {
        name: _numbers(item, name, len(tokens)) for name in ("logprobs", "ref_logprobs", "kl", "values", "advantages")
    }
    top = max((abs(x) for x in columns["advantages"] if x is not None), default=0.0)
    rows = []
    for place, token in enumerate(tokens):
        row = {name: column[place] for name, column in columns.items()}
        advantage = row["advantages"] or 0.0
        rows.append(
            {"text": token, "weight": round(100 * abs(advantage) / top) if top else 0, "up": advantage >= 0, **row}
        )
    return {
        "prompt": _text(item, "prompt"),
        "score": finite(item.get("score")),
        "rows": rows,
        "left": max(0, len(item.get("tokens") or []) - len(tokens)),
    }


def _numbers(item: dict[str, Any], name: str, length: int) -> list[float | None]:
    values = item.get(name)
    numbers = [finite(v) for v in values[:length]] if isinstance(values, list) else []
    return numbers + [None] * (length - len(numbers))


def _revision(sources: Sources) -> Exhibit:
    run, found = _pick(sources, "constitutional_ai", "revision", 20)
    changed = [item for item in found if item.get("response") != item.get("revision")] or found
    items = tuple(
        {key: _text(item, key) for key in ("prompt", "response", "critique", "revision")} for item in changed[:1]
    )
    return Exhibit(
        kind="revision",
        title="A response, criticised and revised",
        explanation="Constitutional AI: a written principle finds the fault, and the model is trained on the revision.",
        run=run,
        items=items,
    )


def _side_by_side(sources: Sources) -> Exhibit:
    run, found = _pick(sources, "evaluate", "generation", 20)
    by_task: dict[str, dict[str, Any]] = {}
    for item in found:
        if isinstance(item.get("outputs"), dict):
            by_task.setdefault(str(item.get("task", "")), item)
    return Exhibit(
        kind="side",
        title="The same prompt to every model",
        explanation=(
            "The first question of each task, not chosen for its answers; right and wrong as the task's check has it."
        ),
        run=run,
        items=tuple(_outputs(sources, task, item) for task, item in list(by_task.items())[:MAX_SIDE]),
    )


def _outputs(sources: Sources, task: str, item: dict[str, Any]) -> dict[str, Any]:
    passed = mapping(item.get("passed"))
    order = checkpoints(sources)
    names = sorted(item["outputs"], key=lambda name: (order.index(name) if name in order else len(order), name))
    responses = [
        {
            "label": sources.model_label(name),
            "text": shorten(visible(item["outputs"][name]), 400),
            "verdict": "right" if passed.get(name) is True else "wrong" if passed.get(name) is False else "",
        }
        for name in names
    ]
    return {"task": visible(words(task_name(task))), "prompt": _text(item, "prompt"), "responses": responses}
