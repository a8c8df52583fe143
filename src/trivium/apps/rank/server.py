"""What `trivium rank` runs."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

import uvicorn

from trivium.apps.rank.app import create_app
from trivium.apps.rank.security import LOOPBACK
from trivium.config import UserError
from trivium.preferences.store import People, Store


def serve(
    workspace: Path,
    host: str = "127.0.0.1",
    port: int = 8765,
    collection: str | None = None,
    annotator: str = "",
    *,
    accounts: bool = False,
    database: str | None = None,
) -> None:
    """Serve the ranking page over the workspace's preference database (or the one at `database`) until Ctrl-C.

    Where other machines can reach it, only people with an account may answer; on this machine alone anybody may, unless
    `accounts` (for one behind a proxy). Raises UserError when there is no database or nothing to rank in it, when
    accounts are needed and there is none, and when the port is taken.
    """
    local = is_loopback(host)
    accounts = accounts or not local
    with Store(database or workspace / "preferences.db", create=database is not None) as store:
        tasks = store.tasks(collection)
        if not tasks:
            where = f"collection {collection!r} of {store.name}" if collection else store.name
            raise UserError(f"{where} holds no responses to rank; run the stage collect_comparisons first")
        if accounts and not any(not person.revoked for person in People(store).all()):
            raise UserError(
                f"{host} needs accounts and {store.name} has none; make one with `trivium people invite NAME`, "
                "or listen on 127.0.0.1"
            )
        hosts = LOOPBACK if local and not accounts else None
        app = create_app(store, collection=collection, annotator=annotator, hosts=hosts, accounts=accounts)
        with _listen(host, port) as listener:
            shown = f"[{host}]" if ":" in host else host
            open_ones = sum(task.judgements < task.overlap for task in tasks)
            print(f"{open_ones} of {len(tasks)} tasks wait for people: http://{shown}:{listener.getsockname()[1]}/")
            print("Ctrl-C ends it; whatever the page says is saved is saved.", flush=True)
            config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
            uvicorn.Server(config).run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Tell whether an address is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
