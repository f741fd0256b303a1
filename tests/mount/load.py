"""More than usual: bursts, a hot key, large transactions and storms of readers, on one mount.

Knows: how to make load of a given size, and what must hold during and after it: other files go on
being answered, nothing is torn or older than before, memory stays bounded, and in the end the mount
shows what etcd has. Sizes are parameters: tests take small ones, a soak may take large ones.

Concurrency: threads and processes that each do one thing; every wait is bounded.
"""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
from aetcd import rpc

from benchmarks.harness.bare import PUTS_AT_ONCE, fill
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted

PATIENCE_S = 40.0
GROWTH_MAX = 64 << 20
"""Bytes by which the daemon may grow under load that changes keys and adds none. What waits is
bounded by about 16 MiB of values, and each version read is forgotten again."""

READER = """
import sys
path, count = sys.argv[1], int(sys.argv[2])
last = -1
for _ in range(count):
    with open(path, "rb", buffering=0) as file:
        value = file.read()
    number, _, rest = value.partition(b" ")
    assert rest == number * 50, "torn"
    assert int(number) >= last, "older than what was read before"
    last = int(number)
"""
"""Reads a file again and again; run without site, as many of them are started at once."""


def value_of(number: int) -> bytes:
    """Return a value that shows when it is torn."""
    return b"%d " % number + b"%d" % number * 50


def burst(etcd: EtcdProcess, mounted: Mounted, *, keys: int, rounds: int) -> None:
    """Change many keys that the kernel knows, as fast as etcd takes it."""
    prefix, names = b"/burst/", [b"%06d" % number for number in range(keys)]
    mounted.wait(fill(etcd.endpoint, ((prefix + name, value_of(0)) for name in names)))
    directory = mounted.path / "burst"
    for name in names:
        os.stat(directory / os.fsdecode(name))
    with under_load(mounted):
        for number in range(1, rounds + 1):
            fill(etcd.endpoint, ((prefix + name, value_of(number)) for name in names))
        mounted.wait(fill(etcd.endpoint, [(prefix + b"last", b"")]))
    for name in names:
        assert (directory / os.fsdecode(name)).read_bytes() == value_of(rounds)


def hot_key(etcd: EtcdProcess, mounted: Mounted, *, updates: int) -> None:
    """Update one key again and again, with a reader that holds on to what it sees."""
    mounted.wait(fill(etcd.endpoint, [(b"/hot/key", value_of(0))]))
    path = mounted.path / "hot" / "key"
    revision = 0
    with under_load(mounted), kv(etcd) as client:
        with reading(path, until=updates):
            for number in range(1, updates + 1):
                put = rpc.PutRequest(key=b"/hot/key", value=value_of(number))
                revision = client.Put(put, timeout=PATIENCE_S).header.revision
        mounted.wait(revision)
        assert path.read_bytes() == value_of(updates)


def large_transactions(etcd: EtcdProcess, mounted: Mounted, *, keys: int, times: int) -> None:
    """Change many keys in one revision; whoever sees one of them changed sees all."""
    assert keys <= PUTS_AT_ONCE
    names = [b"/txn/%d/%d" % (number % 7, number) for number in range(keys)]
    mounted.wait(fill(etcd.endpoint, ((name, value_of(0)) for name in names)))
    first, last = (mounted.path / os.fsdecode(name[1:]) for name in (names[0], names[-1]))

    def look(_: int) -> None:
        newer = number_in(first)
        assert number_in(last) >= newer, "part of a revision"
        newer = number_in(last)
        assert number_in(first) >= newer, "part of a revision"

    with under_load(mounted), repeating(look):
        for number in range(1, times + 1):
            mounted.wait(fill(etcd.endpoint, ((name, value_of(number)) for name in names)))
    for name in names:
        assert number_in(mounted.path / os.fsdecode(name[1:])) == times


def reader_storm(
    etcd: EtcdProcess, mounted: Mounted, *, processes: int, reads: int, updates: int
) -> None:
    """Have many processes read one file that changes all the time."""
    mounted.wait(fill(etcd.endpoint, [(b"/storm/key", value_of(0))]))
    path = mounted.path / "storm" / "key"
    command = [sys.executable, "-I", "-S", "-c", READER, str(path), str(reads)]
    revision = 0
    with under_load(mounted), kv(etcd) as client:
        readers = [subprocess.Popen(command) for _ in range(processes)]
        try:
            for number in range(1, updates + 1):
                put = rpc.PutRequest(key=b"/storm/key", value=value_of(number))
                revision = client.Put(put, timeout=PATIENCE_S).header.revision
            mounted.wait(revision)
            assert [reader.wait(PATIENCE_S) for reader in readers] == [0] * processes
        finally:
            for reader in readers:
                reader.kill()
                reader.wait()
    assert path.read_bytes() == value_of(updates)


# --- what must hold meanwhile ---------------------------------------------------------------


@contextlib.contextmanager
def under_load(mounted: Mounted) -> Iterator[None]:
    """See that requests are answered during the body, and that little is kept after it."""
    before = resident(mounted)
    answered = 0

    def ask(number: int) -> None:
        nonlocal answered
        # A name that nobody asked for yet is a request; the kernel cannot answer it.
        begun = monotonic()
        assert not (mounted.path / f"missing-{os.getpid()}-{number}-{begun}").exists()
        assert monotonic() - begun < PATIENCE_S / 2
        answered += 1

    with repeating(ask):
        yield
    assert answered, "nobody was answered meanwhile"
    kernel = mounted.statistics()["kernel"]
    assert kernel["waiting"] <= 1, "the kernel's queue does not come to its end"
    assert resident(mounted) - before < GROWTH_MAX


@contextlib.contextmanager
def repeating(function: Callable[[int], None]) -> Iterator[None]:
    """Call a function again and again during the body; what it raises ends the test."""
    done = threading.Event()

    def run() -> None:
        number = 0
        while not done.is_set():
            function(number)
            number += 1

    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(run)
        try:
            yield
        finally:
            done.set()
        future.result(PATIENCE_S)


@contextlib.contextmanager
def reading(path: Path, *, until: int) -> Iterator[None]:
    """Read a file during the body: never older, never newer than anybody has put."""
    last = 0

    def look(_: int) -> None:
        nonlocal last
        number = number_in(path)
        assert last <= number <= until
        last = number

    with repeating(look):
        yield


def number_in(path: Path) -> int:
    """Return which value a file has; it must be whole."""
    value = path.read_bytes()
    number = int(value.partition(b" ")[0])
    assert value == value_of(number), "torn"
    return number


def resident(mounted: Mounted) -> int:
    """Return the resident memory of the daemon in bytes."""
    lines: Iterable[str] = Path(f"/proc/{mounted.daemon}/status").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith("VmRSS:"))
    return int(found.split()[1]) * 1024


@contextlib.contextmanager
def kv(etcd: EtcdProcess) -> Iterator[Any]:
    """Yield the plain stub of a client of its own."""
    with grpc.insecure_channel(str(etcd.endpoint)) as channel:
        yield rpc.KVStub(channel)
