"""Every import contract, lint and type rule of docs/design.md section 3 is broken by the violation planted for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT_IMPORTS = "from importlinter.cli import lint_imports_command as main; main()"


def make_copy(folder: Path) -> Path:
    """Return a copy of the source and of the configuration of the checkers."""
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def plant(root: Path, module: str, line: str) -> None:
    """Append a line to a module of the copy (made when it does not exist)."""
    path = root / "src" / "trivium" / module
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"\n{line}\n")


def check(root: Path, *command: str) -> tuple[int, str]:
    """Return (exit code, output) of a checker run in the copy."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_the_tree_keeps_every_import_contract():
    code, output = check(ROOT, "-c", LINT_IMPORTS, "--no-logo", "--no-cache")
    assert code == 0, output


PLANTED = [
    ("floors", "config.py", "import trivium.pipeline", "trivium.config"),
    ("floors", "data/shards.py", "import trivium.models.config", "trivium.data.shards"),
    ("floors", "rewards/learned.py", "import trivium.training.loop", "trivium.rewards.learned"),
    ("stages-independent", "stages/sft.py", "import trivium.stages.dpo", "trivium.stages.sft"),
    ("apps-independent", "apps/serve/__init__.py", "import trivium.apps.rank", "trivium.apps.serve"),
    ("no-circles", "runs/events.py", "import trivium.runs.registry", "trivium.runs"),
    ("without-torch", "records.py", "import torch", "trivium.records"),
    ("without-torch", "apps/report/__init__.py", "import trivium.models.hf", "trivium.apps.report"),
    ("apps-never-train", "apps/serve/__init__.py", "import trivium.training.loop", "trivium.apps.serve"),
    ("apps-never-train", "apps/dashboard/__init__.py", "import trivium.evals", "trivium.apps.dashboard"),
    ("losses-are-mathematics", "losses/dpo.py", "import trivium.config", "trivium.losses.dpo"),
]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Return a copy of the tree that keeps every contract; a test that plants in it takes the plant out again."""
    root = make_copy(tmp_path_factory.mktemp("contracts"))
    code, output = check(root, "-c", LINT_IMPORTS, "--no-logo", "--no-cache")
    assert code == 0, output
    return root


@pytest.mark.parametrize(("contract", "module", "line", "named"), PLANTED, ids=[f"{p[0]}: {p[1]}" for p in PLANTED])
def test_the_contract_finds_what_is_planted(clean, contract, module, line, named):
    path = clean / "src" / "trivium" / module
    before = path.read_bytes()
    plant(clean, module, line)
    code, output = check(clean, "-c", LINT_IMPORTS, "--no-logo", "--no-cache", "--contract", contract)
    path.write_bytes(before)
    assert code == 1 and "BROKEN" in output and named in output, output


def test_a_new_top_level_name_is_found(clean):
    plant(clean, "planted_room.py", "x = 1")
    code, output = check(clean, "-c", LINT_IMPORTS, "--no-logo", "--no-cache", "--contract", "floors")
    (clean / "src" / "trivium" / "planted_room.py").unlink()
    assert code == 1 and "planted_room" in output, output


LINTED = [
    ("TID251", "losses/planted.py", "import torch.distributed"),
    ("TID251", "models/planted.py", "from torch import distributed"),
    ("D103", "data/planted.py", "def plain(x: int) -> int:\n    return x"),
    ("ANN001", "data/planted.py", 'def plain(x) -> int:\n    """Return x."""\n    return x'),
    ("ANN201", "data/planted.py", 'def plain(x: int):\n    """Return x."""\n    return x'),
    ("S301", "data/planted.py", "import pickle\n\nx = pickle.loads(b'')"),
    ("S602", "data/planted.py", "import subprocess\n\nsubprocess.run('ls', shell=True, check=False)"),
]


@pytest.mark.parametrize(("code", "module", "text"), LINTED, ids=[f"{p[0]}: {p[2][:24]}" for p in LINTED])
def test_the_linter_finds_what_is_planted(tmp_path, code, module, text):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    plant(tmp_path, module, text)
    status, output = check(tmp_path, "-m", "ruff", "check", "--no-cache", "src")
    assert status == 1 and code in output, output


def test_torch_distributed_is_allowed_in_training(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    plant(tmp_path, "training/planted.py", "import torch.distributed")
    _, output = check(tmp_path, "-m", "ruff", "check", "--no-cache", "--select", "TID251", "src")
    assert "TID251" not in output


def test_the_formatter_finds_what_is_planted(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    plant(tmp_path, "data/planted.py", "x = {  'a':1 }")
    assert check(tmp_path, "-m", "ruff", "format", "--check", "--no-cache", "src")[0] == 1


def test_the_type_checker_finds_what_is_planted(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    plant(tmp_path, "planted.py", 'def plain(x: int) -> str:\n    """Return x."""\n    return x')
    status, output = check(tmp_path, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"))
    assert status == 1 and "return-value" in output, output


@pytest.mark.parametrize("room", ["records", "config", "runs.manifest", "runs.registry", "preferences.store"])
def test_the_room_starts_without_torch(room):
    script = f"import sys, trivium.{room}; sys.exit('torch' in sys.modules)"
    assert check(ROOT, "-c", script) == (0, "")


@pytest.mark.parametrize("app", ["rank", "dashboard", "report"])
def test_the_app_starts_without_torch(app):
    script = f"import sys, trivium.apps.{app}; sys.exit('torch' in sys.modules)"
    assert check(ROOT, "-c", script)[0] == 0
