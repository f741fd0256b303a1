"""How long a change takes from etcd's answer to the eyes of a reader.

What this room knows: how to put a key and find out when somebody sees it. The writer and the
reader are one thread, so that neither takes the processor from the other: when etcd has answered
the put, the reader reads until it sees the value. A watch tells by itself, and may be faster than
the answer to the put.

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

from benchmarks.harness.targets import value_of
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
    """A client that puts, and one that watches; each has a connection of its own."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._runner = asyncio.Runner()
        self._numbers = itertools.count(1)
        # Connections with equal options would be one; the watch must not wait behind the puts.
        own = {"grpc.use_local_subchannel_pool": 1}
        self._putting: Any = aetcd.Client(
            endpoint.host, endpoint.port, timeout=_TIMEOUT_S, options=own
        )
        self._watching: Any = aetcd.Client(endpoint.host, endpoint.port, options=own)

    def close(self) -> None:
        """Close both connections."""
        self._runner.run(self._close())
        self._runner.close()

    def put(self, key: bytes) -> tuple[bytes, float, float]:
        """Put a new value; return it, when it was sent and when it was answered."""
        value = value_of(next(self._numbers))
        sent, answered = self._runner.run(self._put(key, value))
        return value, sent, answered

    def seen_by_reading(self, key: bytes, path: Path, puts: int) -> list[Sight]:
        """Put a key so many times, each time reading its file until the value is there."""
        found: list[Sight] = []
        for _ in range(puts):
            value, sent, answered = self.put(key)
            seen = _read_until(os.fspath(path), value, answered + _TIMEOUT_S)
            found.append(Sight(sent, answered, seen))
        return found

    def seen_by_watching(self, key: bytes, puts: int) -> list[Sight]:
        """Put a key so many times, each time until a watch has brought the value."""
        return self._runner.run(self._watched(key, puts))

    async def _put(self, key: bytes, value: bytes) -> tuple[float, float]:
        sent = perf_counter()
        await self._putting.put(key, value)
        return sent, perf_counter()

    async def _watched(self, key: bytes, puts: int) -> list[Sight]:
        watch = await self._watching.watch(key)
        arrivals: asyncio.Queue[tuple[bytes, float]] = asyncio.Queue()

        async def note_arrivals() -> None:
            async for event in watch:
                arrivals.put_nowait((event.kv.value, perf_counter()))

        noting = asyncio.create_task(note_arrivals())
        found: list[Sight] = []
        for _ in range(puts):
            value = value_of(next(self._numbers))
            sent, answered = await self._put(key, value)
            arrived, seen = await asyncio.wait_for(arrivals.get(), _TIMEOUT_S)
            assert arrived == value
            found.append(Sight(sent, answered, seen))
        await watch.cancel()
        await noting
        return found

    async def _close(self) -> None:
        await self._putting.close()
        await self._watching.close()


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
