"""What the battery shares: forked trainings that can be killed, a workspace to copy, a run of a few numbers to damage.

A process is forked, not started anew: it has torch in memory already, so that fifty kills take seconds. Each experiment
has a seed, which stands in the test's name and so in every failure.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trivium.config import RunSettings, UserError, load_recipe
from trivium.pipeline import run_recipe
from trivium.preferences.store import Store
from trivium.records import Ranking, RunManifest
from trivium.runs.manifest import Run
from trivium.runs.registry import list_runs
from trivium.training import checkpoint_folder as disk
from trivium.training.checkpoint import Checkpointer, KeepConfig
from trivium.training.optim import OptimConfig, Optimizer

CLOCK = {"train/tokens_per_s", "train/mfu", "train/data_s", "train/checkpoint_s"}
"""Metrics that measure time, and so differ from run to run."""

RECIPE = """
[run]
name = "faults"
precision = "fp32"
threads = 1
[data_prep]
sources = ["trivium.data.microworld:documents"]
options = { num = 200 }
heldout_frac = 0.1
[train_tokenizer]
vocab_size = 400
[pretrain]
hidden_size = 16
num_layers = 1
num_heads = 2
num_kv_heads = 1
intermediate_size = 32
context = 256
prompts = ["A"]
fit.steps = 20
fit.batch_size = 4
fit.log_every = 1
fit.eval_every = 7
fit.save_every = 3
fit.ema_decay = 0.5
[sft]
data = ["trivium.data.microworld:instructions"]
options = { num = 60 }
heldout_frac = 0.2
fit.steps = 20
fit.batch_size = 4
fit.log_every = 1
fit.eval_every = 7
fit.save_every = 3
fit.guard = { spike_factor = 3.0, window = 4 }
[collect_comparisons]
prompts = ["trivium.data.microworld:preference_prompts"]
options = { num = 24 }
num_responses = 3
annotators = "trivium.data.microworld:annotators"
sampling = { max_new_tokens = 8 }
[reward_model]
heldout_frac = 0.3
fit = { steps = 20, batch_size = 4, log_every = 1, eval_every = 7, save_every = 3 }
[dpo]
heldout_frac = 0.3
fit = { steps = 20, batch_size = 4, log_every = 1, eval_every = 7, save_every = 3 }
[ppo]
prompts = ["trivium.data.microworld:preference_prompts"]
options = { num = 12 }
judge = "trivium.data.microworld:taste"
iterations = 8
batch_size = 6
kl_target = 1.0
save_every = 3
sampling = { max_new_tokens = 8 }
[grpo]
prompts = ["trivium.data.microworld:arithmetic_prompts"]
options = { num = 10 }
iterations = 8
prompts_per_round = 4
group_size = 3
minibatches = 3
rewards = { "reward_for_fault_tests:first_token" = 1.0 }
save_every = 3
sampling = { max_new_tokens = 8 }
[constitutional_ai]
prompts = ["trivium.data.microworld:red_team_prompts"]
options = { num = 10 }
principles = "trivium.data.microworld:principles"
judge = "trivium.data.microworld:judge"
replay = ["trivium.data.microworld:instructions"]
replay_options = { num = 12 }
sampling = { max_new_tokens = 8 }
fit = { steps = 12, batch_size = 4, log_every = 1, save_every = 3 }
"""
TABLES = ("data_prep", "train_tokenizer", "pretrain", "sft")
"""What every experiment needs done before it."""
RANKED = ("collect_comparisons", "reward_model", "dpo", "ppo", "grpo", "constitutional_ai")
"""What is done when somebody asks for it, each after those before it that it needs."""
NEEDS = {
    "reward_model": ("collect_comparisons",),
    "dpo": ("collect_comparisons",),
    "ppo": ("collect_comparisons", "reward_model"),
}
LOGGED = {"train/loss", "train/policy_loss"}
"""What a stage says of each step (round) that it has done."""


sys.path.append(str(Path(__file__).parent))  # for the reward that the recipe names


def repeated(**counts: tuple[int, int]) -> pytest.MarkDecorator:
    """Parametrize by how often: `name=(in CI, in the soak)`; the second is marked slow, with the full timeout."""
    ((name, (short, full)),) = counts.items()
    slow = (pytest.mark.slow, pytest.mark.timeout(3600))
    return pytest.mark.parametrize(name, [pytest.param(short), pytest.param(full, marks=slow)])


@dataclass
class Child:
    """A forked process; what it prints goes to `log`."""

    pid: int
    log: Path
    code: int | None = None

    def send(self, number: int) -> bool:
        """Send a signal and tell whether the process was still running."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)
        return True

    def poll(self) -> int | None:
        """Return its exit code (negative: killed by that signal), or None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int:
        """Wait for its end and return its exit code."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


def fork(work: Callable[[], object], log: Path) -> Child:
    """Run `work` in a forked process, whose exit code is a UserError's, 130 for Ctrl-C, 1 for a fault of ours, or 0."""
    pid = os.fork()
    if pid:
        return Child(pid=pid, log=log)
    code = 1
    try:
        # Until the pipeline has its handlers, a SIGTERM is nothing; with the default, it would test the interpreter.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
        work()
        code = 0
    except UserError as error:
        print(f"trivium: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@dataclass
class Workspace:
    """A workspace with the recipe beside it."""

    place: Path
    recipe: str = RECIPE
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each table took."""

    @property
    def folder(self) -> Path:
        """The workspace itself."""
        return self.place / "w"

    def write_recipe(self) -> Path:
        """Write the recipe beside the workspace and return its path."""
        path = self.place / "recipe.toml"
        path.write_text(self.recipe)
        return path

    def start(self, *tables: str, first: Callable[[], object] = lambda: None) -> Child:
        """Start these tables in a process of their own, which does `first` before."""
        path = self.write_recipe()

        def work() -> None:
            first()
            run_recipe(load_recipe(path), workspace=self.folder, only=tables)

        return fork(work, self.place / "log")

    def run(self, *tables: str) -> str:
        """Run these tables to their end and return what was printed."""
        child = self.start(*tables)
        said = self.place / "log"
        assert child.wait() == 0, said.read_text()[-3000:]
        return said.read_text()

    def of(self, table: str) -> tuple[Path, RunManifest]:
        """Return the folder and the manifest of the table's only run."""
        ((folder, manifest),) = [pair for pair in list_runs(self.folder) if pair[1].table == table]
        return folder, manifest

    def story(self, table: str) -> list[str]:
        """Return every line of both logs of a run, without what the clock says."""
        folder, _ = self.of(table)
        rows = [json.loads(line) for name in LOGS for line in (folder / name).read_text().splitlines()]
        return [json.dumps(row | {"time": 0}) for row in rows if row["name"] not in CLOCK]

    def last_logged(self, table: str) -> int:
        """Return the last step whose loss was logged, 0 for none."""
        logs = (self.folder / table).glob(f"*/{LOGS[0]}")
        rows = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
        return max((row["step"] for row in rows if row["name"] in LOGGED), default=0)

    def interrupt(self, table: str, number: int) -> Path:
        """Start a table, send it a signal once it has a checkpoint, and return that newest checkpoint."""
        child = self.start(table)
        while not (found := sorted((self.folder / table).glob("*/checkpoints/*[0-9]"))):
            assert child.poll() is None, child.log.read_text()[-3000:]
            time.sleep(0.005)
        assert child.send(number), "it was done before it could be interrupted"
        child.wait()
        return disk.listing(found[0].parent)[-1]

    def finish(self, table: str) -> Workspace:
        """Run a table, and what it needs, unless that is done; return the workspace."""
        for name in (*NEEDS.get(table, ()), table):
            if name not in self.seconds:
                began = time.monotonic()
                self.run(name)
                self.seconds[name] = time.monotonic() - began
            if name == "collect_comparisons" and not (self.place / "before").exists():
                # Some stages add rankings, which a run that has not begun must not find there.
                shutil.copytree(self.folder, self.place / "before", ignore=lambda *_: BESIDE)
        return self

    def has_begun(self, table: str, child: Child) -> None:
        """Wait until a table's run has its folder (or has ended): before that, a SIGTERM is nothing."""
        while not list((self.folder / table).glob("*/events.jsonl")) and child.poll() is None:
            time.sleep(0.002)

    def copy(self, place: Path, *, without: str) -> Workspace:
        """Return a copy in which `without`, and what stands below it, has not begun; here, it is done."""
        self.finish(without)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        order = (*TABLES, *RANKED)
        needed = {*TABLES, *NEEDS.get(without, ())} - {*TABLES[order.index(without) :]}
        (place / "w").mkdir()
        for table in sorted(needed & {path.name for path in self.folder.iterdir()}):
            shutil.copytree(self.folder / table, place / "w" / table)
        for database in (self.place / "before").glob("preferences.db*"):
            shutil.copy(database, place / "w")
        return Workspace(place=place, seconds=self.seconds)

    def rankings(self, collection: str) -> list[Ranking]:
        """Return the rankings of a collection, in an order of their own."""
        with Store(self.folder / "preferences.db") as store:
            return sorted(store.rankings(collection), key=lambda ranking: ranking.id)


LOGS = ("events.jsonl", "specimens.jsonl")
BESIDE = (*TABLES, *RANKED)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Return the workspace of runs that nothing disturbed."""
    torch.set_num_threads(1)
    workspace = Workspace(place=tmp_path_factory.mktemp("whole"))
    for table in TABLES:
        workspace.finish(table)
    return workspace


def assert_equal(workspace: Workspace, whole: Workspace, table: str) -> None:
    """Assert that a run ended as the undisturbed one did: weights, logs, results, and nothing left over."""
    (folder, manifest), (expected_folder, expected) = workspace.of(table), whole.of(table)
    ours, theirs = (load_file(at / "model" / "model.safetensors") for at in (folder, expected_folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert workspace.story(table) == whole.story(table)
    assert (manifest.status, manifest.results, manifest.summary) == ("done", expected.results, expected.summary)
    assert [a.path for a in manifest.artifacts] == [a.path for a in expected.artifacts]
    assert (manifest.cost.tokens, manifest.cost.flops) == (expected.cost.tokens, expected.cost.flops)
    assert not list(folder.rglob("*.tmp")) and not (folder / "checkpoints").exists()
    if table in RANKED:
        assert workspace.rankings(manifest.run_id) == whole.rankings(expected.run_id)


class Net(nn.Module):
    """A matrix, which Muon trains, and what AdamW trains; 32 numbers unless it is to be larger."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.arange(12.0).reshape(3, 4))
        self.layers = nn.ModuleList([nn.Linear(width, width)])


class Small:
    """A run of which only the checkpoints matter: opened again, it is what a restarted process sees."""

    def __init__(self, place: Path, keep: KeepConfig | None = None, width: int = 4) -> None:
        torch.manual_seed(0)
        manifest = RunManifest(
            run_id="small-0", stage="sft", table="small", status="running", fingerprint="f" * 20, config={}
        )
        self.run = Run(manifest, folder=place / "small-0", workspace=place, settings=RunSettings(), base=place)
        self.net = Net(width)
        self.optimizer = Optimizer(self.net, OptimConfig())
        self.saver = Checkpointer(
            self.run, modules={"model": self.net}, optimizers={"model": self.optimizer}, keep=keep
        )

    def step(self, number: int) -> None:
        """Move all state by noise that depends on the step alone."""
        generator = torch.Generator().manual_seed(number)
        for parameter in self.net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step(1.0)
        self.run.metric("train/loss", float(self.net.embedding.detach().sum()), number)

    def save(self, *steps: int) -> None:
        """Take each step and save it."""
        for number in steps:
            self.step(number)
            self.saver.save(number)
            self.saver.wait()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return a copy of all tensors."""
        return {name: tensor.detach().clone() for name, tensor in self.saver._tensors().items()}

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints there are."""
        return [disk.step_of(path) for path in disk.listing(self.saver.folder)]


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Tell whether two sets of tensors are equal to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
