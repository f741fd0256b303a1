"""A first and a second `grep -r` over many small files: what reading everything costs."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Final

import pytest

from benchmarks.harness.bare import fill
from benchmarks.harness.figures import Cost, Report, Table, duration, ratio
from benchmarks.harness.file_operations import value_of
from benchmarks.harness.replay import replay, replayed_time
from benchmarks.harness.scale import key_names
from benchmarks.harness.targets import CACHE, READ_ONLY, TMPFS, find_tmpfs
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted

pytestmark = [pytest.mark.benchmark(timer=replayed_time), pytest.mark.timeout(600)]

PREFIX: Final = b"/walk/"
FILES, SMOKE_FILES = 10_000, 200
TURNS, SMOKE_TURNS = 3, 1
WALKS: Final = ("first", "second")
_TIMEOUT_S: Final = 120


@dataclass(slots=True)
class Walk:
    """All walks of one kind.

    Attributes:
        taken: Seconds, of each.
        requests: FUSE requests of the last one, by name.
    """

    taken: list[float] = field(default_factory=list)
    requests: Mapping[str, int] = field(default_factory=dict)

    def per_file(self, files: int) -> float:
        return sum(self.requests.values()) / files


Walks = dict[tuple[str, str], Walk]
"""By target and which walk."""


def grep(root: Path) -> float:
    """Return how long it takes to look for what is in no file."""
    begun = perf_counter()
    done = subprocess.run(["grep", "-r", "needle", root], timeout=_TIMEOUT_S, check=False)
    taken = perf_counter() - begun
    assert done.returncode == 1, "nothing is found, and there is no error"
    return taken


def walk_all(etcd: EtcdProcess, files: int, turns: int, memory: Path) -> Walks:
    """Walk twice over tmpfs and over each kind of mount, made anew, in turns."""
    fill(etcd.endpoint, ((key, value_of(0)) for key in key_names(PREFIX, files)))
    for key in key_names(b"", files):
        path = memory / os.fsdecode(key)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(value_of(0))
    walks: Walks = {(on, which): Walk() for on in (TMPFS, READ_ONLY, CACHE) for which in WALKS}
    for _ in range(turns):
        for which in WALKS:
            walks[TMPFS, which].taken.append(grep(memory))
        for mode in (READ_ONLY, CACHE):
            with Mounted(etcd, *mode.split(), "--prefix", PREFIX.decode()) as mounted:
                for which in WALKS:
                    with mounted.counting() as requests:
                        taken = grep(mounted.path)
                    walks[mode, which].taken.append(taken)
                    walks[mode, which].requests = dict(requests)
    return walks


def table(walks: Walks, files: int) -> Table:
    rows, numbers = [], []
    for (on, which), walk in walks.items():
        taken = median(walk.taken)
        to_tmpfs = taken / median(walks[TMPFS, which].taken)
        per_file = walk.per_file(files)
        rows.append(
            (
                on if which == WALKS[0] else "",
                which,
                duration(taken),
                duration(max(walk.taken)),
                ratio(to_tmpfs, 1),
                "" if on == TMPFS else f"{per_file:.2f}",
                "" if on == TMPFS else Cost(walk.requests).describe(),
            )
        )
        numbers.append(
            {"target": on, "walk": which, "p50": taken, "to_tmpfs": to_tmpfs, "files": files}
            | {"fuse_requests_per_file": per_file, "fuse_requests": dict(walk.requests)}
        )
    return Table(
        f"Cold walk: `grep -r` over {files:,} files of 200 bytes".replace(",", " "),
        ("on", "walk", "p50", "slowest", "/tmpfs", "requests a file", "FUSE requests"),
        tuple(rows),
        ("", "Requests a file include those that the caller does not wait for."),
        name="cold walk",
        figures=tuple(numbers),
    )


def test_cold_walk(etcd: EtcdProcess, report: Report, smoke: bool, benchmark: Any) -> None:
    memory = find_tmpfs()
    if memory is None:
        pytest.skip("there is no tmpfs to compare with")
    files, turns = (SMOKE_FILES, SMOKE_TURNS) if smoke else (FILES, TURNS)
    with TemporaryDirectory(prefix="etcdfs-bench-", dir=memory) as directory:
        walks = walk_all(etcd, files, turns, Path(directory))
    report.add(table(walks, files))
    first = walks[CACHE, WALKS[0]]
    replay(benchmark, tuple(first.taken), files=files, requests_per_file=first.per_file(files))
