"""Who may answer: people with a role, invited by a link, signed in by a session.

A token is 256 random bits, shown once and stored as its SHA-256 only. An invitation is used up by the first who opens
it; a session ends after a month, or when the person is revoked.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Literal, get_args

import sqlalchemy as sa

from trivium.config import UserError
from trivium.preferences.store import rows, schema
from trivium.preferences.store.database import Store
from trivium.preferences.store.judgements import check_annotator

Role = Literal["annotator", "lead", "admin"]
ROLES: tuple[str, ...] = get_args(Role)
"""From least to most: a lead may do what an annotator may, an admin what a lead may."""

INVITATION_S = 7 * 86_400.0
SESSION_S = 30 * 86_400.0


class NotInvited(UserError):
    """A token that opens nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Somebody with an account."""

    name: str
    role: Role
    revoked: bool = False
    signed_in: int = 0
    """Sessions that are valid now."""

    def may(self, role: Role) -> bool:
        """Tell whether this person may do what `role` may."""
        return not self.revoked and ROLES.index(self.role) >= ROLES.index(role)


class People:
    """The accounts of a preference database."""

    def __init__(self, store: Store) -> None:
        """Work on the tables of `store`."""
        self._store = store

    def invite(self, name: str, role: Role = "annotator", *, valid_s: float = INVITATION_S) -> str:
        """Return a fresh invitation's token for a new person, or another for one who is known and keeps their role.

        Raises UserError for a name that cannot be one, an unknown role, another role than theirs, and a revoked person.
        """
        check_annotator(name, "human")
        if role not in ROLES:
            raise UserError(f"no role {role!r}; there are {', '.join(ROLES)}")
        token = secrets.token_urlsafe(32)
        with self._store.writing() as connection:
            table = schema.people
            row = {"name": name, "role": role, "created_at": rows.now(), "revoked_at": None}
            rows.insert_new(connection, table, [row])
            found = connection.execute(sa.select(table).where(table.c.name == name)).mappings().one()
            if found["revoked_at"]:
                raise UserError(f"{name} was revoked; invite them under another name, their old judgements stay")
            if found["role"] != role:
                raise UserError(f"{name} is {found['role']} already; revoke them first, or invite as that")
            values = {"token_hash": _hash(token), "name": name, "created_at": rows.now(), "used_at": None}
            connection.execute(schema.invitations.insert(), values | {"expires_at": rows.moment(valid_s)})
        return token

    def accept(self, token: str) -> tuple[str, Person]:
        """Use an invitation up and return a new session's token with whose it is.

        Raises NotInvited for a token that is unknown, used or out of date.
        """
        table = schema.invitations
        session = secrets.token_urlsafe(32)
        with self._store.writing() as connection:
            mine = (table.c.token_hash == _hash(token)) & table.c.used_at.is_(None) & (table.c.expires_at > rows.now())
            used = table.update().where(mine).values(used_at=rows.now()).returning(table.c.name)
            name = connection.scalar(used)
            person = None if name is None else self._person(connection, name)
            if person is None or person.revoked:
                raise NotInvited("this invitation is unknown, used or out of date; ask for a new link")
            values = {"token_hash": _hash(session), "name": person.name, "created_at": rows.now()}
            connection.execute(schema.sessions.insert(), values | {"expires_at": rows.moment(SESSION_S)})
        return session, person

    def whose(self, session: str) -> Person | None:
        """Return whose session a token is, None for one that is unknown, out of date or of a revoked person."""
        if not session:
            return None
        table = schema.sessions
        query = sa.select(table.c.name).where(table.c.token_hash == _hash(session), table.c.expires_at > rows.now())
        with self._store.reading() as connection:
            name = connection.scalar(query)
            person = None if name is None else self._person(connection, name)
        return None if person is None or person.revoked else person

    def sign_out(self, session: str) -> None:
        """End one session."""
        with self._store.writing() as connection:
            connection.execute(schema.sessions.delete().where(schema.sessions.c.token_hash == _hash(session)))

    def revoke(self, name: str) -> None:
        """Shut a person out at once; what they judged stays. Raises UserError for a name that is nobody's."""
        with self._store.writing() as connection:
            table = schema.people
            gone = table.update().where(table.c.name == name).values(revoked_at=rows.now()).returning(table.c.name)
            if connection.scalar(gone) is None:
                raise UserError(f"there is nobody called {name!r}; `trivium people list` shows who is")
            for each in (schema.sessions, schema.invitations):
                connection.execute(each.delete().where(each.c.name == name))

    def all(self) -> list[Person]:
        """Return everybody, by name."""
        table, sessions = schema.people, schema.sessions
        live = sa.select(sessions.c.name, sa.func.count().label("number")).where(sessions.c.expires_at > rows.now())
        counted = live.group_by(sessions.c.name).subquery()
        query = sa.select(table, sa.func.coalesce(counted.c.number, 0).label("number"))
        query = query.outerjoin(counted, counted.c.name == table.c.name).order_by(table.c.name)
        with self._store.reading() as connection:
            found = connection.execute(query).mappings().all()
        return [
            Person(name=r["name"], role=r["role"], revoked=bool(r["revoked_at"]), signed_in=r["number"]) for r in found
        ]

    def _person(self, connection: sa.Connection, name: str) -> Person | None:
        query = sa.select(schema.people).where(schema.people.c.name == name)
        row = connection.execute(query).mappings().first()
        return None if row is None else Person(name=row["name"], role=row["role"], revoked=bool(row["revoked_at"]))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
