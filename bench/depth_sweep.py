"""Is what `depth` derives any good? Hand-set neighbours against it at equal compute: `bootstrap.py bench depth_sweep`.

For each depth: the derived run, then runs in which one thing is set by hand (learning rate, width, batch, layers) and
the number of steps is such that every run costs the same FLOPs. Prints held-out bits per byte of each, writes
bench/results/depth_sweep.json and docs/figures/depth_sweep.svg. The bar: no hand-set value is better by more than 2%.

Runs are kept in the workspace, so a sweep that was stopped goes on where it was. At 20 tokens per parameter depths 2
to 6 take days on a CPU. Two ways to look at less: `--width-per-layer` sets the width by hand in all runs, to less than
64 a layer, and the rest of the rules is tried at full length; `--budget-seconds` cuts every run of a depth to the same
smaller number of tokens per parameter. The results say which. On a GPU, which one small network leaves idle, `--jobs`
runs so many at once, each a process with a workspace of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import platform
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trivium.batches import TokenBatch
from trivium.config import Recipe, RunSettings, StageSpec
from trivium.models.config import ModelConfig
from trivium.models.transformer import Transformer
from trivium.pipeline import run_recipe
from trivium.records import RunManifest, atomic_write
from trivium.stages.pretrain import objective
from trivium.training.distributed import autocast, device_of, precision_name, setup
from trivium.training.optim import OptimConfig, Optimizer
from trivium.training.scaling import HEAD_SIZE, TOKENS_PER_PARAMETER, budget_of, shape_of
from trivium.training.step import train_step

ROOT = Path(__file__).resolve().parents[1]
BAR = 0.02


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One hand-set value: `name` says which, the rest is the resolved run with it."""

    name: str
    shape: dict[str, int]
    batch_size: int
    lr: float


def shape_fields(depth: int, width: int = 0) -> dict[str, int]:
    return dataclasses.asdict(shape_of(depth, width))


def model_of(shape: dict[str, int], vocab_size: int, context: int) -> ModelConfig:
    """Return the network as the stage makes it."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=shape["hidden_size"],
        intermediate_size=32 * math.ceil(shape["hidden_size"] * 8 / 3 / 32),
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        max_position_embeddings=max(context, 512),
        tie_word_embeddings=True,
        qk_norm=True,
    )


def neighbours(depth: int, base: dict[str, Any], width: int = 0) -> Iterator[Variant]:
    """Yield the hand-set neighbours of a derived run: learning rate, width, batch and layers, each down and up.

    `width` is that of the derived run; 0: what the dial gives.
    """
    shape = shape_fields(depth, width)
    rows, lr, width = base["batch_size"], base["lr"], shape["hidden_size"]
    grid = 16 if width >= HEAD_SIZE else 4
    for factor in (0.5, 2):
        yield Variant(name=f"lr x{factor}", shape=shape, batch_size=rows, lr=lr * factor)
    for factor in (0.75, 1.33):
        wide = shape_fields(depth, grid * round(width * factor / grid))
        yield Variant(name=f"width x{wide['hidden_size'] / width:.2f}", shape=wide, batch_size=rows, lr=lr)
    for factor in (0.5, 2):
        if round(rows * factor) >= 1:
            yield Variant(name=f"batch x{factor}", shape=shape, batch_size=round(rows * factor), lr=lr)
    for layers in (depth - 1, depth + 1):
        if layers > 0:
            yield Variant(name=f"layers {layers}", shape=shape | {"num_layers": layers}, batch_size=rows, lr=lr)


def tokens_per_second(model_config: ModelConfig, context: int, rows: int, settings: RunSettings) -> float:
    """Return the measured training speed of a network, over about five seconds after a warm-up."""
    device = device_of(settings)
    model = Transformer(model_config).init_weights(0).to(device)
    optimizer = Optimizer(model, OptimConfig())
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model_config.vocab_size, (rows, context), generator=draw).to(device)
    batch = TokenBatch(
        input_ids=ids,
        targets=ids.roll(-1, 1),
        positions=torch.arange(context, device=device).expand(rows, context),
        document_ids=torch.zeros_like(ids),
    )
    began, steps = 0.0, -1
    while steps < 2 or time.perf_counter() - began < 5:
        if steps == 0:
            began = time.perf_counter()
        train_step(
            lambda part: objective(model, 0.0, part), [batch], optimizer, lr_scale=0.0, precision=autocast(settings)
        )
        steps += 1
    return steps * rows * context / (time.perf_counter() - began)


def bits(manifest: RunManifest) -> float:
    return next(result.value for result in manifest.results if result.metric == "bits_per_byte")


class Sweep:
    """The runs of one text, one vocabulary and one seed, in one workspace."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.settings = RunSettings(
            name="depth-sweep",
            seed=options.seed,
            threads=options.threads,
            device=options.device,
            compile=options.compile,
        )
        text = str(options.text.resolve()) if options.text else "trivium.data.microworld:documents"
        data: dict[str, Any] = {"sources": [text], "heldout_frac": options.heldout_frac}
        if not options.text:
            data["options"] = {"num": options.documents}
        self.first = (
            StageSpec(table="data_prep", stage="data_prep", values=data),
            StageSpec(table="train_tokenizer", stage="train_tokenizer", values={"vocab_size": options.vocab_size}),
        )

    def run(self, table: str, values: dict[str, Any]) -> RunManifest:
        """Return the manifest of one pre-training run, made now or found."""
        quiet = {"log_every": 100, "save_every": 1_000_000}
        values = {"context": self.options.context, "prompts": [], **values}
        values["fit"] = quiet | values.get("fit", {})
        stage = StageSpec(table=table, stage="pretrain", values=values)
        own = self.options.jobs > 1
        return self.recipe(stage, self.options.workspace / table if own else self.options.workspace)[table]

    def recipe(self, stage: StageSpec | None, workspace: Path) -> dict[str, RunManifest]:
        """Run the stages that make the text, and then `stage`."""
        stages = self.first if stage is None else (*self.first, stage)
        recipe = Recipe(path=Path("depth_sweep"), base=ROOT, settings=self.settings, stages=stages)
        return run_recipe(recipe, workspace=workspace)

    def run_all(self, runs: dict[str, dict[str, Any]]) -> Iterator[tuple[str, RunManifest]]:
        """Yield each table with its manifest as it is finished, `--jobs` of them at a time."""
        if self.options.jobs == 1:
            yield from ((table, self.run(table, values)) for table, values in runs.items())
            return
        text = self.options.workspace / "text"
        self.recipe(None, text)
        for table in runs:
            if not (self.options.workspace / table).exists():
                shutil.copytree(text, self.options.workspace / table)
        spawn = multiprocessing.get_context("spawn")  # a process that has used a GPU must not be forked
        with ProcessPoolExecutor(self.options.jobs, mp_context=spawn) as pool:
            started = {pool.submit(_one_run, self.options, table, values): table for table, values in runs.items()}
            yield from ((started[future], future.result()) for future in as_completed(started))

    def depth(self, depth: int) -> dict[str, Any]:
        """Run one depth and return its figures."""
        options = self.options
        width = depth * options.width_per_layer
        model = model_of(shape_fields(depth, width), options.vocab_size, options.context)
        rate = options.tokens_per_parameter
        if options.budget_seconds:
            speed = tokens_per_second(
                model, options.context, budget_of(model, options.context, 2.0).batch_size, self.settings
            )
            affordable = speed * options.budget_seconds / model.num_parameters()
            rate = min(rate, float(f"{affordable:.1g}"))
        by_hand = {"hidden_size": width} if width != depth * HEAD_SIZE else {}
        budget = budget_of(model, options.context, rate)
        base = {"depth": depth, **shape_fields(depth, width), **dataclasses.asdict(budget)}
        flops = base["tokens"] * model.flops_per_token(options.context)
        names = [variant.name for variant in neighbours(depth, base, width)]
        if unknown := set(options.only) - set(names):
            raise SystemExit(f"--only {sorted(unknown)}: the neighbours of depth {depth} are {', '.join(names)}")
        runs: dict[str, dict[str, Any]] = {
            f"d{depth}-derived": {"depth": depth, "tokens_per_parameter": rate, **by_hand}
        }
        variants = {}
        for variant in neighbours(depth, base, width):
            if options.only and variant.name not in options.only:
                continue
            other = model_of(variant.shape, options.vocab_size, options.context)
            tokens = flops / other.flops_per_token(options.context)
            optim = {"lr": variant.lr, "weight_decay": base["weight_decay"]}
            steps = max(1, round(tokens / (variant.batch_size * options.context)))
            fit = {"steps": steps, "batch_size": variant.batch_size, "optim": optim}
            table = f"d{depth}-" + variant.name.replace(" ", "-")
            runs[table], variants[table] = {**variant.shape, "fit": fit}, variant
        finished: dict[str, RunManifest] = {}
        for table, manifest in self.run_all(runs):
            finished[table] = manifest
            print(f"{table}: {bits(manifest):.4f} bits per byte", flush=True)
        derived = finished.pop(next(iter(runs)))
        if derived.summary["resolved"] != base:
            raise SystemExit(f"the stage resolved {derived.summary['resolved']}, not {base}")
        figures = {
            "parameters": model.num_parameters(),
            "tokens_per_parameter": rate,
            "derived": base,
            "training_flops": derived.cost.flops,
            "seconds": derived.cost.seconds,
            "bits_per_byte": bits(derived),
        }
        rows: dict[str, Any] = {}
        for table, variant in variants.items():
            manifest = finished[table]
            rows[variant.name] = {
                "bits_per_byte": bits(manifest),
                "better_by": 1 - bits(manifest) / figures["bits_per_byte"],
                "training_flops": manifest.cost.flops,
                "seconds": manifest.cost.seconds,
                **runs[table]["fit"],
                **variant.shape,
            }
        figures["hand_set"] = rows
        figures["best_hand_set_is_better_by"] = max(row["better_by"] for row in rows.values())
        figures["holds"] = figures["best_hand_set_is_better_by"] <= BAR
        return figures


def _one_run(options: argparse.Namespace, table: str, values: dict[str, Any]) -> RunManifest:
    """Do one run in a process of its own."""
    setup(RunSettings(threads=options.threads))
    return Sweep(options).run(table, values)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw how much worse (right) or better (left of the line) each hand-set value is than the derived one."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "trivium", "font.size": 9})
    from matplotlib import pyplot

    depths = results["depths"]
    columns = min(3, len(depths))
    rows = math.ceil(len(depths) / columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.0 * rows), squeeze=False)
    axes = [axis for line in grid for axis in line]
    for spare in axes[len(depths) :]:
        spare.remove()
    for axis, (depth, row) in zip(axes, depths.items(), strict=False):
        names = list(row["hand_set"])
        worse = [-100 * row["hand_set"][name]["better_by"] for name in names]
        colours = ["#c0504d" if value < -100 * BAR else "#4f81bd" for value in worse]
        axis.barh(names, worse, color=colours)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.axvline(-100 * BAR, color="grey", linewidth=0.8, linestyle="--")
        axis.invert_yaxis()
        axis.set_xlabel("% more bits per byte than derived")
        axis.set_title(f"depth {depth}, {row['tokens_per_parameter']:g} tokens per parameter")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    # One line ends each path element: trailing blanks would be the only difference from a tidy file.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def main() -> None:
    """Run the depths asked for and write what came out after each."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--depths", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    options.add_argument("--text", type=Path, help="a file or folder that data_prep reads; default: the microworld")
    options.add_argument("--documents", type=int, default=60_000, help="of the microworld")
    options.add_argument("--heldout-frac", type=float, default=0.02)
    options.add_argument("--vocab-size", type=int, default=512)
    options.add_argument("--context", type=int, default=256)
    options.add_argument("--tokens-per-parameter", type=float, default=TOKENS_PER_PARAMETER)
    options.add_argument("--width-per-layer", type=int, default=HEAD_SIZE, help="of all derived runs; the dial's is 64")
    options.add_argument("--budget-seconds", type=float, default=0, help="for one run; 0: as long as it takes")
    options.add_argument("--threads", type=int, default=0)
    options.add_argument("--only", nargs="+", default=[], help='neighbours by name, e.g. "lr x2" "layers 4"')
    options.add_argument("--jobs", type=int, default=1, help="runs at once")
    options.add_argument("--device", default="cpu")
    options.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--workspace", type=Path, default=ROOT / "runs" / "depth-sweep")
    options.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "depth_sweep.json")
    options.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "depth_sweep.svg")
    chosen = options.parse_args()
    setup(RunSettings(threads=chosen.threads))
    sweep = Sweep(chosen)
    results: dict[str, Any] = {
        "text": chosen.text.name if chosen.text else f"microworld, {chosen.documents} documents",
        "vocab_size": chosen.vocab_size,
        "context": chosen.context,
        "width_per_layer": chosen.width_per_layer,
        "seed": chosen.seed,
        "bar": BAR,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if "cuda" in chosen.device else platform.machine(),
        "precision": precision_name(sweep.settings),
        "threads": torch.get_num_threads(),
        "depths": {},
    }
    for depth in chosen.depths:
        results["depths"][str(depth)] = figures = sweep.depth(depth)
        chosen.results.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(chosen.results, json.dumps(results, indent=1) + "\n")
        draw(results, chosen.figure)
        said = "holds" if figures["holds"] else "does NOT hold"
        print(
            f"depth {depth}: best hand-set value better by {figures['best_hand_set_is_better_by']:.2%}; the bar {said}"
        )


if __name__ == "__main__":
    main()
