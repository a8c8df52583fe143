"""Pre-training, tokens per second, side by side with the Trainer of transformers: `bench/pretrain.py [OPTIONS]`.

Own and peer train the same network on the same token ids, in processes that take turns. "As run" is each
as its users run it; "tuned" gives both the same allocator settings, which must be in the environment before a process
starts, and compiles both. Every process warms up, then counts the steps of `--seconds`; a figure is the median over
the processes.

    python3 bootstrap.py bench pretrain                     # both shapes, three processes each, fp32 and bf16
    .venv/bin/python bench/pretrain.py --shapes tiny --seconds 5 --processes 1

Prints the table and writes bench/results/pretrain.json: own, peers, ratio (own's best to the best peer as run),
ratio_tuned (the same of the tuned), the spread, settings, versions and the measured peak of a matrix product.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "pretrain.json"
TUNED = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
    ":glibc.malloc.top_pad=268435456"
}
WARM_UP = 3
"""Steps before the clock starts: the first ones allocate, and choose kernels."""


@dataclass(frozen=True)
class Shape:
    """A network and its batch."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    context: int = 256
    batch_size: int = 16

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.context * self.batch_size


SHAPES = {"tiny": Shape(4096, 128, 352, 4, 4), "small": Shape(8192, 384, 1024, 6, 6)}


def documents(shape: Shape, count: int) -> list[list[int]]:
    """Return random documents of two and a half rows: speed does not depend on what the ids say."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.integers(8, shape.vocab_size, size=shape.context * 5 // 2).tolist() for _ in range(count)]


def own(shape: Shape, precision: str, *, tuned: bool = False) -> Callable[[], float]:
    """Return a function that takes one training step as the pretrain stage takes it and returns the loss."""
    from trivium.config import RunSettings
    from trivium.data.loader import PretrainLoader
    from trivium.data.shards import open_shards, write_shards
    from trivium.models.config import ModelConfig
    from trivium.models.transformer import Transformer
    from trivium.stages.pretrain import objective
    from trivium.training.allocator import keep_freed_memory
    from trivium.training.compilation import compile_layers
    from trivium.training.distributed import autocast
    from trivium.training.optim import OptimConfig, Optimizer
    from trivium.training.step import train_step

    settings = RunSettings(precision=precision, compile="on" if tuned else "auto")
    keep_freed_memory()
    folder = Path(tempfile.mkdtemp()) / "shards"
    rows = ((ids, 4 * len(ids)) for ids in documents(shape, 400))
    write_shards(folder, rows, tokenizer_fingerprint="bench", vocab_size=shape.vocab_size)
    loader = PretrainLoader(open_shards(folder), shape.context, shape.batch_size, 0)
    config = ModelConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
    )
    model = Transformer(config).init_weights(0)
    compile_layers(model, settings)
    model.train()
    optimizer = Optimizer(model, OptimConfig())
    loss = partial(objective, model, 0.0)
    step = iter(range(10**9))

    def take() -> float:
        batch = loader.batch(next(step))
        return train_step(loss, [batch], optimizer, lr_scale=1.0, precision=autocast(settings)).loss

    return take


def trainer(shape: Shape, precision: str, clock: Clock, *, tuned: bool = False) -> float:
    """Train with transformers' Trainer on packed rows of the same ids, as its documentation shows; return the loss."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    stream = torch.tensor(documents(shape, 400)).flatten()
    rows = stream[: len(stream) // shape.context * shape.context].view(-1, shape.context)
    data = [{"input_ids": row, "labels": row} for row in rows]

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_training_stop = clock.tick()
            return control

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=shape.batch_size, max_steps=100_000, use_cpu=True,
        bf16=precision == "bf16", learning_rate=3e-3, logging_strategy="no", save_strategy="no", report_to=[],
        disable_tqdm=True, dataloader_num_workers=0, torch_compile=tuned,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    return float(Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Stop()]).train().training_loss)


class Clock:
    """Counts steps once the first few are over, until the time is up."""

    def __init__(self, seconds: float) -> None:
        """Wait for the first step."""
        self.seconds, self.steps, self.began, self.elapsed = seconds, -WARM_UP, 0.0, 0.0

    def tick(self) -> bool:
        """Note that a step ended and tell whether the time is up."""
        self.steps += 1
        if self.steps == 0:
            self.began = time.perf_counter()
        self.elapsed = time.perf_counter() - self.began if self.steps > 0 else 0.0
        return self.steps > 0 and self.elapsed >= self.seconds


def work(side: str, shape: Shape, precision: str, seconds: float, *, tuned: bool) -> dict[str, Any]:
    """Return what one process measured."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    clock = Clock(seconds)
    if side == "own":
        take = own(shape, precision, tuned=tuned)
        loss = take()
        while not clock.tick():
            loss = take()
    else:
        loss = trainer(shape, precision, clock, tuned=tuned)
    return {
        "tokens_per_s": clock.steps * shape.tokens / clock.elapsed,
        "steps": clock.steps,
        "loss": loss,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure(side: str, name: str, precision: str, seconds: float, *, tuned: bool) -> dict[str, Any]:
    """Return what a fresh process measured; raises SystemExit with what it said when it fails."""
    words = ["--worker", side, "--shapes", name, "--precisions", precision, "--seconds", str(seconds)]
    words += ["--tuned"] if tuned else []
    environment = os.environ | (TUNED if tuned else {}) | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{side} {name} {precision} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak() -> dict[str, float]:
    """Return the measured FLOP/s of a 2048 x 2048 product in each dtype."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(2048, 2048, dtype=dtype)
        times = []
        for _ in range(6):
            began = time.perf_counter()
            torch.mm(matrix, matrix)
            times.append(time.perf_counter() - began)
        rates[str(dtype).removeprefix("torch.")] = 2 * 2048**3 / min(times)
    return rates


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return median, minimum and maximum of a side's processes."""
    rates = [run["tokens_per_s"] for run in runs]
    return {
        "tokens_per_s": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "processes": len(runs),
    }


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of every shape: own and peer take turns, process by process."""
    found: dict[str, Any] = {}
    for name in options.shapes:
        runs: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
        for number in range(options.processes):
            for precision in options.precisions:
                for tuned in (False, True):
                    for side in ("own", "trainer"):
                        print(f"{name} {precision} {side} {'tuned' if tuned else 'as run'} {number + 1}", flush=True)
                        result = measure(side, name, precision, options.seconds, tuned=tuned)
                        runs.setdefault((side, precision, tuned), []).append(result)
        rows = [
            {"side": side, "precision": precision, "tuned": tuned, **summary(made)}
            for (side, precision, tuned), made in runs.items()
        ]

        def best(side: str, tuned: bool, rows: list[dict[str, Any]] = rows) -> float:
            return max(r["tokens_per_s"] for r in rows if r["side"] == side and r["tuned"] == tuned)

        found[name] = {
            "own": [row for row in rows if row["side"] == "own"],
            "peers": [row for row in rows if row["side"] != "own"],
            "ratio": best("own", False) / best("trainer", False),
            "ratio_tuned": best("own", True) / best("trainer", True),
        }
    return found


def report(found: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    lines = ["| shape | side | precision | allocator | tokens/s (low to high) | peak MB |", "|" + " --- |" * 6]
    for name, shape in found.items():
        for row in shape["own"] + shape["peers"]:
            rate = f"{row['tokens_per_s']:,.0f} ({row['low']:,.0f} to {row['high']:,.0f})"
            allocator = "tuned" if row["tuned"] else "default"
            peak_mb = f"{row['peak_bytes'] / 1e6:,.0f}"
            lines.append(f"| {name} | {row['side']} | {row['precision']} | {allocator} | {rate} | {peak_mb} |")
    ratios = [f"{name}: {s['ratio']:.2f} as run, {s['ratio_tuned']:.2f} tuned" for name, s in found.items()]
    return "\n".join(lines) + "\n\nOwn's best to the peer's best: " + "; ".join(ratios)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--worker", choices=["own", "trainer"], help=argparse.SUPPRESS)
    parser.add_argument("--tuned", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        shape = SHAPES[options.shapes[0]]
        print(json.dumps(work(options.worker, shape, options.precisions[0], options.seconds, tuned=options.tuned)))
        return
    import torch
    import transformers

    found = compare(options)
    print("\n" + report(found))
    facts = {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "peer": transformers.__version__},
        "settings": {"seconds": options.seconds, "processes": options.processes, "tuned": TUNED},
        "cores": len(os.sched_getaffinity(0)),
        "peak_flops_per_s": peak(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(facts | {"shapes": found}, indent=1) + "\n")
    print(f"\nwritten to {RESULTS}")


if __name__ == "__main__":
    main()
