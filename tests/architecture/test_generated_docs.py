"""The documentation matches the code, and a stale page, a dead link or a silent metric is found."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("generated_docs.py")


def check(root, *options):
    """Return (exit code, output) of the generator on a tree."""
    command = [sys.executable, str(SCRIPT), "--root", str(root), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    """Return a small tree with fresh pages."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs/concepts").mkdir(parents=True)
    pages = {"README.md": ("tree", "cli"), "docs/metrics.md": ("metrics",)}
    for page, parts in {**pages, "docs/scale.md": ("plans",), "docs/concepts/depth.md": ("depths",)}.items():
        blocks = [f"<!-- generated:{part} -->\n<!-- /generated -->\n" for part in parts]
        (tmp_path / page).write_text("# Page\n" + "".join(blocks))
    (tmp_path / "docs/stages").mkdir()
    for page in (ROOT / "docs/stages").glob("*.md"):  # without their links, which lead out of this small tree
        (tmp_path / "docs/stages" / page.name).write_text(re.sub(r"\]\([^)]*\)", "]", page.read_text()))
    code, output = check(tmp_path, "--write")
    assert code == 0, output
    return tmp_path


def test_the_documentation_matches_the_code():
    code, output = check(ROOT)
    assert code == 0, output


def test_a_fresh_page_passes_and_holds_the_house(copy):
    assert check(copy) == (0, "\n")
    text = (copy / "README.md").read_text()
    assert "├── losses/" in text and "trivium STAGE --recipe FILE" in text
    assert "| `train/loss` |" in (copy / "docs/metrics.md").read_text()


def test_a_new_file_makes_the_tree_stale(copy):
    (copy / "src/trivium/losses/planted.py").write_text('"""Planted."""\n')
    code, output = check(copy)
    assert code == 1 and "README.md: the part 'tree' is stale" in output


def test_a_metric_without_explanation_is_found(copy):
    path = copy / "src/trivium/stages/planted.py"
    path.write_text('"""Planted."""\nNAME = "train/planted_metric"\n')
    code, output = check(copy)
    assert code == 1 and "train/planted_metric is logged but not explained" in output
    assert "docs/metrics.md: the part 'metrics' is stale" in output


def test_an_edited_part_a_lost_part_and_a_dead_link_are_found(copy):
    page = copy / "README.md"
    page.write_text(page.read_text().replace("usage: trivium", "usage: planted") + "[x](docs/nowhere.md)\n")
    metrics = copy / "docs/metrics.md"
    metrics.write_text("# no table\n")
    code, output = check(copy)
    assert code == 1
    assert "the part 'cli' is stale" in output
    assert "link to docs/nowhere.md leads nowhere" in output
    assert "docs/metrics.md: lacks the generated part 'metrics'" in output


def test_a_changed_default_makes_the_table_of_a_stage_stale(copy):
    path = copy / "src/trivium/stages/sft.py"
    path.write_text(path.read_text().replace("heldout_frac: float = 0.05", "heldout_frac: float = 0.06"))
    code, output = check(copy)
    assert code == 1 and "docs/stages/sft.md: the part 'config sft' is stale" in output


def test_a_stage_page_that_leaves_out_an_estimator_is_found(copy):
    page = copy / "docs/stages/grpo.md"
    page.write_text(page.read_text().replace("- `rollout/kl`:", "- it:"))
    code, output = check(copy)
    assert code == 1 and "docs/stages/grpo.md: does not say how rollout/kl is estimated" in output


def test_a_lost_stage_page_is_found(copy):
    (copy / "docs/stages/dpo.md").unlink()
    code, output = check(copy)
    assert code == 1 and "docs/stages/dpo.md: is missing" in output
