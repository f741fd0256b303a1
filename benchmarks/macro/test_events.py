"""From a put until inotify tells of it, and what telling costs."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Final

import pytest

from benchmarks.harness.figures import Figures, Report, Table, duration, ratio, slowest
from benchmarks.harness.replay import replay, replayed_time
from tests.mount.client import Client
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted
from tests.support.watcher import EVENTS, Watcher

pytestmark = [pytest.mark.benchmark(timer=replayed_time), pytest.mark.timeout(600)]

PREFIX: Final = b"/events/"
KEY: Final = PREFIX + b"d/f"
PUTS, SMOKE_PUTS = 400, 5
TMPFS, MOUNT = TARGETS = ("tmpfs, written to here", "--cache, after etcd's answer")
NAMES: Final = 64
RATE: Final = 1000
SECONDS, SMOKE_SECONDS = 5.0, 0.2
LOADS: Final = (
    ("nobody watches, --inotify off", "off", False),
    ("nobody watches, --inotify auto", "auto", False),
    ("somebody watches it", "auto", True),
)


def test_latency(
    etcd: EtcdProcess, report: Report, smoke: bool, benchmark: Any, tmp_path: Path
) -> None:
    """Writer and listener are one process, which waits for the event after each write."""
    puts = SMOKE_PUTS if smoke else PUTS
    with TemporaryDirectory(dir="/dev/shm") as home:
        local = Path(home)
        samples = _heard(local, lambda name, value: (local / name).write_bytes(value), puts)
        found = {TMPFS: Figures(tuple(samples))}
    with (
        closing(Client(etcd.endpoint)) as client,
        Mounted(etcd, "--cache", "--prefix", PREFIX.decode()) as mounted,
    ):
        mounted.wait(client.put(KEY, b"0"))

        def put(name: str, value: bytes) -> object:
            return client.put(PREFIX + b"d/" + name.encode(), value)

        samples = _heard(mounted.path / "d", put, puts)
        found[MOUNT] = Figures(tuple(samples))
    replay(benchmark, found[MOUNT].samples, p50=found[MOUNT].p50, p99=found[MOUNT].p99)
    base = found[TMPFS].p50
    report.add(
        Table(
            "Events: from a write until inotify's CLOSE_WRITE",
            ("on", "since", "writes", "p50", "p99", "/tmpfs"),
            tuple(
                (name, "it returned", str(puts), duration(f.p50), slowest(f), ratio(f.p50, base))
                for name, f in found.items()
            ),
            ("", "On tmpfs the event is there before the write returns: that is reading it."),
            name="events",
            figures=tuple({"on": name, "p50": f.p50, "p99": f.p99} for name, f in found.items()),
        )
    )


def _heard(directory: Path, write: Callable[[str, bytes], object], writes: int) -> Iterator[float]:
    """Write to one file after the other: changes of one name are told every 40 ms only."""
    with Watcher(directory, mask=EVENTS["CLOSE_WRITE"]) as watcher:
        for number in range(-NAMES, writes):  # each is made first
            name = f"f{number % NAMES}"
            write(name, b"%d" % number)
            written = perf_counter()
            watcher.until(f"CLOSE_WRITE {name}")
            if number >= 0:
                yield perf_counter() - written


def test_cost_of_a_hot_key(etcd: EtcdProcess, report: Report, smoke: bool, benchmark: Any) -> None:
    """The daemon's processor time while one key is put a thousand times a second."""
    seconds = SMOKE_SECONDS if smoke else SECONDS
    shares = {name: _share(etcd, inotify, seconds, w) for name, inotify, w in LOADS}
    replay(benchmark, tuple(share for share, _ in shares.values()), shares=str(shares))
    report.add(
        Table(
            f"Events: what one key costs that is put {RATE} times a second",
            ("mount", "", "puts a second", "of a core", "for each put"),
            tuple(
                (
                    name,
                    "",
                    f"{puts / seconds:.0f}",
                    f"{share:.1%}",
                    duration(share * seconds / puts),
                )
                for name, (share, puts) in shares.items()
            ),
            ("", "Wanted: that somebody watches costs no more than 10 % of a core."),
            name="events-cost",
            figures=tuple({"mount": name, "share": share} for name, (share, _) in shares.items()),
        )
    )


def _share(etcd: EtcdProcess, inotify: str, seconds: float, watched: bool) -> tuple[float, int]:
    """Return which share of a core the daemon takes, the kernel's work included, and the puts."""
    with (
        Mounted(etcd, "--cache", "--prefix", PREFIX.decode(), "--inotify", inotify) as mounted,
        closing(Client(etcd.endpoint)) as client,
    ):
        mounted.wait(client.put(KEY, b"0"))
        path = mounted.path / "d/f"
        path.read_bytes()
        with _listening(path.parent) if watched else _nobody():
            daemon = mounted.daemon
            before, begun, puts = _cpu_s(daemon), perf_counter(), 0
            while (now := perf_counter() - begun) < seconds:
                if puts < now * RATE:
                    puts += 1
                    client.put(KEY, b"%d" % puts)
            return (_cpu_s(daemon) - before) / now, puts


@contextmanager
def _nobody() -> Iterator[None]:
    yield


@contextmanager
def _listening(directory: Path) -> Iterator[None]:
    """Have another process listen."""
    code = (
        "import sys; from pathlib import Path; from tests.support.watcher import Watcher\n"
        "with Watcher(Path(sys.argv[1])) as watcher:\n"
        "    print('listening', flush=True)\n"
        "    while True: watcher._read(60); watcher.seen.clear()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
