"""The words between the replica and the mirror: messages in, steps out.

What this room knows: what can happen to a listing or a watch, and what can be done about it.
What it must not know: what is done when; that is the replica's.

Concurrency: none; frozen values.
"""

from dataclasses import dataclass

from etcdfs.store import (
    Event,
    KeyValue,
    Page,
    Revision,
    WatchEvents,
    WatchOpened,
    WatchProgress,
)

# --- messages in ----------------------------------------------------------------------------
# `WatchOpened`, `WatchEvents` and `WatchProgress` come as the store's watch gives them.


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
