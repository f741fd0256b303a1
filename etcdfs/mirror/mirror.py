"""The view with a mirror: the tree holds every key and follows the watch (`--cache`).

Knows: how to carry out the steps of the state machine's state machine. Does not know: system calls,
gRPC, pyfuse3, and how a batch becomes visible (`applier`).

Concurrency: trio thread; one task lists, watches and hands batches on, in order.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Final, final

import trio

from etcdfs.consistency.audit import Auditor
from etcdfs.consistency.audit_index import Census, HeldKeys, Staging, TooDifferentError
from etcdfs.consistency.orphan_records import Sweeper
from etcdfs.consistency.read_barrier import ReadBarrier
from etcdfs.consistency.snapshot import Snapshot
from etcdfs.consistency.staleness import Staleness
from etcdfs.errors import StorePermissionError
from etcdfs.files.unopened import UnopenedFiles
from etcdfs.keyspace.attribute_records import is_record_key, owner_of
from etcdfs.keyspace.store import Event, KeyValue, Revision, Store
from etcdfs.mirror.applier import Applier, Observer
from etcdfs.mirror.attribute_mirror import AttributeMirror
from etcdfs.mirror.driver import Driver
from etcdfs.mirror.invalidator import KernelCache, StuckDirectories
from etcdfs.mirror.messages import Stage
from etcdfs.tree.bulk_load import changes_by_rebuilding, date, load, rebuild
from etcdfs.tree.inodes import Cached, Dentry, Directory, File, Node
from etcdfs.tree.node_attributes import bind_all, stored_record_of
from etcdfs.tree.tree import Tree
from etcdfs.tree.update import Update
from etcdfs.tree.value_cache import ValueCache, value_of

log = logging.getLogger(__name__)

STAGED_BYTES: Final = 64 << 20
"""Bytes of values that may differ when all is listed again, if `--cache-size` is no more."""

STAGE_SIZE: Final = 250
"""Keys staged at a time; about a millisecond, after which other tasks get their turn."""

FORGET_SIZE: Final = 1000
"""Names handed to the kernel at a time when it is to forget all of them."""

_VALUE: Final = attrgetter("value")


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorStatistics:
    """How far the mirror is and what it went through.

    Attributes:
        revision: The revision that readers see.
        keys: Keys that are there, as last counted.
        bytes: Bytes of their values, likewise.
        listed_keys: Keys in the last listing.
        lag: Revisions between that and the newest that etcd has answered with.
        connected: Whether a watch stands.
        batches: Batches applied.
        events: Events in them.
        collapsed: Events that nobody saw, as a later one of their key was there already.
        early: Batches applied before the invalidation was done, for a call that held its lock.
        ahead: Own changes applied before the watch brought them.
    """

    revision: int
    keys: int
    bytes: int
    listed_keys: int
    lag: int
    connected: bool
    batches: int
    events: int
    collapsed: int
    early: int
    ahead: int


@final
class Mirror(Driver):
    """Keeps a complete tree in step with etcd."""

    def __init__(
        self,
        store: Store,
        value_cache: ValueCache,
        tree: Tree,
        kernel: KernelCache,
        *,
        settle_timeout_s: float,
        timeout_s: float,
        watch_timeout_s: float,
        max_stale_s: float,
        audit_interval_s: float,
        linearizable: bool,
        tidies: bool,
        snapshot: Snapshot,
    ) -> None:
        """Make a mirror; nothing is listed yet. One that `tidies` deletes void record keys."""
        super().__init__(
            store,
            tree.keyspace,
            Staleness(max_stale_s=max_stale_s),
            snapshot.keys,
            watch_timeout_s=watch_timeout_s,
            answer_timeout_s=timeout_s,
        )
        # --- dependencies
        self._value_cache = value_cache
        self._snapshot = snapshot
        self.update = Update(tree)
        self._applier = Applier(
            self.update, value_cache, kernel, lambda: self.doubt("a batch could not be applied")
        )
        self._invalidator = self._applier.invalidator
        self.unopened = UnopenedFiles(self, tree, kernel, self._applier.advanced)
        kernel.listen(StuckDirectories(tree, self.staleness, self._invalidator).note)
        self.auditor = Auditor(
            store,
            value_cache,
            tree,
            self.staleness,
            self,
            HeldKeys(tree),
            interval_s=audit_interval_s,
            patience_s=timeout_s,
            sweeper=Sweeper(store, tree) if tidies else None,
        )
        self.census = Census(HeldKeys(tree), lambda: self.revision)
        self.barrier = ReadBarrier(store, tree, self, timeout_s=timeout_s) if linearizable else None
        # Where record keys come by the mirror's own watch, they need none of theirs.
        self.stored_records = (
            None
            if tree.keyspace.holds_records or not tree.attributes
            else AttributeMirror(
                store,
                value_cache,
                tree,
                self._show,
                watch_timeout_s=watch_timeout_s,
                answer_timeout_s=timeout_s,
                audit_interval_s=audit_interval_s,
                recorder=snapshot.attributes,
            )
        )
        # --- constants
        self._settle_timeout_s = settle_timeout_s
        # --- mutable state
        self._is_restored = False
        self._progress: Callable[[int, int], None]  # see `run`
        self._staging: Staging | None = None
        self._fresh: Tree | None = None  # what is listed, if the tree has to be made anew
        self._staged_keys = self._staged_bytes = 0
        self._is_full = False  # no more values of the first listing fit
        self._ahead = 0

    @property
    def revision(self) -> int:
        """The revision that readers see."""
        return self._applier.revision

    def tell(self, observe: Observer) -> None:
        """Have `observe` told of all that other clients change."""
        self._applier.observe = observe

    # --- the view ---------------------------------------------------------------------------

    def check(self) -> None:
        """See `View.check`."""
        self.staleness.check()

    async def revalidate_name(self, directory: Directory, name: bytes) -> None:
        """See `View.revalidate_name`: the tree is true already, as far as the watch has come."""
        self.staleness.check()
        if self.barrier is not None:
            await self.barrier.revalidate_name(directory, name)

    async def revalidate_directory(self, directory: Directory) -> None:
        """See `View.revalidate_directory`: likewise."""
        self.staleness.check()
        if self.barrier is not None:
            await self.barrier.revalidate_directory(directory)

    async def revalidate_node(self, node: Node) -> None:
        """See `View.revalidate_node`: likewise. The root is there whatever is known, or df(1) failed."""
        if node is self.update.tree.root:
            return
        self.staleness.check()
        if isinstance(node, File):
            await self._applier.decided(node.inode)
            await self.unopened.decided(node.inode)
            if self.barrier is not None:
                await self.barrier.file(node)

    async def value(self, file: File) -> bytes:
        """See `View.value`."""
        self.staleness.check()
        # A request that is sure to fail would only take its time.
        recall = None if self.staleness.connected else self._snapshot.recall
        return await value_of(self._store, self._value_cache, self.update.tree, file, recall)

    async def wait_until_visible(
        self, revision: int, events: Sequence[Event], locked: Sequence[Dentry] = ()
    ) -> None:
        """See `View.wait_until_visible`: wait for the watch, so that revisions are seen in order."""
        self.update.tree.revisions.learn(revision, self.update.tree.clock())
        with self.holding(locked), trio.move_on_after(self._settle_timeout_s):
            self._take_own(events)
            if self.stored_records is None or any(not is_record_key(event.key) for event in events):
                await self.reached(revision)
            if self.stored_records is not None and any(
                is_record_key(event.key) for event in events
            ):
                await self.stored_records.reached(revision)
            return
        self._ahead += 1
        self.auditor.saw(events)
        if self.stored_records is not None:
            self.stored_records.auditor.saw(events)
        log.info(
            "the watch is over %.1f s late: revision %d is shown before it brings it",
            self._settle_timeout_s,
            revision,
        )
        for event in events:
            if isinstance(event, KeyValue) and not is_record_key(event.key):
                self._value_cache.put(event.key, event.mod_revision, event.value)
        self._invalidator.submit(self.update.apply_ahead(events, remember=True))

    def _take_own(self, events: Sequence[Event]) -> None:
        """Show a single put of this mount at once, if the watch has nothing to bring before it."""
        match events:
            case (KeyValue() as put,) if self.staleness.connected and not is_record_key(put.key):
                if self._applier.take_own(put):
                    self.auditor.saw(events)

    async def reached(self, revision: int) -> None:
        """See `View.reached`; the caller bounds it."""
        while self.revision < revision:
            await self._applier.advanced()
        await self.unopened.settled(revision)

    async def advanced(self) -> None:
        """Return when readers see a newer revision."""
        await self._applier.advanced()

    def refuse_records(self, refusal: StorePermissionError) -> None:
        """Go on without the attributes of what is new; see `AttributeMirror.refuse`.

        Raises:
            StorePermissionError: They are among the keys, and so are those refused.
        """
        if self.stored_records is None:
            raise refusal
        self.stored_records.refuse(refusal)

    async def invalidate_first(self, stale: Collection[Cached]) -> None:
        """See `View.invalidate_first`."""
        await self._invalidator.first(stale, timeout_s=self._settle_timeout_s)

    def invalidate(self, stale: Collection[Cached]) -> None:
        """See `View.invalidate`."""
        self._invalidator.submit(stale)

    def holding(self, locked: Sequence[Dentry]) -> AbstractContextManager[None]:
        """See `View.holding`."""
        return self._invalidator.holding(locked)

    def statistics(self) -> MirrorStatistics:
        """Say how far the mirror is."""
        return MirrorStatistics(
            revision=self.revision,
            keys=self.census.keys,
            bytes=self.census.bytes,
            listed_keys=self._staged_keys,
            lag=max(0, self._store.statistics().revision - self.revision),
            connected=self.staleness.connected,
            batches=self._applier.batches,
            events=self._applier.events,
            collapsed=self._applier.collapsed,
            early=self._applier.early,
            ahead=self._ahead,
        )

    # --- following --------------------------------------------------------------------------

    def load(self, entries: tuple[KeyValue, ...], *, first: bool) -> None:
        """Take part of a snapshot, before `run`."""
        if first:
            self.loaded_at = None
            self._begin_listing()
        self._stage_some(entries)

    async def run(
        self,
        progress: Callable[[int, int], None],
        *,
        offline: bool = False,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """List, watch, and follow until cancelled; see `follow`.

        Args:
            progress: Told how many keys and bytes of values the first listing has so far.
            offline: Show the snapshot that was loaded, whether etcd confirms it or not.
            task_status: trio's.

        Raises:
            StoreError: The first listing failed. Later failures are retried for ever.
        """
        self._progress = progress
        await self.follow(offline=offline, task_status=task_status)

    # --- what is followed -------------------------------------------------------------------

    def _is_started(self) -> bool:
        return self._is_restored

    def _is_doubtful(self) -> bool:
        return self.update.tree.doubtful

    def _deny(self, error: StorePermissionError) -> None:
        if self._is_restored:
            self.staleness.deny(error)

    def _refuse_loaded(self) -> None:
        super()._refuse_loaded()
        if self.stored_records is not None:
            self.stored_records.loaded_at = None

    async def _stage(self, stage: Stage) -> None:
        """Put a page aside; the very first listing goes straight into the tree.

        Nobody sees the tree then, and a keyspace need not fit into memory twice.
        """
        if stage.first:
            self._begin_listing()
        for start in range(0, len(stage.entries), STAGE_SIZE):
            try:
                self._stage_some(stage.entries[start : start + STAGE_SIZE])
            except TooDifferentError:
                # A tree of its own takes no values, and does not change meanwhile.
                self.update.tree.doubtful = True
                raise
            await trio.lowlevel.checkpoint()  # other tasks, the next page's request among them
        if not self._is_restored:
            self._progress(self._staged_keys, self._staged_bytes)

    def _begin_listing(self) -> None:
        self._staged_keys = self._staged_bytes = 0
        self._fresh = self._staging = None
        if not self._is_restored:
            self.update.tree.clear()
            self._is_full = False
        elif self.update.tree.doubtful:
            self._fresh = self._make_tree()
        else:
            most = max(self._value_cache.capacity, STAGED_BYTES)
            self._staging = Staging(self.update.tree, self._value_cache, most_bytes=most)

    def _stage_some(self, entries: tuple[KeyValue, ...]) -> None:
        self._staged_keys += len(entries)
        self._staged_bytes += sum(map(len, map(_VALUE, entries)))
        if self._fresh is not None:
            load(self._fresh, entries)
        elif self._staging is not None:
            self._staging.add(entries)
        else:
            load(self.update.tree, entries)
            self._keep_some(entries)

    def _keep_some(self, entries: tuple[KeyValue, ...]) -> None:
        # At once: what is kept of a page until it is loaded lies between what stays, and the
        # memory would not go back.
        for entry in entries:
            if self._is_full or is_record_key(entry.key):
                return
            self._is_full = not self._value_cache.put_if_room(
                entry.key, entry.mod_revision, entry.value
            )

    async def _restore(self, revision: Revision) -> str | None:
        if not self._is_restored:
            self._adopt(revision)
            return None
        if self.update.tree.doubtful and self._fresh is None:
            return "the listing was made before the tree was found to be wrong"
        await self._applier.idle()
        if self._fresh is not None:
            await self._make_anew(self._fresh, revision)
            return None
        assert self._staging is not None
        events = await self._staging.differences(revision)
        self._staging = None
        log.info(
            "listed again at revision %d: %d keys differ",
            revision,
            len(events),
            extra={
                "event": "relisted",
                "fields": {"revision": revision, "differing": len(events)},
            },
        )
        # By force: in another history a newer state may have older revisions.
        self.update.relisted()
        self.update.tree.revisions.forget_after(revision)
        await self._applier.replace((*events, *await self._stored_records_of(events)), revision)
        return None

    def _adopt(self, revision: Revision) -> None:
        self._is_restored = True
        date(self.update.tree)
        bind_all(self.update.tree)
        self._applier.revision = revision
        log.info(
            "synced %d keys at revision %d",
            self._staged_keys,
            revision,
            extra={"event": "synced", "fields": {"revision": revision, "keys": self._staged_keys}},
        )

    def _make_tree(self) -> Tree:
        """Return an empty tree that may take the place of the one there is."""
        tree = self.update.tree
        fresh = Tree(tree.keyspace, tree.clock, complete=True, attributes=tree.attributes)
        fresh.numbers = tree.numbers
        fresh.revisions = tree.revisions
        return fresh

    async def _make_anew(self, fresh: Tree, revision: Revision) -> None:
        """Take over a listing as it is: of the tree there is nothing is believed.

        Raises:
            StoreError: The attributes of keys could not be read.
        """
        tree = self.update.tree
        stored_records: Sequence[Event] = ()
        if self.stored_records is not None:
            keys = (
                (key, key_state) for key, key_state in fresh.key_state() if tree.find(key) is None
            )
            stored_records = await self._stored_records_of(
                [KeyValue(key, b"", *key_state[:4]) for key, key_state in keys]
            )
        await self._invalidator.first(tree.cached_by_kernel(), timeout_s=self._settle_timeout_s)
        # checkpoint: the tree may be another, and is not believed either; nothing is cached of it
        if self.stored_records is not None:
            fresh.stored_records = tree.stored_records
            for stored_record in stored_records:
                if isinstance(stored_record, KeyValue):
                    fresh.stored_records[owner_of(stored_record.key)] = stored_record_of(
                        stored_record
                    )
        date(fresh)
        bind_all(fresh)
        observe = self._applier.observe
        seen = None if observe is None else observe(changes_by_rebuilding(tree, fresh), ())
        rebuild(tree, fresh)
        for each in (self._applier.unseen, seen):
            self._invalidator.submit((), each)
        self._applier.unseen = None
        self._fresh = None
        self._applier.adopt(revision)
        self.auditor.hurry()
        log.info("the tree was made anew at revision %d", revision)

    async def _apply(self, events: Sequence[Event], revision: Revision) -> None:
        """Have a batch made visible, with the attributes of what is new in it."""
        del revision  # the applier knows
        events = self._applier.not_taken(events)
        if events:
            await self._applier.take(events, await self._stored_records_of(events))

    async def _stored_records_of(self, events: Sequence[Event]) -> Sequence[Event]:
        return (
            ()
            if self.stored_records is None
            else await self.stored_records.stored_records_of(events)
        )

    async def _show(self, events: Sequence[Event], force: bool) -> None:
        """Make a change of attributes visible that came by a watch of their own."""
        await self._applier.show(events, force=force)


# --- beside the watch -----------------------------------------------------------------------


async def watch_over(mirror: Mirror) -> None:
    """Audit a mirror, count what is in it, and keep the kernel from showing what may not be shown; for ever.

    While nothing may be shown each question that reaches us is refused, so that nothing new gets
    into the kernel's caches. Pages of files stay in its page cache: whoever has a file open has one
    version of it, which never changes, and goes on reading what the kernel holds of that.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mirror.auditor.run, mirror.doubt, mirror.staleness.deny)
        nursery.start_soon(mirror.census.run)
        if mirror.stored_records is not None:
            nursery.start_soon(mirror.stored_records.audit)
            nursery.start_soon(_watch_rights, mirror)
        while True:
            await mirror.staleness.until_refused()
            log.warning(
                "nothing is shown any more: %s",
                mirror.staleness.statistics().refused,
                extra={"event": "hidden"},
            )
            await _forget_everything(mirror)
            await mirror.staleness.until_shown()
            log.info(
                "the mirror is shown again, at revision %d",
                mirror.revision,
                extra={"event": "shown", "fields": {"revision": mirror.revision}},
            )


async def _watch_rights(mirror: Mirror) -> None:
    """Have the kernel ask anew for all modes when they close, or open."""
    turned, turns = trio.open_memory_channel[None](1)

    def on_turn() -> None:
        with suppress(trio.WouldBlock):  # one that waits will do
            turned.send_nowait(None)

    mirror.update.tree.rights.on_turn = on_turn
    async for _ in turns:
        await _forget_everything(mirror)


async def _forget_everything(mirror: Mirror) -> None:
    cached = mirror.update.tree.cached_by_kernel()
    for start in range(0, len(cached), FORGET_SIZE):
        mirror.invalidate(cached[start : start + FORGET_SIZE])
        await trio.lowlevel.checkpoint()
