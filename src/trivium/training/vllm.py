"""vLLM as the engine for rollouts: `sampling = { engine = "trivium.training.vllm:engine" }`.

It is a `GenerateFn` (rollout.py) in front of vLLM's `LLM`, written against this part of vLLM's interface (0.11 on):

- `LLM(model=folder, skip_tokenizer_init=True, logprobs_mode="processed_logprobs", ...)`; prompts go in as ids;
- `generate([{"prompt_token_ids": ids}], [SamplingParams(...)], use_tqdm=False)`, of each output `outputs[0].token_ids`,
  `.logprobs` (one `{id: Logprob}` per token) and `.finish_reason`;
- `collective_rpc("reload_weights")`, which reads the weights of the folder again, and `reset_prefix_cache()`;
- with `enable_sleep_mode`, `sleep(level=2)` and `wake_up(tags=[...])`.

Log-probabilities: by default vLLM reports those before the temperature ("raw"); "processed" are those of what it
samples from, which is what `Generated` promises. **Never run against vLLM itself**: this project is built where it
cannot be installed. tests/training/test_vllm.py holds it to the seam's contract with a stand-in of these signatures.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trivium.config import UserError
from trivium.models.generate import Generated
from trivium.models.hf import save_model
from trivium.models.lora import merged
from trivium.models.transformer import Transformer
from trivium.training.distributed import world

REQUIRED: Mapping[str, Any] = {
    "skip_tokenizer_init": True,
    "logprobs_mode": "processed_logprobs",
    "generation_config": "vllm",
}
"""Options that the seam's contract rests on: ids in and out, log-probabilities at the temperature, no sampling
parameters from a file."""


class VllmEngine:
    """Generates with vLLM in this process; made at the first call, for the model that it is called with.

    Every call first writes the policy's weights to a folder in memory, where there is one, and has vLLM read them: once
    a round for PPO and GRPO. With `sleep` vLLM gives its memory back between the calls, so that it and the training can
    share a GPU. `options` are further ones of vLLM's `LLM`. By default it takes 40% of the GPU's memory and the dtype
    of the weights. Make one of your own where these do not suit, and name it in the recipe:

        engine = VllmEngine(sleep=True, dtype="bfloat16", tensor_parallel_size=2)
    """

    def __init__(self, *, sleep: bool = False, **options: Any) -> None:
        """Keep the options; raises UserError for one that would break the contract."""
        for name, value in REQUIRED.items():
            if options.get(name, value) != value:
                raise UserError(f"the vLLM engine needs {name} = {value!r}, not {options[name]!r}; leave it out")
        self.sleep = sleep
        self.options = {"gpu_memory_utilization": 0.4} | options | dict(REQUIRED)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._llm: Any = None
        self._shape: Any = None

    def __call__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        stop_ids: frozenset[int],
        seed: int,
        draws: Sequence[int] | None = None,
        on_done: Callable[[int], object] | None = None,
    ) -> list[Generated]:
        """Return one completion per prompt, as `GenerateFn` says.

        Raises UserError where vLLM is missing, on several ranks, and where what vLLM answers breaks the contract.
        """
        if not prompts:
            return []
        module = _vllm()
        self._push(model, module)
        context, rows = model.config.max_position_embeddings, draws or range(len(prompts))
        wanted = [
            module.SamplingParams(
                n=1,
                temperature=temperature,
                top_p=1.0,
                seed=_seed(seed, row),
                max_tokens=min(max_new_tokens, context - len(prompt)),
                stop_token_ids=sorted(stop_ids),
                ignore_eos=True,  # what ends a completion is `stop_ids`, not what a config file says
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._llm.generate(asked, wanted, use_tqdm=False)
        if len(outputs) != len(prompts):
            raise UserError(f"vLLM gave {len(outputs)} completions for {len(prompts)} prompts")
        made = [_read(output.outputs[0], stop_ids) for output in outputs]
        if self.sleep:
            self._llm.sleep(level=2)
        if on_done is not None:
            on_done(len(made))
        return made

    def _push(self, model: Transformer, module: Any) -> None:
        """Make vLLM's weights those of the model; adapters go merged, as they are trained beside frozen weights."""
        plain = merged(model)
        if self._llm is None or self._shape != plain.config:
            self.close()
            self._folder = tempfile.TemporaryDirectory(prefix="trivium-vllm-", dir=_memory())
            save_model(Path(self._folder.name), plain)
            dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
            own = {"model": self._folder.name, "max_model_len": plain.config.max_position_embeddings, "dtype": dtype}
            more = {"enable_sleep_mode": True} if self.sleep else {}
            self._llm, self._shape = module.LLM(**(own | more | self.options)), plain.config
            return
        assert self._folder is not None
        save_model(Path(self._folder.name), plain)
        if self.sleep:
            self._llm.wake_up(tags=["weights"])  # only then the cache, so that both are never there twice
        self._llm.collective_rpc("reload_weights")
        if self.sleep:
            self._llm.wake_up(tags=["kv_cache"])
        # What stands in it was computed with the weights before.
        self._llm.reset_prefix_cache()

    def close(self) -> None:
        """Let go of vLLM and its folder."""
        self._llm = self._shape = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


engine = VllmEngine()
"""With the default options; nothing is loaded before the first call."""


def _vllm() -> Any:
    """Return the package. Raises UserError where it is missing, or where there is more than one rank."""
    if world()[1] > 1:
        raise UserError("the vLLM engine runs in a single training process; leave `engine` out under torchrun")
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise UserError(f"sampling with vLLM needs the package ({error}): pip install 'trivium[vllm]'") from None


def _seed(seed: int, row: int) -> int:
    """Return the seed of a prompt's own generator: it must not matter who else is in the batch."""
    return int(np.random.SeedSequence([seed, row]).generate_state(1)[0])


def _memory() -> str | None:
    """Return a folder in memory, where the machine has one, for weights that are written in every round."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _read(output: Any, stop_ids: frozenset[int]) -> Generated:
    """Return a completion of vLLM's as ours. Raises UserError where it is none."""
    ids = [int(token) for token in output.token_ids]
    if output.logprobs is None or len(output.logprobs) != len(ids):
        raise UserError("vLLM gave a completion without the log-probability of each token")
    logprobs = [float(found[token].logprob) for token, found in zip(ids, output.logprobs, strict=True)]
    reason: Literal["stop", "length"] = "stop" if output.finish_reason == "stop" else "length"
    if output.finish_reason not in ("stop", "length") or (reason == "stop") != (bool(ids) and ids[-1] in stop_ids):
        raise UserError(
            f"vLLM ended a completion for {output.finish_reason!r} on token {ids[-1:]}, not on a stop token"
        )
    return Generated(token_ids=ids, logprobs=logprobs, finish_reason=reason)
