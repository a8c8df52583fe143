"""The figures, drawn as inline SVG whose bytes depend on the runs alone and whose colours follow the page's theme."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trivium.apps.report.cells import Cell, write_number
from trivium.apps.report.judges import taste_of, who
from trivium.apps.report.model_tables import wins_table
from trivium.apps.report.sources import EVENTS, LABELS, PROXY, Source, Sources

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--soft)",
    "#030303": "var(--line)",
    "#040404": "var(--one)",
    "#050505": "var(--two)",
    "#060606": "var(--paper)",
}
"""Placeholders that matplotlib draws with, and the page's colours that take their place."""
INK, SOFT, LINE, ONE, TWO, PAPER = COLOURS

CURVES: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "pretrain": ((("train/loss", "training"), ("eval/loss", "held out")), "nats per token"),
    "sft": ((("train/loss", "training"), ("eval/loss", "held out")), "nats per response token"),
    "reward_model": ((("train/accuracy", "training"), ("eval/accuracy", "held out")), "of pairs ordered right"),
    "ppo": ((("rollout/score", "learned reward"),), "reward"),
    "dpo": ((("train/loss", "training"),), "nats per pair"),
    "grpo": ((("rollout/reward", "checked reward"),), "reward"),
    "rejection_sampling": ((("rollout/score", "all answers"), ("rollout/picked_score", "picked ones")), "reward"),
    "constitutional_ai": ((("train/loss", "training"),), "nats per token"),
}
MAX_POINTS = 240
"""Longer curves are averaged down to this many points, so that a page stays small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A figure: `svg` is empty where there is nothing to draw, and `caption` then says why."""

    key: str
    title: str
    caption: str
    alt: str = ""
    svg: str = ""
    cells: tuple[Cell, ...] = ()


def training_charts(sources: Sources) -> list[Chart]:
    """Return the training curves, one small figure for each stage that trains."""
    charts = []
    for stage, (metrics, unit) in CURVES.items():
        source = sources.find(stage)
        curves = [(label, source.curves[name]) for name, label in metrics if source and source.curves.get(name)]
        if source and curves:
            charts.append(_training_chart(source, stage, curves, metrics, unit))
        elif source or stage != "rejection_sampling":  # no part of the demo
            why = "no curve recorded" if source else sources.missing(stage).main
            charts.append(Chart(key=f"curve-{stage}", title=LABELS[stage], caption=why))
    return charts


Curve = list[tuple[int, float]]


def _training_chart(
    source: Source, stage: str, curves: Sequence[tuple[str, Curve]], metrics: Sequence[tuple[str, str]], unit: str
) -> Chart:
    cells = []
    said = []
    for name, label in metrics:
        edges = source.edges(name)
        if edges is None:
            continue
        single = len(source.curves[name]) == 1
        for when, value in zip(("first tenth", "last tenth"), edges, strict=True):
            cells.append(_chart_cell(source, f"curve-{stage}", f"{label}, {when}", value))
        kind = "fraction" if name.endswith("accuracy") else ""
        start, end = (write_number(v, kind) for v in edges)
        said.append(f"{label} {end}" if single else f"{label} from {start} to {end}")
    steps = max(curve[-1][0] for _, curve in curves)
    caption = (
        f"{'; '.join(said)} {'' if unit == 'reward' else unit}".rstrip()
        + f", over {steps:,} steps (means of the first and the last tenth)."
    )
    if stage in ("pretrain", "sft") and len(curves) > 1:
        caption += " Where the held-out curve leaves the training curve upwards, the model memorises."
    if stage == "ppo":
        caption += " A rising curve alone proves nothing: see the taste beside it, above."
    caption = caption[0].upper() + caption[1:]
    svg = ""
    if can_draw():
        figure, (axes,) = _figure(1, height=2.2)
        for (label, curve), colour in zip(curves, (ONE, TWO), strict=False):
            thin = _thin(curve)
            axes.plot(
                [x for x, _ in thin],
                [y for _, y in thin],
                color=colour,
                lw=1.4,
                label=label,
                marker="o" if len(thin) < 3 else "",
                ms=3,
            )
        _finish(axes, xlabel="step", ylabel=unit, legend=len(curves) > 1)
        svg = _svg(figure, f"curve-{stage}")
    alt = f"Line chart of {LABELS[stage]} by step. {caption}"
    return Chart(key=f"curve-{stage}", title=LABELS[stage], caption=caption, alt=alt, svg=svg, cells=tuple(cells))


def drift_chart(sources: Sources) -> Chart:
    """Return the learned reward and the true taste over KL: where they part, the reward is being gamed."""
    key, title = "drift", "Reward against taste, over KL"
    source = sources.find("ppo")
    if source is None:
        return Chart(key=key, title=title, caption=f"PPO: {sources.missing('ppo').main}.")
    taste = "true taste (SIMULATED)" if "SIMULATED" in taste_of(sources) else "the judge's taste"
    kl = dict(source.curves.get("rollout/kl", []))
    panels = [
        (label, [(kl[step], value) for step, value in source.curves.get(metric, []) if step in kl])
        for metric, label in (("rollout/score", "learned reward (proxy)"), ("rollout/true_taste", taste))
    ]
    panels = [(label, points) for label, points in panels if points]
    if not panels:
        return Chart(key=key, title=title, caption="PPO ran, but recorded no reward beside KL.")
    cells = []
    said = []
    for metric, label in (("rollout/score", "the learned reward"), ("rollout/true_taste", taste)):
        edges = source.edges(metric)
        if edges:
            cells += [
                _chart_cell(source, key, f"{label}, {w} tenth", v)
                for w, v in zip(("first", "last"), edges, strict=True)
            ]
            said.append(f"{label} went from {write_number(edges[0], '')} to {write_number(edges[1], '')}")
    edges = source.edges("rollout/kl")
    if edges:
        cells.append(_chart_cell(source, key, "KL, last tenth", edges[1]))
        said.append(f"while KL from the SFT model reached {write_number(edges[1], 'nats')} per completion")
    caption = ", ".join(said) + "."
    if len(panels) > 1:
        caption += (
            " If the upper curve rises while the lower one falls, the policy has learned to please the "
            "reward model and not the judges."
        )
    else:
        caption += " No judge stood beside the reward model here, so this shows the proxy only."
    caption = caption[0].upper() + caption[1:]
    svg = _drift_svg(panels) if can_draw() else ""
    return Chart(
        key=key, title=title, caption=caption, alt=f"Scatter of rewards over KL. {caption}", svg=svg, cells=tuple(cells)
    )


def _drift_svg(panels: Sequence[tuple[str, list[tuple[float, float]]]]) -> str:
    figure, axes = _figure(len(panels), height=1.9 * len(panels) + 0.3, width=5.0)
    for number, (label, points) in enumerate(panels):
        thin = _thin(points)
        x, y = [p[0] for p in thin], [p[1] for p in thin]
        colour = (ONE, TWO)[number % 2]
        axes[number].plot(x, y, color=LINE, lw=0.8)
        axes[number].scatter(x, y, s=12, color=colour, zorder=3)
        axes[number].annotate("start", (x[0], y[0]), textcoords="offset points", xytext=(6, -3), fontsize=8, color=SOFT)
        axes[number].annotate(
            "end", (x[-1], y[-1]), textcoords="offset points", xytext=(-6, 4), fontsize=8, color=SOFT, ha="right"
        )
        last = number == len(panels) - 1
        _finish(axes[number], xlabel="KL from the SFT model, nats per completion" if last else "", ylabel=label)
    return _svg(figure, "drift")


def reward_model_chart(sources: Sources) -> Chart:
    """Return the reward model's held-out accuracy beside chance and the annotators' ceiling."""
    key, title = "reward-model", "The reward model beside its annotators"
    source = sources.find("reward_model")
    if source is None:
        return Chart(key=key, title=title, caption=f"Reward model: {sources.missing('reward_model').main}.")
    cells = [source.measured(r, "reward model, held-out pairs") for r in source.results("pairwise_accuracy")[:1]]
    ceiling = source.manifest.summary.get("ceiling")
    if ceiling is not None:
        cells.append(source.estimate(f"ceiling ({who(sources)})", ceiling))
    cells = [c for c in cells if c.value is not None]
    if not cells:
        return Chart(key=key, title=title, caption="The reward model's held-out accuracy is not recorded.")
    caption = f"On held-out pairs the reward model agrees with the {who(sources)} on {cells[0].text}"
    if len(cells) > 1:
        caption += f"; the ceiling, which their own agreement sets, is {cells[1].text}"
    caption += (
        ". Chance is 50%; the closer the upper bar is to the ceiling, the less there is left to learn "
        "from these rankings."
    )
    return _dots(key, title, cells, [c.figure for c in cells], caption)


def wins_chart(sources: Sources) -> Chart:
    """Return win rates against SFT with their intervals, around the line of no difference."""
    key, title = "win-rates", "Win rates against the SFT model"
    table = wins_table(sources)
    place = next((i for i, (column, _) in enumerate(table.columns) if column.endswith("win_rate")), None)
    found = [(row.label, row.cells[place][0]) for row in table.rows] if place is not None else []
    pairs = [(label, cell) for label, cell in found if cell.value is not None]
    if not pairs:
        return Chart(
            key=key,
            title=title,
            caption=f"Evaluation: {sources.missing('evaluate').main}."
            if not sources.find("evaluate")
            else "No win rate was measured.",
        )
    better = [label for label, cell in pairs if cell.low is not None and cell.low > 0.5]
    worse = [label for label, cell in pairs if cell.high is not None and cell.high < 0.5]
    unsure = [label for label, _ in pairs if label not in better + worse]
    parts = [
        f"{', '.join(names)}: {what}"
        for names, what in (
            (better, "clearly preferred"),
            (worse, "clearly not preferred"),
            (unsure, "no difference that this many prompts can show"),
        )
        if names
    ]
    judge = taste_of(sources) if sources.contest() else PROXY
    caption = (
        f"Judged by {judge}. {'; '.join(parts)}. An interval that crosses the line of 50% is compatible "
        "with no difference."
    )
    return _dots(key, title, [c for _, c in pairs], [label for label, _ in pairs], caption)


def _dots(key: str, title: str, cells: Sequence[Cell], labels: Sequence[str], caption: str) -> Chart:
    """Return a chart of fractions with their intervals, one line each, beside the 50% mark."""
    svg = ""
    if can_draw():
        figure, (axes,) = _figure(1, height=0.42 * len(cells) + 0.75, width=5.0)
        for place, cell in enumerate(reversed(cells)):
            value = 100 * (cell.value or 0.0)
            if cell.low is not None and cell.high is not None:
                axes.plot(
                    [100 * cell.low, 100 * cell.high],
                    [place, place],
                    color=ONE,
                    lw=3,
                    alpha=0.4,
                    solid_capstyle="round",
                )
            axes.plot([value], [place], "o", color=ONE, ms=6)
        axes.axvline(50, color=SOFT, lw=0.8, ls=(0, (4, 3)))
        axes.set_yticks(range(len(cells)), [*reversed(labels)])
        axes.set_ylim(-0.6, len(cells) - 0.4)
        lows = [100 * (c.value if c.low is None else c.low) for c in cells if c.value is not None]
        axes.set_xlim(min(40.0, *lows, 40.0) - 2, 102)
        _finish(axes, xlabel="percent, with 95% intervals (dashed: 50%)", ylabel="")
        svg = _svg(figure, key)
    alt = f"Dot chart. {'; '.join(f'{label}: {cell.text}' for label, cell in zip(labels, cells, strict=True))}."
    return Chart(key=key, title=title, caption=caption, alt=alt, svg=svg)


def _chart_cell(source: Source, chart: str, figure: str, value: float) -> Cell:
    cell = source.cell(figure, value, artifact=EVENTS)
    return Cell(table="figures", row=chart, column=source.manifest.table, figure=figure, value=value,
                run=cell.run, artifact=EVENTS, sha256=cell.sha256)  # fmt: skip


def can_draw() -> bool:
    """Tell whether matplotlib is installed; without it the report is whole but for its figures."""
    return importlib.util.find_spec("matplotlib") is not None


# -- drawing


def _figure(panels: int, *, height: float, width: float = 3.9) -> tuple[Figure, list[Axes]]:
    """Return an empty figure with panels one above the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    made: Any = figure.subplots(panels, 1, sharex=True, squeeze=False)
    return figure, [made[i][0] for i in range(panels)]


def _finish(axes: Axes, *, xlabel: str, ylabel: str, legend: bool = False) -> None:
    """Give a panel its labels and its quiet frame."""
    axes.patch.set_alpha(0.0)
    axes.set_xlabel(xlabel, fontsize=8.5, color=SOFT)
    axes.set_ylabel(ylabel, fontsize=8.5, color=SOFT)
    axes.tick_params(labelsize=8, colors=SOFT, length=0)
    for label in axes.get_yticklabels():
        label.set_color(INK if not ylabel else SOFT)
    axes.grid(True, axis="both" if ylabel else "x", color=LINE, lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    if legend:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)


def _svg(figure: Figure, key: str) -> str:
    """Return the figure as an SVG element for a page: no date, ids of its own, the theme's colours and font."""
    import matplotlib

    settings: Any = {"svg.hashsalt": f"trivium-{key}", "svg.fonttype": "none", "font.family": "DejaVu Sans"}
    buffer = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="(?:matplotlib\.)?', f'id="{key}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", text)
    text = re.sub(r'^<svg\b[^>]*?\bwidth="[^"]*"', lambda m: m.group(0).rsplit("width=", 1)[0], text)
    text = re.sub(r'(<svg\b[^>]*?)\bheight="[^"]*"\s*', r"\1", text, count=1)
    text = re.sub(r"(font(?:-family)?: [^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1inherit", text)
    for placeholder, colour in COLOURS.items():
        text = text.replace(placeholder, colour)
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most MAX_POINTS points, neighbours averaged."""
    size = -(-len(points) // MAX_POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
