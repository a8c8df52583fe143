"""What the verbs understand besides the fields of a recipe, and how it is read from the command line."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from tyro.conf import arg

from trivium.config import ConfigError, bounds

T = TypeVar("T")


def parse(cls: type[T], verb: str, words: Sequence[str], description: str) -> T:
    """Return a `cls` read from command-line words; prints help and exits where that is asked for.

    Raises ConfigError for what is misspelt, missing, of the wrong type or out of bounds.
    """
    # A nested Config that may be None must be a group of options, not a word to be said before all others.
    config = (tyro.conf.AvoidSubcommands,)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(cls, args=list(words), prog=f"trivium {verb}", description=description, config=config)
    except ConfigError as error:  # a Config's own bounds, which know the field but not its table
        field = str(error).partition(" ")[0]
        named = [option for option in (word.partition("=")[0] for word in words) if option.endswith(f".{field}")]
        raise ConfigError(f"{named[0]}: {error}" if named else str(error)) from None
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"{_complaint(said.getvalue())}; see `trivium {verb} --help`") from None


def _complaint(box: str) -> str:
    """Return what tyro says in its box as one sentence: the problem, and the option that was perhaps meant."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    rules = [i for i, line in enumerate(lines) if line and set(line) <= set("─-")] + [len(lines)]
    # Where the terminal has no UTF-8 there is no frame, and the title is a line above a first rule of its own.
    start, end = (0, rules[0]) if "│" in box else (rules[0] + 1, rules[min(1, len(rules) - 1)])
    problem = " ".join(lines[start:end]).partition("Got errors:")[0].strip(" .")
    near = next((line.split()[0] for line in lines[end:] if line.startswith("--") and set(line) != {"-"}), "")
    meant = f"; did you mean {near}?" if near and "Perhaps you meant:" in lines else ""
    return (problem or " ".join(box.split())) + meant


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What `run` and the stages understand besides the fields of the recipe's tables.

    The fields end in an underscore so that a table may have any name (`[start]`, `[only]`); the options do not.
    """

    recipe_: Annotated[Path, arg(name="recipe")]
    """A TOML file (also as the first word); the shipped ones are in recipes/."""
    workspace_: Annotated[Path | None, arg(name="workspace")] = None
    """The folder that holds everything of the run; by default runs/NAME, NAME being the recipe's."""
    seed_: Annotated[int | None, arg(name="seed")] = None
    """Replaces the recipe's seed."""
    only_: Annotated[tuple[str, ...], arg(name="only")] = ()
    """Run these tables alone; what they need must be done."""
    from_: Annotated[str, arg(name="from")] = ""
    """Run from this table on; what it needs must be done."""


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """Where a run is."""

    workspace: Path | None = None
    """The folder of a run; by default the newest under runs/."""

    def place(self) -> Path:
        """Return the workspace; raises ConfigError when there is none."""
        if self.workspace is not None:
            if not self.workspace.is_dir():
                raise ConfigError(f"no workspace {self.workspace}; `trivium run` makes one")
            return self.workspace.resolve()
        manifests = sorted(Path("runs").glob("*/*/*/manifest.json"), key=lambda path: path.stat().st_mtime)
        if not manifests:
            raise ConfigError("no run under runs/; make one (`trivium run recipes/tiny.toml`) or give --workspace")
        return manifests[-1].parents[2].resolve()


@dataclass(frozen=True, kw_only=True)
class PageOptions(PlaceOptions):
    """Where a page is served: this machine alone sees it unless told otherwise."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on."""

    def __post_init__(self) -> None:
        """Refuse a port that no machine has."""
        bounds(self, port=(0, 65535))


@dataclass(frozen=True, kw_only=True)
class ServeOptions(PageOptions):
    """What `serve` understands."""

    models: tuple[str, ...] = ()
    """Models to serve, `sft@latest` or the path of a Hugging Face folder; by default those of every stage."""


@dataclass(frozen=True, kw_only=True)
class DashboardOptions(PageOptions):
    """What `dashboard` understands; a port of its own, so that all pages can be open at once."""

    port: int = 8010
    """Port to listen on."""


@dataclass(frozen=True, kw_only=True)
class RankOptions(PageOptions):
    """What `rank` understands; a port of its own, so that all pages can be open at once."""

    port: int = 8765
    """Port to listen on."""
    collection: str | None = None
    """Rank only what this run of collect_comparisons collected; by default everything that waits."""
    annotator: str = ""
    """The name that the page fills in."""
    accounts: bool = False
    """Let in only people who were invited, as everywhere but on this machine alone (for a page behind a proxy)."""
    database: str | None = None
    """A database elsewhere, e.g. postgresql+psycopg://...; by default preferences.db of the workspace."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(PlaceOptions):
    """What `chat` understands."""

    model: str = "ppo@latest"
    """`ppo@latest`, a run id, or the path of a Hugging Face folder."""
    temperature: float = 0.7
    """Sampling temperature; 0 always takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this share of the probability."""
    max_tokens: int = 256
    """Longest answer, in tokens."""
    system: str = ""
    """A system message before the conversation."""
    seed: int = 0
    """With a seed, the same lines get the same answers."""
