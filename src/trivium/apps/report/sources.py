"""Where the figures come from: the finished runs of a workspace, each cell stamped with its file's hash."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from trivium.apps.report.cells import NOT_RECORDED, Cell, finite
from trivium.config import STAGES, UserError, is_code
from trivium.records import EvalResult, RunManifest, sha256_file
from trivium.runs.events import read_events, read_metrics
from trivium.runs.manifest import MANIFEST
from trivium.runs.registry import latest_runs, list_runs

EVENTS, SPECIMENS = "events.jsonl", "specimens.jsonl"

LABELS = {
    "data_prep": "Data preparation",
    "train_tokenizer": "Tokenizer",
    "pretrain": "Pre-training",
    "adapt": "Domain adaptation",
    "sft": "Fine-tuning (SFT)",
    "collect_comparisons": "Comparisons",
    "reward_model": "Reward model",
    "ppo": "PPO",
    "dpo": "DPO",
    "grpo": "GRPO",
    "rejection_sampling": "Rejection sampling",
    "constitutional_ai": "Constitutional AI",
    "evaluate": "Evaluation",
    "export": "Export",
}
MODELS = {
    "pretrain": "base",
    "base": "base",
    "adapt": "adapted",
    "sft": "SFT",
    "ppo": "PPO",
    "dpo": "DPO",
    "grpo": "GRPO",
    "rejection_sampling": "Rej. sampling",
}
MODELS |= {"constitutional_ai": "Const. AI"}

UNITS = {
    "accuracy": "fraction",
    "win_rate": "fraction",
    "win_rate_length_controlled": "fraction",
    "harmful_refused": "fraction",
    "harmless_refused": "fraction",
    "pass_rate": "fraction",
    "score": "fraction",
    "bits_per_byte": "bits per byte",
    "gain": "bits per byte",
    "forgetting": "bits per byte",
    "kl": "nats",
    "mean_length": "tokens",
    "length": "tokens",
    "loss": "nats",
    "nats_gain": "nats",
    "accuracy_gain": "points",
    "ece_before": "fraction",
    "ece_after": "fraction",
}
PROXY = "the reward model that PPO was trained on (proxy)"
OPEN_SCALE = ("true_taste", "proxy_reward")
"""Tasks whose score is no fraction of anything."""


def unit_of(result: EvalResult) -> str:
    """Return the unit of a measured figure by its metric's name; a score outside [0, 1] has none."""
    unit = UNITS.get(result.metric, "fraction" if result.metric.endswith(("_rate", "_frac", "accuracy")) else "")
    if result.metric == "score" and (is_rollout(result.task) or task_name(result.task) in OPEN_SCALE):
        return ""
    values = [v for v in (result.value, result.low, result.high) if v is not None]
    return "" if unit == "fraction" and any(not 0 <= v <= 1 for v in values) else unit


class Source:
    """One finished run and the files of it that a report reads."""

    def __init__(self, folder: Path, manifest: RunManifest) -> None:
        """Remember the run; files are read when first asked for."""
        self.folder = folder
        self.manifest = manifest
        self._digests: dict[str, str] = {}

    @property
    def label(self) -> str:
        """What the run is called on the page: its stage's name, or its table's where these differ."""
        manifest = self.manifest
        return LABELS.get(manifest.stage, manifest.table) if manifest.table == manifest.stage else manifest.table

    @cached_property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Every metric's (step, value) points."""
        return read_metrics(self.folder)

    def specimens(self, name: str) -> list[Any]:
        """Return the values of the specimens of one name, in the order they were kept."""
        return [e.value for e in read_events(self.folder, kind="specimen") if e.name == name]

    def samples(self, name: str) -> list[tuple[int, Any]]:
        """Return (step, value) of the samples of one name."""
        return [(e.step, e.value) for e in read_events(self.folder, kind="sample") if e.name == name]

    def digest(self, artifact: str = MANIFEST) -> str:
        """Return the SHA-256 of one of the run's files."""
        if artifact not in self._digests:
            self._digests[artifact] = sha256_file(self.folder / artifact)
        return self._digests[artifact]

    def cell(self, figure: str, value: Any = None, *, artifact: str = MANIFEST, text: str = "", **facts: Any) -> Cell:
        """Return a cell of this run: a number, or `text`; a value that is no number reads "not recorded"."""
        number = finite(value)
        return Cell(
            figure=figure,
            value=number,
            phrase=text or ("" if number is not None else NOT_RECORDED),
            run=self.manifest.run_id,
            artifact=artifact,
            sha256=self.digest(artifact),
            **facts,
        )

    def measured(self, result: EvalResult, figure: str = "") -> Cell:
        """Return the cell of one of the run's results."""
        return self.cell(
            figure,
            result.value,
            low=finite(result.low),
            high=finite(result.high),
            n=result.n or None,
            unit=unit_of(result),
        )

    def results(self, task: str, metric: str = "", checkpoint: str = "") -> list[EvalResult]:
        """Return the results of a task (any version), optionally of one metric and one checkpoint."""
        return [
            r
            for r in self.manifest.results
            if task_name(r.task) == task
            and (not metric or r.metric == metric)
            and (not checkpoint or r.checkpoint == checkpoint)
        ]

    def estimate(self, figure: str, value: Any, *, unit: str = "fraction") -> Cell:
        """Return the cell of a summary entry that is a number or `{"value", "low", "high", "n"}`."""
        if not isinstance(value, dict):
            return self.cell(figure, value, unit=unit)
        items = finite(value.get("n"))
        return self.cell(
            figure,
            value.get("value"),
            low=finite(value.get("low")),
            high=finite(value.get("high")),
            n=int(items) if items else None,
            unit=unit,
        )

    def edges(self, metric: str) -> tuple[float, float] | None:
        """Return the means of the first and of the last tenth of a metric's points; None where there are none."""
        values = [value for _, value in self.curves.get(metric, [])]
        if not values:
            return None
        tenth = max(1, len(values) // 10)
        return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth

    def origins(self) -> list[tuple[str, bool]]:
        """Return (name, is it code?) of the user's inputs, without judgements and judges: they are no data."""
        judge = self.manifest.config.get("judge")
        names = [name for name in self.manifest.inputs if name != judge and not name.startswith("judgements:")]
        return [(write_origin(name), is_code(name)) for name in names]


def write_origin(name: str) -> str:
    """Return an input's name as it is shown: the last part of a path, or of a module with its attribute."""
    if name.startswith("hf:"):
        return name
    return name.rpartition(".")[2] if is_code(name) else Path(name).name


def task_name(task: str) -> str:
    """Return a task's name without its version."""
    return task.partition("@")[0]


def is_rollout(task: str) -> bool:
    """Tell whether a figure was taken on the prompts that were trained on, so that it is not a held-out result."""
    return task.startswith("rollout_")


class Sources:
    """The newest finished run of each table of a workspace, in the order of the pipeline."""

    def __init__(self, workspace: Path) -> None:
        """Read all manifests.

        Raises UserError when there is no such workspace.
        """
        if not workspace.is_dir():
            raise UserError(
                f"no workspace at {workspace}; name one with --workspace, or make one with `trivium run RECIPE`"
            )
        self.name = workspace.resolve().name
        found = [Source(folder, manifest) for folder, manifest in latest_runs(workspace).values()]
        self.runs = sorted(found, key=lambda s: (_place(s.manifest.stage), s.manifest.table))
        self.unfinished: dict[str, RunManifest] = {}
        for _, manifest in list_runs(workspace):
            if manifest.status != "done":
                self.unfinished[manifest.stage] = manifest

    def find(self, stage: str) -> Source | None:
        """Return the run of a stage: the table of the same name if there is one, else the first."""
        runs = self.of_stage(stage)
        return next((s for s in runs if s.manifest.table == stage), runs[0] if runs else None)

    def of_stage(self, stage: str) -> list[Source]:
        """Return the runs of a stage; more than one when a recipe uses it in several tables."""
        return [s for s in self.runs if s.manifest.stage == stage]

    def by_id(self, run_id: str) -> Source | None:
        """Return the run with this id if it is among the newest."""
        return next((s for s in self.runs if s.manifest.run_id == run_id), None)

    def missing(self, stage: str, figure: str = "", *, group: str = "") -> Cell:
        """Return the cell that says why a stage has no figures."""
        manifest = self.unfinished.get(stage)
        words = {
            "running": "started, not finished",
            "stopped": "stopped, not finished",
            "failed": "failed, no figures",
            "waiting": "waiting for rankings",
        }
        text = "not run yet" if manifest is None else words.get(manifest.status, manifest.status)
        return Cell(phrase=text, figure=figure, group=group)

    def evaluations(self) -> Iterator[tuple[Source, EvalResult]]:
        """Yield every result of the evaluate runs that belongs to a named checkpoint."""
        for source in self.of_stage("evaluate"):
            for result in source.manifest.results:
                if result.checkpoint:
                    yield source, result

    def evaluated(self, checkpoint: str, task: str, figure: str, metric: str = "") -> list[Cell]:
        """Return the cell of a checkpoint's result in the evaluate runs, or nothing where it was not measured."""
        return [
            source.measured(result, figure)
            for source, result in self.evaluations()
            if result.checkpoint == checkpoint
            and task_name(result.task) == task
            and (not metric or result.metric == metric)
        ][:1]

    def contests(self, task: str) -> list[str]:
        """Return the tasks that a headline stands for: itself, or for "win_rate" the truth's, else the proxy's."""
        return [name for name in (self.contest() or self.contest("proxy_"),) if name] if task == "win_rate" else [task]

    def contest(self, prefix: str = "") -> str:
        """Return the task in which models are set against the reference (`win_rate_vs_sft`), or nothing."""
        tasks = [task_name(result.task) for _, result in self.evaluations()]
        return next((task for task in tasks if task.startswith(f"{prefix}win_rate_vs_")), "")

    def model_label(self, checkpoint: str) -> str:
        """Return what a model is called in the tables."""
        return MODELS.get(checkpoint, checkpoint)

    def judges(self) -> tuple[str, ...]:
        """Return the kinds of annotators whose rankings were used, as the newest run that names them says."""
        for stage in ("reward_model", "collect_comparisons"):
            source = self.find(stage)
            kinds = source.manifest.summary.get("kinds") if source else None
            if isinstance(kinds, dict | list) and kinds:
                return tuple(sorted(str(kind) for kind in kinds))
        return ()


def _place(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def write_kind(kind: str) -> str:
    """Return an annotator kind as it is shown everywhere: SIMULATED and AI judges can never pass for people."""
    return {"simulated": "SIMULATED", "ai": "AI", "human": "human"}.get(kind, kind)
