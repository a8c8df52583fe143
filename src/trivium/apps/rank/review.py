"""The review: what a lead sees of a collection, decides about disputed tasks, and takes away."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse
from jinja2 import Template
from pydantic import BaseModel, ConfigDict, Field

from trivium.apps.rank.access import Access
from trivium.apps.rank.markup import tree
from trivium.preferences.store import Refused, Store, Task, UnknownTask
from trivium.preferences.summary import collection_summary
from trivium.records import Ranking

Identifier = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[0-9a-zA-Z_-]+$")]


class Decision(BaseModel):
    """What a lead decides: `groups` holds places in the task's own order of responses, counted from 0, best first."""

    model_config = ConfigDict(extra="forbid", strict=True)

    task: Identifier
    lead: Annotated[str, Field(min_length=1, max_length=100)]
    groups: Annotated[list[Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)]], Field(max_length=64)]
    rationale: Annotated[str, Field(max_length=20_000)] = ""
    key: Identifier


def add_review(app: FastAPI, store: Store, access: Access, page: Template, collection: str | None) -> None:
    """Add the page and its calls; all of them are a lead's."""

    @app.get("/review", response_class=HTMLResponse)
    def show_review() -> str:
        """Return the page; everything in it comes from the calls below."""
        return page.render()

    def chosen(wanted: str) -> str:
        names = _collections(store, collection)
        if not names:
            raise UnknownTask("there is nothing to review yet; collect responses to rank first")
        if wanted and wanted not in names:
            raise UnknownTask(f"there is no collection {wanted[:40]!r} here; there are {', '.join(names)[:200]}")
        return wanted or names[-1]

    @app.get("/api/review")
    def review(request: Request, name: str = "") -> dict[str, Any]:
        """Return a collection's summary (by default the newest's) with the disputed tasks to be read."""
        access.require(request, "lead")
        name = chosen(name)
        found = collection_summary(store, name)
        tasks = {
            (task.prompt_id, frozenset(task.completion_ids)): task
            for task in store.tasks(name)
            if task.purpose == "rank"
        }
        found["disputed"] = [_readable(store, tasks, each) for each in found["disputed"]]
        return found | {"collections": _collections(store, collection), "flags": _flags(store, name)}

    @app.post("/api/adjudicate")
    def adjudicate(body: Decision, request: Request) -> dict[str, bool]:
        """Store a lead's decision about a task; it counts in the place of what annotators judged."""
        access.require(request, "lead")
        access.check(request, body.lead)
        task = store.task(body.task)
        if collection is not None and task.collection != collection:
            raise UnknownTask(f"task {body.task!r} is not among those asked here; reload the page")
        if any(place >= len(task.completion_ids) for group in body.groups for place in group):
            raise Refused(f"there are {len(task.completion_ids)} responses; a ranking may name only these")
        ranking = Ranking(
            prompt_id=task.prompt_id,
            groups=tuple(tuple(task.completion_ids[place] for place in group) for group in body.groups),
            annotator=body.lead,
            kind="human",
            rationale=body.rationale,
        )
        return {"stored": store.adjudicate(ranking, task.collection, body.key, task=task.id)}

    @app.get("/api/export")
    def export(request: Request, name: str = "") -> PlainTextResponse:
        """Return a collection's rankings as JSON Lines, adjudicated ones as decided."""
        access.require(request, "lead")
        name = chosen(name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rankings.jsonl"
            store.export_jsonl(path, name)
            text = path.read_text(encoding="utf-8")
        headers = {"content-disposition": 'attachment; filename="rankings.jsonl"'}
        return PlainTextResponse(text, media_type="application/x-ndjson", headers=headers)


def _collections(store: Store, only: str | None) -> list[str]:
    """Return the names of the collections that may be reviewed here, the newest last."""
    return [name for name in store.collections() if only in (None, name)]


def _flags(store: Store, name: str) -> list[dict[str, Any]]:
    return [
        {"text": store.completion(row["completion_id"]).text, "annotator": row["annotator"], "reason": row["reason"]}
        for row in store.flags(name)
    ]


def _readable(store: Store, tasks: dict[tuple[str, frozenset[str]], Task], item: dict[str, Any]) -> dict[str, Any]:
    """Return a disputed item with its words, and its rankings as places among the responses."""
    named = frozenset(name for group in item["rankings"][0]["groups"] for name in group)
    task = tasks[item["prompt_id"], named]
    ids = task.completion_ids
    completions = store.completions(ids)
    return {
        "task": task.id,
        "agreement": item["agreement"],
        "messages": [each | {"tree": tree(each["content"])} for each in store.prompt(task.prompt_id).as_dicts()],
        "responses": [{"text": completions[name].text, "tree": tree(completions[name].text)} for name in ids],
        "rankings": [
            {"annotator": r["annotator"], "groups": [[ids.index(name) for name in group] for group in r["groups"]]}
            for r in item["rankings"]
        ],
    }
