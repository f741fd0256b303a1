"""Every benchmark runs, at tiny sizes: or they would rot. Their figures mean nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 280.0

# pytest's own variables belong to this run, and coverage would only slow the other one down.
_OURS = ("PYTEST_", "COVERAGE_", "COV_")


@pytest.mark.etcd
@pytest.mark.fuse
@pytest.mark.slow
@pytest.mark.timeout(290)  # a few seconds of work, but ten mounts on a machine that may be busy
def test_every_benchmark_runs(tmp_path: Path) -> None:
    figures, output = tmp_path / "figures.json", tmp_path / "output"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "benchmarks",
            "--smoke",
            f"--output={output}",
            f"--benchmark-json={figures}",
            f"--benchmark-storage=file://{tmp_path / 'storage'}",
            f"--basetemp={tmp_path / 'temp'}",
            "-p",
            "no:cacheprovider",
        ],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith(_OURS)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
    _check_figures(json.loads(figures.read_text())["benchmarks"])
    _check_results(json.loads((output / "results.json").read_text())["tables"])
    text = (output / "report.txt").read_text()
    assert text in done.stdout
    for part in ("open+read+close", "--no-cache", "raw client", "Propagation", "Pauses"):
        assert part in text
    assert "C libfuse" in (output / "results.svg").read_text()


def _check_results(tables: list[dict[str, Any]]) -> None:
    """Check the requests of the C file system, and that all is there that the plot shows."""
    by_name = {table["name"]: table["figures"] for table in tables}
    requests = {
        row["operation"]: row["fuse_requests"]
        for row in by_name["operations"]
        if row["target"] == "C libfuse"
    }
    assert requests["stat"] == requests["missing name"] == {}
    assert requests["open+read+close"] == {"open": 1, "release": 1}
    assert requests["listing of 100"] == {"opendir": 1, "releasedir": 1}
    assert all(row["change"] > 0 for row in by_name["scale"] if row["keys"])
    walks = {(row["target"], row["walk"]): row for row in by_name["cold walk"]}
    assert walks["--cache", "first"]["fuse_requests_per_file"] > 0


def _check_figures(benchmarks: list[dict[str, Any]]) -> None:
    """Check that pytest-benchmark has the samples that were replayed to it."""
    by_name = {benchmark["name"]: benchmark for benchmark in benchmarks}
    assert len(by_name) == len(benchmarks)
    stat = by_name["test_operation[stat---cache]"]
    assert stat["stats"]["median"] > 0
    assert stat["extra_info"]["fuse_requests"] == {}
    opened = by_name["test_operation[open+read+close---cache]"]["extra_info"]
    assert opened["fuse_requests"]["open"] == 1
    assert opened["to_c"] > 0
