"""Supervised fine-tuning: the base model learns to answer, from (instruction, ideal response) pairs.

Reads   a base model; conversations in the `messages` schema (or any that `data.sources` reads)
Writes  model/: a chat model whose generation ends at the end of its turn; with LoRA its adapters too, in adapter/
Paper   Ouyang et al. 2022, arXiv 2203.02155, section 3.5
Watch   eval/loss against train/loss: where they part, it memorises
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from trivium.batches import LossOutput, TokenBatch, to_device
from trivium.config import Dial, InputPath, Ref, UserError, bounds
from trivium.data.chat import render, render_prompt
from trivium.data.collate import pad_rows
from trivium.data.loader import RowLoader
from trivium.data.sources import load_conversations
from trivium.data.tokenizer import Tokenizer
from trivium.evals.diversity import prompt_diversity
from trivium.losses.cross_entropy import head_cross_entropy
from trivium.models.adapter_folder import save_adapted
from trivium.models.generate import generate
from trivium.models.hf import load_model
from trivium.models.lora import LoraConfig, adapt, adapter_facts, training_flops
from trivium.models.transformer import Transformer
from trivium.records import Conversation
from trivium.runs.manifest import Run
from trivium.training.compilation import compile_layers
from trivium.training.distributed import autocast, data_ranks, device_of, weight_dtype
from trivium.training.loop import FitConfig, fit
from trivium.training.parallel import whole
from trivium.training.rollout import chunks


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model learns from which conversations."""

    init: Ref = "pretrain@latest"
    """The model to start from: a run, or a local Hugging Face folder of one of the five families."""
    data: tuple[InputPath, ...] = ()
    """Files or folders of conversations, or code that yields them."""
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

    def __post_init__(self) -> None:
        """Refuse fractions and lengths that leave nothing."""
        bounds(self, context=(8, None), heldout_frac=(0.001, 0.5))


def objective(model: Transformer, batch: TokenBatch) -> LossOutput:
    """Return the summed cross-entropy (nats) of the assistant's tokens, end of turn included."""
    hidden = model(batch.input_ids, positions=batch.positions, document_ids=batch.document_ids)
    return LossOutput(total=head_cross_entropy(hidden, model.lm_head.weight, batch.targets).sum())


def run(config: Config, run: Run) -> None:
    """Fine-tune and save the chat model."""
    tokenizer = Tokenizer.load(run.model("init"))
    train, heldout, facts = load_rows(config, run, tokenizer)
    device = device_of(run.settings)
    start = load_model(run.model("init"), device=device, dtype=weight_dtype(run.settings))
    model = adapt(start, config.lora, seed=run.seed)
    compile_layers(model, run.settings)
    loader = RowLoader(len(train), config.fit.batch_size, run.seed, lengths=[len(ids) for ids, _ in train])
    rank, size = data_ranks()

    def batches(step: int) -> Sequence[TokenBatch]:
        rows = loader.rows(step, rank, size)
        batch = to_device(pad_rows([train[row] for row in rows], tokenizer.pad_id), device)
        return list(chunks(batch, config.fit.micro_batch_size or len(rows)))

    def evaluate(step: int) -> dict[str, float]:
        for prompt in facts["samples"]:
            run.sample("text", {"prompt": prompt.messages[-1].content, "text": respond(model, tokenizer, prompt)}, step)
        return {"eval/loss": heldout_loss(run, model, heldout, tokenizer)}

    fit(
        run,
        model,
        partial(objective, model),
        batches,
        config.fit,
        evaluate=evaluate,
        flops_per_item=training_flops(model.config, config.context, config.lora),
        tokens_in=lambda parts: sum(int((part.input_ids != tokenizer.pad_id).sum()) for part in parts),
    )
    with whole(model):
        if not run.owner:
            return
        show_masks(run, tokenizer, train)
        run.result("heldout@1", "loss", heldout_loss(run, model, heldout, tokenizer), n=len(heldout))
        run.note(
            steps=config.fit.steps,
            num_parameters=model.config.num_parameters(),
            data=facts["data"],
            skipped_too_long=facts["too_long"],
            skipped_untrained=facts["untrained"],
            prompt_diversity=facts["diversity"],
            epochs=config.fit.steps * config.fit.batch_size / len(train),
            **adapter_facts(model),
        )
        tokenizer.save(run.dir / "model")
        save_adapted(run.dir, model, eos_token_id=tokenizer.end_id)


Row = tuple[list[int], list[bool]]


def load_rows(config: Config, run: Run, tokenizer: Tokenizer) -> tuple[list[Row], list[Row], dict[str, Any]]:
    """Return training rows, held-out rows (split by prompt) and facts about the data.

    Raises UserError when no conversation is left on either side.
    """
    train: list[Row] = []
    heldout: list[Row] = []
    prompts: list[Conversation] = []
    too_long = untrained = 0
    conversations = load_conversations(
        config.data,
        base=run.base,
        seed=run.seed,
        options=config.options,
        strict=run.settings.strict,
        quarantine=run.dir / "quarantine.jsonl",
    )
    for conversation in conversations:
        rendered = render(tokenizer, conversation.messages)
        if len(rendered.input_ids) > config.context + 1:
            too_long += 1
        elif any(rendered.trained):
            side = heldout if _is_heldout(conversation, config.heldout_frac) else train
            side.append((rendered.input_ids, rendered.trained))
            prompts.append(Conversation(messages=conversation.messages[:-1]))
        else:
            untrained += 1
    if not train or not heldout:
        raise UserError(
            f"{len(train)} conversations to train on and {len(heldout)} held out of "
            f"{', '.join(config.data) or 'no data'} ({too_long} longer than context = {config.context}); "
            "give more data, or change heldout_frac or context"
        )
    tokens = sum(len(ids) for ids, _ in train)
    data = {"name": ", ".join(config.data), "num_conversations": len(train), "tokens": tokens}
    facts = {
        "data": data,
        "too_long": too_long,
        "untrained": untrained,
        "samples": prompts[:3],
        "diversity": prompt_diversity([p.messages[-1].content for p in prompts if p.messages]),
    }
    return train, heldout, facts


def _is_heldout(conversation: Conversation, frac: float) -> bool:
    """Tell the side from the first user message, so that two answers to one prompt never stand on both sides."""
    first = next((m.content for m in conversation.messages if m.role == "user"), "")
    return int.from_bytes(hashlib.sha256(first.encode("utf-8", "surrogatepass")).digest()[:8], "big") < frac * 2**64


def heldout_loss(run: Run, model: Transformer, rows: Sequence[Row], tokenizer: Tokenizer) -> float:
    """Return the mean cross-entropy (nats) of the assistant's tokens in the held-out rows."""
    device = next(model.parameters()).device
    loss = items = 0.0
    model.eval()
    with torch.no_grad(), autocast(run.settings):
        for start in range(0, len(rows), 32):
            batch = to_device(pad_rows(rows[start : start + 32], tokenizer.pad_id), device)
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
