"""fp8 products for training alone; here rounded to fp8 and multiplied in fp32 (`emulate`), which any machine can."""

from functools import partial

import pytest
import torch
from torch import nn

from trivium.batches import TokenBatch, to_device
from trivium.config import ConfigError, Recipe, RunSettings, StageSpec
from trivium.models.lora import LoraConfig, adapt, adapters_of
from trivium.pipeline import run_recipe
from trivium.stages.pretrain import objective
from trivium.training import float8
from trivium.training.distributed import autocast, precision_name
from trivium.training.float8 import lower_products
from trivium.training.optim import OptimConfig, Optimizer
from trivium.training.step import train_step

from .conftest import tiny_model

FP8 = RunSettings(device="cpu", precision="fp8")
STEPS = 8


def a_batch(seed=0, length=13):
    ids = torch.randint(3, 32, (3, length + 1), generator=torch.Generator().manual_seed(seed))
    return TokenBatch(input_ids=ids[:, :-1], targets=ids[:, 1:], positions=torch.arange(length).expand(3, length))


def lowered(seed=0):
    model = tiny_model(seed)
    assert lower_products(model, FP8, emulate=True) == 10, "two layers: q, o, gate, up, down; k and v are 8 wide"
    return model


def test_only_a_recipe_that_asks_for_it_gets_it():
    model = tiny_model()
    assert lower_products(model, RunSettings(device="cpu", precision="bf16")) == 0
    assert {type(each) for each in model.modules() if isinstance(each, nn.Linear)} == {nn.Linear}


def test_evaluation_sees_the_weights_as_they_are_and_training_their_rounding():
    plain, model = tiny_model(), lowered()
    ids = a_batch().input_ids
    with torch.no_grad():
        assert torch.equal(model.eval()(ids), plain(ids))
        error = (model.train()(ids) - plain(ids)).norm() / plain(ids).norm()
    # e4m3 keeps three bits of a number's fraction: an operand is off by up to 1/16.
    assert 0.01 < error < 0.15


def test_it_learns_what_fp32_learns_to_within_two_percent_and_keeps_its_weights_in_fp32():
    losses = {}
    for name, model in (("fp32", tiny_model()), ("fp8", lowered())):
        optimizer = Optimizer(model.train(), OptimConfig(kind="adamw", lr=1e-2))
        step = partial(train_step, partial(objective, model, 0.0), optimizer=optimizer, lr_scale=1.0)
        losses[name] = [step([a_batch(0)]).loss for _ in range(STEPS)]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses["fp8"][-1] < losses["fp8"][0] - 0.2
    assert losses["fp8"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["fp8"] != losses["fp32"]


def test_names_and_shapes_of_the_weights_stay_so_that_checkpoints_and_models_are_the_same():
    plain, model = tiny_model(), lowered()
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_matrices_under_adapters_stay_in_bf16():
    model = adapt(tiny_model(), LoraConfig(rank=2), seed=0)
    assert lower_products(model, FP8, emulate=True) == 0
    assert adapters_of(model)


def test_what_is_lacking_is_said_in_one_sentence(monkeypatch):
    with pytest.raises(ConfigError, match="precision = 'fp8': it is for GPUs; use 'bf16'"):
        lower_products(tiny_model(), FP8)
    with pytest.raises(ConfigError, match="tensor_parallel above 1 use 'bf16'"):
        RunSettings(precision="fp8", tensor_parallel=2)
    monkeypatch.setattr(float8, "TILE", 7)
    with pytest.raises(ConfigError, match="no matrix of this network has sides that divide by 7"):
        lower_products(tiny_model(), FP8, emulate=True)
    monkeypatch.setattr(float8, "device_of", lambda settings: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match="an older GPU has no fp8 products"):
        lower_products(tiny_model(), FP8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="torchao is not installed"):
        lower_products(tiny_model(), FP8)


def test_a_recipe_is_refused_before_any_of_its_work(tmp_path):
    first = StageSpec(table="data_prep", stage="data_prep", values={"sources": ["trivium.data.microworld:documents"]})
    recipe = Recipe(path=tmp_path / "r.toml", base=tmp_path, settings=FP8, stages=(first,))
    with pytest.raises(ConfigError, match="precision = 'fp8': it is for GPUs"):
        run_recipe(recipe, workspace=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_run_in_fp8_is_another_run_than_one_in_bf16():
    assert precision_name(FP8) == "fp8"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_the_gpu_it_is_what_it_is_emulated_to_be(compiled):
    if torch.cuda.get_device_capability() < float8.HARDWARE:
        pytest.skip("needs a GPU with fp8 products")
    settings = RunSettings(device="cuda", precision="fp8")
    model, reference = tiny_model().cuda().train(), tiny_model().train()
    assert lower_products(model, settings) == lower_products(reference, FP8, emulate=True)
    if compiled:
        model.model.compile_layers()
    with autocast(settings):  # lengths that do not divide by 16, too
        found = objective(model, 0.0, to_device(a_batch(), torch.device("cuda"))).total
    found.backward()
    expected = objective(reference, 0.0, a_batch()).total
    assert float(found) == pytest.approx(float(expected), rel=0.01)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
