"""What stands before every request of the ranking page: host, size, origin, token, headers.

Who may answer is `access`'s business. These checks keep *other web pages* in the annotator's browser from reading or
posting judgements: Host against DNS rebinding, Origin and a token against cross-site requests, a strict
Content-Security-Policy against scripts hidden in model output.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 1_000_000
COOKIE = "trivium_rank"
TOKEN_HEADER = "x-csrf-token"
LOOPBACK = ("localhost", "127.0.0.1", "::1")

HEADERS = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


class Guard:
    """An ASGI layer that lets only well-formed requests of our own pages through, with the reason for a refusal.

    `hosts` are the names under which the page may be asked for; None means any.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None = LOOPBACK) -> None:
        """Wrap `app`; tokens are valid as long as this process lives (the page fetches a new one by itself)."""
        self.app = app
        self.hosts = None if hosts is None else frozenset(hosts)
        self.secret = secrets.token_bytes(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the request, hand it on, and add the security headers to whatever is answered."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        session = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        is_new = len(session) != 64
        if is_new:
            session = secrets.token_hex(32)
        scope.setdefault("state", {})["csrf_token"] = self.token(session)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answer[name] = value
                if is_new:
                    answer.append("set-cookie", f"{COOKIE}={session}; Path=/; HttpOnly; SameSite=Strict")
            await send(message)

        refusal = self._refusal(scope["method"], headers, "" if is_new else session)
        body = b""
        if refusal is None and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            body, refusal = await _read(headers, receive)
        if refusal is not None:
            await _refuse(send_with_headers, *refusal)
            return
        consumed = False

        async def replay() -> Message:
            nonlocal consumed
            if consumed:
                return await receive()
            consumed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send_with_headers)

    def token(self, session: str) -> str:
        """Return the token that a page must send along with what it posts in this session."""
        return hmac.new(self.secret, session.encode(), hashlib.sha256).hexdigest()

    def _refusal(self, method: str, headers: Headers, session: str) -> tuple[int, str, str] | None:
        host = headers.get("host", "")
        if self.hosts is not None and _hostname(host) not in self.hosts:
            return (
                421,
                "host",
                f"this page is not served under the name {host[:80]!r}; open it as http://127.0.0.1:PORT",
            )
        if method in ("GET", "HEAD", "OPTIONS"):
            return None
        if urlsplit(headers.get("origin", "")).netloc != host:
            return 403, "origin", "only the ranking page itself may send judgements; open it and send from there"
        given = headers.get(TOKEN_HEADER, "")
        if not session or not hmac.compare_digest(given.encode(), self.token(session).encode()):
            return 403, "token", "the page's token is missing or out of date; reload the page"
        return None


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def _read(headers: Headers, receive: Receive) -> tuple[bytes, tuple[int, str, str] | None]:
    """Return the body, or the refusal of one over the limit, of which no more than the limit is ever held."""
    too_large = (413, "size", f"a request may have at most {MAX_BODY_BYTES:,} bytes; send a shorter text")
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or int(length) > MAX_BODY_BYTES:
        return b"", too_large
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return b"", too_large
        if not message.get("more_body", False):
            return body, None


async def _refuse(send: Send, status: int, code: str, sentence: str) -> None:
    body = json.dumps({"error": {"code": code, "message": sentence}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
