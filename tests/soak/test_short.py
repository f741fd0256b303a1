"""The short form of the soak: a few faults under load on each release, and one planted defect.

Concurrency: each test is a process of its own, as `make soak` is.
"""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.soak import conductor, controls
from tests.soak.table import ELSEWHERE, FAULTS

ROOT = Path(__file__).parents[2]
PATIENCE_S = 280.0
SHORT = (
    "1 kill -9 of etcd",
    "7 compaction while disconnected",
    "29 kill -9 of the daemon",
)
_OURS = ("PYTEST_", "COVERAGE_", "COV_")


def soak(*arguments: str) -> str:
    """Run the soak and return its report; it must be what it should be."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--seed", "1", "--duration", "0", *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith(_OURS)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.etcd
@pytest.mark.fuse
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.oldest_and_newest_etcd
def test_a_short_soak_is_clean(etcd_binary: Path, request: pytest.FixtureRequest) -> None:
    release = request.node.callspec.id
    report = soak("--etcd", release, "--arena", "single", "--fault", ",".join(SHORT))
    assert report.rstrip().endswith("clean")
    for name in SHORT:
        assert name in report


@pytest.mark.etcd
@pytest.mark.fuse
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_planted_defect_is_caught() -> None:
    assert "defect drop-notification: caught" in soak("--defect", "drop-notification")


# --- the tables -----------------------------------------------------------------------------


def test_every_fault_of_the_list_is_made_or_has_a_reason() -> None:
    numbers = {fault.number for fault in FAULTS} | set(ELSEWHERE)
    assert {str(number) for number in range(1, 31)} <= numbers


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_made_elsewhere_is_there(name: str) -> None:
    file, _, test = ELSEWHERE[name].partition("::")
    assert not test or f"def {test}(" in (ROOT / file).read_text()
    assert test or " so " in file, "why not"


def test_every_fault_says_what_must_happen() -> None:
    titles = [(fault.title, fault.arena) for fault in FAULTS]
    assert len(set(titles)) == len(titles)
    for fault in FAULTS:
        assert fault.expected, fault.title
        assert fault.arena in conductor.ARENAS


def test_there_are_ten_defects_at_least_and_each_has_its_faults() -> None:
    titles = {fault.title for fault in FAULTS}
    assert len(controls.CONTROLS) >= 10
    for control in controls.CONTROLS.values():
        assert set(control.faults) <= titles, control.name


def test_each_defect_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a daemon with it does not even start, and whatever it then fails by proves nothing."""
    defects = controls.soaks_defects()
    defects.replace = monkeypatch.setattr  # which raises where there is nothing to replace
    assert set(defects.DEFECTS) == set(controls.CONTROLS)
    for module, patch in defects.DEFECTS.values():
        patch(import_module(module))
        monkeypatch.undo()
