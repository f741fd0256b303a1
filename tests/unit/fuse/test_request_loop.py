"""Who reads the next request, with the loop that pyfuse3's tasks run (`_session_loop`)."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pyfuse3
import pytest
import trio
import trio.testing

from etcdfs.fuse.fastpath import few_turns


async def at_once() -> None:
    """Answer a request without waiting."""


@dataclass
class Kernel:
    """Requests that tasks take turns to read; `readers` says which task read each."""

    readers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        trio_of_pyfuse3 = vars(pyfuse3)["trio"]
        self.lock = trio_of_pyfuse3.Lock()
        self._send, self._receive = trio.open_memory_channel[Callable[[], Awaitable[None]]](9)

    async def loop(self, name: str) -> None:
        while True:
            async with self.lock:
                try:
                    request = await self._receive.receive()
                except trio.EndOfChannel:
                    request = None
            if request is None:
                return
            self.readers.append(name)
            await request()

    async def ask(self, request: Callable[[], Awaitable[None]]) -> None:
        await self._send.send(request)
        await trio.testing.wait_all_tasks_blocked()

    def end(self) -> None:
        self._send.close()


@pytest.fixture
async def kernel() -> AsyncIterator[Kernel]:
    with few_turns():
        yield Kernel()


async def start(nursery: trio.Nursery, kernel: Kernel) -> None:
    for name in ("a", "b", "c"):
        nursery.start_soon(kernel.loop, name)
        await trio.testing.wait_all_tasks_blocked()


async def test_who_answers_at_once_goes_on_reading(kernel: Kernel) -> None:
    async with trio.open_nursery() as nursery:
        await start(nursery, kernel)
        for _ in range(4):
            await kernel.ask(at_once)
        nursery.cancel_scope.cancel()
    assert kernel.readers == ["a"] * 4


async def test_who_waits_lets_another_read(kernel: Kernel) -> None:
    answered = trio.Event()
    async with trio.open_nursery() as nursery:
        await start(nursery, kernel)
        await kernel.ask(answered.wait)
        await kernel.ask(at_once)
        await kernel.ask(answered.wait)
        await kernel.ask(at_once)
        answered.set()
        await trio.testing.wait_all_tasks_blocked()
        await kernel.ask(at_once)
        nursery.cancel_scope.cancel()
    assert kernel.readers == ["a", "b", "b", "c", "c"]


async def test_all_hear_of_the_end(kernel: Kernel) -> None:
    """Who has read it ends, and never comes back for the lock."""
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await start(nursery, kernel)
            kernel.end()


async def test_who_is_cancelled_takes_nothing_along(kernel: Kernel) -> None:
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as first:
            first.start_soon(kernel.loop, "a")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(kernel.loop, "b")
            nursery.start_soon(kernel.loop, "c")
            await trio.testing.wait_all_tasks_blocked()
            first.cancel_scope.cancel()
        await kernel.ask(at_once)
        nursery.cancel_scope.cancel()
    assert kernel.readers in (["b"], ["c"])
