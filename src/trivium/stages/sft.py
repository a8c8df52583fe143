"""Supervised fine-tuning: the base model learns to answer, from (instruction, ideal response) pairs.

Reads   a base model; conversations in the `messages` schema (or any that `data.sources` reads)
Writes  model/: a chat model whose generation ends at the end of its turn; with LoRA its adapters too, in adapter/
Paper   Ouyang et al. 2022, arXiv 2203.02155, section 3.5
Watch   eval/loss against train/loss: where they part, it memorises
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from trivium.batches import LossOutput, TokenBatch, to_device
from trivium.config import Dial, InputPath, Ref, UserError, bounds, one_of
from trivium.data.chat import Rendered, render, render_prompt
from trivium.data.collate import Row
from trivium.data.conversations import Deal, Side
from trivium.data.sources import load_conversations
from trivium.data.tokenizer import Tokenizer
from trivium.evals.diversity import prompt_diversity
from trivium.losses.cross_entropy import head_cross_entropy
from trivium.models.adapter_folder import save_adapted
from trivium.models.generate import generate
from trivium.models.hf import load_model
from trivium.models.lora import LoraConfig, adapt, adapter_facts, training_flops
from trivium.models.transformer import Transformer
from trivium.preferences.demonstrations import demonstrations_of, is_database
from trivium.records import Conversation
from trivium.runs.manifest import Run
from trivium.training.compilation import compile_layers
from trivium.training.distributed import autocast, data_ranks, device_of, weight_dtype
from trivium.training.embedding_noise import embedding_noise, noisy_embeddings
from trivium.training.float8 import lower_products
from trivium.training.loop import FitConfig, fit
from trivium.training.parallel import whole
from trivium.training.rollout import chunks


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model learns from which conversations."""

    init: Ref = "pretrain@latest"
    """The model to start from: a run, or a local Hugging Face folder of one of the five families."""
    data: tuple[InputPath, ...] = ()
    """Files or folders of conversations, code that yields them, or a preference database for its demonstrations."""
    options: dict[str, int] = field(default_factory=dict)
    """Passed to code in `data` (for the microworld: how many)."""
    context: int = 256
    """Longest conversation in tokens; longer ones are left out and counted, never cut through an answer."""
    heldout_frac: float = 0.05
    """Fraction of the prompts kept for the held-out loss."""
    fit: FitConfig = field(default_factory=FitConfig)
    """The training loop."""
    lora: Dial[LoraConfig] = field(default_factory=LoraConfig)
    """Low-rank adapters instead of the whole network; rank 0 means none."""
    packing: Dial[bool] = False
    """Put several conversations into one row of `context` tokens, none seeing another; `fit.batch_size` counts rows."""
    train_on: Dial[str] = ""
    """`last` trains the last answer of each conversation alone; empty, or `all`, trains every one."""
    neftune_alpha: Dial[float] = 0.0
    """Uniform noise on the embeddings while training (NEFTune), 5 to 15 in the paper; 0 means none."""

    def __post_init__(self) -> None:
        """Refuse fractions and lengths that leave nothing."""
        bounds(self, context=(8, None), heldout_frac=(0.001, 0.5), neftune_alpha=(0, 1000))
        one_of(self, train_on=("", "all", "last"))
        if self.train_on == "all":  # one spelling, so that it is one run
            object.__setattr__(self, "train_on", "")


def objective(model: Transformer, batch: TokenBatch) -> LossOutput:
    """Return the summed cross-entropy (nats) of the assistant's tokens, end of turn included, each times its weight."""
    hidden = model(batch.input_ids, positions=batch.positions, document_ids=batch.document_ids)
    losses = head_cross_entropy(hidden, model.lm_head.weight, batch.targets)
    return LossOutput(total=(losses if batch.weights is None else losses * batch.weights).sum())


def run(config: Config, run: Run) -> None:
    """Fine-tune and save the chat model."""
    tokenizer = Tokenizer.load(run.model("init"))
    train, heldout, facts = load_rows(config, run, tokenizer)
    device = device_of(run.settings)
    start = load_model(run.model("init"), device=device, dtype=weight_dtype(run.settings))
    model = adapt(start, config.lora, seed=run.seed)
    lower_products(model, run.settings)
    compile_layers(model, run.settings)
    packed, noisy = config.context if config.packing else 0, config.neftune_alpha > 0
    deal = Deal(train, config.fit.batch_size, run.seed, tokenizer.pad_id, context=packed, numbered=noisy)
    rank, size = data_ranks()

    def batches(step: int) -> Sequence[TokenBatch]:
        batch = to_device(deal.batch(step, rank, size), device)
        return list(chunks(batch, config.fit.micro_batch_size or len(batch.input_ids)))

    loss = partial(objective, model)

    def evaluate(step: int) -> dict[str, float]:
        for prompt in facts["samples"]:
            run.sample("text", {"prompt": prompt.messages[-1].content, "text": respond(model, tokenizer, prompt)}, step)
        return {"eval/loss": heldout_loss(run, model, heldout, tokenizer)}

    fit(
        run,
        model,
        partial(noisy_objective, model, config.neftune_alpha, run.seed, tokenizer.pad_id) if noisy else loss,
        batches,
        config.fit,
        evaluate=evaluate,
        flops_per_item=training_flops(model.config, config.context, config.lora),
        tokens_in=lambda parts: sum(int((part.input_ids != tokenizer.pad_id).sum()) for part in parts),
    )
    with whole(model):
        if not run.owner:
            return
        show_masks(run, tokenizer, train.rows)
        run.result("heldout@1", "loss", heldout_loss(run, model, heldout, tokenizer), n=len(heldout))
        run.note(
            steps=config.fit.steps,
            num_parameters=model.config.num_parameters(),
            data=facts["data"],
            skipped_too_long=facts["too_long"],
            skipped_untrained=facts["untrained"],
            prompt_diversity=facts["diversity"],
            epochs=config.fit.steps * config.fit.batch_size / deal.loader.num_rows,
            **deal.facts(),
            **adapter_facts(model),
        )
        tokenizer.save(run.dir / "model")
        save_adapted(run.dir, model, eos_token_id=tokenizer.end_id)


def noisy_objective(model: Transformer, alpha: float, seed: int, pad_id: int, batch: TokenBatch) -> LossOutput:
    """Return `objective` with noise on the embeddings."""
    noise = embedding_noise(batch, alpha, model.config.hidden_size, seed, pad_id)
    with noisy_embeddings(model, noise):
        return objective(model, batch)


def load_rows(config: Config, run: Run, tokenizer: Tokenizer) -> tuple[Side, Side, dict[str, Any]]:
    """Return what to train on, what is held out (split by prompt) and facts about the data.

    Raises UserError when no conversation is left on either side.
    """
    train: list[Rendered] = []
    heldout: list[Rendered] = []
    prompts: list[Conversation] = []
    too_long = untrained = 0
    for conversation in conversations_of(config, run):
        rendered = render(tokenizer, conversation, last_only=config.train_on == "last")
        if len(rendered.input_ids) > config.context + 1:
            too_long += 1
        elif any(rendered.trained):
            side = heldout if _is_heldout(conversation, config.heldout_frac) else train
            side.append(rendered)
            prompts.append(prompt_of(conversation))
        else:
            untrained += 1
    if not train or not heldout:
        raise UserError(
            f"{len(train)} conversations to train on and {len(heldout)} held out of "
            f"{', '.join(config.data) or 'no data'} ({too_long} longer than context = {config.context}); "
            "give more data, or change heldout_frac or context"
        )
    tokens = sum(len(each.input_ids) for each in train)
    data = {"name": ", ".join(config.data), "num_conversations": len(train), "tokens": tokens}
    facts = {
        "data": data,
        "too_long": too_long,
        "untrained": untrained,
        "samples": [prompt for prompt in prompts if prompt.messages][:3],
        "diversity": prompt_diversity([asked for prompt in prompts if (asked := last_question(prompt))]),
    }
    return Side.of(train), Side.of(heldout), facts


def conversations_of(config: Config, run: Run) -> Iterator[Conversation]:
    """Yield the conversations of all sources, demonstrations in a database among them."""
    for spec in config.data:
        if is_database(spec):
            yield from demonstrations_of(spec, base=run.base, workspace=run.workspace)
    yield from load_conversations(
        [spec for spec in config.data if not is_database(spec)],
        base=run.base,
        seed=run.seed,
        options=config.options,
        strict=run.settings.strict,
        quarantine=run.dir / "quarantine.jsonl",
    )


def prompt_of(conversation: Conversation) -> Conversation:
    """Return what stands before the last answer, tools included."""
    last = max(i for i, message in enumerate(conversation.messages) if message.role == "assistant")
    return dataclasses.replace(conversation, messages=conversation.messages[:last])


def last_question(prompt: Conversation) -> str:
    """Return the last thing that a user said; empty where nobody did."""
    return next((message.content for message in reversed(prompt.messages) if message.role == "user"), "")


def _is_heldout(conversation: Conversation, frac: float) -> bool:
    """Tell the side from the first user message, so that two answers to one prompt never stand on both sides."""
    first = next((m.content for m in conversation.messages if m.role == "user"), "")
    return int.from_bytes(hashlib.sha256(first.encode("utf-8", "surrogatepass")).digest()[:8], "big") < frac * 2**64


def heldout_loss(run: Run, model: Transformer, side: Side, tokenizer: Tokenizer) -> float:
    """Return the (weighted) mean cross-entropy (nats) of the assistant's tokens in the held-out rows."""
    device = next(model.parameters()).device
    loss = items = 0.0
    model.eval()
    with torch.no_grad(), autocast(run.settings):
        for start in range(0, len(side), 32):
            chosen = range(start, min(start + 32, len(side)))
            batch = to_device(side.batch(chosen, tokenizer.pad_id), device)
            loss += float(objective(model, batch).total)
            items += float(batch.num_items)
    return loss / max(items, 1)


def respond(model: Transformer, tokenizer: Tokenizer, prompt: Conversation) -> str:
    """Return the greedy response to a prompt."""
    ids = render_prompt(tokenizer, prompt)
    stop = frozenset({tokenizer.end_id, tokenizer.eos_id})
    return tokenizer.decode(generate(model, [ids], max_new_tokens=80, temperature=0.0, stop_ids=stop)[0].token_ids)


def show_masks(run: Run, tokenizer: Tokenizer, rows: Sequence[Row]) -> None:
    """Keep some conversations token by token with what is trained, for the walkthrough."""
    for ids, trained in rows[:20]:
        tokens = [tokenizer.decode([token], skip_special=False) for token in ids]
        run.specimen("masked_conversation", {"tokens": tokens, "trained": list(trained)})
