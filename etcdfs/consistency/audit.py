"""Comparing the mirror with etcd, at one revision, while both go on.

Knows: how to find out that the mirror is wrong when no message would tell. Does not know: how the
mirror is mended (the state machine lists again), or shown; what it holds (`audit_index`).

Some faults are silent: etcd 3.4 before 3.4.31 and 3.5 before 3.5.13 can lose watch events (etcd
issue 17529), and a history that was restored from a snapshot and overtaken may look like the one
we know. So now and then every key is read again, page by page, at one pinned revision, and
compared with what the mirror has: revisions, version, lease, size, and the value where it is
held.

The mirror goes on meanwhile, and is at another revision than the one that is read. So a key that
differs is only a *suspect*. It is cleared when the watch brings any event of it; and when the
mirror has passed the pinned revision (or nothing has come for a while, as when the last changes
were outside of the prefix) it is looked at again. What differs then differs for good: etcd owed
us an event and did not send it.

Cost: one listing's worth of reading for etcd, in pages of at most `PAGE` keys and about
`PAGE_BYTES`; here a page or a slice of keys at a time, about a millisecond each, and for as long
as it runs one table entry for each key.

Concurrency: trio thread. `saw` and `note` are called by whoever changes the mirror.
"""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, final

import trio

from etcdfs.consistency.audit_index import (
    NOTHING,
    SLICE,
    Audited,
    Expected,
    agrees,
    expected_of,
    holder_of,
    is_as,
    is_hollow,
)
from etcdfs.consistency.orphan_records import Sweeper
from etcdfs.consistency.staleness import Staleness
from etcdfs.errors import StoreError, StorePermissionError
from etcdfs.keyspace.paging import Pages, Paging
from etcdfs.keyspace.store import Event, KeyValue, Store
from etcdfs.tree.inodes import KeyState
from etcdfs.tree.node_attributes import is_foreign
from etcdfs.tree.tree import Tree
from etcdfs.tree.value_cache import ValueCache

log = logging.getLogger(__name__)

JITTER: Final = 0.5
"""An interval is up to so much longer, so that the mounts of a cluster do not come all at once."""

RECHECK_S: Final = 5.0
"""How soon after one audit there may be another, if there is a reason for it: etcd has said that
we may not read, or has repeated events."""

PAGE: Final = 100
"""Keys read at a time, as each page is decoded in one go; about a millisecond."""
PAGE_BYTES: Final = 1 << 20

MAX_CHANGED: Final = 200_000
"""Keys that may change during an audit, and suspects it may have, before it gives up."""


class AuditVoidError(Exception):
    """The audit can say nothing: the connection was lost, or too much changed meanwhile."""


class Following(Protocol):
    """The mirror, as an audit needs it."""

    @property
    def revision(self) -> int:
        """The revision that readers see."""
        ...

    async def reached(self, revision: int) -> None:
        """Return once readers see `revision`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditStatistics:
    """What audits have found.

    Attributes:
        audits: Audits that came to a verdict.
        void: Audits that could not, as the connection was lost or too much changed.
        failed: Audits that etcd did not answer, or refused.
        differing: Audits that found a difference.
        differences: Keys that differed, in all audits.
        revision: The revision of the last verdict.
        keys: Keys compared for it.
        seconds: How long it took.
        swept: Void record keys that were deleted.
    """

    audits: int
    void: int
    failed: int
    differing: int
    differences: int
    revision: int
    keys: int
    seconds: float
    swept: int


@dataclass(slots=True)
class _Audit:
    """One audit under way."""

    revision: int = 0
    keys: int = 0
    seen: set[object] = field(default_factory=set)
    changed: set[bytes] = field(default_factory=set)
    suspects: dict[bytes, Expected] = field(default_factory=dict)
    hollow: list[bytes] = field(default_factory=list)
    is_waiting: bool = False
    is_void: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What an audit says.

    Attributes:
        revision: The revision at which was compared.
        differing: The keys that differ, in order.
    """

    revision: int
    differing: tuple[bytes, ...]


@final
class Auditor:
    """Audits one mirror."""

    def __init__(
        self,
        store: Store,
        value_cache: ValueCache,
        tree: Tree,
        staleness: Staleness,
        mirror: Following,
        held: Audited,
        *,
        interval_s: float,
        patience_s: float,
        sweeper: Sweeper | None = None,
    ) -> None:
        """Audit `mirror`; `sweeper` tidies up after each audit that has found no difference."""
        # --- dependencies
        self._store = store
        self._value_cache = value_cache
        self._tree = tree
        self._staleness = staleness
        self._mirror = mirror
        self._sweeper = sweeper
        self._held = held
        # --- constants
        self._interval_s = interval_s
        self._patience_s = patience_s
        # --- mutable state
        self._audit: _Audit | None = None
        self._hurry = trio.Event()
        self._dropped = 0
        self._audits = self._void = self._failed = self._differing = self._differences = 0
        self._revision = self._keys = 0
        self._seconds = 0.0

    # --- told by the mirror -----------------------------------------------------------------

    def saw(self, events: Sequence[Event]) -> None:
        """Note that the watch has brought events, before or after they are applied."""
        audit = self._audit
        if audit is None:
            return
        for event in events:
            audit.changed.add(event.key)
            audit.suspects.pop(event.key, None)
        if len(audit.changed) > MAX_CHANGED:
            audit.is_void = True

    def note(self, *, connected: bool, dropped: int) -> None:
        """Note whether there is a confirmed watch, and how many events were dropped as repeated.

        Any of those may have been a late one: an audit is made soon.
        """
        if not connected and self._audit is not None:
            self._audit.is_void = True
        if dropped > self._dropped:
            self._hurry.set()
        self._dropped = dropped

    def hurry(self) -> None:
        """Have an audit made soon."""
        self._hurry.set()

    # --- auditing ---------------------------------------------------------------------------

    async def run(
        self, doubt: Callable[[str], None], deny: Callable[[StorePermissionError], None]
    ) -> None:
        """Audit again and again, for ever.

        Args:
            doubt: Told of each difference.
            deny: Told when etcd does not let us read.
        """
        while self._interval_s and self._held.is_kept:
            await self._pause()
            try:
                verdict = await self.audit()
            except AuditVoidError as exc:
                self._void += 1
                log.info("an audit was given up: %s", exc)
            except StorePermissionError as exc:
                self._failed += 1
                deny(exc)
            except StoreError as exc:
                self._failed += 1
                log.info("etcd could not be audited against: %s", exc)
            except Exception:  # the border of this task, as the handlers have theirs
                self._failed += 1
                log.exception("an audit failed; this is a bug of etcdfs")
            else:
                if verdict.differing:
                    doubt(_sentence(verdict))
                elif self._sweeper is not None:
                    await self._sweeper.sweep()

    async def _pause(self) -> None:
        soon_s = min(RECHECK_S, self._interval_s)
        longest_s = self._interval_s * random.uniform(1, 1 + JITTER)  # noqa: S311 - no secret
        await trio.sleep(soon_s)
        if self._staleness.denied:
            return
        with trio.move_on_after(longest_s - soon_s):
            await self._hurry.wait()
        self._hurry = trio.Event()

    async def audit(self) -> Verdict:
        """Compare everything once.

        Raises:
            AuditVoidError: It came to no verdict.
            StorePermissionError: etcd does not let us read.
            StoreError: etcd could not be asked, or the revision was compacted away.
        """
        if not self._staleness.connected and not self._staleness.denied:
            raise AuditVoidError("there is no connection")
        started = trio.current_time()
        audit = self._audit = _Audit()
        try:
            await self._read_all(audit)
            await self._find_ghosts(audit)
            await self._let_catch_up(audit)
            differing = await self._convicted(audit)
            if not self._staleness.connected:
                raise AuditVoidError("there is no connection")
        finally:
            self._audit = None
        self._audits += 1
        self._revision, self._keys = audit.revision, audit.keys
        self._seconds = trio.current_time() - started
        self._differing += bool(differing)
        self._differences += len(differing)
        return Verdict(revision=audit.revision, differing=tuple(sorted(differing)))

    def statistics(self) -> AuditStatistics:
        """Say what audits have found."""
        return AuditStatistics(
            audits=self._audits,
            void=self._void,
            failed=self._failed,
            differing=self._differing,
            differences=self._differences,
            revision=self._revision,
            keys=self._keys,
            seconds=round(self._seconds, 6),
            swept=0 if self._sweeper is None else self._sweeper.swept,
        )

    async def _read_all(self, audit: _Audit) -> None:
        keyspace = self._held.keyspace
        # etcd walks its index of all that is asked for, page or not, to count it: asking for the
        # rest of everything with each page would take it quadratic time.
        starts = [keyspace.start, *await self._milestones(audit)]
        for start, end in zip(starts, [*starts[1:], keyspace.end], strict=True):
            await self._read_range(audit, start, end)

    async def _milestones(self, audit: _Audit) -> list[bytes]:
        """Return keys that are about a page apart, in order."""
        found: set[bytes] = set()
        keys = size = 0
        for held in self._held.slices():
            for holder, key_state in held:
                keys += 1
                size += key_state.size
                if keys >= PAGE or size >= PAGE_BYTES:
                    keys = size = 0
                    found.add(self._held.key_of(holder) or b"")
            await _let_others(audit)
        return sorted(key for key in found if key > self._held.keyspace.start)

    async def _read_range(self, audit: _Audit, start: bytes, end: bytes) -> None:
        # What is known of the range already bounds its first page (`_milestones`).
        paging = Paging(PAGE, most_bytes=PAGE_BYTES, first_keys=PAGE)
        pages = Pages(self._store, start, end, paging, revision=audit.revision)
        while (page := await pages.next()) is not None:
            audit.revision = pages.revision
            self._staleness.allow()
            for first in range(0, len(page.entries), SLICE):
                for entry in page.entries[first : first + SLICE]:
                    self._compare(audit, entry)
                await _let_others(audit)

    def _compare(self, audit: _Audit, entry: KeyValue) -> None:
        audit.keys += 1
        if is_foreign(self._tree, entry.key):
            return
        holder = holder_of(self._tree, entry.key)
        if holder is not None:
            audit.seen.add(holder)
        if entry.key not in audit.changed and not is_as(self._tree, self._value_cache, entry):
            self._suspect(audit, entry.key, expected_of(entry))

    async def _find_ghosts(self, audit: _Audit) -> None:
        """Suspect what the mirror has and etcd had not."""
        for held in self._held.slices():
            for holder, key_state in held:
                if holder in audit.seen:
                    continue
                key = self._held.key_of(holder)
                if key is not None:
                    self._suspect_ghost(audit, key, key_state)
            await _let_others(audit)
        for directories in self._held.directories():
            audit.hollow += [
                b"/".join(self._tree.names(directory))
                for directory in directories
                if is_hollow(self._tree, directory)
            ]
            await _let_others(audit)
        if audit.hollow:  # no event would take it away, and no listing would name it
            self._tree.doubtful = True

    def _suspect_ghost(self, audit: _Audit, key: bytes, key_state: KeyState) -> None:
        if key_state.mod_revision <= audit.revision and key not in audit.changed:
            self._suspect(audit, key, NOTHING)

    def _suspect(self, audit: _Audit, key: bytes, expected: Expected) -> None:
        audit.suspects.setdefault(key, expected)
        if len(audit.suspects) > MAX_CHANGED:
            audit.is_void = True

    @property
    def is_waiting(self) -> bool:
        """Whether an audit has read everything, and waits for the watch to explain some of it."""
        return self._audit is not None and self._audit.is_waiting

    async def _let_catch_up(self, audit: _Audit) -> None:
        """Wait until the watch has brought all it owes us for the pinned revision.

        The mirror cannot be expected to reach that revision: the last changes may have been
        outside of its prefix. So it is enough that nothing more comes.
        """
        audit.is_waiting = True
        while audit.suspects and self._mirror.revision < audit.revision:
            before = self._mirror.revision
            with trio.move_on_after(self._patience_s):
                await self._mirror.reached(audit.revision)
            if self._mirror.revision == before:
                return

    async def _convicted(self, audit: _Audit) -> list[bytes]:
        """Return the suspects that still differ."""
        convicted: list[bytes] = []
        suspects = list(audit.suspects.items())
        for first in range(0, len(suspects) or 1, SLICE):
            for key, expected in suspects[first : first + SLICE]:
                if key in audit.suspects and not agrees(
                    self._tree, self._value_cache, key, expected
                ):
                    convicted.append(key)
            await _let_others(audit)
        return [key for key in convicted if key in audit.suspects] + audit.hollow


async def _let_others(audit: _Audit) -> None:
    await trio.lowlevel.checkpoint()
    if audit.is_void:
        raise AuditVoidError("the connection was lost, or too much changed meanwhile")


def _sentence(verdict: Verdict) -> str:
    count = len(verdict.differing)
    return (
        f"the audit at revision {verdict.revision} found {count} difference(s) from etcd, "
        f"the first at {verdict.differing[0]!r}"
    )
