"""Which run came from which, and what a reader must not conclude from the figures."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from trivium.apps.report.cells import join, mapping, words, write_count
from trivium.apps.report.model_tables import NOTES, checkpoints, is_win_rate
from trivium.apps.report.sources import LABELS, Source, Sources, task_name, write_kind, write_origin
from trivium.config import STAGES


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestor:
    """One link to a parent: the Config field, what it resolved to, and whether that run is still the newest."""

    field: str
    name: str
    known: bool
    stale: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """One run with everything that it was made from."""

    run: str
    table: str
    stage: str
    label: str
    parents: tuple[Ancestor, ...]
    inputs: tuple[tuple[str, str], ...]
    seed: int
    code: str
    fingerprint: str
    sha256: str


def lineage(sources: Sources) -> list[Descent]:
    """Return every finished run with its parents, in the order of the pipeline."""
    return [_descent(sources, source) for source in sources.runs]


def _descent(sources: Sources, source: Source) -> Descent:
    manifest = source.manifest
    parents = []
    for field, name in manifest.parents.items():
        folder = os.sep in name
        known = sources.by_id(name) is not None
        shown = Path(name).name if folder else name
        parents.append(Ancestor(field=field, name=shown, known=known, stale=not known and not folder))
    code = str(manifest.code.get("version", "?"))
    if manifest.code.get("commit"):
        code += f" at {str(manifest.code['commit'])[:10]}" + (" with changes" if manifest.code.get("dirty") else "")
    inputs = [(write_origin(k), str(v)[:12]) for k, v in manifest.inputs.items()]
    return Descent(
        run=manifest.run_id,
        table=manifest.table,
        stage=manifest.stage,
        label=source.label,
        parents=tuple(parents),
        inputs=tuple(inputs),
        seed=manifest.seed,
        code=code,
        fingerprint=manifest.fingerprint,
        sha256=source.digest(),
    )


def stale(sources: Sources) -> list[str]:
    """Return a sentence for each run whose parent has been redone since: two lineages stand side by side."""
    return [
        f"{descent.run} was made from {link.name}, which is no longer the newest finished run of its table."
        for descent in lineage(sources)
        for link in descent.parents
        if link.stale
    ]


def limits(sources: Sources) -> list[str]:
    """Return what these figures do not show, in sentences; those that do not apply to this workspace are left out."""
    found = [
        _size(sources),
        _judges(sources),
        _programs(sources),
        _seeds(sources),
        _unfinished(sources),
        _unmeasured(sources),
    ]
    found += stale(sources)
    found.append(
        "Held-out tasks are short and of a few kinds. Nothing here measures real users, long conversations, "
        "other languages, "
        "safety beyond the listed refusals, or what happens outside the data's own world."
    )
    found.append(
        "Many figures stand side by side; among twenty intervals of 95%, one is expected to miss. No "
        "correction was made."
    )
    if all(source.manifest.cost.energy_joules is None for source in sources.runs):
        found.append(
            "Energy was not measured. Time and memory are those of this machine, with whatever else it was doing."
        )
    return [sentence for sentence in found if sentence]


def _size(sources: Sources) -> str:
    sizes = [
        s.manifest.summary.get("num_parameters")
        for s in sources.runs
        if s.manifest.stage in ("pretrain", "adapt", "sft")
    ]
    known = [int(n) for n in sizes if isinstance(n, int | float)]
    if not known:
        return ""
    small = max(known) < 1e9
    return f"The model has {write_count(max(known))} parameters" + (
        ". It is tiny: that a method helps or hurts here does not say that it does so at a useful size."
        if small
        else "."
    )


def _judges(sources: Sources) -> str:
    kinds = sources.judges()
    if "simulated" in kinds:
        others = [write_kind(k) for k in kinds if k != "simulated"]
        also = f" (beside {join(others)} ones)" if others else ""
        return (
            f"Rankings came from SIMULATED annotators{also}: programs with a hidden taste, noise and some bias. "
            "'True taste' is their rule. "
            "Improvement by it shows that the machinery works; it says nothing about what people would prefer."
        )
    if kinds == ("ai",):
        return "Rankings came from AI judges; their likes and errors are in every figure of the alignment stages."
    if kinds:
        return (
            "Rankings came from the annotators of this data; how far others would agree with them was not "
            "measured here."
        )
    return ""


def _programs(sources: Sources) -> str:
    names = {
        name for s in sources.runs if s.manifest.stage in ("data_prep", "sft") for name, code in s.origins() if code
    }
    return (
        f"Training text or responses were generated by a program ({join(sorted(names))}), not written by people; "
        "real text is messier and richer."
        if names
        else ""
    )


def _seeds(sources: Sources) -> str:
    seeds = sorted({s.manifest.seed for s in sources.runs})
    if not seeds:
        return ""
    which = f"one seed ({seeds[0]})" if len(seeds) == 1 else f"seeds {join(map(str, seeds))}"
    return (
        f"Every model was trained once, with {which}. The intervals cover the choice of test items, not the "
        "luck of training."
    )


def _unfinished(sources: Sources) -> str:
    optional = ("adapt", "rejection_sampling", "export")
    trained = [stage for stage in STAGES if stage not in optional and sources.find(stage) is None]
    return f"Not run, or not finished, in this workspace: {join(LABELS[s] for s in trained)}." if trained else ""


def _unmeasured(sources: Sources) -> str:
    models = checkpoints(sources)
    tasks = {task_name(r.task) for _, r in sources.evaluations()}
    gaps = [
        f"{task.replace('_', ' ')} for {join(sources.model_label(m) for m in missing)}"
        for task in sorted(tasks)
        if not (is_win_rate(task) or task in NOTES)
        and (missing := [m for m in models if not sources.evaluated(m, task, "")])
    ]
    for source in sources.of_stage("evaluate"):
        gaps += [f"{words(name)} ({why})" for name, why in mapping(source.manifest.summary.get("not_measured")).items()]
    return f"Not measured: {'; '.join(gaps)}." if gaps else ""
