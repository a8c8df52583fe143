"""Compiled and not compiled agree, and only training is compiled."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from trivium.batches import IGNORE, LossOutput, TokenBatch
from trivium.config import ConfigError, RunSettings
from trivium.losses.cross_entropy import cross_entropy
from trivium.models.config import ModelConfig
from trivium.models.generate import generate
from trivium.models.transformer import Transformer
from trivium.training import compilation
from trivium.training.compilation import compile_layers, lacking
from trivium.training.optim import OptimConfig, Optimizer
from trivium.training.parallel import checkpoint_layers
from trivium.training.step import train_step

NEEDS_COMPILER = pytest.mark.skipif(bool(lacking("cpu")), reason=lacking("cpu"))


def network() -> Transformer:
    config = ModelConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        qk_norm=True,
        tie_word_embeddings=True,
        sliding_window=5,
        layer_types=("full_attention", "sliding_attention") * 2,
    )
    return Transformer(config).init_weights(0)


def packed(seed: int) -> TokenBatch:
    ids = torch.randint(3, 32, (3, 17), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].clone()
    targets[:, 8] = IGNORE
    documents = torch.tensor([[0] * 9 + [1] * 7] * 3)
    positions = torch.tensor([[*range(9), *range(7)]] * 3)
    return TokenBatch(input_ids=ids[:, :-1], targets=targets, positions=positions, document_ids=documents)


def three_steps(model: Transformer) -> list[float]:
    # AdamW and a small rate: Muon works in bf16, and either one's first update turns a gradient's last bit, where the
    # gradient is nearly zero, into a whole step; the rate is what that noise is multiplied with.
    optimizer = Optimizer(model, OptimConfig(kind="adamw", lr=1e-4))

    def objective(batch: TokenBatch) -> LossOutput:
        hidden = model(batch.input_ids, positions=batch.positions, document_ids=batch.document_ids)
        return LossOutput(total=cross_entropy(model.logits(hidden), batch.targets).sum())

    model.train()
    return [train_step(objective, [packed(seed)], optimizer, lr_scale=1.0).loss for seed in range(3)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@NEEDS_COMPILER
def test_three_steps_compiled_equal_three_steps_as_written():
    """fp32; losses to 1e-5, weights to a hundredth of what the three steps moved them."""
    start, written, compiled = network(), network(), network()
    torch.compiler.reset()
    counters.clear()
    assert compile_layers(compiled, RunSettings(device="cpu", compile="on"))
    expected, found = three_steps(written), three_steps(compiled)
    assert counters["stats"]["unique_graphs"] >= 1
    assert found == pytest.approx(expected, rel=1e-5)
    pairs = zip(start.parameters(), written.parameters(), compiled.parameters(), strict=True)
    moved, apart = zip(*(((b - a).norm().square(), (c - b).norm().square()) for a, b, c in pairs), strict=True)
    assert sum(apart) ** 0.5 <= 1e-2 * sum(moved) ** 0.5


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, NEEDS_COMPILER])])
def test_layers_that_are_computed_again_are_compiled_too(backend):
    """Activation checkpointing stands inside the program of a layer, not in its way."""
    written, compiled = network(), network()
    checkpoint_layers(written)
    torch.compiler.reset()
    counters.clear()
    compiled.model.compile_layers(backend=backend)
    checkpoint_layers(compiled)
    checkpoint_layers(compiled)  # a second time changes nothing
    expected, found = three_steps(written), three_steps(compiled)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert found == pytest.approx(expected, rel=1e-5)


def test_only_training_is_compiled_and_all_layers_share_what_is(monkeypatch):
    """With the compiler's first half alone (it needs no C++): as many graphs as kinds of layers, none from sampling."""
    model = network()
    before = list(model.state_dict())
    torch.compiler.reset()
    counters.clear()
    model.model.compile_layers(backend="eager")
    written = three_steps(network())
    assert counters["stats"]["unique_graphs"] == 0
    assert three_steps(model) == pytest.approx(written, rel=1e-6)
    graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 2
    model.eval()
    generate(model, [[3, 4, 5]], max_new_tokens=4, temperature=0.0)
    model(torch.arange(11)[None])
    assert counters["stats"]["unique_graphs"] == graphs
    assert list(model.state_dict()) == before
    assert model.lm_head.weight is model.model.embed_tokens.weight
    twin = copy.deepcopy(model)
    assert torch.equal(twin(torch.arange(11)[None]), model(torch.arange(11)[None]))


@pytest.mark.parametrize(
    ("setting", "device", "flops", "problem", "compiled"),
    [
        ("auto", "cpu", 0.99e14, "", False),
        ("auto", "cpu", 1e14, "", True),
        ("auto", "cpu", 1e14, "no compiler", False),
        ("off", "cpu", 1e14, "", False),
        ("on", "cpu", 0, "", True),
        ("auto", "cuda", 0, "", True),
        ("off", "cuda", 0, "", False),
        ("auto", "cuda", 0, "no triton", False),
    ],
)
def test_the_setting_decides_and_on_a_cpu_the_length_of_the_run(monkeypatch, setting, device, flops, problem, compiled):
    monkeypatch.setattr(compilation, "device_of", lambda settings: torch.device(device))
    monkeypatch.setattr(compilation, "lacking", lambda device: problem)
    model = network()
    assert compile_layers(model, RunSettings(compile=setting), flops=flops) is compiled
    assert (model.model.layers[0]._compiled_call_impl is not None) is compiled


def test_without_a_compiler_on_is_refused_and_auto_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"compile = 'on': there is no C\+\+ compiler .* set compile to off"):
        compile_layers(network(), RunSettings(device="cpu", compile="on"))
    assert not compile_layers(network(), RunSettings(device="cpu"))


def test_an_unknown_word_is_refused():
    with pytest.raises(ConfigError, match="compile = 'yes'"):
        RunSettings(compile="yes")
