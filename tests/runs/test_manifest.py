"""A run and its manifest: what is hashed, what comes back, and what a checkpoint remembers of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest

from trivium.config import RunSettings
from trivium.records import Artifact, RunManifest, to_dict
from trivium.runs import manifest as manifests
from trivium.runs.events import read_metrics
from trivium.runs.manifest import Run, fingerprint, is_base, read_manifest, write_manifest


def make(workspace: Path, name: str = "sft-0", **facts) -> Run:
    """Return a run of table `sft`."""
    manifest = RunManifest(
        run_id=name, stage="sft", table="sft", status="running", fingerprint="f" * 20, config={}, **facts
    )
    return Run(
        manifest, folder=workspace / "sft" / name, workspace=workspace, settings=RunSettings(), base=workspace / "base"
    )


def test_a_manifest_comes_back_equal(tmp_path: Path) -> None:
    """Results with and without intervals, artifacts, cost, nested config: write, read, equal."""
    run = (
        make(tmp_path, parents={"init": "pretrain-1"}, inputs={"a.jsonl": "00"}, config_={})
        if False
        else make(tmp_path, parents={"init": "pretrain-1"}, inputs={"a.jsonl": "00"}, seed=3)
    )
    run.result("pairwise@1", "accuracy", 0.75, low=0.7, high=0.8, n=40)
    run.note(data={"name": "x", "tokens": 5}, kinds=["human"])
    run.spend(tokens=10, flops=2.5e9)
    run.spend(tokens=5)
    (run.dir / "model").mkdir()
    (run.dir / "model" / "config.json").write_text("{}")
    written = run.finish("done")
    found = read_manifest(run.dir)
    assert found == written
    assert (found.cost.tokens, found.cost.flops) == (15, 2.5e9)
    assert found.finished_at
    assert found.results[0].seed == 3


def test_nan_is_stored_as_null(tmp_path: Path) -> None:
    """A result without an interval has null bounds, and the file is JSON to the strictest reader."""
    run = make(tmp_path)
    run.result("heldout@1", "loss", 2.5)
    run.note(worst=math.inf, curve=[1.0, math.nan])
    run.finish("done")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads((run.dir / "manifest.json").read_text(), parse_constant=refuse)
    assert (data["results"][0]["low"], data["results"][0]["high"]) == (None, None)
    assert data["summary"] == {"worst": None, "curve": [1.0, None]}
    assert read_manifest(run.dir).results[0].value == 2.5


def test_artifacts_are_all_files_but_the_private_ones(tmp_path: Path) -> None:
    """Hashes and sizes are those of the files; logs, checkpoints and the manifest itself are not artifacts."""
    run = make(tmp_path)
    files = {"model/model.safetensors": b"\x00" * 1000, "quarantine.jsonl": b"", "a/b/c.txt": "é".encode()}
    for name, data in files.items():
        (run.dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run.dir / name).write_bytes(data)
    (run.dir / "checkpoints" / "00000001").mkdir(parents=True)
    (run.dir / "checkpoints" / "00000001" / "x").write_text("x")
    run.metric("a", 1, 1)
    manifest = run.finish("done")
    assert manifest.artifacts == tuple(
        Artifact(path=name, sha256=hashlib.sha256(files[name]).hexdigest(), bytes=len(files[name]))
        for name in sorted(files)
    )
    assert not (run.dir / "checkpoints").exists()


@pytest.mark.parametrize("status", ["failed", "waiting"])
def test_a_run_that_did_not_end_keeps_its_checkpoints_and_claims_no_artifact(tmp_path: Path, status: str) -> None:
    """What is unfinished is not hashed as if it were whole."""
    run = make(tmp_path)
    (run.dir / "checkpoints").mkdir()
    (run.dir / "half.txt").write_text("half")
    manifest = run.finish(status, "because")
    assert (manifest.status, manifest.message, manifest.artifacts) == (status, "because", ())
    assert (run.dir / "checkpoints").is_dir()


def test_restore_takes_back_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    """Log, cost, results and summary are those of the moment `state` was taken; it survives JSON."""
    run = make(tmp_path)
    run.metric("a", 1, 1)
    run.result("t@1", "m", 1.0)
    run.note(x=1)
    run.spend(tokens=7, flops=1e6)
    state = json.loads(json.dumps(run.state()))
    run.metric("a", 2, 2)
    run.result("t@1", "m", 2.0)
    run.note(x=2, y=3)
    run.spend(tokens=100)
    run.restore(state)
    assert read_metrics(run.dir) == {"a": [(1, 1.0)]}
    manifest = run.finish("done")
    assert [r.value for r in manifest.results] == [1.0]
    assert manifest.summary == {"x": 1}
    assert (manifest.cost.tokens, manifest.cost.flops) == (7, 1e6)
    assert manifest.cost.seconds >= state["cost"]["seconds"]


def test_parents_are_folders_of_runs_or_the_folders_themselves(tmp_path: Path) -> None:
    """A run id becomes its folder (a table may hold dashes), a path stays one; several keep their order."""
    elsewhere = tmp_path / "hf" / "qwen"
    parents = {"init": str(elsewhere), "models.0": "sft-abc", "models.1": "my-ppo-def", "models.10": str(elsewhere)}
    run = make(tmp_path, parents=parents)
    assert run.parent("init") == elsewhere
    assert run.parents_of("models") == [
        tmp_path / "sft" / "sft-abc", tmp_path / "my-ppo" / "my-ppo-def", elsewhere
    ]  # fmt: skip
    elsewhere.mkdir(parents=True)
    (elsewhere / "config.json").write_text("{}")
    assert run.model("init") == elsewhere
    assert run.model("models") == tmp_path / "sft" / "sft-abc" / "model"


def test_inputs_start_from_the_recipes_folder(tmp_path: Path) -> None:
    """Relative paths from `base`, absolute ones as they are."""
    run = make(tmp_path)
    assert run.input("data/a.jsonl") == (tmp_path / "base" / "data" / "a.jsonl").resolve()
    assert run.input(str(tmp_path / "x")) == (tmp_path / "x").resolve()


def test_every_part_of_the_fingerprint_counts() -> None:
    """Changing any one of them changes it; nothing else does, key order included."""
    parts = {
        "stage": "sft",
        "config": {"lr": 1e-3, "fit": {"steps": 2}},
        "parents": {"init": "a"},
        "inputs": {"f": "0"},
        "seed": 0,
        "settings": {"precision": "fp32"},
    }
    one = fingerprint(**parts)
    assert fingerprint(**{**parts, "config": {"fit": {"steps": 2}, "lr": 1e-3}}) == one
    assert fingerprint(**{**parts, "config": {"lr": 1e-3, "fit": {"steps": 2}, "data": ("x",)}}) == fingerprint(
        **{**parts, "config": {"lr": 1e-3, "fit": {"steps": 2}, "data": ["x"]}}
    )  # a tuple, and the list it becomes in JSON
    changed = [
        {"stage": "dpo"}, {"config": {"lr": 1e-3, "fit": {"steps": 3}}}, {"parents": {"init": "b"}},
        {"inputs": {"f": "1"}}, {"seed": 1}, {"settings": {"precision": "bf16"}},
    ]  # fmt: skip
    assert len({one, *(fingerprint(**{**parts, **change}) for change in changed)}) == len(changed) + 1


def test_an_unreadable_manifest_is_none(tmp_path: Path) -> None:
    """Missing, half written, of another shape: nothing is guessed."""
    assert read_manifest(tmp_path) is None
    (tmp_path / "manifest.json").write_text('{"run_id": "a"')
    assert read_manifest(tmp_path) is None
    (tmp_path / "manifest.json").write_text('{"run_id": "a", "unknown": 1}')
    assert read_manifest(tmp_path) is None


def test_writing_a_manifest_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that fails leaves the old one."""
    run = make(tmp_path)
    write_manifest(run.dir, run.manifest)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_manifest(run.dir, dataclasses.replace(run.manifest, message="x" * 5000))
    assert read_manifest(run.dir) == run.manifest
    assert not list(run.dir.glob(".*"))


def test_the_code_version_names_the_package_and_cost_has_memory(tmp_path: Path) -> None:
    """What a manifest says about where it was made holds no host name."""
    from trivium import __version__

    assert manifests.code_version()["version"] == __version__
    assert set(manifests.host_facts()) == {"system", "machine", "python", "cores"}
    cost = to_dict(make(tmp_path).cost())
    assert cost["peak_memory_bytes"] > 1_000_000
    assert cost["seconds"] >= 0


def test_progress_counts_without_a_terminal(tmp_path: Path, monkeypatch, capsys) -> None:
    """No bar off a terminal: a plain line after ten seconds, with the rate and what is left; nothing before."""
    clock = iter([0.0, 4.0, 12.0, 13.0])
    monkeypatch.setattr(manifests.time, "monotonic", lambda: next(clock))
    with manifests.show_progress("sft: training", 10) as advance:
        advance(loss=2.0)
        advance(2, loss=1.5)
        advance()
    assert capsys.readouterr().err == "sft: training: 3/10, 28 s left, 0.2/s loss=1.5\n"


def test_a_base_model_is_one_that_was_pre_trained_or_made_from_one(tmp_path: Path) -> None:
    """A stage may say so of its own; all else, a folder from elsewhere included, is taken for a chat model."""
    run = make(tmp_path)
    assert not is_base(run.manifest) and not is_base(None)
    assert is_base(dataclasses.replace(run.manifest, stage="pretrain"))
    run.note(is_base=True)
    assert is_base(run.finish("done"))
