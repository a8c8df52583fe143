"""The application: the page, the next task, and what an annotator answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, select_autoescape
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from trivium.apps.rank.security import HEADERS, LOOPBACK, Guard
from trivium.config import DiskFull, UserError
from trivium.preferences.assign import next_task, order_shown
from trivium.preferences.store import AlreadyJudged, Refused, Store, Task, UnknownTask
from trivium.records import Demonstration, Ranking

FOLDER = Path(__file__).parent
KIND: Final = "human"
"""Whoever answers on this page is a person: no field of a request can say otherwise."""

DAY_S = 86_400.0

Name = Annotated[str, Field(min_length=1, max_length=100)]
Identifier = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[0-9a-zA-Z_-]+$")]
Text = Annotated[str, Field(max_length=200_000)]


class AsciiJSONResponse(JSONResponse):
    r"""JSON with `\u` escapes: model output may hold lone surrogates, which no UTF-8 body can."""

    def render(self, content: Any) -> bytes:
        """Return the content as ASCII bytes."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


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


class DemonstrationBody(Body):
    """The ideal response, written by the annotator."""

    response: Annotated[Text, Field(min_length=1)]


def create_app(
    store: Store,
    *,
    collection: str | None = None,
    annotator: str = "",
    hosts: Sequence[str] | None = LOOPBACK,
) -> FastAPI:
    """Return the application over `store`, asking about the tasks of one collection (None: all).

    `annotator` is the name the page starts with; `hosts` the host names it answers to (None: any).
    """
    app = FastAPI(title="Trivium rank", docs_url=None, redoc_url=None, default_response_class=AsciiJSONResponse)
    app.add_middleware(Guard, hosts=hosts)
    app.mount("/static", StaticFiles(directory=FOLDER / "static"), name="static")
    templates = Environment(loader=FileSystemLoader(FOLDER / "templates"), autoescape=select_autoescape())
    page = templates.get_template("rank.html")
    _explain_errors(app)
    _take_answers(app, store, collection)

    @app.get("/", response_class=HTMLResponse)
    def show_page() -> str:
        """Return the page; everything in it comes from the calls below."""
        return page.render(annotator=annotator, collection=collection)

    @app.get("/api/session")
    def session(request: Request) -> dict[str, str]:
        """Return the token to be sent with every answer."""
        return {"token": request.state.csrf_token}

    @app.get("/api/task")
    def task(annotator: Name) -> dict[str, Any]:
        """Return the next task for an annotator (null when none is left) and how far they are."""
        found, left = next_task(store, annotator, collection=collection, kind=KIND)
        progress = store.progress(collection, KIND, annotator)
        return {
            "task": None if found is None else _shown(store, found, annotator),
            "progress": {
                "done": progress.done,
                "left": left,
                "skipped": progress.skips,
                "tasks": progress.tasks,
                "mean_seconds": progress.mean_seconds,
            },
        }

    return app


def _take_answers(app: FastAPI, store: Store, collection: str | None) -> None:
    """Add the calls that store something."""

    @app.post("/api/rank")
    def rank(body: RankingBody) -> dict[str, bool]:
        """Store a ranking; `stored` is false for a repeat of one that is there."""
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
        return {"stored": store.submit(ranking, task.collection, body.key, task=task.id)}

    @app.post("/api/skip")
    def skip(body: SkipBody) -> dict[str, bool]:
        """Store that an annotator passes on a task."""
        task = _task(store, body.task, collection)
        return {"stored": store.skip(task.id, body.annotator, KIND, body.reason)}

    @app.post("/api/demonstration")
    def demonstrate(body: DemonstrationBody) -> dict[str, bool]:
        """Store the ideal response that an annotator wrote."""
        prompt = store.prompt(_task(store, body.task, collection).prompt_id)
        ideal = Demonstration(prompt=prompt, response=body.response, annotator=body.annotator)
        return {"stored": store.add_demonstration(ideal)}


def _task(store: Store, identifier: str, collection: str | None) -> Task:
    task = store.task(identifier, kind=KIND)
    if collection is not None and task.collection != collection:
        raise UnknownTask(f"task {identifier!r} is not among those asked here; reload the page")
    return task


def _shown(store: Store, task: Task, annotator: str) -> dict[str, Any]:
    """Return what the annotator may see: texts in their order, nothing of who wrote them."""
    completions = store.completions(task.completion_ids)
    shown = [completions[name] for name in order_shown(task, annotator)]
    return {
        "id": task.id,
        "messages": store.prompt(task.prompt_id).as_dicts(),
        "responses": [{"text": each.text, "cut_off": each.finish_reason == "length"} for each in shown],
    }


def _explain_errors(app: FastAPI) -> None:
    """Make every failure JSON with one clear sentence."""

    def answer(status: int, code: str, sentence: str) -> AsciiJSONResponse:
        return AsciiJSONResponse({"error": {"code": code, "message": sentence}}, status_code=status)

    @app.exception_handler(UserError)
    async def explain_ours(_request: Request, error: UserError) -> AsciiJSONResponse:
        if isinstance(error, UnknownTask):
            return answer(404, "unknown_task", str(error))
        if isinstance(error, AlreadyJudged):
            return answer(409, "already_judged", str(error))
        if isinstance(error, Refused):
            return answer(422, "refused", str(error))
        return answer(507 if isinstance(error, DiskFull) else 503, "storage", str(error))

    @app.exception_handler(RequestValidationError)
    async def explain_fields(_request: Request, error: RequestValidationError) -> AsciiJSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part not in ("body", "query")) or "the request"
        return answer(422, "invalid", f"{field}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def explain_http(_request: Request, error: HTTPException) -> AsciiJSONResponse:
        return answer(error.status_code, "http", f"{error.detail}; the page is at /")

    @app.exception_handler(Exception)
    async def explain_fault(_request: Request, _error: Exception) -> AsciiJSONResponse:
        fault = answer(500, "fault", "the server made a mistake; nothing was stored, the reason is in its terminal")
        fault.headers.update(HEADERS)  # This handler stands outside the Guard.
        return fault
