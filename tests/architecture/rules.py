"""The rules of the house that no linter knows, each a function from a source tree to its violations.

`test_rules.py` holds the tree to them, and plants a violation of each in a copy to see that it is found.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

STAGE_LINES = 300
FILE_LINES = 400
FUNCTION_LINES = 60
CONFIG_FIELDS = 20
IDEA_LINES = 120

EXCEPTIONS: dict[str, int] = {}
"""`path` or `path::function` or `path::Config` -> the size it has today. An entry may shrink or go, never come."""

FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "manager", "managers", "misc"}
FORBIDDEN_MARKUP = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function")
SOURCE = {".py", ".js", ".css", ".html", ".jinja", ".j2"}


def budget_violations(root: Path) -> list[str]:
    """Return what is larger than its budget, and what no longer needs its exception."""
    found = []
    sizes: dict[str, tuple[int, int]] = {}
    for key, measured in _sizes(root):  # methods of one name share a key: the largest counts
        sizes[key] = max(measured, sizes.get(key, measured))
    for key, (size, limit) in sizes.items():
        allowed = EXCEPTIONS.get(key, limit)
        if size > allowed:
            found.append(f"{key}: {size} exceeds {allowed}")
        elif key in EXCEPTIONS and size <= limit:
            found.append(f"{key}: {size} is within {limit}; remove its exception")
        elif key in EXCEPTIONS and size < allowed:
            found.append(f"{key}: has shrunk to {size}; lower its exception from {allowed}")
    return found + [f"{key}: has an exception but does not exist" for key in EXCEPTIONS if key not in sizes]


def _sizes(root: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (key, (size, limit)) of every file, function and Config."""
    for path in [*_files(root / "src"), root / "bootstrap.py"]:
        if not path.is_file():
            continue
        key = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        is_stage = "trivium/stages/" in key
        yield key, (text.count("\n"), STAGE_LINES if is_stage else FILE_LINES)
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                yield (
                    f"{key}::{node.name}@{node.lineno}" if length <= FUNCTION_LINES else f"{key}::{node.name}",
                    (
                        length,
                        FUNCTION_LINES,
                    ),
                )
            elif isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                yield f"{key}::{node.name}", (sum(isinstance(item, ast.AnnAssign) for item in node.body), CONFIG_FIELDS)


def shape_violations(root: Path) -> list[str]:
    """Return where a stage departs from docstring, `Config`, `objective` or `transform`, `run`, helpers."""
    found = []
    for path in _stages(root):
        name = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            found.append(f"{name}: has no docstring")
        lines = {
            node.name: node.lineno
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        idea = "objective" if "objective" in lines else "transform"
        missing = [part for part in ("Config", idea, "run") if part not in lines]
        if missing:
            found.append(f"{name}: has no {' and no '.join(missing)}")
            continue
        if not lines["Config"] < lines[idea] < lines["run"]:
            found.append(f"{name}: the order is Config, {idea}, run")
        early = [
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.lineno < lines["run"] and not node.name.endswith(idea)
        ]
        if early:
            found.append(f"{name}: {early[0]} is a helper and belongs below run")
        if lines["run"] > IDEA_LINES:
            found.append(f"{name}: run begins at line {lines['run']}; the idea belongs within {IDEA_LINES} lines")
    return found


def call_violations(root: Path) -> list[str]:
    """Return calls that run what they read (unpickling, eval, a shell, a model's code), and HTML made of strings."""
    found = []
    for path in _files(root / "src"):
        name = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".py":
            found += [f"{name}: {word}" for word in FORBIDDEN_MARKUP if word in text]
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and (word := _forbidden_call(node)):
                found.append(f"{name}:{node.lineno}: {word}")
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [f"{name}:{node.lineno}: import {m}" for m in modules if m in {"pickle", "marshal", "shelve"}]
    return found


def _forbidden_call(node: ast.Call) -> str:
    function = ast.unparse(node.func)
    if function in {"eval", "exec", "os.system", "os.popen"}:
        return f"{function}("
    if re.fullmatch(r"(pickle|cPickle|dill|cloudpickle|marshal|joblib)\.loads?", function):
        return function
    settings = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
    if function == "torch.load" and settings.get("weights_only") is not True:
        return "torch.load without weights_only=True"
    for name, value in (("weights_only", False), ("trust_remote_code", True), ("shell", True)):
        if settings.get(name) is value:
            return f"{name}={value}"
    return ""


def file_violations(root: Path) -> list[str]:
    """Return tracked files that do not belong: binaries, other people's code, names that say nothing."""
    found = []
    for path in _tracked(root):
        name = path.relative_to(root).as_posix()
        parts = {part.partition(".")[0].strip("_") for part in path.relative_to(root).parts}
        bad = parts & FORBIDDEN_NAMES
        if bad and path.suffix in SOURCE:
            found.append(f"{name}: {sorted(bad)[0]!r} names nothing; name what it holds")
        if parts & {"vendor", "third_party", "node_modules", "site-packages"} or ".min." in path.name:
            found.append(f"{name}: third-party files do not enter the repository; declare a dependency")
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            found.append(f"{name}: is binary; make it when it is needed, or draw it as SVG")
        elif path.suffix in {".js", ".css"} and max(map(len, content.split(b"\n")), default=0) > 500:
            found.append(f"{name}: is minified; only what people write enters the repository")
        # Assembled, so that this file does not hold what it looks for.
        elif path.suffix in SOURCE and ("@" + "license").encode() in content:
            found.append(f"{name}: carries another project's licence; declare a dependency")
    return found


def room_violations(root: Path) -> list[str]:
    """Return folders of tests that mirror no room of the source."""
    rooms = {path.stem for path in (root / "src" / "trivium").iterdir()} | {"architecture", "end_to_end", "faults"}
    folders = [path for path in (root / "tests").iterdir() if path.is_dir() and not path.name.startswith((".", "__"))]
    return [f"tests/{path.name}: mirrors no room of src/trivium" for path in folders if path.name not in rooms]


BROUGHT = {"starlette": "fastapi", "pydantic": "fastapi", "markupsafe": "jinja2"}
"""Imported packages that are part of the interface of a declared one, which brings them."""

UNNAMED = {
    "lxml_html_clean": "trafilatura needs it and does not bring it",
    "psycopg": "SQLAlchemy loads it by the address of the database",
}
"""Declared packages that no line of ours names, and why they are declared."""


IMPORTED_AS = {"markdown_it_py": "markdown_it"}
"""Packages whose module has another name."""


def dependency_violations(root: Path) -> list[str]:
    """Return what the package imports and does not declare, and what it declares and does not use."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: items for name, items in project["optional-dependencies"].items() if name != "dev"}
    declared = {_package(item) for items in (project["dependencies"], *extras.values()) for item in items}
    imported: dict[str, str] = {}
    named: set[str] = set()
    for path in sorted((root / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for module in _imports(node):
                imported.setdefault(module.partition(".")[0], path.relative_to(root).as_posix())
            # The doctor names every package to see whether it is there, which is no use of it.
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "cli" not in path.parts:
                named.add(node.value.partition(".")[0])
    foreign = {name for name in imported if name not in sys.stdlib_module_names and name != "trivium"}
    missing = {name for name in foreign - declared if BROUGHT.get(name) not in declared}
    unused = declared - foreign - named - set(UNNAMED)
    return [f"{imported[name]}: imports {name}, which pyproject.toml does not declare" for name in sorted(missing)] + [
        f"pyproject.toml: declares {name}, which nothing uses" for name in sorted(unused)
    ]


def _package(requirement: str) -> str:
    name = re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("-", "_")
    return IMPORTED_AS.get(name, name)


def _imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []


RULES = (dependency_violations, budget_violations, shape_violations, call_violations, file_violations, room_violations)


def _stages(root: Path) -> list[Path]:
    """Return the file of each stage; for one that became a folder, its `__init__.py`."""
    folder = root / "src" / "trivium" / "stages"
    single = [path for path in folder.glob("*.py") if path.stem != "__init__"]
    return sorted([*single, *folder.glob("*/__init__.py")])


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in SOURCE and "__pycache__" not in p.parts)


def _tracked(root: Path) -> list[Path]:
    """Return the files that git holds or would take in; all files in a tree without git."""
    git = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, check=False)
    if listed.returncode:
        hidden = ("__pycache__", ".")
        inside = {p: p.relative_to(root).parts for p in root.rglob("*") if p.is_file()}
        return sorted(p for p, parts in inside.items() if not any(part.startswith(hidden) for part in parts))
    paths = (root / name.decode("utf-8", "surrogateescape") for name in listed.stdout.split(b"\0") if name)
    return sorted(path for path in paths if path.is_file())
