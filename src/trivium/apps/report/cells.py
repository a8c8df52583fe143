"""A cell: one figure with its interval, its unit and the file it was read from; and how figures are written out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

NOT_RECORDED = "not recorded"
PLAIN_UNITS = ("bits per byte", "nats", "tokens", "steps")
COUNTED = ("documents", "conversations", "prompts", "completions", "rankings", "pairs", "tokens", "steps")
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One figure (or one phrase, when `value` is None) of a table.

    `run` and `artifact` say which file of which run it was read from, `sha256` is that file's hash; all three are
    empty for a phrase that no run was needed for. `figure` names it within its place in the table; how it is laid out
    follows from `group` (a heading over several), `label` (shown before it; by default `figure`) and `joint` (what
    joins it to the one before it on the same line; empty starts a line).
    """

    table: str = ""
    row: str = ""
    column: str = ""
    figure: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = ""
    run: str = ""
    artifact: str = ""
    sha256: str = ""
    phrase: str = ""
    cost: bool = False
    group: str = ""
    label: str | None = None
    joint: str = ""

    @property
    def main(self) -> str:
        """The figure or the phrase alone; a unit that the label has named is not named again."""
        named = self.unit in PLAIN_UNITS and self.unit in self.shown
        return self.phrase or write_number(self.value, self.unit, bare=named)

    @property
    def shown(self) -> str:
        """What stands before the figure on the page."""
        return self.figure if self.label is None else self.label

    @property
    def interval(self) -> str:
        """The 95% interval without its unit, or nothing where none was estimated."""
        if self.low is None or self.high is None:
            return ""
        return f"{write_number(self.low, self.unit, bare=True)} to {write_number(self.high, self.unit, bare=True)}"

    @property
    def detail(self) -> str:
        """The interval and the number of items, as far as there are any."""
        parts = [f"95%: {self.interval}"] if self.interval else []
        return "; ".join([*parts, f"n = {self.n:,}"] if self.n else parts)

    @property
    def text(self) -> str:
        """The whole cell on one line."""
        return f"{self.main} ({self.detail})" if self.detail else self.main

    @property
    def is_missing(self) -> bool:
        """Whether there is no figure yet (not run, not recorded)."""
        return self.value is None and not self.run

    @property
    def bar(self) -> tuple[float, float, float] | None:
        """Value, low and high in percent for the little interval bar; None where there is no interval of a fraction."""
        if self.unit != "fraction" or self.value is None or self.low is None or self.high is None:
            return None
        value, low, high = (round(100 * min(max(x, 0.0), 1.0), 2) for x in (self.value, self.low, self.high))
        return value, low, high

    def as_dict(self) -> dict[str, Any]:
        """Return the cell as report.json holds it."""
        data = dataclasses.asdict(self)
        for layout in ("phrase", "cost", "group", "label", "joint"):
            del data[layout]
        figure = ": ".join(part for part in (self.group, self.figure) if part)
        return data | {"figure": figure, "text": self.text}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What stands on one line of a table's cell: a heading or nothing, a label or nothing, and some cells."""

    heading: str
    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a table: what it is about, and the figures under each column."""

    key: str
    label: str
    note: str = ""
    cells: tuple[tuple[Cell, ...], ...] = ()

    @property
    def n(self) -> int | None:
        """The number of items where it is the same for all measured cells of the row."""
        numbers = {cell.n for group in self.cells for cell in group if cell.value is not None}
        return numbers.pop() if len(numbers) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table: `columns` pairs a key with its heading; every row has one group of cells a column."""

    key: str
    title: str
    intro: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]

    def all_cells(self) -> Iterator[Cell]:
        """Yield every cell, with table, row and column filled in."""
        for row in self.rows:
            for (column, _), group in zip(self.columns, row.cells, strict=True):
                for cell in group:
                    yield dataclasses.replace(cell, table=self.key, row=row.key, column=column)


def lines(cells: Iterable[Cell]) -> list[Line]:
    """Return cells laid out in lines."""
    laid: list[Line] = []
    group = ""
    for cell in cells:
        if cell.joint and laid:
            laid[-1] = dataclasses.replace(laid[-1], cells=(*laid[-1].cells, cell))
            continue
        heading = cell.group if cell.group != group else ""
        group = cell.group
        laid.append(Line(heading=heading, label=cell.shown, cells=(cell,)))
    return laid


def in_line(cells: Iterable[Cell], group: str = "") -> list[Cell]:
    """Return cells whose texts speak for themselves, to stand on one line with dots between."""
    return [
        dataclasses.replace(cell, group=group or cell.group, label="", joint=" · " if place else "")
        for place, cell in enumerate(cells)
    ]


def phrase(text: str, *, figure: str = "") -> Cell:
    """Return a cell that holds words and no figure."""
    return Cell(phrase=text, figure=figure)


def mapping(value: Any) -> dict[str, Any]:
    """Return `value` if it is an object of JSON, else an empty one."""
    return dict(value) if isinstance(value, dict) else {}


def words(name: str) -> str:
    """Return a name of code as words."""
    return name.replace("_", " ")


def finite(value: Any) -> float | None:
    """Return `value` as a float, or None when it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def write_number(value: float | None, unit: str, *, bare: bool = False) -> str:
    """Return a number as a reader wants it: percent, minutes, megabytes; `bare` leaves the unit out."""
    if value is None:
        return NOT_RECORDED
    if unit == "fraction":
        return f"{100 * value:.1f}" + ("" if bare else "%")
    if unit == "points":  # a difference of fractions
        text = f"{100 * value:+.1f}".replace("-", "−")
        return text if bare else f"{text} points"
    if unit == "s":
        return write_seconds(value)
    if unit == "bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
    if unit == "FLOPs":
        return f"{_power_of_ten(value)} FLOPs"
    whole = float(value).is_integer() and (unit in COUNTED or abs(value) >= 10)
    number = write_count(value) if whole else _three_digits(value)
    return number if bare or not unit else f"{number} {unit}"


def write_count(value: float) -> str:
    """Return a count: exact below a million, in millions or billions above."""
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if abs(value) >= size:
            return f"{value / size:.2f} {name}"
    return f"{value:,.0f}"


def write_seconds(value: float) -> str:
    """Return a duration in the largest two units that matter."""
    if value < 100:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _three_digits(value: float) -> str:
    """Return three significant digits, never in exponent form for everyday sizes, with a true minus sign."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        decimals = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{min(decimals, 6)}f}"
    else:
        text = _power_of_ten(value)
    return text.replace("-", "−")


def _power_of_ten(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(SUPERSCRIPT)}"


def visible(text: object) -> str:
    """Return model or user text that can stand in a page: valid Unicode, with what steers made visible.

    Control characters become their pictures; characters that turn the direction of writing are named.
    """
    clean = str(text).encode("utf-8", "replace").decode("utf-8")
    return "".join(_visible(c) for c in clean)


def _visible(character: str) -> str:
    code = ord(character)
    if code < 32 and character not in "\n\t":
        return chr(0x2400 + code)
    if code == 127:
        return "␡"
    if code in range(0x80, 0xA0) or code in (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)):
        return f"⟨U+{code:04X}⟩"
    return character


def shorten(text: str, limit: int) -> str:
    """Return at most `limit` characters of a text, the cut marked."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def join(words: Iterable[str]) -> str:
    """Return words as a list in a sentence: `a, b and c`."""
    items = list(words)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
