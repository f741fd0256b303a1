"""The targets: the same operations on tmpfs, on a mount, and as requests of a raw client.

Knows: which calls make up an operation, and which keys they work on. Does not know: how often they
are made and what is made of the figures.

Each target has its own keys below a prefix of its own, so that a mount's watch hears of nothing
but what happens through it.

Concurrency: plain blocking calls; the raw client has an asyncio loop that runs while it is used.
"""

import asyncio
import itertools
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Protocol, final

import aetcd

from benchmarks.harness.bare import fill
from benchmarks.harness.figures import Cost, per_call
from benchmarks.harness.sampling import Sampler, timed
from etcdfs.options import Endpoint
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted

OPERATIONS: Final = (
    "stat",
    "open+read+close",
    "pread",
    "listdir 100",
    "listdir 10 000",
    "missing name",
    "write+close",
)

VALUE_SIZE: Final = 200
SMALL: Final = 100
LARGE: Final = 10_000
_TIMEOUT_S: Final = 30


def value_of(number: int) -> bytes:
    """Return a value that no other number has."""
    return b"%0*d" % (VALUE_SIZE, number)


def layout(large: int) -> Iterator[tuple[str, bytes]]:
    """Return the names and values that every target has; `large` is the larger directory."""
    yield "read", value_of(0)
    yield "written", value_of(0)
    for directory, size in (("small", SMALL), ("large", large)):
        for number in range(size):
            yield f"{directory}/entry-{number:05d}", value_of(number)


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


class _Files:
    """The operations on the files below a directory."""

    def __init__(self, root: Path) -> None:
        self._read = os.fspath(root / "read")
        self._written = os.fspath(root / "written")
        self._small = os.fspath(root / "small")
        self._large = os.fspath(root / "large")
        self._missing = os.fspath(root / "missing")
        self._opened = os.open(self._read, os.O_RDONLY)
        self._numbers = itertools.count(1)

    def close(self) -> None:
        os.close(self._opened)

    def call(self, operation: str) -> Callable[[], object]:
        calls: dict[str, Callable[[], object]] = {
            "stat": self._stat,
            "open+read+close": self._open_read_close,
            "pread": self._pread,
            "listdir 100": self._list_small,
            "listdir 10 000": self._list_large,
            "missing name": self._stat_missing,
            "write+close": self._write_close,
        }
        return calls[operation]

    def _stat(self) -> None:
        os.stat(self._read)

    def _open_read_close(self) -> None:
        # Not `open()`: it asks for the size and sets up buffers, which says nothing of a file
        # system.
        fd = os.open(self._read, os.O_RDONLY)
        os.read(fd, 4096)
        os.close(fd)

    def _pread(self) -> None:
        os.pread(self._opened, 4096, 0)

    def _list_small(self) -> None:
        os.listdir(self._small)

    def _list_large(self) -> None:
        os.listdir(self._large)

    def _stat_missing(self) -> None:
        try:
            os.stat(self._missing)
        except FileNotFoundError:
            return
        raise AssertionError("it is there")

    def _write_close(self) -> None:
        fd = os.open(self._written, os.O_WRONLY | os.O_TRUNC)
        os.write(fd, value_of(next(self._numbers)))
        os.close(fd)


@final
class TmpfsTarget:
    """Files in memory: as fast as files get here."""

    name = "tmpfs"

    def __init__(self, root: Path, large: int) -> None:
        """Make the files in the empty directory `root`."""
        self._root = root
        for name, value in layout(large):
            path = root / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(value)
        self._files = _Files(root)

    def sampler(self, operation: str) -> Sampler:
        return timed(self._files.call(operation))

    def cost(self, operation: str, calls: int) -> Cost:
        return Cost()

    def close(self) -> None:
        self._files.close()
        shutil.rmtree(self._root)


@final
class MountTarget:
    """Files of a mount."""

    def __init__(self, etcd: EtcdProcess, mode: str, large: int) -> None:
        """Put the keys and mount them; `mode` is `--cache` or `--no-cache`."""
        self.name = mode
        prefix = f"/bench{mode}/"
        fill(etcd.endpoint, ((f"{prefix}{name}".encode(), v) for name, v in layout(large)))
        self._mounted = Mounted(etcd, mode, "--prefix", prefix)
        try:
            self._files = _Files(self._mounted.path)
        except BaseException:
            self._mounted.close()
            raise

    def sampler(self, operation: str) -> Sampler:
        return timed(self._files.call(operation))

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

    name = "raw client"

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
            "stat": self._get,
            "open+read+close": self._get,
            "pread": self._get,
            "listdir 100": self._list_small,
            "listdir 10 000": self._list_large,
            "missing name": self._get_missing,
            "write+close": self._put,
        }
        call = calls[operation]
        return lambda count: self._runner.run(_timed(call, count))

    def cost(self, operation: str, calls: int) -> Cost:
        return Cost(etcd=1.0)

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    async def _get(self) -> None:
        assert await self._client.get(self._prefix + b"read")

    async def _get_missing(self) -> None:
        assert await self._client.get(self._prefix + b"missing") is None

    async def _put(self) -> None:
        await self._client.put(self._prefix + b"written", value_of(next(self._numbers)))

    async def _list_small(self) -> list[bytes]:
        return await self._list(b"small/")

    async def _list_large(self) -> list[bytes]:
        return await self._list(b"large/")

    async def _list(self, directory: bytes) -> list[bytes]:
        found = await self._client.get_prefix(self._prefix + directory, keys_only=True)
        return [entry.key for entry in found.kvs]


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
