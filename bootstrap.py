#!/usr/bin/env python3
"""Set Trivium up and run it: `python3 bootstrap.py demo|test|check|install`; standard library only.

demo [OPTIONS]  installs what a run needs and runs recipes/tiny.toml, from raw text to chat model to report
test [OPTIONS]  installs the developers' tools too, runs every check, then the tests (options go to pytest)
check           the checks alone: format, lint, types, import contracts, generated docs, architecture
install         makes the environment and stops
bench NAME [OPTIONS]  one measurement of bench/, with its options; without a name, their list
soak            the tests marked slow

The environment is `.venv` in this folder. Once it is made, every command works without a network.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
LOG = VENV / "install.log"
RUNTIME = "data,web,eval,export"
DEVELOPER = f"{RUNTIME},postgres,dev"
CHECKS = {
    "format": ["-m", "ruff", "format", "--check", "."],
    "lint": ["-m", "ruff", "check", "."],
    "types": ["-m", "mypy"],
    "import contracts": ["-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-logo"],
    "generated docs": ["tests/architecture/generated_docs.py"],
}


def main() -> int:
    """Run the command in `sys.argv` and return its exit code."""
    command, options = (sys.argv[1:2] or ["help"])[0], sys.argv[2:]
    if sys.version_info < (3, 11):
        return fail(f"Trivium needs Python 3.11 or newer and this is {sys.version.split()[0]}; call a newer python3.")
    actions = {"demo": demo, "test": test, "check": check, "install": install, "bench": bench, "soak": soak}
    if command not in actions:
        print(__doc__)
        return 0 if command in {"help", "-h", "--help"} else 2
    try:
        return prepare(RUNTIME if command == "demo" else DEVELOPER) or actions[command](options)
    except KeyboardInterrupt:
        return 130


def demo(options: list[str]) -> int:
    """Run the smallest recipe; options (--seed N, --workspace DIR ...) are those of `trivium run`."""
    command = [str(PYTHON), "-m", "trivium", "run", str(ROOT / "recipes" / "tiny.toml"), *options]
    if os.name == "nt":
        return subprocess.run(command, check=False).returncode
    os.execv(command[0], command)  # becomes the run, so that Ctrl-C or a kill reaches it and leaves nothing behind


def test(options: list[str]) -> int:
    """Run the checks, then the tests; all of the checks run even if one fails."""
    began = time.monotonic()
    checks_failed = check([])
    workers = str(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
    tests_failed = call(["-m", "pytest", "-n", workers, *options])
    words = ["passed" if code == 0 else "FAILED" for code in (checks_failed, tests_failed)]
    print(f"checks {words[0]}, tests {words[1]}, in {time.monotonic() - began:.0f} s", flush=True)
    return checks_failed or tests_failed


def check(options: list[str]) -> int:
    """Run every check that is not a test, and the architecture tests when called alone."""
    failed = []
    for name, arguments in CHECKS.items():
        began = time.monotonic()
        code = call(arguments, quiet=True)
        print(f"check: {name}: {'ok' if code == 0 else 'FAILED'} ({time.monotonic() - began:.1f} s)", flush=True)
        failed += [name] if code else []
    if sys.argv[1] == "check" and call(["-m", "pytest", "tests/architecture", *options]):
        failed.append("architecture")
    return 1 if failed else 0


def install(options: list[str]) -> int:
    """Say where the environment is; it was made on the way here."""
    print(f"ready: {PYTHON}")
    return 0


def bench(options: list[str]) -> int:
    """Run the benchmark that the first word names with the options after it, or list them all."""
    found = sorted(path.stem for path in (ROOT / "bench").glob("*.py")) if (ROOT / "bench").is_dir() else []
    if not options:
        print(f"benchmarks: {', '.join(found)}" if found else "there are no benchmarks yet")
        return 0
    if options[0] not in found:
        return fail(f"there is no benchmark {options[0]!r}; there are {', '.join(found) or 'none yet'}")
    return call([f"bench/{options[0]}.py", *options[1:]])


def soak(options: list[str]) -> int:
    """Run the tests marked slow."""
    code = call(["-m", "pytest", "-m", "slow", *options])
    return 0 if code == 5 else code  # 5: there is none


def prepare(extras: str) -> int:
    """Make or mend the environment so that `extras` are installed; instant and offline when they are already."""
    pinned = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    key = hashlib.sha256(pinned + f"{ROOT} {sys.version} {RUNTIME} {DEVELOPER}".encode()).hexdigest()
    stamps = [VENV / f"trivium-{'dev' if name == DEVELOPER else 'run'}.stamp" for name in {extras, DEVELOPER}]
    if works() and any(stamp.is_file() and stamp.read_text() == key for stamp in stamps):
        return 0
    if not works():
        shutil.rmtree(VENV, ignore_errors=True)
        print(f"making {VENV}", flush=True)
        made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False)
        if made.returncode or not works():
            shutil.rmtree(VENV, ignore_errors=True)
            last = (made.stdout + made.stderr).strip().splitlines()[:1]
            return fail(
                f"this Python cannot make an environment ({''.join(last)}); on Debian: apt install python3-venv."
            )
    constraints = ["-c", str(ROOT / "constraints.txt")]
    # torch first and alone: the resolver then never weighs another build of it for the packages that follow.
    for what, arguments in (("PyTorch", ["torch>=2.11,<2.14"]), ("Trivium and its packages", ["-e", f".[{extras}]"])):
        print(f"installing {what} (a few minutes the first time; details in {LOG})", flush=True)
        with LOG.open("ab") as log:
            pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
            if subprocess.run([*pip, *constraints], stdout=log, stderr=log, cwd=ROOT, check=False).returncode:
                print("\n".join(LOG.read_text(errors="replace").splitlines()[-12:]), file=sys.stderr)
                return fail(
                    f"pip could not install {what}: see above; with the cause mended, run the same command again."
                )
    (VENV / f"trivium-{'dev' if extras == DEVELOPER else 'run'}.stamp").write_text(key)
    return 0


def works() -> bool:
    """Tell whether the environment's Python starts and has pip."""
    try:
        return subprocess.run([str(PYTHON), "-c", "import pip"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def call(arguments: list[str], *, quiet: bool = False) -> int:
    """Run the environment's Python on `arguments` in this folder; `quiet` shows the output of a failure only."""
    environment = dict(os.environ)
    if "pytest" in arguments or quiet:
        environment["OMP_NUM_THREADS"] = "1"  # one test worker a core: more threads would only wait for each other
    command = [str(PYTHON), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=quiet, text=quiet, check=False)
    if quiet and done.returncode:
        print(done.stdout + done.stderr, flush=True)
    return done.returncode


def fail(sentence: str) -> int:
    """Print one sentence on standard error and return the exit code of a mistake."""
    print(f"bootstrap: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
