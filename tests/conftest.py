"""What holds for every test: no network, one thread a worker, no telemetry. Set before anything imports torch."""

import ipaddress
import os
import socket
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
