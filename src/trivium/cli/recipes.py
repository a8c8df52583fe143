"""The verbs that train: `run` and one per stage."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from trivium.cli.options import RunOptions, parse
from trivium.cli.verbs import TOOLS, stage_summary
from trivium.config import STAGES, ConfigError, Recipe, RunSettings, load_recipe, suggest
from trivium.runs.ranks import ranks_from_environment


def run(verb: str, rest: list[str]) -> int:
    """Run a recipe, or the tables of it that use one stage."""
    recipe_path, rest = _find_recipe(rest)
    wants_help = bool({"-h", "--help"} & set(rest))
    if recipe_path is None:
        if not wants_help:
            raise ConfigError(f"{verb} needs a recipe, e.g. `trivium {verb} recipes/tiny.toml`")
        parse(RunOptions, verb, ["--help"], stage_summary(verb) if verb in STAGES else "")
    recipe = load_recipe(Path(str(recipe_path)))

    from trivium import pipeline

    before = pipeline.configs(recipe)
    description = f"{TOOLS['run'] if verb == 'run' else stage_summary(verb)} Defaults below are those of {recipe.path}."
    options = parse(_options_class(recipe, before), verb, ["--recipe", str(recipe_path), *rest], description)
    settings: RunSettings = options.settings_
    if options.seed_ is not None:
        settings = dataclasses.replace(settings, seed=options.seed_)
    overrides = {
        table: changed
        for number, (table, config) in enumerate(before.items())
        if (changed := _changes(config, getattr(options, f"table_{number}")))
    }
    only = _selection(recipe, verb, options)
    workspace = (options.workspace_ or Path("runs") / settings.name).resolve()
    recipe = dataclasses.replace(recipe, settings=settings)
    pipeline.run_recipe(recipe, workspace=workspace, only=only, overrides=overrides)
    return finish(workspace) if ranks_from_environment().first else 0


def _find_recipe(rest: list[str]) -> tuple[str | None, list[str]]:
    """Take the recipe out of the options: the first word, or what follows `--recipe`."""
    for index, word in enumerate(rest):
        if word == "--recipe" and index + 1 < len(rest):
            return rest[index + 1], rest[:index] + rest[index + 2 :]
        if word.startswith("--recipe="):
            return word.partition("=")[2], rest[:index] + rest[index + 1 :]
    if rest and not rest[0].startswith("-"):
        return rest[0], rest[1:]
    return None, rest


def _options_class(recipe: Recipe, configs: Mapping[str, Any]) -> type[Any]:
    """Return RunOptions with one more field per table of the recipe, so that `--sft.fit.steps 10` is understood.

    The fields are numbered, because a table may have a name that no Python field can have.
    """
    tables: list[tuple[str, Any, Any]] = [
        ("settings_", Annotated[RunSettings, arg(name="run")], field(default=recipe.settings))
    ]
    for number, (table, config) in enumerate(configs.items()):
        tables.append((f"table_{number}", Annotated[type(config), arg(name=table)], field(default=config)))
    return dataclasses.make_dataclass("Options", tables, bases=(RunOptions,), frozen=True, kw_only=True)


def _changes(before: Any, after: Any) -> dict[str, Any]:
    """Return the fields in which two instances of one dataclass differ, as nested plain values."""
    changed: dict[str, Any] = {}
    for item in dataclasses.fields(before):
        old, new = getattr(before, item.name), getattr(after, item.name)
        if old == new:
            continue
        if dataclasses.is_dataclass(new) and type(old) is type(new):
            changed[item.name] = _changes(old, new)
        else:
            changed[item.name] = dataclasses.asdict(new) if dataclasses.is_dataclass(new) else new  # type: ignore[arg-type]
    return changed


def _selection(recipe: Recipe, verb: str, options: RunOptions) -> tuple[str, ...]:
    """Return the tables to run; () means all."""
    tables = [spec.table for spec in recipe.stages]
    if verb != "run":
        chosen = tuple(spec.table for spec in recipe.stages if spec.stage == verb)
        if not chosen:
            raise ConfigError(f"{recipe.path} has no table for the stage {verb!r}; its tables: {', '.join(tables)}")
        return chosen
    for name in (*options.only_, *([options.from_] if options.from_ else [])):
        if name not in tables:
            raise ConfigError(f"{recipe.path} has no table {name!r}{suggest(name, tables)}")
    if options.from_:
        return tuple(tables[tables.index(options.from_) :])
    return options.only_


def finish(workspace: Path) -> int:
    """Write the report, print its table, the paths, and what to try next."""
    from trivium.apps.report import render_text, write_report

    page = write_report(workspace)
    own = "trivium" if shutil.which("trivium") else str(_shorten(Path(sys.executable).parent / "trivium"))
    place = f"--workspace '{_shorten(workspace)}'"
    print(f"\n{render_text(workspace)}\n")
    print(f"report     {_shorten(page)}\nworkspace  {_shorten(workspace)}\n\ntry next:")
    for verb, what in (
        ("chat", "talk to the last model"),
        ("serve", "API and chat page"),
        ("dashboard", "see how it learned"),
    ):
        print(f"  {own} {verb + ' ' + place:<{len(place) + 12}}# {what}")
    return 0


def _shorten(path: Path) -> Path:
    """Return the path relative to the current folder where it lies inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
