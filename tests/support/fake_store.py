"""An etcd in memory: the port `Store`, verified by the contract that real etcd passes too.

Knows: etcd's rules (MVCC history, compaction, transactions, watches), and knobs to make it fail,
wait or break at a chosen moment. Does not know: real time, sockets.

Concurrency: trio primitives only, so it works under the autojump clock. The `*_now` methods
are a foreign writer: they change the store between two checkpoints of whoever is tested.
"""

import bisect
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Literal, final

import trio

from etcdfs.errors import (
    CompactedError,
    FutureRevisionError,
    LeaseExistsError,
    StoreError,
    WatchLostError,
)
from etcdfs.keyspace.store import (
    END_OF_KEYS,
    Committed,
    Delete,
    Event,
    KeyValue,
    Page,
    Put,
    Revision,
    StoreStatistics,
    StoreStatus,
    Transaction,
    WatchEvents,
    WatchMessage,
    WatchOpened,
    WatchProgress,
)
from tests.support.fake_transaction import carry_out, check_key, page, within

_WATCH_BATCH_REVISIONS = 1000

Request = Literal["range", "commit", "ready", "status", "watch"]
Gate = Literal["range", "commit", "answer", "status", "watch"]


@dataclass(frozen=True, slots=True)
class RangeCall:
    """A range that was asked for."""

    start: bytes
    end: bytes | None
    limit: int
    revision: int
    keys_only: bool


@dataclass(frozen=True, slots=True)
class _Failure:
    error: Exception
    applied: bool


@final
class FakeStore:
    """etcd in memory. Owned by one test.

    Attributes:
        range_calls: Every range so far, for tests of what is asked.
        commit_calls: Every transaction so far.
        ready_calls: How often it was asked whether it is there.
        leases: The leases that exist; a `Put` with any other is refused.
        pace: Waited for before each request is carried out, and before it is answered.
    """

    def __init__(self, *, revision: int = 1) -> None:
        # constants
        self._first = revision + 1
        # mutable state
        self.range_calls: list[RangeCall] = []
        self.commit_calls: list[Transaction] = []
        self.ready_calls = 0
        self.leases: set[int] = set()
        self._lease_ends: dict[int, float] = {}
        self._live: dict[bytes, KeyValue] = {}
        self._keys: list[bytes] = []  # every key that ever was, sorted
        self._versions: dict[bytes, list[Event]] = {}
        self._history: list[tuple[Event, ...]] = []  # by revision, from self._first on
        self._compacted = 0
        self._watchers: set[FakeWatch] = set()
        self._watches = 0
        self._failures: dict[Request, deque[_Failure]] = {}
        self._gates: dict[Gate, trio.Event] = {}
        self.pace: Callable[[], Awaitable[None]] | None = None
        self._losing = False
        self._muted = False

    # --- the port ---------------------------------------------------------------------------

    async def range(
        self,
        start: bytes,
        end: bytes | None = None,
        *,
        limit: int = 0,
        revision: int = 0,
        keys_only: bool = False,
        newest: bool = False,
    ) -> Page:
        """Read a range; see the port."""
        self.range_calls.append(RangeCall(start, end, limit, revision, keys_only))
        await self._pass("range")
        self._maybe_fail("range")
        return self.range_now(
            start, end, limit=limit, revision=revision, keys_only=keys_only, newest=newest
        )

    async def commit(self, transaction: Transaction) -> Committed:
        """Carry out a transaction; see the port."""
        self.commit_calls.append(transaction)
        await self._pass("commit")
        failure = self._failure("commit")
        if failure is not None and not failure.applied:
            raise failure.error
        committed = self.commit_now(transaction)
        await self._pass("answer")
        if failure is not None:
            raise failure.error
        return committed

    @asynccontextmanager
    async def watch(
        self, start: bytes, end: bytes, from_revision: int
    ) -> AsyncIterator["FakeWatch"]:
        """Watch a range; see the port."""
        self._watches += 1
        await trio.lowlevel.checkpoint()
        watch = FakeWatch(self, start, end, from_revision)
        failure = self._failure("watch")
        if failure is not None:
            watch.fail(failure.error)
        watch.pull()
        self._watchers.add(watch)
        try:
            yield watch
        finally:
            self._watchers.discard(watch)

    async def lease_grant(self, ttl_s: int, lease: int = 0) -> int:
        """Make a lease; see the port. It ends only by `lease_revoke`."""
        await trio.lowlevel.checkpoint()
        if lease in self.leases:
            raise LeaseExistsError("etcdserver: lease already exists")
        lease = lease or 0x1000 + len(self._lease_ends)
        self.leases.add(lease)
        self._lease_ends[lease] = trio.current_time() + ttl_s
        return lease

    async def lease_time_to_live(self, lease: int) -> int | None:
        """Return the seconds a lease has left; see the port."""
        await trio.lowlevel.checkpoint()
        if lease not in self.leases:
            return None
        return int(self._lease_ends[lease] - trio.current_time())

    async def lease_has_keys(self, lease: int) -> bool:
        """Tell whether a lease holds any key; see the port."""
        await trio.lowlevel.checkpoint()
        return any(kv.lease == lease for kv in self._live.values())

    async def lease_revoke(self, lease: int) -> None:
        """End a lease; see the port."""
        await trio.lowlevel.checkpoint()
        self.leases.discard(lease)
        held = [kv.key for kv in self._live.values() if kv.lease == lease]
        if held:
            self.commit_now(Transaction(then=tuple(Delete(key) for key in held)))

    async def ready(self) -> None:
        """Return if etcd is there; see the port."""
        self.ready_calls += 1
        await self._pass("status")
        self._maybe_fail("ready")

    async def status(self) -> StoreStatus:
        """Return a member's status."""
        await self._pass("status")
        self._maybe_fail("status")
        size = sum(len(kv.key) + len(kv.value) for kv in self._live.values())
        return StoreStatus(version="3.5.99", database_size=size, revision=self.revision, cluster=1)

    def statistics(self) -> StoreStatistics:
        """Count the requests so far."""
        return StoreStatistics(
            ranges=len(self.range_calls),
            transactions=len(self.commit_calls),
            watches=self._watches,
            revision=self.revision,
        )

    # --- the foreign writer -----------------------------------------------------------------

    @property
    def revision(self) -> Revision:
        """The store's revision."""
        return Revision(self._first + len(self._history) - 1)

    @property
    def compacted(self) -> int:
        """The oldest revision that can be read; 0 before the first compaction."""
        return self._compacted

    @property
    def watch_count(self) -> int:
        """How many watches stand."""
        return len(self._watchers)

    def put_now(self, key: bytes, value: bytes) -> Revision:
        """Set a key behind everybody's back; return the revision."""
        return self.commit_now(Transaction(then=(Put(key, value),))).revision

    def delete_now(self, key: bytes, end: bytes | None = None) -> Revision:
        """Delete a key or a range behind everybody's back; return the revision."""
        return self.commit_now(Transaction(then=(Delete(key, end),))).revision

    def commit_now(self, transaction: Transaction) -> Committed:
        """Carry out a transaction at once."""
        committed, events = carry_out(self, transaction)
        if events:
            self._append(events)
        return committed

    def range_now(
        self,
        start: bytes,
        end: bytes | None = None,
        *,
        limit: int = 0,
        revision: int = 0,
        keys_only: bool = False,
        newest: bool = False,
    ) -> Page:
        """Read a range at once; raises as `range` does."""
        check_key(start, end)
        if revision > self.revision:
            raise FutureRevisionError("etcdserver: mvcc: required revision is a future revision")
        if 0 < revision < self._compacted:
            raise CompactedError("etcdserver: mvcc: required revision has been compacted")
        found = [
            kv
            for key in self.keys_between(start, end)
            if (kv := self._at(key, revision or self.revision)) is not None
        ]
        if newest:
            found.sort(key=lambda kv: -kv.mod_revision)
        return page(found, self.revision, 1 if newest else limit, keys_only)

    def compact_now(self, revision: int) -> None:
        """Forget what was superseded before `revision`.

        Raises:
            CompactedError: That was done already.
            FutureRevisionError: There is no such revision yet.
        """
        if revision <= self._compacted:
            raise CompactedError("etcdserver: mvcc: required revision has been compacted")
        if revision > self.revision:
            raise FutureRevisionError("etcdserver: mvcc: required revision is a future revision")
        self._compacted = revision

    # --- knobs ------------------------------------------------------------------------------

    def fail_next(
        self, request: Request, error: Exception, *, applied: bool = False, times: int = 1
    ) -> None:
        """Make the next requests of a kind fail.

        Args:
            request: Which kind; for "watch", the next watch fails when it is received from.
            error: What they raise.
            applied: Whether a commit is carried out nevertheless (an answer that got lost).
            times: How many of them.
        """
        failures = self._failures.setdefault(request, deque())
        failures.extend([_Failure(error, applied)] * times)

    def break_watches(self, error: StoreError | None = None) -> None:
        """End every watch that stands, undelivered events and all."""
        for watch in self._watchers:
            watch.fail(error or WatchLostError("broken by the test"))

    @contextmanager
    def losing_events(self) -> Iterator[None]:
        """Let watches that stand miss what happens meanwhile, as some releases of etcd do."""
        self._losing = True
        try:
            yield
        finally:
            self._losing = False
            for watch in self._watchers:
                watch.skip()

    def deliver_now(self, *messages: Sequence[int]) -> bool:
        """Have every watch told of revisions, whether or not that was done; say if there is one.

        Args:
            messages: The revisions of each message, in their order.
        """
        told = [watch.send(revisions) for watch in self._watchers for revisions in messages]
        return all(told) and bool(told)

    def go_back_now(self, revision: int) -> None:
        """Become what a snapshot of `revision` was: another history from there on."""
        del self._history[revision - self._first + 1 :]
        self._compacted = min(self._compacted, revision)
        self._live.clear()
        for key in list(self._versions):
            kept = [e for e in self._versions[key] if e.mod_revision <= revision]
            self._versions[key] = kept
            if kept and isinstance(kept[-1], KeyValue):
                self._live[key] = kept[-1]
        self.break_watches()

    def mute(self, *, muted: bool) -> None:
        """Leave questions for progress unanswered, as some releases of etcd do."""
        self._muted = muted
        self._pull_watches()

    @property
    def is_muted(self) -> bool:
        """Whether questions for progress are left unanswered."""
        return self._muted

    def forge_now(self, key: bytes, value: bytes) -> None:
        """Give a key another value at the revision it has: another history, hard to tell."""
        entry = self._live[key]._replace(value=value)
        self._live[key] = self._versions[key][-1] = entry

    def hold(self, gate: Gate) -> None:
        """Let requests of a kind wait until `release`.

        "commit" holds them before they are carried out, "answer" holds commits after that,
        "watch" holds back what watches deliver.
        """
        self._gates.setdefault(gate, trio.Event())

    def release(self, gate: Gate) -> None:
        """Let go what `hold` holds; nothing when nothing is held."""
        if gate in self._gates:
            self._gates.pop(gate).set()
        self._pull_watches()

    @property
    def has_news(self) -> bool:
        """Whether a watch has not been sent all that has happened."""
        return any(watch.is_behind for watch in self._watchers)

    def hold_watches(self) -> None:
        """Deliver nothing to watches until `release_watches`."""
        self.hold("watch")

    def release_watches(self) -> None:
        """Deliver to watches again, beginning with what was held back."""
        self.release("watch")

    # --- for FakeWatch and transactions -------------------------------------------------------------

    @property
    def watches_held(self) -> bool:
        """Whether watches deliver nothing at the moment."""
        return "watch" in self._gates

    def current(self, key: bytes) -> KeyValue | None:
        """Return a key as it is now."""
        return self._live.get(key)

    def keys_between(self, start: bytes, end: bytes | None) -> Sequence[bytes]:
        """Return every key of a range that ever was, in order."""
        if end is None:
            return (start,) if start in self._versions else ()
        first = bisect.bisect_left(self._keys, start)
        last = len(self._keys) if end == END_OF_KEYS else bisect.bisect_left(self._keys, end)
        return self._keys[first:last]

    def events_of(self, revision: int) -> tuple[Event, ...]:
        """Return the events of a revision."""
        return self._history[revision - self._first] if revision >= self._first else ()

    def _at(self, key: bytes, revision: int) -> KeyValue | None:
        if revision == self.revision:
            return self._live.get(key)
        versions = self._versions[key]
        index = bisect.bisect_right(versions, revision, key=_mod_revision)
        found = versions[index - 1] if index else None
        return found if isinstance(found, KeyValue) else None

    def _append(self, events: tuple[Event, ...]) -> None:
        self._history.append(events)
        for event in events:
            if event.key not in self._versions:
                self._versions[event.key] = []
                bisect.insort(self._keys, event.key)
            self._versions[event.key].append(event)
            if isinstance(event, KeyValue):
                self._live[event.key] = event
            else:
                self._live.pop(event.key, None)
        self._pull_watches()

    def _pull_watches(self) -> None:
        if self._losing:
            return
        for watch in self._watchers:
            watch.pull()

    async def _pass(self, gate: Gate) -> None:
        await trio.lowlevel.checkpoint()
        if self.pace is not None:
            await self.pace()
        while (event := self._gates.get(gate)) is not None:
            await event.wait()

    def _failure(self, request: Request) -> _Failure | None:
        failures = self._failures.get(request)
        return failures.popleft() if failures else None

    def _maybe_fail(self, request: Request) -> None:
        failure = self._failure(request)
        if failure is not None:
            raise failure.error


@final
class FakeWatch:
    """A standing watch on a `FakeStore`.

    As with etcd, what happens is put on its way at once, whether or not somebody receives;
    only while the store holds watches does it stay in history, where compaction may get it.
    """

    def __init__(self, store: FakeStore, start: bytes, end: bytes, from_revision: int) -> None:
        # dependencies
        self._store = store
        # constants
        self._start = start
        self._end = end
        # mutable state
        self._next = from_revision or store.revision + 1
        self._opened = False
        self._questions = 0
        self._on_its_way: deque[WatchMessage] = deque()
        self._error: Exception | None = None
        self._changed = trio.Event()

    async def receive(self) -> WatchMessage:
        """Wait for the next message; see the port."""
        await trio.lowlevel.checkpoint()
        while not self._on_its_way:
            if self._error is not None:
                raise self._error
            self._changed = trio.Event()
            await self._changed.wait()
        return self._on_its_way.popleft()

    async def request_progress(self) -> None:
        """Ask how far this watch is."""
        await trio.lowlevel.checkpoint()
        if self._error is not None:
            raise self._error
        self._questions += 1
        self.pull()

    def pull(self) -> None:
        """Send what there is to say."""
        if self._store.watches_held or self._error is not None:
            return
        if not self._opened:
            self._opened = True
            self._on_its_way.append(WatchOpened(self._store.revision))
        self._pull_events()
        if self._questions and not self._store.is_muted:
            progress = WatchProgress(self._store.revision)
            self._on_its_way.extend([progress] * self._questions)
            self._questions = 0
        self._changed.set()

    @property
    def is_behind(self) -> bool:
        """Whether something has happened that it has not been sent."""
        return self._next <= self._store.revision

    def send(self, revisions: Sequence[int]) -> bool:
        """Tell of some revisions in one message; say if the watch stands."""
        events = tuple(e for revision in revisions for e in self._events_of(revision))
        if events and self._opened and self._error is None:
            self._on_its_way.append(WatchEvents(events, events[-1].mod_revision))
            self._changed.set()
        return self._opened and self._error is None

    def skip(self) -> None:
        """Go on after the newest revision."""
        self._next = self._store.revision + 1

    def fail(self, error: Exception) -> None:
        """End it; what is on its way is lost."""
        self._on_its_way.clear()
        self._error = error
        self._changed.set()

    def _pull_events(self) -> None:
        """Send the events of whole revisions, skipping what is out of range."""
        store = self._store
        if self._next < store.compacted:
            self._error = CompactedError("history is gone", store.compacted)
            return
        while self._next <= store.revision:
            last = min(self._next + _WATCH_BATCH_REVISIONS - 1, store.revision)
            events = tuple(e for r in range(self._next, last + 1) for e in self._events_of(r))
            self._next = last + 1
            if events:
                self._on_its_way.append(WatchEvents(events, events[-1].mod_revision))

    def _events_of(self, revision: int) -> Iterator[Event]:
        for event in self._store.events_of(revision):
            if within(event.key, self._start, self._end):
                yield event


def _mod_revision(event: Event) -> int:
    return event.mod_revision
