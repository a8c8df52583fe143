"""Ideal responses that people wrote, as conversations to learn from: read where they lie, with no export in between."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import make_url

from trivium.config import ConfigError
from trivium.preferences.store import Store
from trivium.records import Conversation, Message

OWN = "preferences.db"
"""The database of a workspace, which is made when something is first asked of people."""

_SCHEMES = ("postgresql://", "postgres://", "postgresql+psycopg://", "sqlite:///")
_SUFFIXES = (".db", ".sqlite", ".sqlite3")


def is_database(spec: str) -> bool:
    """Tell whether a recipe's string names a preference database: by its URL, or by the end of its name."""
    return spec.startswith(_SCHEMES) or spec.lower().endswith(_SUFFIXES)


def locate(spec: str, *, base: Path, workspace: Path) -> str | Path | None:
    """Return the URL or the file that a spec means; None for the workspace's own where there is none yet.

    A name is looked for beside the recipe (`base`), then in the workspace. Raises ConfigError for a file that is in
    neither, and for a URL with a password, which would end up in every manifest.
    """
    if spec.startswith(_SCHEMES):
        if make_url(spec).password:
            shown = make_url(spec).render_as_string(hide_password=True)
            raise ConfigError(f"{shown}: a recipe must not hold a password; leave it out and set PGPASSWORD")
        return spec
    beside, inside = (base / Path(spec).expanduser()).resolve(), workspace / spec
    found = next((path for path in (beside, inside) if path.is_file()), None)
    if found is None and spec != OWN:
        raise ConfigError(f"no preference database at {beside}, nor at {inside}")
    return found


def demonstrations_of(spec: str, *, base: Path, workspace: Path) -> Iterator[Conversation]:
    """Yield every demonstration of a database as a conversation that ends in it, in the order of their ids.

    Whatever else the prompt carried stays with it; `meta` also says who wrote the response.
    """
    location = locate(spec, base=base, workspace=workspace)
    if location is None:
        return
    with Store(location, create=False) as store:
        for ideal in store.demonstrations():
            answer = Message(role="assistant", content=ideal.response)
            yield Conversation(
                messages=(*ideal.prompt.messages, answer),
                source=ideal.prompt.source,
                meta={**ideal.prompt.meta, "annotator": ideal.annotator},
            )


def digest_of(spec: str, *, base: Path, workspace: Path) -> str:
    """Return the SHA-256 of a database's demonstrations, whatever else is in it: one more makes another run."""
    location = locate(spec, base=base, workspace=workspace)
    ids: list[str] = []
    if location is not None:
        with Store(location, create=False) as store:
            ids = [ideal.id for ideal in store.demonstrations()]
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()
