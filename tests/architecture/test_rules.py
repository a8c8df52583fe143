"""The tree keeps the rules of the house, and each rule finds the violation that is planted for it."""

import shutil
from functools import cache
from pathlib import Path

import pytest
import rules

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a copy of the source that a test may spoil (each plants files of its own)."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@cache
def baseline(root, rule):
    """Return the violations of the copy before anything is planted."""
    return getattr(rules, rule)(root)


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule):
    assert rule(ROOT) == []


STAGE = '''"""A stage."""
class Config: ...
def objective(): ...
def run(config, run): ...
'''

PLANTS = [
    ("stages/planted_long.py", STAGE + "x = 1\n" * 300, "budget_violations", "planted_long.py: 304 exceeds 300"),
    ("data/planted_long.py", "x = 1\n" * 401, "budget_violations", "401 exceeds 400"),
    ("data/planted_func.py", "def f():\n" + "    x = 1\n" * 60, "budget_violations", "::f: 61 exceeds 60"),
    (
        "data/planted_config.py",
        "class PlantedConfig:\n" + "".join(f"    x{i}: int = 0\n" for i in range(21)),
        "budget_violations",
        "PlantedConfig: 21 exceeds 20",
    ),
    ("stages/planted_bare.py", STAGE.replace('"""A stage."""', ""), "shape_violations", "has no docstring"),
    ("stages/planted_part.py", STAGE.replace("def objective(): ...\n", ""), "shape_violations", "has no transform"),
    ("stages/planted_noconf.py", STAGE.replace("class Config: ...\n", ""), "shape_violations", "has no Config"),
    (
        "stages/planted_order.py",
        STAGE.replace("class Config: ...\n", "") + "class Config: ...\n",
        "shape_violations",
        "the order is",
    ),
    ("stages/planted_helper.py", STAGE.replace("def run", "def help(): ...\ndef run"), "shape_violations", "help is a"),
    (
        "stages/planted_late.py",
        STAGE.replace("def run", "#\n" * 120 + "def run"),
        "shape_violations",
        "run begins at line 124",
    ),
    ("stages/planted/__init__.py", "x = 1\n", "shape_violations", "stages/planted/__init__.py: has no"),
    ("data/planted_pickle.py", "import pickle\npickle.load(open('x'))\n", "call_violations", "pickle.load"),
    ("data/planted_import.py", "from pickle import load\n", "call_violations", "import pickle"),
    ("data/planted_eval.py", "eval('1')\n", "call_violations", "eval("),
    ("data/planted_exec.py", "exec('1')\n", "call_violations", "exec("),
    ("data/planted_load.py", "torch.load('x')\n", "call_violations", "torch.load without"),
    ("data/planted_weights.py", "f('x', weights_only=False)\n", "call_violations", "weights_only=False"),
    ("data/planted_trust.py", "f('x', trust_remote_code=True)\n", "call_violations", "trust_remote_code=True"),
    ("data/planted_shell.py", "subprocess.run('x', shell=True)\n", "call_violations", "shell=True"),
    ("data/planted_import.py", "import planted.part\n", "dependency_violations", "imports planted, which"),
    ("apps/planted.js", "node.innerHTML = name;\n", "call_violations", "innerHTML"),
    ("apps/planted.html", "<script>document.write(x)</script>\n", "call_violations", "document.write"),
    ("data/utils.py", "x = 1\n", "file_violations", "'utils' names nothing"),
    ("data/helpers/planted.py", "x = 1\n", "file_violations", "'helpers' names nothing"),
    ("apps/planted.min.js", "x\n", "file_violations", "third-party"),
    ("apps/vendor/planted.js", "x\n", "file_violations", "third-party"),
    ("apps/planted_wide.js", "x" * 501, "file_violations", "is minified"),
    ("apps/planted_licence.js", "/* @" + "license X */\n", "file_violations", "another project's licence"),
    ("apps/planted.png", "\0PNG", "file_violations", "is binary"),
    ("../../tests/nowhere/test_planted.py", "", "room_violations", "tests/nowhere: mirrors no room"),
]


@pytest.mark.parametrize(("path", "text", "rule", "expected"), PLANTS, ids=[f"{p[2]}-{p[3]}" for p in PLANTS])
def test_the_rule_finds_what_is_planted(copy, path, text, rule, expected):
    target = copy / "src" / "trivium" / path
    before = baseline(copy, rule)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    added = [line for line in getattr(rules, rule)(copy) if line not in before]
    target.unlink()
    if not any(target.parent.iterdir()):
        target.parent.rmdir()
    assert any(expected in line for line in added), added


def test_a_dependency_that_nothing_uses_is_found(copy, tmp_path):
    shutil.copytree(copy / "src", tmp_path / "src")
    text = (
        (copy / "pyproject.toml")
        .read_text()
        .replace("dependencies = [", 'dependencies = [\n    "planted_package>=1",', 1)
    )
    (tmp_path / "pyproject.toml").write_text(text)
    assert "pyproject.toml: declares planted_package, which nothing uses" in rules.dependency_violations(tmp_path)


def test_an_exception_that_is_no_longer_needed_is_found(copy, monkeypatch):
    monkeypatch.setattr(rules, "EXCEPTIONS", {"src/trivium/__init__.py": 500, "src/trivium/gone.py": 500})
    found = rules.budget_violations(copy)
    assert any("remove its exception" in line for line in found)
    assert any("does not exist" in line for line in found)


def test_an_exception_only_shrinks(copy, monkeypatch):
    (copy / "src/trivium/data/planted_shrunk.py").write_text("x = 1\n" * 450)
    monkeypatch.setattr(rules, "EXCEPTIONS", {"src/trivium/data/planted_shrunk.py": 500})
    assert any("lower its exception" in line for line in rules.budget_violations(copy))
    (copy / "src/trivium/data/planted_shrunk.py").unlink()
