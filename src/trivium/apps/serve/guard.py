"""What stands before every request: size, origin and headers. Plain ASGI, so that streams pass unbuffered."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trivium.apps.serve.api import ApiError

MAX_BODY_BYTES = 1 << 20
BODY_TIMEOUT_S = 20.0
"""How long a client may take to send its body."""

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Guard:
    """ASGI middleware: 413 for a large body, 408 for a slow one, 403 for a page of another origin, and HEADERS."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused, pass on the rest with its body read."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            refuse_foreign(Headers(scope=scope))
            body = await asyncio.wait_for(read_body(receive), BODY_TIMEOUT_S)
        except TimeoutError:
            await answer(
                send_with_headers, ApiError(408, f"the body took longer than {BODY_TIMEOUT_S:.0f} s to arrive")
            )
        except ApiError as error:
            await answer(send_with_headers, error)
        else:
            if body is not None:
                await self.app(scope, _replay(body, receive), send_with_headers)


def refuse_foreign(headers: Headers) -> None:
    """Raise ApiError 403 when a browser says that the request comes from a page of another origin."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        raise ApiError(403, "requests from pages of another origin are refused", code="cross_origin")


async def read_body(receive: Receive) -> bytes | None:
    """Return the whole body, or None when the client left; raises ApiError 413 as soon as it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="request_too_large")
        if not message.get("more_body", False):
            return bytes(body)


async def answer(send: Send, error: ApiError) -> None:
    """Send an error in OpenAI's shape; the connection ends, as the rest of the body was not read."""
    headers = {"content-type": "application/json", "connection": "close", **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once and then what really comes (the disconnect)."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message
