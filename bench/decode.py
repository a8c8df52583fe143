"""Generation, tokens per second at batch 1, 16 and 64, beside `generate` of transformers: `bench/decode.py [OPTIONS]`.

The same weights, prompts of 32 tokens, 64 new ones each, sampled at temperature 1 from the whole distribution; bf16 are
weights in bf16 on both sides.

    python3 bootstrap.py bench decode
"""

from __future__ import annotations

from side_by_side import Bench, Clock, Shape, Task, main
from side_by_side.networks import own_network, peer_network

PROMPT, NEW = 32, 64


def prompts(shape: Shape, rows: int) -> list[list[int]]:
    """Return random prompts."""
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.integers(8, shape.vocab_size, size=(rows, min(PROMPT, shape.context // 2))).tolist()


def new_tokens(shape: Shape) -> int:
    """Return how many tokens are sampled after each prompt."""
    return min(NEW, shape.context)


def own(task: Task, clock: Clock) -> None:
    """Sample with the built-in engine."""
    import torch

    from trivium.models.generate import generate

    rows, new = int(task.case), new_tokens(task.shape)
    model = own_network(task.shape).eval().to(torch.bfloat16 if task.precision == "bf16" else torch.float32)
    for seed in range(10**9):
        made = generate(model, prompts(task.shape, rows), max_new_tokens=new, seed=seed)
        if clock.tick(sum(len(one.token_ids) for one in made)):
            return


def transformers(task: Task, clock: Clock) -> None:
    """Sample with `generate`, never ended early."""
    import torch

    rows, new = int(task.case), new_tokens(task.shape)
    model = peer_network(task.shape).eval().to(torch.bfloat16 if task.precision == "bf16" else torch.float32)
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts(task.shape, rows))
    mask, how = torch.ones_like(ids), {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    while True:
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=mask, max_new_tokens=new, **how)
        if clock.tick(rows * (made.shape[1] - ids.shape[1])):
            return


BENCH = Bench(
    name="decode",
    unit="tokens/s",
    cases=("1", "16", "64"),
    sides={"own": own, "transformers": transformers},
    packages=("torch", "transformers"),
    script=__file__,
    settings={"prompt_tokens": PROMPT, "new_tokens": NEW},
)

if __name__ == "__main__":
    main(BENCH, __doc__)
