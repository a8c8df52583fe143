"""What one GPU does: `python3 bootstrap.py bench gpu`; `--toy` runs all of it at toy size on a CPU, as the tests do.

Checks the network's numbers on the device against the CPU, then measures training (tokens per second, MFU, peak memory)
of 124M, 350M and 1.3B parameters at 2,048 context in bf16, compiled, and in fp8 where torchao can be imported; tokens
per second of decoding; seconds of a PPO round. Prints tables and writes bench/results/gpu.json.

Rows are plain (one document each), so attention needs no mask. MFU counts each FLOP of the model once, against the
measured matrix product and, for GPUs that it knows, against the data sheet.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trivium.batches import IGNORE, RolloutBatch, TokenBatch, to_device
from trivium.config import RunSettings
from trivium.losses import ppo as losses
from trivium.losses.logprobs import whiten
from trivium.models.accounting import training_flops
from trivium.models.config import ModelConfig
from trivium.models.generate import generate
from trivium.models.heads import ScalarModel
from trivium.models.transformer import Transformer
from trivium.records import atomic_write
from trivium.stages import ppo, pretrain
from trivium.training.distributed import autocast, device_of
from trivium.training.optim import OptimConfig, Optimizer
from trivium.training.peak import peak_flops
from trivium.training.rollout import completion_logprobs, to_tokens
from trivium.training.step import train_step

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""bf16 FLOPs per second without sparsity, by a part of the GPU's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A network to train, rows per step, and what the bench does with it."""

    name: str
    layers: int
    width: int
    rows: int


SIZES = (
    Size(name="124M", layers=12, width=768, rows=16),
    Size(name="350M", layers=24, width=1024, rows=8),
    Size(name="1.3B", layers=24, width=2048, rows=4),
)
TOY = (Size(name="toy", layers=2, width=32, rows=2),)


def network(size: Size, context: int, vocab_size: int) -> ModelConfig:
    """Return GPT-2's proportions in this network: heads of 64, SwiGLU of 8/3 of the width, tied embeddings."""
    heads = max(1, size.width // 64)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=size.width,
        intermediate_size=64 * -(-8 * size.width // (3 * 64)),
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        qk_norm=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def rows_of(vocab_size: int, rows: int, context: int, device: torch.device) -> TokenBatch:
    """Return random tokens, each row one document."""
    ids = torch.randint(0, vocab_size, (rows, context + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(context).expand(rows, context)
    return to_device(TokenBatch(input_ids=ids[:, :-1], targets=ids[:, 1:], positions=positions), device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median seconds of `work` over `repeats`, after one run that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def numerics(device: torch.device) -> dict[str, float]:
    """Return the largest differences of loss and gradients to the CPU in fp32, relative to the largest value there.

    `fp32` is the device without TF32 (1e-4 is expected of another order of summation), `bf16` autocast (a few percent).
    """
    config = network(Size(name="check", layers=2, width=128, rows=2), 64, 512)
    reference = _loss_and_gradients(config, torch.device("cpu"), "fp32")
    found = {}
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    for precision in ("fp32", "bf16"):
        other = _loss_and_gradients(config, device, precision)
        for name, index in (("loss", 0), ("gradients", 1)):
            scale = reference[index].abs().max()
            found[f"{precision}_{name}"] = float((other[index] - reference[index]).abs().max() / scale)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return found


def _loss_and_gradients(config: ModelConfig, device: torch.device, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    model = Transformer(config).init_weights(0).to(device)
    batch = rows_of(config.vocab_size, 2, 64, device)
    with autocast(RunSettings(device=str(device), precision=precision)):
        total = pretrain.objective(model, 0.0, batch).total
    total.backward()
    return total.detach().cpu()[None], torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


def to_fp8(model: Transformer) -> bool:
    """Make the layers' products fp8 by torchao; False where it is not installed."""
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        return False
    convert_to_float8_training(model.model.layers)
    return True


def train(size: Size, options: argparse.Namespace, settings: RunSettings, *, fp8: bool) -> dict[str, Any] | None:
    """Return the figures of training one size, with half the rows as often as memory asks for; None without fp8."""
    device = device_of(settings)
    config = network(size, options.context, options.vocab_size)
    model = Transformer(config).init_weights(0).to(device)
    if fp8 and not to_fp8(model):
        return None
    if options.compile:
        for layer in model.model.layers:
            layer.compile()
    optimizer = Optimizer(model, OptimConfig(kind=options.optimizer, lr=1e-4))
    step = partial(
        train_step,
        partial(pretrain.objective, model, 0.0),
        optimizer=optimizer,
        lr_scale=1.0,
        precision=autocast(settings),
    )
    rows = size.rows
    while True:
        batch = rows_of(config.vocab_size, rows, options.context, device)
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds = timed(lambda batch=batch: step([batch]), device, options.steps)
            break
        except torch.OutOfMemoryError:
            if rows == 1:
                raise SystemExit(f"{size.name}: one row of {options.context} does not fit this GPU") from None
            rows //= 2
            optimizer.zero_grad()
            torch.cuda.empty_cache()
    speed = rows * options.context / seconds
    flops = speed * training_flops(config, options.context)
    sheet = next((peak for name, peak in DATA_SHEET.items() if name in device_name(device)), None)
    return {
        "size": size.name,
        "precision": "fp8" if fp8 else str(settings.precision),
        "parameters": config.num_parameters(),
        "rows": rows,
        "context": options.context,
        "seconds_per_step": seconds,
        "tokens_per_s": speed,
        "mfu": flops / peak_flops(settings),
        "mfu_data_sheet": flops / sheet if sheet else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def decode(size: Size, options: argparse.Namespace, settings: RunSettings) -> dict[str, Any]:
    """Return tokens per second of generation: one row, and as many rows as `--decode-rows`."""
    device = device_of(settings)
    config = network(size, options.context, options.vocab_size)
    model = Transformer(config).init_weights(0).to(device).eval()
    found: dict[str, Any] = {"size": size.name, "new_tokens": options.new_tokens}
    with autocast(settings):
        for rows in (1, options.decode_rows):
            prompts = rows_of(config.vocab_size, rows, options.prompt, torch.device("cpu")).input_ids.tolist()
            work = partial(generate, model, prompts, max_new_tokens=options.new_tokens)
            found[f"tokens_per_s_{rows}_rows"] = rows * options.new_tokens / timed(work, device, 2)
    return found


def ppo_round(size: Size, options: argparse.Namespace, settings: RunSettings) -> dict[str, Any]:
    """Return the seconds of one PPO round as the stage does it: sample, score, shape, two passes of two minibatches."""
    device = device_of(settings)
    shape = network(size, options.context, options.vocab_size)
    policy, reference = (Transformer(shape).init_weights(0).to(device) for _ in range(2))
    value, reward = (ScalarModel(shape).to(device) for _ in range(2))
    config = ppo.Config(batch_size=max(2, options.decode_rows))
    prompts = rows_of(shape.vocab_size, config.batch_size, options.prompt, torch.device("cpu")).input_ids.tolist()
    optimizers = [Optimizer(model, OptimConfig(lr=1e-5)) for model in (policy, value)]
    seconds: dict[str, list[float]] = {"sample": [], "shape": [], "update": []}

    def clock(name: str, began: float) -> float:
        synchronize(device)
        now = time.perf_counter()
        seconds[name].append(now - began)
        return now

    def work() -> None:
        now = time.perf_counter()
        with autocast(settings):
            generated = generate(policy.eval(), prompts, max_new_tokens=options.new_tokens)
        now = clock("sample", now)
        tokens = to_device(to_tokens(prompts, [g.token_ids for g in generated], 0), device)
        mask = tokens.targets != IGNORE
        with autocast(settings), torch.no_grad():
            old, ref = (completion_logprobs(model, tokens) for model in (policy, reference))
            values = value(tokens.input_ids, positions=tokens.positions).masked_fill(~mask, 0.0)
            scores = reward(tokens.input_ids, positions=tokens.positions)[:, -1].float()
        rewards = losses.shape_rewards(scores, losses.kl_k1(old, ref), mask, config.kl_coef)
        advantages, returns = losses.gae(rewards, values, mask, config.gamma, config.lam)
        batch = RolloutBatch(
            tokens=tokens, mask=mask, old_logprobs=old, ref_logprobs=ref, returns=returns, values=values,
            advantages=whiten(advantages, mask), rewards=rewards, scores=scores,
        )  # fmt: skip
        now = clock("shape", now)
        step = partial(train_step, lr_scale=1.0, precision=autocast(settings))
        for _ in range(config.epochs):
            for rows in torch.arange(config.batch_size).tensor_split(config.minibatches):
                part = ppo.select_rows(batch, rows)
                step(partial(ppo.objective, policy, config), [part], optimizers[0])
                step(partial(ppo.value_objective, value, config), [part], optimizers[1])
        clock("update", now)

    total = timed(work, device, 2)
    parts = {f"{name}_s": statistics.median(each[1:]) for name, each in seconds.items()}
    return {
        "size": size.name,
        "completions": config.batch_size,
        "new_tokens": options.new_tokens,
        "seconds": total,
        **parts,
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows of figures as Markdown, three significant digits."""
    heads = list(rows[0])

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(cell(row.get(head)) for head in heads) + " |" for row in rows)])


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--toy", action="store_true", help="toy size, on a CPU too, uncompiled")
    options.add_argument("--device", default="auto")
    options.add_argument("--sizes", nargs="+", default=[size.name for size in SIZES])
    options.add_argument("--context", type=int, default=2048)
    options.add_argument("--vocab-size", type=int, default=50_304)
    options.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--prompt", type=int, default=128)
    options.add_argument("--new-tokens", type=int, default=128)
    options.add_argument("--decode-rows", type=int, default=64)
    options.add_argument("--no-compile", dest="compile", action="store_false")
    options.add_argument("--results", type=Path, default=RESULTS)
    chosen = options.parse_args(words)
    sizes = tuple(size for size in SIZES if size.name in chosen.sizes)
    if chosen.toy:
        sizes = TOY
        small = {"context": 32, "vocab_size": 128, "steps": 2, "prompt": 4, "new_tokens": 4, "decode_rows": 4}
        vars(chosen).update(small, compile=False)
    settings = RunSettings(device=chosen.device, precision="bf16")
    device = device_of(settings)
    if device.type != "cuda" and not chosen.toy:
        raise SystemExit("no CUDA GPU here; --toy runs the same code at toy size on the CPU")
    results: dict[str, Any] = {
        "device": device_name(device), "torch": torch.__version__, "toy": chosen.toy, "compiled": chosen.compile,
        "optimizer": chosen.optimizer, "peak_flops": peak_flops(settings), "numerics": numerics(device), "training": [],
    }  # fmt: skip
    print(f"{results['device']}, {results['peak_flops'] / 1e12:.3g} TFLOP/s of bf16 measured")
    print(f"largest relative difference to the CPU: {results['numerics']}")
    for size in sizes:
        for fp8 in (False, True):
            with contextlib.suppress(torch.OutOfMemoryError) if fp8 else contextlib.nullcontext():
                if figures := train(size, chosen, settings, fp8=fp8):
                    results["training"].append(figures)
    results["decode"] = [decode(size, chosen, settings) for size in sizes]
    results["ppo"] = [ppo_round(sizes[0], chosen, settings)]
    for part in ("training", "decode", "ppo"):
        print(f"\n{part}\n\n{table(results[part])}")
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(chosen.results, json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
