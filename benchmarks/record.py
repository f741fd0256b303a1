"""Makes a run what the documents show: `python -m benchmarks.record .benchmarks/results.json`.

Writes the results to docs/performance.json, the plot to docs/performance.svg, and the tables into
docs/performance.md, between the two marks that are there for that.

Concurrency: none.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.harness.plot import draw

DOCS: Final = Path(__file__).parents[1] / "docs"
BEGIN: Final = "<!-- What follows is written by `make bench RECORD=1`; do not edit it. -->\n"
END: Final = "<!-- Until here. -->\n"


def tables(results: Mapping[str, Any]) -> str:
    """Return all tables of a run as Markdown."""
    return "\n".join([f"{results['heading']}.\n", *map(_table, results["tables"])])


def _table(table: Mapping[str, Any]) -> str:
    header = table["header"]
    rule = [
        ":--" if index < 2 or index == len(header) - 1 else "--:" for index in range(len(header))
    ]
    lines = [_line(cells) for cells in (header, rule, *table["rows"])]
    notes = [note for note in table["notes"] if note]
    return "\n".join([f"### {table['title']}", "", *lines, "", *notes, *([""] if notes else [])])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;').replace('<', '&lt;') for cell in cells)} |"


def with_tables(page: str, results: Mapping[str, Any]) -> str:
    """Return the page with the tables of a run between the marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables(results)}\n{END}{after}"


def main() -> None:
    """Write all three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    results = json.loads(parser.parse_args().results.read_text())
    if "SMOKE" in results["heading"]:
        parser.error("the figures of a smoke run mean nothing")
    page = DOCS / "performance.md"
    (DOCS / "performance.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, DOCS / "performance.svg")
    page.write_text(with_tables(page.read_text(), results))


if __name__ == "__main__":
    main()
