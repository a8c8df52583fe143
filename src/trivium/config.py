"""Configuration: a TOML recipe becomes frozen dataclasses, and every mistake one clear sentence.

A recipe's first table is `[run]` (name, seed, device, threads, precision); `[paths]` names folders, which strings use
as `{name}`; each further table is a stage, in the order of the pipeline. A table may name its stage with
`stage = "..."` when one stage is used twice, or when the stage is code of your own (`stage = "my_package.my_stage"`).
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import importlib
import inspect
import re
import signal
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

T = TypeVar("T")

STAGES = (
    "data_prep",
    "train_tokenizer",
    "pretrain",
    "adapt",
    "sft",
    "collect_comparisons",
    "reward_model",
    "ppo",
    "dpo",
    "grpo",
    "rejection_sampling",
    "constitutional_ai",
    "evaluate",
    "export",
)
"""The stages that come with Trivium, in the order in which one would explain them."""


class UserError(Exception):
    """A foreseeable mistake: one sentence that names the thing and the way out; no traceback is shown for it."""

    exit_code = 2


class ConfigError(UserError):
    """A recipe or an option is wrong."""


class Waiting(UserError):
    """The pipeline stopped because people have work to do (rankings to give), not because anything is wrong."""

    exit_code = 3


class Stopped(UserError):
    """A signal or the time limit stopped the work; what is finished is kept and the same command goes on from there."""

    def __init__(self, number: int, what: str) -> None:
        """Say what was reached; the exit code is the shell's for signal `number`, or 4 for the time limit's SIGALRM."""
        super().__init__(f"stopped{what}; run the same command again to go on")
        self.exit_code = 4 if number == signal.SIGALRM else 128 + number


class Signalled(BaseException):
    """A signal came where there is nothing to finish.

    Not an Exception: it may come while something is read, whose reader would take it for the fault of a file.
    """

    def __init__(self, number: int, what: str) -> None:
        """Carry what ends the run once nobody can mistake it."""
        self.stopped = Stopped(number, what)
        super().__init__(str(self.stopped))


class DiskFull(UserError):
    """A write failed for want of space; what was whole before still is."""

    exit_code = 5


def is_disk_full(error: Exception) -> bool:
    """Tell whether a write failed for want of space; safetensors and SQLite say so in words only."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    said = str(error)
    return any(words in said for words in ("No space left", "os error 27", "os error 122", "disk is full"))


Ref = Annotated[str, "ref"]
"""An artifact: `"stage@latest"`, `"run_id"`, or the path of a Hugging Face model folder."""

CodeRef = Annotated[str, "code"]
"""`"module:attribute"`, naming code; its module is hashed, so that changed code is a changed run."""

Given = Annotated[tuple[str, ...], "given"]
"""The dotted names of the keys that a recipe sets itself; `build` fills it in, so that a dial can leave them alone."""

Dial = Annotated[T, "dial"]
"""A field that changes what others mean, or a group of them that is true or false as a whole; at 0, empty or false it
is off, and then no part of a run's identity (`facts`)."""

InputPath = Annotated[str, "input"]
"""A file or folder of the user's (relative to the recipe), or `"module:attribute"` naming code that yields the data."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The `[run]` table: what all stages share."""

    name: str = "run"
    """Names the workspace, `runs/<name>`."""
    seed: int = 0
    """Every random choice of every stage follows from it."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`; auto takes a GPU when there is one."""
    threads: int = 0
    """CPU threads; 0 means one for each core that this process may use, or OMP_NUM_THREADS where that is set."""
    precision: str = "auto"
    """`fp32`; `bf16` products over fp32 weights; `auto`: bf16 where it pays; `bf16-pure`: bf16 weights too; `fp8`: as
    bf16, with the layers' products of pretrain, adapt and sft in fp8."""
    compile: str = "auto"
    """Whether pretrain and sft compile the network's layers: `on`, `off`, `auto`: on a GPU and in long pre-training."""
    strict: bool = False
    """Whether a malformed input line is fatal instead of counted."""
    time_limit_s: float = 0.0
    """Wall-clock seconds after which the command saves a checkpoint and ends with exit code 4; 0 means no limit."""
    parallel: str = "ddp"
    """Under torchrun: `ddp` keeps the whole model on every rank, `fsdp` shards it over them. Results do not change."""
    tensor_parallel: int = 1
    """Under torchrun: so many neighbouring ranks share each layer's matrices and the rows; 1 leaves them whole."""
    context_parallel: int = 1
    """Under torchrun: so many neighbouring ranks share the positions of each row; 1 leaves rows whole."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass: less memory, a third more work, equal gradients."""
    rank_timeout_s: int = 1800
    """Seconds after which a rank that waits for another in a collective gives up; not for stages that rank 0 runs."""
    allow_changed: bool = False
    """Go on from another run's checkpoint (other data, tokenizer, config, seed), and log it, instead of refusing it."""

    def __post_init__(self) -> None:
        """Refuse what no machine can do."""
        one_of(self, precision=("auto", "fp32", "bf16", "bf16-pure", "fp8"), parallel=("ddp", "fsdp"))
        one_of(self, compile=("auto", "on", "off"))
        if self.precision == "bf16-pure" and self.parallel == "fsdp":
            raise ConfigError("precision = 'bf16-pure' is for whole weights; with parallel = 'fsdp' use 'bf16'")
        if self.precision == "fp8" and self.tensor_parallel > 1:
            raise ConfigError("precision = 'fp8' multiplies whole matrices; with tensor_parallel above 1 use 'bf16'")
        bounds(self, threads=(0, 4096), seed=(0, 2**31 - 1), time_limit_s=(0, None), rank_timeout_s=(1, None))
        bounds(self, tensor_parallel=(1, 4096), context_parallel=(1, 4096))


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One table of a recipe: its name, the stage it runs and its raw keys."""

    table: str
    stage: str
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A parsed recipe; paths in it are relative to `base`."""

    path: Path
    base: Path
    settings: RunSettings
    stages: tuple[StageSpec, ...] = field(default=())


def load_recipe(path: Path) -> Recipe:
    """Return the recipe at `path`.

    Raises ConfigError when it is missing, is not TOML, or holds an unknown key in `[run]`.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}; the shipped ones are in recipes/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{path} is not a TOML recipe: {error}") from None
    loose = [key for key, value in tables.items() if not isinstance(value, dict)]
    if loose:
        raise ConfigError(f"{path}: {loose[0]!r} stands outside any table; move it under [run] or a stage")
    settings = build(RunSettings, tables.pop("run", {}), where=f"{path} [run]")
    tables = _fill_paths(tables, tables.pop("paths", {}), where=str(path))
    stages = []
    for table, values in tables.items():
        values = dict(values)
        stages.append(StageSpec(table=table, stage=str(values.pop("stage", table)), values=values))
    if not stages:
        raise ConfigError(f"{path} has no stage; add a table such as [pretrain]")
    return Recipe(path=path, base=path.resolve().parent, settings=settings, stages=tuple(stages))


def _fill_paths(value: Any, paths: Mapping[str, Any], *, where: str) -> Any:
    """Return `value` with every `{name}` in its strings replaced by what `[paths]` calls so."""
    if isinstance(value, Mapping):
        return {key: _fill_paths(item, paths, where=where) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill_paths(item, paths, where=where) for item in value]
    if not isinstance(value, str):
        return value
    for name in re.findall(r"\{(\w+)\}", value):
        if name not in paths:
            raise ConfigError(f"{where}: {value!r} uses {{{name}}}, which [paths] does not name{suggest(name, paths)}")
        value = value.replace(f"{{{name}}}", str(paths[name]))
    return value


def build(cls: type[T], values: Mapping[str, Any], *, where: str, default: T | None = None) -> T:
    """Return a `cls` (a frozen dataclass) from plain values, nested tables included.

    A key that is not given is as in `default`, where there is one: a table that names some of a group's fields keeps
    the others as its stage has them. Raises ConfigError naming `where`, the key, the value and what would be right.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {} if default is None else {name: getattr(default, name) for name in fields}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}{suggest(key, fields)}")
        factory = fields[key].default_factory
        group = arguments.get(key, None if factory is dataclasses.MISSING else factory())
        if dataclasses.is_dataclass(group) and isinstance(value, Mapping):
            arguments[key] = build(typing.cast(type, type(group)), value, where=f"{where} {key}", default=group)
        else:
            arguments[key] = _convert(hints[key], value, where=f"{where} {key}")
            _refuse_no_code(hints[key], arguments[key], fields[key].default, where=f"{where} {key}")
    for key in (name for name, hint in hints.items() if hint == Given):
        if key in values:
            raise ConfigError(f"{where} {key}: is filled in from the recipe's own keys; leave it out")
        arguments[key] = tuple(sorted(_names(values)))
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def _names(values: Mapping[str, Any], prefix: str = "") -> typing.Iterator[str]:
    """Yield the dotted name of every key, inner tables included."""
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{key}.")


def facts(config: Any) -> dict[str, Any]:
    """Return a Config as plain data for the manifest and the fingerprint, without the dials that are off.

    A recipe that turns none is thus the run it was before there was a dial, in a group of fields too.
    """
    data: dict[str, Any] = dataclasses.asdict(config)
    for item in dataclasses.fields(config):
        if dataclasses.is_dataclass(getattr(config, item.name)):
            data[item.name] = facts(getattr(config, item.name))
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        if {"dial", "given"} & set(marks) and not getattr(config, name):
            del data[name]
    return data


def _refuse_no_code(hint: Any, value: Any, default: Any, *, where: str) -> None:
    """Raise ConfigError for a CodeRef that names no code, unless it is the word that stands for the default."""
    if "code" in getattr(hint, "__metadata__", ()) and value not in ("", default) and not is_code(value):
        word = f" or {default!r}" if isinstance(default, str) and default else ""
        raise ConfigError(f"{where} = {value!r}: expected code as 'module:attribute'{word}")


def suggest(word: str, known: typing.Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` when a known name is near, else the list of names."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    """Return `value` as the type that `hint` asks for, without guessing (a string never becomes a number)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _convert(arguments[0], value, where=where)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(typing.cast(type, hint), value, where=where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where} = {value!r}: must be one of {', '.join(arguments)}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where=where)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, where=where) for item in value)
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _convert(arguments[1], v, where=where) for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = origin or hint
    if hint is not Any and (not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool)):
        name = "a table of its own keys" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint))
        raise ConfigError(f"{where} = {value!r}: expected {name}")
    return value


def bounds(config: object, **limits: tuple[float | None, float | None]) -> None:
    """Raise ConfigError unless each named field lies within its (low, high); None leaves a side open."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is None:
            continue
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            wanted = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
            raise ConfigError(f"{name} = {value!r}: must be {wanted}")


def one_of(config: object, **choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless each named field is among its choices."""
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ConfigError(f"{name} = {value!r}: must be one of {', '.join(allowed)}{suggest(str(value), allowed)}")


def load_attribute(reference: str) -> Any:
    """Return the object that `"module:attribute"` names.

    Raises ConfigError when the module or the attribute is missing.
    """
    module_name, _, attribute = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{reference}: cannot import {error.name!r}; is its package installed?") from None
    if not hasattr(module, attribute):
        raise ConfigError(f"{reference}: {module_name} has no {attribute!r}{suggest(attribute, vars(module))}")
    return getattr(module, attribute)


def call_attribute(reference: str, *arguments: Any, **options: Any) -> Any:
    """Return what the code that `"module:attribute"` names gives for these arguments.

    Raises ConfigError when there is none, or when it does not take them (a misspelt option, say).
    """
    function = load_attribute(reference)
    try:
        inspect.signature(function).bind(*arguments, **options)
    except TypeError as error:
        shown = f"it is called as {reference}{inspect.signature(function)}" if callable(function) else "name a function"
        raise ConfigError(f"{reference}: {error}; {shown}") from None
    except ValueError:  # some of C's functions cannot say what they take
        pass
    return function(*arguments, **options)


def is_code(reference: str) -> bool:
    """Tell whether a recipe's string names code (`module:attribute`) rather than a file or an artifact."""
    module, _, attribute = reference.partition(":")
    return bool(attribute) and attribute.isidentifier() and all(p.isidentifier() for p in module.split("."))
