"""docs/correctness.md names tests that exist, and every row that it is about."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "correctness.md"
ROWS = {*range(1, 54)}


def named(text: str) -> list[tuple[str, str]]:
    """Return (file, test) of every name on the page."""
    return re.findall(r"`([a-z_/]+\.py)::(test_\w+)`", text)


def missing(text: str) -> list[str]:
    """Return the names that are no test."""
    found = []
    for file, test in named(text):
        path = ROOT / "tests" / file
        if not path.is_file() or not re.search(rf"^\s*def {test}\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.append(f"{file}::{test}")
    return found


def test_every_named_test_exists() -> None:
    """A test that is renamed or removed takes its row along."""
    text = PAGE.read_text(encoding="utf-8")
    assert len(named(text)) > 100 and missing(text) == []


def test_every_row_has_tests() -> None:
    """Each number stands at the start of a table's line that names at least one test."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| [\d, ]+ \|", line)]
    rows = [int(n) for line in lines for n in re.findall(r"\d+", line.split("|")[1])]
    assert sorted(rows) == sorted(ROWS) and all("::test_" in line or "same spy" in line for line in lines)


@pytest.mark.parametrize("name", ["losses/test_ppo.py::test_nothing_of_the_kind", "losses/test_nowhere.py::test_x"])
def test_a_name_that_leads_nowhere_is_found(name: str) -> None:
    """The check can fail."""
    assert missing(f"`{name}`") == [name]
