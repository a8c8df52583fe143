"""Collecting comparisons: the SFT model writes K responses per prompt, and somebody ranks them.

Reads   a chat model and prompts; or rankings that people gave elsewhere (`rankings`)
Writes  tasks, completions and rankings into the workspace's preferences.db, under this run's id as collection
Paper   Ouyang et al. 2022, arXiv 2203.02155, section 3.4 (K-way ranking)
Watch   the annotators' agreement: no reward model can be expected to beat it

Who ranks is `annotators`: people on the ranking page (the run waits for them), or code. What code ranks is stored with
the kind that code declares, `ai` or `simulated`, never as `human`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from trivium.config import CodeRef, ConfigError, Dial, InputPath, Ref, UserError, Waiting, bounds, load_attribute
from trivium.data.sources import load_preferences
from trivium.data.tokenizer import Tokenizer
from trivium.evals.diversity import prompt_diversity
from trivium.evals.stats import ratio_interval
from trivium.models.hf import load_model
from trivium.preferences.agreement import agreement
from trivium.preferences.comparisons import wins_by_prompt, with_a_choice
from trivium.preferences.store import Store
from trivium.preferences.store.judgements import task_id
from trivium.records import (
    AnnotatorKind,
    Completion,
    Conversation,
    Ranking,
    atomic_write,
    from_dict,
    read_jsonl,
    to_dict,
    write_jsonl,
)
from trivium.runs.manifest import Run
from trivium.training.distributed import device_of
from trivium.training.rollout import PromptSet, SampleConfig, room_for_prompt, sample


@dataclass(frozen=True, kw_only=True)
class Config:
    """Who writes, who ranks, and how much."""

    policy: Ref = "sft@latest"
    """The chat model that writes the responses."""
    against: Dial[Ref] = ""
    """A second model that writes half of the responses, unknown to who ranks: which of the two is better?"""
    prompts: tuple[InputPath, ...] = ()
    """Files of prompts, or code that yields them."""
    options: dict[str, int] = field(default_factory=dict)
    """Passed to code in `prompts`."""
    num_responses: int = 4
    """K, responses per prompt; equal texts are shown once, so a task may hold fewer."""
    annotators: CodeRef = "people"
    """`people`, or `module:attribute` of code that returns annotators for a seed."""
    overlap: int = 1
    """How many annotators rank each prompt; above 1, agreement can be measured."""
    rankings: tuple[InputPath, ...] = ()
    """Files of rankings given elsewhere (pairs, K-way, several annotators), read in as human judgements."""
    max_rankings: int = 0
    """Read at most this many rankings from files; 0 means all."""
    instructions: Dial[InputPath] = ""
    """A text or Markdown file that people see beside each task."""
    gold: Dial[tuple[InputPath, ...]] = ()
    """Files of rankings known to be right, asked of everybody now and then: they measure the annotators."""
    qualification: Dial[tuple[InputPath, ...]] = ()
    """The same, asked of each newcomer first."""
    pass_mark: Dial[float] = 0.0
    """Share of the qualification's pairs that a newcomer must put right (a tie is half) to be asked more; 0: 0.7."""
    repeat_frac: Dial[float] = 0.0
    """Share of the tasks that come back to who ranked them, ten tasks later: is their own opinion stable?"""
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """How responses are sampled."""

    def __post_init__(self) -> None:
        """Refuse a task with nothing to compare."""
        bounds(self, num_responses=(2, 8), overlap=(1, None), max_rankings=(0, None))
        bounds(self, pass_mark=(0, 1), repeat_frac=(0, 1))
        if not self.prompts and not self.rankings:
            raise ConfigError(
                "prompts and rankings are both empty; name prompts to answer, or rankings given elsewhere"
            )


class Annotator(Protocol):
    """Anybody who ranks: a simulated annotator, an AI judge."""

    name: str
    kind: AnnotatorKind

    def rank(self, prompt: Conversation, texts: Sequence[str], rng: np.random.Generator) -> list[list[int]]:
        """Return groups of indices into `texts`, best first; a tie shares a group."""
        ...


def transform(
    annotator: Annotator, prompt: Conversation, completions: Sequence[Completion], rng: np.random.Generator
) -> Ranking:
    """Return the annotator's ranking of the completions, shown in a random order that is recorded."""
    shown = [completions[i] for i in rng.permutation(len(completions))]
    groups = annotator.rank(prompt, [c.text for c in shown], rng)
    return Ranking(
        prompt_id=prompt.id,
        groups=tuple(tuple(shown[i].id for i in group) for group in groups),
        annotator=annotator.name,
        kind=annotator.kind,
        order_shown=tuple(c.id for c in shown),
    )


def run(config: Config, run: Run) -> None:
    """Fill the queue, let it be ranked, and measure the agreement."""
    with Store(run.workspace / "preferences.db") as store:
        tasks = write_tasks(config, run) if config.prompts else []
        store.add_tasks(run.id, tasks, overlap=config.overlap)
        ask_about_annotators(config, run, store)
        if config.rankings:
            import_rankings(config, run, store)
        if config.annotators != "people":
            rank_by_code(config, run, store, tasks)
        summarise(config, run, store)


Task = tuple[Conversation, list[Completion]]


def write_tasks(config: Config, run: Run) -> list[Task]:
    """Return each prompt with its distinct sampled completions; a second call returns the same from a file.

    Raises UserError when there are no prompts.
    """
    path = run.dir / "checkpoints" / "tasks.jsonl"
    counts = path.with_name("counts.json")
    if path.exists():
        run.note(**json.loads(counts.read_text(encoding="utf-8")))
        return [
            (from_dict(Conversation, row["prompt"]), [from_dict(Completion, c) for c in row["completions"]])
            for row in read_jsonl(path)
        ]
    tokenizer = Tokenizer.load(run.model("policy"))
    model = load_model(run.model("policy"), device=device_of(run.settings))
    longest = room_for_prompt(model, config.sampling)
    prompts = PromptSet(run, tokenizer, config.prompts, config.options, longest=longest)
    stop = frozenset({tokenizer.end_id, tokenizer.eos_id})
    repeated = [prompt for prompt in prompts.prompts for _ in range(config.num_responses)]
    encoded = [ids for ids in prompts.encoded for _ in range(config.num_responses)]
    writers = [model]
    if config.against:
        writers.append(load_model(run.model("against"), device=device_of(run.settings)))
        if Tokenizer.load(run.model("against")).fingerprint != tokenizer.fingerprint:
            raise ConfigError("policy and against have different tokenizers; compare models of one family")
    size = len(writers)
    names = [run.manifest.parents[name] for name in ("policy", "against")[:size]]
    with run.progress("responses", len(encoded)) as advance:
        # A prompt's places alternate between the writers; every place draws with random numbers of its own.
        made = [
            sample(each, encoded[k::size], config.sampling, stop_ids=stop, seed=run.seed + k, on_done=advance)
            for k, each in enumerate(writers)
        ]
    generated = [(made[i % size][i // size], names[i % size]) for i in range(len(encoded))]
    num_tokens = sum(len(g.token_ids) for g, _ in generated)
    run.spend(tokens=num_tokens, flops=model.config.flops_per_token(256) * (num_tokens + sum(map(len, encoded))))
    completions = [
        Completion(
            prompt_id=prompt.id,
            text=tokenizer.decode(g.token_ids),
            token_ids=tuple(g.token_ids),
            logprobs=tuple(round(x, 6) for x in g.logprobs),
            policy=f"{policy}@final",
            finish_reason=g.finish_reason,
        )
        for prompt, (g, policy) in zip(repeated, generated, strict=True)
    ]
    tasks = with_a_choice(repeated, completions, config.num_responses)
    facts = {"prompts_too_long": prompts.too_long, "prompts_without_choice": len(prompts) - len(tasks)}
    run.note(**facts)
    atomic_write(counts, json.dumps(facts))
    write_jsonl(path, ({"prompt": to_dict(p), "completions": [to_dict(c) for c in cs]} for p, cs in tasks))
    return tasks


def ask_about_annotators(config: Config, run: Run, store: Store) -> None:
    """Store what people are told, and the questions that are about them: with known answers, and repeated."""
    told = (run.base / config.instructions).read_text(encoding="utf-8") if config.instructions else ""
    store.describe(run.id, instructions=told, pass_mark=config.pass_mark or 0.7)

    def known(specs: tuple[InputPath, ...]) -> list[tuple[Conversation, list[Completion], list[list[int]]]]:
        rows = load_preferences(specs, base=run.base, seed=run.seed, strict=True)
        return [
            (prompt, [Completion(prompt_id=prompt.id, text=text, policy="known") for text in texts], groups)
            for prompt, texts, groups, _, _ in rows
        ]

    store.add_known(run.id, known(config.gold), "gold")
    store.add_known(run.id, known(config.qualification), "qualify")
    store.add_repeats(run.id, config.repeat_frac, run.seed)


def rank_by_code(config: Config, run: Run, store: Store, tasks: Sequence[Task]) -> None:
    """Store a ranking by `overlap` of the annotators for every task; who ranks what follows from the seed."""
    annotators: list[Annotator] = list(load_attribute(config.annotators)(run.seed))
    if len(annotators) < config.overlap:
        raise UserError(f"overlap = {config.overlap}, but {config.annotators} has {len(annotators)} annotators")
    if any(annotator.kind not in ("ai", "simulated") for annotator in annotators):
        raise UserError(f"{config.annotators} is code, so the kind of its annotators must be 'ai' or 'simulated'")
    ranked = {ranking.prompt_id for ranking in store.rankings(run.id)}
    given: list[tuple[Ranking, str, str]] = []
    try:
        with run.progress("ranking", len(tasks)) as advance:
            for number, (prompt, completions) in enumerate(tasks):
                advance()
                if prompt.id in ranked:
                    continue
                rng = np.random.default_rng([run.seed, 11, number])
                chosen = [annotators[index] for index in rng.permutation(len(annotators))[: config.overlap]]
                rankings = [transform(annotator, prompt, completions, rng) for annotator in chosen]
                given += [(ranking, f"{run.id}/{prompt.id}/{ranking.annotator}", "") for ranking in rankings]
    finally:  # a judge that is paid by the question and then fails is not asked the same again
        store.submit_many(given, run.id)


def import_rankings(config: Config, run: Run, store: Store) -> None:
    """Store rankings given elsewhere, each with its annotator; human, unless the file says that it was not."""
    rows = load_preferences(
        config.rankings,
        base=run.base,
        seed=run.seed,
        options=config.options,
        strict=run.settings.strict,
        quarantine=run.dir / "quarantine-rankings.jsonl",
    )
    pending: list[tuple[Task, Ranking]] = []
    for number, (prompt, responses, groups, annotator, kind) in enumerate(rows):
        if config.max_rankings and number >= config.max_rankings:
            break
        if len(set(responses)) < len(responses):
            continue  # the same text twice cannot be compared with itself
        completions = [Completion(prompt_id=prompt.id, text=text, policy="imported") for text in responses]
        placed = tuple(tuple(completions[i].id for i in group) for group in groups)
        ranking = Ranking(prompt_id=prompt.id, groups=placed, annotator=annotator, kind=kind)
        pending.append(((prompt, completions), ranking))
    if not pending:
        raise UserError(
            f"no judgement in {', '.join(config.rankings)}; {run.dir / 'quarantine-rankings.jsonl'} says what is wrong "
            "with each record"
        )
    store.add_tasks(run.id, [task for task, _ in pending], overlap=config.overlap)
    # A prompt may come with several sets of responses, so each ranking names its task; what is said first stands.
    given: dict[tuple[str, str], tuple[Ranking, str, str]] = {}
    for (prompt, completions), ranking in pending:
        task = task_id(run.id, prompt.id, [c.id for c in completions])
        given.setdefault((task, ranking.annotator), (ranking, f"{task}/{ranking.id}", task))
    store.submit_many(given.values(), run.id)
    run.note(num_repeated=len(pending) - len(given))


def summarise(config: Config, run: Run, store: Store) -> None:
    """Write counts, agreement and specimens; raises Waiting while people still have prompts to rank."""
    rankings, open_tasks = store.rankings(run.id), store.progress(run.id).waiting
    run.note(collection=run.id)
    if config.annotators == "people" and config.prompts and open_tasks:
        raise Waiting(
            f"{run.manifest.table}: {open_tasks} prompts to rank; run "
            f"`trivium rank --workspace {run.workspace}`, then run this recipe again"
        )
    # A copy of what was known when the run ended, in the schema that everybody reads.
    store.export_jsonl(run.dir / "rankings.jsonl", run.id)
    for ranking in rankings[:20]:
        texts = [[store.completion(identity).text for identity in group] for group in ranking.groups]
        prompt = store.prompt(ranking.prompt_id).messages[-1].content
        facts = {"prompt": prompt, "groups": texts, "annotator": ranking.annotator, "kind": ranking.kind}
        run.specimen("ranking", facts)
    kinds = dict(Counter(ranking.kind for ranking in rankings))
    ids = {name for ranking in rankings for group in ranking.groups for name in group}
    if config.against:
        policies = {
            c.id: c.policy for c in store.completions(c for r in rankings for g in r.groups for c in g).values()
        }
        ours, theirs = (f"{run.manifest.parents[name]}@final" for name in ("policy", "against"))
        points, pairs = wins_by_prompt(rankings, policies, ours, theirs)
        value, low, high = ratio_interval(points, pairs, run.seed)
        run.result("win_rate_vs_against@1", "win_rate", value, low=low, high=high, n=len(points))
    prompts = {ranking.prompt_id for ranking in rankings}
    run.note(
        kinds=kinds,
        num_prompts=len(prompts),
        num_rankings=len(rankings),
        num_completions=len(ids),
        agreement={name: value for name, value in to_dict(agreement(rankings, seed=run.seed)).items() if value},
        prompt_diversity=prompt_diversity([store.prompt(p).messages[-1].content for p in sorted(prompts)]),
        data={"name": ", ".join(config.prompts + config.rankings), "num_prompts": len(prompts)},
    )
