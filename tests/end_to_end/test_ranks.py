"""The recipe under torchrun: every stage that trains gives one process's figures, and what goes wrong ends all ranks.

Real processes on gloo, one thread each. AdamW throughout: Muon orthogonalises in bf16, which turns the last bit of a
gradient (a sum in another order) into its third digit, also between micro-batch sizes of one process. And with an eps
that a small gradient does not outweigh, or its last bit would decide an update, of all that follows in the chain, too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import pytest
from safetensors.torch import load_file

from trivium.runs.events import read_metrics
from trivium.runs.registry import latest_runs

from .conftest import ROOT

pytestmark = pytest.mark.timeout(600)

OPTIM = 'optim = { kind = "adamw", lr = 1e-3, eps = 1e-4 }'
FIT = f"steps = 6, log_every = 1, eval_every = 3, save_every = 2, {OPTIM}"
RECIPE = f"""
[run]
seed = 0
precision = "fp32"
threads = 1
rank_timeout_s = 60

[data_prep]
sources = ["trivium.data.microworld:documents"]
options = {{ num = 300 }}
heldout_frac = 0.05

[train_tokenizer]
vocab_size = 400

[pretrain]
hidden_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 2
context = 64
prompts = ["A fox"]
fit = {{ batch_size = 7, micro_batch_size = 2, {FIT} }}

[adapt]
corpus = "train_tokenizer@latest"
replay_frac = 0.4
context = 64
fit = {{ batch_size = 7, micro_batch_size = 2, {FIT} }}

[sft]
data = ["trivium.data.microworld:instructions"]
options = {{ num = 120 }}
fit = {{ batch_size = 5, {FIT} }}

[collect_comparisons]
prompts = ["trivium.data.microworld:preference_prompts"]
options = {{ num = 16 }}
num_responses = 3
annotators = "trivium.data.microworld:annotators"
sampling = {{ max_new_tokens = 12 }}

[reward_model]
heldout_frac = 0.3
fit = {{ batch_size = 5, {FIT} }}

[ppo]
prompts = ["trivium.data.microworld:preference_prompts"]
options = {{ num = 16 }}
judge = "trivium.data.microworld:taste"
iterations = 3
batch_size = 9
save_every = 1
sampling = {{ max_new_tokens = 12 }}
{OPTIM.replace("1e-3", "1e-4")}

[ppo_variant]
stage = "ppo"
prompts = ["trivium.data.microworld:preference_prompts"]
options = {{ num = 16 }}
iterations = 3
batch_size = 9
save_every = 1
kl_target = 0.5
kl_gain = 2.0
shared_trunk = true
max_approx_kl = 2e-6
whiten_rewards = true
ptx = {{ coef = 0.5, rows = 5, context = 32 }}
ptx_corpus = "train_tokenizer@latest"
sampling = {{ max_new_tokens = 12 }}
{OPTIM.replace("1e-3", "1e-4")}

[dpo]
heldout_frac = 0.3
fit = {{ batch_size = 5, {FIT} }}

[grpo]
prompts = ["trivium.data.microworld:arithmetic_prompts"]
options = {{ num = 12 }}
iterations = 3
prompts_per_round = 5
group_size = 3
rewards = {{ "reward_for_ranks_test:first_token" = 1.0 }}
save_every = 1
sampling = {{ max_new_tokens = 8 }}
{OPTIM.replace("1e-3", "1e-4")}

[rejection_sampling]
prompts = ["trivium.data.microworld:preference_prompts"]
options = {{ num = 12 }}
rounds = 3
prompts_per_round = 5
num_samples = 3
minibatches = 3
sampling = {{ max_new_tokens = 8 }}
{OPTIM.replace("1e-3", "1e-4")}

[constitutional_ai]
prompts = ["trivium.data.microworld:red_team_prompts"]
options = {{ num = 6 }}
principles = "trivium.data.microworld:principles"
critic = "trivium.data.microworld:critic"
reviser = "trivium.data.microworld:reviser"
judge = "trivium.data.microworld:judge"
sampling = {{ max_new_tokens = 12 }}
fit = {{ batch_size = 4, {FIT} }}
"""
REWARD = """
def first_token(prompts, completions):
    return [completion.token_ids[0] / 100 for completion in completions]
"""
TRAINED = (
    *("pretrain", "adapt", "sft", "reward_model", "ppo", "ppo_variant", "dpo", "grpo", "rejection_sampling"),
    "constitutional_ai",
)
CLOCKED = {"train/tokens_per_s", "train/mfu", "train/data_s", "train/checkpoint_s"}


def on_ranks(number: int, *arguments: str | Path, restarts: int = 0, **changes: str) -> subprocess.Popen[str]:
    """Start `trivium run ...` on so many ranks under torchrun and return the launcher's process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    launcher += ["--max-restarts", str(restarts)]
    places = os.pathsep.join([str(ROOT / "src"), str(Path(arguments[1]).parent)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    # The launcher's own store, shared with the ranks, has been seen to outlive a crash and hang it.
    environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | changes
    return subprocess.Popen(
        [*launcher, "-m", "trivium", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str], timeout: float = 400) -> tuple[int, str, str]:
    """Wait for a launcher and return (exit code, stdout, stderr); one that is late takes its ranks along."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its ranks, after 30 s by force
        process.communicate(timeout=60)
        raise
    return process.returncode, out, err


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of all stages that train, as a file."""
    path = tmp_path_factory.mktemp("ranks") / "recipe.toml"
    path.write_text(RECIPE)
    path.with_name("reward_for_ranks_test.py").write_text(REWARD)
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    """The workspace of one process alone."""
    workspace = recipe.parent / "alone"
    code, _, err = finish(on_ranks(1, "run", recipe, "--workspace", workspace))
    assert code == 0, err[-3000:]
    return workspace


def untrained(alone: Path, name: str) -> Path:
    """Return a copy of the workspace without the runs that trained."""
    workspace = alone.parent / name
    shutil.copytree(alone, workspace)
    for table in TRAINED:
        shutil.rmtree(workspace / table)
    return workspace


def furthest(
    first: Path, second: Path, table: str, *, but: Collection[tuple[str, int]] = frozenset()
) -> tuple[float, str]:
    """Return the largest difference of any logged figure of a table between two workspaces, and whose it is.

    Those in `but` (name, step) are left out.

    Relative for figures above 1, absolute below: what is small is a difference of larger numbers (a KL, a margin).
    """
    curves = [read_metrics(latest_runs(workspace)[table][0]) for workspace in (first, second)]
    names = sorted(set(curves[0]) - CLOCKED)
    assert names == sorted(set(curves[1]) - CLOCKED) and names
    distances = []
    for name in names:
        assert [step for step, _ in curves[0][name]] == [step for step, _ in curves[1][name]], name
        for (step, a), (_, b) in zip(curves[0][name], curves[1][name], strict=True):
            if (name, step) not in but:
                distances.append((abs(a - b) / max(abs(a), 1.0), name))
    return max(distances)


def test_every_stage_that_trains_gives_one_processs_figures(alone: Path, recipe: Path) -> None:
    """DDP on two ranks, batches that do not divide: every logged figure of every stage to 1e-5, and one owner's files.

    Unequal tokens in a row, unequal rows on a rank, sampling, rewards, whitening, KL: all of it is in these figures.
    """
    workspace = untrained(alone, "ddp")
    code, out, err = finish(on_ranks(2, "run", recipe, "--workspace", workspace))
    assert code == 0, err[-3000:]
    for table in TRAINED:
        distance, name = furthest(alone, workspace, table)
        assert distance < 1e-5, f"{table} {name}: {distance}"
    assert err.count("pretrain: runs") == 1 and out.count("\nworkspace ") == 1, "rank 0 alone speaks"
    assert {run_id for run_id, _ in latest_runs(workspace).items()} == set(latest_runs(alone))


def test_sharded_every_stage_gives_one_processs_figures(alone: Path, recipe: Path) -> None:
    """The same with FSDP2, activation checkpointing on."""
    workspace = untrained(alone, "fsdp")
    words = ("--run.parallel", "fsdp", "--run.activation-checkpointing")
    code, _, err = finish(on_ranks(2, "run", recipe, "--workspace", workspace, *words))
    assert code == 0, err[-3000:]
    for table in TRAINED:
        distance, name = furthest(alone, workspace, table)
        assert distance < 1e-5, f"{table} {name}: {distance}"


@pytest.mark.parametrize("shared", ["tensor", "context"])
def test_shared_layers_and_rows_give_one_processs_figures(alone: Path, recipe: Path, shared: str) -> None:
    """Two ranks with half of each matrix, or of each row's positions: figures of pretrain and sft to 1e-5, one model.

    Pre-training's rows are of 64 positions, in documents; fine-tuning's are as long as the longest happens to be.
    """
    workspace = untrained(alone, shared)
    words = (f"--run.{shared}-parallel", "2", "--only", "pretrain", "sft")
    code, _, err = finish(on_ranks(2, "run", recipe, "--workspace", workspace, *words))
    assert code == 0, err[-3000:]
    for table in ("pretrain", "sft"):
        distance, name = furthest(alone, workspace, table)
        assert distance < 1e-5, f"{table} {name}: {distance}"
        saved = [
            load_file(latest_runs(place)[table][0] / "model" / "model.safetensors") for place in (alone, workspace)
        ]
        assert saved[0].keys() == saved[1].keys()
        for key, tensor in saved[0].items():
            assert tensor.shape == saved[1][key].shape and (tensor - saved[1][key]).abs().max() < 1e-5, key


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel"), [(2, "ddp"), (4, "fsdp"), (4, "ddp")])
def test_cut_every_stage_gives_one_processs_figures(alone: Path, recipe: Path, ranks: int, parallel: str) -> None:
    """All stages, rollouts and both networks of PPO among them, by one and by two groups of two ranks.

    But for DPO's training accuracy at its first step, where the policy is the reference: it counts the signs of
    margins that are rounding errors there, since the reference's were summed whole and the policy's in two parts.
    """
    workspace = untrained(alone, f"tensor-{ranks}-{parallel}")
    words = ("--run.tensor-parallel", "2", "--run.parallel", parallel)
    code, _, err = finish(on_ranks(ranks, "run", recipe, "--workspace", workspace, *words), 550)
    assert code == 0, err[-3000:]
    for table in TRAINED:
        distance, name = furthest(alone, workspace, table, but={("train/accuracy", 1)} if table == "dpo" else set())
        assert distance < 1e-5, f"{table} {name}: {distance}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "more"), [(2, ()), (4, ("--run.parallel", "fsdp")), (4, ("--run.tensor-parallel", "2"))]
)
def test_shared_rows_every_stage_gives_one_processs_figures(
    alone: Path, recipe: Path, ranks: int, more: tuple[str, ...]
) -> None:
    """All stages by one group of two ranks, by two, and by one group whose ranks are two each, with half the matrices.

    But for DPO's first training accuracy, as above.
    """
    workspace = untrained(alone, f"context-{ranks}-{more[0] if more else 'ddp'}")
    words = ("--run.context-parallel", "2", *more)
    code, _, err = finish(on_ranks(ranks, "run", recipe, "--workspace", workspace, *words), 550)
    assert code == 0, err[-3000:]
    for table in TRAINED:
        distance, name = furthest(alone, workspace, table, but={("train/accuracy", 1)} if table == "dpo" else set())
        assert distance < 1e-5, f"{table} {name}: {distance}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--run.context-parallel", "3"), "context_parallel = 3 does not divide the 2 ranks"),
        (("--run.tensor-parallel", "3"), "tensor_parallel = 3 does not divide the 2 ranks"),
        (
            ("--run.tensor-parallel", "2", "--pretrain.num-kv-heads", "1"),
            "tensor_parallel = 2 does not divide the model's num_key_value_heads = 1",
        ),
    ],
)
def test_what_cannot_be_cut_is_said_once(alone: Path, recipe: Path, words: tuple[str, ...], said: str) -> None:
    """Ranks that are no whole groups, heads that cannot be dealt out: one sentence of ours, no hang."""
    workspace = untrained(alone, "cut" + "".join(words))
    code, _, err = finish(on_ranks(2, "run", recipe, "--workspace", workspace, "--only", "pretrain", *words), 240)
    assert code != 0
    assert [line for line in err.splitlines() if said in line] and err.count("trivium: ") == 1, err[-2000:]


def test_a_mistake_is_said_once_and_ends_all_ranks(alone: Path, recipe: Path) -> None:
    """A batch that cannot be shared: one sentence of ours, no hang, the run marked as failed by its owner."""
    workspace = untrained(alone, "mistake")
    code, _, err = finish(on_ranks(2, "run", recipe, "--workspace", workspace, "--pretrain.fit.batch-size", "1"), 90)
    assert code != 0
    assert [line for line in err.splitlines() if "cannot be shared by 2 ranks" in line] and err.count("trivium: ") == 1


def test_a_signal_ends_in_one_whole_checkpoint(alone: Path, recipe: Path) -> None:
    """SIGTERM to the launcher while two ranks pre-train: they stop after the same step, and its checkpoint is whole."""
    workspace = untrained(alone, "signal")
    words = ("run", recipe, "--workspace", workspace, "--only", "pretrain", "--pretrain.fit.steps", "400")
    process = on_ranks(2, *words)
    deadline = time.monotonic() + 90
    while not list(workspace.glob("pretrain/*/checkpoints/0*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, _, err = finish(process, 90)
    said = [line for line in err.splitlines() if "checkpoint saved" in line]
    assert len(said) == 1 and "after step" in said[0], err[-2000:]
    step = int(said[0].split("after step ")[1].split(",")[0])
    (folder,) = workspace.glob("pretrain/*/")
    assert (folder / "checkpoints" / f"{step:08d}").is_dir() and not list(folder.rglob("*.tmp"))
    assert step < 400


def rank_of(launcher: int, rank: int) -> int:
    """Return the process of one rank among the launcher's children, by Linux's list of processes."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # a process may end while it is looked at
            parent = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}" in folder.joinpath("environ").read_text().split("\0"):
                return int(folder.name)
    raise AssertionError(f"no rank {rank} under {launcher}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a rank by Linux's list of processes")
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_started_again_and_nothing_is_lost(alone: Path, recipe: Path, killed: int) -> None:
    """SIGKILL to one of two ranks under `--max-restarts`: all begin anew from the checkpoint, with the same figures."""
    words = ("--only", "pretrain", "--pretrain.fit.steps", "40", "--pretrain.fit.save-every", "5")
    calm, workspace = untrained(alone, f"calm-{killed}"), untrained(alone, f"restarted-{killed}")
    code, _, err = finish(on_ranks(1, "run", recipe, "--workspace", calm, *words))
    assert code == 0, err[-2000:]
    process = on_ranks(2, "run", recipe, "--workspace", workspace, *words, restarts=1)
    deadline = time.monotonic() + 90
    while not list(workspace.glob("pretrain/*/checkpoints/0*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.02)
    os.kill(rank_of(process.pid, killed), signal.SIGKILL)
    code, _, err = finish(process, 200)
    assert code == 0, err[-3000:]
    assert err.count("pretrain: runs") == 1 and err.count(", resumes (") == 1, err[-3000:]
    distance, name = furthest(calm, workspace, "pretrain")
    assert distance < 1e-5, f"{name}: {distance}"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, ("MASTER_ADDR", "torchrun")),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            ("below",),
        ),
    ],
)
def test_half_a_launcher_is_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: tuple[str, ...]
) -> None:
    """Variables that do not make a rank end in a sentence that names what is missing or wrong."""
    from trivium.config import ConfigError
    from trivium.runs.ranks import ranks_from_environment

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        ranks_from_environment()
    assert all(word in str(refused.value) for word in words)
