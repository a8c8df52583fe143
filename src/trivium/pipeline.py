"""A recipe, stage by stage: the done is skipped, the cut off resumes, the changed is redone with what depends on it.

A run's identity is its fingerprint (stage, config, parents, inputs, seed, settings, version), so "is it done?" is a
look at a folder. Everything is checked before any work starts, and one process at a time owns a workspace.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from trivium.config import (
    STAGES,
    ConfigError,
    DiskFull,
    Recipe,
    Signalled,
    StageSpec,
    Stopped,
    UserError,
    Waiting,
    build,
    facts,
    is_code,
    is_disk_full,
    load_attribute,
    suggest,
)
from trivium.preferences.demonstrations import digest_of, is_database, locate
from trivium.preferences.store import Store
from trivium.records import RunManifest, from_dict, sha256_file, to_dict
from trivium.runs.manifest import (
    Run,
    carried_cost,
    code_version,
    drop_checkpoints,
    fingerprint,
    host_facts,
    now,
    read_manifest,
    write_manifest,
)
from trivium.runs.registry import latest_runs, resolve
from trivium.runs.workspace import damage, locked
from trivium.training import float8
from trivium.training.distributed import decide, joined, precision_name, world
from trivium.training.stopping import heed, stoppable


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One stage of a recipe with everything resolved, ready to be run, resumed or skipped."""

    spec: StageSpec
    module: ModuleType
    config: Any
    manifest: RunManifest
    folder: Path


def stage_module(name: str) -> ModuleType:
    """Return the module of a stage: one of Trivium's own by name, or code of yours by its dotted path.

    Raises ConfigError when there is none, or when it lacks `Config` or `run`.
    """
    own = name in STAGES
    if not own and "." not in name and importlib.util.find_spec(name) is None:
        raise ConfigError(f"no stage {name!r}{suggest(name, STAGES)}")
    try:
        module = importlib.import_module(f"trivium.stages.{name}" if own else name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"stage {name!r}: cannot import {error.name!r}; is its package installed?") from None
    for attribute in ("Config", "run"):
        if not hasattr(module, attribute):
            raise ConfigError(
                f"stage {name!r} has no {attribute!r}; docs/design.md section 5 shows the shape of a stage"
            )
    return module


def configs(recipe: Recipe, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Return each table's validated Config; raises ConfigError naming the file, the table and the key."""
    return {spec.table: _config(recipe, spec, (overrides or {}).get(spec.table, {})) for spec in recipe.stages}


def _config(recipe: Recipe, spec: StageSpec, changes: Mapping[str, Any]) -> Any:
    values = _merge(spec.values, changes)
    return build(stage_module(spec.stage).Config, values, where=f"{recipe.path} [{spec.table}]")


def _merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with `changes` laid over them, nested tables merged key by key."""
    merged = dict(values)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def run_recipe(
    recipe: Recipe,
    *,
    workspace: Path | None = None,
    only: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, RunManifest]:
    """Run the recipe's stages in order and return the manifest of each table that is done.

    `only` limits the work to these tables (their parents must be done). Raises UserError for every foreseeable
    mistake, Waiting when people have rankings to give, Stopped on SIGTERM and at the time limit.
    """
    workspace = (workspace or Path("runs") / recipe.settings.name).resolve()
    with joined(recipe.settings):
        if unknown := set(only) - {spec.table for spec in recipe.stages}:
            name = min(unknown)
            raise ConfigError(f"{recipe.path} has no table [{name}]{suggest(name, [s.table for s in recipe.stages])}")
        float8.check(recipe.settings)
        validated = configs(recipe, overrides)
        done: dict[str, RunManifest] = {}
        _check_references(recipe, validated, workspace, only)
        # One process owns the workspace: the first of several ranks.
        with (
            locked(workspace) if world()[0] == 0 else contextlib.nullcontext(),
            stoppable(recipe.settings.time_limit_s),
        ):
            for spec in (spec for spec in recipe.stages if not only or spec.table in only):
                done[spec.table] = _stage(recipe, spec, validated[spec.table], workspace, done)
        return done


def _stage(
    recipe: Recipe, spec: StageSpec, config: Any, workspace: Path, done: Mapping[str, RunManifest]
) -> RunManifest:
    """Skip, resume or run one stage, as rank 0 decides; a stage without an `objective` is rank 0's alone."""
    module = stage_module(spec.stage)
    folder = workspace / spec.table

    def plan_it() -> dict[str, Any]:
        plan = make_plan(recipe, spec, config, workspace, {t: m.run_id for t, m in done.items()})
        _check_parents(plan, workspace, checked={manifest.run_id for manifest in done.values()})
        needed, manifest = _verdict(plan, workspace)
        return {"needed": needed, "manifest": to_dict(manifest)}

    decided = decide(plan_it)
    manifest = from_dict(RunManifest, decided["manifest"])
    if not decided["needed"]:
        return manifest
    plan = Plan(spec=spec, module=module, config=config, manifest=manifest, folder=folder / manifest.run_id)
    if hasattr(module, "objective"):
        return _execute(plan, recipe, workspace)
    return from_dict(RunManifest, decide(lambda: to_dict(_execute(plan, recipe, workspace))))


def _check_references(recipe: Recipe, validated: Mapping[str, Any], workspace: Path, only: Sequence[str]) -> None:
    """Raise ConfigError for a parent, an input or code that is missing, before the first stage spends its hours."""
    coming: dict[str, str] = {}
    for spec in recipe.stages:
        if only and spec.table not in only:
            continue
        for name, kind, value in _marked(validated[spec.table]):
            where = f"[{spec.table}] {name}"
            if kind == "ref":
                resolve(workspace, value, base=recipe.base, current=coming)
            elif is_code(value) and not (recipe.base / value).exists():
                try:
                    load_attribute(value)
                except ConfigError as error:
                    raise ConfigError(f"{recipe.path} {where}: {error}") from None
            elif kind == "input" and is_database(value):
                locate(value, base=recipe.base, workspace=workspace)
            elif kind == "input" and not value.startswith("hf:"):
                _input_path(recipe, value, where=where)
        coming[spec.table] = ""


def make_plan(recipe: Recipe, spec: StageSpec, config: Any, workspace: Path, current: Mapping[str, str]) -> Plan:
    """Return the plan of one stage: parents resolved, inputs hashed, fingerprint taken.

    Raises ConfigError when a parent or an input is missing.
    """
    parents: dict[str, str] = {}
    inputs: dict[str, str] = {}
    if spec.stage not in STAGES:
        inputs[f"stage:{spec.stage}"] = _hash_module(spec.stage)
    for name, kind, value in _marked(config):
        if kind == "ref":
            parents[name] = resolve(workspace, value, base=recipe.base, current=dict(current))
            inputs.update(_parent_inputs(workspace, name, parents[name]))
        elif kind == "input" and is_database(value):
            inputs[value] = digest_of(value, base=recipe.base, workspace=workspace)
        elif kind == "input" or is_code(value):
            inputs[value] = _hash_input(recipe, value, where=f"[{spec.table}] {name}")
    # What `auto` comes to on this machine: another machine's bf16 is another result.
    settings = {"precision": precision_name(recipe.settings), "strict": recipe.settings.strict}
    seed, known = recipe.settings.seed, facts(config)
    print_ = fingerprint(stage=spec.stage, config=known, parents=parents, inputs=inputs, seed=seed, settings=settings)
    run_id = f"{spec.table}-{print_[:12]}"
    manifest = RunManifest(
        run_id=run_id,
        stage=spec.stage,
        table=spec.table,
        status="running",
        fingerprint=print_,
        config=known,
        parents=parents,
        inputs=inputs,
        settings=settings,
        seed=seed,
        code=code_version(),
        host=host_facts(),
        started_at=now(),
    )
    folder = workspace / spec.table / run_id
    return Plan(spec=spec, module=stage_module(spec.stage), config=config, manifest=manifest, folder=folder)


def _check_parents(plan: Plan, workspace: Path, *, checked: Collection[str]) -> None:
    """Raise UserError for a parent whose files are not what its run wrote; `checked` are known to be whole."""
    for run_id in set(plan.manifest.parents.values()) - set(checked):
        folder = workspace / run_id.rsplit("-", 1)[0] / run_id
        manifest = None if os.sep in run_id else read_manifest(folder)
        if manifest and (wrong := damage(folder, manifest)):
            raise UserError(f"{plan.spec.table} needs {run_id}, but {wrong}; `trivium run` makes that run again")


def _marked(config: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (field, "ref", "input" or "code", value) of every marked entry; several in one field are numbered."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from _marked(value, f"{prefix}{item.name}.")
        kind = _mark(hints[item.name])
        if kind is None or not value:
            continue
        if isinstance(value, tuple | dict):
            yield from ((f"{prefix}{item.name}.{i}", kind, entry) for i, entry in enumerate(value))
        else:
            yield prefix + item.name, kind, value


def _mark(hint: Any) -> str | None:
    """Return the marker of `Ref`, `InputPath`, `CodeRef`, or of a tuple, a dict or an optional of them, else None."""
    metadata = getattr(hint, "__metadata__", ())
    if metadata and metadata[0] in ("ref", "input", "code"):
        return str(metadata[0])
    return next((mark for mark in map(_mark, typing.get_args(hint)) if mark), None)


def _parent_inputs(workspace: Path, field: str, run_id: str) -> dict[str, str]:
    """Return what its fingerprint does not say of a parent: judgements added since, a foreign folder's content."""
    if os.sep in run_id:
        files = [p for p in sorted(Path(run_id).iterdir()) if p.suffix in {".json", ".jinja", ".safetensors"}]
        return {run_id: _hash_files(files)}
    manifest = read_manifest(workspace / run_id.rsplit("-", 1)[0] / run_id)
    if manifest is None or "collection" not in manifest.summary:
        return {}
    with Store(workspace / "preferences.db") as store:
        return {f"judgements:{field}": store.digest(str(manifest.summary["collection"]))}


def _hash_input(recipe: Recipe, value: str, *, where: str) -> str:
    """Return the SHA-256 of a user's file, of all files of a folder, or of the module that a code reference names."""
    if value.startswith("hf:"):
        return value
    if is_code(value):
        try:
            return _hash_module(value.partition(":")[0])
        except ModuleNotFoundError:
            raise ConfigError(f"{recipe.path} {where} = {value!r}: no such module") from None
    path = _input_path(recipe, value, where=where)
    return _hash_files(sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path])


def _input_path(recipe: Recipe, value: str, *, where: str) -> Path:
    path = (recipe.base / Path(value).expanduser()).resolve()
    if not path.exists():
        raise ConfigError(f"{recipe.path} {where}: no file or folder {path}")
    return path


def _hash_module(name: str) -> str:
    """Return the SHA-256 of a module's file, or of all files of a package; what it imports is not followed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(name)
    origin = Path(spec.origin)
    return _hash_files(sorted(origin.parent.glob("*.py")) if origin.name == "__init__.py" else [origin])


def _hash_files(paths: Sequence[Path]) -> str:
    return hashlib.sha256("".join(f"{p.name} {sha256_file(p)}\n" for p in paths).encode()).hexdigest()


def _verdict(plan: Plan, workspace: Path) -> tuple[bool, RunManifest]:
    """Return whether the stage has to run, and its manifest (the finished one if not); says which and why."""
    previous = read_manifest(plan.folder)
    if previous is not None and previous.status == "done":
        wrong = damage(plan.folder, previous)
        if wrong is None:
            drop_checkpoints(plan.folder)  # a kill may have come between its last manifest and this
            _say(f"{plan.spec.table}: done ({previous.run_id}), skipped")
            return False, previous
        _say(f"{plan.spec.table}: {wrong}, so it runs again")
        shutil.rmtree(plan.folder)
    elif (plan.folder / "checkpoints").is_dir():
        # Checkpoints know which run they are of, so a manifest that was damaged does not cost the work.
        was = previous.status if previous else "left without a manifest that can be read"
        _say(f"{plan.spec.table}: was {was}, resumes ({plan.manifest.run_id})")
        if previous:
            return True, replace(plan.manifest, started_at=previous.started_at, cost=carried_cost(previous))
    else:
        if plan.folder.exists():
            shutil.rmtree(plan.folder)
        _say(f"{plan.spec.table}: runs ({plan.manifest.run_id}), {_reason(plan, workspace)}")
    return True, plan.manifest


def _execute(plan: Plan, recipe: Recipe, workspace: Path) -> RunManifest:
    """Run one stage and return its final manifest; another rank than the first writes into a folder that goes."""
    first = world()[0] == 0
    with contextlib.nullcontext(plan.folder) if first else tempfile.TemporaryDirectory(prefix="trivium-") as folder:
        places = {"folder": Path(folder), "workspace": workspace, "base": recipe.base, "home": plan.folder}
        run = Run(plan.manifest, settings=recipe.settings, **places)
        return _run_stage(plan, run)


def _run_stage(plan: Plan, run: Run) -> RunManifest:
    write_manifest(run.dir, run.manifest)
    try:
        heed(plan.module.run, plan.config, run)
    except Waiting as waiting:
        run.finish("waiting", str(waiting))
        raise
    except (Stopped, Signalled, KeyboardInterrupt) as stop:
        run.finish("stopped", str(stop))
        raise
    except UserError as error:
        run.finish("failed", str(error))
        raise
    except Exception as error:
        if is_disk_full(error):
            raise DiskFull(
                f"{plan.spec.table}: no space left on the disk that holds {getattr(error, 'filename', '') or run.dir}; "
                "free some and run the same command again, what is finished is kept"
            ) from error
        raise
    manifest = run.finish("done")
    if run.owner:
        _say(f"{plan.spec.table}: done in {manifest.cost.seconds:.0f} s")
    return manifest


def _reason(plan: Plan, workspace: Path) -> str:
    """Return why a stage has to run: it is new, or what differs from its newest finished run."""
    latest = latest_runs(workspace).get(plan.spec.table)
    if latest is None:
        return "for the first time"
    old, new = latest[1], plan.manifest
    changes: list[str] = []
    for name, before, after in (
        ("seed", {"seed": old.seed}, {"seed": new.seed}),
        ("config", _flat(old.config), _flat(new.config)),
        ("input", old.inputs, new.inputs),
        ("parent", old.parents, new.parents),
        ("setting", old.settings, new.settings),
        ("version", {"version": old.code.get("version")}, {"version": new.code.get("version")}),
    ):
        for key in sorted(set(before) | set(after)):
            was, is_ = before.get(key), after.get(key)
            if was != is_:
                changes.append(f"{name} {key} changed" if name == "input" else f"{name} {key}: {was} -> {is_}")
    return "because " + ("; ".join(changes[:3]) or "its fingerprint changed")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            # A manifest read back from JSON holds lists where the dataclass holds tuples.
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
