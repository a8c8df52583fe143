"""`bootstrap.py`: installs once, torch first; the second call is instant; each failure is one sentence."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PIP = """#!/bin/sh
# Stands in for the environment's Python: notes what pip is asked for, and fails when told to.
[ "$1" = "-c" ] && exit ${BROKEN:-0}
echo "$@" >> "$CALLS"
echo "ERROR: no such package" >&2
exit ${PIP_EXIT:-0}
"""


@pytest.fixture
def bootstrap(tmp_path, monkeypatch):
    """Return the module as it is in a checkout whose path has a space, with an environment that only pretends."""
    root = tmp_path / "a checkout"
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ("bootstrap.py", "pyproject.toml", "constraints.txt"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    python = root / ".venv" / "bin" / "python"
    python.write_text(PIP)
    python.chmod(0o755)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    spec = importlib.util.spec_from_file_location("bootstrap_copy", root / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def calls(tmp_path):
    """Return a function that gives what pip was asked for so far."""
    path = tmp_path / "calls"
    return lambda: path.read_text().splitlines() if path.exists() else []


def test_torch_comes_first_then_the_rest_both_with_constraints(bootstrap, calls):
    assert bootstrap.prepare(bootstrap.RUNTIME) == 0
    first, second = calls()
    assert "torch>=2.11,<2.14 -c" in first and first.endswith("a checkout/constraints.txt")
    assert f"-e .[{bootstrap.RUNTIME}] -c" in second


def test_the_second_call_installs_nothing(bootstrap, calls):
    assert bootstrap.prepare(bootstrap.DEVELOPER) == 0
    installed = calls()
    assert bootstrap.prepare(bootstrap.DEVELOPER) == bootstrap.prepare(bootstrap.RUNTIME) == 0
    assert calls() == installed


def test_a_demo_is_no_developers_environment(bootstrap, calls):
    assert bootstrap.prepare(bootstrap.RUNTIME) == bootstrap.prepare(bootstrap.DEVELOPER) == 0
    assert len(calls()) == 4


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_pin_installs_again(bootstrap, calls, name):
    assert bootstrap.prepare(bootstrap.RUNTIME) == 0
    with (bootstrap.ROOT / name).open("a") as file:
        file.write("# changed\n")
    assert bootstrap.prepare(bootstrap.RUNTIME) == 0
    assert len(calls()) == 4


def test_a_failed_install_shows_why_and_is_tried_again(bootstrap, calls, monkeypatch, capsys):
    monkeypatch.setenv("PIP_EXIT", "1")
    assert bootstrap.prepare(bootstrap.RUNTIME) == 2
    said = capsys.readouterr().err
    assert "ERROR: no such package" in said and "bootstrap: pip could not install PyTorch" in said
    monkeypatch.setenv("PIP_EXIT", "0")
    assert bootstrap.prepare(bootstrap.RUNTIME) == 0
    assert len(calls()) == 3


def test_a_broken_environment_is_made_anew(bootstrap, monkeypatch, capsys):
    monkeypatch.setenv("BROKEN", "1")
    monkeypatch.setattr(bootstrap.sys, "executable", "/nonexistent/python", raising=False)
    made = []

    def make(command, **options):
        made.append(command)
        return subprocess.CompletedProcess(command, 1, "", "no module named ensurepip")

    monkeypatch.setattr(bootstrap.subprocess, "run", make)
    assert bootstrap.prepare(bootstrap.RUNTIME) == 2
    assert ["/nonexistent/python", "-m", "venv", str(bootstrap.VENV)] in made
    assert "apt install python3-venv" in capsys.readouterr().err
    assert not bootstrap.VENV.exists()


def test_an_old_python_is_told_so(bootstrap, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 2))
    assert bootstrap.main() == 2
    assert "needs Python 3.11 or newer" in capsys.readouterr().err


def test_an_unknown_command_prints_the_help():
    done = subprocess.run(
        [sys.executable, "bootstrap.py", "tset"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "demo|test|check|install" in done.stdout


def test_a_bench_gets_its_options_and_an_unknown_one_is_told(bootstrap, calls, capsys):
    """The first word names the file, all after it belong to it."""
    (bootstrap.ROOT / "bench").mkdir()
    (bootstrap.ROOT / "bench" / "speed.py").write_text("")
    assert bootstrap.bench(["speed", "--toy", "--steps", "3"]) == 0
    assert calls() == ["bench/speed.py --toy --steps 3"]
    assert bootstrap.bench([]) == 0 and "benchmarks: speed" in capsys.readouterr().out
    assert bootstrap.bench(["sped"]) == 2
    assert "no benchmark 'sped'; there are speed" in capsys.readouterr().err


def test_continuous_integration_and_make_call_it():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "python3 bootstrap.py test" in (ROOT / ".ci" / "run").read_text()
    assert "python3 bootstrap.py $@" in (ROOT / "Makefile").read_text()
