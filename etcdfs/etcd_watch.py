"""One watch on one stream, with every way it can end told as an error.

What this room knows: etcd's watch stream, and how long it may take to open. What it must not
know: what its messages say (`etcd_responses`), how to resume (the replica's). It is part of the
etcd door.

aetcd's own watcher drops revisions, progress notices and the server's cancellations, and takes
the end of the stream for silence; here only its generated stub is used.

Concurrency: one task receives, any task may ask for progress. A response is read from the
stream when somebody waits for it, never ahead: gRPC's flow control then holds etcd back, and
memory holds one response (one revision, when that came in fragments). A receiver may be
cancelled and come back; nothing is lost.
"""

from typing import final

import grpc
import trio

from etcdfs import etcd_wire as wire
from etcdfs.errors import StoreError, WatchLostError
from etcdfs.etcd_calls import Stream
from etcdfs.etcd_responses import Responses
from etcdfs.store import WatchMessage


@final
class EtcdWatch:
    """A standing watch (the port's `Watch`). Owned by whoever opened it, who must close it.

    Args:
        stream: The stream, nothing written to it yet.
        create_request: The first message to write.
        endpoint: Named in errors.
        timeout_s: Bound of what etcd should answer at once.
    """

    def __init__(
        self,
        stream: Stream,
        create_request: wire.Message,
        *,
        endpoint: object,
        timeout_s: float,
    ) -> None:
        # dependencies
        self._stream = stream
        # constants
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        # mutable state
        self._responses = Responses(create_request, endpoint)
        self._error: StoreError | None = None
        self._question: trio.Event | None = None
        stream.write(create_request)

    async def receive(self) -> WatchMessage:
        """Wait for the next message; see the port. An error is final, and raised each time."""
        if self._error is not None:
            raise self._error
        try:
            while True:
                message = self._responses.read(await self._response())
                if message is not None:
                    return message
        except StoreError as exc:
            self._error = exc
            raise

    async def request_progress(self) -> None:
        """Ask etcd how far this watch is; a question still on its way is not repeated.

        Raises:
            WatchLostError: The stream is gone, or takes no more requests.
        """
        if self._question is None or self._question.is_set():
            self._question = self._stream.write(wire.watch_progress_request())
        with trio.move_on_after(self._timeout_s) as bound:
            await self._question.wait()
        if bound.cancelled_caught:
            raise self._lost("the watch takes no more requests")
        if self._stream.ended:
            raise self._lost("the watch has ended")

    @property
    def is_lost(self) -> bool:
        """Whether it ended in a way that speaks against the member."""
        return isinstance(self._error, WatchLostError)

    def abandon(self) -> None:
        """End the stream at once; whoever receives from it is told that it is lost."""
        self._stream.cancel()

    async def close(self) -> None:
        """End the stream. Only local work, so bounded however etcd is."""
        await self._stream.close()

    async def _response(self) -> wire.Message:
        """Return the next raw response; what a cancelled receiver waited for comes first."""
        bound = (
            trio.CancelScope() if self._responses.opened else trio.move_on_after(self._timeout_s)
        )
        try:
            with bound:
                response = await self._stream.read()
                if response is None:
                    raise self._lost("etcd ended the watch without a word")
                return response
        except grpc.RpcError as exc:
            if self._stream.cancelled:
                raise self._lost("the watch was closed") from exc
            raise wire.stream_error(exc, self._endpoint) from exc
        raise self._lost("the watch was not opened in time")

    def _lost(self, what: str) -> WatchLostError:
        return WatchLostError(f"{self._endpoint}: {what}")
