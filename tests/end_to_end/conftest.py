"""The smallest recipe, run once through the command line as a user would, for all tests that look at the result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "smoke.toml"


def trivium(*arguments: str | Path, cwd: Path = ROOT, threads: int = 1) -> subprocess.Popen[str]:
    """Start `python -m trivium ...` on so many threads (0: as many as it takes by itself) and return the process."""
    command = [sys.executable, "-m", "trivium", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads or ""), "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str, str]:
    """Wait for a process and return (exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of an uninterrupted run of recipes/smoke.toml (its path has a space in it)."""
    workspace = tmp_path_factory.mktemp("end to end") / "smoke"
    code, _, err = finish(trivium("run", RECIPE, "--workspace", workspace))
    assert code == 0, err[-3000:]
    return workspace
