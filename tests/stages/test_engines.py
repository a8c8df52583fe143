"""PPO and GRPO sample with the engine that the recipe names, every round anew and from the policy as it then is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from trivium.config import build, facts
from trivium.models.generate import Generated, generate
from trivium.pipeline import _marked
from trivium.runs.manifest import Run
from trivium.stages import grpo, ppo
from trivium.training.optim import OptimConfig
from trivium.training.rollout import SampleConfig

from .conftest import Folders, equal, saved_weights

SAMPLING = SampleConfig(max_new_tokens=6)
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.0)
PPO = ppo.Config(prompts=("prompts.jsonl",), iterations=2, batch_size=4, sampling=SAMPLING, optim=OPTIM)
GRPO = grpo.Config(
    prompts=("prompts.jsonl",),
    rewards={"module_for_stage_test:reward": 1.0},
    iterations=2,
    prompts_per_round=2,
    group_size=2,
    sampling=SAMPLING,
    optim=OPTIM,
)


class Counting:
    """The built-in engine, which keeps what it was asked and a weight of the policy each time."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.weights: list[torch.Tensor] = []

    def __call__(self, model: Any, prompts: Any, **asked: Any) -> list[Generated]:
        self.calls.append(asked)
        self.weights.append(model.model.norm.weight.detach().clone())
        return generate(model, prompts, **asked)


@pytest.mark.parametrize("stage", [ppo, grpo])
def test_each_round_asks_the_engine(
    stage: Any, stage_run: Callable[..., Run], folders: Folders, module_of: Callable[..., str], tmp_path
) -> None:
    rows = [{"prompt": f"Say {n}."} for n in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = Counting()
    house = module_of(engine=engine, reward=lambda prompts, made: [float(len(m.text)) for m in made])
    config = PPO if stage is ppo else GRPO
    make = partial(stage_run, parents={"policy": folders.policy, "reward_model": folders.reward}, table="rounds")
    plain, other = make("plain"), make("other")
    stage.run(config, plain)
    assert not engine.calls
    sampling = dataclasses.replace(SAMPLING, engine=f"{house}:engine")
    stage.run(dataclasses.replace(config, sampling=sampling), other)
    assert len(engine.calls) == 2 and not torch.equal(*engine.weights)
    assert engine.calls[0]["temperature"] == 1.0 and engine.calls[0]["max_new_tokens"] == 6
    assert engine.calls[0]["seed"] != engine.calls[1]["seed"]
    assert equal(saved_weights(plain), saved_weights(other))


def test_the_engine_is_part_of_a_runs_identity_where_there_is_one_and_its_code_is_hashed() -> None:
    config = build(ppo.Config, {"sampling": {"engine": "house:engine"}}, where="[ppo]")
    assert ("sampling.engine", "code", "house:engine") in list(_marked(config))
    assert facts(config)["sampling"]["engine"] == "house:engine"
    assert facts(ppo.Config())["sampling"] == {"max_new_tokens": 64, "temperature": 1.0}
    with pytest.raises(Exception, match="expected code as 'module:attribute'"):
        build(ppo.Config, {"sampling": {"engine": "vllm"}}, where="[ppo]")
