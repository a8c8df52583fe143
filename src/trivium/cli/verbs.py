"""The verbs: a static list, so that `trivium --help` imports neither torch nor a page."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from trivium.config import STAGES

TOOLS = {
    "run": "A recipe, stage by stage: skips what is done, resumes what was cut off, redoes what changed.",
    "serve": "An OpenAI-compatible API and a chat page that puts the stages side by side.",
    "rank": "The page on which people rank responses and write ideal ones.",
    "people": "Accounts for the rank page: invite NAME, list, revoke NAME.",
    "database": "The judgements: backup FILE, restore FILE, export FILE, prioritise, upgrade, downgrade VERSION.",
    "dashboard": "A live walkthrough of your own run: curves, samples, specimens, lineage.",
    "report": "The measured comparison of the stages, as HTML, Markdown and JSON.",
    "chat": "Talk to a model in the terminal.",
    "doctor": "What this machine has and what Trivium would use of it, measured.",
}
"""The other verbs and what each is, in one line."""


def help_text() -> str:
    """Return what `trivium --help` prints; a stage's line is the first of its own docstring."""
    lines = ["usage: trivium VERB [OPTIONS]      (each verb has its own --help)", ""]
    lines += [f"  {verb:<20}{TOOLS[verb]}" for verb in TOOLS]
    lines += ["", "one stage of a recipe alone, `trivium STAGE --recipe FILE`:", ""]
    lines += [f"  {stage:<20}{stage_summary(stage)}" for stage in STAGES]
    return "\n".join(lines)


def stage_summary(stage: str) -> str:
    """Return the first line of a stage's docstring, read without importing it (it would import torch)."""
    spec = importlib.util.find_spec(f"trivium.stages.{stage}")
    if spec is None or spec.origin is None:
        return ""
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[0].replace("\n", " ")
