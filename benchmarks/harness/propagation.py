"""How long a change takes until somebody sees it who is waiting for it.

Knows: how to put a key and have observers say when they saw it. An observer is a program of its
own, as a reader of a mount is: a client of etcd that watches the key, or a program that lets the
mount wake it and then reads the file. Neither does anything until the change is there, so that
nobody takes the processor from anybody.

A third one does the opposite: the writer itself reads the file again and again until it sees what
it has put. Its reads compete with the very event they wait for.

Concurrency: plain blocking calls; an asyncio loop runs inside them.
"""

import asyncio
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final, final

import aetcd

from benchmarks.harness.file_operations import value_of
from benchmarks.harness.observer import Observer
from etcdfs.options import Endpoint

_TIMEOUT_S: Final = 30


@dataclass(frozen=True, slots=True)
class Sight:
    """When a put was sent, answered, and its value seen, in seconds of one clock."""

    sent: float
    answered: float
    seen: float


@final
class Writer:
    """A client that puts, and nobody else does."""

    def __init__(self, endpoint: Endpoint, revision: int) -> None:
        """Connect to an etcd whose last revision is known."""
        self._runner = asyncio.Runner()
        self._numbers = itertools.count(1)
        self._revision = revision
        self._client: Any = aetcd.Client(endpoint.host, endpoint.port, timeout=_TIMEOUT_S)

    def close(self) -> None:
        """Close the connection."""
        self._runner.run(self._client.close())
        self._runner.close()

    def seen_by_reader(self, reader: Observer, key: bytes, puts: int) -> list[Sight]:
        """Put a key so many times, each time until a reader that was woken has read it."""
        found: list[Sight] = []
        for _ in range(puts):
            reader.expect(self._revision + 1)
            _, sent, answered = self._put(key)
            found.append(Sight(sent, answered, reader.heard()))
        return found

    def seen_by_watcher(self, watcher: Observer, key: bytes, puts: int) -> list[Sight]:
        """Put a key so many times, each time until a watch has brought it."""
        found: list[Sight] = []
        for _ in range(puts):
            _, sent, answered = self._put(key)
            found.append(Sight(sent, answered, watcher.heard()))
        return found

    def seen_by_polling(self, path: Path, key: bytes, puts: int) -> list[Sight]:
        """Put a key so many times, each time reading its file until the value is there."""
        found: list[Sight] = []
        for _ in range(puts):
            value, sent, answered = self._put(key)
            seen = _read_until(os.fspath(path), value, answered + _TIMEOUT_S)
            found.append(Sight(sent, answered, seen))
        return found

    def _put(self, key: bytes) -> tuple[bytes, float, float]:
        """Put a new value; return it, when it was sent and when it was answered."""
        value = value_of(next(self._numbers))
        sent, answered = self._runner.run(self._send(key, value))
        return value, sent, answered

    async def _send(self, key: bytes, value: bytes) -> tuple[float, float]:
        sent = perf_counter()
        answer = await self._client.put(key, value)
        answered = perf_counter()
        self._revision = answer.header.revision
        return sent, answered


def _read_until(path: str, wanted: bytes, deadline: float) -> float:
    """Return when a reader who opens the file again and again first read the value."""
    while True:
        fd = os.open(path, os.O_RDONLY)
        value = os.read(fd, 4096)
        os.close(fd)
        seen = perf_counter()
        if value == wanted:
            return seen
        if seen > deadline:
            raise TimeoutError(f"{path} does not show what etcd acknowledged")
