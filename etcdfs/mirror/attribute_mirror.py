"""A mirror of the record keys, where they are not among the keys of the mount's own prefix.

Knows: how the attributes of the keys under a prefix are followed by a watch of their own, and how a
key is kept from being seen before its attributes. Does not know: how changes become visible (the
mirror's), system calls.

Two watches are not in step. So before a batch with new keys is applied, the record keys of these
are read (`stored_records_of`): what was made with mode 0600 is never seen with the default mode. Later
changes of attributes come by the watch of the record keys alone.

Audits compare the record keys as they do the keys; what differs is listed again.

etcd's roles may not allow it, at the start or later. Then what is known of attributes stays, all
is shown closed (`rights`), and reading them is tried again after each backoff. Meanwhile nothing
is asked about what is new; so once they may be read, first that begins again, and then a listing,
which brings all that was missed.

Concurrency: trio thread; one task follows.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, final

import trio

from etcdfs.consistency.audit import Auditor
from etcdfs.consistency.audit_index import HeldRecords
from etcdfs.consistency.snapshot import Recorder
from etcdfs.consistency.staleness import UNLIMITED, Staleness
from etcdfs.errors import StorePermissionError
from etcdfs.keyspace.attribute_records import owner_of, record_key
from etcdfs.keyspace.store import Event, Get, KeyValue, Revision, Store, Tombstone, Transaction
from etcdfs.mirror.driver import Driver
from etcdfs.mirror.messages import Doubted, Message, PageArrived, Read, RevisionCompacted, Stage
from etcdfs.tree.node_attributes import stored_record_of
from etcdfs.tree.tree import Tree
from etcdfs.tree.value_cache import ValueCache

log = logging.getLogger(__name__)

MAX_GETS: Final = 128
"""Record keys read in one transaction (etcd's --max-txn-ops)."""

ApplyBatch = Callable[[Sequence[Event], bool], Awaitable[None]]
"""Makes changes visible; by force, if the bool says so."""


@final
class AttributeMirror(Driver):
    """Follows the record keys of one prefix."""

    about = "record keys: "

    def __init__(
        self,
        store: Store,
        value_cache: ValueCache,
        tree: Tree,
        apply: ApplyBatch,
        *,
        watch_timeout_s: float,
        answer_timeout_s: float,
        audit_interval_s: float,
        recorder: Recorder,
    ) -> None:
        held = HeldRecords(tree)
        super().__init__(
            store,
            held.keyspace,
            Staleness(max_stale_s=UNLIMITED),
            recorder,
            watch_timeout_s=watch_timeout_s,
            answer_timeout_s=answer_timeout_s,
        )
        # --- dependencies
        self._tree = tree
        self._apply_batch = apply
        self.auditor = Auditor(
            store,
            value_cache,
            tree,
            self.staleness,
            self,
            held,
            interval_s=audit_interval_s,
            patience_s=answer_timeout_s,
        )
        # --- mutable state
        self.revision = 0
        self._histories = 0  # how often another one was found
        self._staged: dict[bytes, KeyValue] = {}
        self._is_restored = False
        self._is_asking = True  # for the attributes of what is new
        self._advanced = trio.Event()

    def load(self, entries: Sequence[KeyValue]) -> None:
        """Take part of a snapshot, before `run`."""
        self._tree.stored_records.update(
            (owner_of(entry.key), stored_record_of(entry)) for entry in entries
        )

    async def run(
        self,
        *,
        offline: bool = False,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """List, watch, and follow until cancelled. Started once the first listing is in, or refused.

        Args:
            offline: Begin with what was loaded, or without any, whether etcd answers or not.
            task_status: trio's.

        Raises:
            StoreError: The first listing failed. Later failures are retried for ever.
        """
        self._is_restored = False
        self._is_asking = True
        self._histories = 0
        await self.follow(offline=offline, task_status=task_status)

    async def reached(self, revision: int) -> None:
        """Return once readers see what record keys were at a revision; the caller bounds it."""
        while self.revision < revision and self._is_asking:
            await self.advanced()

    async def advanced(self) -> None:
        """Return when readers see a newer revision, or none is to come."""
        await self._advanced.wait()

    async def audit(self) -> None:
        """Compare the record keys with etcd now and then."""
        await self.auditor.run(self.doubt, self._deny_audit)

    def _deny_audit(self, error: StorePermissionError) -> None:
        if error.is_of_role:
            self.refuse(error)
        else:
            log.info("record keys could not be audited against: %s", error)

    def refuse(self, refusal: StorePermissionError) -> None:
        """Go on without the attributes of what is new: etcd does not let us read them.

        Raises:
            StorePermissionError: The refusal, if it says nothing of that.
        """
        self._tree.rights.refuse_reading(refusal)
        if self._is_asking:
            self._is_asking = False
            self._session.tell(Doubted("etcd does not let us read them"))
            self._wake()

    async def stored_records_of(self, events: Sequence[Event]) -> Sequence[Event]:
        """Return the attributes of what is made in a batch.

        A revision that is nothing but one put over a key that was there brings no attributes:
        that is what most are, and they cost nothing.

        Raises:
            StoreError: They could not be read.
        """
        if not self._is_asking:
            return ()
        if len(events) > MAX_GETS:
            await trio.lowlevel.checkpoint()  # there may be very many
        sizes = Counter(event.mod_revision for event in events)
        made = {
            event.key
            for event in events
            if isinstance(event, KeyValue)
            and (event.create_revision == event.mod_revision or sizes[event.mod_revision] > 1)
        }
        try:
            stored_records = await self._read_records(sorted(made))
        except StorePermissionError as exc:
            self.refuse(exc)
            return ()
        self.auditor.saw(stored_records)  # perhaps before the watch brings them
        self._recorder.read_ahead(stored_records)
        return stored_records

    async def _read_records(self, keys: list[bytes]) -> list[KeyValue]:
        found: list[KeyValue] = []
        for first in range(0, len(keys), MAX_GETS):
            gets = tuple(Get(record_key(key)) for key in keys[first : first + MAX_GETS])
            committed = await self._store.commit(Transaction((), gets))
            found.extend(committed.entries)
        return found

    # --- following --------------------------------------------------------------------------

    def _is_started(self) -> bool:
        return self._is_restored or not self._is_asking

    def _deny(self, error: StorePermissionError) -> None:
        if error.is_of_role:
            self._tree.rights.refuse_reading(error)
            self._is_asking = False
            self._wake()

    async def _read(self, read: Read) -> Message:
        is_asking = self._is_asking
        if not is_asking:
            await self._store.range(read.start, read.end, limit=1, keys_only=True)
            self._is_asking = True  # first this, then a listing that begins after it
        answer = await super()._read(read)
        if isinstance(answer, PageArrived) and read.revision and not is_asking:
            return RevisionCompacted(read.revision)  # what was missed since is not in it
        return answer

    async def _stage(self, stage: Stage) -> None:
        if stage.first:
            self._staged.clear()
        self._staged.update((entry.key, entry) for entry in stage.entries)

    async def _restore(self, revision: Revision) -> str | None:
        await self._show(self._difference(revision), revision, force=True)
        self._is_restored = True
        if self._is_asking:
            self._tree.rights.allow_reading()
        return None

    def _adopt(self, revision: Revision) -> None:
        self._is_restored = True
        self.revision = revision

    async def _apply(self, events: Sequence[Event], revision: Revision) -> None:
        await self._show(events, revision, force=False)

    def _difference(self, revision: int) -> list[Event]:
        """Return the events that make what the tree has of record keys what was listed.

        What is newer than the listing came with its key (`stored_records_of`), and the watch will bring
        it; in another history it means nothing.
        """
        found = self.state_machine.statistics()
        histories, self._histories = self._histories, found.refuted + found.regressions
        staged, self._staged = self._staged, {}
        events: list[Event] = []
        for key, stored_record in self._tree.stored_records.items():
            entry = staged.pop(record_key(key), None)
            if entry is not None and stored_record_of(entry) != stored_record:
                events.append(entry)
            elif entry is None and (
                stored_record.key_state.mod_revision <= revision or self._histories > histories
            ):
                events.append(Tombstone(record_key(key), stored_record.key_state.mod_revision))
        return [*events, *staged.values()]

    async def _show(self, events: Sequence[Event], revision: int, *, force: bool) -> None:
        await self._apply_batch(events, force)
        self.revision = revision
        self._wake()

    def _wake(self) -> None:
        self._advanced.set()
        self._advanced = trio.Event()
