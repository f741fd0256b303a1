"""A wire that can be cut: TCP to one etcd, passed on, swallowed or refused.

Knows: bytes. Does not know: what they say.

Concurrency: an asyncio loop in a thread of its own; the methods may be called from any thread.
"""

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from enum import Enum
from typing import Any, Final, final

_CALL_S: Final = 10.0
_CHUNK: Final = 1 << 16


class Mode(Enum):
    """What becomes of bytes, and of new connections."""

    PASS = "pass"
    SWALLOW = "swallow"  # both ways: a half-open connection
    NO_REPLIES = "no replies"  # requests arrive; answers do not
    REFUSE = "refuse"  # nobody listens


@final
class Proxy:
    """One wire; `endpoint` is the end that clients take."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._mode = Mode.PASS
        self._writers: set[asyncio.StreamWriter] = set()
        self._tainted: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: asyncio.Server = self._call(self._listen())
        self.endpoint = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.endpoint}"

    def set(self, mode: Mode) -> None:
        """Go over to a mode. Connections that lost bytes end when bytes pass again."""
        self._call(self._set(mode))

    def cut(self) -> None:
        """Break every connection that there is."""
        self._call(self._cut())

    def close(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_S)
        self._loop.close()

    # --- on the loop ------------------------------------------------------------------------

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_CALL_S)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _set(self, mode: Mode) -> None:
        self._mode = mode
        if mode is Mode.REFUSE:
            await self._cut()
        if mode is Mode.PASS:
            for writer in self._tainted:
                writer.transport.abort()
            self._tainted.clear()

    async def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._tainted.clear()

    async def _close(self) -> None:
        self._server.close()
        await self._cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            if self._mode is not Mode.REFUSE:
                await self._connect(reader, writer)
        except asyncio.CancelledError:
            pass
        finally:
            writer.transport.abort()
            self._writers.discard(writer)
            self._tainted.discard(writer)
            self._tasks.discard(task)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            return
        self._writers.add(far_writer)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer, writer, replies=False))
                group.create_task(self._pump(far_reader, writer, writer, replies=True))
        except* _EndedError:
            pass
        finally:
            far_writer.transport.abort()
            self._writers.discard(far_writer)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        near: asyncio.StreamWriter,
        *,
        replies: bool,
    ) -> None:
        with suppress(OSError):
            while data := await source.read(_CHUNK):
                lost = self._mode is Mode.SWALLOW or (replies and self._mode is Mode.NO_REPLIES)
                if lost:
                    self._tainted.add(near)
                    continue
                sink.write(data)
                await sink.drain()
        if self._mode is Mode.SWALLOW:
            return  # that one side has gone is not heard on the other
        raise _EndedError


class _EndedError(Exception):
    """One side of a connection has ended, so the other does."""
