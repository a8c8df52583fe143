"""Who is asking: anybody under any name on one's own machine, people with an account everywhere else.

An account is opened by an invitation's link. Its token stands behind the `#`, which a browser sends to no server and
writes into no log; the page posts it once and gets a session's cookie, made afresh, that no script can read.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from trivium.config import UserError
from trivium.preferences.store.people import NotInvited, People, Person, Role

COOKIE = "trivium_person"
MAX_FAILURES = 10
"""Wrong tokens from one address, within `LOCK_S` seconds, before it has to wait."""
LOCK_S = 600.0
MAX_ADDRESSES = 10_000
"""Addresses that are remembered: an attacker with many must not fill the memory."""


class Denied(UserError):
    """A request that its sender may not make."""

    def __init__(self, status: int, code: str, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        """Carry the answer's status, code and extra headers."""
        super().__init__(sentence)
        self.status, self.code, self.headers = status, code, dict(headers or {})


class JoinBody(BaseModel):
    """An invitation's token."""

    model_config = ConfigDict(extra="forbid", strict=True)

    token: Annotated[str, Field(min_length=1, max_length=200)]


class Failures:
    """Counts wrong tokens by address."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with none."""
        self._clock = clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def check(self, address: str) -> None:
        """Raise Denied (429) while an address has failed too often."""
        times = self._times.get(address)
        now = self._clock()
        while times and times[0] <= now - LOCK_S:
            times.popleft()
        if times and len(times) >= MAX_FAILURES:
            wait = int(times[0] + LOCK_S - now) + 1
            raise Denied(
                429, "locked", f"too many wrong links from here; try again in {wait} s", {"retry-after": str(wait)}
            )

    def note(self, address: str) -> None:
        """Count one more."""
        self._times.setdefault(address, deque(maxlen=MAX_FAILURES)).append(self._clock())
        self._times.move_to_end(address)
        while len(self._times) > MAX_ADDRESSES:
            self._times.popitem(last=False)


class Access:
    """Decides who may do what; without `people` everybody may answer, under the name they give."""

    def __init__(self, people: People | None) -> None:
        """Ask `people` for accounts."""
        self.people = people
        self.failures = Failures()

    def person(self, request: Request) -> Person | None:
        """Return who is signed in; raises Denied (429) where too many wrong sessions were tried.

        A session that is valid is never locked out by what others behind the same address do.
        """
        session = request.cookies.get(COOKIE, "")
        found = self.people.whose(session) if self.people is not None else None
        if self.people is not None and session and found is None:
            self.failures.check(_address(request))
            self.failures.note(_address(request))
        return found

    def check(self, request: Request, annotator: str) -> None:
        """Raise Denied unless the request may answer under this name: 401 without a session, 403 for another's."""
        if self.people is None:
            return
        person = self.person(request)
        if person is None:
            raise Denied(401, "signed_out", "you are not signed in; open your invitation's link, or ask for a new one")
        if person.name != annotator:
            raise Denied(403, "not_yours", f"you are signed in as {person.name} and can answer under that name alone")

    def require(self, request: Request, role: Role) -> None:
        """Raise Denied unless whoever asks has at least this role; on one's own machine everybody has."""
        if self.people is None:
            return
        person = self.person(request)
        if person is None:
            raise Denied(401, "signed_out", "you are not signed in; open your invitation's link, or ask for a new one")
        if not person.may(role):
            raise Denied(403, "role", f"this is for a {role}; you are signed in as {person.role}")

    def add_to(self, app: FastAPI) -> None:
        """Add the calls by which a page learns who is there, and people come and go."""

        @app.get("/api/session")
        def session(request: Request, response: Response) -> dict[str, Any]:
            """Return the token to be sent with every answer, whether accounts are needed, and who is signed in."""
            person = self.person(request)
            if person is None and COOKIE in request.cookies:  # out of date: not to be tried again and again
                response.delete_cookie(COOKIE, httponly=True, samesite="strict")
            found = None if person is None else {"name": person.name, "role": person.role}
            return {"token": request.state.csrf_token, "accounts": self.people is not None, "person": found}

        @app.post("/api/join")
        def join(body: JoinBody, request: Request, response: Response) -> dict[str, str]:
            """Use an invitation up and sign its person in."""
            if self.people is None:
                raise Denied(404, "no_accounts", "this page has no accounts; simply give your name")
            address = _address(request)
            self.failures.check(address)
            try:
                session, person = self.people.accept(body.token)
            except NotInvited as error:
                self.failures.note(address)
                raise Denied(401, "not_invited", str(error)) from None
            secure = request.url.scheme == "https"
            response.set_cookie(COOKIE, session, max_age=30 * 86_400, httponly=True, samesite="strict", secure=secure)
            return {"name": person.name, "role": person.role}

        @app.post("/api/leave")
        def leave(request: Request, response: Response) -> dict[str, bool]:
            """End this session."""
            if self.people is not None:
                self.people.sign_out(request.cookies.get(COOKIE, ""))
            response.delete_cookie(COOKIE, httponly=True, samesite="strict")
            return {"left": True}


def _address(request: Request) -> str:
    return request.client.host if request.client else ""
