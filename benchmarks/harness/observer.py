"""Programs that wait for a change and say when they have seen it; each a process of its own.

Knows: how a reader of a mount and a client of etcd hear of a change. Does not know: who puts, and
why.

Run as `python -m benchmarks.harness.observer read MOUNT NAME` or `... watch HOST PORT KEY`.

    parent                           observer
      |  -- revision --------------->  |      `read` only: what to wait for
      |  <-- the time of its sight --  |      of one change, in seconds of the system's clock

Concurrency: plain blocking calls; the watcher has an asyncio loop.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter  # CLOCK_MONOTONIC: the same for all processes
from typing import Any, Final, final

import aetcd

_END_TIMEOUT_S: Final = 30


@final
class Observer:
    """A running observer. Owned by whoever started it."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self.heard()  # that it is ready

    def expect(self, revision: int) -> None:
        """Have a reader wait for a revision."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d\n" % revision)
        self._process.stdin.flush()

    def heard(self) -> float:
        """Wait for the next line; return the time it tells."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the observer has died"
        return float(line)


@contextmanager
def observing(*arguments: str) -> Iterator[Observer]:
    """Run an observer, and end it."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield Observer(process)
    finally:
        process.kill()
        process.communicate(timeout=_END_TIMEOUT_S)


def _say(when: float) -> None:
    sys.stdout.write(f"{when!r}\n")
    sys.stdout.flush()


def read(mount: str, name: str) -> None:
    """For each revision asked for: wait until the mount shows it, then open and read the file."""
    path = os.path.join(mount, name)
    _say(0)
    for line in sys.stdin:
        os.getxattr(mount, f"user.etcdfs.wait.{int(line)}")
        fd = os.open(path, os.O_RDONLY)
        os.read(fd, 4096)
        seen = perf_counter()
        os.close(fd)
        _say(seen)


async def watch(host: str, port: str, key: str) -> None:
    """For each event of a key: say when it came."""
    client: Any = aetcd.Client(host, int(port))
    found = await client.watch(os.fsencode(key))
    _say(0)
    async for _event in found:
        _say(perf_counter())


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    if kind == "read":
        read(*rest)
    else:
        asyncio.run(watch(*rest))
