"""Who judged: people, an AI or SIMULATED annotators, named the same way in every place."""

from __future__ import annotations

from typing import Any

from trivium.apps.report.cells import Cell, join, mapping, write_count
from trivium.apps.report.sources import Sources, write_kind, write_origin


def who(sources: Sources) -> str:
    """Return whose judgements the rankings are: `SIMULATED annotators`, say."""
    kinds = sources.judges()
    return (
        f"{join(write_kind(kind) for kind in kinds)} annotators"
        if kinds
        else "annotators of a kind that is not recorded"
    )


def taste_of(sources: Sources) -> str:
    """Return what the evaluation's `true taste` is: for the microworld, the SIMULATED annotators' hidden rule."""
    judges = [s.manifest.config.get("judge") for s in (sources.find("evaluate"), sources.find("ppo")) if s]
    judge = str(next((name for name in judges if name), ""))
    if judge:
        return "the SIMULATED annotators' hidden taste" if "microworld" in judge else write_origin(judge)
    return "true taste (SIMULATED)" if "simulated" in sources.judges() else "the evaluation's judge"


def rankings_by(sources: Sources) -> list[Cell]:
    """Return one cell for each kind of annotator with the number of rankings, or why there is none."""
    source = sources.find("collect_comparisons")
    if source is None:
        return [sources.missing("collect_comparisons", figure="rankings")]
    kinds = mapping(source.manifest.summary.get("kinds"))
    if not kinds:
        return [source.cell("rankings", text="Rankings; who gave them is not recorded.", label="")]
    return [
        source.cell(f"by {write_kind(kind)}", num, unit="rankings", text=_rankings(kind, num), label="")
        for kind, num in sorted(kinds.items())
    ]


def _rankings(kind: str, num: Any) -> str:
    return f"{write_count(float(num))} rankings by {write_kind(kind)} annotators"
