"""What is learned in a minute: held-out nats per character after `--seconds` of training, own and the Trainer's.

    python3 bootstrap.py bench shakespeare --text tinyshakespeare.txt      # three seeds, about ten minutes

The first 90% of the text's characters are trained on, the last 10% held out and read in windows of the same context by
both. Same network, same rows a step. Own: Muon, the modern blocks, a rate that falls to nothing when the time is up.
Trainer: AdamW at its users' 1e-3 with a cosine over as many steps as a first short run says will fit; `--peer-lr` tries
another. The clock runs while a side trains: not while it loads, evaluates, or (second column) compiles.
Writes bench/results/shakespeare.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "shakespeare.json"
EVALUATE_EVERY_S = 2.0


def load(path: Path) -> tuple[Any, Any, int]:
    """Return the ids of the training and the held-out characters, int64, and how many kinds there are."""
    import torch

    text = path.read_text(encoding="utf-8")
    kinds = {character: number for number, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([kinds[character] for character in text])
    cut = int(0.9 * len(ids))
    return ids[:cut], ids[cut:], len(kinds)


def windows(ids: Any, context: int) -> tuple[Any, Any]:
    """Return every full window of `context` characters and what follows each of them, int64 [N, context] twice."""
    count = (len(ids) - 1) // context
    return ids[: count * context].view(count, context), ids[1 : count * context + 1].view(count, context)


class OwnRun:
    """Trivium's network, optimizer and step on random windows; the learning rate follows the clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Make everything, before the clock starts."""
        import torch

        from trivium.config import RunSettings
        from trivium.models.config import ModelConfig
        from trivium.models.transformer import Transformer
        from trivium.training.allocator import keep_freed_memory
        from trivium.training.compilation import compile_layers
        from trivium.training.optim import OptimConfig, Optimizer

        keep_freed_memory()
        self.options = options
        self.train, self.heldout, kinds = load(options.text)
        config = ModelConfig(
            vocab_size=kinds,
            hidden_size=options.width,
            intermediate_size=32 * math.ceil(options.width * 8 / 3 / 32),
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.heads,
            max_position_embeddings=options.context,
            tie_word_embeddings=True,
            qk_norm=True,
        )
        self.model = Transformer(config).init_weights(options.seed)
        self.settings = RunSettings(precision=options.precision, compile="on" if options.compile else "off")
        compile_layers(self.model, self.settings)
        self.optimizer = Optimizer(self.model, OptimConfig(lr=options.lr, weight_decay=options.weight_decay))
        self.generator = torch.Generator().manual_seed(options.seed)

    def step(self, done: float) -> None:
        """Take one step when the share `done` of the time is over."""
        import torch

        from trivium.batches import LossOutput, TokenBatch
        from trivium.losses.cross_entropy import cross_entropy
        from trivium.training.distributed import autocast
        from trivium.training.step import train_step

        context, rows = self.options.context, self.options.rows
        starts = torch.randint(len(self.train) - context, (rows, 1), generator=self.generator)
        index = starts + torch.arange(context)
        batch = TokenBatch(
            input_ids=self.train[index],
            targets=self.train[index + 1],
            positions=torch.arange(context).expand(rows, context),
            document_ids=None,
        )

        def objective(part: TokenBatch) -> LossOutput:
            hidden = self.model(part.input_ids, positions=part.positions)
            return LossOutput(total=cross_entropy(self.model.logits(hidden), part.targets).sum())

        self.model.train()
        scale = min(1.0, done / 0.02) * min(1.0, max(0.0, 1 - done) / 0.6)
        train_step(objective, [batch], self.optimizer, lr_scale=scale, precision=autocast(self.settings))

    def loss(self) -> float:
        """Return the mean loss of the held-out windows, nats per character."""
        import torch

        from trivium.losses.cross_entropy import cross_entropy

        self.model.eval()
        inputs, targets = windows(self.heldout, self.options.context)
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(inputs), 64):
                part = slice(start, start + 64)
                total += float(cross_entropy(self.model.logits(self.model(inputs[part])), targets[part]).sum())
        return total / targets.numel()


def own(options: argparse.Namespace) -> dict[str, Any]:
    """Train until the time is up, evaluating now and then with the clock stopped."""
    run = OwnRun(options)
    compiling = time.perf_counter()
    if options.compile:
        run.step(0.0)
    compiling = time.perf_counter() - compiling if options.compile else 0.0
    spent, steps, last = (compiling if options.count_compiling else 0.0), 0, 0.0
    curve = []
    while spent < options.seconds:
        began = time.perf_counter()
        run.step(spent / options.seconds)
        spent += time.perf_counter() - began
        steps += 1
        if spent - last >= EVALUATE_EVERY_S:
            last = spent
            curve.append((round(spent, 2), run.loss()))
    return {"loss": run.loss(), "steps": steps, "curve": curve, "compile_s": compiling}


def trainer(options: argparse.Namespace) -> dict[str, Any]:
    """Train transformers' Trainer for as long: first a few steps to learn how many fit, then all of them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    train, heldout, kinds = load(options.text)
    generator = torch.Generator().manual_seed(options.seed)
    starts = torch.randint(len(train) - options.context, (200_000,), generator=generator).tolist()

    class Rows(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return len(starts)

        def __getitem__(self, row: int) -> dict[str, Any]:
            # The Trainer shifts the labels itself: one character more than the context gives as many targets.
            ids = train[starts[row] : starts[row] + options.context + 1]
            return {"input_ids": ids, "labels": ids}

    class Deadline(TrainerCallback):
        began, steps = 0.0, 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = self.began or time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            self.steps = state.global_step
            self.elapsed = time.perf_counter() - self.began
            control.should_training_stop = self.elapsed >= options.seconds
            return control

    def fit(steps: int) -> tuple[Any, Deadline]:
        torch.manual_seed(options.seed)
        config = LlamaConfig(
            vocab_size=kinds, hidden_size=options.width, num_hidden_layers=options.layers,
            intermediate_size=32 * math.ceil(options.width * 8 / 3 / 32), num_attention_heads=options.heads,
            num_key_value_heads=options.heads, max_position_embeddings=options.context + 1, tie_word_embeddings=True,
        )  # fmt: skip
        model, deadline = LlamaForCausalLM(config), Deadline()
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=options.rows, max_steps=steps, use_cpu=True,
            bf16=options.precision == "bf16", learning_rate=options.peer_lr, lr_scheduler_type="cosine",
            warmup_steps=min(100, steps // 10), logging_strategy="no", save_strategy="no", report_to=[],
            disable_tqdm=True, seed=options.seed,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[deadline]).train()
        return model, deadline

    _, first = fit(30)
    model, deadline = fit(max(30, int(30 * options.seconds / first.elapsed)))
    inputs, targets = windows(heldout, options.context)
    total = 0.0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(inputs), 64):
            part = slice(start, start + 64)
            scores = model(input_ids=inputs[part]).logits.flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(scores, targets[part].flatten(), reduction="sum"))
    return {"loss": total / targets.numel(), "steps": deadline.steps, "seconds": deadline.elapsed}


def measure(side: str, seed: int, words: list[str]) -> dict[str, Any]:
    """Return what a fresh process measured; raises SystemExit with what it said when it fails."""
    command = [sys.executable, __file__, "--worker", side, "--seed", str(seed), *words]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}, seed {seed}, failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{side}, seed {seed}: {found['loss']:.3f} nats per character after {found['steps']:,} steps", flush=True)
    return found


def compare(options: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """Return the figures of both sides, seed by seed in turns, and how soon own had reached the peer's loss."""
    sides = {"own": [], "own, compiled": ["--compile"], "own, compiled, compiling counted": ["--compile"]}
    sides["own, compiled, compiling counted"] = ["--compile", "--count-compiling"]
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        for name, more in sides.items() if options.compiled else [("own", [])]:
            runs.setdefault(name, []).append(measure("own", seed, words + more))
        runs.setdefault("trainer", []).append(measure("trainer", seed, words))
    peer = statistics.mean(run["loss"] for run in runs["trainer"])
    reached = [next((at for at, loss in run["curve"] if loss <= peer), None) for run in runs["own"]]
    means = {name: statistics.mean(run["loss"] for run in made) for name, made in runs.items()}
    return {"mean_loss": means, "own_reached_the_peers_loss_after_s": reached, "runs": runs}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--peer-lr", type=float, default=1e-3)
    parser.add_argument(
        "--compiled", action="store_true", help="measure own compiled too, counting and not counting it"
    )
    for name in ("--compile", "--count-compiling"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=["own", "trainer"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if options.worker:
        print(json.dumps((own if options.worker == "own" else trainer)(options)))
        return
    passed_on = ("text", "seconds", "layers", "width", "heads", "context", "rows", "precision", "lr", "weight_decay")
    words = [w for key in (*passed_on, "peer_lr") for w in (f"--{key.replace('_', '-')}", str(getattr(options, key)))]
    found = compare(options, words)
    for name, loss in found["mean_loss"].items():
        print(f"{name}: {loss:.3f} nats per character, mean of {options.seeds}")
    print("own had the peer's loss after (s):", found["own_reached_the_peers_loss_after_s"])
    import transformers

    facts = {
        "settings": {key: str(getattr(options, key)) for key in (*passed_on[1:], "peer_lr")},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "peer": transformers.__version__},
        "cores": len(os.sched_getaffinity(0)),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(facts | found, indent=1) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
