"""From a put until another program sees it: through a mount, and by a watch."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any, Final, final

import pytest

from benchmarks.harness.bare import fill
from benchmarks.harness.figures import Figures, Report, Table, duration, number, ratio, slowest
from benchmarks.harness.file_operations import value_of
from benchmarks.harness.observer import Observer, observing
from benchmarks.harness.propagation import Sight, Writer
from benchmarks.harness.replay import replay, replayed_time
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted

pytestmark = [pytest.mark.benchmark(timer=replayed_time), pytest.mark.timeout(600)]

READING, POLLING, WATCHING = READERS = ("woken, open+read", "open+read in a loop", "raw watch")
PREFIX: Final = b"/propagation/"
WATCHED: Final = b"/propagation-watched"
"""Outside of the mount's prefix, so that the mount does not follow this one, too."""
TURNS, PUTS, WARM_UP = 20, 50, 20
SMOKE_TURNS, SMOKE_PUTS, SMOKE_WARM_UP = 2, 3, 1
LIMIT: Final = 3.0
"""Issue 3: since the put was sent, at most so many times what a raw watch takes."""


@final
class Propagation:
    """Puts in turns for one observer after the other."""

    def __init__(
        self, writer: Writer, mounted: Mounted, reader: Observer, watcher: Observer, *, smoke: bool
    ) -> None:
        self._writer = writer
        self._path = mounted.path / "read"
        self._reader = reader
        self._watcher = watcher
        self._turns = SMOKE_TURNS if smoke else TURNS
        self._puts = SMOKE_PUTS if smoke else PUTS
        self._warm_up = SMOKE_WARM_UP if smoke else WARM_UP
        self._sights: dict[str, list[Sight]] = {}

    @property
    def is_measured(self) -> bool:
        return bool(self._sights)

    def since_sent(self, reader: str) -> Figures:
        return Figures(tuple(sight.seen - sight.sent for sight in self._of(reader)))

    def since_answered(self, reader: str) -> Figures:
        return Figures(tuple(sight.seen - sight.answered for sight in self._of(reader)))

    def _of(self, reader: str) -> list[Sight]:
        if not self._sights:
            self._see(self._warm_up)
            self._sights = {name: [] for name in READERS}
            for _ in range(self._turns):
                for name, sights in self._see(self._puts).items():
                    self._sights[name] += sights
        return self._sights[reader]

    def _see(self, puts: int) -> dict[str, list[Sight]]:
        key = PREFIX + b"read"
        return {
            READING: self._writer.seen_by_reader(self._reader, key, puts),
            WATCHING: self._writer.seen_by_watcher(self._watcher, WATCHED, puts),
            POLLING: self._writer.seen_by_polling(self._path, key, puts),
        }

    def table(self) -> Table:
        rows: list[tuple[str, ...]] = []
        for since, figures in (
            ("etcd answered", self.since_answered),
            ("it was sent", self.since_sent),
        ):
            base = figures(WATCHING).p50
            for index, reader in enumerate(READERS):
                found = figures(reader)
                rows.append(
                    (
                        "" if index else since,
                        reader,
                        str(len(found.samples)),
                        duration(found.p50),
                        slowest(found),
                        ratio(found.p50, base),
                    )
                )
        return Table(
            "Propagation: from a put until its value is seen",
            ("since", "seen by", "puts", "p50", "p99", "/watch"),
            tuple(rows),
            (
                "",
                f"Wanted: at most {number(LIMIT)}x since it was sent, for the reader that is woken."
                " Below zero: the watch brought it before etcd's answer to the writer.",
            ),
        )


@pytest.fixture(scope="module")
def propagation(etcd: EtcdProcess, report: Report, smoke: bool) -> Iterator[Propagation]:
    revision = fill(etcd.endpoint, [(PREFIX + b"read", value_of(0))])
    client = (etcd.endpoint.host, str(etcd.endpoint.port))
    with (
        closing(Writer(etcd.endpoint, revision)) as writer,
        Mounted(etcd, "--cache", "--prefix", PREFIX.decode()) as mounted,
        observing("read", str(mounted.path), "read") as reader,
        observing("watch", *client, WATCHED.decode()) as watcher,
    ):
        found = Propagation(writer, mounted, reader, watcher, smoke=smoke)
        yield found
        if found.is_measured:
            report.add(found.table())


@pytest.mark.parametrize("reader", READERS)
def test_propagation(propagation: Propagation, benchmark: Any, reader: str) -> None:
    since_sent, since_answered = propagation.since_sent(reader), propagation.since_answered(reader)
    benchmark.group = "propagation, since the put was sent"
    replay(
        benchmark,
        since_sent.samples,
        p50=since_sent.p50,
        p99=since_sent.p99,
        p50_since_answered=since_answered.p50,
        p99_since_answered=since_answered.p99,
    )
