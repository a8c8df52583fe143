"""Finding runs: what `@latest` means, what may not be used, and paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from trivium.config import ConfigError
from trivium.records import RunManifest
from trivium.runs.manifest import write_manifest
from trivium.runs.registry import latest_runs, list_runs, model_folder, resolve


def put(workspace: Path, run_id: str, *, started: str, finished: str = "", status: str = "done") -> Path:
    """Write the manifest of a run and return its folder."""
    table = run_id.rsplit("-", 1)[0]
    manifest = RunManifest(
        run_id=run_id, stage=table, table=table, status=status, fingerprint="0", config={},
        started_at=f"2026-01-{started}T00:00:00+00:00", finished_at=finished and f"2026-01-{finished}T00:00:00+00:00",
    )  # fmt: skip
    folder = workspace / table / run_id
    folder.mkdir(parents=True)
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Return a workspace with runs in all states."""
    put(tmp_path, "sft-aaa", started="01", finished="04")
    put(tmp_path, "sft-bbb", started="02", finished="03")
    put(tmp_path, "sft-ccc", started="05", finished="06", status="failed")
    put(tmp_path, "sft-ddd", started="07", status="running")
    put(tmp_path, "pretrain-eee", started="01", finished="01")
    put(tmp_path, "ppo-fff", started="08", finished="08", status="waiting")
    (tmp_path / "sft" / "sft-broken").mkdir()
    (tmp_path / "sft" / "sft-broken" / "manifest.json").write_text("{")
    return tmp_path


def test_latest_is_the_newest_that_is_done(workspace: Path) -> None:
    """By the time of finishing; failed, running, waiting and broken runs are never latest."""
    assert resolve(workspace, "sft@latest", base=workspace) == "sft-aaa"
    found = latest_runs(workspace)
    assert {table: manifest.run_id for table, (_, manifest) in found.items()} == {
        "pretrain": "pretrain-eee",
        "sft": "sft-aaa",
    }
    assert list(found) == ["pretrain", "sft"]  # in the order in which they finished
    with pytest.raises(ConfigError, match="no finished run of 'ppo'"):
        resolve(workspace, "ppo@latest", base=workspace)


def test_the_pipeline_going_on_comes_before_anything_older(workspace: Path) -> None:
    """`current` wins for its tables, and only for them."""
    current = {"sft": "sft-zzz"}
    assert resolve(workspace, "sft@latest", base=workspace, current=current) == "sft-zzz"
    assert resolve(workspace, "pretrain@latest", base=workspace, current=current) == "pretrain-eee"


def test_runs_are_listed_oldest_first_whatever_their_state(workspace: Path) -> None:
    """The broken one is passed over."""
    assert [m.run_id for _, m in list_runs(workspace)] == [
        "pretrain-eee", "sft-aaa", "sft-bbb", "sft-ccc", "sft-ddd", "ppo-fff"
    ]  # fmt: skip
    assert list_runs(workspace / "nowhere") == []


def test_a_run_id_names_a_finished_run(workspace: Path) -> None:
    """An older finished run may be named; an unfinished one is refused with its state."""
    assert resolve(workspace, "sft-bbb", base=workspace) == "sft-bbb"
    for name, state in (("sft-ccc", "failed"), ("sft-ddd", "running"), ("ppo-fff", "waiting")):
        with pytest.raises(ConfigError, match=f"that run is {state}"):
            resolve(workspace, name, base=workspace)
    with pytest.raises(ConfigError, match="no run 'sft-xyz'"):
        resolve(workspace, "sft-xyz", base=workspace)


def test_a_step_that_is_not_kept_is_refused_not_ignored(workspace: Path) -> None:
    """`run@step`: only the end of a run is an artifact, so anything else is an error rather than the wrong model."""
    assert resolve(workspace, "sft-bbb@final", base=workspace) == "sft-bbb"
    for reference in ("sft-bbb@100", "sft@100", "sft@newest"):
        with pytest.raises(ConfigError):
            resolve(workspace, reference, base=workspace)


def test_a_misspelt_table_is_suggested(workspace: Path) -> None:
    """The way out is in the sentence."""
    with pytest.raises(ConfigError, match="did you mean 'pretrain'"):
        resolve(workspace, "pretrian@latest", base=workspace)
    with pytest.raises(ConfigError, match="run that stage first"):
        resolve(workspace / "empty", "sft@latest", base=workspace)


def test_a_path_is_a_hugging_face_folder(workspace: Path) -> None:
    """Relative to `base`, absolute, or with a dot; it must hold a config.json."""
    folder = workspace / "models" / "qwen"
    folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve(workspace, "models/qwen", base=workspace)
    (folder / "config.json").write_text("{}")
    for reference, base in (("models/qwen", workspace), (str(folder), Path("/")), ("./qwen", folder.parent)):
        assert resolve(workspace, reference, base=base) == str(folder.resolve())
    assert resolve(workspace, ".", base=folder) == str(folder.resolve())


def test_model_folders_of_runs_and_paths(workspace: Path) -> None:
    """A run's model is in `model/`; a path is the model."""
    assert model_folder(workspace, "sft@latest") == workspace / "sft" / "sft-aaa" / "model"
    folder = workspace / "models" / "qwen"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert model_folder(workspace, "models/qwen", base=workspace) == folder.resolve()
