"""Evaluate: every stage's model on the same held-out tasks, each figure with its interval.

Reads   models, a reference among them, a reward model, test items, prompts for the win rate, held-out shards
Writes  results (accuracy, score, bits per byte, win rate, KL, length) into the manifest; generations side by side
Paper   Brown et al. 2020, arXiv 2005.14165 (few-shot); Dubois et al. 2024, arXiv 2404.04475 (length control);
        Gao et al. 2023, arXiv 2210.10760 (over-optimisation)
Watch   what a stage lost: a gain in win rate beside a fall in facts or grammar is the price of alignment

All models answer the same items, greedily; base models get plain text with a few answered examples. Only a `judge` is
the truth: without one, win rates come from the reward model and are named proxy, for the policy was trained on it.
Running it again gives the same figures; there is nothing to resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trivium.config import CodeRef, InputPath, Ref, UserError, bounds, load_attribute
from trivium.data.shards import Shards, open_shards
from trivium.data.sources import load_prompts
from trivium.evals.emergence import few_shot_gain, in_context_gain, steps_gain
from trivium.evals.generative import Answer, answer
from trivium.evals.multiple_choice import choose
from trivium.evals.overoptimization import read_points, summarise
from trivium.evals.perplexity import bits_per_byte, document_losses
from trivium.evals.players import Player, load_player, table_of
from trivium.evals.refusals import figures_of
from trivium.evals.stats import correlation_interval, mean_interval
from trivium.evals.tasks import Task, load_tasks
from trivium.evals.win_rate import Sample, grade, kl_to, length_controlled, sample_completions, win_rate
from trivium.records import Conversation
from trivium.rewards.judge import JudgeFn, as_reward
from trivium.rewards.learned import LearnedReward
from trivium.rewards.verifiable import Reward
from trivium.runs.manifest import Run
from trivium.training.distributed import device_of


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which models, which questions, and who judges."""

    models: tuple[Ref, ...] = ("pretrain@latest", "sft@latest", "ppo@latest", "dpo@latest", "grpo@latest")
    """What is examined; a pre-trained model, or one adapted from it, is a base model, others chat models."""
    reference: Ref = "sft@latest"
    """The model that win rates and KL are measured against."""
    reward_model: Ref = ""
    """Judges as the proxy; empty: no proxy."""
    tests: tuple[InputPath, ...] = ()
    """Files of test items, or code that yields them (evals/tasks.py shows an item)."""
    num_per_task: int = 100
    """Items of each task that are graded."""
    win_rate_prompts: InputPath = ""
    """A file of held-out prompts, or code that yields them; empty: no win rates."""
    win_rate_options: dict[str, str] = field(default_factory=lambda: {"split": "heldout"})
    """Passed to code in `win_rate_prompts`, beside `num`."""
    num_win_rate_prompts: int = 200
    """Prompts that both models answer."""
    judge: CodeRef = ""
    """`module:attribute` of (prompt, text) -> float, the true taste; only simulated worlds have one."""
    max_new_tokens: int = 96
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """At which the completions for the win rate are sampled; tests are always greedy."""
    heldout: Ref = "train_tokenizer@latest"
    """Whose held-out documents bits per byte are measured on; empty: not measured."""
    heldout_tokens: int = 20_000
    """At most this many tokens of them."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        bounds(self, num_per_task=(1, None), num_win_rate_prompts=(2, None), max_new_tokens=(1, None))
        bounds(self, temperature=(0, None), heldout_tokens=(1, None))


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one model showed: the grades of each task's items, and the answers that it wrote."""

    grades: Mapping[str, Sequence[float]]
    answers: Mapping[str, Sequence[Answer]]


def transform(player: Player, tasks: Sequence[Task], config: Config, judge: JudgeFn | None) -> Figures:
    """Return one model's grades on every task: choices by likelihood, answers by their check or by the judge."""
    answers = answer(player, tasks, max_new_tokens=config.max_new_tokens, judge=judge)
    grades: dict[str, Sequence[float]] = {}
    for task in tasks:
        if task.kind == "choice":
            grades[task.name] = choose(player.model, player.tokenizer, task.items)
        elif task.name in answers:
            grades[task.name] = [found.grade for found in answers[task.name]]
    return Figures(grades=grades, answers=answers)


def run(config: Config, run: Run) -> None:
    """Examine one model after the other, then set them side by side."""
    exam = Exam(config, run)
    figures: dict[str, Figures] = {}
    samples: dict[str, Sample] = {}
    for name, folder in exam.folders.items():
        with run.progress(name, exam.num_answers) as advance:
            player = load_player(folder, device_of(run.settings), advance)
            figures[name] = transform(player, exam.tasks, config, exam.judge)
            exam.report_tasks(player, figures[name])
            exam.report_text(player)
            if exam.prompts:
                samples[name] = exam.compare(player)
    exam.show(figures, samples)
    exam.report_overoptimization()
    skipped = [task.name for task in exam.tasks if not any(task.name in f.grades for f in figures.values())]
    run.note(
        models=list(exam.folders),
        reference=exam.reference.name,
        tasks={task.name: len(task.items) for task in exam.tasks},
        not_measured=exam.skipped | {name: "needs a judge" for name in skipped},
        judged_by=config.judge or ("the reward model (proxy)" if exam.proxy else "nobody"),
    )


class Exam:
    """What all models share: the questions, the judges, the reference and its completions."""

    def __init__(self, config: Config, run: Run) -> None:
        """Load everything but the models; raises UserError for a missing test, judge or reference."""
        self.config, self.run = config, run
        self.folders = name_models(run, config.models)
        self.tasks = load_tasks(config.tests, base=run.base, seed=run.seed, num_per_task=config.num_per_task)
        self.judge: JudgeFn | None = load_attribute(config.judge) if config.judge else None
        self.prompts = load_heldout_prompts(config, run)
        self.shards: Shards | None = (
            open_shards(run.parent("heldout") / "shards" / "heldout") if config.heldout else None
        )
        device = device_of(run.settings)
        self.proxy = (
            LearnedReward.from_folder(run.model("reward_model"), device=device) if config.reward_model else None
        )
        self.reference = load_player(run.parent("reference"), device)
        self.reference_sample = self.sample(self.reference, 1) if self.prompts else None
        self.skipped: dict[str, str] = {}
        self.num_answers = sum(len(t.items) for t in self.tasks if t.kind == "generate") + len(self.prompts)

    def spend(self, player: Player, num_tokens: int) -> None:
        """Add the tokens that a player read or wrote to the run's cost."""
        self.run.spend(tokens=num_tokens, flops=player.model.config.flops_per_token(128) * num_tokens)

    # -- one model

    def report_tasks(self, player: Player, figures: Figures) -> None:
        """Record a model's accuracy (or score, where a judge graded) on every task, and what worked steps gain."""
        for task in (task for task in self.tasks if task.name in figures.grades):
            for metric, figure, n in figures_of(task, figures.grades[task.name]):
                self.record(player, task.name, metric, figure, n)
        for name, gain in steps_gain(figures.grades, self.run.seed).items():
            self.record(player, "chain_of_thought@1", "accuracy_gain", gain, len(figures.grades[name]))
        self.spend(player, sum(a.num_tokens for found in figures.answers.values() for a in found))
        if player.is_base:
            self.report_few_shot(player, figures)

    def report_few_shot(self, player: Player, figures: Figures) -> None:
        """Record what answered examples in the context gain a base model, over all checkable tasks that have some."""
        tasks = [task for task in self.tasks if task.kind == "generate" and task.examples]
        without = answer(player, tasks, max_new_tokens=self.config.max_new_tokens, num_examples=0)
        shown = [grade for name in without for grade in figures.grades[name]]
        alone = [found.grade for answers in without.values() for found in answers]
        if alone:
            gain = few_shot_gain(shown, alone, self.run.seed)
            self.record(player, "few_shot@1", "accuracy_gain", gain, len(alone))

    def report_text(self, player: Player) -> None:
        """Record bits per byte and the gain from context on the held-out documents, where the tokenizer fits them."""
        if self.shards is None:
            return
        if self.shards.fingerprint != player.tokenizer.fingerprint:
            self.skipped[f"bits_per_byte of {player.name}"] = "its tokenizer is not that of the held-out documents"
            return
        context = player.model.config.max_position_embeddings
        losses = document_losses(player.model, self.shards, context=context, max_tokens=self.config.heldout_tokens)
        self.record(player, "bits_per_byte@1", "bits_per_byte", bits_per_byte(losses, self.run.seed), len(losses))
        gain, count = in_context_gain(losses)
        if count:
            self.record(player, "in_context_learning@1", "nats_gain", gain, count)
        self.spend(player, sum(len(d.nats) for d in losses))

    def record(self, player: Player, task: str, metric: str, figure: tuple[float, float, float], n: int) -> None:
        """Record a figure with its interval."""
        value, low, high = figure
        self.run.result(task, metric, value, low=low, high=high, n=n, checkpoint=player.name)

    # -- against the reference

    def sample(self, player: Player, purpose: int) -> Sample:
        """Return a player's completions of the held-out prompts; `purpose` keeps random numbers apart."""
        config = self.config
        sample = sample_completions(
            player,
            self.prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=(self.run.seed, 41, purpose),
        )
        self.spend(player, sum(sample.lengths) + sum(map(len, sample.encoded)))
        return sample

    def compare(self, player: Player) -> Sample:
        """Record a model's grades, length, KL and win rate against the reference; returns what it wrote."""
        assert self.reference_sample is not None  # compare is called only where there are prompts
        is_reference = player.name == self.reference.name
        theirs = self.reference_sample
        ours = theirs if is_reference else self.sample(player, 2)
        task = f"win_rate_vs_{self.reference.name}@1"
        seed, n = self.run.seed, len(self.prompts)
        judges: list[tuple[str, Reward, str]] = []
        if self.judge:
            judges.append(("", as_reward(self.judge), "true_taste@1"))
        if self.proxy and self.proxy.tokenizer and self.proxy.tokenizer.fingerprint == player.tokenizer.fingerprint:
            judges.append(("proxy_", self.proxy, "proxy_reward@1"))
        for prefix, judge, graded in judges:
            a, b = grade(ours, judge), grade(theirs, judge)
            self.record(player, graded, "score", mean_interval(a), n)
            self.record(player, graded, "length_correlation", correlation_interval(a, ours.lengths), n)
            if not is_reference:
                self.record(player, prefix + task, "win_rate", win_rate(a, b, seed), n)
                controlled = length_controlled(a, b, ours.lengths, theirs.lengths, seed)
                self.record(player, prefix + task, "win_rate_length_controlled", controlled, n)
        self.record(player, task, "mean_length", mean_interval([float(x) for x in ours.lengths]), n)
        same = player.tokenizer.fingerprint == self.reference.tokenizer.fingerprint
        kl = kl_to(self.reference.model, ours, self.config.temperature) if same and not is_reference else None
        if kl is not None:
            self.record(player, task, "kl", kl, n)
        return ours

    # -- side by side

    def show(self, figures: Mapping[str, Figures], samples: Mapping[str, Sample]) -> None:
        """Keep the same questions with every model's answer: two of each task, and of the win rate's prompts."""
        for task in self.tasks:
            for index in range(min(2, len(task.items)) if task.kind == "generate" else 0):
                found = {name: f.answers[task.name][index] for name, f in figures.items() if task.name in f.answers}
                outputs = {name: answer.text for name, answer in found.items()}
                judged = task.items[index].needs_judge
                passed = {} if judged else {name: answer.grade > 0 for name, answer in found.items()}
                self.keep(task.name, task.items[index].prompt, outputs, passed)
        for index in range(min(4, len(self.prompts))):
            outputs = {name: sample.completions[index].text for name, sample in samples.items()}
            self.keep("win_rate", self.prompts[index], outputs, {})

    def keep(self, task: str, prompt: Conversation, outputs: Mapping[str, str], passed: Mapping[str, bool]) -> None:
        """Keep one question with its answers as a specimen."""
        facts: dict[str, Any] = {"task": task, "prompt": prompt.messages[-1].content}
        if outputs:
            self.run.specimen("generation", facts | {"outputs": dict(outputs), "passed": dict(passed)})

    def report_overoptimization(self) -> None:
        """Note proxy and truth over KL for every model that was trained by rounds of sampling."""
        curves = {name: read_points(folder) for name, folder in self.folders.items()}
        self.run.note(overoptimization={name: summarise(points) for name, points in curves.items() if points})


def name_models(run: Run, references: Sequence[str]) -> dict[str, Path]:
    """Return the folder of each model by its table's name; raises UserError for none, or for two of one name."""
    folders: dict[str, Path] = {}
    for index, reference in enumerate(references):
        folder = run.parent(f"models.{index}")
        name = table_of(folder)
        if name in folders:
            raise UserError(f"models: {reference} is a second model named {name!r}; evaluate it in a table of its own")
        folders[name] = folder
    if not folders:
        raise UserError("models is empty; name at least one, such as 'sft@latest'")
    return folders


def load_heldout_prompts(config: Config, run: Run) -> list[Conversation]:
    """Return the first prompts for the win rate, each once; raises UserError when fewer than two are left."""
    if not config.win_rate_prompts:
        return []
    options = {"num": config.num_win_rate_prompts, **config.win_rate_options}
    loaded = load_prompts(
        [config.win_rate_prompts],
        base=run.base,
        seed=run.seed,
        options=options,
        strict=run.settings.strict,
        quarantine=run.dir / "quarantine.jsonl",
    )
    distinct = {prompt.id: prompt for prompt in loaded}
    prompts = list(distinct.values())[: config.num_win_rate_prompts]
    if len(prompts) < 2:
        raise UserError(
            f"{config.win_rate_prompts} yields {len(prompts)} different prompts; a win rate needs two or more"
        )
    return prompts
