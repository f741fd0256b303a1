"""One watch on one stream, with every way it can end told as an error.

Knows: etcd's watch stream, how long it may take to open, in which order etcd says things on it, and
how a revision is joined when it comes in fragments. Does not know: how to resume (the state
machine's).

aetcd's own watcher drops revisions, progress notices and the server's cancellations, and takes
the end of the stream for silence; here only its generated stub is used.

Concurrency: one task receives, any task may ask for progress. A response is read from the
stream when somebody waits for it, never ahead: gRPC's flow control then holds etcd back, and
memory holds one response (one revision, when that came in fragments). A receiver may be
cancelled and come back; nothing is lost. A response has all events of a revision, as many as there
are: they are read some at a time, and others have their turn in between.
"""

from collections.abc import Sequence
from typing import Final, final

import grpc
import trio

from etcdfs.errors import StoreError, WatchLostError
from etcdfs.etcd import codec as wire
from etcdfs.etcd.calls import Stream
from etcdfs.keyspace.store import (
    Event,
    Revision,
    WatchEvents,
    WatchMessage,
    WatchOpened,
    WatchProgress,
)
from etcdfs.keyspace.transaction_results import REVISION_MAX, fault_in_events

PARTS_MAX: Final = 4_000_000
"""Events that one revision may have in fragments; a gigabyte of the smallest."""

SLICE: Final = 1000
"""Events read at a time; a few milliseconds."""

_OF_ALL_WATCHES: Final = -1
"""The watch id of the answer to a question for progress, which is for the stream as a whole."""


@final
class Responses:
    """Reads the responses to one request for a watch, in their order.

    Attributes:
        opened: Whether the watch stands.
    """

    def __init__(self, create_request: wire.Message, endpoint: object) -> None:
        # --- constants
        wanted = create_request.create_request
        self._start: bytes = wanted.key
        self._end: bytes = wanted.range_end
        self._from_revision: int = wanted.start_revision
        self._endpoint = endpoint
        # --- mutable state
        self.opened = False
        self._watch_id = 0
        self._parts: list[Event] = []

    async def read(self, response: wire.Message) -> WatchMessage | None:
        """Return what a response says; None when it is part of a larger one.

        It cannot be cancelled.

        Raises:
            CompactedError: The start revision is gone from history.
            StorePermissionError: The watch was refused.
            WatchLostError: It was cancelled, or says what cannot be.
        """
        # Before `created`: a refused watch comes as both at once, with watch id -1.
        if response.canceled:
            raise wire.watch_cancelled(response, self._endpoint)
        revision = response.header.revision
        if not 0 < revision <= REVISION_MAX:
            raise self._wrong(f"there is no revision {revision}")
        if response.created:
            return self._created(response)
        if not self.opened:
            raise self._wrong("it was not created")
        if response.watch_id != self._watch_id and (
            response.events or response.watch_id != _OF_ALL_WATCHES
        ):
            raise self._wrong(f"nobody asked for watch {response.watch_id}")
        if response.events or self._parts:
            return await self._collect(response)
        return WatchProgress(Revision(revision))

    def _created(self, response: wire.Message) -> WatchOpened:
        if self.opened:
            raise self._wrong("it was created twice")
        if response.events:
            raise self._wrong("it has events before it is created")
        self.opened = True
        self._watch_id = response.watch_id
        return WatchOpened(Revision(response.header.revision))

    async def _collect(self, response: wire.Message) -> WatchEvents | None:
        """Join fragments; return the batch when it is whole."""
        for first in range(0, len(response.events), SLICE):
            self._take(response.events[first : first + SLICE], response.header.revision)
            if first:
                await trio.lowlevel.cancel_shielded_checkpoint()
        if response.fragment:
            return None
        # etcd issue 20221: a watch on a future revision may be told of older ones.
        found = tuple(e for e in self._parts if e.mod_revision >= self._from_revision)
        self._parts.clear()
        if len(found) > SLICE:
            await trio.lowlevel.cancel_shielded_checkpoint()
        if not found:
            return None
        # Not the header's revision: while etcd replays history in batches of 1000 revisions,
        # that is already the store's newest.
        return WatchEvents(found, found[-1].mod_revision)

    def _take(self, messages: Sequence[wire.Message], revision: int) -> None:
        events = wire.events(messages)
        fault = fault_in_events(events, self._start, self._end, revision)
        if fault is not None:
            raise self._wrong(fault)
        self._parts.extend(events)
        if len(self._parts) > PARTS_MAX:
            raise self._wrong("its fragments come to no end")

    def _wrong(self, what: str) -> WatchLostError:
        return WatchLostError(f"{self._endpoint}: the watch says what cannot be: {what}")


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
                message = await self._responses.read(await self._response())
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
        try:
            if self._responses.opened:
                return self._said(await self._stream.read())
            with trio.move_on_after(self._timeout_s):
                return self._said(await self._stream.read())
        except grpc.RpcError as exc:
            if self._stream.cancelled:
                raise self._lost("the watch was closed") from exc
            raise wire.stream_error(exc, self._endpoint) from exc
        raise self._lost("the watch was not opened in time")

    def _said(self, response: wire.Message | None) -> wire.Message:
        if response is None:
            raise self._lost("etcd ended the watch without a word")
        return response

    def _lost(self, what: str) -> WatchLostError:
        return WatchLostError(f"{self._endpoint}: {what}")
