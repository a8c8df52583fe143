"""A store on both databases: SQLite in a file, and a PostgreSQL server of the session's own."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from trivium.config import UserError
from trivium.preferences.store import Store, schema


@pytest.fixture(scope="session")
def postgres():
    # Debian keeps the server's programs off the PATH.
    places = [*map(str, Path("/usr/lib/postgresql").glob("*/bin")), os.environ["PATH"]]
    found = {name: shutil.which(name, path=os.pathsep.join(places)) for name in ("postgres", "initdb")}
    if not all(found.values()):
        assert not os.environ.get("CI"), "PostgreSQL must be installed in CI (.ci/run does it)"
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    # The server refuses to run as root, and cannot enter pytest's private folders as anybody else.
    who = {"user": pwd.getpwnam("postgres").pw_uid} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="trivium-pg-"))
    if who:
        os.chown(folder, who["user"], -1)
    init = [found["initdb"], "-D", folder / "data", "-U", "trivium", "-A", "trust", "-N"]
    made = subprocess.run(init, capture_output=True, text=True, cwd=folder, **who)
    assert made.returncode == 0, made.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [found["postgres"], "-D", folder / "data", "-p", str(port), "-k", folder]
    start += ["-c", "listen_addresses=127.0.0.1"]
    server = subprocess.Popen(start, stderr=subprocess.DEVNULL, cwd=folder, **who)
    url = f"postgresql://trivium@127.0.0.1:{port}/postgres"
    for _ in range(100):
        try:
            Store(url).close()
            break
        except UserError:
            time.sleep(0.1)
    yield url
    server.terminate()
    server.wait(20)
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgres"])
def store(request, tmp_path):
    if request.param == "sqlite":
        location = tmp_path / "a folder" / "preferences.db"
    else:
        location = request.getfixturevalue("postgres")
        engine = schema.make_engine(location)
        schema.metadata.drop_all(engine)
        engine.dispose()
    with Store(location) as opened:
        yield opened
