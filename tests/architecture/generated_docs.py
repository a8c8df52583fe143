"""The parts of the documentation that are made from the code: `python tests/architecture/generated_docs.py [--write]`.

A part stands between `<!-- generated:NAME -->` and `<!-- /generated -->` in README.md or a page under docs/; NAME is
one of GENERATORS below, or one of ABOUT_ONE with what it is about (`config ppo`, `metrics ppo`, `settings Name`).
Without `--write` the pages are checked: exit code 1 names each part that is stale, each link that leads nowhere, each
logged metric that nobody explains, and each stage's page that leaves out how one of its metrics is estimated.
`--root DIR` names another tree.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

BLOCK = re.compile(r"<!-- generated:([a-z_]+(?: \w+)?) -->\n(.*?)<!-- /generated -->", re.DOTALL)
METRIC = re.compile(r"(train|eval|rollout)/[a-z0-9_]+")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)")

ABOUT = {
    "bootstrap.py": "sets up and runs: demo, test, check; standard library only (the Makefile delegates)",
    "recipes": "one TOML per scale and purpose; the order of its tables is the pipeline",
    "tests": "mirrors src/trivium, plus architecture/, end_to_end/ and faults/ (killed, cut, full)",
    "launch": "files that start a recipe on many GPUs: Slurm, Kubernetes, SkyPilot",
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
    order = importlib.import_module("trivium.config").STAGES
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


@functools.cache
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
    """Return the dict literals that make up the `metrics` of a LossOutput, or the `figures` of a round."""
    named = isinstance(node, ast.keyword) and node.arg == "metrics"
    names = {t.id for t in getattr(node, "targets", ()) if isinstance(t, ast.Name)}
    assigned = isinstance(node, ast.Assign) and bool(names & {"metrics", "figures"})
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.Dict)] if named or assigned else []


def stage_metrics(root: Path, stage: str) -> str:
    """Return the table of the metrics that one stage logs, those of the shared loop included."""
    explained: dict[str, str] = importlib.import_module("trivium.apps.dashboard.explain").METRICS
    names = metrics_of(root, stage)
    rows = [
        "| metric | what it is |",
        "| --- | --- |",
        *(f"| `{name}` | {explained.get(name, '')} |" for name in names),
    ]
    return (
        "\n".join(rows if names else ["This stage logs no metric over steps; what it measures is in its manifest."])
        + "\n"
    )


def metrics_of(root: Path, stage: str) -> list[str]:
    """Return the names of the metrics that one stage logs, in order."""
    text = (root / "src" / "trivium" / "stages" / f"{stage}.py").read_text(encoding="utf-8")
    places = {f"stages/{stage}.py"} | ({"training/loop.py"} if "training.loop import FitConfig, fit" in text else set())
    return sorted(name for name, where in logged_metrics(root).items() if where & places)


def stage_config(root: Path, stage: str) -> str:
    """Return the table of a stage's Config."""
    return fields(root / "src" / "trivium" / "stages" / f"{stage}.py", "Config")


def settings(root: Path, name: str) -> str:
    """Return the table of a configuration class that several stages share, wherever it is defined."""
    package = root / "src" / "trivium"
    places = [package / "config.py", *sorted((package / "training").glob("*.py")), package / "models" / "lora.py"]
    return next((table for path in places if (table := fields(path, name))), "")


def fields(path: Path, name: str) -> str:
    """Return the table of a dataclass's own fields: name, type, default, and the docstring below each; "" if absent."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    found = next((node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None:
        return ""
    rows = ["| field | type | default | meaning, unit |", "| --- | --- | --- | --- |"]
    for item, after in zip(found.body, [*found.body[1:], None], strict=True):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        about = after.value if isinstance(after, ast.Expr) else None
        text = str(about.value) if isinstance(about, ast.Constant) else ""
        meaning = " ".join(text.split()).replace("|", "\\|")
        kind = ast.unparse(item.annotation).replace("|", "\\|")
        rows.append(f"| `{item.target.id}` | `{kind}` | {_default(item.value)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _default(value: ast.expr | None) -> str:
    """Return a field's default as it would be read, or `required`."""
    if value is None:
        return "required"
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        made = next((k.value for k in value.keywords if k.arg == "default_factory"), None)
        if isinstance(made, ast.Lambda):
            value = made.body
        elif made is not None:
            return {"dict": "`{}`"}.get(ast.unparse(made), f"`{ast.unparse(made)}()`")
    return f"`{ast.unparse(value)}`".replace("|", "\\|")


def plans(root: Path) -> str:
    """Return the table of the plans for many GPUs."""
    return str(importlib.import_module("trivium.training.plan").plan_table())


def depths(root: Path) -> str:
    """Return the table of what the `depth` dial comes to."""
    return str(importlib.import_module("trivium.training.scaling").depth_table())


GENERATORS: dict[str, Callable[[Path], str]] = {
    "tree": tree,
    "cli": cli,
    "metrics": metrics,
    "plans": plans,
    "depths": depths,
}
ABOUT_ONE: dict[str, Callable[[Path, str], str]] = {
    "config": stage_config,
    "metrics": stage_metrics,
    "settings": settings,
}
REQUIRED = {
    "README.md": {"tree", "cli"},
    "docs/metrics.md": {"metrics"},
    "docs/scale.md": {"plans"},
    "docs/concepts/depth.md": {"depths"},
}


def make(root: Path, part: str) -> str | None:
    """Return the text of a generated part, or None where there is no such part."""
    name, _, about = part.partition(" ")
    try:
        if about:
            return ABOUT_ONE[name](root, about) or None
        return GENERATORS[name](root)
    except (KeyError, FileNotFoundError):
        return None


def stage_pages(root: Path) -> dict[str, str]:
    """Return the page of each stage by its name."""
    order: tuple[str, ...] = importlib.import_module("trivium.config").STAGES
    return {f"docs/stages/{stage}.md": stage for stage in order}


def problems(root: Path, *, write: bool = False) -> list[str]:
    """Return what is wrong with the pages of a tree; with `write`, stale parts are renewed instead of reported."""
    stages = stage_pages(root)
    required = REQUIRED | {page: {f"config {stage}", f"metrics {stage}"} for page, stage in stages.items()}
    found = [f"{page}: is missing" for page in required if not (root / page).is_file()]
    fresh: dict[str, str] = {}
    for page in sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")]):
        name, text = page.relative_to(root).as_posix(), page.read_text(encoding="utf-8")
        parts = {match[1]: match[2] for match in BLOCK.finditer(text)}
        fresh |= {part: made for part in set(parts) - set(fresh) if (made := make(root, part)) is not None}
        renewed = _renew(text, fresh)
        lacking = required.get(name, set()) - set(parts)
        found += [f"{name}: lacks the generated part {part!r}, <!-- generated:{part} --> ..." for part in lacking]
        found += [f"{name}: no generator {part!r}" for part in set(parts) - set(fresh)]
        if write:
            if renewed != text:
                page.write_text(renewed, encoding="utf-8")
        else:
            stale = [part for part, old in parts.items() if fresh.get(part, old) != old]
            found += [f"{name}: the part {part!r} is stale; run {Path(__file__).name} --write" for part in stale]
        if name in stages:
            own = BLOCK.sub("", text)
            silent = [metric for metric in metrics_of(root, stages[name]) if f"`{metric}`" not in own]
            found += [f"{name}: does not say how {metric} is estimated" for metric in silent]
        dead = [target for target in LINK.findall(text) if not (page.parent / target).exists()]
        found += [f"{name}: the link to {target} leads nowhere" for target in dead]
    explained = importlib.import_module("trivium.apps.dashboard.explain").METRICS
    silent = sorted(set(logged_metrics(root)) - set(explained))
    return found + [f"metric {name} is logged but not explained in apps/dashboard/explain.py" for name in silent]


def _renew(text: str, fresh: dict[str, str]) -> str:
    return BLOCK.sub(lambda m: f"<!-- generated:{m[1]} -->\n{fresh.get(m[1], m[2])}<!-- /generated -->", text)


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
