"""The dashboard's web server: pages, a read-only JSON API, and server-sent events that follow running stages."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, HTMLResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trivium.apps.dashboard.snapshot import Snapshot
from trivium.apps.dashboard.tail import Tail
from trivium.config import UserError

HERE = Path(__file__).parent

LOOPBACK = ("127.0.0.1", "localhost", "::1")

EMPTY_STYLE = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
"""The hash of no text: Plotly makes an empty style element and fills it by script, which needs no 'unsafe-inline'."""

HEADERS = {
    "Content-Security-Policy": f"default-src 'self'; style-src 'self' {EMPTY_STYLE}; img-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class SecurityHeaders:
    """ASGI middleware that puts HEADERS on every response (a streaming one is not buffered by it)."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and add the headers to the response's start."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_with_headers)


def create_app(workspace: Path, *, poll_s: float = 0.5) -> FastAPI:
    """Return the dashboard of a workspace; it looks for news every `poll_s` seconds while a page is open."""
    app = FastAPI(title="Trivium dashboard", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(SecurityHeaders)
    # Set when the server is to end: the event streams, which never end by themselves, then do.
    app.state.closing = closing = threading.Event()
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    templates = Jinja2Templates(directory=HERE / "templates")
    snapshot = Snapshot(workspace)

    def page(request: Request, view: str, run_id: str = "", title: str = "") -> HTMLResponse:
        context = {"view": view, "run_id": run_id, "title": title, "workspace": snapshot.workspace.name}
        return templates.TemplateResponse(request, "page.html", context)

    @app.get("/")
    def overview_page(request: Request) -> HTMLResponse:
        return page(request, "overview", title="Overview")

    @app.get("/results")
    def results_page(request: Request) -> HTMLResponse:
        return page(request, "results", title="Results")

    @app.get("/runs/{run_id}")
    def run_page(request: Request, run_id: str) -> HTMLResponse:
        found = snapshot.find(run_id)
        if found is None:
            raise HTTPException(404, "no such run in this workspace")
        return page(request, "run", run_id=run_id, title=found[1].table)

    @app.get("/api/overview")
    def overview() -> Response:
        return _json(snapshot.overview())

    @app.get("/api/runs/{run_id}")
    def run(run_id: str) -> Response:
        found = snapshot.run(run_id)
        if found is None:
            raise HTTPException(404, "no such run in this workspace")
        return _json(found)

    @app.get("/vendor/plotly.min.js")
    def plotly() -> FileResponse:
        path = plotly_script()
        if path is None:
            raise HTTPException(404, "the plotly package is not installed; pip install 'trivium[web]'")
        return FileResponse(path, media_type="text/javascript", headers={"Cache-Control": "max-age=86400"})

    @app.get("/events/stream")
    def stream(request: Request, run: str = "", cursor: str = "") -> StreamingResponse:
        # A browser that reconnects says how far it got; that beats what the page's address said at first.
        cursor = request.headers.get("last-event-id", cursor) if run else ""
        events = _follow(snapshot, run, cursor, poll_s, closing)
        return StreamingResponse(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    return app


def serve(workspace: Path, host: str = "127.0.0.1", port: int = 8010) -> None:
    """Serve the dashboard of `workspace` until Ctrl-C; raises UserError when the port is taken."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); name another --host or --port") from None
    app = create_app(workspace)
    if host in LOOPBACK:
        # A foreign page that points its own name at 127.0.0.1 must not read the user's runs.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", "::1"])
    print(f"dashboard of {workspace}: http://{host}:{port} (Ctrl-C ends it)", flush=True)
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=3)
    # Uvicorn gives Ctrl-C on once it has closed everything.
    with contextlib.suppress(KeyboardInterrupt):
        _Server(config, app.state.closing).run()


class _Server(uvicorn.Server):
    """Uvicorn that tells the event streams to end when it is told to."""

    def __init__(self, config: uvicorn.Config, closing: threading.Event) -> None:
        super().__init__(config)
        self.closing = closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.closing.set()
        super().handle_exit(sig, frame)


def plotly_script() -> Path | None:
    """Return the path of the plotly.min.js that comes with the installed plotly package, or None without one."""
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "package_data" / "plotly.min.js"
    return path if path.is_file() else None


async def _follow(
    snapshot: Snapshot, run_id: str, cursor: str, poll_s: float, closing: threading.Event
) -> AsyncIterator[str]:
    """Yield server-sent events: `overview` when a run starts or changes, `events` for what running stages log.

    With `run_id`, only that run's events, from `cursor` on.
    """
    tails: dict[Path, Tail] = {}
    before = ""
    silent_s = 0.0
    yield "retry: 1000\n\n"
    while not closing.is_set():
        messages, before = await asyncio.to_thread(_news, snapshot, run_id, cursor, tails, before)
        for message in messages:
            yield message
        silent_s = 0.0 if messages else silent_s + poll_s
        if silent_s > 15:
            # A comment now and then lets a closed connection be noticed.
            silent_s = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(poll_s)


def _news(snapshot: Snapshot, run_id: str, cursor: str, tails: dict[Path, Tail], before: str) -> tuple[list[str], str]:
    """Return the messages due now and the state of the manifests they reflect; `tails` is brought up to date."""
    messages = []
    runs = snapshot.runs()
    state = repr([(m.run_id, m.status, m.finished_at, m.started_at) for _, m in runs])
    if state != before:
        messages.append(f"event: overview\ndata: {_dump(snapshot.overview())}\n\n")
    for folder, manifest in runs:
        wanted = manifest.run_id == run_id if run_id else manifest.status == "running" or folder in tails
        if not wanted:
            continue
        if folder not in tails:
            # On the overview a run that starts while the page is open is followed from its first line.
            start = cursor if run_id else None if not before else ""
            tails[folder] = snapshot.tail(folder, start)
        rows, cut = tails[folder].read()
        if rows or cut:
            body = {"run_id": manifest.run_id, "cut": cut, "events": rows}
            number = f"id: {tails[folder].cursor}\n" if run_id else ""
            messages.append(f"{number}event: events\ndata: {_dump(body)}\n\n")
    return messages, state


def _json(data: Any) -> Response:
    return Response(_dump(data).encode("utf-8", "replace"), media_type="application/json")


def _dump(data: Any) -> str:
    # Lone surrogates from users' files cannot be sent as UTF-8.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8", "replace").decode("utf-8")
