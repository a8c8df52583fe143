"""What holds for every test: no network, one thread a worker, no telemetry. Set before anything imports torch."""

import ipaddress
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

# Programs that a test starts run this checkout, whatever else may be installed.
_SOURCE = str(Path(__file__).resolve().parents[1] / "src")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_SOURCE, os.environ.get("PYTHONPATH")]))

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    """Refuse every connection that would leave this machine: a test that needs the network is broken."""
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0]
            is_local = host == "localhost" or (
                (host[:1].isdigit() or ":" in host) and ipaddress.ip_address(host).is_loopback
            )
            assert is_local, f"a test tried to reach {host}; tests use no network"
        return connect(self, address)

    socket.socket.connect = local_only
    yield
    socket.socket.connect = connect


@pytest.fixture(scope="session")
def postgres():
    """Return the URL of a PostgreSQL server that the session starts; skipped where none is installed, never in CI."""
    from trivium.config import UserError
    from trivium.preferences.store import Store

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
