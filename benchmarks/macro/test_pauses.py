"""What other calls wait while one revision of very many keys is worked on."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
SMOKE_KEYS: Final = 3_000


def test_pauses(etcd: EtcdProcess, report: Report, smoke: bool, benchmark: Any) -> None:
    keys = SMOKE_KEYS if smoke else KEYS
    fill(etcd.endpoint, ((key, value_of(0)) for key in key_names(PREFIX + b"many/", keys)))
    fill(etcd.endpoint, [(PREFIX + b"other", value_of(0))])
    with Mounted(etcd, "--cache", "--prefix", PREFIX.decode()) as mounted:
        begun = perf_counter()
        samples = open_while_deleting(etcd, mounted.path)
        taken = perf_counter() - begun
        assert os.listdir(mounted.path) == ["other"]
    figures = Figures(tuple(samples))
    replay(benchmark, figures.samples, keys=keys, slowest=max(samples), visible=taken)
    row = (f"{keys:,}".replace(",", " "), str(len(samples)))
    times = (figures.p50, figures.p99, max(samples), taken)
    report.add(
        Table(
            "Pauses: open and close of another file while one revision deletes very many",
            ("keys deleted", "calls", "p50", "p99", "slowest", "until visible"),
            ((*row, *map(duration, times)),),
            ("", "Wanted: none takes longer than 100 ms."),
        )
    )


def open_while_deleting(etcd: EtcdProcess, root: Path) -> list[float]:
    """Delete many keys in one revision; return how long each call took until that was visible."""
    is_visible = Event()

    def call() -> list[float]:
        samples: list[float] = []
        while not samples or not is_visible.is_set():
            begun = perf_counter()
            os.close(os.open(root / "other", os.O_RDONLY))
            samples.append(perf_counter() - begun)
        return samples

    with ThreadPoolExecutor(1) as pool:
        calls = pool.submit(call)
        try:
            revision = delete_all(etcd.endpoint, PREFIX + b"many/")
            wait_for(root, revision)
        finally:
            is_visible.set()
        return calls.result()


def wait_for(root: Path, revision: int) -> None:
    """Return when a revision is visible; a machine may be so busy that one wait is too short."""
    while True:
        with suppress(TimeoutError):
            os.getxattr(root, f"user.etcdfs.wait.{revision}")
            return
