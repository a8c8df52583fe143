"""Code as a reward: a program that a model wrote either passes its tests or does not, shut in while it is tried.

The program runs in processes of its own with no network, no files but Python's own (to read) and an empty folder in
memory, little memory, few processes and a time limit, at which all of them are ended. Where the machine cannot shut a
program in so, it is not run: `check` raises UserError. `docs/concepts/code-rewards.md` says what is contained, and what
is not.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trivium.config import UserError, bounds
from trivium.records import Completion, Conversation

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_STUCK_S = 10.0
"""After the time limit, at which the supervisor has ended the program, unless the machine itself is stuck."""


@dataclass(frozen=True, kw_only=True)
class CodeLimits:
    """What a program may use."""

    time_s: float = 4.0
    """Seconds from its start to its end, and processor seconds of each of its processes."""
    memory_bytes: int = 512 * 2**20
    """Address space of each of its processes."""
    processes: int = 8
    """Processes and threads at a time, of which the harness and its supervisor are two."""
    files_bytes: int = 16 * 2**20
    """All files together, in memory."""

    def __post_init__(self) -> None:
        """Refuse values outside their range; Python itself takes some 20 MB."""
        bounds(self, time_s=(0.1, 600), memory_bytes=(64 * 2**20, None), processes=(3, 1000))
        bounds(self, files_bytes=(2**20, None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether every test passed, and if not, what happened (the program's own words, so not to be trusted)."""

    passed: bool
    why: str
    seconds: float = field(compare=False)
    """From its start until nothing of it was left."""


def run_tests(program: str, tests: Sequence[str], *, setup: str = "", limits: CodeLimits | None = None) -> Verdict:
    """Return whether `program` runs and passes the tests (Python statements: `assert f(2) == 4`).

    `setup` stands before the program (imports, say). Raises UserError where this machine cannot shut a program in.
    """
    _require_containment()
    return _run(program, tests, setup, limits or CodeLimits())


def passes(spec: Mapping[str, Any], text: str) -> bool:
    """Return whether the code in `text` meets a check `{"kind": "code", "tests": [...], "setup"?, "time_s"?}`."""
    limits = CodeLimits(time_s=spec["time_s"]) if "time_s" in spec else CodeLimits()
    return run_tests(extract_code(text), spec["tests"], setup=spec.get("setup", ""), limits=limits).passed


def validate_tests(spec: Mapping[str, Any]) -> None:
    """Raise UserError unless a check's tests, and its setup, are Python, and its time is a number in range."""
    for name, sources in (("tests", spec["tests"]), ("setup", [spec.get("setup", "")])):
        for source in sources:
            try:
                ast.parse(source)
            except (SyntaxError, ValueError, TypeError) as error:
                raise UserError(f"a check of kind 'code' has {name} that are no Python: {source!r} ({error})") from None
    if not spec["tests"]:
        raise UserError("a check of kind 'code' has no tests, so that everything would pass; write at least one")
    if not isinstance(spec.get("time_s", 1.0), int | float) or isinstance(spec.get("time_s"), bool):
        raise UserError(f"a check of kind 'code' has time_s = {spec['time_s']!r}, which is no number of seconds")
    CodeLimits(time_s=spec.get("time_s", 1.0))


def code_reward(prompts: Sequence[Conversation], completions: Sequence[Completion]) -> list[float]:
    """Return 1 for each completion whose code passes all tests of its prompt, else 0: a Reward.

    The tests are MBPP's columns: `test_list`, with `test_setup_code` or `test_imports` before the program.
    Raises UserError for a prompt that brings none.
    """
    specs = [_spec_of(prompt) for prompt in prompts]
    for spec in specs:
        validate_tests(spec)
    _require_containment()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [float(passed) for passed in pool.map(passes, specs, [c.text for c in completions])]


def extract_code(text: str) -> str:
    """Return the first fenced block of Python (or of no named language) in a text; the text itself where none is."""
    blocks = [body for language, body in _FENCE.findall(text) if language.lower() in ("", "python", "py", "python3")]
    return str(blocks[0]) if blocks else text


def _spec_of(prompt: Conversation) -> dict[str, Any]:
    meta = prompt.meta
    if not isinstance(meta.get("test_list"), list):
        asked = prompt.messages[-1].content[:60]
        raise UserError(f'the prompt {asked!r} has no "test_list"; a reward for code needs one in every prompt')
    imports = meta.get("test_imports") or []
    setup = "\n".join([*imports, meta.get("test_setup_code") or ""])
    return {"kind": "code", "tests": meta["test_list"], "setup": setup}


@functools.cache
def _require_containment() -> None:
    """Raise UserError unless a program can be shut in here: tried once, with one that must pass and one that must not.

    An interpreter that does not start inside would otherwise be a reward of 0 for everything.
    """
    if sys.platform != "linux":
        raise UserError(f"code cannot be shut in on {sys.platform}, so it is not run; a reward for code needs Linux")
    limits = CodeLimits(time_s=20)
    good, bad = (_run("", [test], "", limits) for test in ("assert True", "assert False"))
    if not good.passed or bad.passed:
        raise UserError(f"{_REFUSED} (a program of one true assertion gave: {good.why or bad.why})")


_REFUSED = (
    "code is not run on this machine, which cannot shut it in; a reward for code needs Linux 5.13 or newer with user "
    "namespaces and Landlock, which a container may forbid"
)


def _run(program: str, tests: Sequence[str], setup: str, limits: CodeLimits) -> Verdict:
    here = Path(__file__).parent
    files = {
        "harness.py": (here / "harness.py").read_text(encoding="utf-8"),
        "solution.py": f"{setup}\n{program}\n",
        "tests.py": "\n".join(tests) + "\n",
    }
    process = subprocess.Popen(
        [os.path.realpath(sys.executable), "-I", "-S", str(here / "supervisor.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    )
    try:
        request = json.dumps({"files": files, "limits": asdict(limits)}).encode()
        answer, _ = process.communicate(request, timeout=limits.time_s + _STUCK_S)
    except subprocess.TimeoutExpired:
        return Verdict(passed=False, why="took longer than its time", seconds=limits.time_s + _STUCK_S)
    finally:
        if process.poll() is None:  # it has all it needs to end by itself; a machine that is stuck may keep it from it
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    try:
        verdict = json.loads(answer)
    except ValueError:
        verdict = {"refused": f"the supervisor ended with code {process.returncode}"}
    if "refused" in verdict:
        raise UserError(f"{_REFUSED} ({verdict['refused']})")
    return Verdict(**verdict)
