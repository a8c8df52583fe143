"""The seam for generation engines, `GenerateFn`: one contract, held to by the built-in engine and by the vLLM adapter.

vLLM cannot be installed where this is tested. `StandIn` has the signatures of its `LLM` and `SamplingParams` that the
adapter uses, refuses any other argument, and samples with a network that it reads from the folder it was given.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trivium.config import ConfigError, UserError
from trivium.models.generate import Generated, generate
from trivium.models.hf import load_model
from trivium.models.lora import LoraConfig, adapt
from trivium.training.rollout import SampleConfig, completion_logprobs, engine_of, sample, to_tokens
from trivium.training.vllm import VllmEngine

from .conftest import tiny_model

STOP = frozenset({2, 9})
PROMPTS = [[5, 6, 7], [8], [5, 6, 7], [10, 11, 12, 13, 14, 15], [8]]


@dataclass(kw_only=True)
class SamplingParams:
    """The fields of vLLM's that the adapter sets."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class StandIn:
    """vLLM's `LLM`, as far as it is used: weights are those of the folder, read when it is made and when it is told."""

    model: str
    skip_tokenizer_init: bool = False
    logprobs_mode: str = "raw_logprobs"
    generation_config: str = "auto"
    max_model_len: int = 0
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    enable_sleep_mode: bool = False
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network = load_model(Path(self.model))
        self.asleep: set[str] = set()
        self.cached = False
        MADE.append(self)

    def generate(
        self, prompts: list[dict[str, list[int]]], params: list[SamplingParams], *, use_tqdm: bool
    ) -> list[Any]:
        assert not self.asleep and not use_tqdm and not self.cached, "the cache holds what other weights computed"
        self.log.append("generate")
        self.cached = True
        return [self._one(prompt["prompt_token_ids"], each) for prompt, each in zip(prompts, params, strict=True)]

    def _one(self, prompt: list[int], params: SamplingParams) -> Any:
        assert params.max_tokens and params.max_tokens + len(prompt) <= self.max_model_len
        made = generate(
            self.network,
            [prompt],
            max_new_tokens=params.max_tokens,
            temperature=params.temperature,
            stop_ids=frozenset(params.stop_token_ids or ()),
            seed=params.seed or 0,
        )[0]
        scaled = 1.0 if self.logprobs_mode == "raw_logprobs" else params.temperature
        found = completion_logprobs(self.network, to_tokens([prompt], [made.token_ids], 0), temperature=scaled)[0]
        values = found[len(prompt) - 1 :].tolist()
        logprobs = [
            {token: SimpleNamespace(logprob=value)} for token, value in zip(made.token_ids, values, strict=True)
        ]
        output = SimpleNamespace(token_ids=tuple(made.token_ids), logprobs=logprobs, finish_reason=made.finish_reason)
        return SimpleNamespace(outputs=[output])

    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = (), kwargs: dict | None = None):
        assert method == "reload_weights" and "weights" not in self.asleep
        self.log.append(method)
        self.network = load_model(Path(self.model))

    def reset_prefix_cache(self) -> None:
        self.log.append("reset_prefix_cache")
        self.cached = False

    def sleep(self, level: int = 1) -> None:
        assert self.enable_sleep_mode and level == 2
        self.log.append("sleep")
        self.asleep, self.cached = {"weights", "kv_cache"}, False

    def wake_up(self, tags: list[str]) -> None:
        self.log.append(f"wake_up {tags[0]}")
        self.asleep -= set(tags)


MADE: list[StandIn] = []


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the stand-in in the place of the package."""
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = StandIn, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    MADE.clear()
    torch.set_num_threads(1)
    yield


@pytest.fixture(params=["built-in", "vllm", "vllm asleep"])
def engine(request: pytest.FixtureRequest, standin: None) -> Iterator[Any]:
    """Return each engine in turn."""
    if request.param == "built-in":
        yield generate
        return
    made = VllmEngine(sleep=request.param == "vllm asleep")
    yield made
    made.close()


def ask(engine: Any, model: Any, prompts: list[list[int]] = PROMPTS, **more: Any) -> list[Generated]:
    wanted = {"max_new_tokens": 12, "temperature": 0.7, "stop_ids": STOP, "seed": 3} | more
    return engine(model, prompts, **wanted)


def outspoken(seed: int = 0) -> Any:
    """Return a network whose tokens differ in probability, so that a wrong temperature shows."""
    model = tiny_model(seed)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(8)
    return model.eval()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_logprobs_are_the_trainers_at_the_temperature(engine: Any, temperature: float) -> None:
    """To 1e-5 in fp32 (row 39), whatever the temperature (row 38); at another they would differ a thousandfold."""
    model = outspoken()
    made = ask(engine, model, temperature=temperature)
    tokens = to_tokens(PROMPTS, [g.token_ids for g in made], 0)
    ours = completion_logprobs(model, tokens, temperature=temperature)
    for row, (prompt, each) in enumerate(zip(PROMPTS, made, strict=True)):
        end = len(prompt) - 1 + len(each.token_ids)
        torch.testing.assert_close(torch.tensor(each.logprobs), ours[row, len(prompt) - 1 : end], rtol=0, atol=1e-5)
    if temperature != 1:
        raw = completion_logprobs(model, tokens)
        assert float((raw - ours).abs().max()) > 1e-2


def test_completions_end_with_a_stop_token_or_are_cut(engine: Any) -> None:
    """What says "stop" ends with the first stop token in it; what says "length" has none and is as long as may be."""
    made = ask(engine, outspoken(), PROMPTS * 8, max_new_tokens=9)
    assert {each.finish_reason for each in made} == {"stop", "length"}
    for each in made:
        stops = [place for place, token in enumerate(each.token_ids) if token in STOP]
        if each.finish_reason == "stop":
            assert stops == [len(each.token_ids) - 1]
        else:
            assert not stops and len(each.token_ids) == 9
        assert len(each.logprobs) == len(each.token_ids)


def test_the_models_context_is_a_limit_too(engine: Any) -> None:
    """A prompt of 60 in a context of 64 leaves room for 4 tokens; stop tokens that nobody asked for stop nothing."""
    made = ask(engine, outspoken(), [[5] * 60, [5] * 62], stop_ids=frozenset())
    assert [len(each.token_ids) for each in made] == [4, 2]
    assert {each.finish_reason for each in made} == {"length"}


def test_samples_belong_to_seed_and_place(engine: Any) -> None:
    """The same again; another seed, another sample; equal prompts differ; a part of the prompts by their `draws`."""
    model = outspoken()
    whole = ask(engine, model)
    assert whole == ask(engine, model)
    assert whole != ask(engine, model, seed=4)
    assert whole[0] != whole[2] and whole[1] != whole[4]
    part = ask(engine, model, [PROMPTS[3], PROMPTS[1]], draws=[3, 1])
    assert [each.token_ids for each in part] == [whole[3].token_ids, whole[1].token_ids]


def test_what_was_trained_is_what_generates_next(engine: Any) -> None:
    """After a change of the weights in place, log-probabilities are those of the new ones; with adapters too."""
    model = outspoken()
    ask(engine, model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-3)
    adapted = adapt(outspoken(1), LoraConfig(rank=2))
    with torch.no_grad():
        adapted.model.layers[1].mlp.up_proj.lora_B.add_(1.0)
    for changed in (model, adapted):
        made = ask(engine, changed)
        tokens = to_tokens(PROMPTS, [g.token_ids for g in made], 0)
        ours = completion_logprobs(changed, tokens, temperature=0.7)
        assert float(ours.sum()) == pytest.approx(sum(sum(g.logprobs) for g in made), abs=1e-3)


def test_on_done_counts_every_completion(engine: Any) -> None:
    counted: list[int] = []
    ask(engine, outspoken(), on_done=counted.append)
    assert sum(counted) == len(PROMPTS)
    assert ask(engine, outspoken(), []) == []


def test_vllm_is_made_once_and_takes_the_weights_over_before_each_round(standin: None) -> None:
    """Cache emptied after new weights; asleep in between, weights woken before they are read and the cache after."""
    model = outspoken()
    engine = VllmEngine()
    for _ in range(3):
        ask(engine, model)
    (llm,) = MADE
    assert llm.log == ["generate", *["reload_weights", "reset_prefix_cache", "generate"] * 2]
    assert (llm.logprobs_mode, llm.skip_tokenizer_init, llm.generation_config) == ("processed_logprobs", True, "vllm")
    assert (llm.max_model_len, llm.dtype) == (64, "float32")
    folder = Path(llm.model)
    engine.close()
    assert not folder.exists()
    asleep = VllmEngine(sleep=True, dtype="bfloat16")
    ask(asleep, model)
    ask(asleep, model)
    awake = ["wake_up weights", "reload_weights", "wake_up kv_cache", "reset_prefix_cache"]
    assert MADE[1].log == ["generate", "sleep", *awake, "generate", "sleep"]
    assert MADE[1].dtype == "bfloat16"
    asleep.close()


def test_foreseeable_mistakes_are_one_sentence(standin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="needs logprobs_mode = 'processed_logprobs', not 'raw_logprobs'"):
        VllmEngine(logprobs_mode="raw_logprobs")
    model = outspoken()
    for broken, wanted in (
        ({"logprobs": None}, "without the log-probability"),
        ({"finish_reason": "abort"}, "ended a completion for 'abort'"),
        ({"token_ids": (5,), "finish_reason": "stop"}, "not on a stop token"),
    ):
        fine = {"token_ids": (5,), "logprobs": [{5: SimpleNamespace(logprob=-1.0)}], "finish_reason": "length"}
        answer = SimpleNamespace(outputs=[SimpleNamespace(**(fine | broken))])
        monkeypatch.setattr(StandIn, "generate", lambda *_, answer=answer, **__: [answer])
        with pytest.raises(UserError, match=wanted):
            ask(VllmEngine(), model, [[5]])
    monkeypatch.setattr(StandIn, "generate", lambda *_, **__: [])
    with pytest.raises(UserError, match="0 completions for 1 prompts"):
        ask(VllmEngine(), model, [[5]])
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install 'trivium\[vllm\]'"):
        ask(VllmEngine(), model)


def test_a_recipe_names_the_engine(standin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sample` asks what the recipe names; the built-in engine else; what cannot be called is said to be so."""
    house = types.ModuleType("house_for_engine_test")
    house.engine, house.nothing = VllmEngine(), 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, house.__name__, house)
    model = outspoken()
    config = SampleConfig(max_new_tokens=8, temperature=0.7, engine="house_for_engine_test:engine")
    made = sample(model, PROMPTS, config, stop_ids=STOP, seed=3)
    assert len(MADE) == 1 and len(made) == len(PROMPTS)
    assert engine_of(SampleConfig()) is generate
    with pytest.raises(ConfigError, match="a int cannot be called"):
        engine_of(SampleConfig(engine="house_for_engine_test:nothing"))
    house.engine.close()
