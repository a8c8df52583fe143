"""R28: what a model wrote is run where it can harm nothing, for as long as it may and no longer, and cannot pass early.

Every hostile program here must have been ended, with all that it started, within its limit and a second.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from trivium.config import ConfigError, UserError
from trivium.records import Completion, Conversation, Message
from trivium.rewards import code
from trivium.rewards.code import CodeLimits, Verdict, code_reward, extract_code, run_tests
from trivium.rewards.verifiable import check, check_reward, validate

LIMITS = CodeLimits(time_s=20)
"""For programs that end by themselves, on a busy machine too."""
SHORT = CodeLimits(time_s=1)
"""For those that would not."""
DOUBLE = "def double(x):\n    return 2 * x\n"
TESTS = ["assert double(3) == 6", "assert double(0) == 0"]


@pytest.fixture(autouse=True)
def _contained() -> None:
    """Skip, and say why, where this machine cannot shut a program in."""
    try:
        run_tests("", ["assert True"])
    except UserError as error:
        pytest.skip(str(error))


def tried(program: str, tests: list[str] | None = None, limits: CodeLimits = LIMITS) -> Verdict:
    """Return the verdict on a program, and assert that it came within the limit and a second."""
    verdict = run_tests(program, ["assert True"] if tests is None else tests, limits=limits)
    assert verdict.seconds < limits.time_s + 1
    return verdict


def test_a_right_program_passes_and_a_wrong_one_says_where() -> None:
    """All tests, not some; what went wrong is told."""
    assert tried(DOUBLE, TESTS) == Verdict(passed=True, why="", seconds=0)
    assert tried(DOUBLE.replace("2 *", "3 *"), TESTS) == Verdict(passed=False, why="AssertionError: ", seconds=0)
    assert not tried(DOUBLE, [*TESTS, "assert double(1) == 3"]).passed
    assert tried("def double(x):\n  retrun x", TESTS).why.startswith("SyntaxError")
    assert tried("import math, re, heapq, collections, itertools, json\n" + DOUBLE, TESTS).passed
    assert run_tests("def root(x):\n    return math.isqrt(x)", ["assert root(9) == 3"], setup="import math").passed


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "import os\nos._exit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\nimport sys\nsys.exit(0)",
        "import threading, os\nthreading.Timer(0.05, os._exit, (0,)).start()\nimport time\ntime.sleep(1)",
        "import os\nif os.fork():\n    os._exit(0)",
        "print('passed')\nraise KeyboardInterrupt",
        "def double(x):\n    import sys\n    sys.exit(0)",
        "def double(x):\n    import os\n    os._exit(0)",
        "'''",
        "if True:",
        "try:\n    pass\nfinally:",
        "import builtins\nbuiltins.AssertionError = ValueError\n",
        "import os\nos.write(2, b'x')\nos.abort()",
    ],
)
def test_ending_before_the_tests_have_run_is_not_passing(program: str) -> None:
    """Whatever its exit code says."""
    assert not tried(program, TESTS).passed


def test_a_loop_without_end_is_ended() -> None:
    """Also one that catches what can be caught."""
    assert tried("while True:\n    pass", limits=SHORT).why == "took longer than its time"
    stubborn = "import signal\nfor n in range(1, 31):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n"
    stubborn += "    except Exception:\n        pass\nwhile True:\n    try:\n        while True: pass\n"
    assert not tried(stubborn + "    except BaseException:\n        pass\n", limits=SHORT).passed


def named(name: str) -> str:
    """Return code that gives its process, and those that it will fork, a name by which they are found from outside."""
    return f"import ctypes\nassert ctypes.CDLL(None).prctl(15, b{name!r}, 0, 0, 0) == 0\n"


def alive(name: str) -> int:
    """Return how many processes of this machine have the name."""
    found = 0
    for entry in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            found += entry.read_text().strip() == name
    return found


def test_a_fork_bomb_stays_small_and_leaves_nothing() -> None:
    """It never has more processes than it may, however many it asks for, and none of them outlives the limit."""
    name, most, done = f"bomb-{os.getpid()}", [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            most[0] = max(most[0], alive(name))

    watcher = threading.Thread(target=count)
    watcher.start()
    try:
        bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
        assert tried(named(name) + bomb, limits=CodeLimits(time_s=2)).why == "took longer than its time"
    finally:
        done.set()
        watcher.join()
    assert 2 <= most[0] <= LIMITS.processes
    assert alive(name) == 0


def test_a_child_does_not_outlive_its_parent() -> None:
    """Though it left for a session of its own: the program ends and passes, and what it left behind ends with it."""
    name = f"left-{os.getpid()}"
    daemon = "import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True:\n"
    daemon += "            time.sleep(1)\n    os._exit(0)\n"
    assert tried(named(name) + daemon + DOUBLE, TESTS).passed
    assert alive(name) == 0


def test_ten_gigabytes_are_not_to_be_had() -> None:
    """The allocation fails, in the program and in every child of it."""
    assert tried("x = bytearray(10 * 2**30)").why.startswith("MemoryError")
    many = "x = []\nwhile True:\n    x.append(bytearray(2**24))"
    assert not tried(many).passed


def test_a_lot_of_output_goes_nowhere() -> None:
    """Standard output and error lead nowhere; what the program says of itself is cut."""
    assert not tried(
        "import sys\nwhile True:\n    sys.stdout.write('x' * 2**20)\n    sys.stderr.write('x' * 2**20)", limits=SHORT
    ).passed
    assert len(tried("raise ValueError('x' * 10**7)").why) <= code_cut()
    loud = "import os\nfor n in range(3, 64):\n    try:\n        while True: os.write(n, b'x' * 2**16)\n"
    loud += "    except OSError:\n        pass\n"
    verdict = tried(loud, limits=SHORT)
    assert not verdict.passed and len(verdict.why) <= 3 * code_cut()


def code_cut() -> int:
    """Return the most that is kept of a program's words."""
    return 4096


@pytest.fixture
def listener() -> Iterator[tuple[int, list[object]]]:
    """A port of this machine at which somebody listens, and who came."""
    came: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        done = threading.Event()

        def accept() -> None:
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    came.append(server.accept())

        thread = threading.Thread(target=accept)
        thread.start()
        yield server.getsockname()[1], came
        done.set()
        thread.join()


def test_there_is_no_network(listener: tuple[int, list[object]]) -> None:
    """Neither the machine's own ports nor anybody else's, by TCP, UDP or a name."""
    port, came = listener
    reach = "import socket\ns = socket.socket({kind})\ns.settimeout(0.5)\n{act}"
    for kind, act in (
        ("", f"s.connect(('127.0.0.1', {port}))"),
        ("", "s.connect(('192.0.2.1', 80))"),
        ("socket.AF_INET, socket.SOCK_DGRAM", "s.connect(('192.0.2.1', 53))\ns.send(b'x')"),
    ):
        assert tried(reach.format(kind=kind, act=act)).why.startswith("OSError: [Errno 101]"), act
    assert not tried("import socket\nsocket.getaddrinfo('example.org', 80)").passed
    abstract = "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0trivium-test')"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0trivium-test")
        server.listen()
        assert tried(abstract).why.startswith("ConnectionRefusedError")
    assert came == []


@pytest.mark.parametrize("act", ["open({path!r}).read()", "import os\nos.listdir(os.path.dirname({path!r}))"])
def test_files_of_the_machine_cannot_be_read(tmp_path: Path, act: str) -> None:
    """Passwords, the home, the repository, other processes' secrets, a file that everybody may read."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        with contextlib.suppress(PermissionError):
            folder.chmod(folder.stat().st_mode | 0o555)
    paths = [
        "/etc/passwd",
        str(Path.home() / ".profile"),
        __file__,
        "/proc/1/environ",
        str(secret),
        "/dev/zero",
        "/sys/x",
    ]
    for path in paths:
        why = tried(act.format(path=path)).why
        assert why.startswith(("PermissionError", "FileNotFoundError")), (path, why)


def test_it_writes_into_an_empty_folder_that_is_gone_afterwards() -> None:
    """Nowhere else, and no more than the folder may hold."""
    assert tried(
        "import os\nassert os.listdir('.') == []\nopen('x', 'w').write('y')\nassert open('x').read() == 'y'"
    ).passed
    assert tried("import os\nassert os.listdir('.') == []").passed
    for path in ("/tmp/program/tests.py", "/tmp/x", "/usr/lib/x", "/etc/x"):
        assert tried(f"open({path!r}, 'w')").why.startswith(("PermissionError", "FileNotFoundError")), path
    full = "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'wb').write(b'x' * 2**20)"
    assert tried(full).why.startswith("OSError: [Errno 28]")


def test_nothing_of_the_surroundings_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment, no arguments, no input, none of this process's open files, no powers, no other processes."""
    monkeypatch.setenv("TRIVIUM_TEST_KEY", "secret")
    assert tried("import os\nassert set(os.environ) <= {'PYTHONHASHSEED', 'LC_CTYPE'}, os.environ").passed
    assert tried(
        "import os, sys\nassert sys.stdin.read() == '' and sys.argv == ['solution'] and os.getpid() == 1"
    ).passed
    assert tried("import os\nassert os.geteuid() != 0\ntry:\n    os.chroot('.')\nexcept PermissionError: pass").passed
    assert not tried("import os\nos.kill(2, 9)").passed
    escape = "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.mount(b'x', b'/tmp/cwd', b'tmpfs', 0, None) == 0"
    assert not tried(escape).passed


def test_the_order_of_a_set_is_the_same_every_time() -> None:
    """Hashing has a fixed seed: a reward must be the same when a run is resumed."""
    words = "{'a', 'bc', 'def', 'ghij', 'klmno', 'pqrstu'}"
    tell = f"raise ValueError(','.join({words}))"
    assert len({tried(tell).why for _ in range(4)}) == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```\n```python\ny = 2\n```", "x = 1\n"),
        ("```json\n{}\n```\n```py\ny = 2\n```", "y = 2\n"),
        ("```python\nx = 1", "x = 1"),
        ("def f(): pass", "def f(): pass"),
        ("", ""),
    ],
)
def test_the_code_of_an_answer(text: str, found: str) -> None:
    """The first block of Python, or the whole text."""
    assert extract_code(text) == found


def ask(**meta: object) -> Conversation:
    """Return a prompt that asks for `double`."""
    return Conversation(messages=(Message(role="user", content="Write double(x)."),), meta=meta)


def answers(*texts: str) -> list[Completion]:
    """Return completions with these texts."""
    return [Completion(prompt_id="p", text=text) for text in texts]


def test_as_a_reward_and_as_a_check() -> None:
    """MBPP's columns, and `{"kind": "code"}` alone and within `all`."""
    fenced = f"Sure.\n```python\n{DOUBLE}```"
    prompt = ask(test_list=TESTS, test_imports=["import math"])
    assert code_reward([prompt] * 3, answers(fenced, "I cannot.", DOUBLE + "math.pi")) == [1.0, 0.0, 1.0]
    spec = {"kind": "code", "tests": TESTS, "time_s": 2}
    assert check(spec, fenced) and not check(spec, "def double(x): return x")
    assert check({"kind": "all", "of": [spec, {"kind": "contains", "words": ["Sure"]}]}, fenced)
    assert check_reward([ask(check=spec)] * 2, answers("no", fenced)) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"tests": ["assert ("]}, "no Python"),
        ({"tests": [3]}, "no Python"),
        ({"tests": []}, "no tests"),
        ({}, "tests"),
        ({"tests": ["assert f()"], "setup": "import ("}, "setup"),
        ({"tests": ["assert f()"], "time_s": "long"}, "time_s"),
        ({"tests": ["assert f()"], "time_s": 10_000}, "time_s"),
    ],
)
def test_a_wrong_check_is_named(spec: dict[str, object], said: str) -> None:
    """Before anything runs."""
    with pytest.raises((UserError, ConfigError), match=said):
        validate({"kind": "code", **spec})


def test_a_prompt_without_tests_is_named() -> None:
    """And none is run."""
    with pytest.raises(UserError, match="Write double"):
        code_reward([ask(test_list=TESTS), ask()], answers("", ""))


def test_where_it_cannot_be_shut_in_it_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without namespaces, or a supervisor that does not start: one sentence, and no reward of 0."""
    real = subprocess.Popen

    def without(words: list[str], **named: object) -> subprocess.Popen[bytes]:
        broken = tmp_path / "supervisor.py"
        text = (
            Path(words[-1])
            .read_text()
            .replace("def _unshare(flags: int) -> None:", "def _unshare(flags):\n    flags = 1")
        )
        broken.write_text(text)
        return real([*words[:-1], str(broken)], **named)  # type: ignore[call-overload, no-any-return]

    for popen in (without, lambda words, **named: real([*words[:-1], str(tmp_path / "nothing.py")], **named)):
        code._require_containment.cache_clear()
        monkeypatch.setattr(subprocess, "Popen", popen)
        with pytest.raises(UserError, match="code is not run on this machine, which cannot shut it in"):
            run_tests(f"open({str(tmp_path / 'ran')!r}, 'w')", ["assert True"])
        monkeypatch.setattr(subprocess, "Popen", real)
    code._require_containment.cache_clear()
    assert not (tmp_path / "ran").exists() and os.listdir(tmp_path) == ["supervisor.py"]
