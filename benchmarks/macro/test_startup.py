"""Mounting many keys, beside reading them with nothing in between; and the memory they take."""

from collections.abc import Iterator
from itertools import islice
from statistics import median
from typing import Any, Final, final

import pytest

from benchmarks.harness.bare import fill
from benchmarks.harness.figures import Figures, Report, Table, duration, number, ratio
from benchmarks.harness.replay import replay, replayed_time
from benchmarks.harness.startup import key_names, time_mount, turns
from benchmarks.harness.targets import value_of
from tests.support.etcd_process import EtcdProcess

pytestmark = [pytest.mark.benchmark(timer=replayed_time), pytest.mark.timeout(600)]

TURNS: Final = 9
SMOKE_TURNS: Final = 1
LIMIT: Final = 3.0
"""Issue 2: 100 000 keys mount in at most three times what the bare Range takes."""


@final
class Startup:
    """Mounts and reads each keyspace in turns, when the first figure of it is asked for."""

    def __init__(self, etcd: EtcdProcess, *, smoke: bool) -> None:
        self._etcd = etcd
        self._turns = SMOKE_TURNS if smoke else TURNS
        self.figures: dict[int, dict[str, Figures]] = {}
        self.ratios: dict[int, float] = {}
        self.memory: dict[int, float] = {}
        self._is_warm = smoke  # its figures mean nothing anyway

    def of(self, size: int) -> dict[str, Figures]:
        if size not in self.figures:
            self._measure(size)
        return self.figures[size]

    def memory_per_key(self, size: int) -> float | None:
        """Return bytes of resident memory per key, beyond those of a mount without keys."""
        empty = self.memory.get(0)
        if not size or empty is None:
            return None
        return (self.memory[size] - empty) / size

    def _measure(self, size: int) -> None:
        prefix = b"/startup-%d/" % size
        fill(self._etcd.endpoint, ((key, value_of(0)) for key in key_names(prefix, size)))
        if not self._is_warm:
            time_mount(self._etcd, prefix, size)  # compiles the modules, see compiled_modules
            self._is_warm = True
        taken = list(islice(turns(self._etcd, prefix, size), self._turns))
        self.figures[size] = {
            "bare Range": Figures(tuple(turn.bare.taken for turn in taken)),
            "mount --cache": Figures(tuple(turn.mount.taken for turn in taken)),
        }
        self.ratios[size] = median(turn.ratio for turn in taken)
        self.memory[size] = median(turn.memory for turn in taken)

    def table(self) -> Table:
        rows: list[tuple[str, ...]] = []
        for size, figures in self.figures.items():
            bare, mounts = figures["bare Range"], figures["mount --cache"]
            per_key = self.memory_per_key(size)
            rows.append(
                (
                    f"{size:,}".replace(",", " "),
                    str(len(mounts.samples)),
                    duration(bare.p50),
                    duration(mounts.p50),
                    ratio(self.ratios[size], 1) if size else "-",
                    f"{self.memory[size] / 2**20:.0f} MiB",
                    "-" if per_key is None else f"{number(per_key)} B",
                )
            )
        return Table(
            "Start: from `etcdfs mount --cache` to its return, values of 200 bytes; medians",
            ("keys", "times", "bare Range", "mount", "/bare", "memory", "per key"),
            tuple(rows),
            (
                "",
                f"Wanted: at most {number(LIMIT)}x for 100 000 keys, the median of turns of a bare"
                " Range and a mount. Memory is what is resident"
                " of the daemon, values included.",
            ),
        )


@pytest.fixture(scope="module")
def startup(etcd: EtcdProcess, report: Report, smoke: bool) -> Iterator[Startup]:
    startup = Startup(etcd, smoke=smoke)
    yield startup
    if startup.figures:
        report.add(startup.table())


@pytest.mark.parametrize("what", ["bare Range", "mount --cache"])
def test_start(startup: Startup, benchmark: Any, size: int, what: str) -> None:
    found = startup.of(size)
    benchmark.group = f"start with {size} keys"
    replay(
        benchmark,
        found[what].samples,
        keys=size,
        to_bare_range=startup.ratios[size] if what == "mount --cache" else 1.0,
        memory=startup.memory[size],
        memory_per_key=startup.memory_per_key(size),
    )
