"""Every benchmark runs, at tiny sizes: or they would rot. Their figures mean nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 170.0

# pytest's own variables belong to this run, and coverage would only slow the other one down.
_OURS = ("PYTEST_", "COVERAGE_", "COV_")


@pytest.mark.etcd
@pytest.mark.fuse
@pytest.mark.slow
@pytest.mark.timeout(180)  # a few seconds of work, but seven mounts on a machine that may be busy
def test_every_benchmark_runs(tmp_path: Path) -> None:
    figures, table = tmp_path / "figures.json", tmp_path / "table.txt"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "benchmarks",
            "--smoke",
            f"--table={table}",
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
    text = table.read_text()
    assert text in done.stdout
    for part in ("open+read+close", "--no-cache", "raw client", "Propagation", "Start", "Pauses"):
        assert part in text


def _check_figures(benchmarks: list[dict[str, Any]]) -> None:
    """Check that pytest-benchmark has the samples that were replayed to it."""
    by_name = {benchmark["name"]: benchmark for benchmark in benchmarks}
    assert len(by_name) == len(benchmarks)
    stat = by_name["test_operation[stat---cache]"]
    assert stat["stats"]["median"] > 0
    assert stat["extra_info"]["fuse_requests"] == {}
    opened = by_name["test_operation[open+read+close---cache]"]["extra_info"]
    assert opened["fuse_requests"] == {"open": 1, "release": 1}
