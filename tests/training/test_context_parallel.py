"""Rows whose positions are shared by ranks are the rows of one process: losses, norms, weights and checkpoints.

As in `test_ranks`, this file is started under torchrun (gloo, one thread each) once per number of ranks, and the tests
look at what it found.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from trivium.batches import IGNORE, LossOutput, PreferenceBatch, RolloutBatch, TokenBatch, select_rows
from trivium.config import ConfigError, RunSettings
from trivium.models.config import ModelConfig
from trivium.models.heads import ScalarModel, TwoHeads
from trivium.models.lora import LoraConfig, adapt
from trivium.models.transformer import Transformer
from trivium.runs.events import read_metrics
from trivium.stages import dpo, grpo, ppo, pretrain, reward_model, sft
from trivium.training import distributed
from trivium.training.context_parallel import SharedRows, places_of
from trivium.training.distributed import autocast, data_ranks, joined, setup, world
from trivium.training.loop import FitConfig, fit
from trivium.training.optim import OptimConfig, Optimizer
from trivium.training.parallel import spread, whole
from trivium.training.step import train_step

from .test_ranks import close, launched, open_run

PLAIN = RunSettings(device="cpu", precision="fp32", threads=1, rank_timeout_s=120)
CP = dataclasses.replace(PLAIN, context_parallel=2)
CP_FSDP, CP_AGAIN = dataclasses.replace(CP, parallel="fsdp"), dataclasses.replace(CP, activation_checkpointing=True)
CP_TP, CP_TP_FSDP = (dataclasses.replace(settings, tensor_parallel=2) for settings in (CP, CP_FSDP))
CP4 = dataclasses.replace(PLAIN, context_parallel=4)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"qk_norm": True, "tie_word_embeddings": True},
    "olmo2": {"post_norm": True},
    "windows": {
        "attention_bias": True,
        "sliding_window": 5,
        "layer_types": ("sliding_attention", "full_attention"),
    },
}
ROWS, LENGTH, STEPS, PAD = 6, 13, 5, 0


def tiny_model(family: str = "qwen3", seed: int = 0) -> Transformer:
    """Return a two-layer network with grouped queries."""
    config = ModelConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=22,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **FAMILIES[family],
    )
    return Transformer(config).init_weights(seed)


def global_batch(step: int, length: int = LENGTH) -> TokenBatch:
    """Return a step's rows: two packed documents, each cut elsewhere; targets thin out, so that shares are unequal."""
    ids = torch.randint(3, 30, (ROWS, length), generator=torch.Generator().manual_seed(step))
    targets, place = ids.roll(-1, 1).clone(), torch.arange(length)
    cuts = 2 + torch.arange(ROWS)[:, None] % (length - 3)
    documents = (place >= cuts).long()
    for row in range(ROWS):
        targets[row, 2 * row + 1 :] = IGNORE
    targets[place == cuts - 1] = IGNORE
    weights = (targets != IGNORE) * torch.rand(targets.shape, generator=torch.Generator().manual_seed(step))
    return TokenBatch(
        input_ids=ids,
        targets=targets,
        positions=place - documents * cuts,
        document_ids=documents,
        weights=weights,
        row_numbers=torch.arange(ROWS) + ROWS * step,
    )


def mine(batch: TokenBatch) -> list[TokenBatch]:
    """Return the micro-batches of this rank's group."""
    rank, size = data_ranks()
    return [select_rows(batch, rows) for rows in torch.arange(ROWS)[rank::size].split(2)]


def trained(folder: Path, settings: RunSettings, task: str = "pretrain", *, until: int = STEPS) -> dict[str, Any]:
    """Train in a folder, or die before step `until`; return what was logged and the weights.

    `task` is words: a family, `sft` (noise on embeddings, weighted targets), `lora`, `compiled`, `short` rows, `muon`.
    """
    setup(settings)
    words = task.split()
    model = tiny_model(next((word for word in words if word in FAMILIES), "qwen3"))
    if "lora" in words:
        model = adapt(model, LoraConfig(rank=2, alpha=8.0), seed=3)
    if "compiled" in words:
        model.model.compile_layers(backend="aot_eager")
    objective: Callable[[TokenBatch], LossOutput] = partial(pretrain.objective, model, 1e-3)
    if "sft" in words:
        objective = partial(sft.noisy_objective, model, 5.0, 7, PAD)
    optim = OptimConfig(lr=2e-3, kind="muon" if "muon" in words else "adamw", eps=1e-6, grad_clip=0.5)
    config = FitConfig(steps=STEPS, batch_size=ROWS, log_every=1, save_every=1, optim=optim)

    def batches(step: int) -> list[TokenBatch]:
        if step == until:
            raise KeyboardInterrupt
        batch = global_batch(step, 5 if "short" in words else LENGTH)
        return mine(batch if "sft" in words else dataclasses.replace(batch, weights=None))

    run = open_run(folder, settings)
    try:
        fit(run, model, objective, batches, config)
    except KeyboardInterrupt:
        return {}
    finally:
        run.events.close()
    with whole(model):
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    curves = read_metrics(run.dir)
    found = {name.split("/")[1]: [v for _, v in curves[name]] for name in ("train/loss", "train/grad_norm")}
    return found | {"weights": weights.tolist()}


def preferences() -> PreferenceBatch:
    """Return two rankings of three completions, of unequal lengths, each pair of a ranking once."""
    tokens, lengths = global_batch(0), torch.tensor([13, 9, 12, 5, 13, 7])
    place = torch.arange(LENGTH)
    ids = torch.where(place < lengths[:, None], tokens.input_ids, PAD)
    targets = torch.where((place >= 2) & (place < lengths[:, None] - 1), ids.roll(-1, 1), IGNORE)
    rows = TokenBatch(input_ids=ids, targets=targets, positions=place.expand(ROWS, LENGTH))
    return PreferenceBatch(
        tokens=rows,
        lengths=lengths,
        pairs=torch.tensor([[0, 1], [0, 2], [1, 2], [3, 4], [3, 5], [4, 5]]),
        weights=torch.full((6,), 1 / 3),
        ranks=torch.tensor([0, 1, 2] * 2),
        groups=torch.tensor([0, 0, 0, 1, 1, 1]),
        ref_logprobs=-3.0 * (lengths - 3),
    )


def rollouts() -> RolloutBatch:
    """Return six sampled completions with what an update needs to know of each token."""
    tokens = preferences().tokens
    mask = tokens.targets != IGNORE
    noise = (torch.randn(mask.shape, generator=torch.Generator().manual_seed(n)) * mask for n in range(4))
    old, ref = (-3.4 * mask + 0.1 * next(noise) for _ in range(2))
    advantages, values = noise
    return RolloutBatch(
        tokens=tokens,
        mask=mask,
        old_logprobs=old,
        ref_logprobs=ref,
        advantages=advantages,
        returns=values + advantages,
        values=values,
        rewards=advantages,
        scores=torch.zeros(ROWS),
    )


def stepped(settings: RunSettings, stage: str) -> dict[str, Any]:
    """Take three optimizer steps on one batch of whole rows with a stage's objective; return figures and weights."""
    setup(settings)
    policy = tiny_model("windows")
    value = ScalarModel.from_transformer(policy, seed=2)
    shared = ScalarModel.beside(policy)
    model, objective, batch = {
        "reward_model": (value, lambda batch: reward_model.objective(value, "bradley_terry", batch), preferences()),
        "dpo": (policy, partial(dpo.objective, policy, dpo.Config()), preferences()),
        "ppo": (policy, partial(ppo.objective, policy, ppo.Config()), rollouts()),
        "ppo value": (value, partial(ppo.value_objective, value, ppo.Config()), rollouts()),
        "ppo joint": (
            TwoHeads(policy, shared),
            partial(ppo.joint_objective, policy, shared, ppo.Config(shared_trunk=True)),
            rollouts(),
        ),
        "grpo": (policy, partial(grpo.objective, policy, grpo.Config()), rollouts()),
    }[stage]
    trained = spread(model, objective, settings)
    optimizer = Optimizer(model, OptimConfig(lr=2e-3, kind="adamw", eps=1e-4))
    model.train()
    results = [train_step(trained, [batch], optimizer, lr_scale=1.0, precision=autocast(settings)) for _ in range(3)]
    with whole(model):
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    figures = {name: [result.metrics[name] for result in results] for name in results[0].metrics}
    return {
        "loss": [result.loss for result in results],
        "grad_norm": [result.grad_norm for result in results],
        "metrics": figures,
        "weights": weights.tolist(),
    }


def divided(settings: RunSettings) -> dict[str, Any]:
    """Return what each rank's layers and output layer work on in a step, and how long rows are outside of one."""
    setup(settings)
    model = tiny_model()
    seen: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _module, given: seen.append(given[0].shape[1]))
    trained: list[int] = []

    def objective(batch: TokenBatch) -> LossOutput:
        trained.append(int((batch.targets != IGNORE).sum()))
        assert batch.weights is not None and torch.equal(batch.weights > 0, batch.targets != IGNORE)
        if len(trained) == 2:
            raise KeyError("planted")
        return sft.objective(model, batch)

    spreading = spread(model, objective, settings)
    batch = global_batch(0)
    spreading(batch)
    with pytest.raises(KeyError, match="planted"):
        spreading(batch)
    after = model(batch.input_ids).shape[1]
    numbers = torch.tensor([seen[0], trained[0], seen[-1], after])
    all_of_them = int((batch.targets != IGNORE).sum())
    return {"each": distributed.gather_rows(numbers[None]).tolist(), "targets": all_of_them}


def adjoint(settings: RunSettings) -> float:
    """Return the largest error of what `gather` gives and of its gradient, in fp32 and in bf16.

    x_r has rank r's numbers; of y = gather(x) each rank has weights w_r, and the gradient of the sum of all ranks'
    (y w_r) with respect to x_r is the sum of the parts of all w that stand where x_r went, rounded once.
    """
    setup(settings)
    shared = SharedRows("cpu")
    size, rank = shared.mesh.size(), shared.mesh.get_local_rank()
    everything = torch.randn(2, size, 3, 2 * size, 5, generator=torch.Generator().manual_seed(0))
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        xs, ws = everything[0, :, :, :2].to(dtype), everything[1].to(dtype)
        x = xs[rank].clone().requires_grad_()
        (y,) = shared.gather(1, x)
        (y * ws[rank]).sum().backward()
        assert x.grad is not None and y.dtype == x.grad.dtype == dtype
        expected = ws.float().sum(0)[:, 2 * rank : 2 * rank + 2].to(dtype)
        worst = max(worst, float((y - torch.cat(list(xs), 1)).abs().max()), float((x.grad - expected).abs().max()))
    return worst


def with_a_fault(folder: Path) -> dict[str, Any]:
    """Train with a planted fault: keys and values without the gradients that other ranks have for them."""
    right = SharedRows.gather

    def gather(self: SharedRows, dim: int, *xs: Tensor) -> tuple[Tensor, ...]:
        mine, ranks = self.mesh.get_local_rank(), self.mesh.size()
        parts = [list(x.chunk(ranks, dim)) for x in right(self, dim, *(x.detach() for x in xs))]
        for x, each in zip(xs, parts, strict=True):
            each[mine] = x
        return tuple(torch.cat(each, dim) for each in parts)

    with mock.patch.object(SharedRows, "gather", gather):
        return trained(folder, CP, "windows")


def refused(settings: RunSettings) -> str:
    """Return what is said to a network that cannot share rows."""
    setup(settings)
    model = torch.nn.Linear(2, 2)
    try:
        spread(model, lambda batch: LossOutput(total=model(batch).sum()), settings)
    except ConfigError as error:
        return str(error)
    return ""


RUNS = {
    2: {
        "windows": CP,
        "windows sft": CP_FSDP,
        "olmo2": CP_AGAIN,
        "lora sft": CP,
        "short": CP,
        "windows compiled": CP,
        "muon": CP,
    },
    4: {
        "windows of four": CP4,
        "short sft of four": CP4,
        "windows in groups": CP,
        "windows in sharded groups": CP_FSDP,
        "windows cut": CP_TP,
        "windows sft cut and sharded": CP_TP_FSDP,
    },
}
"""By number of processes: a task (and words that tell layouts apart) and its settings."""


def work(folder: Path) -> dict[str, Any]:
    """Do on these ranks what the tests look at; `folder` is shared between the numbers of ranks."""
    size = world()[1]
    found: dict[str, Any] = {
        name: trained(folder / name.replace(" ", "-"), settings, name) for name, settings in RUNS[size].items()
    }
    if size == 2:
        trained(folder / "moved", CP, "windows", until=2)
        found |= {stage: stepped(CP, stage) for stage in STAGES}
        found |= {"refused": refused(CP), "fault": with_a_fault(folder / "fault")}
    else:
        trained(folder / "moved", CP_TP_FSDP, "windows", until=4)
        found |= {"ppo joint of four": stepped(CP4, "ppo joint"), "dpo of four": stepped(CP_TP_FSDP, "dpo")}
        found |= {"adjoint": adjoint(CP4)}
    return found | {f"divided{size}": divided(CP if size == 2 else CP4)}


STAGES = ("reward_model", "dpo", "ppo", "ppo value", "ppo joint", "grpo")


class Found:
    """What two and four ranks found, and what became of the run that moved between them and one process."""

    def __init__(self, folder: Path) -> None:
        """Start two ranks, go on with a run of theirs alone, start four, and end that run alone."""
        self.folder = folder
        self.by_name = self._launch(2)
        trained(folder / "moved", PLAIN, "windows", until=3)
        self.by_name |= self._launch(4)
        self.moved = trained(folder / "moved", PLAIN, "windows")

    def _launch(self, size: int) -> dict[str, Any]:
        found, said = launched(self.folder, size, "-m", "tests.training.test_context_parallel")
        assert "reduce_scatter_tensor` is deprecated" not in said
        return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the ranks found."""
    torch.set_num_threads(1)
    return Found(tmp_path_factory.mktemp("context"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Return what one process finds: `alone(task)`."""
    torch.set_num_threads(1)
    folder, kept = tmp_path_factory.mktemp("alone"), dict[str, dict[str, Any]]()

    def make(task: str) -> dict[str, Any]:
        words = " ".join(word for word in task.split() if word in {*FAMILIES, "sft", "lora", "short", "muon"})
        if words not in kept:
            kept[words] = trained(folder / words.replace(" ", "-"), PLAIN, words)
        return kept[words]

    return make


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Assert equality to the order of sums: losses 1e-6, norms 1e-5, weights 2e-6; measured 5e-7, 3e-6, 5e-7."""
    close(a, b, losses=1e-6, norms=1e-5, weights=2e-6)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", [*RUNS[2], *RUNS[4]])
def test_shared_rows_are_whole_ones(found: Found, alone: Callable[[str], dict[str, Any]], task: str) -> None:
    """Five clipped steps of packed rows of 13 positions, or of 5, by 2, 4, 2 x 2 ranks; pretrain or sft by the task.

    Sliding windows, norms of queries and keys, OLMo 2's norms under recomputation, adapters, compiled layers, micro-
    batches, replicas, shards, matrices cut.
    """
    expected = alone(task)
    if "muon" in task and getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        close(found.by_name[task], expected, losses=1e-5, norms=5e-3, weights=2e-4)  # orthogonalised in bf16
    else:
        same(found.by_name[task], expected)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [*STAGES, "ppo joint of four", "dpo of four"])
def test_what_is_said_of_whole_rows_is_the_same(found: Found, stage: str) -> None:
    """Three steps of the other stages' objectives: loss, gradient, every metric; also by 4, and by 2 x 2 ranks."""
    got, expected = found.by_name[stage], stepped(PLAIN, stage.removesuffix(" of four"))
    same(got, expected)
    assert got["metrics"].keys() == expected["metrics"].keys()
    for name, values in expected["metrics"].items():
        assert got["metrics"][name] == pytest.approx(values, rel=1e-5, abs=1e-6), name


@pytest.mark.timeout(900)
def test_a_run_moves_between_shared_and_whole_rows(found: Found, alone: Callable[[str], dict[str, Any]]) -> None:
    """Shared by 2 ranks, killed; one process, killed; 2 x 2 ranks, cut and sharded, killed; ended by one process."""
    same(found.moved, alone("windows"))


@pytest.mark.timeout(900)
def test_a_missing_gradient_is_found(found: Found, alone: Callable[[str], dict[str, Any]]) -> None:
    """A gather without the others' gradients: the first loss is right, the gradient is not."""
    wrong, right = found.by_name["fault"], alone("windows")
    assert wrong["loss"][0] == pytest.approx(right["loss"][0], rel=1e-6)
    assert wrong["grad_norm"][0] != pytest.approx(right["grad_norm"][0], rel=1e-3)
    with pytest.raises(AssertionError):
        same(wrong, right)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("size", "positions"), [(2, 8), (4, 4)])
def test_the_work_is_divided(found: Found, size: int, positions: int) -> None:
    """13 positions, padded to 16: 8 or 4 for each rank's layers; each target once; whole rows outside of a step.

    Also after an objective that failed.
    """
    divided = found.by_name[f"divided{size}"]
    layers, targets, outside, hidden = zip(*divided["each"], strict=True)
    assert layers == (positions,) * size
    assert sum(targets) == divided["targets"] and all(0 < each < divided["targets"] for each in targets)
    assert outside == hidden == (LENGTH,) * size


@pytest.mark.timeout(900)
def test_the_gradient_of_a_gather_is_the_sum_of_all_ranks(found: Found) -> None:
    """To the bit in bf16, of sums in fp32; in fp32 to the order of four terms."""
    assert found.by_name["adjoint"] < 1e-6


@pytest.mark.timeout(900)
def test_another_network_is_refused(found: Found) -> None:
    """A network without our decoder does not share rows at a guess."""
    assert "context_parallel = 2: only Trivium's own network" in found.by_name["refused"]


# --------------------------------------------------------------------------------------------------- without processes


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 3, 16, 37])
def test_ranks_have_equal_parts_and_each_position_once(ranks: int, length: int) -> None:
    """Every place once; as many for each rank, fewer than one chunk more than there are; all see nearly as much."""
    parts = [places_of(rank, ranks, length) for rank in range(ranks)]
    places = torch.cat(parts)
    assert torch.equal(places.sort().values, torch.arange(len(places)))
    assert len({len(part) for part in parts}) == 1 and 0 <= len(places) - length < 2 * ranks
    assert len({int((part + 1).sum()) for part in parts}) == 1, "keys seen by a rank's queries, padding among them"


def test_a_part_by_hand() -> None:
    """The docstring's example."""
    assert places_of(0, 2, 7).tolist() == [0, 1, 6, 7] and places_of(1, 2, 7).tolist() == [2, 3, 4, 5]


def test_ranks_that_are_no_whole_groups_are_refused() -> None:
    """Six ranks are three groups of two; four are too many for one, and two times two are."""
    distributed.check_layout(CP, 6)
    with pytest.raises(ConfigError, match="context_parallel = 4 does not divide the 6 ranks; start a multiple of 4"):
        distributed.check_layout(CP4, 6)
    both = "tensor_parallel = 2 times context_parallel = 2 does not divide the 6 ranks; start a multiple of 4, or l"
    with pytest.raises(ConfigError, match=both):
        distributed.check_layout(CP_TP, 6)
    with pytest.raises(ConfigError, match="context_parallel = 0"):
        RunSettings(context_parallel=0)


def test_the_ranks_of_a_group_read_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks, two by two of one row: neighbours share rows, groups of four part."""
    monkeypatch.setattr(distributed._Group, "tensor", 2)
    monkeypatch.setattr(distributed._Group, "context", 2)
    got = []
    for rank in range(8):
        monkeypatch.setattr(distributed, "world", lambda rank=rank: (rank, 8))
        got.append(distributed.share(torch.arange(3)).tolist())
    assert got == [[0, 2]] * 4 + [[1]] * 4
    with pytest.raises(ConfigError, match="batch_size = 1 rows cannot be shared by 2 groups of 4 ranks"):
        distributed.check_shares(batch_size=1)


def test_a_group_s_figure_is_the_mean_of_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks' tokens of one row with losses 1, 2 and 4, each times three: 21 over all ranks is a loss of 7."""
    monkeypatch.setattr(distributed._Group, "context", 3)
    monkeypatch.setattr(distributed, "_reduced", lambda value, operation: value)
    assert distributed.all_reduce_sum(torch.tensor(21.0)) == 7


def _main() -> Iterator[None]:
    folder = Path(sys.argv[1])
    with joined(CP):
        found = work(folder)
        rank, size = world()
        if rank == 0:
            (folder / f"found{size}.json").write_text(json.dumps(found))
    yield


if __name__ == "__main__":
    list(_main())
