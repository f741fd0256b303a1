"""What was measured, as numbers and as text.

Knows: percentiles, ratios, how a table is laid out, and what is kept of a run. Does not know: how
anything is measured.

Concurrency: none; pure functions and frozen values, and one report that collects them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, final

BACKGROUND: Final = ("release", "releasedir", "forget")
"""Requests that the kernel sends without keeping the caller waiting."""

FEW: Final = 100
"""With fewer samples there is no p99; the table then shows the slowest one, marked with `<`."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The durations of one operation on one target, in seconds."""

    samples: tuple[float, ...]

    @property
    def p50(self) -> float:
        """The median: half of the calls took no longer."""
        return self.percentile(50)

    @property
    def p99(self) -> float:
        """99 of 100 calls took no longer."""
        return self.percentile(99)

    def percentile(self, percent: float) -> float:
        """Return the sample that `percent` of a hundred do not exceed (nearest rank)."""
        ordered = sorted(self.samples)
        return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call costs in steady state.

    Attributes:
        requests: FUSE requests, by name.
        etcd: Requests to etcd.
    """

    requests: Mapping[str, float] = field(default_factory=dict)
    etcd: float = 0.0

    def describe(self) -> str:
        """Return e.g. `2 (open, flush) + release`."""
        awaited = {name: n for name, n in self.requests.items() if name not in BACKGROUND}
        later = {name: n for name, n in self.requests.items() if name in BACKGROUND}
        text = number(sum(awaited.values()))
        if awaited:
            text += f" ({_names(awaited)})"
        return f"{text} + {_names(later)}" if later else text


def _names(requests: Mapping[str, float]) -> str:
    return ", ".join(
        name if n == 1 else f"{number(n)} {name}" for name, n in sorted(requests.items())
    )


def number(value: float) -> str:
    """Return at most one decimal, and none where there is nothing to say."""
    return f"{value:.1f}".removesuffix(".0")


def per_call(count: float, calls: int) -> float:
    """Return a count per call; a request that came just before or after does not show."""
    exact = count / calls
    nearest = round(exact)
    return float(nearest) if abs(exact - nearest) * calls <= max(1.0, calls / 20) else exact


def duration(seconds: float) -> str:
    """Return a duration in the unit that suits it, three digits."""
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if abs(seconds) < 1000 * scale * 0.9995:
            return f"{_three(seconds / scale)} {unit}"
    return f"{_three(seconds)} s"


def slowest(figures: Figures) -> str:
    """Return the p99, or what there is instead of it."""
    mark = "<" if len(figures.samples) < FEW else ""
    return mark + duration(figures.p99)


def ratio(value: float, base: float | None) -> str:
    """Return how many times `base` it is; a dash without a base."""
    return "-" if base is None or base <= 0 else f"{_three(value / base)}x"


def _three(value: float) -> str:
    """Return three digits; of small numbers the first two."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(digits, 0) if digits <= 2 else digits - 1}f}"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a title.

    Attributes:
        title: What was measured.
        header: The columns.
        rows: As they are shown; what is said once for several rows is empty in all but the first.
        notes: Below it.
        name: Whoever reads `figures` knows the table by it.
        figures: The same as numbers, for plots and comparisons: seconds, bytes, ratios, counts.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    name: str = ""
    figures: tuple[Mapping[str, object], ...] = ()

    def render(self) -> str:
        """Return it as text: the first two columns to the left, numbers to the right."""
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [_line(cells, widths) for cells in lines]
        rule = "-" * max(map(len, texts))
        body = [texts[0], rule, *_grouped(self.rows, texts[1:])]
        return "\n".join([self.title, "", *body, *self.notes])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    last = len(cells) - 1
    padded = [
        cell.ljust(width) if index < 2 or index == last else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _grouped(rows: Sequence[tuple[str, ...]], texts: Sequence[str]) -> list[str]:
    """Put an empty line before each row that starts a group (its first cell is not empty)."""
    found: list[str] = []
    for row, text in zip(rows, texts, strict=True):
        if row[0] and found:
            found.append("")
        found.append(text)
    return found


@final
class Report:
    """All tables of a run, in the order in which they came. Owned by the pytest session."""

    def __init__(self) -> None:
        self.heading = ""
        self._tables: list[Table] = []

    def add(self, table: Table) -> None:
        """Add a table."""
        self._tables.append(table)

    def render(self) -> str:
        """Return all of it as text; empty if nothing was measured."""
        if not self._tables:
            return ""
        return "\n\n\n".join([self.heading, *(table.render() for table in self._tables)]) + "\n"

    def results(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold."""
        return {"heading": self.heading, "tables": [asdict(table) for table in self._tables]}
