"""What a watch has brought and is not on disk yet.

Knows: what has to be kept of it, and until when. Does not know: the disk, when it is written.

Concurrency: trio thread.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final, final

import trio

from etcdfs.consistency.snapshot import Position
from etcdfs.keyspace.store import Event, KeyValue
from etcdfs.snapshots.snapshot_file import Changes

WAITING_BYTES: Final = 64 << 20
"""Bytes of keys and values that may wait to be written, of each stream."""

STALL_S: Final = 10.0
"""How long a listing waits for a disk that takes nothing of it."""

_ENTRY_BYTES: Final = 300
"""What an entry takes besides its key and its value."""


@final
class StreamRecorder:
    """What one watch has brought and is not written yet; see `Recorder`.

    Attributes:
        pages: Parts of the last listing, and whether each is its first.
        position: Where the stream is, with what is on disk and here; None: they do not fit
            together, so that everything must be listed anew.
        is_behind: Whether something was let go of, so that nothing but another listing helps.
        wanted: Set when something is to be written soon.
    """

    def __init__(self) -> None:
        self.pages: deque[tuple[bool, Sequence[KeyValue]]] = deque()
        self.position: Position | None = None
        self.is_behind = False
        self.wanted = trio.Event()
        self._changes: dict[bytes, Event] = {}
        self._is_listing = False
        self._is_listed = False  # the pages are all of a listing, which is the stream from now on
        self._size = 0
        self._room = trio.Event()

    @property
    def waiting(self) -> int:
        """How many keys wait to be written."""
        return len(self._changes) + sum(len(entries) for _, entries in self.pages)

    async def listed(self, entries: Sequence[KeyValue], *, first: bool) -> None:
        """See `Recorder.listed`."""
        if first:
            if self._is_listed:  # and not written, nor will be
                self.fall_behind()
            self._forget_pages()
            self._is_listing = True
        if not self._is_listing:
            return
        self.pages.append((first, entries))
        self._size += sum(map(_size, entries))
        self.wanted.set()
        while self._size > WAITING_BYTES and self._is_listing:
            with trio.move_on_after(STALL_S) as stalled:
                await self._room.wait()
            if stalled.cancelled_caught:
                self.fall_behind()

    def restored(self, position: Position) -> None:
        """See `Recorder.restored`."""
        if self._is_listing:  # else it was let go of
            self._is_listing = False
            self._is_listed = True
            self.is_behind = False
            self._forget_changes()
            self.position = position
            self.wanted.set()

    def applied(self, events: Sequence[Event], position: Position) -> None:
        """See `Recorder.applied`."""
        if self.position is not None:
            self.position = position
            self._take(events)

    def read_ahead(self, entries: Sequence[KeyValue]) -> None:
        """See `Recorder.read_ahead`."""
        if self.position is not None:
            self._take(entries)

    def fall_behind(self) -> None:
        """Let go of everything; what is on disk stays, until all is listed anew."""
        self.begin(None)
        self.is_behind = True

    def begin(self, position: Position | None) -> None:
        """Begin with what is on disk, or, if that is None, with a listing that is to come."""
        self._is_listing = self._is_listed = self.is_behind = False
        self._forget_pages()
        self._forget_changes()
        self.position = position

    def _take(self, events: Sequence[Event]) -> None:
        for event in events:
            before = self._changes.get(event.key)
            if before is None or before.mod_revision <= event.mod_revision:
                self._changes[event.key] = event
                self._size += _size(event) - (0 if before is None else _size(before))
        if self._size > WAITING_BYTES:
            self.fall_behind()

    # --- writing ----------------------------------------------------------------------------

    def wrote(self, page: tuple[bool, Sequence[KeyValue]]) -> None:
        """Let go of a page that is written, unless that has happened."""
        if self.pages and self.pages[0] is page:
            self.pages.popleft()
            self._size -= sum(map(_size, page[1]))
            self._wake()

    def take(self) -> Changes | None:
        """Return the changes that are to be written, and let go of them; None if there are none."""
        has_news = self._is_listed or bool(self._changes)
        if self.position is None or not has_news or (self._is_listed and self.pages):
            return None
        changes = Changes(
            events=tuple(self._changes.values()), position=self.position, listed=self._is_listed
        )
        self._is_listed = False
        self._forget_changes()
        return changes

    def give_back(self, changes: Changes) -> None:
        """Take back changes that could not be written."""
        if self.position is None or self._is_listed:
            return  # they are of no account any more
        if changes.listed and self._is_listing:  # what they belong to makes room for the new one
            self.position = None
            self._forget_changes()
            return
        newer = tuple(self._changes.values())
        self._forget_changes()
        self._is_listed = changes.listed
        self._take((*changes.events, *newer))

    def _forget_pages(self) -> None:
        self._size -= sum(_size(entry) for _, entries in self.pages for entry in entries)
        self.pages.clear()
        self._wake()

    def _forget_changes(self) -> None:
        self._size -= sum(map(_size, self._changes.values()))
        self._changes = {}

    def _wake(self) -> None:
        self._room.set()
        self._room = trio.Event()


def _size(event: Event) -> int:
    value = event.value if isinstance(event, KeyValue) else b""
    return len(event.key) + len(value) + _ENTRY_BYTES
