"""Recipes become configs without guessing, and every mistake is one sentence with a way out."""

from __future__ import annotations

import dataclasses
import errno
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from trivium.config import (
    CodeRef,
    ConfigError,
    DiskFull,
    InputPath,
    Ref,
    RunSettings,
    Stopped,
    UserError,
    Waiting,
    bounds,
    build,
    call_attribute,
    is_code,
    is_disk_full,
    load_attribute,
    load_recipe,
    one_of,
    suggest,
)


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Settings of an optimizer."""

    lr: float = 1e-3
    kind: str = "muon"
    decay: float = 0.5

    def __post_init__(self) -> None:
        one_of(self, kind=("muon", "adamw"))
        bounds(self, lr=(0, None))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Settings of a loop."""

    steps: int = 10
    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Every kind of field that a stage has."""

    init: Ref = "sft@latest"
    extra: Ref | None = None
    data: tuple[InputPath, ...] = ()
    models: tuple[Ref, ...] = ()
    kinds: tuple[Literal["human", "ai"], ...] = ()
    options: dict[str, int] = field(default_factory=dict)
    rewards: dict[str, float] = field(default_factory=dict)
    rope: dict[str, Any] = field(default_factory=dict)
    flag: bool = False
    share: float = 0.5
    mode: Literal["a", "b"] = "a"
    limit: int | None = None
    fit: Fit = field(default_factory=lambda: Fit(optim=Optim(lr=5.0, decay=0.0)))


def test_nothing_given_is_the_defaults() -> None:
    """An empty table is a valid one."""
    assert build(Stage, {}, where="x") == Stage()


def test_every_kind_of_value_becomes_its_type() -> None:
    """Lists become tuples, whole numbers floats where floats are meant, tables dataclasses."""
    values = {
        "init": "sft-1",
        "extra": "a@latest",
        "data": ["a.jsonl", "m:f"],
        "models": ["a", "b"],
        "kinds": ["ai"],
        "options": {"num": 3},
        "rewards": {"m:f": 1},
        "rope": {"factor": 8.0, "type": "llama3"},
        "flag": True,
        "share": 1,
        "mode": "b",
        "limit": 4,
        "fit": {"steps": 3, "optim": {"lr": 1}},
    }
    made = build(Stage, values, where="x")
    assert made.data == ("a.jsonl", "m:f")
    assert made.kinds == ("ai",)
    assert (made.share, type(made.share)) == (1.0, float)
    assert (made.rewards["m:f"], type(made.rewards["m:f"])) == (1.0, float)
    assert made.rope == {"factor": 8.0, "type": "llama3"}
    assert (made.extra, made.limit, made.mode, made.flag) == ("a@latest", 4, "b", True)
    assert (made.fit.steps, made.fit.optim.lr) == (3, 1.0)


def test_a_nested_table_keeps_the_stages_own_defaults() -> None:
    """A stage's default for a group differs from the group's own; naming one key must not undo the others."""
    made = build(Stage, {"fit": {"optim": {"lr": 2.0}}}, where="x")
    assert made.fit.optim == Optim(lr=2.0, decay=0.0)
    assert build(Stage, {"fit": {"steps": 3}}, where="x").fit == Fit(steps=3, optim=Optim(lr=5.0, decay=0.0))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"shar": 0.5}, "r [s]: unknown key 'shar'; did you mean 'share'?"),
        ({"fit": {"optim": {"lrr": 1}}}, "r [s] fit optim: unknown key 'lrr'; did you mean 'lr'?"),
        ({"share": "0.5"}, "r [s] share = '0.5': expected float"),
        ({"share": True}, "r [s] share = True: expected float"),
        ({"fit": {"steps": True}}, "r [s] fit steps = True: expected int"),
        ({"fit": {"steps": 1.5}}, "r [s] fit steps = 1.5: expected int"),
        ({"fit": 3}, "r [s] fit = 3: expected a table"),
        ({"flag": 1}, "r [s] flag = 1: expected bool"),
        ({"init": 3}, "r [s] init = 3: expected str"),
        ({"data": "a.jsonl"}, "r [s] data = 'a.jsonl': expected tuple"),
        ({"data": ["a", 3]}, "r [s] data = 3: expected str"),
        ({"options": {"num": "many"}}, "r [s] options = 'many': expected int"),
        ({"kinds": ["robot"]}, "r [s] kinds = 'robot': must be one of human, ai"),
        ({"mode": "c"}, "r [s] mode = 'c': must be one of a, b"),
        ({"fit": {"optim": {"lr": -1.0}}}, "r [s] fit optim: lr = -1.0: must be at least 0"),
        ({"fit": {"optim": {"lr": float("nan")}}}, "r [s] fit optim: lr = nan: must be at least 0"),
        ({"fit": {"optim": {"kind": "adam"}}}, "kind = 'adam': must be one of muon, adamw; did you mean 'adamw'?"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(values: dict[str, Any], sentence: str) -> None:
    """Where, which key, which value, what would be right."""
    with pytest.raises(ConfigError) as error:
        build(Stage, values, where="r [s]")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_key_far_from_all_lists_them() -> None:
    """No near name: the known ones are listed."""
    with pytest.raises(ConfigError, match="known: decay, kind, lr"):
        build(Optim, {"zzzzzzzz": 1}, where="x")
    assert suggest("pretrian", ["pretrain", "sft"]) == "; did you mean 'pretrain'?"


def test_bounds_are_inclusive_and_skip_none() -> None:
    """Both ends belong; None is "not set"."""

    @dataclass(frozen=True)
    class C:
        x: float | None

    bounds(C(0.0), x=(0, 1))
    bounds(C(1.0), x=(0, 1))
    bounds(C(None), x=(0, 1))
    for value, wanted in ((1.1, "0 to 1"), (-0.1, "0 to 1"), (float("nan"), "0 to 1")):
        with pytest.raises(ConfigError, match=wanted):
            bounds(C(value), x=(0, 1))
    with pytest.raises(ConfigError, match="at most 1"):
        bounds(C(2.0), x=(None, 1))


# -- recipes


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_its_tables_in_order(tmp_path: Path) -> None:
    """Settings, paths filled in at every depth, a table with a stage of its own name or another's."""
    path = recipe(
        tmp_path,
        """
        [run]
        name = "demo"
        seed = 7
        [paths]
        data = "/mnt/books"
        out = "x"
        [zebra]
        stage = "sft"
        data = ["{data}/a.jsonl", "plain"]
        fit = { note = "{data}/{out}" }
        [apple]
        n = 3
        """,
    )
    loaded = load_recipe(path)
    assert (loaded.settings.name, loaded.settings.seed, loaded.base) == ("demo", 7, tmp_path.resolve())
    assert [(s.table, s.stage) for s in loaded.stages] == [("zebra", "sft"), ("apple", "apple")]
    assert loaded.stages[0].values == {"data": ["/mnt/books/a.jsonl", "plain"], "fit": {"note": "/mnt/books/x"}}
    assert loaded.stages[1].values == {"n": 3}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[a]\nx = "{dat}/f"\n[paths]\ndata = "d"', "uses {dat}, which [paths] does not name; did you mean 'data'"),
        ('[a]\nx = "{data}"', "uses {data}, which [paths] does not name"),
        ("[run]\nsede = 1\n[a]", "unknown key 'sede'; did you mean 'seed'"),
        ("[run]\nseed = -1\n[a]", "seed = -1: must be 0 to"),
        ('[run]\nprecision = "fp16"\n[a]', "must be one of auto, fp32, bf16"),
        ("x = 1\n[a]", "'x' stands outside any table"),
        ("[run]", "has no stage"),
        ("[a", "is not a TOML recipe"),
    ],
)
def test_a_broken_recipe_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    """The file is named, the mistake and the way out."""
    path = recipe(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert sentence in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_or_binary_recipe_is_one_sentence(tmp_path: Path) -> None:
    """No traceback for a wrong path, a folder or bytes."""
    with pytest.raises(ConfigError, match="no recipe at"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="not a TOML recipe"):
        load_recipe(tmp_path)
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a TOML recipe"):
        load_recipe(tmp_path / "b.toml")


def test_every_shipped_recipe_is_valid() -> None:
    """Each table of each recipe builds its stage's Config."""
    from trivium.pipeline import configs

    folder = Path(__file__).resolve().parents[1] / "recipes"
    found = sorted(folder.glob("*.toml"))
    assert found
    for path in found:
        assert configs(load_recipe(path))


# -- code in recipes


def test_code_is_told_from_files_and_artifacts() -> None:
    """`module:attribute` is code; paths, data sets, URLs and artifacts are not."""
    for text in ("trivium.data.microworld:documents", "mine:f"):
        assert is_code(text)
    for text in ("a.jsonl", "sft@latest", "hf:a/b", "C:/x.txt", "https://x.org/a", "a:", ":b", "a.b", "", "a:b.c"):
        assert not is_code(text)


def test_attributes_are_loaded_by_name() -> None:
    """Found, or one sentence: no such module, no such attribute (with the nearest)."""
    assert load_attribute("json:loads") is __import__("json").loads
    with pytest.raises(ConfigError, match="cannot import 'no_such_module'"):
        load_attribute("no_such_module:f")
    with pytest.raises(ConfigError, match="did you mean 'JSONDecoder'"):
        load_attribute("json:JSONDecodr")


def test_exit_codes() -> None:
    """What a shell script can tell apart: mistake 2, waiting 3, time limit 4, full disk 5, signals as the shell has."""
    codes = (UserError("x"), ConfigError("x"), Waiting("x"), Stopped(signal.SIGALRM, ""), DiskFull("x"))
    assert [error.exit_code for error in (*codes, Stopped(15, ""), Stopped(2, ""))] == [2, 2, 3, 4, 5, 143, 130]
    assert "same command" in str(Stopped(15, " after step 3"))


def test_settings_are_frozen() -> None:
    """A stage cannot change what the others see."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunSettings().seed = 1  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Settings that name code."""

    who: CodeRef = "people"
    optim: Optim = field(default_factory=Optim)


def test_a_code_reference_is_code_or_the_word_for_the_default() -> None:
    """A misspelt word is found before any work, not when it is imported hours later."""
    for right in ("people", "my.module:judge"):
        assert build(Judged, {"who": right}, where="r").who == right
    with pytest.raises(ConfigError, match=r"r who = 'peple': expected code as 'module:attribute' or 'people'"):
        build(Judged, {"who": "peple"}, where="r")
    with pytest.raises(ConfigError, match="r optim = 3: expected a table"):
        build(Judged, {"optim": 3}, where="r")


def test_an_option_that_code_does_not_take_is_named() -> None:
    """Not a TypeError from within: the reference, the option and the signature."""
    assert call_attribute("textwrap:indent", "a", prefix="> ") == "> a"
    with pytest.raises(ConfigError, match="textwrap:indent: got an unexpected keyword argument 'prefx'; it is called"):
        call_attribute("textwrap:indent", "a", "> ", prefx="> ")
    with pytest.raises(ConfigError, match=r"string:digits: .*; name a function"):
        call_attribute("string:digits")


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (OSError(errno.ENOENT, "No such file"), False),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), True),
        (RuntimeError("something else"), False),
    ],
)
def test_a_full_disk_is_known_by_number_or_by_words(error: Exception, full: bool) -> None:
    """safetensors and SQLite raise errors of their own, with the system's reason in the text."""
    assert is_disk_full(error) is full
