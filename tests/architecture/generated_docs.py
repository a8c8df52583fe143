"""The parts of the documentation that are made from the code: `python tests/architecture/generated_docs.py [--write]`.

A part stands between `<!-- generated:NAME -->` and `<!-- /generated -->` in README.md or a page under docs/; NAME is
one of GENERATORS below. Without `--write` the pages are checked: exit code 1 names each part that is stale, each link
that leads nowhere, and each logged metric that nobody explains. `--root DIR` names another tree.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

BLOCK = re.compile(r"<!-- generated:([a-z_]+) -->\n(.*?)<!-- /generated -->", re.DOTALL)
METRIC = re.compile(r"(train|eval|rollout)/[a-z0-9_]+")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)")

ABOUT = {
    "bootstrap.py": "sets up and runs: demo, test, check; standard library only (the Makefile delegates)",
    "recipes": "one TOML per scale and purpose; the order of its tables is the pipeline",
    "tests": "mirrors src/trivium, plus architecture/ and end_to_end/",
    "bench": "side-by-side benchmarks; never run by the tests",
    "docs": "design, one page per subject, decisions/, LOG.md",
}
FLOORS = (
    "cli", "pipeline", "stages", "apps", "evals", "training", "rewards", "data", "losses", "models", "preferences",
    "runs", "batches", "records", "config",
)  # fmt: skip


def tree(root: Path) -> str:
    """Return the tree of the house: every room with the first sentence of its docstring, every file by its name."""
    lines = ["```", "trivium/"]
    lines += [f"├── {_label(root / name)}{about}" for name, about in ABOUT.items() if (root / name).exists()]
    lines.append("└── src/trivium/")
    package = root / "src" / "trivium"
    order = importlib.import_module("trivium.cli.verbs").STAGES
    rooms = [path for name in FLOORS for path in (package / name, package / f"{name}.py") if path.exists()]
    for room in rooms:
        last = room is rooms[-1]
        lines.append(f"    {'└──' if last else '├──'} {_label(room)}{_summary(room)}")
        inside = _parts(room)
        inside.sort(key=lambda name: (order.index(name) if room.name == "stages" and name in order else 0, name))
        while inside:
            row = [inside.pop(0)]
            while inside and len(" · ".join([*row, inside[0]])) < 96:
                row.append(inside.pop(0))
            lines.append(f"    {' ' if last else '│'}       {' · '.join(row)}")
    return "\n".join([*lines, "```"]) + "\n"


def _label(path: Path) -> str:
    return f"{path.name + ('/' if path.is_dir() else ''):<16}"


def _summary(room: Path) -> str:
    text = ast.get_docstring(ast.parse((room / "__init__.py" if room.is_dir() else room).read_text(encoding="utf-8")))
    return (text or "").partition("\n\n")[0].replace("\n", " ").removesuffix(".")


def _parts(room: Path) -> list[str]:
    """Return the modules and packages inside a room."""
    if room.is_file():
        return []
    files = [path.stem for path in room.glob("*.py") if path.stem != "__init__"]
    return files + [f"{path.name}/" for path in room.iterdir() if (path / "__init__.py").is_file()]


def cli(root: Path) -> str:
    """Return what `trivium --help` prints."""
    return f"```\n{importlib.import_module('trivium.cli.verbs').help_text()}\n```\n"


def metrics(root: Path) -> str:
    """Return the table of every metric that the code logs, what it measures, and where it is logged."""
    explained: dict[str, str] = importlib.import_module("trivium.apps.dashboard.explain").METRICS
    rows = ["| metric | what it is | logged by |", "| --- | --- | --- |"]
    for name, places in sorted(logged_metrics(root).items()):
        where = ", ".join(sorted(place.removesuffix(".py") for place in places))
        rows.append(f"| `{name}` | {explained.get(name, '')} | {where} |")
    return "\n".join(rows) + "\n"


def logged_metrics(root: Path) -> dict[str, set[str]]:
    """Return each `group/name` that stages, objectives and the loop report, with the files it is in."""
    found: dict[str, set[str]] = defaultdict(set)
    package = root / "src" / "trivium"
    for path in [*(package / "stages").rglob("*.py"), *(package / "training").rglob("*.py")]:
        place = path.relative_to(package).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and METRIC.fullmatch(node.value):
                found[node.value].add(place)
            for value in _metric_dicts(node):
                keys = [key.value for key in value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
                for key in keys:
                    found[key if "/" in key else f"train/{key}"].add(place)
    return dict(found)


def _metric_dicts(node: ast.AST) -> list[ast.Dict]:
    """Return the dict literals that make up the `metrics` of a LossOutput."""
    named = isinstance(node, ast.keyword) and node.arg == "metrics"
    assigned = isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "metrics" for t in node.targets)
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.Dict)] if named or assigned else []


GENERATORS: dict[str, Callable[[Path], str]] = {"tree": tree, "cli": cli, "metrics": metrics}
REQUIRED = {"README.md": {"tree", "cli"}, "docs/metrics.md": {"metrics"}}


def problems(root: Path, *, write: bool = False) -> list[str]:
    """Return what is wrong with the pages of a tree; with `write`, stale parts are renewed instead of reported."""
    fresh = {name: generate(root) for name, generate in GENERATORS.items()}
    found = [f"{page}: is missing" for page in REQUIRED if not (root / page).is_file()]
    for page in sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")]):
        name, text = page.relative_to(root).as_posix(), page.read_text(encoding="utf-8")
        renewed = BLOCK.sub(lambda m: f"<!-- generated:{m[1]} -->\n{fresh.get(m[1], m[2])}<!-- /generated -->", text)
        parts = {match[1]: match[2] for match in BLOCK.finditer(text)}
        lacking = REQUIRED.get(name, set()) - set(parts)
        found += [f"{name}: lacks the generated part {part!r}, <!-- generated:{part} --> ..." for part in lacking]
        found += [f"{name}: no generator {part!r}" for part in set(parts) - set(fresh)]
        if write:
            if renewed != text:
                page.write_text(renewed, encoding="utf-8")
        else:
            stale = [part for part, old in parts.items() if fresh.get(part, old) != old]
            found += [f"{name}: the part {part!r} is stale; run {Path(__file__).name} --write" for part in stale]
        dead = [target for target in LINK.findall(text) if not (page.parent / target).exists()]
        found += [f"{name}: the link to {target} leads nowhere" for target in dead]
    explained = importlib.import_module("trivium.apps.dashboard.explain").METRICS
    silent = sorted(set(logged_metrics(root)) - set(explained))
    return found + [f"metric {name} is logged but not explained in apps/dashboard/explain.py" for name in silent]


def main() -> int:
    """Check or write, and say what is wrong."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--write", action="store_true")
    options.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2])
    chosen = options.parse_args()
    sys.path.insert(0, str(chosen.root / "src"))
    found = problems(chosen.root, write=chosen.write)
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
