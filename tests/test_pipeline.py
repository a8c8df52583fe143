"""The pipeline with stages made of a few lines: what is skipped, resumed and redone, and what is refused."""

from __future__ import annotations

import contextlib
import fcntl
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trivium.config import ConfigError, DiskFull, Recipe, Stopped, UserError, Waiting, load_recipe
from trivium.pipeline import run_recipe
from trivium.runs.manifest import read_manifest
from trivium.training.stopping import Interrupted, graceful_stop, stoppable

STAGE = '''
"""A stage of the test's own: copies its text, and its parent's, into a file."""
from dataclasses import dataclass
from pathlib import Path
import errno, os, time
from trivium.config import InputPath, Ref, UserError, Waiting

@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings."""
    text: str = "x"
    parent: Ref = ""
    source: InputPath = ""

def transform(text):
    """Return the text."""
    return text

def run(config, run):
    """Write the text."""
    if (run.workspace / "fail").exists():
        raise OSError(errno.ENOSPC, "No space left on device", str(run.dir / "text.txt"))
    if (run.workspace / "signal").exists():
        try:
            os.kill(os.getpid(), int((run.workspace / "signal").read_text()))
            time.sleep(1)
        except Exception as error:  # as around a library that raises bare ones
            raise UserError(f"the file cannot be read: {error}") from None
        except BaseException as error:  # as C code does that calls Python and takes any exception for a failure
            if (run.workspace / "swallow").exists():
                kind = {"ours": UserError, "theirs": ValueError}[(run.workspace / "swallow").read_text()]
                raise kind("could not determine the shape") from None
            raise
    if (run.workspace / "wait").exists():
        raise Waiting("two rankings to give")
    with (run.workspace / "calls.txt").open("a") as calls:
        calls.write(run.manifest.table + "\\n")
    before = (run.parent("parent") / "text.txt").read_text() if config.parent else ""
    (run.dir / "text.txt").write_text(before + config.text)
'''


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with a stage module that can be imported, and a file to read."""
    (tmp_path / "copy_stage_for_test.py").write_text(STAGE)
    (tmp_path / "source.txt").write_text("one")
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path.remove(str(tmp_path))
    sys.modules.pop("copy_stage_for_test", None)


def recipe(place: Path, *, first: str = 'text = "a"', second: str = "", seed: int = 0) -> Recipe:
    """Return a recipe of two stages, the second after the first."""
    path = place / "recipe.toml"
    path.write_text(
        f'[run]\nseed = {seed}\n[first]\nstage = "copy_stage_for_test"\nsource = "source.txt"\n{first}\n'
        f'[second]\nstage = "copy_stage_for_test"\nparent = "first@latest"\n{second}\n'
    )
    return load_recipe(path)


def calls(place: Path) -> list[str]:
    """Return which stages ran, in order, since the last look."""
    path = place / "w" / "calls.txt"
    lines = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_done_is_skipped_and_a_change_redoes_what_needs_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Second run: nothing. Second stage changed: only it. First changed: both, and the reason is named."""
    workspace = place / "w"
    done = run_recipe(recipe(place), workspace=workspace)
    assert calls(place) == ["first", "second"]
    assert (workspace / "second" / done["second"].run_id / "text.txt").read_text() == "ax"
    run_recipe(recipe(place), workspace=workspace)
    assert calls(place) == []
    run_recipe(recipe(place, second='text = "b"'), workspace=workspace)
    assert calls(place) == ["second"]
    assert "config text: x -> b" in capsys.readouterr().err
    run_recipe(recipe(place, first='text = "c"'), workspace=workspace)
    assert calls(place) == ["first", "second"]
    # Back to the first recipe: both results are still there.
    run_recipe(recipe(place), workspace=workspace)
    assert calls(place) == []


def test_one_changed_byte_of_input_and_another_seed_redo_all(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The input is hashed, not dated: same size, one byte changed."""
    run_recipe(recipe(place), workspace=place / "w")
    calls(place)
    (place / "source.txt").write_text("onf")
    run_recipe(recipe(place), workspace=place / "w")
    assert calls(place) == ["first", "second"]
    assert "input source.txt changed" in capsys.readouterr().err
    run_recipe(recipe(place, seed=1), workspace=place / "w")
    assert calls(place) == ["first", "second"]


def test_a_damaged_artifact_is_named_and_made_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run whose file was changed behind its back is not trusted."""
    done = run_recipe(recipe(place), workspace=place / "w")
    (place / "w" / "first" / done["first"].run_id / "text.txt").write_text("b")
    run_recipe(recipe(place), workspace=place / "w")
    assert calls(place)[2:] == ["first"]
    assert "text.txt is not what the run wrote" in capsys.readouterr().err


def test_only_runs_the_named_table(place: Path) -> None:
    """And needs its parent done."""
    with pytest.raises(ConfigError, match=r"no finished run of 'first'.*run that stage first"):
        run_recipe(recipe(place), workspace=place / "w", only=["second"])
    run_recipe(recipe(place), workspace=place / "w", only=["first"])
    run_recipe(recipe(place), workspace=place / "w", only=["second"])
    assert calls(place) == ["first", "second"]


def test_one_table_alone_does_not_build_on_a_damaged_parent(place: Path) -> None:
    """`trivium STAGE` reads what an earlier command wrote, so it looks at it first."""
    done = run_recipe(recipe(place), workspace=place / "w", only=["first"])
    calls(place)
    (place / "w" / "first" / done["first"].run_id / "text.txt").write_text("b")
    with pytest.raises(UserError, match=r"second needs first-.*text.txt is not what the run wrote.*`trivium run`"):
        run_recipe(recipe(place), workspace=place / "w", only=["second"])
    assert calls(place) == []
    run_recipe(recipe(place), workspace=place / "w")
    assert calls(place) == ["first", "second"]


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C as at a terminal: a shell starts what it puts into the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_leaves_a_run_that_says_it_was_stopped(
    place: Path, number: signal.Signals, raised: type[BaseException]
) -> None:
    """Not `failed`, nor `running` for ever, nor the fault of what was being read; the same command goes on."""
    (place / "w").mkdir()
    (place / "w" / "signal").write_text(str(int(number)))
    with pytest.raises(raised):
        run_recipe(recipe(place), workspace=place / "w")
    manifest = read_manifest(next((place / "w" / "first").iterdir()))
    assert manifest is not None and manifest.status == "stopped"
    (place / "w" / "signal").unlink()
    run_recipe(recipe(place), workspace=place / "w")
    assert calls(place) == ["first", "second"]


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_a_signal_that_a_library_took_for_a_fault_is_still_a_signal(place: Path, kind: str) -> None:
    """As SIGTERM while safetensors has torch make a tensor, which then "could not determine the shape" of it."""
    (place / "w").mkdir()
    (place / "w" / "signal").write_text(str(int(signal.SIGTERM)))
    (place / "w" / "swallow").write_text(kind)
    with pytest.raises(Stopped) as stopped:
        run_recipe(recipe(place), workspace=place / "w")
    assert stopped.value.exit_code == 143
    manifest = read_manifest(next((place / "w" / "first").iterdir()))
    assert manifest is not None and manifest.status == "stopped"
    (place / "w" / "signal").unlink()
    (place / "w" / "fail").touch()
    with pytest.raises(DiskFull):  # the next one's failure is its own again
        run_recipe(recipe(place), workspace=place / "w")
    (place / "w" / "fail").unlink()
    run_recipe(recipe(place), workspace=place / "w")
    assert calls(place) == ["first", "second"]


@pytest.mark.parametrize("swallows", [False, True])
def test_work_that_is_interrupted_says_so_whatever_a_library_makes_of_it(swallows: bool) -> None:
    """Inside the loop: what can be done again is left at once, and a failure without a signal stays one."""

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            if swallows:
                raise ValueError("could not determine the shape") from None
            raise

    with graceful_stop() as request:
        with pytest.raises(Interrupted), request.interruptible():
            work()
        assert request.agreed() == signal.SIGTERM
    with graceful_stop() as request, pytest.raises(ValueError, match="own"), request.interruptible():
        raise ValueError("own")


@pytest.mark.parametrize("stops", [True, False])
def test_a_sigterm_on_the_way_out_changes_nothing(monkeypatch: pytest.MonkeyPatch, stops: bool) -> None:
    """The second while the first is told, or the first when all is done: the handlers of before come back, both."""
    before, real = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)], signal.signal

    def restore(number: int, handler: signal.Handlers) -> object:
        if number == signal.SIGTERM:
            signal.raise_signal(number)
        return real(number, handler)

    with pytest.raises(Stopped) if stops else contextlib.nullcontext(), stoppable(1000.0):
        monkeypatch.setattr(signal, "signal", restore)
        if stops:
            signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_sigterm_on_the_way_in_is_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes between the handler and the work."""
    before, real = signal.getsignal(signal.SIGTERM), signal.signal

    def install(number: int, handler: signal.Handlers) -> object:
        monkeypatch.undo()
        real(number, handler)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(signal, "signal", install)
    with pytest.raises(Stopped), stoppable(0.0):
        pytest.fail("the work began")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_sigterm_after_the_loops_last_look_is_not_lost() -> None:
    """Noted when nobody asks any more: who had the signals before the loop gets it."""
    with pytest.raises(Stopped), stoppable(0.0), graceful_stop():
        signal.raise_signal(signal.SIGTERM)


def test_a_full_disk_names_the_path_and_keeps_what_is_done(place: Path) -> None:
    """Exit code 5; once there is space the same command goes on."""
    run_recipe(recipe(place), workspace=place / "w", only=["first"])
    (place / "w" / "fail").touch()
    with pytest.raises(DiskFull, match="no space left") as failure:
        run_recipe(recipe(place), workspace=place / "w")
    assert failure.value.exit_code == 5
    assert "text.txt" in str(failure.value)
    (place / "w" / "fail").unlink()
    run_recipe(recipe(place), workspace=place / "w")
    assert calls(place) == ["first", "second"]


def test_waiting_for_people_is_not_a_failure(place: Path) -> None:
    """The manifest says waiting; the next run goes on from there."""
    (place / "w").mkdir()
    (place / "w" / "wait").touch()
    with pytest.raises(Waiting) as waiting:
        run_recipe(recipe(place), workspace=place / "w")
    assert waiting.value.exit_code == 3
    manifest = read_manifest(next((place / "w" / "first").iterdir()))
    assert manifest is not None and (manifest.status, manifest.message) == ("waiting", "two rankings to give")
    (place / "w" / "wait").unlink()
    run_recipe(recipe(place), workspace=place / "w")
    assert calls(place) == ["first", "second"]


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ('txt = "a"', r"recipe.toml \[first\]: unknown key 'txt'; did you mean 'text'"),
        ("text = 3", r"recipe.toml \[first\] text = 3: expected str"),
        ('parent = "nobody@latest"', "no finished run of 'nobody'"),
        ('parent = "./no/such"', "no Hugging Face model folder at .*no/such"),
    ],
)
def test_a_wrong_recipe_is_one_sentence_before_any_work(place: Path, first: str, message: str) -> None:
    """The file, the table, the key and the way out."""
    with pytest.raises(ConfigError, match=message):
        run_recipe(recipe(place, first=first), workspace=place / "w")
    assert calls(place) == []


def test_missing_things_are_named(place: Path) -> None:
    """A recipe, a stage, an input, a table."""
    with pytest.raises(ConfigError, match="no recipe at"):
        load_recipe(place / "none.toml")
    path = place / "bad.toml"
    path.write_text("[sftt]\n")
    with pytest.raises(ConfigError, match="no stage 'sftt'; did you mean 'sft'"):
        run_recipe(load_recipe(path), workspace=place / "w")
    (place / "source.txt").unlink()
    with pytest.raises(ConfigError, match=r"\[first\] source: no file or folder .*source.txt"):
        run_recipe(recipe(place), workspace=place / "w")
    with pytest.raises(ConfigError, match=r"has no table \[third\]"):
        run_recipe(recipe(place), workspace=place / "w", only=["third"])


def test_two_pipelines_never_share_a_workspace(place: Path) -> None:
    """The second one is told who holds it."""
    (place / "w").mkdir()
    with (place / "w" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another trivium process works in"):
            run_recipe(recipe(place), workspace=place / "w")


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ('source = "absent.txt"', "no file or folder"),
        ('source = "copy_stage_for_test:absent"', "has no 'absent'"),
        ('[third]\nstage = "copy_stage_for_test"\nparent = "secnd@latest"', "did you mean 'second'?"),
    ],
)
def test_what_a_late_stage_lacks_is_said_before_the_first_one_runs(place: Path, second: str, said: str) -> None:
    """An hour of training must not end in a file name that was wrong from the beginning."""
    with pytest.raises(ConfigError, match=re.escape(said)):
        run_recipe(recipe(place, second=second), workspace=place / "w")
    assert not (place / "w").exists()
