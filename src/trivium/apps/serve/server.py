"""The web server: OpenAI's routes over the engine, and the chat page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from trivium.apps.serve.api import Answer, ApiError, Sampling, parse_chat, parse_completion
from trivium.apps.serve.engine import Busy, Engine, Job, Piece, Served, load
from trivium.apps.serve.guard import Guard
from trivium.apps.serve.prompt import BASE_STOP, budget, chat_prompt, completion_prompt
from trivium.config import UserError
from trivium.records import RunManifest
from trivium.runs.registry import latest_runs, model_folder

HERE = Path(__file__).parent
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DEADLINE_S = 120.0
"""The longest that a request may take, waiting in line included."""

DRAIN_S = 5.0
"""How long running answers may go on after SIGTERM or Ctrl-C."""

ORDER = ("pretrain", "sft", "dpo", "ppo", "grpo", "rejection_sampling", "constitutional_ai", "adapt", "export")
"""The stages that leave a model to talk to, in the order in which they are put side by side."""


class Shop:
    """The models on offer and the engine that runs them."""

    def __init__(self, models: dict[str, Path], engine: Engine, deadline_s: float) -> None:
        """Load every model; raises UserError for a folder that holds none."""
        self.served = {name: load(name, folder) for name, folder in models.items()}
        self.engine = engine
        self.deadline_s = deadline_s

    def find(self, name: str) -> Served:
        """Return a model by name; raises ApiError 404."""
        if name not in self.served:
            known = ", ".join(self.served)
            raise ApiError(404, f"no model {name[:200]!r}; there are: {known}", code="model_not_found", param="model")
        return self.served[name]

    def describe(self, served: Served) -> dict[str, Any]:
        """Return OpenAI's description of a model; under "trivium" what the chat page shows."""
        own = {"kind": served.kind, "stage": served.stage, "run_id": served.run_id, "context": served.context}
        return {"id": served.name, "object": "model", "created": 0, "owned_by": "trivium", "trivium": own}

    def start(
        self, request: Sampling, served: Served, prompt: list[int], stop: tuple[str, ...], listed: int | None = None
    ) -> Job:
        """Return a job that is in line; raises ApiError 429 or 503 when there is no room."""
        wanted = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        seed = secrets.randbits(62) if request.seed is None else request.seed % 2**63
        job = Job(
            served=served,
            prompt=prompt,
            max_tokens=budget(served, prompt, wanted),
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=seed,
            stop=stop,
            top_logprobs=None if listed is None else min(listed, served.model.config.vocab_size),
        )
        try:
            self.engine.submit(job)
        except Busy as busy:
            status, code = (503, "shutting_down") if busy.closing else (429, "rate_limit_exceeded")
            raise ApiError(status, str(busy), code=code, retry_after_s=1) from None
        return job


def create_app(models: dict[str, Path], *, engine: Engine | None = None, deadline_s: float = DEADLINE_S) -> FastAPI:
    """Return the server of these models (name to Hugging Face folder), loaded; raises UserError when one cannot be."""
    shop = Shop(models, engine or Engine(), deadline_s)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(shop.engine.close)

    app = FastAPI(title="Trivium", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.shop = shop
    app.add_middleware(Guard)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    _add_routes(app, shop)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> Response:
        body = ApiError(
            error.status_code, str(error.detail), code="not_found" if error.status_code == 404 else ""
        ).body()
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> Response:
        return JSONResponse(ApiError(500, "the server failed; its log says why").body(), status_code=500)

    return app


def _add_routes(app: FastAPI, shop: Shop) -> None:
    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(HERE / "static" / "chat.html")

    @app.get("/healthz")
    def health() -> dict[str, Any]:
        running, waiting = shop.engine.load
        return {"status": "ok", "running": running, "waiting": waiting}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [shop.describe(served) for served in shop.served.values()]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        return shop.describe(shop.find(name))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        wanted = parse_chat(await request.body())
        served = shop.find(wanted.model)
        messages = [message.plain() for message in wanted.messages]
        prompt = await asyncio.to_thread(chat_prompt, served, messages)
        stop = wanted.stops() + ((BASE_STOP,) if served.kind == "base" else ())
        job = shop.start(wanted, served, prompt, stop, wanted.wanted_logprobs())
        return await _respond(request, wanted, shop, job, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        wanted = parse_completion(await request.body())
        served = shop.find(wanted.model)
        prompt = await asyncio.to_thread(completion_prompt, served, wanted.text())
        return await _respond(request, wanted, shop, shop.start(wanted, served, prompt, wanted.stops()), chat=False)


async def _respond(request: Request, wanted: Sampling, shop: Shop, job: Job, *, chat: bool) -> Response:
    answer = Answer(job.served.name, len(job.prompt), chat=chat)
    pieces = _pieces(job, shop.deadline_s)
    if wanted.stream:
        usage = wanted.stream_options is not None and wanted.stream_options.include_usage
        events = _events(request, job, pieces, answer, usage=usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
    return await _whole(request, job, pieces, answer)


async def _pieces(job: Job, deadline_s: float) -> AsyncIterator[Piece]:
    """Yield the job's pieces; raises ApiError when it fails, and in any case leaves no job behind."""
    end = time.monotonic() + deadline_s
    try:
        while True:
            try:
                piece = await asyncio.wait_for(job.pieces.get(), end - time.monotonic())
            except TimeoutError:
                raise ApiError(
                    504, f"no end of the answer within {deadline_s:.0f} s", code="deadline_exceeded"
                ) from None
            if piece.reason == "error":
                raise ApiError(500, "the model failed on this request; the server's log says why", code="model_error")
            if piece.reason == "shutdown":
                raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=1)
            yield piece
            if piece.reason is not None:
                return
    finally:
        job.cancel()


async def _whole(request: Request, job: Job, pieces: AsyncIterator[Piece], answer: Answer) -> Response:
    """Wait for the whole answer, or for the client to go away, whichever comes first."""

    async def collect() -> Response:
        text = ""
        async for piece in pieces:
            text += piece.text
        return JSONResponse(answer.whole(text, piece.reason or "stop", piece.tokens, piece.listed))

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.create_task(collect()), asyncio.create_task(gone())
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else Response(status_code=499)
    finally:
        job.cancel()
        left.cancel()
        work.cancel()


async def _events(
    request: Request, job: Job, pieces: AsyncIterator[Piece], answer: Answer, *, usage: bool
) -> AsyncIterator[str]:
    """Yield the answer as server-sent events; a failure midway becomes an event, as the status is already sent."""
    try:
        if answer.chat:
            yield _event(answer.chunk(first=True))
        async for piece in pieces:
            if await request.is_disconnected():
                return
            if piece.text:
                yield _event(answer.chunk(piece.text))
            if piece.reason is not None:
                yield _event(answer.chunk(reason=piece.reason))
        if usage:
            yield _event(answer.last(job.drawn))
    except ApiError as error:
        yield _event(error.body())
    finally:
        job.cancel()
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class _Server(uvicorn.Server):
    """Uvicorn that lets running answers end: with their own end, or after DRAIN_S with a reason."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.engine.drain(DRAIN_S)
        super().handle_exit(sig, frame)


def find_models(workspace: Path, references: tuple[str, ...] = ()) -> dict[str, Path]:
    """Return name and folder of the models named by Refs, or of the newest language model of every table.

    Raises ConfigError for a Ref that names nothing, UserError when there is no model at all.
    """
    if references:
        names = [r.partition("@")[0].rstrip("/").rpartition("/")[2] for r in references]
        # Two that would share a short name keep their whole reference.
        return {
            name if names.count(name) == 1 else reference: model_folder(workspace, reference)
            for name, reference in zip(names, references, strict=True)
        }

    def place(item: tuple[str, tuple[Path, RunManifest]]) -> int:
        stage = item[1][1].stage
        return ORDER.index(stage) if stage in ORDER else len(ORDER)

    runs = sorted(latest_runs(workspace).items(), key=place)
    found = {table: folder / "model" for table, (folder, _) in runs if _is_language_model(folder / "model")}
    if not found:
        raise UserError(
            f"no finished model in {workspace} yet; run `trivium run` first, or name a folder with --models"
        )
    return found


def _is_language_model(folder: Path) -> bool:
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    except (OSError, ValueError):
        return False
    return str(architectures[0]).endswith("ForCausalLM")


def serve(workspace: Path, models: tuple[str, ...] = (), host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve models of `workspace` (Refs; by default the newest of every table) until SIGTERM or Ctrl-C.

    Raises UserError when a model or the port is not to be had.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); name another --host or --port") from None
    engine = Engine()
    app = create_app(find_models(workspace, models), engine=engine)
    if host in LOOPBACK:
        # A foreign page that points its own name at 127.0.0.1 must not talk to the user's models.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", "::1"])
    else:
        print(f"note: {host} can be reached from other machines, and this server asks nobody for a key", flush=True)
    names = ", ".join(app.state.shop.served)
    print(
        f"serving {names}\nchat page http://{host}:{port}/  API http://{host}:{port}/v1  (Ctrl-C ends it)", flush=True
    )
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=round(DRAIN_S) + 2,
        timeout_keep_alive=10,
    )
    # Uvicorn gives Ctrl-C on once it has closed everything.
    with contextlib.suppress(KeyboardInterrupt):
        _Server(config, engine).run()
