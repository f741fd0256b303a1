"""Making the watch's batches visible, one after another, and catching up when they come too fast.

Knows: in which order the tree and the kernel change, and how a backlog collapses. Does not know:
where events come from, pyfuse3.

Each batch becomes visible by *switching*: the kernel lets go of what will be
untrue while lookups still answer the old state with no lifetime; then the tree changes in one
step. So nobody sees part of a revision, and nothing older after something newer.

While a batch waits for the kernel, others go on coming. They are merged: of each key the last
event counts, and one switch makes many revisions visible, the last of them at once. So a mirror
that fell behind a hot key catches up with the next batch. A merged batch is cut where it has
`BATCH_KEYS` keys or `BATCH_BYTES` of values, between two revisions: planning is one step, and
nobody is answered meanwhile. When `WAITING_MAX` of them wait, the watch is not read any
further, and what comes stays with etcd.

A batch that would wait for a lock which a call of this mount holds (`invalidator`) is published at
once, and the kernel let go after.

Concurrency: synchronous, on the trio thread: a batch goes on when the kernel has let go, or
when a call begins to hold a lock. Only who hands batches on waits.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby
from operator import attrgetter
from typing import Final, final

import trio
from cachetools import LRUCache

from etcdfs.keyspace.attribute_records import is_record_key
from etcdfs.keyspace.store import Event, KeyValue, Revision
from etcdfs.mirror.invalidator import Invalidator, KernelCache
from etcdfs.tree.changes import Plan
from etcdfs.tree.inodes import Cached, File
from etcdfs.tree.update import Update
from etcdfs.tree.value_cache import ValueCache

log = logging.getLogger(__name__)

SWITCH_ROUNDS: Final = 8
"""Rounds of invalidation before a batch is applied. The second round finds what a change of
this mount added meanwhile; more are not expected, and a batch must not wait for ever."""

BATCH_KEYS: Final = 500
"""Keys of a merged batch; about ten milliseconds of planning. One revision is never cut."""

BATCH_BYTES: Final = 4 << 20

WAITING_MAX: Final = 4
"""Merged batches that may wait; they and one response of etcd's are all that memory holds."""

PAST_MAX: Final = 1024
"""Keys of which the value before the present one is known to be held; of others it may be."""

GRACE_S: Final = 0.002
"""How long the kernel mostly takes to let go of a name, and more; it is 0.2 ms when it is idle."""

_REVISION: Final = attrgetter("mod_revision")


@dataclass(slots=True)
class _Batch:
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
        return self.is_closed or len(self.events) >= BATCH_KEYS or self.size >= BATCH_BYTES

    def add(self, event: Event, *, is_own: bool) -> None:
        before = self.events.pop(event.key, None)  # so that it is put behind all others
        if before is not None:
            self.size -= _size(before)
            if is_own:
                self.own.append(before)
        self.events[event.key] = event
        self.size += _size(event)
        self.count += 1

    def all(self) -> tuple[Event, ...]:
        return (*self.own, *self.events.values())


@final
class Applier:
    """Shows what the watch brings. Owned by the mirror.

    Attributes:
        revision: The revision that readers see.
        batches: Batches applied.
        events: Events that came with them.
        collapsed: Those that nobody saw, as a later one of their key was there already.
        early: Batches applied before the invalidation was done, for a call that held its lock.
    """

    def __init__(
        self,
        update: Update,
        value_cache: ValueCache,
        kernel: KernelCache,
        failed: Callable[[], None],
    ) -> None:
        """Make an applier; `failed` is told when a batch cannot be applied."""
        # --- dependencies
        self._update = update
        self._value_cache = value_cache
        self.invalidator = Invalidator(kernel, self._give_way)
        self._failed = failed
        # --- mutable state
        self.revision = 0
        self.batches = self.events = self.collapsed = self.early = 0
        self._now: _Batch | None = None
        self._waiting: deque[_Batch] = deque()
        # Of the present batch: what the kernel was asked to let go of, in how many rounds, and
        # the number of the round that it has not answered yet; 0: none.
        self._asked: set[Cached] = set()
        self._rounds = 0
        self._round = 0
        self._numbers = count(1)
        self._past: LRUCache[bytes, int] = LRUCache(PAST_MAX)
        self._is_broken = False  # nothing is taken until everything is listed again
        self._advanced = trio.Event()

    # --- taking -----------------------------------------------------------------------------

    async def take(self, events: Sequence[Event], stored_records: Sequence[Event] = ()) -> None:
        """Take whole revisions, oldest first, as soon as there is room.

        With them come the attributes of keys that are made in them.

        Returns when they are visible, if that is soon. Reading on at once would take the
        processor (Python's lock) from the thread that tells the kernel.
        """
        while len(self._waiting) >= WAITING_MAX and self._waiting[-1].is_full:
            await self._advanced.wait()
        was_idle = self._now is None
        self._merge(events, stored_records)
        self._begin()
        if was_idle:
            with trio.move_on_after(GRACE_S):
                await self.idle()
                await trio.lowlevel.checkpoint()  # readers go first

    async def show(self, events: Sequence[Event], *, force: bool = False) -> None:
        """Make further events visible, in one step, after what was taken; return when they are."""
        batch = _Batch(force=force, is_closed=True)
        for event in events:
            batch.add(event, is_own=event.key in self._update.intents)
        self._waiting.append(batch)
        self._begin()
        await batch.over.wait()

    def _merge(self, events: Sequence[Event], stored_records: Sequence[Event]) -> None:
        if self._is_broken:
            return
        intents = self._update.intents
        for revision, group in groupby(events, _REVISION):
            if not self._waiting or self._waiting[-1].is_full:
                self._waiting.append(_Batch())
            batch = self._waiting[-1]
            for event in (*group, *stored_records):
                batch.add(event, is_own=event.key in intents)
            batch.revision = revision
            stored_records = ()  # they may well come before their keys

    async def replace(self, events: Sequence[Event], revision: int) -> None:
        """Show exactly what a new listing says, once nothing else is under way."""
        await self.idle()
        self._is_broken = False
        batch = _Batch(revision=revision, force=True, is_closed=True)
        for event in events:
            batch.add(event, is_own=False)
        self._waiting.append(batch)
        self._begin()
        await batch.over.wait()

    def adopt(self, revision: int) -> None:
        """Go on with a tree that was made anew; nothing else is under way."""
        self._is_broken = False
        self._update.relisted()
        self.revision = revision
        self._wake()

    async def idle(self) -> None:
        """Return when all that was taken is visible, or has failed."""
        while self._now is not None or self._waiting:
            await self._advanced.wait()

    async def advanced(self) -> None:
        """Return when readers see a newer revision; the caller bounds it."""
        await self._advanced.wait()

    # --- switching --------------------------------------------------------------------------

    def _give_way(self) -> None:
        if self._round and self._now is not None and self.invalidator.is_held():
            self.early += 1
            self._go_on(self._round, early=True)

    def _begin(self) -> None:
        """Begin with the next batch, unless one is under way."""
        if self._now is not None or not self._waiting:
            return
        self._now = self._waiting.popleft()
        self._asked = set()
        self._rounds = 0
        for event in self._now.events.values():
            if isinstance(event, KeyValue) and not is_record_key(event.key):
                self._value_cache.put(event.key, event.mod_revision, event.value)
        self._go_on(0)

    def _go_on(self, number: int, *, early: bool = False) -> None:
        """Take the next step with the present batch, if the round it waited for is this one.

        That is over, unless it is `early`.
        """
        if self._now is None or number != self._round:
            return
        self._round = 0
        try:
            self._step(self._now, early=early)
        except Exception:  # it runs as a callback of trio's, which none must leave
            log.exception("a batch could not be applied; this is a bug of etcdfs")
            self._fail(self._now)

    def _step(self, batch: _Batch, *, early: bool) -> None:
        # Anything may have happened to the tree since the last step: it is planned again.
        plan = self._update.plan(batch.all(), force=batch.force)
        stale = self._update.invalidations(plan) - self._asked
        if early:
            self._update.note_not_invalidated(plan)
        if not stale or self._rounds == SWITCH_ROUNDS:
            self._apply_batch(batch, plan, late=stale)
            return
        self._update.tree.being_changed |= self._update.uncacheable(plan)
        self._update.note_invalidated(plan, stale)
        self._asked |= stale
        self._rounds += 1
        self._round = number = next(self._numbers)
        self.invalidator.submit(stale, lambda: self._go_on(number))
        self._give_way()

    def _apply_batch(self, batch: _Batch, plan: Plan, *, late: set[Cached]) -> None:
        before = self._versions(plan)
        self._update.apply(plan)
        for file, key, revision in before:
            # Or a key that is always written would fill the memory with what nobody asks for.
            is_past = file.directory is None or revision != file.version
            if is_past and not file.handles:
                self._invalidate(key, revision)
        self._update.tree.being_changed.clear()
        self.invalidator.submit(late | self._update.tree.held.excess())
        self.batches += 1
        self.events += batch.count
        self.collapsed += batch.count - len(batch.events)
        if batch.revision is not None:
            self.revision = batch.revision
            self._update.reached(batch.revision)
        self._finish(batch)

    def _invalidate(self, key: bytes, revision: int) -> None:
        """Let go of the value before the one that is past now: a call under way may want that."""
        before = self._past.pop(key, 0)
        if before:
            self._value_cache.discard(key, Revision(before))
        self._past[key] = revision

    def _versions(self, plan: Plan) -> list[tuple[File, bytes, int]]:
        """Return the files that a plan replaces or changes, their keys and mod_revisions."""
        tree = self._update.tree
        files = [before for _, _, before, _ in plan.changes() if isinstance(before, File)]
        known = plan.keys  # making keys of paths would take longer than all the rest
        keys = ((f, known.get(f) or tree.key_of(f)) for f in (*files, *plan.key_state))
        return [(file, key, file.version) for file, key in keys if key is not None]

    def _finish(self, batch: _Batch) -> None:
        self._now = None
        batch.over.set()
        self._wake()
        if self._waiting:  # in the next turn of the loop: others have waited long enough
            trio.lowlevel.current_trio_token().run_sync_soon(self._begin)

    def _wake(self) -> None:
        self._advanced.set()
        self._advanced = trio.Event()

    def _fail(self, batch: _Batch) -> None:
        self._update.tree.being_changed.clear()
        self._update.tree.doubtful = True  # it may have been half-way
        self._waiting = deque(other for other in self._waiting if other.is_closed)
        self._is_broken = True
        self._finish(batch)
        self._failed()


def _size(event: Event) -> int:
    return len(event.value) if isinstance(event, KeyValue) else 0
