"""What is kept of a run of the benchmarks: tables, JSON, the plot, and the page that shows them."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.figures import Report, Table
from benchmarks.harness.memfs import CannotCompileError, compile_memfs
from benchmarks.harness.plot import draw
from benchmarks.record import BEGIN, DOCS, END, with_tables

OPERATIONS = Table(
    "Operations",
    ("operation", "on", "p50"),
    (("stat", "tmpfs", "<1 us"), ("", "--cache", "2 us")),
    ("", "A note."),
    name="operations",
    figures=(
        {"operation": "stat", "target": "tmpfs", "p50": 1e-6, "p99": 2e-6},
        {"operation": "stat", "target": "--cache", "p50": 2e-6, "p99": 3e-6},
    ),
)
SCALE = Table(
    "Keys",
    ("keys", "mount"),
    (("0", "1 s"), ("1 000", "1 s")),
    name="scale",
    figures=(
        {"keys": 0, "mount": 1.0, "etcdctl": 0.1, "memory_per_key": None, "change": None},
        {"keys": 1000, "mount": 1.1, "etcdctl": 0.2, "memory_per_key": 700.0, "change": 5e-4},
    ),
)
OTHER = Table("Another", ("what",), (("x",),))


def results(*tables: Table) -> Any:
    """Return what is read from the file that a run has written."""
    report = Report()
    report.heading = "etcd 3.5, a machine"
    for table in tables:
        report.add(table)
    return json.loads(json.dumps(report.results()))


def test_the_page_has_the_tables_of_the_last_run_and_nothing_else_is_touched() -> None:
    page = f"before\n{BEGIN}{END}after\n"
    found = with_tables(with_tables(page, results(SCALE)), results(OPERATIONS, OTHER))
    before, _, rest = found.partition(BEGIN)
    tables, _, after = rest.partition(END)
    assert (before, after) == ("before\n", "after\n")
    assert "### Operations\n\n| operation | on | p50 |\n| :-- | :-- | :-- |\n" in tables
    assert "| stat | tmpfs | &lt;1 us |\n|  | --cache | 2 us |\n\nA note.\n" in tables
    assert "### Another" in tables
    assert "Keys" not in tables


def test_the_documents_show_the_run_whose_results_are_kept() -> None:
    page = (DOCS / "performance.md").read_text()
    assert page.count(BEGIN) == page.count(END) == 1
    kept = json.loads((DOCS / "performance.json").read_text())
    assert with_tables(page, kept) == page, "edited by hand? make bench RECORD=1"
    assert "SMOKE" not in kept["heading"]
    assert {"operations", "scale"} <= {table["name"] for table in kept["tables"]}


def test_the_plot_has_what_was_measured_and_is_the_same_again(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.svg", "two.svg")]
    for path in paths:
        draw(results(OPERATIONS, SCALE, OTHER), path)
    one, two = (path.read_text() for path in paths)
    assert one == two
    texts = set(ET.fromstring(one).itertext())
    assert {"stat", "tmpfs", "--cache", "etcd 3.5, a machine", "until it is ready"} <= texts
    assert "etcdctl" not in texts, "it is in no operation"


@pytest.mark.parametrize("tables", [(OTHER,), (SCALE,)])
def test_a_part_of_the_run_is_drawn_too(tmp_path: Path, tables: tuple[Table, ...]) -> None:
    draw(results(*tables), tmp_path / "part.svg")
    assert (tmp_path / "part.svg").stat().st_size > 0


def test_without_a_compiler_there_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotCompileError, match="no C compiler"):
        compile_memfs(tmp_path / "memfs")


def test_without_libfuse_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("cc", ""), ("pkg-config", "echo Package fuse3 was not found >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotCompileError, match="fuse3 was not found"):
        compile_memfs(tmp_path / "memfs")
