"""The results of a run as a picture.

Knows: the figures of the tables "operations" and "scale", and matplotlib. Does not know: how they
came about; whatever is not in the results is left out of the picture.

Concurrency: none.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

# Colours that the colour-blind can tell apart (Okabe and Ito), and marks for those who print it.
_STYLES: Final = {
    "tmpfs": ("#000000", "|"),
    "--cache --read-only": ("#009E73", "o"),
    "--cache": ("#0072B2", "D"),
    "--no-cache": ("#E69F00", "s"),
    "C libfuse": ("#CC79A7", "^"),
    "raw client": ("#D55E00", "x"),
    "etcdctl": ("#999999", "+"),
}

_SETTINGS: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "etcdfs",  # the same results make the same file
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write an SVG file: operations on each target, and the curves over the number of keys."""
    figures = {table["name"]: table["figures"] for table in results["tables"] if table["name"]}
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(9, 7), layout="constrained")
        grid = figure.add_gridspec(2, 3, height_ratios=(2.2, 1))
        _operations(figure.add_subplot(grid[0, :]), figures.get("operations", ()))
        _curves([figure.add_subplot(grid[1, n]) for n in range(3)], figures.get("scale", ()))
        figure.suptitle(results["heading"], fontsize=8, color="#555555")
        if figures.get("operations"):
            figure.legend(loc="outside lower center", ncols=len(_STYLES), columnspacing=1.2)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _operations(axes: Axes, found: Sequence[Mapping[str, Any]]) -> None:
    """Draw the p50 of each operation, and a line on to its p99, a mark for each target."""
    operations = list(dict.fromkeys(row["operation"] for row in found))
    for target, (colour, mark) in _STYLES.items():
        rows = [row for row in found if row["target"] == target]
        if not rows:
            continue
        heights = [-operations.index(row["operation"]) for row in rows]
        p50, p99 = [row["p50"] for row in rows], [row["p99"] for row in rows]
        axes.hlines(heights, p50, p99, colors=colour, alpha=0.25, linewidth=1)
        axes.scatter(p50, heights, color=colour, marker=mark, s=28, label=target, zorder=3)
    axes.set_yticks([-n for n in range(len(operations))], operations)
    axes.set_title("how long a call takes: p50, and a thin line to p99", loc="left")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(unit="s"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="both", alpha=0.2)


def _curves(axes: Sequence[Axes], found: Sequence[Mapping[str, Any]]) -> None:
    """Draw the time until a mount is ready, memory for a key, and the cost of a change."""
    rows = [row for row in found if row["keys"]]
    keys = [row["keys"] for row in rows]
    ready, memory, change = axes
    for name, target in (("mount", "--cache"), ("etcdctl", "etcdctl")):
        colour, mark = _STYLES[target]
        ready.plot(keys, [row[name] for row in rows], color=colour, marker=mark)
    ready.set_title("until it is ready", loc="left")
    ready.yaxis.set_major_formatter(EngFormatter(unit="s"))
    colour, mark = _STYLES["--cache"]
    known = [row for row in rows if row["memory_per_key"] is not None]
    for place, title, unit, name in (
        (memory, "memory for a key", "B", "memory_per_key"),
        (change, "processor time for a change", "s", "change"),
    ):
        place.plot(
            [row["keys"] for row in known], [row[name] for row in known], color=colour, marker=mark
        )
        place.set_title(title, loc="left")
        place.yaxis.set_major_formatter(EngFormatter(unit=unit))
    for place in axes:
        place.set_xscale("log")
        place.xaxis.set_major_formatter(EngFormatter())
        place.set_ylim(bottom=0)
        place.set_xlabel("keys")
        place.grid(alpha=0.2)
