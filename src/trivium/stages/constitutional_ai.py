"""Constitutional AI: written principles take the place of people, first as critics, then as judges.

Reads   a chat model, red-team prompts, principles; a critic (the model itself, or code)
Writes  revisions.jsonl (prompt, response, critique, revision, principle); rankings by principle into preferences.db,
        under this run's id as collection; model/: the chat model tuned on the revisions
Paper   Bai et al. 2022, arXiv 2212.08073, sections 3.1 (critique, revise, fine-tune) and 4.1 (AI preferences)
Watch   the refusal test before and after, both halves: harmful requests refused, harmless look-alikes answered

A model of a few million parameters cannot criticise itself: `critic = "self"` runs, and its revisions show it. The demo
uses a scripted critic, and what that ranks is stored as `simulated`, not as `ai`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from trivium.batches import LossOutput, TokenBatch, to_device
from trivium.config import CodeRef, InputPath, Ref, UserError, bounds, load_attribute, one_of
from trivium.data.chat import Rendered, render, render_prompt
from trivium.data.collate import pad_rows
from trivium.data.loader import RowLoader
from trivium.data.sources import load_conversations
from trivium.data.tokenizer import Tokenizer
from trivium.losses.cross_entropy import head_cross_entropy
from trivium.models.hf import load_model, save_model
from trivium.models.transformer import Transformer
from trivium.preferences.store import Store
from trivium.records import (
    AnnotatorKind,
    Completion,
    Conversation,
    Message,
    Ranking,
    atomic_write,
    read_jsonl,
    write_jsonl,
)
from trivium.rewards.constitution import Principle, critique_prompt, load_principles, revision_prompt
from trivium.runs.manifest import Run
from trivium.training.distributed import data_ranks, decide, device_of, first_alone, weight_dtype
from trivium.training.loop import FitConfig, fit
from trivium.training.parallel import whole
from trivium.training.rollout import PromptSet, SampleConfig, chunks, room_for_prompt, sample


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which principles, who applies them, and how long the model learns from the revisions."""

    policy: Ref = "sft@latest"
    """The chat model that answers, and that is tuned on what its answers became."""
    prompts: tuple[InputPath, ...] = ()
    """Files of red-team prompts, or code that yields them."""
    options: dict[str, int] = field(default_factory=dict)
    """Passed to code in `prompts`."""
    principles: InputPath = ""
    """A JSON file of principles, or code that returns them."""
    critic: CodeRef = "self"
    """`self`, or `module:attribute` of (prompt, response, principle) -> critique."""
    reviser: CodeRef = "self"
    """`self`, or `module:attribute` of (prompt, response, critique) -> revision."""
    judge: CodeRef = ""
    """`module:attribute` of (prompt, texts, principle, rng) -> groups, best first; empty: no rankings."""
    judge_kind: str = "simulated"
    """What the judge's rankings are stored as: `ai` for a model, `simulated` for a script."""
    num_responses: int = 3
    """Responses per prompt that the judge ranks; the first is the one revised."""
    replay: tuple[InputPath, ...] = ()
    """Conversations of the SFT mixed in, so that nothing else is forgotten."""
    replay_options: dict[str, int] = field(default_factory=dict)
    """Passed to code in `replay`."""
    context: int = 256
    """Longest conversation in tokens; longer ones are left out."""
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """How responses (and, with `self`, critiques and revisions) are sampled."""
    fit: FitConfig = field(default_factory=FitConfig)
    """The training loop on revisions and replay."""

    def __post_init__(self) -> None:
        """Refuse a kind that would pass a script off as a person."""
        one_of(self, judge_kind=("ai", "simulated"))
        bounds(self, num_responses=(1, 8), context=(8, None))


def objective(model: Transformer, batch: TokenBatch) -> LossOutput:
    """Return the summed cross-entropy (nats) of the revised responses."""
    hidden = model(batch.input_ids, positions=batch.positions)
    return LossOutput(total=head_cross_entropy(hidden, model.lm_head.weight, batch.targets).sum())


def run(config: Config, run: Run) -> None:
    """Answer, criticise, revise; rank by principle; then learn the revisions."""
    folder = run.model("policy")
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, device=device_of(run.settings), dtype=weight_dtype(run.settings))
    first_alone(lambda: write_revisions(config, run, tokenizer, model))
    rows = list(read_jsonl(run.home / "revisions.jsonl"))
    num_ranked = decide(lambda: rank_by_principle(config, run, rows))
    revised = [row for row in rows if row["revision"].strip() and row["revision"] != row["responses"][0]]
    train = training_rows(config, run, tokenizer, revised)
    if not train:
        raise UserError(
            f"{run.manifest.table}: {len(revised)} of {len(rows)} responses were revised and none of them, nor any "
            f"replay, fits context = {config.context}, so there is nothing to learn; give more prompts or replay"
        )
    loader = RowLoader(len(train), config.fit.batch_size, run.seed, lengths=[len(r.input_ids) for r in train])
    device = device_of(run.settings)
    rank, size = data_ranks()

    def batches(step: int) -> Sequence[TokenBatch]:
        picked = [train[row] for row in loader.rows(step, rank, size)]
        batch = to_device(pad_rows([(r.input_ids, r.trained) for r in picked], tokenizer.pad_id), device)
        return list(chunks(batch, config.fit.micro_batch_size or len(picked)))

    fit(
        run,
        model,
        partial(objective, model),
        batches,
        config.fit,
        flops_per_item=3 * model.config.flops_per_token(config.context),
        tokens_in=lambda parts: sum(int((part.input_ids != tokenizer.pad_id).sum()) for part in parts),
    )
    with whole(model):
        if not run.owner:
            return
        # Specimens come last: the loop has cut the logs back to where its checkpoint was.
        for row in rows[:20]:
            facts = {"prompt": row["prompt"][-1]["content"], "response": row["responses"][0]}
            run.specimen("revision", facts | {"critique": row["critique"], "revision": row["revision"]})
        tokens = sum(len(r.input_ids) for r in train)
        run.note(
            steps=config.fit.steps,
            num_parameters=model.config.num_parameters(),
            collection=run.id,
            critic=config.critic,
            num_prompts=len(rows),
            num_revised=len(revised),
            kinds={config.judge_kind: num_ranked} if num_ranked else {},
            data={
                "name": ", ".join(config.prompts),
                "num_prompts": len(rows),
                "num_conversations": len(train),
                "tokens": tokens,
            },
        )
        tokenizer.save(run.dir / "model")
        save_model(run.dir / "model", model, eos_token_id=tokenizer.end_id)


def write_revisions(config: Config, run: Run, tokenizer: Tokenizer, model: Transformer) -> list[dict[str, Any]]:
    """Return prompt, responses, principle, critique and revision of every prompt; a resumed run reads its file."""
    path, spent = run.dir / "revisions.jsonl", run.dir / "spent.json"
    if path.exists():
        if not run.cost().tokens:  # killed after the answers and before the first checkpoint, which would know
            run.spend(**json.loads(spent.read_text(encoding="utf-8")))
        return list(read_jsonl(path))
    principles = load_principles(config.principles, base=run.base)
    longest = room_for_prompt(model, config.sampling)
    prompts = PromptSet(run, tokenizer, config.prompts, config.options, longest=longest).prompts
    write = Writer(run, tokenizer, model, config.sampling)
    repeated = [prompt for prompt in prompts for _ in range(config.num_responses)]
    flat = write(repeated, 0)
    responses = [flat[i : i + config.num_responses] for i in range(0, len(flat), config.num_responses)]
    chosen = np.random.default_rng([run.seed, 31]).integers(len(principles), size=len(prompts))
    rules = [principles[i] for i in chosen]
    first = [texts[0] for texts in responses]
    if config.critic == "self":
        asked = [critique_prompt(p, r, rule) for p, r, rule in zip(prompts, first, rules, strict=True)]
        critiques = write(asked, 1)
    else:
        critic = load_attribute(config.critic)
        critiques = [critic(p, r, _plain(rule)) for p, r, rule in zip(prompts, first, rules, strict=True)]
    if config.reviser == "self":
        parts = zip(prompts, first, critiques, rules, strict=True)
        revisions = write([revision_prompt(p, r, c, rule) for p, r, c, rule in parts], 2)
    else:
        reviser = load_attribute(config.reviser)
        revisions = [reviser(p, r, c) for p, r, c in zip(prompts, first, critiques, strict=True)]
    rows = [
        {"prompt": p.as_dicts(), "responses": t, "principle": _plain(rule), "critique": c, "revision": v}
        for p, t, rule, c, v in zip(prompts, responses, rules, critiques, revisions, strict=True)
    ]
    cost = run.cost()
    atomic_write(spent, json.dumps({"tokens": cost.tokens, "flops": cost.flops}))
    write_jsonl(path, rows)
    return rows


class Writer:
    """Samples one text for each conversation from the policy."""

    def __init__(self, run: Run, tokenizer: Tokenizer, model: Transformer, sampling: SampleConfig) -> None:
        """Remember with what to write."""
        self.run, self.tokenizer, self.model, self.sampling = run, tokenizer, model, sampling

    def __call__(self, conversations: Sequence[Conversation], purpose: int) -> list[str]:
        """Return one sampled response to each conversation; `purpose` keeps the random numbers of the steps apart."""
        encoded = [render_prompt(self.tokenizer, conversation) for conversation in conversations]
        stop = frozenset({self.tokenizer.end_id, self.tokenizer.eos_id})
        seed = self.run.seed * 101 + purpose
        with self.run.progress(("responses", "critiques", "revisions")[purpose], len(encoded)) as advance:
            generated = sample(self.model, encoded, self.sampling, stop_ids=stop, seed=seed, on_done=advance)
        tokens = sum(len(ids) + len(g.token_ids) for ids, g in zip(encoded, generated, strict=True))
        self.run.spend(tokens=tokens, flops=self.model.config.flops_per_token(128) * tokens)
        return [self.tokenizer.decode(g.token_ids) for g in generated]


def _plain(principle: Principle) -> dict[str, str]:
    fields = ("id", "critic", "revision", "comparison")
    return {name: getattr(principle, name) for name in fields}


def rank_by_principle(config: Config, run: Run, rows: Sequence[Mapping[str, Any]]) -> int:
    """Store the judge's ranking of each prompt's responses and its revision, by its principle; return how many."""
    if not config.judge:
        return 0
    num_ranked = 0
    judge = load_attribute(config.judge)
    kind: AnnotatorKind = "ai" if config.judge_kind == "ai" else "simulated"
    with Store(run.workspace / "preferences.db") as store, run.progress("ranking", len(rows)) as advance:
        for number, row in enumerate(rows):
            advance()
            prompt = _prompt(row)
            texts = list(dict.fromkeys(t for t in [*row["responses"], row["revision"]] if t.strip()))
            if len(texts) < 2:
                continue
            completions = [Completion(prompt_id=prompt.id, text=text, policy=run.id) for text in texts]
            groups = judge(prompt, texts, row["principle"], np.random.default_rng([run.seed, 37, number]))
            placed = tuple(tuple(completions[i].id for i in group) for group in groups)
            name = f"{config.judge}:{row['principle']['id']}"
            ranking = Ranking(prompt_id=prompt.id, groups=placed, annotator=name, kind=kind)
            store.add_tasks(run.id, [(prompt, completions)])
            store.submit(ranking, run.id, idempotency_key=f"{run.id}/{prompt.id}")
            num_ranked += 1
    return num_ranked


def _prompt(row: Mapping[str, Any]) -> Conversation:
    return Conversation(messages=tuple(Message(role=m["role"], content=m["content"]) for m in row["prompt"]))


def training_rows(config: Config, run: Run, tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]]) -> list[Rendered]:
    """Return the revised conversations and the replay as token rows; only assistant tokens are trained."""
    revised = [[*_prompt(row).messages, Message(role="assistant", content=row["revision"])] for row in rows]
    replay = load_conversations(
        config.replay,
        base=run.base,
        seed=run.seed,
        options=config.replay_options,
        strict=run.settings.strict,
        quarantine=run.dir / "quarantine-replay.jsonl",
    )
    rendered = [render(tokenizer, messages) for messages in [*revised, *(list(c.messages) for c in replay)]]
    return [row for row in rendered if any(row.trained) and len(row.input_ids) <= config.context + 1]
