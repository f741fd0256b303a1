"""An asyncio event loop under trio, for the one library that needs it (grpc.aio).

What this room knows: trio-asyncio, and what grpc.aio asks of a loop. What it must not know:
etcd. It is part of the etcd door; nothing else may import asyncio.

Concurrency: one loop per trio run, shared by everybody who opens the bridge, because grpc.aio
has one poller per process and two loops cannot both wait for its socket. The loop lives in a
system task, so that it may outlast whoever opened it first. Coroutines run on the trio thread,
between checkpoints like everything else.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, final

import trio
import trio_asyncio

log = logging.getLogger(__name__)

T = TypeVar("T")
TrioAsyncioLoop = Any
"""trio_asyncio.TrioEventLoop: it has no types."""


class CancelledElsewhereError(Exception):
    """The coroutine was cancelled, and not by the trio task that waits for it."""


@final
class Background(Generic[T]):
    """A running coroutine whose waiters may come and go without disturbing it."""

    def __init__(self, task: asyncio.Task[T]) -> None:
        self._task = task
        self._done = trio.Event()
        task.add_done_callback(self._on_done)

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._task.done()

    async def wait(self) -> T:
        """Wait for its end and return what it returned, or raise what it raised.

        Raises:
            CancelledElsewhereError: It was cancelled.
        """
        await self._done.wait()
        if self._task.cancelled():
            raise CancelledElsewhereError("cancelled")
        return self._task.result()

    async def cancel(self) -> None:
        """End it, whatever it says, and wait until it has ended."""
        self._task.cancel()
        with trio.CancelScope(shield=True):
            await self._done.wait()

    def _on_done(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # looked at: asyncio need not complain when nobody waits
        self._done.set()


@final
class Bridge:
    """The way from trio tasks to asyncio coroutines."""

    def __init__(self, loop: TrioAsyncioLoop) -> None:
        self._loop = loop

    async def run(self, function: Callable[..., Coroutine[Any, Any, T]], *arguments: object) -> T:
        """Await `function(*arguments)` on the loop; it is cancelled when the caller is.

        Raises:
            CancelledElsewhereError: Somebody else cancelled it (a channel that closes).
        """
        try:
            result: T = await self._loop.run_aio_coroutine(function(*arguments))
        except asyncio.CancelledError as exc:
            raise CancelledElsewhereError("cancelled") from exc
        return result

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Background[T]:
        """Start a coroutine that goes on when those who wait for it are cancelled."""
        return Background(self._loop.create_task(coroutine))


@dataclass(slots=True, eq=False)
class _SharedLoop:
    """The loop of this trio run, and how many hold it open."""

    loop: TrioAsyncioLoop = None
    holders: int = 0
    running: trio.Event = field(default_factory=trio.Event)
    release: trio.Event = field(default_factory=trio.Event)
    closed: trio.Event = field(default_factory=trio.Event)


_shared: trio.lowlevel.RunVar[_SharedLoop | None] = trio.lowlevel.RunVar(
    "etcdfs_asyncio_loop", default=None
)


@asynccontextmanager
async def open_bridge() -> AsyncIterator[Bridge]:
    """Enter asyncio's world; uses the trio-asyncio loop around it if there is one."""
    surrounding = trio_asyncio.current_loop.get()
    if surrounding is not None:
        yield Bridge(surrounding)
        return
    shared = await _hold()
    try:
        await shared.running.wait()
        yield Bridge(shared.loop)
    finally:
        shared.holders -= 1
        if shared.holders == 0:
            shared.release.set()
            with trio.CancelScope(shield=True):
                await shared.closed.wait()


async def _hold() -> _SharedLoop:
    """Return the loop of this run with one more holder; start it for the first."""
    while True:
        shared = _shared.get()
        if shared is None:
            shared = _SharedLoop()
            _shared.set(shared)
            trio.lowlevel.spawn_system_task(_host, shared)
        if not shared.release.is_set():
            shared.holders += 1
            return shared
        await shared.closed.wait()


async def _host(shared: _SharedLoop) -> None:
    try:
        async with trio_asyncio.open_loop() as loop:
            loop.set_exception_handler(_report)
            shared.loop = loop
            shared.running.set()
            await shared.release.wait()
        loop.call_soon_threadsafe = _drop
    finally:
        _shared.set(None)
        shared.closed.set()


def _drop(*_arguments: object, **_options: object) -> None:
    """Stand in for `call_soon_threadsafe` of the closed loop.

    The operations of cancelled calls end in gRPC's own threads, in their own time. When the
    next trio run of this process (there is one in tests) has a loop, gRPC hands over what is
    late, and would stumble over a loop that is closed. Nobody waits for it any more.
    """


def _report(_loop: TrioAsyncioLoop, context: dict[str, Any]) -> None:
    """Log what nobody caught; trio-asyncio's own handler would end the whole program."""
    log.error("asyncio: %s", context.get("message"), exc_info=context.get("exception"))
