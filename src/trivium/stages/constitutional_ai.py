"""Constitutional AI: written principles take the place of people, first as critics, then as judges.

Reads   a chat model, red-team prompts, principles; a critic and a judge (the model itself, another, a server, or code)
Writes  revisions.jsonl (prompt, response, critique, revision, principle); rankings by principle into preferences.db,
        under this run's id as collection, with soft labels where a model judged; model/: tuned on the revisions
Paper   Bai et al. 2022, arXiv 2212.08073, sections 3.1 (critique, revise, fine-tune) and 4.1 (AI preferences)
Watch   the refusal test before and after, both halves: harmful requests refused, harmless look-alikes answered

A model of a few million parameters cannot criticise itself: `critic = "self"` runs, and its revisions show it. The demo
uses a scripted critic, and what that ranks is stored as `simulated`, not as `ai`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from trivium.batches import LossOutput, TokenBatch, to_device
from trivium.config import CodeRef, ConfigError, Dial, InputPath, Ref, UserError, bounds, load_attribute, one_of
from trivium.data.chat import Rendered, render
from trivium.data.collate import pad_rows
from trivium.data.loader import RowLoader
from trivium.data.sources import load_conversations
from trivium.data.tokenizer import Tokenizer
from trivium.losses.cross_entropy import head_cross_entropy
from trivium.models.hf import load_model, save_model
from trivium.models.transformer import Transformer
from trivium.preferences.store import Store
from trivium.records import AnnotatorKind, Completion, Conversation, Message, Ranking, read_jsonl, write_jsonl
from trivium.rewards.constitution import load_constitution
from trivium.rewards.endpoint import Endpoint
from trivium.rewards.review import Assistant, Comparison, Review, Reviewer, compare, ranked_by_code
from trivium.runs.answers import Answers
from trivium.runs.manifest import Run
from trivium.training.distributed import data_ranks, decide, device_of, first_alone, weight_dtype
from trivium.training.loop import FitConfig, fit
from trivium.training.parallel import whole
from trivium.training.questions import LocalModel
from trivium.training.rollout import PromptSet, SampleConfig, chunks, room_for_prompt

ANSWERS = "checkpoints/answers.jsonl"
"""Where in a run's folder answers are kept as they come."""


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
    critic_model: Dial[Ref] = ""
    """Another chat model that does what is `self`; empty: the policy."""
    critic_endpoint: Dial[str] = ""
    """A model behind OPENAI_BASE_URL that does what is `self`, by its name there; empty: the policy."""
    num_revisions: int = 1
    """Rounds of critique and revision, each by a principle of its own."""
    few_shot: Dial[int] = 0
    """Example chats of the principles' file that a model is shown first, as many as fit; 0 means none."""
    judge: CodeRef = ""
    """`module:attribute` of (prompt, texts, principle, rng) -> groups, best first; empty: no rankings by code."""
    judge_model: Dial[Ref] = ""
    """A chat model whose probabilities rank (the policy's own name for `self`); empty: none."""
    judge_endpoint: Dial[str] = ""
    """A model behind OPENAI_BASE_URL that ranks, by its name there; empty: none."""
    judge_kind: str = "simulated"
    """What the rankings of `judge` are stored as: `ai` for a model, `simulated` for a script. Other judges are `ai`."""
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
        bounds(self, num_responses=(1, 8), context=(8, None), num_revisions=(1, 16), few_shot=(0, 16))
        for names in (("critic_model", "critic_endpoint"), ("judge", "judge_model", "judge_endpoint")):
            given = [name for name in names if getattr(self, name)]
            if len(given) > 1:
                raise ConfigError(f"{' and '.join(given)} are both set; one of them does the work, so leave one")
        if (self.critic_model or self.critic_endpoint) and "self" not in (self.critic, self.reviser):
            raise ConfigError("critic and reviser are code, so the critic_model or critic_endpoint would not be asked")


def objective(model: Transformer, batch: TokenBatch) -> LossOutput:
    """Return the summed cross-entropy (nats) of the revised responses."""
    hidden = model(batch.input_ids, positions=batch.positions)
    return LossOutput(total=head_cross_entropy(hidden, model.lm_head.weight, batch.targets).sum())


def run(config: Config, run: Run) -> None:
    """Answer, criticise, revise; rank by principle; then learn the revisions."""
    tokenizer = Tokenizer.load(run.model("policy"))
    model = load_model(run.model("policy"), device=device_of(run.settings), dtype=weight_dtype(run.settings))
    kept = Answers(run.dir / ANSWERS, run)
    first_alone(lambda: write_revisions(config, run, tokenizer, model, kept))
    rows = list(read_jsonl(run.home / "revisions.jsonl"))
    judged = decide(lambda: rank_by_principle(config, run, rows, kept))
    kept.settle()
    revised = [row for row in rows if row["revision"].strip() and row["revision"] != row["responses"][0]]
    train = training_rows(config, run, tokenizer, revised)
    if not train and config.fit.steps:
        raise UserError(
            f"{run.manifest.table}: {len(revised)} of {len(rows)} responses were revised and none of them, nor any "
            f"replay, fits context = {config.context}, so there is nothing to learn; give more prompts or replay"
        )
    loader = RowLoader(max(len(train), 1), config.fit.batch_size, run.seed, lengths=[len(r.input_ids) for r in train])
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
        run.note(
            steps=config.fit.steps,
            num_parameters=model.config.num_parameters(),
            collection=run.id,
            critic=config.critic,
            num_prompts=len(rows),
            num_revised=len(revised),
            kinds=judged["kinds"],
            failed=sum(row.get("failed", 0) for row in rows),
            judged=judged["facts"],
            data={
                "name": ", ".join(config.prompts),
                "num_prompts": len(rows),
                "num_conversations": len(train),
                "tokens": sum(len(r.input_ids) for r in train),
            },
        )
        tokenizer.save(run.dir / "model")
        save_model(run.dir / "model", model, eos_token_id=tokenizer.end_id)


def write_revisions(config: Config, run: Run, tokenizer: Tokenizer, model: Transformer, kept: Answers) -> None:
    """Write each prompt with its responses and what became of the first of them; what is answered is not asked again.

    A round that fails on a text leaves it as the last one that did not. Raises UserError where nothing is answered.
    """
    path = run.dir / "revisions.jsonl"
    if path.exists():
        return
    principles, examples = load_constitution(config.principles, base=run.base)
    longest = room_for_prompt(model, config.sampling)
    prompts = PromptSet(run, tokenizer, config.prompts, config.options, longest=longest).prompts
    policy = LocalModel(run, tokenizer, model, config.sampling)
    repeated = [prompt for prompt in prompts for _ in range(config.num_responses)]
    flat = kept.complete("response", repeated, Conversation.as_dicts, partial(policy.write, purpose=0), policy.price)
    responses = [flat[i : i + config.num_responses] for i in range(0, len(flat), config.num_responses)]
    reviewer = Reviewer(
        kept=kept,
        assistant=asked_model(config, run, "critic") or policy,
        examples=examples[: config.few_shot],
        critic=None if config.critic == "self" else load_attribute(config.critic),
        reviser=None if config.reviser == "self" else load_attribute(config.reviser),
    )
    texts = [several[0] for several in responses]
    rounds: list[list[Review]] = []
    for number in range(config.num_revisions):
        chosen = np.random.default_rng([run.seed, 31, *([number] if number else [])])
        rules = [principles[i] for i in chosen.integers(len(principles), size=len(prompts))]
        rounds.append(reviewer.review(prompts, texts, rules, number))
        texts = [found.revision or text for found, text in zip(rounds[-1], texts, strict=True)]
    write_jsonl(path, map(as_row, prompts, responses, zip(*rounds, strict=True)))


def as_row(prompt: Conversation, responses: Sequence[str], rounds: Sequence[Review]) -> dict[str, Any]:
    """Return one line of revisions.jsonl: the last round that changed the text, and of several all, in `rounds`."""
    last, text = rounds[-1], responses[0]
    for found in rounds:
        if found.revision and found.revision != text:
            last, text = found, found.revision
    failed = sum(found.revision is None for found in rounds)
    shown = asdict(last) | {"critique": last.critique or "", "revision": last.revision or ""}
    more = ({"rounds": list(map(asdict, rounds))} if len(rounds) > 1 else {}) | ({"failed": failed} if failed else {})
    return {"prompt": prompt.as_dicts(), "responses": list(responses), **shown, **more}


def asked_model(config: Config, run: Run, role: str) -> Assistant | None:
    """Return the model that the Config names as "critic" or "judge", loaded, or behind its server; None for neither."""
    name = getattr(config, f"{role}_endpoint")
    if name:
        sampling = config.sampling
        return Endpoint(name, max_tokens=sampling.max_new_tokens, temperature=sampling.temperature, seed=run.seed)
    if not getattr(config, f"{role}_model"):
        return None
    folder = run.model(f"{role}_model")
    return LocalModel(run, Tokenizer.load(folder), load_model(folder, device=device_of(run.settings)), config.sampling)


def rank_by_principle(config: Config, run: Run, rows: Sequence[Mapping[str, Any]], kept: Answers) -> dict[str, Any]:
    """Store the judge's ranking of each prompt's responses and its revision, by its principle.

    Returns `kinds` (how many of which kind) and `facts` (what a model that judges was asked, and failed to answer).
    """
    assistant = asked_model(config, run, "judge")
    if not config.judge and assistant is None:
        return {"kinds": {}, "facts": {}}
    told = [(prompt_of(row), texts_of(row)) for row in rows]
    open_ = [number for number, (_, texts) in enumerate(told) if len(texts) > 1]
    facts: dict[str, int] = {}
    if assistant:
        items = [(*told[number], rows[number]["principle"]["comparison"]) for number in open_]
        placed = compare(kept, assistant, items, facts)
        facts["unjudged"] = sum(found is None for found in placed)
    else:
        draws = [np.random.default_rng([run.seed, 37, number]) for number in open_]
        asked = [(*told[n], rows[n]["principle"], draw) for n, draw in zip(open_, draws, strict=True)]
        placed = ranked_by_code(kept, load_attribute(config.judge), asked)
    who = config.judge or config.judge_endpoint or run.manifest.parents["judge_model"].rpartition("/")[2]
    kind: AnnotatorKind = "ai" if assistant or config.judge_kind == "ai" else "simulated"
    with Store(run.workspace / "preferences.db") as store:
        for number, found in zip(open_, placed, strict=True):
            if found:
                rule = rows[number]["principle"]["id"]
                submit(store, run, *told[number], found, (f"{who[: max(1, 99 - len(rule))]}:{rule}"[:100], kind))
    return {"kinds": {kind: sum(found is not None for found in placed)} if any(placed) else {}, "facts": facts}


def submit(
    store: Store, run: Run, prompt: Conversation, texts: list[str], found: Comparison, by: tuple[str, AnnotatorKind]
) -> None:
    """Store one ranking of a prompt's texts by (annotator, kind)."""
    completions = [Completion(prompt_id=prompt.id, text=text, policy=run.id) for text in texts]
    ids = [completion.id for completion in completions]
    ranking = Ranking(
        prompt_id=prompt.id,
        groups=tuple(tuple(ids[i] for i in group) for group in found.groups),
        annotator=by[0],
        kind=by[1],
        soft=tuple((ids[i], ids[j], round(chance, 6)) for i, j, chance in found.soft),
    )
    store.add_tasks(run.id, [(prompt, completions)])
    store.submit(ranking, run.id, idempotency_key=f"{run.id}/{prompt.id}")


def texts_of(row: Mapping[str, Any]) -> list[str]:
    """Return what there is to rank: the distinct responses and the revision, without empty ones."""
    return list(dict.fromkeys(text for text in [*row["responses"], row["revision"]] if text.strip()))


def prompt_of(row: Mapping[str, Any]) -> Conversation:
    """Return the prompt of a line of revisions.jsonl."""
    return Conversation(messages=tuple(Message(role=m["role"], content=m["content"]) for m in row["prompt"]))


def training_rows(config: Config, run: Run, tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]]) -> list[Rendered]:
    """Return the revised conversations and the replay as token rows; only assistant tokens are trained."""
    revised = [[*prompt_of(row).messages, Message(role="assistant", content=row["revision"])] for row in rows]
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
