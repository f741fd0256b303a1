"""What is written: one file after the other, by many at once, and trees that are copied."""

import asyncio
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any, Final, final

import aetcd
import pytest

from benchmarks.harness.figures import Figures, Report, Table, duration, ratio, slowest
from benchmarks.harness.file_operations import value_of
from benchmarks.harness.replay import replay, replayed_time
from benchmarks.harness.sampling import Plan, in_turns, timed
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted

pytestmark = [pytest.mark.benchmark(timer=replayed_time), pytest.mark.timeout(600)]

PREFIX: Final = "/writes/"
PLAN: Final = Plan(turns=40, calls=25, warm_up=20, counted=0)
SMOKE_PLAN: Final = Plan(turns=2, calls=2, warm_up=2, counted=0)

WRITERS: Final = 32
ROUNDS, PUTS = 4, 50
SMOKE_ROUNDS, SMOKE_PUTS = 1, 2

FILES, SMOKE_FILES = 5_000, 20
IN_A_DIRECTORY: Final = 50
_TIMEOUT_S: Final = 300


@final
class RawClients:
    """Clients of etcd on one event loop, each with a connection of its own."""

    def __init__(self, etcd: EtcdProcess) -> None:
        self._runner = asyncio.Runner()
        self._clients: list[Any] = [
            aetcd.Client(etcd.endpoint.host, etcd.endpoint.port, timeout=_TIMEOUT_S)
            for _ in range(WRITERS)
        ]
        self._runner.run(self._connect())
        self._numbers = itertools.count(1)

    async def _connect(self) -> None:
        for client in self._clients:
            await client.connect()

    def close(self) -> None:
        self._runner.run(self._end())
        self._runner.close()

    async def _end(self) -> None:
        for client in self._clients:
            await client.close()

    def one_after_the_other(self, puts: int) -> list[float]:
        """Put one key so many times; return how long each put took."""
        return self._runner.run(self._put(0, puts))

    def at_once(self, puts: int) -> float:
        """Have all clients put so many times each; return how many puts there were in a second."""
        begun = perf_counter()
        self._runner.run(self._put_all(puts))
        return WRITERS * puts / (perf_counter() - begun)

    async def _put_all(self, puts: int) -> None:
        await asyncio.gather(*(self._put(number, puts) for number in range(WRITERS)))

    async def _put(self, number: int, puts: int) -> list[float]:
        taken: list[float] = []
        for _ in range(puts):
            begun = perf_counter()
            await self._clients[number].put(b"/raw/%d" % number, value_of(next(self._numbers)))
            taken.append(perf_counter() - begun)
        return taken


@final
class Files:
    """Files of a mount that are written."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._numbers = itertools.count(1)

    def replace(self) -> None:
        """Write a file that is there."""
        self._write("written", os.O_TRUNC)

    def create(self) -> None:
        """Write one that is not."""
        self._write(f"new-{next(self._numbers)}", 0)

    def at_once(self, puts: int) -> float:
        """Have as many threads write a file each so many times; return writes in a second."""

        def write(number: int) -> None:
            for _ in range(puts):
                self._write(f"many-{number}", os.O_TRUNC)

        begun = perf_counter()
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write, range(WRITERS)))
        return WRITERS * puts / (perf_counter() - begun)

    def _write(self, name: str, flags: int) -> None:
        fd = os.open(self._root / name, os.O_WRONLY | os.O_CREAT | flags, 0o644)
        os.write(fd, value_of(next(self._numbers)))
        os.close(fd)


@pytest.fixture(scope="module")
def mounted(etcd: EtcdProcess) -> Iterator[Mounted]:
    with Mounted(etcd, "--cache", "--prefix", PREFIX) as found:
        yield found


def test_writes(
    etcd: EtcdProcess, mounted: Mounted, report: Report, smoke: bool, benchmark: Any
) -> None:
    with closing(RawClients(etcd)) as raw:
        files = Files(mounted.path)
        samplers = {
            "raw put": raw.one_after_the_other,
            "write+close": timed(files.replace),
            "create+write+close": timed(files.create),
        }
        figures = in_turns(samplers, SMOKE_PLAN if smoke else PLAN)
        rounds, puts = (SMOKE_ROUNDS, SMOKE_PUTS) if smoke else (ROUNDS, PUTS)
        rates = [(raw.at_once(puts), files.at_once(puts)) for _ in range(rounds)]
    base = figures["raw put"].p50
    replay(
        benchmark,
        figures["write+close"].samples,
        to_raw={name: found.p50 / base for name, found in figures.items()},
        writes_at_once=rates,
    )
    report.add(
        Table(
            "Writes: one after the other, in turns with puts of a raw client",
            ("", "calls", "p50", "p99", "/raw"),
            tuple(_row(name, found, base) for name, found in figures.items()),
            ("", "Wanted: at most 2x."),
            name="writes",
            figures=tuple(
                {"name": name, "p50": found.p50, "to_raw": found.p50 / base}
                for name, found in figures.items()
            ),
        )
    )
    report.add(_at_once(rates))


def _row(name: str, found: Figures, base: float) -> tuple[str, ...]:
    calls = str(len(found.samples))
    return (name, calls, duration(found.p50), slowest(found), ratio(found.p50, base))


def _at_once(rates: Sequence[tuple[float, float]]) -> Table:
    raw, mount = (sorted(rate)[len(rates) // 2] for rate in zip(*rates, strict=True))
    return Table(
        f"Writes by {WRITERS} at once",
        ("", "writes/s", "/raw"),
        (
            (f"{WRITERS} raw clients, a connection each", f"{raw:.0f}", "1x"),
            (f"{WRITERS} threads, a file each", f"{mount:.0f}", ratio(mount, raw)),
        ),
        ("", "Wanted: at least 0.7x."),
        name="writes at once",
        figures=({"raw": raw, "mount": mount, "to_raw": mount / raw},),
    )


def test_trees(
    mounted: Mounted, report: Report, smoke: bool, benchmark: Any, tmp_path: Path
) -> None:
    """A tree of small files is copied in, and out."""
    files = SMOKE_FILES if smoke else FILES
    source, out = tmp_path / "source", tmp_path / "out"
    for number in range(files):
        path = source / f"{number // IN_A_DIRECTORY:03}" / f"{number:05}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value_of(number))
    copied = mounted.path / "tree"
    taken = {
        "cp -r to tmp": _run("cp", "-r", str(source), str(tmp_path / "copy")),
        "cp -r in": _run("cp", "-r", str(source), str(copied)),
        "cp -r out": _run("cp", "-r", str(copied), str(out)),
    }
    if shutil.which("rsync") is not None:
        taken["rsync -r in"] = _run("rsync", "-r", f"{source}/", f"{mounted.path}/synced/")
        taken["rsync -r out"] = _run("rsync", "-r", f"{copied}/", f"{tmp_path}/synced/")
    assert sum(len(names) for _, _, names in os.walk(out)) == files
    replay(benchmark, (taken["cp -r in"],), files=files, **taken)
    report.add(
        Table(
            f"A tree of {files} files, {IN_A_DIRECTORY} in a directory",
            ("", "", "time", "a file"),
            tuple((name, "", duration(s), duration(s / files)) for name, s in taken.items()),
            () if len(taken) > 3 else ("", "There is no rsync here."),
            name="trees",
            figures=tuple({"name": name, "seconds": s} for name, s in taken.items()),
        )
    )


def _run(*command: str) -> float:
    begun = perf_counter()
    subprocess.run(command, check=True, timeout=_TIMEOUT_S)
    return perf_counter() - begun
