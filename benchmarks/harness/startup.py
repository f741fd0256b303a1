"""How long it takes to mount many keys, and how much memory they take.

Concurrency: plain blocking calls.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Final

from benchmarks.harness.bare import read_all
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted

KEYS_PER_DIRECTORY: Final = 100
SIZES: Final = (0, 10_000, 100_000)
SMOKE_SIZES: Final = (0, 500)


def key_names(prefix: bytes, count: int) -> Iterator[bytes]:
    """Return the keys of a keyspace of that size, a hundred in each directory."""
    for number in range(count):
        yield b"%sdir-%05d/key-%07d" % (prefix, number // KEYS_PER_DIRECTORY, number)


def time_bare_range(etcd: EtcdProcess, prefix: bytes, count: int) -> float:
    """Return how long reading all keys into a dict takes."""
    begun = perf_counter()
    found = read_all(etcd.endpoint, prefix)
    taken = perf_counter() - begun
    assert len(found) == count
    return taken


def time_mount(etcd: EtcdProcess, prefix: bytes, count: int) -> tuple[float, int]:
    """Return how long `etcdfs mount --cache` takes, and the daemon's memory after it in bytes.

    That is from the start of the command to its end, when the mount is usable and complete.
    """
    begun = perf_counter()
    with Mounted(etcd, "--cache", "--prefix", os.fsdecode(prefix)) as mounted:
        taken = perf_counter() - begun
        assert mounted.statistics()["mirror"]["listed_keys"] == count
        return taken, _resident(mounted.daemon)


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


def _resident(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "VmRSS":
            return int(rest.split()[0]) * 1024
    raise ProcessLookupError(pid)
