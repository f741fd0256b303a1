"""What the state machine is told, and what it answers: messages in, steps out. And its batches.

Knows: what can happen to a listing or a watch, what can be done about it, and what must be read
back after a break if the history is still the one we know. Does not know: what is done when; that
is the state machine's.

Concurrency: none; pure functions and frozen values, but for `Batch`, which is the applier's.
"""

from collections.abc import Collection, Container
from dataclasses import dataclass, field
from typing import Final, assert_never

import trio

from etcdfs.keyspace.store import (
    Event,
    KeyValue,
    Page,
    Revision,
    Tombstone,
    WatchEvents,
    WatchOpened,
    WatchProgress,
)


@dataclass(frozen=True, slots=True)
class PageArrived:
    """The answer to `Read`."""

    page: Page


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """`Read` got no answer, for a reason that may pass."""

    reason: str


@dataclass(frozen=True, slots=True)
class PageTooLarge:
    """The page that `Read` asked for is larger than can be taken."""


@dataclass(frozen=True, slots=True)
class RevisionCompacted:
    """The revision that `Read` or `OpenWatch` asked for, or a standing watch needs, is gone."""

    compact_revision: int


@dataclass(frozen=True, slots=True)
class RevisionAhead:
    """The revision that `Read` asked for is not there yet: etcd is not where we have been."""


@dataclass(frozen=True, slots=True)
class WatchLost:
    """The watch could not be opened, or ended, for any reason but compaction."""

    reason: str


@dataclass(frozen=True, slots=True)
class Doubted:
    """What was applied is not to be trusted: an audit failed, or applying did."""

    reason: str


@dataclass(frozen=True, slots=True)
class Close:
    """Nothing more is wanted."""


WatchMessage = WatchOpened | WatchEvents | WatchProgress | WatchLost
ReadMessage = PageArrived | PageTooLarge | ReadFailed | RevisionAhead
Message = WatchMessage | ReadMessage | RevisionCompacted | Doubted | Close


# --- steps out ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read:
    """Read a range, linearizable, and answer with a `ReadMessage` or `RevisionCompacted`.

    Attributes:
        start: The first key.
        end: The end of the range; None for the one key.
        revision: The revision to read at; 0 for the newest.
        limit: The most entries to return.
    """

    start: bytes
    end: bytes | None
    revision: Revision
    limit: int


@dataclass(frozen=True, slots=True)
class Stage:
    """Put part of a listing aside.

    Attributes:
        entries: In key order, and all after those staged before.
        first: Whether a new listing begins, and whatever was staged before is void.
    """

    entries: tuple[KeyValue, ...]
    first: bool


@dataclass(frozen=True, slots=True)
class Restore:
    """Make what was staged the state: it is everything there was at `revision`."""

    revision: Revision


@dataclass(frozen=True, slots=True)
class OpenWatch:
    """Open a watch; answer with `WatchOpened`, `WatchLost` or `RevisionCompacted`."""

    from_revision: Revision


@dataclass(frozen=True, slots=True)
class CloseWatch:
    """Leave the watch, if there is one, with all that it has not delivered."""


@dataclass(frozen=True, slots=True)
class Apply:
    """Apply some whole revisions; the state is then that of `revision`."""

    events: tuple[Event, ...]
    revision: Revision


@dataclass(frozen=True, slots=True)
class BackOff:
    """Wait before the next step; longer, the more often it was tried.

    Attributes:
        attempt: How many tries failed since something was last applied or bookmarked; 0 for
            the first.
        reason: What happened, for the log.
        relist: Whether everything is to be listed again.
    """

    attempt: int
    reason: str
    relist: bool


Step = Read | Stage | Restore | OpenWatch | CloseWatch | Apply | BackOff


@dataclass(frozen=True, slots=True)
class HistoryCheck:
    """What a read must give if the history is the one we know.

    Attributes:
        read: The read.
        present: Whether there must be an entry.
        entry: The very entry, if it is known.
    """

    read: Read
    present: bool
    entry: KeyValue | None = None

    def holds(self, page: Page) -> bool:
        """Tell whether the page is what was expected."""
        if page.revision < self.read.revision:
            return False
        if not self.present:
            return not page.entries
        return bool(page.entries) and self.entry in (None, page.entries[0])


def history_checks(change: Event, revision: Revision) -> tuple[HistoryCheck, ...]:
    """Return what must hold at `revision` if `change` is the last change of its key."""
    now = Read(change.key, None, revision, 1)
    match change:
        case KeyValue():
            return (HistoryCheck(now, present=True, entry=change),)
        case Tombstone():
            # That a key is not there says little. That it was there until just then says a lot.
            before = Read(change.key, None, Revision(change.mod_revision - 1), 1)
            return (HistoryCheck(before, present=True), HistoryCheck(now, present=False))
        case _:
            assert_never(change)


# --- what is to be made visible -----------------------------------------------------------------

BATCH_KEYS: Final = 500
"""Keys of a merged batch; about ten milliseconds of planning. One revision is never cut."""

BATCH_BYTES: Final = 4 << 20


@dataclass(slots=True)
class Batch:
    """Events of whole revisions, to be made visible at once.

    Attributes:
        events: The last event of each key, the oldest revision first.
        own: Earlier events of keys that this mount is changing, which say what became of it.
        count: How many events there were.
        size: Bytes of the values.
        revision: The revision that readers then see; None: as before (attributes have a watch
            of their own).
        force: Whether older revisions are right, too (another history).
        is_closed: Whether nothing more may be merged with it.
        over: Set when it is visible, or never will be.
    """

    events: dict[bytes, Event] = field(default_factory=dict)
    own: list[Event] = field(default_factory=list)
    count: int = 0
    size: int = 0
    revision: int | None = None
    force: bool = False
    is_closed: bool = False
    over: trio.Event = field(default_factory=trio.Event)

    @property
    def is_full(self) -> bool:
        """Whether nothing more is merged with it."""
        return self.is_closed or len(self.events) >= BATCH_KEYS or self.size >= BATCH_BYTES

    def add(self, event: Event, *, is_own: bool) -> None:
        """Merge an event, of a key that this mount is changing or of another."""
        before = self.events.pop(event.key, None)  # so that it is put behind all others
        if before is not None:
            self.size -= _size(before)
            if is_own:
                self.own.append(before)
        self.events[event.key] = event
        self.size += _size(event)
        self.count += 1

    def add_all(self, events: Collection[Event], intents: Container[bytes]) -> None:
        """Merge events; `intents` are the keys that this mount is changing."""
        fresh = {event.key: event for event in events}
        if len(fresh) == len(events) and self.events.keys().isdisjoint(fresh):
            self.events.update(fresh)
            self.size += sum(len(e.value) for e in events if isinstance(e, KeyValue))
            self.count += len(events)
            return
        for event in events:
            self.add(event, is_own=event.key in intents)

    def all(self) -> tuple[Event, ...]:
        """Return what is to be planned."""
        return (*self.own, *self.events.values())


def _size(event: Event) -> int:
    return len(event.value) if isinstance(event, KeyValue) else 0
