"""What grows with the number of keys: the time until a mount is ready, its memory; what must not.

Beside each mount stand two ways of reading the same keys with nothing in between: `etcdctl get
--prefix`, and a bare Range in pages.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, final

import pytest

from benchmarks.harness.bare import fill
from benchmarks.harness.figures import Report, Table, duration, number, ratio
from benchmarks.harness.file_operations import value_of
from benchmarks.harness.replay import replay, replayed_time
from benchmarks.harness.scale import (
    MILLION,
    cost_of_change,
    key_names,
    mounting,
    resident,
    time_bare_range,
    time_etcdctl,
    time_mount,
)
from tests.support.etcd_process import EtcdProcess

pytestmark = [pytest.mark.benchmark(timer=replayed_time), pytest.mark.timeout(600)]

TURNS: Final = 5
SMOKE_TURNS: Final = 1


@dataclass(frozen=True, slots=True)
class Turn:
    """One after the other: etcdctl, a bare Range, a mount.

    Attributes:
        etcdctl: Seconds, as the next two.
        bare: Of the bare Range.
        mount: Until the mount is ready.
        memory: The daemon's, resident, in bytes.
        change: The daemon's processor time for a change by another client; None without keys.
    """

    etcdctl: float
    bare: float
    mount: float
    memory: int
    change: float | None


@final
class Scale:
    """Measures each number of keys when the first figure of it is asked for."""

    def __init__(self, etcd: EtcdProcess, *, smoke: bool) -> None:
        self._etcd = etcd
        self._turns = SMOKE_TURNS if smoke else TURNS
        self._is_warm = smoke  # its figures mean nothing anyway
        self.turns: dict[int, list[Turn]] = {}

    def of(self, size: int) -> dict[str, Any]:
        """Return all figures of a number of keys: medians, ratios of one turn each."""
        if size not in self.turns:
            self._measure(size)
        turns, empty = self.turns[size], self.turns.get(0)
        memory = median(turn.memory for turn in turns)
        base = median(turn.memory for turn in empty) if empty else None
        changes = [turn.change for turn in turns if turn.change is not None]
        return {
            "keys": size,
            "times": len(turns),
            "etcdctl": median(turn.etcdctl for turn in turns),
            "bare_range": median(turn.bare for turn in turns),
            "mount": median(turn.mount for turn in turns),
            "to_etcdctl": median(turn.mount / turn.etcdctl for turn in turns),
            "to_bare_range": median(turn.mount / turn.bare for turn in turns),
            "memory": memory,
            "memory_per_key": (memory - base) / size if size and base is not None else None,
            "change": median(changes) if changes else None,
        }

    def _measure(self, size: int) -> None:
        prefix = b"/scale-%d/" % size
        fill(self._etcd.endpoint, ((key, value_of(0)) for key in key_names(prefix, size)))
        if not self._is_warm:
            time_mount(self._etcd, prefix, size)  # compiles the modules, see compiled_modules
            self._is_warm = True
        wanted = 1 if size >= MILLION else self._turns
        self.turns[size] = [self._turn(prefix, size) for _ in range(wanted)]

    def _turn(self, prefix: bytes, size: int) -> Turn:
        etcdctl = time_etcdctl(self._etcd, prefix)
        bare = time_bare_range(self._etcd, prefix, size).taken
        with mounting(self._etcd, prefix, size) as (mounted, mount):
            memory = resident(mounted.daemon)
            change = cost_of_change(self._etcd, mounted, prefix, size) if size else None
        return Turn(etcdctl, bare, mount.taken, memory, change)

    def table(self) -> Table:
        found = [self.of(size) for size in self.turns]
        return Table(
            "Number of keys: from `etcdfs mount --cache` to its return, and what it has then",
            _HEADER,
            tuple(_row(figures) for figures in found),
            (
                "",
                "Values of 200 bytes. Medians; etcdctl is `get --prefix` of the same keys, ratios are"
                " of one turn each. Memory is the daemon's, resident, values included; per key:"
                " beyond a mount without keys. A change: the daemon's processor time when another"
                " client puts a file that the kernel knows.",
            ),
            name="scale",
            figures=tuple(found),
        )


_HEADER: Final = (
    "keys",
    "times",
    "etcdctl",
    "bare Range",
    "mount",
    "/etcdctl",
    "/bare",
    "memory",
    "per key",
    "a change",
)


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    per_key, change = found["memory_per_key"], found["change"]
    return (
        f"{found['keys']:,}".replace(",", " "),
        str(found["times"]),
        duration(found["etcdctl"]),
        duration(found["bare_range"]),
        duration(found["mount"]),
        ratio(found["to_etcdctl"], 1) if found["keys"] else "",
        ratio(found["to_bare_range"], 1) if found["keys"] else "",
        f"{found['memory'] / 2**20:.0f} MiB",
        "" if per_key is None else f"{number(per_key)} B",
        "" if change is None else duration(change),
    )


@pytest.fixture(scope="module")
def scale(etcd: EtcdProcess, report: Report, smoke: bool) -> Iterator[Scale]:
    scale = Scale(etcd, smoke=smoke)
    yield scale
    if scale.turns:
        report.add(scale.table())


def test_scale(scale: Scale, benchmark: Any, size: int) -> None:
    found = scale.of(size)
    benchmark.group = "mount --cache until it is ready"
    replay(benchmark, tuple(turn.mount for turn in scale.turns[size]), **found)
