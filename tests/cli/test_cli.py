"""The command line: quick to answer, exact about what it hands on, one sentence for every foreseeable mistake."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trivium import cli, pipeline
from trivium.cli import recipes, verbs
from trivium.cli.options import PlaceOptions
from trivium.config import STAGES, ConfigError, UserError, Waiting

RECIPE = """
[run]
name = "small"
seed = 3
[pretrain]
hidden_size = 64
[sft]
[second]
stage = "sft"
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Return a recipe's path, in a folder that is also the current one."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def handed_on(monkeypatch):
    """Return the list of what `run` hands to the pipeline, which then does nothing."""
    calls = []
    monkeypatch.setattr(pipeline, "run_recipe", lambda recipe, **words: calls.append((recipe, words)))
    monkeypatch.setattr(recipes, "finish", lambda workspace: 0)
    return calls


def test_help_answers_within_a_second_and_without_torch():
    script = "import sys; from trivium.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and time.perf_counter() - began < 1.0
    for verb in (*STAGES, *verbs.TOOLS):
        assert f"\n  {verb} " in done.stdout


def test_the_static_list_of_stages_is_what_the_folder_holds():
    found = {path.stem for path in Path(pipeline.__file__).with_name("stages").glob("*.py")} - {"__init__"}
    assert set(STAGES) == found


def test_every_stage_says_what_it_is():
    assert all(verbs.stage_summary(stage) for stage in STAGES)


def test_a_recipe_alone_changes_nothing(recipe, handed_on):
    assert cli.main(["run", str(recipe)]) == 0
    (loaded, words), *_ = handed_on
    assert loaded.settings.seed == 3
    assert words == {"workspace": Path("runs/small").resolve(), "only": (), "overrides": {}}


def test_every_field_can_be_overridden(recipe, handed_on, tmp_path):
    words = ["--pretrain.fit.steps", "7", "--second.fit.optim.lr", "0.5", "--seed", "9", "--run.threads", "1"]
    assert cli.main(["run", str(recipe), "--workspace", str(tmp_path / "a b"), *words]) == 0
    (loaded, handed), *_ = handed_on
    assert handed["overrides"] == {"pretrain": {"fit": {"steps": 7}}, "second": {"fit": {"optim": {"lr": 0.5}}}}
    assert (loaded.settings.seed, loaded.settings.threads) == (9, 1)
    assert handed["workspace"] == tmp_path / "a b"


@pytest.mark.parametrize(
    ("words", "tables"),
    [
        (["run", "small.toml", "--only", "sft", "second"], ("sft", "second")),
        (["run", "small.toml", "--from", "sft"], ("sft", "second")),
        (["run", "small.toml", "--from=second"], ("second",)),
        (["sft", "--recipe", "small.toml"], ("sft", "second")),
        (["pretrain", "--recipe=small.toml"], ("pretrain",)),
    ],
)
def test_part_of_a_recipe(recipe, handed_on, words, tables):
    assert cli.main(words) == 0
    assert handed_on[0][1]["only"] == tables


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pretrian"], "no verb 'pretrian'; did you mean 'pretrain'?"),
        (["run"], "run needs a recipe, e.g. `trivium run recipes/tiny.toml`"),
        (["run", "absent.toml"], "no recipe at absent.toml; the shipped ones are in recipes/"),
        (["run", "small.toml", "--from", "stf"], "small.toml has no table 'stf'; did you mean 'sft'?"),
        (["run", "small.toml", "--only", "x"], "small.toml has no table 'x'; known: pretrain, second, sft"),
        (["ppo", "small.toml"], "small.toml has no table for the stage 'ppo'; its tables: pretrain, sft, second"),
        (["run", "small.toml", "--sft.fit.steps", "-1"], "--sft.fit.steps: steps = -1: must be at least 0"),
        (
            ["run", "small.toml", "--sft.contxt", "8"],
            "Unrecognized options: --sft.contxt, 8; did you mean --sft.context?; see `trivium run --help`",
        ),
        (
            ["run", "small.toml", "--sft.context", "abc"],
            "Error parsing --sft.context: invalid literal for int() with base 10: 'abc'; see `trivium run --help`",
        ),
        (["report", "--workspace", "absent"], "no workspace absent; `trivium run` makes one"),
        (["rank", "--port", "99999"], "port = 99999: must be 0 to 65535"),
        (["report"], "no run under runs/; make one (`trivium run recipes/tiny.toml`) or give --workspace"),
    ],
)
def test_a_mistake_is_one_sentence_and_no_traceback(recipe, capsys, words, sentence):
    assert cli.main(words) == 2
    assert capsys.readouterr().err == f"trivium: {sentence}\n"


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (UserError("broken;\n  mend it"), 2, "trivium: broken; mend it\n"),
        (Waiting("40 rankings to give"), 3, "40 rankings"),
        (KeyboardInterrupt(), 130, "stopped; run the same command again to resume"),
        (OSError(errno.ENOSPC, "full", "/x/model"), 5, "no space left to write /x/model"),
        (OSError(errno.EFBIG, "too large", "/x/model"), 5, "no space left to write /x/model"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/w"), 2, "cannot use /x/w: Permission denied"),
        (ModuleNotFoundError("no", name="fastapi"), 2, "pip install 'trivium[web]'"),
    ],
)
def test_each_kind_of_end_has_its_exit_code(monkeypatch, capsys, error, code, part):
    def fail(words):
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main([]) == code
    assert part in capsys.readouterr().err


def test_an_empty_folder_gets_no_report(tmp_path, capsys):
    assert cli.main(["report", "--workspace", str(tmp_path)]) == 2
    assert "holds no run to report on" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_dispatch", lambda words: {}["defect"])
    with pytest.raises(KeyError):
        cli.main([])


def test_the_newest_run_is_the_default_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        PlaceOptions().place()
    for age, name in ((200, "old"), (100, "new")):
        manifest = tmp_path / "runs" / name / "sft" / "sft-1" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text("{}")
        moment = time.time() - age
        os.utime(manifest, (moment, moment))
    assert PlaceOptions().place() == tmp_path / "runs" / "new"


def test_doctor_measures(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "GFLOP/s" in said and "GB free" in said and "threads" in said


@pytest.mark.parametrize("verb", ["serve", "rank", "dashboard", "report", "chat", "doctor", "run", "ppo"])
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([verb, "--help"])
    assert exit_.value.code == 0
    assert f"trivium {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).resolve().parents[2].glob("recipes/*.toml")), ids=lambda p: p.stem
)
def test_every_shipped_recipe_becomes_options_and_no_changes(path, handed_on):
    assert cli.main(["run", str(path)]) == 0
    assert handed_on[0][1]["overrides"] == {}


def test_a_table_may_have_the_name_of_an_option(tmp_path, handed_on):
    path = tmp_path / "named.toml"
    path.write_text('[from]\nstage = "sft"\n[only]\nstage = "sft"\n[seed]\nstage = "sft"\n')
    assert cli.main(["run", str(path), "--seed", "4", "--only", "from", "seed", "--seed.context", "64"]) == 0
    loaded, words = handed_on[0]
    assert loaded.settings.seed == 4 and words["only"] == ("from", "seed")
    assert words["overrides"] == {"seed": {"context": 64}}
