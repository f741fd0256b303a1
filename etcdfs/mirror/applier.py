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

One revision may have very many keys, and is never cut. So a large batch is planned in parts, and
other calls have their turn in between. Each part depends on little, and is planned again if that
has changed meanwhile (`Tree.disturbed`); when all parts hold, they become visible in one step.

Where the kernel opens files without asking, a file that it holds follows its key only if nobody
has it open; else the name gets another inode. To find that out takes a moment, in which it must stay
so: what the kernel asks of its attributes waits (`decided`), and it asks before anybody who
opens the file then can read. What is read all the same makes it open (`etcdfs.files.unopened`).

What takes no lock the kernel is told at once, and it is visible in the same step. A batch that would
wait for a lock which a call of this mount holds is published, and the kernel let go after.

Concurrency: synchronous, on the trio thread: a batch goes on when the kernel has let go, or
when a call begins to hold a lock. Only who hands batches on waits.
"""

import gc
import logging
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, groupby, islice
from operator import attrgetter
from typing import Final, final

import trio
from cachetools import LRUCache

from etcdfs.admission import about_to_wait
from etcdfs.errors import StaleError
from etcdfs.keyspace.attribute_records import is_record_key, owner_of
from etcdfs.keyspace.store import Event, KeyValue, Revision
from etcdfs.mirror.invalidator import Invalidator, KernelCache
from etcdfs.mirror.messages import BATCH_KEYS, Batch
from etcdfs.tree.changes import Part, Plan
from etcdfs.tree.inodes import Cached, Dentry, File, Inode, contents_in
from etcdfs.tree.update import NameChange, Update, changes_of_others
from etcdfs.tree.value_cache import ValueCache

log = logging.getLogger(__name__)

Observer = Callable[[Iterable[NameChange], Collection[Part]], Callable[[], None] | None]
"""Is told what other clients change right before that becomes visible; in parts, what are very many.

It may return what is to be called when the kernel, too, has let go of what was before."""

SWITCH_ROUNDS: Final = 8
"""Rounds of invalidation before a batch is applied. The second round finds what a change of
this mount added meanwhile; more are not expected, and a batch must not wait for ever."""

LARGE: Final = 2 * BATCH_KEYS
"""Keys of a batch from which on it is planned in parts."""

PART_KEYS: Final = 100
"""Keys of a part; about a millisecond."""

PASSES_MAX, IDLE_PASSES = 16, 3
"""Passes of the event loop that are left to others between two parts, while they have something to
do: a request takes several. Trio's order in a pass is by chance, so that one says too little."""

FEW_PARTS: Final = 4
"""Parts that may be planned again in the very step that makes all visible."""

WAITING_MAX: Final = 4
"""Merged batches that may wait; they and one response of etcd's are all that memory holds."""

PAST_MAX: Final = 1024
"""Keys of which the value before the present one is known to be held; of others it may be."""

GRACE_S: Final = 0.002
"""How long the kernel mostly takes to let go of a name, and more; it is 0.2 ms when it is idle."""

_REVISION: Final = attrgetter("mod_revision")

_Version = tuple[File, bytes, int]
"""A file, its key and its mod_revision."""


@dataclass(slots=True)
class _Work:
    """How far a large batch is.

    Attributes:
        apart: Keys whose attributes change in it, too.
        parts: What is planned, and the versions that will be past.
        rest: What is planned in one piece.
    """

    apart: set[bytes]
    parts: list[tuple[Part, list[_Version]]] = field(default_factory=list)
    rest: list[Event] = field(default_factory=list)


@final
class Applier:
    """Shows what the watch brings. Owned by the mirror.

    Attributes:
        observe: Who is told of changes; None: nobody.
        unseen: What was to be called for a batch that then could not be applied.
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
        self._kernel = kernel
        self.invalidator = Invalidator(kernel, self._give_way)
        self._failed = failed
        self.observe: Observer | None = None
        # --- mutable state
        self.unseen: Callable[[], None] | None = None
        self.revision = 0
        self.batches = self.events = self.collapsed = self.early = 0
        self._now: Batch | None = None
        self._waiting: deque[Batch] = deque()
        # Of the present batch: what the kernel was asked to let go of, in how many rounds, and
        # the number of the round that it has not answered yet; 0: none.
        self._asked: set[Cached] = set()
        self._rounds = 0
        self._round = 0
        self._numbers = count(1)
        # Of a present batch that is large: what is to be done, what the kernel was last asked,
        # and whether a call is in its way.
        self._turns: Iterator[set[Cached]] | None = None
        self._unanswered: set[Cached] = set()
        self._is_early = False
        self._passes = self._idle_passes = 0  # left to others so far, and those without a task
        self._past: LRUCache[bytes, int] = LRUCache(PAST_MAX)
        self._taken: set[int] = set()  # revisions that the watch will bring yet
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
        if len(events) > LARGE:
            for _ in range(PASSES_MAX):
                await trio.lowlevel.checkpoint()  # what came before it took a while, too
        was_idle = self._now is None
        self._merge(events, stored_records)
        self._begin()
        if was_idle and self._now is not None:
            with trio.move_on_after(GRACE_S):
                await self.idle()
                await trio.lowlevel.checkpoint()  # readers go first

    def take_own(self, put: KeyValue) -> bool:
        """Take all that a revision of ours is before the watch brings it; say whether it is taken.

        Only if readers see the very revision before it: nothing must be seen first then.
        """
        is_idle = self._now is None and not self._waiting and not self._is_broken
        if put.mod_revision != self.revision + 1 or not is_idle:
            return False
        self._taken.add(put.mod_revision)
        self._merge((put,), ())
        self._begin()
        return True

    def not_taken(self, events: Sequence[Event]) -> Sequence[Event]:
        """Return those of the watch's events that were not taken when this mount made them."""
        if not self._taken:
            return events
        fresh = [event for event in events if event.mod_revision not in self._taken]
        self._taken -= {event.mod_revision for event in events}
        return fresh

    async def show(self, events: Sequence[Event], *, force: bool = False) -> None:
        """Make further events visible, in one step, after what was taken; return when they are."""
        batch = Batch(force=force, is_closed=True)
        batch.add_all(events, self._update.intents)
        self._waiting.append(batch)
        self._begin()
        await batch.over.wait()

    def _merge(self, events: Sequence[Event], stored_records: Sequence[Event]) -> None:
        if self._is_broken:
            return
        intents = self._update.intents
        is_one = bool(events) and events[0].mod_revision == events[-1].mod_revision
        groups = [(events[0].mod_revision, events)] if is_one else groupby(events, _REVISION)
        for revision, group in groups:
            if not self._waiting or self._waiting[-1].is_full:
                self._waiting.append(Batch())
            batch = self._waiting[-1]
            batch.add_all((*group, *stored_records), intents)
            batch.revision = revision
            stored_records = ()  # they may well come before their keys

    async def replace(self, events: Sequence[Event], revision: int) -> None:
        """Show exactly what a new listing says, once nothing else is under way."""
        await self.idle()
        self._is_broken = False
        self._taken.clear()
        batch = Batch(revision=revision, force=True, is_closed=True)
        batch.add_all(events, ())
        self._waiting.append(batch)
        self._begin()
        await batch.over.wait()

    def adopt(self, revision: int) -> None:
        """Go on with a tree that was made anew; nothing else is under way."""
        self._is_broken = False
        self._taken.clear()
        self._update.relisted()
        self.revision = revision
        self._wake()

    async def idle(self) -> None:
        """Return when all that was taken is visible, or has failed."""
        while self._now is not None or self._waiting:
            await self._advanced.wait()

    async def decided(self, inode: Inode) -> None:
        """Return when it is decided which version an inode is, from then on."""
        while inode in self._update.tree.unseen.deciding:
            about_to_wait()
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
        # What moves directories is planned in one piece.
        if len(self._now.events) > LARGE and not self._update.relocations:
            self._turns = self._in_parts(self._now)
            _soon(self._turn)
            return
        self._keep(self._now.events.values())
        self._go_on(0)

    def _keep(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, KeyValue) and not is_record_key(event.key):
                self._value_cache.put(event.key, event.mod_revision, event.value)

    def _go_on(self, number: int, *, early: bool = False) -> None:
        """Take the next step with the present batch, if the round it waited for is this one.

        That is over, unless it is `early`.
        """
        if self._now is None or number != self._round:
            return
        self._round = 0
        if self._turns is not None:
            self._is_early |= early
            self._turn()
            return
        try:
            self._step(self._now, early=early)
        except Exception:  # it runs as a callback of trio's, which none must leave
            log.exception("a batch could not be applied; this is a bug of etcdfs")
            self._fail(self._now)

    def _step(self, batch: Batch, *, early: bool) -> None:
        # Anything may have happened to the tree since the last step: it is planned again.
        self._judge()
        plan = self._update.plan(batch.all(), force=batch.force)
        stale = self._update.invalidations(plan) - self._asked
        if self._rounds == SWITCH_ROUNDS and (unasked := contents_in(stale)):
            self._update.tree.unseen.opened |= unasked
            plan = self._update.plan(batch.all(), force=batch.force)
            stale = self._update.invalidations(plan) - self._asked
        if early:
            self._update.note_not_invalidated(plan)
        if not stale or self._rounds == SWITCH_ROUNDS:
            self._apply_batch(batch, plan, late=stale)
            return
        unopened = {file.inode for file in plan.renewed if file.reopened is None}
        if self.invalidator.at_once(stale, unopened):
            self._note_asked(plan, stale)
            self._apply_batch(batch, plan, late=set())
            return
        self._note_asked(plan, stale)
        self._wait_for(stale)

    def _note_asked(self, plan: Plan, stale: set[Cached]) -> None:
        self._update.tree.being_changed |= self._update.uncacheable(plan)
        self._update.note_invalidated(plan, stale)
        self._asked |= stale
        if self._update.tree.unseen.is_so and (contents := contents_in(stale)):
            self._update.tree.unseen.deciding |= contents
            self._kernel.unopened -= contents

    def _judge(self) -> None:
        """Take for open what is not known to be closed, now that the kernel has answered."""
        for inode in self._update.tree.unseen.judge(self._kernel.unopened):
            with suppress(StaleError):  # forgotten meanwhile, which has disturbed it
                self._update.tree.disturb(self._update.tree.node(inode))

    def _forget_openings(self) -> None:
        self._kernel.unopened -= self._update.tree.unseen.deciding
        self._update.tree.unseen.decided()

    def _wait_for(self, stale: Collection[Cached]) -> None:
        """Go on when the kernel has let go of what is stale, and of all before it."""
        self._rounds += 1
        self._round = number = next(self._numbers)
        self.invalidator.submit(stale, lambda: self._go_on(number))
        self._give_way()

    def _apply_batch(self, batch: Batch, plan: Plan, *, late: set[Cached]) -> None:
        before = self._versions(plan)
        seen = self._observed(plan)
        self._update.apply(plan)
        self._let_go_past(before)
        self._update.tree.being_changed.clear()
        self._forget_openings()
        self.invalidator.submit(late | self._update.tree.held.excess(), seen)
        self.unseen = None
        self._count(batch)
        self._finish(batch)

    def _observed(self, plan: Plan, parts: Collection[Part] = ()) -> Callable[[], None] | None:
        """Tell whoever observes what other clients' changes are about to become visible."""
        if self.observe is None:
            return None
        self.unseen = self.observe(changes_of_others(plan, self._update.locked), parts)
        return self.unseen

    def _count(self, batch: Batch) -> None:
        self.batches += 1
        self.events += batch.count
        self.collapsed += batch.count - len(batch.events)
        if batch.revision is not None:
            self.revision = batch.revision
            self._update.reached(batch.revision)

    def _let_go_past(self, before: Iterable[_Version]) -> None:
        for file, key, revision in before:
            # Or a key that is always written would fill the memory with what nobody asks for.
            if file in self._update.tree.unseen.superseded and file.value is None:
                file.value = self._value_cache.peek(key, Revision(revision))
            is_past = file.directory is None or revision != file.version
            if is_past and not file.handles:
                self._invalidate(key, revision)

    def _invalidate(self, key: bytes, revision: int) -> None:
        """Let go of the value before the one that is past now: a call under way may want that."""
        before = self._past.pop(key, 0)
        if before:
            self._value_cache.discard(key, Revision(before))
        self._past[key] = revision

    def _versions(self, plan: Plan) -> list[_Version]:
        """Return the files that a plan replaces or changes, their keys and mod_revisions."""
        tree = self._update.tree
        files = [before for _, _, before, _ in plan.changes() if isinstance(before, File)]
        known = plan.keys  # making keys of paths would take longer than all the rest
        keys = ((f, known.get(f) or tree.key_of(f)) for f in (*files, *plan.key_state))
        return [(file, key, file.version) for file, key in keys if key is not None]

    # --- in parts ---------------------------------------------------------------------------

    def _turn(self) -> None:
        """Do the next bit of work on a large batch."""
        assert self._now is not None
        assert self._turns is not None
        try:
            waits_for = next(self._turns)
        except StopIteration:
            self._end_turns()
            self._finish(self._now)
        except Exception:  # as in `_go_on`
            log.exception("a large batch could not be applied; this is a bug of etcdfs")
            self._end_turns()
            self._fail(self._now)
        else:
            if waits_for:
                self._unanswered = set()
                self._wait_for(waits_for)
            else:
                _soon(self._give_turns)

    def _give_turns(self) -> None:
        """Go on with the large batch when others have nothing to do, or had some passes."""
        self._passes += 1
        is_busy = trio.lowlevel.current_statistics().tasks_runnable > 0
        self._idle_passes = 0 if is_busy else self._idle_passes + 1
        if self._passes < PASSES_MAX and self._idle_passes < IDLE_PASSES:
            _soon(self._give_turns)
            return
        self._passes = self._idle_passes = 0
        self._turn()

    def _end_turns(self) -> None:
        self._turns = None
        gc.enable()

    def _in_parts(self, batch: Batch) -> Iterator[set[Cached]]:
        """Make a large batch visible.

        Yields:
            What the kernel must have let go of before the next bit; mostly nothing.
        """
        tree = self._update.tree
        tree.disturbed = set()
        self._is_early = False
        # The collector would walk all that is made here again and again, and nobody be answered.
        gc.disable()
        yield set()
        work = _Work({owner_of(key) for key in batch.events if is_record_key(key)})
        for events in _pieces(batch.events.values(), PART_KEYS):
            self._keep(events)
            work.parts.append(self._plan_part(batch, work, events))
            yield set()
        plan = yield from self._until_planned(batch, work)
        parts = [part for part, _ in work.parts]
        # No `yield` may lie between the last plan and this.
        if self._is_early:
            for some in (*(part.plan for part in parts), plan):
                self._update.note_not_invalidated(some)
        tree.disturbed = None
        past = self._versions(plan)
        seen = self._observed(plan, parts)
        self._update.publish_parts(parts, plan)
        # What is asked for last is done when all before it is.
        last = {tree.listing_of(tree.root)} if seen is not None and self._is_early else set()
        self.invalidator.submit(last, seen)
        self.unseen = None
        waste = (tree.being_changed, self._asked)
        tree.being_changed, self._asked = set(), set()
        self._forget_openings()
        self._count(batch)
        batch.over.set()
        self._wake()
        yield set()
        parts.clear()
        self._let_go_past(past)
        yield from self._clean_up(work, waste)

    def _clean_up(self, work: "_Work", waste: Sequence[set[Cached]]) -> Iterator[set[Cached]]:
        """Let go of what a large batch was made visible with; all at once takes long, too."""
        held = self._update.tree.held
        while work.parts or any(waste):
            if work.parts:
                part, versions = work.parts.pop()
                self._let_go_past(versions)
                for directory, files in part.gone.items():
                    for name, file, _ in files:
                        if file.lookups and file.directory is None:
                            held.add(Dentry(directory.inode, name), file)
            for names in waste:
                for _ in range(min(len(names), 4 * PART_KEYS)):
                    names.pop()
            yield set()
        self.invalidator.submit(held.excess())
        gc.freeze()

    def _until_planned(self, batch: Batch, work: "_Work") -> Generator[set[Cached], None, Plan]:
        """Plan again what has changed meanwhile, until the kernel has let go of all of it.

        Returns:
            The plan of what is in no part, just made.
        """
        while True:
            may_wait = not self._is_early and self._rounds < SWITCH_ROUNDS
            if not (self._unanswered and may_wait):
                self._judge()
            again = [i for i, (part, _) in enumerate(work.parts) if not self._update.holds(part)]
            self._update.tree.disturbed = set()
            is_few = len(again) <= FEW_PARTS or not may_wait
            for index in again:
                events = work.parts[index][0].events.values()
                work.parts[index] = self._plan_part(batch, work, events)
                if not is_few:
                    yield set()
            if not is_few:
                self._rounds += 1
                continue
            parts = [part for part, _ in work.parts]
            plan = self._update.plan_rest((*batch.own, *work.rest), parts, force=batch.force)
            self._ask(plan, waits=may_wait and bool(self._unanswered))
            if may_wait and self._unanswered:
                yield self._unanswered
            elif not contents_in(self._unanswered):
                return plan
            else:
                self._unanswered = set()  # what it was to say is not waited for

    def _plan_part(
        self, batch: Batch, work: "_Work", events: Iterable[Event]
    ) -> tuple[Part, list[_Version]]:
        part, others = self._update.plan_part(events, work.apart, force=batch.force)
        work.rest += others
        self._ask(part.plan, waits=True)
        return part, self._versions(part.plan)

    def _ask(self, plan: Plan, *, waits: bool) -> None:
        """Have the kernel let go of what a plan makes untrue, if it `waits` for something."""
        stale = self._update.invalidations(plan) - self._asked
        if stale or waits:
            self._note_asked(plan, stale)
        if stale:
            self.invalidator.submit(stale)
            self._unanswered = stale  # when it has, it has of all before

    def _finish(self, batch: Batch) -> None:
        self._now = None
        batch.over.set()
        self._wake()
        if self._waiting:  # in the next turn of the loop: others have waited long enough
            _soon(self._begin)

    def _wake(self) -> None:
        self._advanced.set()
        self._advanced = trio.Event()

    def _fail(self, batch: Batch) -> None:
        self._update.tree.being_changed.clear()
        self._forget_openings()
        self._update.tree.disturbed = None
        self._update.tree.doubtful = True  # it may have been half-way
        self._waiting = deque(other for other in self._waiting if other.is_closed)
        self._is_broken = True
        self._finish(batch)
        self._failed()


def _soon(function: Callable[[], None]) -> None:
    with suppress(trio.RunFinishedError):  # the mount is taken down
        trio.lowlevel.current_trio_token().run_sync_soon(function)


def _pieces(events: Iterable[Event], size: int) -> Iterator[list[Event]]:
    iterator = iter(events)
    while piece := list(islice(iterator, size)):
        yield piece
