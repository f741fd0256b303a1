"""The targets: the same operations on tmpfs, on mounts, on a C file system, and as requests.

Knows: what each of them has to have before it is measured, and how its requests are counted. Does
not know: how often the operations are made and what is made of the figures.

Each target has its own keys below a prefix of its own, so that a mount's watch hears of nothing
but what happens through it.

Concurrency: plain blocking calls; the raw client has an asyncio loop that runs while it is used.
"""

import asyncio
import itertools
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Protocol, final

import aetcd

from benchmarks.harness.bare import etcdctl_command, fill
from benchmarks.harness.figures import Cost, per_call
from benchmarks.harness.file_operations import (
    MADE,
    MISSING,
    FileOperations,
    add_what_keys_lack,
    layout,
    make_files,
    value_of,
)
from benchmarks.harness.memfs import Memfs
from benchmarks.harness.sampling import Sampler, timed
from etcdfs.options import Endpoint
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted

TMPFS, MEMFS, RAW, ETCDCTL = "tmpfs", "C libfuse", "raw client", "etcdctl"
MODES = READ_ONLY, CACHE, NO_CACHE = "--cache --read-only", "--cache", "--no-cache"

READS: Final = (
    "stat",
    "open+read+close",
    "pread",
    "listing of 100",
    "listing of 10 000",
    "missing name",
    "readlink",
    "access",
    "getxattr, missing name",
    "getxattr, missing attribute",
)
WRITES: Final = ("write+close", "create+write+close")
OPERATIONS: Final = (*READS, *WRITES)

_COMMANDS: Final = (
    "stat",
    "open+read+close",
    "listing of 100",
    "listing of 10 000",
    "missing name",
    *WRITES,
)
TARGETS: Final = {
    TMPFS: OPERATIONS,
    READ_ONLY: READS,
    CACHE: OPERATIONS,
    NO_CACHE: OPERATIONS,
    MEMFS: OPERATIONS,
    RAW: OPERATIONS,
    ETCDCTL: _COMMANDS,
}
"""What is measured on what."""

_SLOW: Final = {NO_CACHE: 5, ETCDCTL: 25}
"""Targets that would take most of the time have so many times fewer calls."""

_MOUNTED: Final = "/bench-mounted/"
_TIMEOUT_S: Final = 30


class Target(Protocol):
    """Something that the operations can be done on."""

    name: str

    def sampler(self, operation: str) -> Sampler:
        """Return what does an operation so many times, timing each."""
        ...

    def cost(self, operation: str, calls: int) -> Cost:
        """Return what one operation costs, averaged over so many."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


@final
class TmpfsTarget:
    """Files in memory: as fast as files get here."""

    name = TMPFS

    def __init__(self, root: Path, large: int) -> None:
        """Make the files in the empty directory `root`."""
        self._root = root
        make_files(root, large)
        self._files = FileOperations(root)

    def sampler(self, operation: str) -> Sampler:
        return timed(self._files.call(operation))

    def cost(self, operation: str, calls: int) -> Cost:
        return Cost()

    def close(self) -> None:
        self._files.close()
        shutil.rmtree(self._root)


@final
class MemfsTarget:
    """Files in memory behind libfuse, in C: what requests cost when the daemon does nothing."""

    name = MEMFS

    def __init__(self, large: int) -> None:
        """Compile and mount it, and make the files.

        Raises:
            CannotCompileError: With the reason to go without.
        """
        self._memfs = Memfs()
        try:
            make_files(self._memfs.path, large)
            self._files = FileOperations(self._memfs.path)
        except BaseException:
            self._memfs.close()
            raise

    def sampler(self, operation: str) -> Sampler:
        return timed(self._files.call(operation))

    def cost(self, operation: str, calls: int) -> Cost:
        call = self._files.call(operation)
        before = self._memfs.requests()
        for _ in range(calls):
            call()
        counted = self._memfs.requests() - before
        return Cost({name: per_call(count, calls) for name, count in counted.items()})

    def close(self) -> None:
        self._files.close()
        self._memfs.close()


def put_keys(etcd: EtcdProcess, large: int) -> None:
    """Put the keys of all `MODES`."""
    with Mounted(etcd, NO_CACHE, "--prefix", _MOUNTED) as mounted:
        for mode in MODES:
            prefix = f"{_MOUNTED}{_directory(mode)}/"
            fill(etcd.endpoint, ((f"{prefix}{name}".encode(), v) for name, v in layout(large)))
            add_what_keys_lack(mounted.path / _directory(mode))


def _directory(mode: str) -> str:
    return mode.replace(" ", "")


@final
class MountTarget:
    """Files of a mount."""

    def __init__(self, etcd: EtcdProcess, mode: str) -> None:
        """Mount what `put_keys` has put for one of `MODES`."""
        self.name = mode
        self._mounted = Mounted(etcd, *mode.split(), "--prefix", f"{_MOUNTED}{_directory(mode)}/")
        try:
            self._files = FileOperations(self._mounted.path)
        except BaseException:
            self._mounted.close()
            raise

    def sampler(self, operation: str) -> Sampler:
        return _less_often(timed(self._files.call(operation)), _SLOW.get(self.name, 1))

    def cost(self, operation: str, calls: int) -> Cost:
        call = self._files.call(operation)
        with self._mounted.counting() as asking:  # what counting costs by itself
            pass
        before = self._etcd_requests()
        with self._mounted.counting() as counted:
            for _ in range(calls):
                call()
        etcd = self._etcd_requests() - before
        requests = {name: per_call(n - asking[name], calls) for name, n in counted.items()}
        return Cost({name: n for name, n in requests.items() if n > 0}, per_call(etcd, calls))

    def close(self) -> None:
        try:
            self._files.close()
        finally:
            self._mounted.close()
        self._mounted.check_log()

    def _etcd_requests(self) -> int:
        store = self._mounted.statistics()["store"]
        return int(store["ranges"]) + int(store["transactions"])


@final
class RawTarget:
    """Requests of `aetcd.Client`: what a program does that speaks to etcd itself."""

    name = RAW

    def __init__(self, endpoint: Endpoint, large: int) -> None:
        """Put the keys and connect."""
        prefix = "/bench-raw/"
        fill(endpoint, ((f"{prefix}{name}".encode(), value) for name, value in layout(large)))
        self._prefix = prefix.encode()
        self._numbers = itertools.count(1)
        self._runner = asyncio.Runner()
        self._client: Any = aetcd.Client(endpoint.host, endpoint.port, timeout=_TIMEOUT_S)
        self._runner.run(self._client.connect())

    def sampler(self, operation: str) -> Sampler:
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "listing of 100": self._list_small,
            "listing of 10 000": self._list_large,
            "missing name": self._get_missing,
            "getxattr, missing name": self._get_missing,
            "write+close": self._put,
            "create+write+close": self._put_new,
        }
        call = calls.get(operation, self._get)
        return lambda count: self._runner.run(_timed(call, count))

    def cost(self, operation: str, calls: int) -> Cost:
        return Cost(etcd=1.0)

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    async def _get(self) -> None:
        assert await self._client.get(self._prefix + b"read")

    async def _get_missing(self) -> None:
        assert await self._client.get(self._prefix + MISSING.encode()) is None

    async def _put(self) -> None:
        await self._client.put(self._prefix + b"written", value_of(next(self._numbers)))

    async def _put_new(self) -> None:
        number = next(self._numbers)
        key = b"%s%s/%07d" % (self._prefix, MADE.encode(), number)
        await self._client.put(key, value_of(number))

    async def _list_small(self) -> list[bytes]:
        return await self._list(b"small/")

    async def _list_large(self) -> list[bytes]:
        return await self._list(b"large/")

    async def _list(self, directory: bytes) -> list[bytes]:
        found = await self._client.get_prefix(self._prefix + directory, keys_only=True)
        return [entry.key for entry in found.kvs]


@final
class EtcdctlTarget:
    """The command `etcdctl`: what a shell script does; most of it is the start of a process."""

    name = ETCDCTL

    def __init__(self, etcd: EtcdProcess, large: int) -> None:
        """Put the keys."""
        self._prefix = "/bench-etcdctl/"
        fill(etcd.endpoint, ((f"{self._prefix}{name}".encode(), v) for name, v in layout(large)))
        self._command = etcdctl_command(etcd)
        self._numbers = itertools.count(1)

    def sampler(self, operation: str) -> Sampler:
        calls: dict[str, Callable[[], object]] = {
            "stat": lambda: self._get("read", "--keys-only"),
            "open+read+close": lambda: self._get("read", "--print-value-only"),
            "listing of 100": lambda: self._get("small/", "--prefix", "--keys-only"),
            "listing of 10 000": lambda: self._get("large/", "--prefix", "--keys-only"),
            "missing name": lambda: self._get(MISSING, "--keys-only"),
            "write+close": lambda: self._put("written", next(self._numbers)),
            "create+write+close": self._put_new,
        }
        return _less_often(timed(calls[operation]), _SLOW[ETCDCTL])

    def cost(self, operation: str, calls: int) -> Cost:
        return Cost(etcd=1.0)

    def close(self) -> None:
        """Do nothing: each command has ended."""

    def _get(self, name: str, *options: str) -> None:
        self._run("get", *options, self._prefix + name)

    def _put(self, name: str, number: int) -> None:
        self._run("put", self._prefix + name, value_of(number).decode())

    def _run(self, *arguments: str) -> None:
        subprocess.run(
            [*self._command, *arguments], stdout=subprocess.PIPE, timeout=_TIMEOUT_S, check=True
        )

    def _put_new(self) -> None:
        number = next(self._numbers)
        self._put(f"{MADE}/{number:07d}", number)


def _less_often(sample: Sampler, times: int) -> Sampler:
    return lambda count: sample(max(1, count // times))


async def _timed(call: Callable[[], Awaitable[object]], count: int) -> list[float]:
    """Make calls one after the other in the running loop; return how long each took."""
    taken: list[float] = []
    for _ in range(count):
        begun = perf_counter()
        await call()
        taken.append(perf_counter() - begun)
    return taken


def find_tmpfs() -> Path | None:
    """Return a writable directory on a tmpfs, if there is one."""
    with Path("/proc/self/mounts").open("rb") as mounts:
        points = [fields[1] for fields in map(bytes.split, mounts) if fields[2] == b"tmpfs"]
    usual = b"/dev/shm"
    for point in sorted(points, key=lambda found: found != usual):
        path = os.fsdecode(point)
        if os.access(path, os.W_OK | os.X_OK) and os.path.isdir(path):
            return Path(path)
    return None
