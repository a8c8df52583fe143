"""How far real annotators agree: `bootstrap.py bench agreement --data FOLDER`, a folder of JSON Lines.

Reads the three files in which several people judged the same thing, where they are there: `multi_annotator_pairs`
(pairs, three people each), `multi_annotator_kway` (three summaries ranked and rated by three people each) and
`refusal_double_annotated` (one label each from two people). Prints Markdown; intervals are bootstrapped by item (by
prompt where several items share one). Takes about a minute and no network.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trivium.data.sources import load_preferences
from trivium.data.sources.load import load_rows
from trivium.preferences.agreement import Estimate, agreement, alpha_interval, concordance, retest
from trivium.preferences.conduct import intransitivity
from trivium.preferences.crowd import crowd_bradley_terry, voted_pairs
from trivium.preferences.kappa import cohen_kappa, fleiss_kappa, label_counts
from trivium.preferences.reliability import reliability
from trivium.preferences.screening import screen
from trivium.records import Completion, Ranking

Line = tuple[str, Estimate | None]


def shown(estimate: Estimate | None) -> str:
    """Return a figure with its interval and its number of items."""
    if estimate is None:
        return "undefined"
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f}), n = {estimate.n}"


def judgements(path: Path) -> tuple[list[Ranking], dict[str, int]]:
    """Return a file's rankings, and the lengths of the responses in characters."""
    rankings, lengths = [], {}
    for prompt, texts, groups, annotator, kind in load_preferences([str(path)], base=path.parent, strict=True):
        ids = [Completion(prompt_id=prompt.id, text=text).id for text in texts]
        lengths.update(zip(ids, map(len, texts), strict=True))
        placed = tuple(tuple(ids[i] for i in group) for group in groups)
        rankings.append(Ranking(prompt_id=prompt.id, groups=placed, annotator=annotator, kind=kind))
    return rankings, lengths


def common(rankings: Sequence[Ranking]) -> Iterator[Line]:
    """Yield the figures that any rankings by several annotators have."""
    found = agreement(rankings)
    yield "equal verdicts on pairs", found.pairwise
    yield "Krippendorff's alpha of the ranks, ordinal", found.alpha
    yield "mean Kendall's tau-b of two annotators", found.tau_b
    yield "ceiling: one foretells another's decided pairs", found.ceiling
    yield "mean Kendall's W", concordance(rankings)
    yield "agreement with oneself on repeats", retest(rankings).pairwise


def pairs(path: Path) -> Iterator[str]:
    """Yield what is to be said of pairs with a label from each of three people."""
    rankings, lengths = judgements(path)
    yield from rows(common(rankings))
    labels = [row["labels"] for row in load_rows([str(path)], base=path.parent)]
    annotators = sorted({name for item in labels for name in item})
    codes = {"A": 0.0, "tie": 1.0, "B": 2.0}
    table = np.array([[codes[item[name]] if name in item else np.nan for item in labels] for name in annotators])
    yield from rows([("Fleiss' kappa of the labels A, B, tie", fleiss_kappa(label_counts(labels)))])
    yield from rows([(f"Krippendorff's alpha of the labels, {level}", alpha_interval(table, level))
                     for level in ("nominal", "ordinal")])  # fmt: skip
    for a, first in enumerate(annotators):
        for second in annotators[a + 1 :]:
            both = [item for item in labels if first in item and second in item]
            kappa = cohen_kappa([item[first] for item in both], [item[second] for item in both])
            yield from rows([(f"Cohen's kappa, {first} and {second}", kappa)])
    yield from each(rankings, lengths)


def kway(path: Path) -> Iterator[str]:
    """Yield what is to be said of K-way rankings with ratings."""
    rankings, lengths = judgements(path)
    yield from rows(common(rankings))
    for aspect in ("rating", "correctness", "coverage"):
        yield from rows([(f"Krippendorff's alpha of the {aspect} (0 to 100), interval", rated(path, aspect))])
    yield from each(rankings, lengths)


def rated(path: Path, aspect: str) -> Estimate | None:
    """Return the alpha of ratings of single responses."""
    found = [row["annotations"] for row in load_rows([str(path)], base=path.parent)]
    names = sorted({one["annotator"] for item in found for one in item})
    columns = []
    for item in found:
        given = {one["annotator"]: one[aspect] for one in item}
        columns += [[given[n][i] if n in given else np.nan for n in names] for i in range(len(item[0][aspect]))]
    return alpha_interval(np.array(columns, dtype=np.float64).T, "interval")


def labels_of(path: Path) -> Iterator[str]:
    """Yield what is to be said of single labels from two people, in all and by where the responses come from."""
    found = list(load_rows([str(path)], base=path.parent))
    parts: dict[str, list[Any]] = {"all": found}
    for row in found:
        parts.setdefault(f"model {row['model']}", []).append(row)
        parts.setdefault("unsafe prompts" if row["prompt_is_unsafe"] else "safe prompts", []).append(row)
    for name, part in parts.items():
        first, second = ([row["labels"][who] for row in part] for who in ("annotator1", "annotator2"))
        equal = np.mean([a == b for a, b in zip(first, second, strict=True)])
        yield f"| {name}: equal labels | {equal:.3f} |"
        yield from rows([(f"{name}: Cohen's kappa", cohen_kappa(first, second))])
    coded = {label: code for code, label in enumerate(sorted({v for row in found for v in row["labels"].values()}))}
    table = np.array([[coded[row["labels"][who]] for row in found] for who in ("annotator1", "annotator2")])
    # From full compliance over partial refusal to full refusal, if that is what the labels' numbers say.
    yield f"| labels | {', '.join(coded)} |"
    yield from rows([("Krippendorff's alpha, nominal", alpha_interval(table.astype(np.float64), "nominal"))])


def each(rankings: Sequence[Ranking], lengths: dict[str, int]) -> Iterator[str]:
    """Yield each annotator's reliability by both models, their circles, and what the screening finds."""
    skills = crowd_bradley_terry(voted_pairs(rankings)).skills
    circles = intransitivity(rankings)
    for name, one in reliability(rankings).items():
        facts = f"accuracy {one.accuracy:.3f} of {one.pairs} shared pairs, weight {one.weight:.2f}, "
        facts += f"skill {skills[name]:.3f}"
        if name in circles:
            facts += f", {circles[name].circular} of {circles[name].decided} triads in a circle"
            facts += f" (coins: {circles[name].expected:.0f})"
        yield f"| annotator {name} | {facts} |"
    for finding in screen(rankings, lengths):
        who = finding.annotator or "all together"
        alarm = "**alarm**" if finding.alarm else "no alarm"
        about = (
            f"effect {finding.effect:+.3f}, p = {finding.p:.2g}, corrected {finding.p_adjusted:.2g}, n = {finding.n}"
        )
        yield f"| {finding.question}, {who} | {alarm}: {about} |"


def rows(lines: Iterator[Line] | Sequence[Line]) -> Iterator[str]:
    """Yield figures as rows of a table."""
    for name, estimate in lines:
        yield f"| {name} | {shown(estimate)} |"


FILES: dict[str, Callable[[Path], Iterator[str]]] = {
    "multi_annotator_pairs": pairs,
    "multi_annotator_kway": kway,
    "refusal_double_annotated": labels_of,
}


def main() -> None:
    """Print a table for each file that is there."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True, help="folder of the .jsonl or .jsonl.gz files")
    folder = options.parse_args().data
    for name, tell in FILES.items():
        for path in sorted(folder.glob(f"{name}.jsonl*")):
            print(f"\n## {name}\n\n| measure | value (95%) |\n| --- | --- |")
            for line in tell(path):
                print(line, flush=True)


if __name__ == "__main__":
    main()
