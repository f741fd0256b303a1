"""What the state machine is told, and what it answers: messages in, steps out.

Knows: what can happen to a listing or a watch, what can be done about it, and what must be read
back after a break if the history is still the one we know. Does not know: what is done when; that
is the state machine's.

Concurrency: none; pure functions and frozen values.
"""

from dataclasses import dataclass
from typing import assert_never

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
