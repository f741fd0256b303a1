"""The view with a mirror: the tree holds every key and follows the watch (`--cache`).

What this room knows: how to carry out the steps of the replica's state machine, and in which
order the tree and the kernel change. What it must not know: system calls, gRPC, pyfuse3.

Each batch of the watch becomes visible by *switching* (DESIGN.md 4.2): the kernel lets go of
what will be untrue while lookups still answer the old state with no lifetime; then the tree
changes in one step. So nobody sees part of a revision, and nothing older after something newer.

A call of this mount that changes a name holds its directory's lock in the kernel until it
returns, and it returns when the batch with its change is published (`settle`). If that batch, or
one before it, must invalidate another name in the same directory, the kernel would wait for the
call and the call for the batch; then the batch is published first and the kernel let go after.

Concurrency: trio thread; one task applies batches, in order.
"""

import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final, Protocol, assert_never, final

import trio

from etcdfs.audit import Auditor, difference
from etcdfs.barrier import Barrier
from etcdfs.contents import Contents
from etcdfs.errors import (
    CompactedError,
    FutureRevisionError,
    StoreError,
    StorePermissionError,
    WatchLostError,
)
from etcdfs.link import UNLIMITED, Link
from etcdfs.loader import load
from etcdfs.options import DEFAULT_TIMEOUT_S, DEFAULT_WATCH_TIMEOUT_S
from etcdfs.replica import Replica, State
from etcdfs.steps import (
    Apply,
    BackOff,
    CloseWatch,
    Doubted,
    Message,
    OpenWatch,
    PageArrived,
    Read,
    ReadFailed,
    Restore,
    RevisionAhead,
    RevisionCompacted,
    Stage,
    Step,
    WatchLost,
)
from etcdfs.store import Event, KeyValue, Revision, Store
from etcdfs.switch import Switch
from etcdfs.tree import Cached, Directory, Entry, File, Node, Tree
from etcdfs.values import value_of
from etcdfs.watching import Watching

log = logging.getLogger(__name__)

SWITCH_ROUNDS: Final = 8
"""Rounds of letting go before a batch is published. The second round finds what a change of
this mount added meanwhile; more are not expected, and a batch must not wait for ever."""

STAGE_SIZE: Final = 250
"""Keys staged at a time; about a millisecond, after which other tasks get their turn."""

_VALUE: Final = attrgetter("value")

BACKOFF_FIRST_S: Final = 0.05
BACKOFF_CAP_S: Final = 5.0
BACKOFF_DOUBLINGS: Final = 16  # more than enough for the cap; 2**1024 is no float


class KernelCache(Protocol):
    """The kernel's caches, as the mirror needs them."""

    def submit(self, cached: Collection[Cached], done: Callable[[], None] | None = None) -> None:
        """Have the kernel forget; never blocks; call `done` on the trio thread afterwards."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorStatistics:
    """How far the mirror is and what it went through.

    Attributes:
        revision: The revision that readers see.
        listed_keys: Keys in the last listing.
        connected: Whether a watch stands.
        batches: Batches published.
        events: Events in them.
        early: Batches published before the kernel had let go, for a call that held its lock.
        ahead: Own changes applied before the watch brought them.
    """

    revision: int
    listed_keys: int
    connected: bool
    batches: int
    events: int
    early: int
    ahead: int


@final
class Mirror:
    """Keeps a complete tree in step with etcd."""

    def __init__(
        self,
        store: Store,
        contents: Contents,
        tree: Tree,
        kernel: KernelCache,
        *,
        settle_timeout_s: float,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        watch_timeout_s: float = DEFAULT_WATCH_TIMEOUT_S,
        max_stale_s: float = UNLIMITED,
        audit_interval_s: float = 0.0,
        linearizable: bool = False,
    ) -> None:
        # --- dependencies
        self._store = store
        self._contents = contents
        self._kernel = kernel
        self.switch = Switch(tree)
        self.link = Link(max_stale_s=max_stale_s)
        self.auditor = Auditor(
            store,
            contents,
            tree,
            self.link,
            self,
            interval_s=audit_interval_s,
            patience_s=timeout_s,
        )
        self.barrier = Barrier(store, tree, self, timeout_s=timeout_s) if linearizable else None
        self._watching = Watching(
            store,
            tree.keyspace,
            self.link,
            watch_timeout_s=watch_timeout_s,
            answer_timeout_s=timeout_s,
        )
        # --- constants
        self._settle_timeout_s = settle_timeout_s
        # --- mutable state
        self.revision = 0
        self.replica: Replica | None = None
        self._is_restored = False
        self._staged: dict[bytes, KeyValue] = {}
        self._loaded: deque[tuple[KeyValue, ...]] = deque()
        self._staged_keys = self._staged_bytes = 0
        self._advanced = trio.Event()
        self._stir = trio.Event()
        self._held: Counter[int] = Counter()  # directories whose lock a waiting call holds
        self._wanted: Counter[int] = Counter()  # those whose lock the kernel needs, or will
        self._batches = self._events = self._early = self._ahead = 0

    # --- the view ---------------------------------------------------------------------------

    def check(self) -> None:
        """See `View.check`."""
        self.link.check()

    async def entry(self, directory: Directory, name: bytes) -> None:
        """See `View.entry`: the tree is true already, as far as the watch has come."""
        self.link.check()
        if self.barrier is not None:
            await self.barrier.entry(directory, name)

    async def listing(self, directory: Directory) -> None:
        """See `View.listing`: likewise."""
        self.link.check()
        if self.barrier is not None:
            await self.barrier.listing(directory)

    async def refresh(self, node: Node) -> None:
        """See `View.refresh`: likewise. The root is there whatever is known, or df(1) failed."""
        if node is self.switch.tree.root:
            return
        self.link.check()
        if self.barrier is not None and isinstance(node, File) and node.directory is not None:
            await self.barrier.entry(node.directory, node.name)

    async def value(self, file: File) -> bytes:
        """See `View.value`."""
        self.link.check()
        return await value_of(self._store, self._contents, self.switch.tree, file)

    async def settle(
        self, revision: int, events: Sequence[Event], locked: Sequence[Entry] = ()
    ) -> None:
        """See `View.settle`: wait for the watch, so that revisions are seen in order."""
        with self.holding(locked), trio.move_on_after(self._settle_timeout_s):
            await self.reached(revision)
            return
        self._ahead += 1
        self.auditor.saw(events)
        log.info(
            "the watch is over %.1f s late: revision %d is shown before it brings it",
            self._settle_timeout_s,
            revision,
        )
        self._keep_values(events)
        self._submit(self.switch.apply_ahead(events, remember=True))

    async def reached(self, revision: int) -> None:
        """See `View.reached`; the caller bounds it."""
        while self.revision < revision:
            await self._advanced.wait()

    async def advanced(self) -> None:
        """Return when readers see a newer revision; the caller bounds it."""
        await self._advanced.wait()

    async def let_go_first(self, stale: Collection[Cached]) -> None:
        """See `View.let_go_first`."""
        done = trio.Event()
        self._submit(stale, done.set)
        if not self._is_held():
            with trio.move_on_after(self._settle_timeout_s):
                await done.wait()

    def let_go(self, stale: Collection[Cached]) -> None:
        """See `View.let_go`."""
        self._submit(stale)

    @contextmanager
    def holding(self, locked: Sequence[Entry]) -> Iterator[None]:
        """See `View.holding`."""
        held = {entry.directory for entry in locked}
        self._held.update(held)
        self._stir.set()
        try:
            yield
        finally:
            self._held.subtract(held)

    def statistics(self) -> MirrorStatistics:
        """Say how far the mirror is."""
        return MirrorStatistics(
            revision=self.revision,
            listed_keys=self._staged_keys,
            connected=self.link.connected,
            batches=self._batches,
            events=self._events,
            early=self._early,
            ahead=self._ahead,
        )

    # --- following --------------------------------------------------------------------------

    async def run(
        self,
        progress: Callable[[int, int], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """List, watch, and follow until cancelled. Started once the first listing is in.

        Args:
            progress: Told how many keys and bytes of values the first listing has so far.
            task_status: trio's.

        Raises:
            StoreError: The first listing failed. Later failures are retried for ever.
        """
        keyspace = self.switch.tree.keyspace
        replica = self.replica = Replica(keyspace.start, keyspace.end)
        async with aclosing(self._watching):
            steps = replica.start()
            while True:
                message: Message | None = None
                match steps:
                    case (Stage() as stage, Read() as read):
                        message = await self._stage_and_read_on(stage, read, progress)
                    case _:
                        for step in steps:
                            message = await self._carry_out(step, progress)
                if self._is_restored:
                    task_status.started()
                    task_status = trio.TASK_STATUS_IGNORED
                steps = replica.receive(message or await self._watching.receive())
                self._turn(connected=replica.state is State.WATCHING)

    def _turn(self, *, connected: bool) -> None:
        """Note whether the watch stands and is confirmed."""
        if connected and not self.link.connected:
            self.link.allow()
        if not connected:
            self.auditor.void()
        self.link.turn(connected=connected)

    def doubt(self, reason: str) -> None:
        """Have everything listed again: what is here is not what etcd has."""
        self._watching.tell(Doubted(reason))

    async def _carry_out(self, step: Step, progress: Callable[[int, int], None]) -> Message | None:
        match step:
            case Read():
                return await self._read(step)
            case Stage():
                await self._stage(step, progress)
            case Restore(revision):
                return await self._try_to_apply(self._restore(revision))
            case Apply(events, revision):
                self.auditor.saw(events)
                return await self._try_to_apply(self._apply(events, revision))
            case OpenWatch(from_revision):
                return await self._open(from_revision)
            case CloseWatch():
                await self._watching.aclose()
            case BackOff():
                await self._back_off(step)
            case _ as never:
                assert_never(never)
        return None

    async def _open(self, from_revision: int) -> Message:
        keyspace = self.switch.tree.keyspace
        watch = self._store.watch(keyspace.start, keyspace.end, from_revision)
        message = await self._watching.open(watch)
        if isinstance(message, WatchLost) and not self._is_restored:
            raise self._watching.error or WatchLostError(message.reason)
        return message

    async def _read(self, read: Read) -> Message:
        try:
            page = await self._store.range(
                read.start, read.end, limit=read.limit, revision=read.revision
            )
        except CompactedError as exc:
            return RevisionCompacted(exc.compact_revision)
        except FutureRevisionError:
            return RevisionAhead()
        except StoreError as exc:
            if not self._is_restored:
                raise
            if isinstance(exc, StorePermissionError):
                self.link.deny(exc)
            return ReadFailed(str(exc))
        return PageArrived(page)

    async def _stage_and_read_on(
        self, stage: Stage, read: Read, progress: Callable[[int, int], None]
    ) -> Message:
        """Work on one page while etcd prepares the next."""
        answers: list[Message | StoreError] = []

        async def read_on() -> None:
            try:
                answers.append(await self._read(read))
            except StoreError as exc:  # kept out of the nursery, which would wrap it
                answers.append(exc)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_on)
            await self._stage(stage, progress)
        (answer,) = answers
        if isinstance(answer, StoreError):
            raise answer
        return answer

    async def _back_off(self, step: BackOff) -> None:
        # Not each one: an outage may last for days.
        log.log(
            logging.WARNING if step.attempt.bit_count() <= 1 else logging.DEBUG,
            "%s; %s (attempt %d)",
            step.reason,
            "listing everything again" if step.relist else "trying again",
            step.attempt + 1,
        )
        longest = min(BACKOFF_CAP_S, BACKOFF_FIRST_S * 2 ** min(step.attempt, BACKOFF_DOUBLINGS))
        # Jittered, so that the mounts of a cluster do not come back all at once.
        await trio.sleep(random.uniform(longest / 2, longest))  # noqa: S311 - no secret

    async def _try_to_apply(self, applying: Coroutine[Any, Any, None]) -> Message | None:
        try:
            await applying
        except Exception:
            log.exception("a batch could not be applied; this is a bug of etcdfs")
            return Doubted("a batch could not be applied")
        return None

    # --- listing ----------------------------------------------------------------------------

    async def _stage(self, stage: Stage, progress: Callable[[int, int], None]) -> None:
        """Put a page aside; the very first listing goes straight into the tree.

        Nobody sees the tree then, and a keyspace need not fit into memory twice.
        """
        if stage.first:
            self._staged.clear()
            self._staged_keys = self._staged_bytes = 0
            if not self._is_restored:
                self.switch.tree.clear()
                self._loaded.clear()
        for start in range(0, len(stage.entries), STAGE_SIZE):
            self._stage_some(stage.entries[start : start + STAGE_SIZE])
            await trio.lowlevel.checkpoint()  # other tasks, the next page's request among them
        progress(self._staged_keys, self._staged_bytes)

    async def keep_loaded(self) -> None:
        """Keep the values of the first listing, as many as fit, while others work.

        Run it once the mount is usable: nobody need wait for it. Until it is done, a value that
        is asked for may have to be fetched again.
        """
        while self._loaded:
            for entry in self._loaded.popleft():
                if not self._contents.put_if_room(entry.key, entry.mod_revision, entry.value):
                    self._loaded.clear()
                    return
            await trio.lowlevel.checkpoint()

    def _stage_some(self, entries: tuple[KeyValue, ...]) -> None:
        self._staged_keys += len(entries)
        self._staged_bytes += sum(map(len, map(_VALUE, entries)))
        if self._is_restored:
            self._staged.update((entry.key, entry) for entry in entries)
            return
        load(self.switch.tree, entries)
        self._loaded.append(entries)

    async def _restore(self, revision: Revision) -> None:
        if not self._is_restored:
            self._is_restored = True
            self.revision = revision
            log.info("synced %d keys at revision %d", self._staged_keys, revision)
            return
        events = difference(self.switch.tree, self._contents, self._staged, revision)
        self._staged.clear()
        log.info("listed again at revision %d: %d keys differ", revision, len(events))
        # By force: in another history a newer state may have older revisions.
        self.switch.relisted()
        await self._apply(events, revision, force=True)

    # --- applying ---------------------------------------------------------------------------

    async def _apply(self, events: Sequence[Event], revision: int, *, force: bool = False) -> None:
        """Make a batch visible, all at once, after the kernel has let go of what it changes."""
        self._keep_values(events)
        tree = self.switch.tree
        asked: set[Cached] = set()
        plan = self.switch.plan(events, force=force)
        for _ in range(SWITCH_ROUNDS):
            stale = self.switch.invalidations(plan) - asked
            if not stale:
                break
            tree.switching |= self.switch.untold(plan)
            asked |= stale
            # checkpoint: anything may have happened to the tree; it is planned again
            await self._wait_for_kernel(stale)
            plan = self.switch.plan(events, force=force)
        late = self.switch.invalidations(plan) - asked
        self.switch.publish(plan)
        tree.switching.clear()
        self._submit(late)
        self._batches += 1
        self._events += len(events)
        self.revision = revision
        self.switch.reached(revision)
        self._advanced.set()
        self._advanced = trio.Event()

    async def _wait_for_kernel(self, stale: set[Cached]) -> None:
        finished = False

        def finish() -> None:
            nonlocal finished
            finished = True
            self._stir.set()

        self._submit(stale, finish)
        while not finished:
            if self._is_held():
                self._early += 1
                return
            self._stir = trio.Event()
            await self._stir.wait()

    def _submit(self, stale: Collection[Cached], done: Callable[[], None] | None = None) -> None:
        locks = {_lock_of(cached) for cached in stale}

        def finish() -> None:
            self._wanted.subtract(locks)
            self._wanted = +self._wanted
            if done is not None:
                done()

        self._wanted.update(locks)
        self._kernel.submit(stale, finish)

    def _is_held(self) -> bool:
        """Say whether a call that waits for us holds a lock that the kernel waits for.

        Not for this batch alone: the kernel is told in order, so that what was asked of it
        before stands in the way as well.
        """
        return any(self._held[lock] > 0 for lock in self._wanted)

    def _keep_values(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, KeyValue):
                self._contents.put(event.key, event.mod_revision, event.value)


def _lock_of(cached: Cached) -> int:
    """Return the directory whose lock the kernel needs to let go of it; 0 for none."""
    entry = cached if isinstance(cached, Entry) else cached.within
    return 0 if entry is None else entry.directory
