"""How long it takes to mount many keys, how much memory they take, and what a change costs then.

Concurrency: plain blocking calls.
"""

import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Final

from benchmarks.harness.bare import etcdctl_command, put_one_by_one, read_all
from benchmarks.harness.file_operations import value_of
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted

KEYS_PER_DIRECTORY: Final = 100
SIZES: Final = (0, 1_000, 10_000, 100_000)
MILLION: Final = 1_000_000
SMOKE_SIZES: Final = (0, 500)

CHANGES: Final = 300
"""Changes of which the cost of one is the mean."""

_TIMEOUT_S: Final = 120

DISTURBED: Final = 0.25
"""The share of its time that a process may have waited for a processor. Beside the daemon there
are only the command line and etcd, so that two processors are nearly enough."""

PATIENCE: Final = 4
"""Turns for each one that is wanted; so many must be enough."""


@dataclass(frozen=True, slots=True)
class Timed:
    """How long something took, and how long it waited for a processor meanwhile, in seconds."""

    taken: float
    waited: float

    @property
    def is_disturbed(self) -> bool:
        """Whether somebody else had the processors for part of it."""
        return self.waited > DISTURBED * self.taken


@dataclass(frozen=True, slots=True)
class Turn:
    """A bare Range and a mount of the same keys, one after the other; memory in bytes."""

    bare: Timed
    mount: Timed
    memory: int

    @property
    def ratio(self) -> float:
        """How many times a bare Range the mount took."""
        return self.mount.taken / self.bare.taken


def key_names(prefix: bytes, count: int) -> Iterator[bytes]:
    """Return the keys of a keyspace of that size, a hundred in each directory."""
    for number in range(count):
        yield b"%sdir-%05d/key-%07d" % (prefix, number // KEYS_PER_DIRECTORY, number)


def time_bare_range(etcd: EtcdProcess, prefix: bytes, count: int) -> Timed:
    """Return how long reading all keys into a dict takes."""
    waited, begun = _waited("thread-self"), perf_counter()
    found = read_all(etcd.endpoint, prefix)
    taken = perf_counter() - begun
    assert len(found) == count
    return Timed(taken, _waited("thread-self") - waited)


def time_etcdctl(etcd: EtcdProcess, prefix: bytes) -> float:
    """Return how long `etcdctl get --prefix` takes to print all keys and values."""
    command = [*etcdctl_command(etcd), "get", "--prefix", os.fsdecode(prefix)]
    begun = perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, timeout=_TIMEOUT_S, check=True)
    return perf_counter() - begun


@contextmanager
def mounting(etcd: EtcdProcess, prefix: bytes, count: int) -> Iterator[tuple[Mounted, Timed]]:
    """Mount with `--cache`; give the mount, and how long it took.

    That is from the start of the command to its end, when the mount is usable and complete.
    """
    begun = perf_counter()
    with Mounted(etcd, "--cache", "--prefix", os.fsdecode(prefix)) as mounted:
        taken = perf_counter() - begun
        waited = _waited(str(mounted.daemon))
        assert mounted.statistics()["mirror"]["listed_keys"] == count
        yield mounted, Timed(taken, waited)


def time_mount(etcd: EtcdProcess, prefix: bytes, count: int) -> tuple[Timed, int]:
    """Return how long mounting takes, and the daemon's memory after it in bytes."""
    with mounting(etcd, prefix, count) as (mounted, taken):
        return taken, resident(mounted.daemon)


def cost_of_change(etcd: EtcdProcess, mounted: Mounted, prefix: bytes, count: int) -> float:
    """Have another client change some keys; return the daemon's processor time for one of them.

    They are spread over all `count`. The kernel has looked up their files, so that it has to be
    told; nobody reads them afterwards.
    """
    changed = list(key_names(prefix, count))[:: max(1, count // CHANGES)][:CHANGES]
    for key in changed:
        os.stat(os.fsencode(mounted.path) + b"/" + key.removeprefix(prefix))
    daemon = mounted.daemon
    before = _processor_time(daemon)
    mounted.wait(put_one_by_one(etcd.endpoint, ((key, value_of(1)) for key in changed)))
    return (_processor_time(daemon) - before) / len(changed)


def turns(etcd: EtcdProcess, prefix: bytes, count: int) -> Iterator[Turn]:
    """Read and mount again and again."""
    while True:
        bare = time_bare_range(etcd, prefix, count)
        mount, memory = time_mount(etcd, prefix, count)
        yield Turn(bare, mount, memory)


def undisturbed(found: Iterable[Turn], wanted: int) -> list[Turn]:
    """Return so many turns in which nobody else took the processors; fewer if it never ends."""
    patient = islice(found, PATIENCE * wanted)
    quiet = (turn for turn in patient if not (turn.bare.is_disturbed or turn.mount.is_disturbed))
    return list(islice(quiet, wanted))


@contextmanager
def compiled_modules() -> Iterator[None]:
    """Let the command find its modules compiled, as those of an installed program are.

    Where Python is told not to write bytecode (containers often are), each start of a source
    tree would compile it anew, and that would be measured. Coverage is left out likewise.
    """
    unwanted = ("PYTHONDONTWRITEBYTECODE", "COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")
    before = dict(os.environ)
    with TemporaryDirectory(prefix="etcdfs-bench-pyc-") as directory:
        for name in unwanted:
            os.environ.pop(name, None)
        os.environ["PYTHONPYCACHEPREFIX"] = directory
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _waited(task: str) -> float:
    """Return how long a task has waited for a processor so far; 0 where that is not counted."""
    try:
        return int(Path(f"/proc/{task}/schedstat").read_text().split()[1]) / 1e9
    except FileNotFoundError:  # a kernel without it (CONFIG_SCHED_INFO)
        return 0.0


def _processor_time(pid: int) -> float:
    """Return the processor time of a process in seconds, all its threads."""
    # What clock_getcpuclockid(3) returns, which Python lacks. /proc/PID/stat counts whole ticks.
    return time.clock_gettime((~pid << 3) | 2)


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "VmRSS":
            return int(rest.split()[0]) * 1024
    raise ProcessLookupError(pid)
