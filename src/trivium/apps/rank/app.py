"""The application: the page, the next task, and what an annotator answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, select_autoescape
from pydantic import BaseModel, ConfigDict, Field

from trivium.apps.rank.access import Access
from trivium.apps.rank.failures import AsciiJSONResponse, explain_errors
from trivium.apps.rank.markup import tree
from trivium.apps.rank.review import add_review
from trivium.apps.rank.security import LOOPBACK, Guard
from trivium.preferences.assign import next_task, order_shown
from trivium.preferences.qualification import shut_out
from trivium.preferences.store import People, Refused, Store, Task, UnknownTask
from trivium.records import Demonstration, Ranking

FOLDER = Path(__file__).parent
KIND: Final = "human"
"""Whoever answers on this page is a person: no field of a request can say otherwise."""

FETCHES = 2
"""Tasks looked up at a time; the others wait, so that whoever has answered does not stand behind all who want more."""

DAY_S = 86_400.0

Name = Annotated[str, Field(min_length=1, max_length=100)]
Identifier = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[0-9a-zA-Z_-]+$")]
Text = Annotated[str, Field(max_length=200_000)]


class Body(BaseModel):
    """What every answer says: which task, and who."""

    model_config = ConfigDict(extra="forbid", strict=True)

    task: Identifier
    annotator: Name


class RankingBody(Body):
    """A ranking: `groups` holds places on the screen, counted from 0, best first; a tie shares a group."""

    groups: Annotated[list[Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)]], Field(max_length=64)]
    none_acceptable: bool = False
    rationale: Annotated[str, Field(max_length=20_000)] = ""
    seconds: Annotated[float, Field(ge=0, le=DAY_S)] = 0.0
    key: Identifier


class SkipBody(Body):
    """A task passed over, and why."""

    reason: Annotated[str, Field(min_length=1, max_length=2_000)]


class FlagBody(Body):
    """A response that somebody finds harmful: its place on the screen, and why."""

    response: Annotated[int, Field(ge=0, le=64)]
    reason: Annotated[str, Field(max_length=2_000)] = ""


class DemonstrationBody(Body):
    """The ideal response, written by the annotator."""

    response: Annotated[Text, Field(min_length=1)]
    edited: Annotated[int, Field(ge=0, le=64)] | None = None
    """The place on the screen of the response that was edited; none was when it is left out."""


def create_app(
    store: Store,
    *,
    collection: str | None = None,
    annotator: str = "",
    hosts: Sequence[str] | None = LOOPBACK,
    accounts: bool = False,
) -> FastAPI:
    """Return the application over `store`, asking about the tasks of one collection (None: all).

    `annotator` is the name the page starts with; `hosts` the host names it answers to (None: any). With `accounts`
    only those may answer who came by an invitation, each under their own name.
    """
    fetching = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")

    @asynccontextmanager
    async def closing(_: FastAPI) -> AsyncIterator[None]:
        yield
        fetching.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="Trivium rank", lifespan=closing, docs_url=None, redoc_url=None, default_response_class=AsciiJSONResponse
    )
    app.add_middleware(Guard, hosts=hosts)
    app.mount("/static", StaticFiles(directory=FOLDER / "static"), name="static")
    templates = Environment(loader=FileSystemLoader(FOLDER / "templates"), autoescape=select_autoescape())
    page = templates.get_template("rank.html")
    explain_errors(app)
    access = Access(People(store) if accounts else None)
    access.add_to(app)
    _take_answers(app, store, access, collection)
    add_review(app, store, access, templates.get_template("review.html"), collection)

    @app.get("/", response_class=HTMLResponse)
    def show_page() -> str:
        """Return the page; everything in it comes from the calls below."""
        return page.render(annotator=annotator, collection=collection)

    @app.get("/api/task", response_model=dict[str, Any])
    async def task(annotator: Name, request: Request) -> AsciiJSONResponse:
        """Return the next task for an annotator, kept for them a while (null: none is left), and how far they are."""
        await run_in_threadpool(access.check, request, annotator)
        return await asyncio.get_running_loop().run_in_executor(fetching, _next, store, collection, annotator)

    return app


def _next(store: Store, collection: str | None, annotator: str) -> AsciiJSONResponse:
    found, left = next_task(store, annotator, collection=collection, kind=KIND)
    progress = store.progress(collection, KIND, annotator)
    answer = {
        "task": None if found is None else _shown(store, found, annotator),
        "shut": found is None and bool(shut_out(store, annotator, collection, KIND)),
        "progress": {
            "done": progress.done,
            "left": left,
            "skipped": progress.skips,
            "tasks": progress.tasks,
            "mean_seconds": progress.mean_seconds,
        },
    }
    return AsciiJSONResponse(answer)


def _take_answers(app: FastAPI, store: Store, access: Access, collection: str | None) -> None:
    """Add the calls that store something."""

    @app.post("/api/rank")
    def rank(body: RankingBody, request: Request) -> dict[str, bool]:
        """Store a ranking; `stored` is false for a repeat of one that is there."""
        access.check(request, body.annotator)
        task = _task(store, body.task, collection)
        shown = order_shown(task, body.annotator)
        if any(place >= len(shown) for group in body.groups for place in group):
            raise Refused(f"there are {len(shown)} responses; a ranking may name only these")
        ranking = Ranking(
            prompt_id=task.prompt_id,
            groups=tuple(tuple(shown[place] for place in group) for group in body.groups),
            annotator=body.annotator,
            kind=KIND,
            none_acceptable=body.none_acceptable,
            rationale=body.rationale,
            seconds=body.seconds,
            order_shown=shown,
        )
        return {"stored": store.submit(ranking, task.collection, body.key, task=task.id, within_overlap=True)}

    @app.post("/api/skip")
    def skip(body: SkipBody, request: Request) -> dict[str, bool]:
        """Store that an annotator passes on a task."""
        access.check(request, body.annotator)
        task = _task(store, body.task, collection)
        return {"stored": store.skip(task.id, body.annotator, KIND, body.reason)}

    @app.post("/api/keep")
    def keep(body: Body, request: Request) -> dict[str, bool]:
        """Keep a task for the annotator who reads it; `kept` is false where its places were taken meanwhile."""
        access.check(request, body.annotator)
        task = _task(store, body.task, collection)
        return {"kept": store.lease([task], body.annotator, KIND) is not None}

    @app.post("/api/flag")
    def flag(body: FlagBody, request: Request) -> dict[str, bool]:
        """Store that an annotator finds a response harmful."""
        access.check(request, body.annotator)
        task = _task(store, body.task, collection)
        harmful = _shown_at(task, body.annotator, body.response)
        return {"stored": store.flag(task.id, harmful, body.annotator, body.reason)}

    @app.post("/api/demonstration")
    def demonstrate(body: DemonstrationBody, request: Request) -> dict[str, bool]:
        """Store the ideal response that an annotator wrote; made of another one, it is preferred to that one too."""
        access.check(request, body.annotator)
        task = _task(store, body.task, collection)
        if body.edited is not None:
            store.submit_edit(task, _shown_at(task, body.annotator, body.edited), body.response, body.annotator)
        prompt = store.prompt(task.prompt_id)
        ideal = Demonstration(prompt=prompt, response=body.response, annotator=body.annotator)
        return {"stored": store.add_demonstration(ideal)}


def _task(store: Store, identifier: str, collection: str | None) -> Task:
    task = store.task(identifier, kind=KIND)
    if collection is not None and task.collection != collection:
        raise UnknownTask(f"task {identifier!r} is not among those asked here; reload the page")
    return task


def _shown_at(task: Task, annotator: str, place: int) -> str:
    shown = order_shown(task, annotator)
    if place >= len(shown):
        raise Refused(f"there are {len(shown)} responses; name one of these")
    return shown[place]


def _shown(store: Store, task: Task, annotator: str) -> dict[str, Any]:
    """Return what the annotator may see: texts in their order, what is asked for, nothing of who wrote them."""
    completions = store.completions(task.completion_ids)
    shown = [completions[name] for name in order_shown(task, annotator)]
    messages = [each | {"tree": tree(each["content"])} for each in store.prompt(task.prompt_id).as_dicts()]
    responses = [
        {"text": each.text, "tree": tree(each.text), "cut_off": each.finish_reason == "length"} for each in shown
    ]
    told, _ = store.description(task.collection)
    instructions = {"text": told, "tree": tree(told)} if told else None
    return {"id": task.id, "messages": messages, "responses": responses, "instructions": instructions}
