"""How far real annotators agree: `bootstrap.py bench agreement --data FOLDER`, a folder of JSON Lines.

Reads the three files in which several people judged the same thing, where they are there: `multi_annotator_pairs`
(pairs, three people each), `multi_annotator_kway` (three summaries ranked and rated by three people each) and
`refusal_double_annotated` (one label each from two people). Prints Markdown; intervals are bootstrapped by item (by
prompt where several items share one). `--check` compares with `krippendorff`, `scipy`, `statsmodels` and `choix`. Takes
about a minute and no network.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trivium.data.sources import load_preferences
from trivium.data.sources.load import load_rows
from trivium.preferences.agreement import Estimate, agreement, alpha_interval, concordance, kendall_w, midranks, retest
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
        yield from rows(
            [
                (
                    f"Krippendorff's alpha of the {aspect} (0 to 100), interval",
                    alpha_interval(ratings(path, aspect), "interval"),
                )
            ]
        )
    yield from each(rankings, lengths)


def ratings(path: Path, aspect: str) -> NDArray[np.float64]:
    """Return ratings of single responses, [annotators, responses], NaN for a missing one."""
    found = [row["annotations"] for row in load_rows([str(path)], base=path.parent)]
    names = sorted({one["annotator"] for item in found for one in item})
    columns = []
    for item in found:
        given = {one["annotator"]: one[aspect] for one in item}
        columns += [[given[n][i] if n in given else np.nan for n in names] for i in range(len(item[0][aspect]))]
    return np.array(columns, dtype=np.float64).T


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


def check(name: str, path: Path) -> float:
    """Return the largest difference of our measures from krippendorff, scipy, statsmodels and choix on a real file."""
    import krippendorff
    from statsmodels.stats import inter_rater

    if name == "refusal_double_annotated":
        found = [row["labels"] for row in load_rows([str(path)], base=path.parent)]
        table, names = inter_rater.aggregate_raters(np.array([list(row.values()) for row in found]))
        first, second = ([row[who] for row in found] for who in ("annotator1", "annotator2"))
        square = np.array([[sum(x == a and y == b for x, y in zip(first, second, strict=True)) for b in names]
                           for a in names])  # fmt: skip
        return max(
            off(cohen_kappa(first, second), inter_rater.cohens_kappa(square, return_results=False)),
            off(fleiss_kappa(label_counts(found)), inter_rater.fleiss_kappa(table)),
        )
    rankings, _ = judgements(path)
    worst = check_ranks(rankings)
    if name == "multi_annotator_kway":
        for aspect in ("rating", "correctness", "coverage"):
            data = ratings(path, aspect)
            expected = krippendorff.alpha(reliability_data=data, level_of_measurement="interval")
            worst = max(worst, off(alpha_interval(data, "interval"), expected))
    else:
        found = [row["labels"] for row in load_rows([str(path)], base=path.parent)]
        table, _ = inter_rater.aggregate_raters(np.array([list(row.values()) for row in found]))
        worst = max(worst, off(fleiss_kappa(label_counts(found)), inter_rater.fleiss_kappa(table)))
    return worst


def check_ranks(rankings: Sequence[Ranking]) -> float:
    """Return the largest difference of alpha, tau-b, W and Bradley and Terry's scores from the references."""
    import choix
    import krippendorff
    from scipy import stats

    last = {(r.prompt_id, tuple(sorted(midranks(r))), r.annotator): midranks(r) for r in rankings}
    items: dict[tuple[str, tuple[str, ...]], dict[str, list[float]]] = {}
    for (prompt, names, who), ranks in last.items():
        items.setdefault((prompt, names), {})[who] = [ranks[name] for name in names]
    several = {item: by for item, by in items.items() if len(by) >= 2}
    people = sorted({who for by in several.values() for who in by})
    columns = [[by[w][i] if w in by else np.nan for w in people]
               for (_, names), by in several.items() for i in range(len(names))]  # fmt: skip
    expected = krippendorff.alpha(reliability_data=np.array(columns).T, level_of_measurement="ordinal")
    found = agreement(rankings)
    worst = off(found.alpha, expected)
    taus, concordances = [], []
    for by in several.values():
        ranked = [by[who] for who in by]
        taus += [stats.kendalltau(a, b).statistic for k, a in enumerate(ranked) for b in ranked[k + 1 :]]
        m, n = len(ranked), len(ranked[0])
        if n > 2 and m > 2:
            with np.errstate(all="ignore"):
                concordances.append(abs(kendall_w(np.array(ranked)) - stats.friedmanchisquare(
                    *np.array(ranked).T).statistic / (m * (n - 1))))  # fmt: skip
    worst = max(worst, off(found.tau_b, float(np.nanmean(taus))), *concordances, 0.0)
    pairs = voted_pairs(rankings)
    things = sorted({name for _, a, b in pairs for name in (a, b)})
    place = {name: number for number, name in enumerate(things)}
    ours = crowd_bradley_terry(pairs, penalty=0.1, skilled=False).scores
    data = [(place[a], place[b]) for _, a, b in pairs]
    theirs = choix.opt_pairwise(len(things), data, alpha=0.1, method="Newton-CG", tol=1e-12)
    return max(worst, float(np.abs(np.array([ours[name] for name in things]) - theirs).max()))


def off(estimate: Estimate | None, expected: float) -> float:
    """Return how far an estimate is from what the reference says."""
    return abs(estimate.value - float(expected)) if estimate else float("inf")


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
    options.add_argument("--check", action="store_true", help="compare with the reference implementations instead")
    chosen = options.parse_args()
    for name, tell in FILES.items():
        for path in sorted(chosen.data.glob(f"{name}.jsonl*")):
            if chosen.check:
                print(f"{name}: largest difference from any reference {check(name, path):.1e}")
                continue
            print(f"\n## {name}\n\n| measure | value (95%) |\n| --- | --- |")
            for line in tell(path):
                print(line, flush=True)


if __name__ == "__main__":
    main()
