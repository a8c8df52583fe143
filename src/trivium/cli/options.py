"""What the verbs understand besides the fields of a recipe, and how it is read from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from tyro.conf import arg

from trivium.config import ConfigError

T = TypeVar("T")


def parse(cls: type[T], verb: str, words: Sequence[str], description: str) -> T:
    """Return a `cls` read from command-line words; tyro prints help and misspelt options itself and exits."""
    # A nested Config that may be None must be a group of options, not a word to be said before all others.
    config = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(cls, args=list(words), prog=f"trivium {verb}", description=description, config=config)


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
    allow_remote: bool = False
    """Let other machines in; there are no accounts yet, so only where the network is trusted."""
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
