"""What a checkpoint costs the training loop: seconds per save of a 13.8 M parameter model, on one thread.

The loop loses the copy (and the wait for a former save, of which there is none at one a minute). The thread's work
shares the cores with the loop's, so its processor seconds are given too. Run it on a quiet machine.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from trivium.config import RunSettings
from trivium.models.config import ModelConfig
from trivium.models.transformer import Transformer
from trivium.records import RunManifest
from trivium.runs.manifest import Run
from trivium.training.checkpoint import Checkpointer
from trivium.training.optim import OptimConfig, Optimizer

SAVES = 9
MINUTE = 60.0


def main() -> None:
    """Save a few times and print the medians."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as place:
        saver = prepared(Path(place))
        print(f"a checkpoint of {saver.num_bytes():,} bytes (weights, optimizer state)")
        rows = [save(saver, number) for number in range(1, SAVES + 1)]
    loop, loop_cpu, thread_cpu, whole = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"the loop loses   {loop:.3f} s ({loop_cpu:.3f} s of processor): {loop / MINUTE:.2%} at one a minute")
    print(f"the thread takes {whole:.3f} s ({thread_cpu:.3f} s of processor): {thread_cpu / MINUTE:.2%} of one core")


def prepared(place: Path) -> Checkpointer:
    """Return the checkpoints of a model of 6 layers and width 384 after one step."""
    manifest = RunManifest(
        run_id="bench-0", stage="pretrain", table="bench", status="running", fingerprint="f" * 20, config={}
    )
    run = Run(manifest, folder=place / "bench-0", workspace=place, settings=RunSettings(), base=place)
    config = ModelConfig(
        vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=512, qk_norm=True, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(0)
    optimizer = Optimizer(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0)
    return Checkpointer(run, modules={"model": model}, optimizers={"model": optimizer})


def save(saver: Checkpointer, number: int) -> tuple[float, float, float, float]:
    """Return the loop's seconds and processor seconds, the thread's processor seconds, and seconds to the end."""
    began, own, process = time.monotonic(), time.thread_time(), time.process_time()
    saver.save(number)
    loop, loop_cpu = time.monotonic() - began, time.thread_time() - own
    saver.wait()
    return loop, loop_cpu, time.process_time() - process - loop_cpu, time.monotonic() - began


if __name__ == "__main__":
    main()
