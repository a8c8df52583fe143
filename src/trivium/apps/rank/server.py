"""What `trivium rank` runs."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

import uvicorn

from trivium.apps.rank.app import create_app
from trivium.apps.rank.security import LOOPBACK
from trivium.config import UserError
from trivium.preferences.store import Store


def serve(
    workspace: Path,
    host: str = "127.0.0.1",
    port: int = 8765,
    collection: str | None = None,
    annotator: str = "",
    *,
    allow_remote: bool = False,
    database: str | None = None,
) -> None:
    """Serve the ranking page over the workspace's preference database (or the one at `database`) until Ctrl-C.

    Raises UserError when there is no database or nothing to rank in it, when the port is taken, and for an address
    that other machines can reach unless `allow_remote`: there are no accounts yet.
    """
    check_host(host, allow_remote=allow_remote)
    with Store(database or workspace / "preferences.db", create=database is not None) as store:
        tasks = store.tasks(collection)
        if not tasks:
            where = f"collection {collection!r} of {store.name}" if collection else store.name
            raise UserError(f"{where} holds no responses to rank; run the stage collect_comparisons first")
        app = create_app(store, collection=collection, annotator=annotator, hosts=None if allow_remote else LOOPBACK)
        with _listen(host, port) as listener:
            shown = f"[{host}]" if ":" in host else host
            open_ones = sum(task.judgements < task.overlap for task in tasks)
            print(f"{open_ones} of {len(tasks)} tasks wait for people: http://{shown}:{listener.getsockname()[1]}/")
            print("Ctrl-C ends it; whatever the page says is saved is saved.", flush=True)
            config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
            uvicorn.Server(config).run(sockets=[listener])


def check_host(host: str, *, allow_remote: bool) -> None:
    """Raise UserError unless `host` is this machine alone, or remote machines were allowed on purpose."""
    if allow_remote or host == "localhost":
        return
    try:
        if ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:
        pass
    raise UserError(
        f"{host} can be reached from other machines and this page has no accounts yet: anybody could judge under any "
        "name; use 127.0.0.1, or add --allow-remote where the network is trusted"
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()  # before the address is printed: who is quicker than the server waits, and is not refused
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error
    return listener
