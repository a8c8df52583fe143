"""Every failure as JSON with one clear sentence, and in the log what was refused."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from trivium.apps.rank.access import Denied
from trivium.apps.rank.security import HEADERS
from trivium.config import DiskFull, UserError
from trivium.preferences.store import AlreadyJudged, Full, Refused, UnknownTask

log = logging.getLogger(__name__)

ANSWERS: dict[type[UserError], tuple[int, str]] = {
    UnknownTask: (404, "unknown_task"),
    AlreadyJudged: (409, "already_judged"),
    Full: (409, "full"),
    Refused: (422, "refused"),
    DiskFull: (507, "storage"),
    UserError: (503, "storage"),
}
"""Status and code of what the store says; the first that fits, as its subclasses stand before it."""


class AsciiJSONResponse(JSONResponse):
    r"""JSON with `\u` escapes: model output may hold lone surrogates, which no UTF-8 body can."""

    def render(self, content: Any) -> bytes:
        """Return the content as ASCII bytes."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def explain_errors(app: FastAPI) -> None:
    """Make every failure of `app` JSON with one clear sentence."""

    def answer(request: Request, status: int, code: str, sentence: str) -> AsciiJSONResponse:
        # Never the body: it may hold what a person wrote, or a token.
        log.warning("%s %s refused: %d %s", request.method, request.url.path, status, code)
        return AsciiJSONResponse({"error": {"code": code, "message": sentence}}, status_code=status)

    @app.exception_handler(UserError)
    async def explain_ours(request: Request, error: UserError) -> AsciiJSONResponse:
        if isinstance(error, Denied):
            refusal = answer(request, error.status, error.code, str(error))
            refusal.headers.update(error.headers)
            return refusal
        status, code = next(found for kind, found in ANSWERS.items() if isinstance(error, kind))
        return answer(request, status, code, str(error))

    @app.exception_handler(RequestValidationError)
    async def explain_fields(request: Request, error: RequestValidationError) -> AsciiJSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part not in ("body", "query")) or "the request"
        return answer(request, 422, "invalid", f"{field}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def explain_http(request: Request, error: HTTPException) -> AsciiJSONResponse:
        return answer(request, error.status_code, "http", f"{error.detail}; the page is at /")

    @app.exception_handler(Exception)
    async def explain_fault(_request: Request, _error: Exception) -> AsciiJSONResponse:
        sentence = "the server made a mistake; nothing was stored, the reason is in its terminal"
        fault = AsciiJSONResponse({"error": {"code": "fault", "message": sentence}}, status_code=500)
        fault.headers.update(HEADERS)  # This handler stands outside the Guard.
        return fault
