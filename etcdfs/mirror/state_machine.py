"""How a copy of a keyspace is made, kept and mended: the one place that decides it.

Knows: when to list, watch, resume and list again. Messages go in, steps come out; the mirror
carries out the steps and says what came of them. Does not know: how anything is carried out, what
the entries are for, what time it is.

::

                  .-- next page
                  v  |
    start -----> LISTING --- last page ---> OPENING --- WatchOpened ---> CONFIRMING
                  ^                          ^                               |
                  |                          |                 all witnesses agree: Restore,
                  |                          |                  if there is a new listing
                  |                          |                               v
                  |                          '----- WatchLost <------------ WATCHING --.
                  |                               (CONFIRMING too)           ^  Apply  |
                  |                                                          '---------'
                  '--- from everywhere: compacted, another history, a guarantee broken, doubt

    CLOSED: from everywhere, by Close; nothing comes after it.

After every break, and after every listing, the history may be another one: an etcd that was
wiped or restored from a snapshot lets a watch resume at our revision and says nothing. So a few
*witnesses* are read back at our revision before anything is believed: the last change that was
applied, or the newest entries of the listing. They are read when the watch stands already, and
not before it is opened: what is wiped later than that breaks the watch.

A listing is staged page by page and becomes the state only when it is confirmed, so that pages
of two histories are never shown as one.

What etcd guarantees a watch (ordered, unique, atomic, reliable, resumable, bookmarkable) is
checked as far as it can be seen from here; what breaks it is not applied, and leads to a new
listing. Repeated events are the exception: releases before 3.4.24 and 3.5.8 send them, they do
no harm, and are dropped. A late one looks the same: when `dropped` grows, an audit is due.

What no witness can tell is left to audits, whose verdict comes in as `Doubted`: events that etcd
lost, and a history that differs only between the last change and a later bookmark.

Concurrency: owned by the trio thread; no operation waits.
"""

from collections import Counter
from dataclasses import dataclass, fields, replace
from enum import Enum
from itertools import takewhile
from operator import attrgetter, gt
from typing import Final, assert_never, final

from etcdfs.consistency.snapshot import Position
from etcdfs.keyspace.paging import Paging
from etcdfs.keyspace.store import (
    Event,
    Page,
    Revision,
    WatchEvents,
    WatchOpened,
    WatchProgress,
)
from etcdfs.mirror.messages import (
    Apply,
    BackOff,
    Close,
    CloseWatch,
    Doubted,
    HistoryCheck,
    Message,
    OpenWatch,
    PageArrived,
    PageTooLarge,
    Read,
    ReadFailed,
    ReadMessage,
    Restore,
    RevisionAhead,
    RevisionCompacted,
    Stage,
    Step,
    WatchLost,
    WatchMessage,
    history_checks,
)

# Keys per page, if they are small (`paging`). etcd walks its index of all that is left of the range
# for each page, to count it, so that a million keys in pages of 5000 took four times what etcd needs
# for all of them at once.
PAGE_SIZE: Final = 50_000


class State(Enum):
    """Where a replica is; see the module's drawing."""

    LISTING = "listing"
    OPENING = "opening"
    CONFIRMING = "confirming"
    WATCHING = "watching"
    CLOSED = "closed"


# --- the machine ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StateMachineStatistics:
    """Where a replica is, and what it went through.

    Attributes:
        state: The state's name.
        revision: Everything up to it is applied; 0 before the first `Restore`.
        lists: Listings that became the state.
        resumes: Breaks after which the watch went on where it was.
        breaks: Watches lost.
        compactions: Times that a revision asked for was compacted away.
        refuted: Times that a witness showed another history.
        regressions: Listings at a revision before the last one known.
        violations: Times that a guarantee of the watch was broken.
        doubts: Times that the state was doubted from outside.
        applied_events: Events applied.
        dropped_duplicates: Events dropped, as applied before.
    """

    state: str
    revision: Revision
    lists: int
    resumes: int
    breaks: int
    compactions: int
    refuted: int
    regressions: int
    violations: int
    doubts: int
    applied_events: int
    dropped_duplicates: int


_MOD_REVISION: Final = attrgetter("mod_revision")
_KEY: Final = attrgetter("key")
_COUNTED: Final = [field.name for field in fields(StateMachineStatistics)][2:]

_ANY: Final = frozenset(State) - {State.CLOSED}
_WATCH: Final = frozenset((State.OPENING, State.CONFIRMING, State.WATCHING))
_READ: Final = frozenset((State.LISTING, State.CONFIRMING))

_IN_TURN: Final[dict[type[Message], frozenset[State]]] = {
    PageArrived: _READ,
    PageTooLarge: _READ,
    ReadFailed: _READ,
    RevisionAhead: _READ,
    RevisionCompacted: _ANY,
    WatchOpened: frozenset((State.OPENING,)),
    WatchEvents: frozenset((State.WATCHING,)),
    WatchProgress: frozenset((State.WATCHING,)),
    WatchLost: _WATCH,
    Doubted: _ANY,
    Close: _ANY,
}


@final
class StateMachine:
    """Decides how the entries of a range are listed, watched, and listed again.

    Carry out the steps of `start` and of each `receive` in their order, and give the answer to
    the last one to `receive`; the steps it returns take the place of any not yet carried out.
    While a `Read` is not answered, keep the watch's messages back.

    Do not pass on the progress notices of etcd before 3.4.25 and 3.5.8: asked for, they may name
    revisions that were not delivered. One such lie is noticed, by the late event; a watch that
    breaks in between resumes after that event.

    Args:
        start: The first key of the range.
        end: The end of the range.
        page_size: The most entries per page.
    """

    def __init__(self, start: bytes, end: bytes, *, page_size: int = PAGE_SIZE) -> None:
        # --- constants ---
        self._start = start
        self._end = end
        self._page_size = page_size

        # --- mutable state ---
        self._state = State.LISTING
        self._attempt = 0
        self._counts: Counter[str] = Counter()
        self._paging = Paging(page_size)
        # The read to be answered, and again to be done if it fails.
        # INVARIANT: there is one exactly in LISTING and CONFIRMING.
        self._read: Read | None = self._first_page()
        # The revision of the listing that is being read, or waits to be confirmed; 0: none.
        # INVARIANT: it is 0 in WATCHING.
        self._pinned = Revision(0)
        # Keys of that listing that are still to come, if the store counts them.
        self._remaining: int | None = None
        # The changes, last of their keys, to be read back after a break; none: there was nothing.
        self._last_changes: tuple[Event, ...] = ()
        # INVARIANT: there are some exactly in CONFIRMING, and the first one's read is `_read`.
        self._checks: tuple[HistoryCheck, ...] = ()
        # The last change applied, the last bookmark, and the keys that changed at the former.
        # INVARIANT: applied <= known.
        self._applied = Revision(0)
        self._known = Revision(0)
        self._applied_keys: set[bytes] = set()
        # What the present watch was asked for, and the newest revision it said it has reached.
        # INVARIANT: from - 1 is what is known, in CONFIRMING, and at most that in WATCHING.
        self._from = Revision(0)
        self._reached = Revision(0)
        # Whether the watch to be confirmed goes on where one was lost.
        self._resuming = False

    @property
    def state(self) -> State:
        """Where the state machine is."""
        return self._state

    @property
    def revision(self) -> Revision:
        """Everything up to it is applied; 0 before the first `Restore`."""
        return self._known

    @property
    def dropped(self) -> int:
        """Events dropped, as applied before."""
        return self._counts["dropped_duplicates"]

    @property
    def position(self) -> Position:
        """What is applied, and what shows that a history has it."""
        return Position(self._known, self._last_changes)

    def start(self) -> tuple[Step, ...]:
        """Return the first steps."""
        assert self._read is not None
        return (self._read,)

    def resume(self, position: Position) -> tuple[Step, ...]:
        """Return the first steps where a copy is there already: as after a break."""
        self._applied = self._known = position.revision
        self._last_changes = position.witnesses
        self._resuming = True
        return (self._open(),)

    def receive(self, message: Message) -> tuple[Step, ...]:
        """Take a message and return what is to be done.

        Raises:
            RuntimeError: The message is out of turn, which is the caller's mistake.
        """
        if self._state is State.CLOSED:
            return ()
        if self._state not in _IN_TURN[type(message)]:
            raise RuntimeError(f"{type(message).__name__} is out of turn while {self._state.value}")
        match message:
            case PageArrived() | PageTooLarge() | ReadFailed() | RevisionAhead():
                return self._on_read(message)
            case WatchOpened() | WatchEvents() | WatchProgress() | WatchLost():
                return self._on_watch(message)
            case RevisionCompacted(compact_revision):
                self._counts["compactions"] += 1
                return self._relist(f"compacted up to revision {compact_revision}")
            case Doubted(reason):
                self._counts["doubts"] += 1
                # A listing under way is the cure already.
                return () if self._state is State.LISTING else self._relist(reason)
            case Close():
                return self._close()
            case _:
                assert_never(message)

    def restart(self, reason: str) -> tuple[Step, ...]:
        """List everything again, whatever was under way: carrying out a step went wrong."""
        self._counts["doubts"] += 1
        return self._relist(reason)

    def statistics(self) -> StateMachineStatistics:
        """Count what has happened."""
        counts = {name: self._counts[name] for name in _COUNTED}
        return StateMachineStatistics(state=self._state.value, revision=self._known, **counts)

    def check_invariants(self) -> None:
        """Assert what always holds."""
        assert (self._read is not None) == (self._state in _READ)
        assert bool(self._checks) == (self._state is State.CONFIRMING)
        assert not self._checks or self._checks[0].read is self._read
        assert self._applied <= self._known
        assert self._pinned == 0 or self._state is not State.WATCHING
        if self._state is State.CONFIRMING:
            assert self._from == (self._pinned or self._known) + 1
        if self._state is State.WATCHING:
            assert self._from <= self._known + 1

    # --- reading ----------------------------------------------------------------------------

    def _first_page(self) -> Read:
        self._paging = Paging(self._page_size)
        return Read(self._start, self._end, Revision(0), self._paging.limit)

    def _on_read(self, message: ReadMessage) -> tuple[Step, ...]:
        assert self._read is not None
        match message:
            case PageArrived(page) if self._state is State.LISTING:
                return self._on_page(self._read, page)
            case PageArrived(page):
                return self._on_history_check(page)
            case PageTooLarge() if self._paging.shrink():
                self._read = replace(self._read, limit=self._paging.limit)
                return (self._read,)
            case PageTooLarge():
                return (self._back_off("a value is too large", relist=False), self._read)
            case ReadFailed(reason):
                return (self._back_off(reason, relist=False), self._read)
            case RevisionAhead():
                return self._refute(f"revision {self._read.revision} is ahead of etcd")
            case _:
                assert_never(message)

    def _on_page(self, read: Read, page: Page) -> tuple[Step, ...]:
        first = not read.revision
        if first:
            self._pinned = page.revision
            self._last_changes = ()
            self._counts["regressions"] += page.revision < self._known
        wrong = self._find_fault(read, page)
        if wrong is not None:
            return self._violate(wrong)
        # The newest of the first page that has any, and the newest of all later ones: should
        # those be of another history, then the first page's is not in it.
        candidates: tuple[Event, ...] = self._last_changes[1:] + page.entries
        if candidates:
            newest = max(candidates, key=_MOD_REVISION)
            self._last_changes = (*self._last_changes[:1], newest)
        stage = Stage(page.entries, first)
        self._paging.took(page)
        if page.more:
            after = page.entries[-1].key + b"\0"
            self._read = Read(after, self._end, self._pinned, self._paging.limit)
            return (stage, self._read)
        return (stage, self._open())

    def _find_fault(self, read: Read, page: Page) -> str | None:
        if page.more and not page.entries:
            return "a page without entries says that there are more"
        if page.revision < self._pinned:
            return f"a page of revision {page.revision} in a listing at {self._pinned}"
        if page.entries and page.entries[0].key < read.start:
            return f"a page begins before {read.start!r}"
        if max(map(_MOD_REVISION, page.entries), default=0) > self._pinned:
            return f"an entry is newer than its listing at {self._pinned}"
        # All pages are of one revision: what is left gets less by what has come.
        left = len(page.entries) + (page.remaining or 0)
        if self._remaining is not None and read.revision and left != self._remaining:
            return f"{self._remaining} keys were left of a listing, and now {left}"
        self._remaining = page.remaining
        return None

    # --- opening and confirming -------------------------------------------------------------

    def _open(self) -> OpenWatch:
        self._state = State.OPENING
        self._read = None
        self._checks = ()
        self._from = Revision((self._pinned or self._known) + 1)
        return OpenWatch(self._from)

    def _on_opened(self, revision: Revision) -> tuple[Step, ...]:
        # Its own revision may be below ours: this member may be behind, and that is no fault.
        self._reached = revision
        at = Revision(self._from - 1)
        checks = [check for change in self._last_changes for check in history_checks(change, at)]
        # Without any change to go by: there was nothing in the range then, and must not be.
        nothing = HistoryCheck(Read(self._start, self._end, at, 1), present=False)
        self._checks = tuple(checks) or (nothing,)
        self._state = State.CONFIRMING
        self._read = self._checks[0].read
        return (self._read,)

    def _on_history_check(self, page: Page) -> tuple[Step, ...]:
        check, *others = self._checks
        if not check.holds(page):
            return self._refute(f"{check.read.start!r} was not so at revision {self._from - 1}")
        self._checks = tuple(others)
        if others:
            self._read = others[0].read
            return (others[0].read,)
        self._read = None
        self._state = State.WATCHING
        self._counts["resumes"] += self._resuming
        self._resuming = False
        if not self._pinned:
            return ()
        self._applied = self._known = self._pinned
        self._applied_keys = set()
        self._pinned = Revision(0)
        self._counts["lists"] += 1
        return (Restore(self._known),)

    # --- watching ---------------------------------------------------------------------------

    def _on_watch(self, message: WatchMessage) -> tuple[Step, ...]:
        match message:
            case WatchOpened(revision):
                return self._on_opened(revision)
            case WatchEvents(events):
                return self._on_events(events)
            case WatchProgress(revision):
                return self._on_progress(revision)
            case WatchLost(reason):
                self._counts["breaks"] += 1
                self._resuming = not self._pinned
                return (CloseWatch(), self._back_off(reason, relist=False), self._open())
            case _:
                assert_never(message)

    def _on_events(self, events: tuple[Event, ...]) -> tuple[Step, ...]:
        if not events:
            return ()
        wrong = self._find_violation(events)
        if wrong is not None:
            return self._violate(wrong)
        fresh = events
        if events[0].mod_revision <= self._applied:
            fresh = tuple(event for event in events if event.mod_revision > self._applied)
            self._counts["dropped_duplicates"] += len(events) - len(fresh)
        if not fresh:
            return ()
        last = fresh[-1]
        self._applied = self._known = last.mod_revision
        self._applied_keys = {e.key for e in fresh if e.mod_revision == last.mod_revision}
        self._reached = max(self._reached, last.mod_revision)
        self._last_changes = (last,)
        self._attempt = 0
        self._counts["applied_events"] += len(fresh)
        return (Apply(fresh, last.mod_revision),)

    def _find_violation(self, events: tuple[Event, ...]) -> str | None:
        """Return which guarantee the events break, and how."""
        revisions = list(map(_MOD_REVISION, events))
        # Nothing of this is done event by event in Python: a revision may have very many.
        if min(revisions) < self._from:
            return f"resumable: an event of revision {min(revisions)}, asked from {self._from}"
        if any(map(gt, revisions, revisions[1:])):
            index = next(i for i, r in enumerate(revisions[1:]) if r < revisions[i])
            return f"ordered: an event of revision {revisions[index + 1]} after {revisions[index]}"
        is_one = revisions[0] == revisions[-1]
        keys = map(_KEY, events)
        if len(set(keys if is_one else zip(revisions, keys, strict=True))) < len(events):
            return "unique: two events of one key at one revision"
        late = takewhile(lambda event: event.mod_revision <= self._known, events)
        return next((wrong for wrong in map(self._find_late, late) if wrong is not None), None)

    def _find_late(self, event: Event) -> str | None:
        revision = event.mod_revision
        if revision > self._applied:
            return f"bookmarkable: an event of revision {revision} after notice of {self._known}"
        if revision == self._applied and event.key not in self._applied_keys:
            return f"atomic: {event.key!r} comes after the rest of revision {revision}"
        return None

    def _on_progress(self, revision: Revision) -> tuple[Step, ...]:
        if revision < self._reached:
            return self._violate(f"bookmarkable: notice of {revision} after {self._reached}")
        self._reached = revision
        # Below what is known, yet in order: the member is behind the one that we watched before.
        if revision >= self._known:
            self._known = revision
            self._attempt = 0
        return ()

    # --- ways back --------------------------------------------------------------------------

    def _back_off(self, reason: str, *, relist: bool) -> BackOff:
        self._attempt += 1
        return BackOff(self._attempt - 1, reason, relist)

    def _violate(self, reason: str) -> tuple[Step, ...]:
        self._counts["violations"] += 1
        return self._relist(reason)

    def _refute(self, reason: str) -> tuple[Step, ...]:
        self._counts["refuted"] += 1
        return self._relist(f"another history: {reason}")

    def _relist(self, reason: str) -> tuple[Step, ...]:
        steps: tuple[Step, ...] = (CloseWatch(),) if self._state in _WATCH else ()
        self._state = State.LISTING
        self._checks = ()
        self._pinned = Revision(0)
        self._resuming = False
        self._read = self._first_page()
        return (*steps, self._back_off(reason, relist=True), self._read)

    def _close(self) -> tuple[Step, ...]:
        steps: tuple[Step, ...] = (CloseWatch(),) if self._state in _WATCH else ()
        self._state = State.CLOSED
        self._read = None
        self._checks = ()
        return steps
