"""Runs one program shut in and says what became of it: a script, a request (JSON) on its input, a verdict as output.

It leaves the machine's network, processes, IPC and mounts for empty ones of its own, and gives itself a small `/tmp` in
memory. In there a child, process 1 of its namespace, loses the file system by Landlock and the rest by limits, and
becomes a fresh interpreter that runs `harness.py`. When process 1 ends, or is ended at the time limit, the kernel ends
all others of its namespace, whatever sessions they made. Linux only; what is missing ends in `{"refused": why}`.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import secrets
import select
import signal
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
NOBODY = 65534
ROOM = "/tmp"
"""Where the program's own file system is: it hides the machine's."""
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
"""Where shared libraries are."""
ANSWER_BYTES = 4096
"""Most that is read of what the program says about itself."""

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read the request, run it, and write the verdict."""
    request = json.load(sys.stdin)
    try:
        verdict = judge(request)
    except (OSError, ValueError) as error:
        verdict = {"refused": str(error)}
    sys.stdout.write(json.dumps(verdict))


def judge(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"passed": bool, "why": str}` for a request `{files, limits: {time_s, memory_bytes, ...}}`.

    Raises OSError where this machine cannot shut a program in.
    """
    limits = request["limits"]
    uid, gid = os.geteuid(), os.getegid()
    _unshare(NEWNS | NEWNET | NEWPID | NEWIPC | (NEWUSER if uid else 0))
    if uid:
        _map_ids(uid, gid)
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    bytes_ = f"size={limits['files_bytes']},nr_inodes=1000,mode=755"
    _mount("tmpfs", ROOM, "tmpfs", MS_NOSUID | MS_NODEV, bytes_)
    python, prefix = os.path.realpath(sys.executable), sys.base_prefix
    for name in ("program", "cwd"):
        os.mkdir(f"{ROOM}/{name}", 0o755)
    os.chmod(f"{ROOM}/cwd", 0o777)
    for name, text in request["files"].items():
        Path(ROOM, "program", name).write_text(text, encoding="utf-8", errors="replace")
    if not uid:
        python, prefix = _become_nobody(python, prefix)
    readable = [python, f"{prefix}/lib", f"{prefix}/lib64", f"{ROOM}/program", *SYSTEM]
    ask, tell = os.pipe(), os.pipe()
    nonce = secrets.token_hex(16).encode()
    os.write(ask[1], nonce)
    began = time.monotonic()
    child = os.fork()
    if not child:
        _become_program(python, readable, limits, ask[0], tell[1])
    os.close(tell[1])
    verdict = _watch(child, tell[0], nonce, began + limits["time_s"])
    return verdict | {"seconds": time.monotonic() - began}


def _become_nobody(python: str, prefix: str) -> tuple[str, str]:
    """Give up root and return where the interpreter is now: nobody may not be able to enter where it was.

    The number of processes is not limited for root, and its files would be the program's.
    """
    place = f"{ROOM}/python"
    os.mkdir(place, 0o755)
    _mount(prefix, place, None, MS_BIND | MS_REC)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    _prctl(PR_SET_DUMPABLE, 1)  # else /proc/self is still root's, and the ids could not be mapped
    _unshare(NEWUSER)
    _map_ids(NOBODY, NOBODY)
    inside = os.path.relpath(python, prefix)
    if inside.startswith(".."):
        raise OSError(f"the interpreter {python} does not lie in its own prefix {prefix}")
    return f"{place}/{inside}", place


def _become_program(python: str, readable: list[str], limits: Mapping[str, Any], ask: int, tell: int) -> None:
    """Turn this process, the first of its namespace, into the harness, or end it."""
    try:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        nothing = os.open("/dev/null", os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        os.set_inheritable(ask, True)
        os.set_inheritable(tell, True)
        os.chdir(f"{ROOM}/cwd")
        _restrict_files(readable, f"{ROOM}/cwd")
        seconds = math.ceil(limits["time_s"])
        for what, most in (
            (resource.RLIMIT_AS, limits["memory_bytes"]),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_FSIZE, limits["files_bytes"]),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NPROC, limits["processes"]),  # counted in the namespace, where only these are
        ):
            resource.setrlimit(what, (most, most))
        harness = f"{ROOM}/program/harness.py"
        # Not -I, which would ignore the seed of hashing too: the order of a set must not decide a reward.
        words = [python, "-s", "-S", "-P", "-B", harness, str(ask), str(tell)]
        os.execve(python, words, {"PYTHONHASHSEED": "0"})
    except BaseException as error:  # nothing of the supervisor may go on in the child
        os.write(tell, f"refused: {error}".encode()[:ANSWER_BYTES])
    os._exit(1)


def _watch(child: int, tell: int, nonce: bytes, deadline: float) -> dict[str, Any]:
    """Return the verdict once process 1 has ended; it is ended at the deadline, and all of its namespace with it."""
    answer, ended, listening = b"", os.pidfd_open(child), True
    while True:
        wanted = [ended, tell] if listening else [ended]
        ready = select.select(wanted, [], [], max(deadline - time.monotonic(), 0.0))[0]
        if tell in ready:
            part = os.read(tell, ANSWER_BYTES)
            answer += part
            listening = bool(part) and len(answer) < ANSWER_BYTES
        late = not ready
        if late or ended in ready:
            break
    if late:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if len(answer) < ANSWER_BYTES:
        answer += os.read(tell, ANSWER_BYTES)  # what it said last; nobody is left who could write, so this ends
    if answer.startswith(b"refused: "):
        raise OSError(answer.decode("utf-8", "replace").removeprefix("refused: "))
    code = os.waitstatus_to_exitcode(status)
    if answer == nonce and code == 0:
        return {"passed": True, "why": ""}
    said = answer.decode("utf-8", "replace") if answer and not answer.startswith(nonce) else f"ended with code {code}"
    return {"passed": False, "why": "took longer than its time" if late else said}


def _restrict_files(readable: list[str], writable: str) -> None:
    """Take the file system away, but for reading below `readable` and all but executing below `writable`."""
    version = _syscall(LANDLOCK_CREATE, None, 0, 1)
    # One bit per right: 13 at first, then moving, truncating and device control.
    handled = (1 << (13 + (version >= 2) + (version >= 3))) - 1 | (1 << 15 if version >= 5 else 0)
    ruleset = _syscall(LANDLOCK_CREATE, struct.pack("=Q", handled), 8, 0)
    rules = [(path, EXECUTE | READ_FILE | READ_DIR) for path in readable]
    rules += [(writable, handled & ~EXECUTE), ("/dev/null", READ_FILE | WRITE_FILE)]
    for path, rights in rules:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # not every system has every folder of libraries
        if not os.path.isdir(path):
            rights &= EXECUTE | READ_FILE | WRITE_FILE
        _syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _syscall(LANDLOCK_RESTRICT, ruleset, 0)


def _map_ids(uid: int, gid: int) -> None:
    """Be an ordinary user in the new user namespace: as root of it, the program would keep powers over mounts."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
        Path("/proc/self", name).write_text(text)


def _unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "no namespace of its own for the program")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind, data)]
    made = _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    _checked(made, f"no file system of its own for the program at {target}")


def _prctl(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), "prctl")


def _syscall(number: int, *arguments: object) -> int:
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *wide), "no Landlock, which keeps a program from files")


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what} ({os.strerror(number)})")
    return result


if __name__ == "__main__":
    main()
