"""What other calls wait while very many keys are worked on."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import Any, Final

import pytest

from benchmarks.harness.bare import delete_all, fill
from benchmarks.harness.figures import Figures, Report, Table, duration
from benchmarks.harness.file_operations import value_of
from benchmarks.harness.replay import replay, replayed_time
from benchmarks.harness.scale import key_names
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted

pytestmark = [pytest.mark.benchmark(timer=replayed_time), pytest.mark.timeout(600)]

PREFIX: Final = b"/pauses/"
KEYS: Final = 200_000
SMOKE_KEYS: Final = 1_500

AFTERWARDS_S: Final = 1.0
"""Calls go on for so long: what is visible is not yet tidied up."""

QUIET, AUDIT, DELETED, DELETED_KNOWN = WORK = (
    "nothing",
    "an audit",
    "one revision deletes all, which the kernel does not know",
    "one revision deletes all, which the kernel knows",
)


@dataclass(slots=True)
class Pauses:
    """What was measured of each work: how long it took, and each call meanwhile."""

    keys: int
    taken: dict[str, tuple[float, Figures]]

    def table(self) -> Table:
        keys = f"{self.keys:,}".replace(",", " ")
        return Table(
            f"Pauses: open and close of a file on a mount with `--cache` of {keys} keys",
            ("meanwhile", "calls", "p50", "p99", "slowest", "that takes"),
            tuple(
                (work, str(len(calls.samples)), *map(duration, _times(calls)), duration(taken))
                for work, (taken, calls) in self.taken.items()
            ),
            (
                "",
                "Until it is visible, and a second more; etcd works on the same processors. Wanted:"
                " none takes longer than 100 ms.",
            ),
            name="pauses",
            figures=tuple(
                {"meanwhile": work, "keys": self.keys, "takes": taken, "calls": len(calls.samples)}
                | dict(zip(("p50", "p99", "slowest"), _times(calls), strict=True))
                for work, (taken, calls) in self.taken.items()
            ),
        )


def _times(calls: Figures) -> tuple[float, float, float]:
    return calls.p50, calls.p99, max(calls.samples)


@contextmanager
def mounted_keys(etcd: EtcdProcess, keys: int, *options: str) -> Iterator[Mounted]:
    """Mount so many keys, and one other."""
    fill(etcd.endpoint, ((key, value_of(0)) for key in key_names(PREFIX + b"many/", keys)))
    fill(etcd.endpoint, [(PREFIX + b"other", value_of(0))])
    with Mounted(etcd, "--cache", "--prefix", PREFIX.decode(), *options) as mounted:
        yield mounted


def calls_during(
    root: Path, work: Callable[[], object], afterwards_s: float
) -> tuple[float, Figures]:
    """Open and close the other file until some work is done, and a little longer.

    Returns:
        How long the work took, and each of the calls.
    """
    is_done = Event()

    def call() -> list[float]:
        samples: list[float] = []
        while not samples or not is_done.is_set():
            begun = perf_counter()
            os.close(os.open(root / "other", os.O_RDONLY))
            samples.append(perf_counter() - begun)
        return samples

    with ThreadPoolExecutor(1) as pool:
        begun = perf_counter()
        calls = pool.submit(call)
        try:
            work()
            taken = perf_counter() - begun
            Event().wait(afterwards_s)
        finally:
            is_done.set()
        return taken, Figures(tuple(calls.result()))


def delete(etcd: EtcdProcess, mounted: Mounted) -> None:
    """Delete very many keys in one revision; return when that is visible."""
    revision = delete_all(etcd.endpoint, PREFIX + b"many/")
    while True:
        with suppress(TimeoutError):  # a machine may be so busy that one wait is too short
            mounted.wait(revision)
            return


def audit(mounted: Mounted) -> None:
    """Return when the next audit is over."""
    before = mounted.statistics()["audit"]["audits"]
    while mounted.statistics()["audit"]["audits"] == before:
        Event().wait(0.05)


def test_pauses(etcd: EtcdProcess, report: Report, smoke: bool, benchmark: Any) -> None:
    keys, afterwards_s = (SMOKE_KEYS, 0.0) if smoke else (KEYS, AFTERWARDS_S)
    found = Pauses(keys, {})

    def measure(work: str, mounted: Mounted, doing: Callable[[], object]) -> None:
        found.taken[work] = calls_during(mounted.path, doing, afterwards_s)

    with mounted_keys(etcd, keys, "--audit-interval=1") as mounted:
        if not smoke:
            audit(mounted)  # the next one begins in a second
        measure(QUIET, mounted, lambda: None)
        measure(AUDIT, mounted, lambda: audit(mounted))
    for work in (DELETED_KNOWN,) if smoke else (DELETED, DELETED_KNOWN):
        with mounted_keys(etcd, keys) as mounted:
            if work == DELETED_KNOWN:
                assert sum(len(files) for *_, files in os.walk(mounted.path)) == keys + 1
            measure(work, mounted, lambda: delete(etcd, mounted))
            assert os.listdir(mounted.path) == ["other"]
    report.add(found.table())
    taken, calls = found.taken[DELETED_KNOWN]
    replay(benchmark, calls.samples, keys=keys, slowest=max(calls.samples), visible=taken)
