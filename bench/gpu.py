"""What one GPU does: `python3 bootstrap.py bench gpu`; `--toy` runs all of it at toy size on a CPU, as the tests do.

Checks the network's numbers on the device against the CPU, then measures training (tokens per second, MFU, peak memory)
of 124M, 350M and 1.3B parameters at 2,048 context in bf16, compiled, and in fp8 where the GPU and torchao can; tokens
per second of decoding; seconds of a PPO round. Prints tables and writes bench/results/gpu.json. `--profile` adds where
the GPU's time goes in one step.

Rows are plain (one document each), so attention needs no mask; `--documents 512` packs documents of so many tokens
into them, as pre-training does. A step is the pipeline's own, optimizer included, over
some 65,000 tokens. MFU counts each FLOP of the model once, against the measured matrix product and, for GPUs that it
knows, against the data sheet's bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trivium.batches import IGNORE, RolloutBatch, TokenBatch, to_device
from trivium.config import ConfigError, RunSettings
from trivium.losses import ppo as losses
from trivium.losses.logprobs import whiten
from trivium.models.accounting import training_flops
from trivium.models.attention import use_kernel
from trivium.models.config import ModelConfig
from trivium.models.generate import generate
from trivium.models.heads import ScalarModel
from trivium.models.transformer import Transformer
from trivium.records import atomic_write
from trivium.stages import ppo, pretrain
from trivium.training.distributed import autocast, device_of
from trivium.training.float8 import lower_products
from trivium.training.optim import OptimConfig, Optimizer
from trivium.training.peak import peak_flops
from trivium.training.rollout import completion_logprobs, to_tokens
from trivium.training.step import train_step

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""bf16 FLOPs per second without sparsity, by a part of the GPU's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A network to train, rows per micro-batch, and micro-batches per step."""

    name: str
    layers: int
    width: int
    rows: int
    accumulate: int


SIZES = (
    Size(name="124M", layers=12, width=768, rows=32, accumulate=1),
    Size(name="350M", layers=24, width=1024, rows=16, accumulate=2),
    Size(name="1.3B", layers=24, width=2048, rows=8, accumulate=4),
)
PARTS = ("training", "decode", "ppo")
TOY = (Size(name="toy", layers=2, width=32, rows=2, accumulate=2),)


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


def drawn(config: ModelConfig, device: torch.device) -> Transformer:
    """Return a network with torch's initial weights, drawn on the device: a CPU takes ten seconds for a billion."""
    with device:
        model = Transformer(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=config.initializer_range)
    return model


def rows_of(vocab_size: int, rows: int, context: int, device: torch.device, document: int = 0) -> TokenBatch:
    """Return random tokens, each row one document, or packed with documents of `document` tokens."""
    ids = torch.randint(0, vocab_size, (rows, context + 1), generator=torch.Generator().manual_seed(0))
    places = torch.arange(context)
    return to_device(
        TokenBatch(
            input_ids=ids[:, :-1],
            targets=ids[:, 1:],
            positions=(places % document if document else places).expand(rows, context),
            document_ids=(places // document).expand(rows, context).contiguous() if document else None,
        ),
        device,
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the mean seconds of `work` over `repeats` without a pause between them, after two that are not counted."""
    for _ in range(2):
        work()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


def numerics(device: torch.device) -> dict[str, float]:
    """Return the largest differences of loss and gradients to the CPU in fp32, relative to the largest value there.

    `fp32` is the device without TF32 (1e-4 is expected of another order of summation), `bf16` autocast (a few percent).
    Once with the logits of all positions at hand, and once in the chunks in which large vocabularies are worked on.
    """
    found = {}
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    for how, vocab_size in (("", 512), ("_in_chunks", 70_000)):
        config = network(Size(name="check", layers=2, width=128, rows=2, accumulate=1), 64, vocab_size)
        reference = _loss_and_gradients(config, torch.device("cpu"), "fp32")
        for precision in ("fp32", "bf16"):
            other = _loss_and_gradients(config, device, precision)
            for name, index in (("loss", 0), ("gradients", 1)):
                scale = reference[index].abs().max()
                found[f"{precision}_{name}{how}"] = float((other[index] - reference[index]).abs().max() / scale)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return found


def _loss_and_gradients(config: ModelConfig, device: torch.device, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    model = Transformer(config).init_weights(0).to(device)
    batch = rows_of(config.vocab_size, 2, 64, device)
    with autocast(RunSettings(device=str(device), precision=precision)):
        total = pretrain.objective(model, 0.0, batch).total
    total.backward()
    return total.detach().cpu()[None], torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


def train(size: Size, options: argparse.Namespace, settings: RunSettings, optimizer: str) -> dict[str, Any] | None:
    """Return what training one size measured, its rows halved as often as memory asks for; None where fp8 cannot be."""
    device = device_of(settings)
    config = network(size, options.context, options.vocab_size)
    model = drawn(config, device)
    try:
        lower_products(model, settings)
    except ConfigError as error:
        print(error)
        return None
    if options.compile:
        model.model.compile_layers()
    step = partial(
        train_step,
        partial(pretrain.objective, model, 0.0),
        optimizer=Optimizer(model, OptimConfig(kind=optimizer, lr=1e-4)),
        lr_scale=1.0,
        precision=autocast(settings),
    )
    rows, parts = size.rows, size.accumulate
    while True:
        batches = [rows_of(config.vocab_size, rows, options.context, device, options.documents) for _ in range(parts)]
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds = timed(lambda batches=batches: step(batches), device, options.steps)
            break
        except torch.OutOfMemoryError:
            if rows == 1:
                raise SystemExit(f"{size.name}: one row of {options.context} does not fit this GPU") from None
            rows, parts = rows // 2, parts * 2
            torch.cuda.empty_cache()
    speed = rows * parts * options.context / seconds
    flops = speed * training_flops(config, options.documents or options.context)
    sheet = next((peak for name, peak in DATA_SHEET.items() if name in device_name(device)), None)
    figures = {
        "size": size.name,
        "precision": settings.precision,
        "optimizer": optimizer,
        "parameters": config.num_parameters(),
        "rows": rows,
        "micro_batches": parts,
        "context": options.context,
        "document": options.documents or options.context,
        "attention": options.attention or "chosen",
        "seconds_per_step": seconds,
        "tokens_per_s": speed,
        "mfu": flops / peak_flops(settings),
        "mfu_data_sheet": flops / sheet if sheet else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    if options.profile and device.type == "cuda":
        figures["profile"] = where_it_goes(partial(step, batches))
    return figures


def where_it_goes(work: Callable[[], object], top: int = 25) -> dict[str, float]:
    """Return the seconds of the GPU in the kernels that take the most of one run of `work`, and in all of them."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    events = {each.key: each.self_device_time_total / 1e6 for each in profile.key_averages()}
    largest = sorted(events.items(), key=lambda item: -item[1])[:top]
    return {"all kernels": sum(events.values()), **{name[:120]: seconds for name, seconds in largest}}


def decode(size: Size, options: argparse.Namespace, settings: RunSettings) -> dict[str, Any]:
    """Return tokens per second of generation: one row, and as many rows as `--decode-rows`."""
    device = device_of(settings)
    config = network(size, options.context, options.vocab_size)
    model = drawn(config, device).eval()
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
    policy, reference = (drawn(shape, device) for _ in range(2))
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
    parts = {f"{name}_s": statistics.mean(each[2:]) for name, each in seconds.items()}
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
    heads = [head for head in rows[0] if head != "profile"]

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
    names = [size.name for size in SIZES]
    options.add_argument("--sizes", nargs="+", choices=names, default=names)
    options.add_argument("--context", type=int, default=2048)
    options.add_argument("--vocab-size", type=int, default=50_304)
    options.add_argument("--optimizers", nargs="+", choices=("muon", "adamw"), default=["muon", "adamw"])
    options.add_argument("--precisions", nargs="+", choices=("bf16", "fp8"), default=["bf16", "fp8"])
    options.add_argument(
        "--documents", type=int, default=0, help="tokens of a document packed into rows; 0: plain rows"
    )
    options.add_argument("--attention", default="", help="the kernel of all attention in training, whatever is chosen")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--prompt", type=int, default=128)
    options.add_argument("--new-tokens", type=int, default=128)
    options.add_argument("--decode-rows", type=int, default=64)
    options.add_argument("--profile", action="store_true", help="the kernels in which the GPU's time goes")
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
        "peak_flops": peak_flops(settings), "numerics": numerics(device),
        "training": [], "decode": [], "ppo": [],
    }  # fmt: skip
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(chosen.results, json.dumps(results, indent=1) + "\n")

    def keep(part: str, figures: dict[str, Any]) -> None:
        """Write what there is after every figure: a lent GPU is gone when its time is up."""
        results[part].append(figures)
        print(table([figures]).splitlines()[-1], flush=True)
        atomic_write(chosen.results, json.dumps(results, indent=1) + "\n")

    print(f"{results['device']}, {results['peak_flops'] / 1e12:.3g} TFLOP/s of bf16 measured")
    print(f"largest relative difference to the CPU: {results['numerics']}")
    with use_kernel(chosen.attention) if chosen.attention else contextlib.nullcontext():
        for size, optimizer, precision in itertools.product(sizes, chosen.optimizers, chosen.precisions):
            if "training" not in chosen.parts:
                break
            if figures := train(size, chosen, dataclasses.replace(settings, precision=precision), optimizer):
                keep("training", figures)
    for size in sizes if "decode" in chosen.parts else ():
        keep("decode", decode(size, chosen, settings))
    if "ppo" in chosen.parts:
        keep("ppo", ppo_round(sizes[0], chosen, settings))
    for row in results["training"]:
        for name, seconds in row.get("profile", {}).items():
            print(f"{row['size']} {row['precision']} {row['optimizer']}: {1000 * seconds:8.2f} ms  {name}")
    for part in filter(results.get, PARTS):
        print(f"\n{part}\n\n{table(results[part])}")
    return results


if __name__ == "__main__":
    main()
