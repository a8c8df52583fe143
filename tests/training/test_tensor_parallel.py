"""Matrices cut over ranks are the matrices of one process: losses, norms, weights, averages and checkpoints.

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

import pytest
import torch
from torch.distributed.tensor import DTensor

from trivium.batches import IGNORE, LossOutput, TokenBatch, select_rows
from trivium.config import ConfigError, RunSettings
from trivium.models.config import ModelConfig
from trivium.models.transformer import Transformer
from trivium.runs.events import read_metrics
from trivium.stages.sft import objective
from trivium.training import distributed
from trivium.training.distributed import data_ranks, joined, setup, world
from trivium.training.loop import FitConfig, fit
from trivium.training.optim import OptimConfig, Optimizer
from trivium.training.parallel import Spread, spread, whole
from trivium.training.rollout import SampleConfig, sample_over_ranks
from trivium.training.step import train_step
from trivium.training.tensor_parallel import check_divides, settle_gradients

from .test_ranks import close, launched, open_run

PLAIN = RunSettings(device="cpu", precision="fp32", threads=1, rank_timeout_s=120)
FSDP = dataclasses.replace(PLAIN, parallel="fsdp")
TP, TP_FSDP = (dataclasses.replace(settings, tensor_parallel=2) for settings in (PLAIN, FSDP))
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"qk_norm": True, "tie_word_embeddings": True},
    "qwen2": {"attention_bias": True},
    "olmo2": {"post_norm": True},
}
ROWS, LENGTH, STEPS = 10, 12, 5


def tiny_model(family: str = "qwen3") -> Transformer:
    """Return a two-layer network with grouped queries, whose inner width of 22 gives 11 to each of two ranks.

    So under FSDP over two groups those 11 are 6 and 5.
    """
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
    return Transformer(config).init_weights(0)


def global_batch(step: int) -> TokenBatch:
    """Return the rows of a step: two packed documents, each cut elsewhere; row r trains r + 1 targets at most."""
    ids = torch.randint(3, 30, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    targets, place = ids.roll(-1, 1).clone(), torch.arange(LENGTH)
    cuts = 2 + torch.arange(ROWS)[:, None] % 7
    documents = (place >= cuts).long()
    for row in range(ROWS):
        targets[row, row + 1 :] = IGNORE
    targets[place == cuts - 1] = IGNORE
    return TokenBatch(input_ids=ids, targets=targets, positions=place - documents * cuts, document_ids=documents)


def my_batches(step: int) -> list[TokenBatch]:
    """Return the micro-batches of this rank's group: four of the ten rows alone, two in each of two groups."""
    rank, size = data_ranks()
    return [select_rows(global_batch(step), rows) for rows in torch.arange(ROWS)[rank::size].split(3)]


def trained(
    folder: Path, settings: RunSettings, kind: str, family: str = "qwen3", *, until: int = STEPS
) -> dict[str, Any]:
    """Train in a folder with a moving average, or die before step `until`; return what was logged and the average."""
    setup(settings)
    model = tiny_model(family)
    optim = OptimConfig(lr=2e-3, kind=kind, eps=1e-6, grad_clip=0.5, weight_decay=0.1)
    config = FitConfig(
        steps=STEPS, batch_size=ROWS, log_every=1, eval_every=2, save_every=1, ema_decay=0.6, optim=optim
    )

    def batches(step: int) -> list[TokenBatch]:
        if step == until:
            raise KeyboardInterrupt
        return my_batches(step)

    def evaluate(step: int) -> dict[str, float]:
        with torch.no_grad():
            return {"eval/loss": float(objective(model, global_batch(99)).total)}

    run = open_run(folder, settings)
    try:
        fit(run, model, partial(objective, model), batches, config, evaluate=evaluate)
    except KeyboardInterrupt:
        return {}
    finally:
        run.events.close()
    with whole(model):
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    curves = read_metrics(run.dir)
    names = ("train/loss", "train/grad_norm", "eval/loss")
    found: dict[str, Any] = {name.split("/")[1]: [v for _, v in curves[name]] for name in names[:2]}
    return found | {"eval": [v for _, v in curves.get("eval/loss", [])], "weights": weights.tolist()}


def poisoned_step(settings: RunSettings) -> dict[str, Any]:
    """Take a step in which one row, in one group of ranks, has an infinite loss; say who skipped and what moved."""
    setup(settings)
    model = tiny_model()

    def infinite(batch: TokenBatch) -> LossOutput:
        hit = bool((batch.input_ids == global_batch(0).input_ids[-1]).all(-1).any())
        output = objective(model, batch)
        return LossOutput(total=output.total * float("inf") if hit else output.total)

    trained = spread(model, infinite, settings)
    optimizer = Optimizer(model, OptimConfig(weight_decay=0.5))
    before = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    result = train_step(trained, my_batches(0), optimizer, lr_scale=1.0)
    with whole(model):
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
    skipped = distributed.gather_rows(torch.tensor([int(result.skipped)]))
    return {"skipped": skipped.tolist(), "moved": not torch.equal(before, after)}


def sampled(settings: RunSettings) -> list[Any]:
    """Sample three prompts, of a model that has been cut, over the ranks: with four of them one has none."""
    setup(settings)
    model = tiny_model()
    spread(model, partial(objective, model), settings)
    with whole(model):
        made = sample_over_ranks(
            model, [[4], [5, 6], [7]], SampleConfig(max_new_tokens=5), stop_ids=frozenset({2}), seed=5
        )
    return [[g.token_ids, g.finish_reason] for g in made]


def settled(settings: RunSettings) -> dict[str, Any]:
    """Let a copy drift by the rank's number, settle; say what its gradient was, what each rank has, what is odd."""
    setup(settings)
    model = tiny_model()
    cut = spread(model, partial(objective, model), settings)
    assert isinstance(cut, Spread) and cut._tensor_mesh is not None
    with cut.reducing(last=False):
        cut(global_batch(0)).total.backward()
    weight = model.model.norm.weight
    assert weight.grad is not None
    own = weight.grad.tolist()
    weight.grad += world()[0]
    settle_gradients(list(model.parameters()), cut._tensor_mesh)
    cut_ones = [(name, p) for name, p in model.named_parameters() if isinstance(p, DTensor)]
    odd = [name for name, p in cut_ones if not isinstance(p.grad, DTensor) or p.grad.placements != p.placements]
    return {"own": own, "each": distributed.gather_rows(weight.grad[None]).tolist(), "odd": odd, "cut": len(cut_ones)}


def refused(settings: RunSettings) -> str:
    """Return what is said to a network that cannot be cut."""
    setup(settings)
    model = torch.nn.Linear(2, 2)
    try:
        spread(model, lambda batch: LossOutput(total=model(batch).sum()), settings)
    except ConfigError as error:
        return str(error)
    return ""


def work(folder: Path) -> dict[str, Any]:
    """Do on these ranks what the tests look at; `folder` is shared between the numbers of ranks."""
    found: dict[str, Any] = {}
    if world()[1] == 2:
        recomputed = dataclasses.replace(TP, activation_checkpointing=True)
        runs = {
            "tp muon": (TP, "muon", "qwen3"),
            "tp adamw": (TP, "adamw", "qwen3"),
            "tp adamw qwen2": (TP, "adamw", "qwen2"),
            "tp adamw olmo2": (recomputed, "adamw", "olmo2"),
            "fsdp muon": (FSDP, "muon", "qwen3"),
        }
        trained(folder / "moved", TP, "muon", until=2)
        found |= {"refused": refused(TP), "settled": settled(TP), "sampled": sampled(TP)}
    else:
        runs = {
            f"{name} {kind}": (settings, kind, "qwen3")
            for name, settings in (("tp x ddp", TP), ("tp x fsdp", TP_FSDP))
            for kind in ("muon", "adamw")
        }
        trained(folder / "moved", TP_FSDP, "muon", until=4)
        found |= {"poisoned": poisoned_step(TP_FSDP), "sampled": sampled(TP_FSDP)}
    for name, (settings, kind, family) in runs.items():
        found[name] = trained(folder / name.replace(" ", "-"), settings, kind, family)
    return found


class Found:
    """What two and four ranks found, and what became of the run that moved between them and one process."""

    def __init__(self, folder: Path) -> None:
        """Start two ranks, go on with a run of theirs alone, start four, and end that run alone."""
        self.folder = folder
        self.by_name = self._launch(2)
        trained(folder / "moved", PLAIN, "muon", until=3)
        four = self._launch(4)
        self.sampled = [self.by_name.pop("sampled"), four.pop("sampled")]
        self.by_name |= four
        self.moved = trained(folder / "moved", PLAIN, "muon")

    def _launch(self, size: int) -> dict[str, Any]:
        found, said = launched(self.folder, size, "-m", "tests.training.test_tensor_parallel")
        assert "suboptimal" not in said, "torch's advice about meshes is for us, not for who trains"
        return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the ranks found."""
    torch.set_num_threads(1)
    return Found(tmp_path_factory.mktemp("tensor"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Return what one process finds: `alone(kind, family)`."""
    torch.set_num_threads(1)
    folder, kept = tmp_path_factory.mktemp("alone"), dict[tuple[str, str], dict[str, Any]]()

    def make(kind: str, family: str = "qwen3") -> dict[str, Any]:
        if (kind, family) not in kept:
            kept[kind, family] = trained(folder / f"{kind}-{family}", PLAIN, kind, family)
        return kept[kind, family]

    return make


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Assert equality to the order of sums: losses 1e-6, norms 1e-5, averaged weights and their evaluation 2e-6.

    One process orthogonalises in fp32 on a CPU without AMX; with it in bf16, whose last digit is 4e-3 of an update of
    2e-3: then 1e-4 for weights and what follows from them.
    """
    bf16 = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    close(a, b, losses=1e-5 if bf16 else 1e-6, norms=5e-3 if bf16 else 1e-5, weights=2e-4 if bf16 else 2e-6)
    assert len(b["eval"]) == 3 and a["eval"] == pytest.approx(b["eval"], rel=1e-5 if bf16 else 1e-6)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("layout", ["tp", "tp x ddp", "tp x fsdp"])
def test_cut_matrices_are_whole_ones(
    found: Found, alone: Callable[..., dict[str, Any]], layout: str, kind: str
) -> None:
    """Five clipped steps of packed rows, on 2 and 2 x 2 ranks, queries and keys normalised, embeddings tied."""
    same(found.by_name[f"{layout} {kind}"], alone(kind))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["qwen2", "olmo2"])
def test_every_family_can_be_cut(found: Found, alone: Callable[..., dict[str, Any]], family: str) -> None:
    """Biases on queries, keys and values; a norm over all heads of all ranks (there with recomputed activations)."""
    same(found.by_name[f"tp adamw {family}"], alone("adamw", family))


@pytest.mark.timeout(900)
def test_a_sharded_average_is_the_average(found: Found, alone: Callable[..., dict[str, Any]]) -> None:
    """Under FSDP alone, too, the moving average is evaluated and exported as on one process."""
    same(found.by_name["fsdp muon"], alone("muon"))


@pytest.mark.timeout(900)
def test_a_run_moves_between_cut_and_whole(found: Found, alone: Callable[..., dict[str, Any]]) -> None:
    """Cut over 2 ranks, killed; one process, killed; 2 x 2 ranks with FSDP, killed; ended by one process."""
    same(found.moved, alone("muon"))


@pytest.mark.timeout(900)
def test_copies_keep_together(found: Found) -> None:
    """Gradients of a copy 0 and 1 off on two ranks are 0.5 off on both; what is cut has them laid out as it is itself.

    Seven matrices and the two norms of queries and keys in each of two layers.
    """
    settled = found.by_name["settled"]
    for copy in settled["each"]:
        assert copy == pytest.approx([value + 0.5 for value in settled["own"]], abs=1e-5)
    assert settled["odd"] == [] and settled["cut"] == 2 * (7 + 2)


@pytest.mark.timeout(900)
def test_one_group_s_infinity_is_skipped_by_all(found: Found) -> None:
    """A row of one group of two ranks is poisoned: all four skip the step, and no weight moves by a bit."""
    assert found.by_name["poisoned"] == {"skipped": [1, 1, 1, 1], "moved": False}


@pytest.mark.timeout(900)
def test_samples_of_a_cut_model_are_those_of_one_process(found: Found) -> None:
    """Three prompts over two and over four ranks, of which one has nothing to do."""
    assert found.sampled[0] == found.sampled[1] == sampled(PLAIN)


@pytest.mark.timeout(900)
def test_another_network_is_refused(found: Found) -> None:
    """A network without our layers is not cut at a guess."""
    assert "tensor_parallel = 2: only Trivium's own network" in found.by_name["refused"]


# --------------------------------------------------------------------------------------------------- without processes


def test_a_shape_that_cannot_be_dealt_out_is_refused_with_its_numbers() -> None:
    """Four heads, two key-value heads and 22 inside: two ranks can, four and eight cannot."""
    config = tiny_model().config
    check_divides(config, 2)
    with pytest.raises(ConfigError, match="= 4 does not divide the model's num_key_value_heads = 2 and intermediate_s"):
        check_divides(config, 4)
    with pytest.raises(ConfigError, match="= 8 does not divide the model's num_attention_heads = 4 and num_key"):
        check_divides(config, 8)


def test_ranks_that_are_no_whole_groups_are_refused() -> None:
    """Six ranks are three groups of two, and no number of groups of four."""
    distributed.check_layout(TP, 6)
    with pytest.raises(ConfigError, match="tensor_parallel = 4 does not divide the 6 ranks"):
        distributed.check_layout(dataclasses.replace(PLAIN, tensor_parallel=4), 6)
    with pytest.raises(ConfigError, match="tensor_parallel = 0"):
        RunSettings(tensor_parallel=0)


def test_the_ranks_of_a_group_read_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks in groups of two: neighbours share, groups part; three rows are enough for two groups, not one row."""
    monkeypatch.setattr(distributed._Group, "tensor", 2)
    rows = torch.arange(5)
    got = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "world", lambda rank=rank: (rank, 4))
        got.append(distributed.share(rows).tolist())
    assert got == [[0, 2, 4], [0, 2, 4], [1, 3], [1, 3]]
    distributed.check_shares(batch_size=3)
    with pytest.raises(ConfigError, match="batch_size = 1 rows cannot be shared by 2 groups of 2 ranks"):
        distributed.check_shares(batch_size=1)


def test_sums_count_each_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of two with 3 and 4 items: all ranks together have 14, which is 7 items; whole numbers stay whole."""
    monkeypatch.setattr(distributed._Group, "tensor", 2)
    monkeypatch.setattr(distributed, "_reduced", lambda value, operation: value)
    assert distributed.all_reduce_sum(torch.tensor(14.0)) == 7
    counted = distributed.all_reduce_sum(torch.tensor(14))
    assert counted == 7 and counted.dtype == torch.int64


def _main() -> Iterator[None]:
    folder = Path(sys.argv[1])
    with joined(TP):
        found = work(folder)
        rank, size = world()
        if rank == 0:
            (folder / f"found{size}.json").write_text(json.dumps(found))
    yield


if __name__ == "__main__":
    list(_main())
