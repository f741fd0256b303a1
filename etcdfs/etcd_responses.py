"""What the responses on a watch's stream say, each checked against what was asked.

What this room knows: the order in which etcd says things on a stream, and how a revision is
joined when it comes in fragments. What it must not know: streams, time. It is part of the etcd
door.

Concurrency: none; one owner.
"""

from typing import Final, final

from etcdfs import etcd_wire as wire
from etcdfs.checks import REVISION_MAX, fault_in_events
from etcdfs.errors import WatchLostError
from etcdfs.store import Event, Revision, WatchEvents, WatchMessage, WatchOpened, WatchProgress

PARTS_MAX: Final = 4_000_000
"""Events that one revision may have in fragments; a gigabyte of the smallest."""

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

    def read(self, response: wire.Message) -> WatchMessage | None:
        """Return what a response says; None when it is part of a larger one.

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
            return self._collect(response)
        return WatchProgress(Revision(revision))

    def _created(self, response: wire.Message) -> WatchOpened:
        if self.opened:
            raise self._wrong("it was created twice")
        if response.events:
            raise self._wrong("it has events before it is created")
        self.opened = True
        self._watch_id = response.watch_id
        return WatchOpened(Revision(response.header.revision))

    def _collect(self, response: wire.Message) -> WatchEvents | None:
        """Join fragments; return the batch when it is whole."""
        events = wire.events(response.events)
        fault = fault_in_events(events, self._start, self._end, response.header.revision)
        if fault is not None:
            raise self._wrong(fault)
        self._parts.extend(events)
        if len(self._parts) > PARTS_MAX:
            raise self._wrong("its fragments come to no end")
        if response.fragment:
            return None
        # etcd issue 20221: a watch on a future revision may be told of older ones.
        found = tuple(e for e in self._parts if e.mod_revision >= self._from_revision)
        self._parts.clear()
        if not found:
            return None
        # Not the header's revision: while etcd replays history in batches of 1000 revisions,
        # that is already the store's newest.
        return WatchEvents(found, found[-1].mod_revision)

    def _wrong(self, what: str) -> WatchLostError:
        return WatchLostError(f"{self._endpoint}: the watch says what cannot be: {what}")
