"""The snapshot of one mount: loaded when that starts, and written while it lives.

Knows: when the snapshot is believed, loaded, written and forgotten. Does not know: how it is stored
(`snapshot_file`), how a mirror shows it.

What the watch brings is collected, of each key the last change, and written every `INTERVAL_S` if
there is something, and at the end: one transaction of what has changed. A listing is written as it
comes, and counts when it is whole. All writing is done in a thread, one at a time; reading never
waits for it. While the disk takes nothing, or too slowly, up to `WAITING_BYTES` are kept; past
that they are let go, what is on disk stays as it was, and when it can be written again everything
is listed anew.

What a role may no longer read is not kept for later: when etcd says so, the file is deleted.

Concurrency: trio thread, and one thread for each of writing and reading.
"""

import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar, final

import trio

from etcdfs.admission import about_to_wait
from etcdfs.consistency.snapshot import Identity, Manifest, Stream, fault_in
from etcdfs.errors import SnapshotDamagedError, SnapshotWriteError, StorePermissionError
from etcdfs.keyspace.store import Clock, KeyValue, Revision
from etcdfs.mirror.mirror import Mirror
from etcdfs.options import MountOptions
from etcdfs.snapshots.snapshot_file import Changes, SnapshotFile
from etcdfs.snapshots.stream_recorder import StreamRecorder

log = logging.getLogger(__name__)

T = TypeVar("T")

INTERVAL_S: Final = 5.0
"""Between two writes of what has changed."""

HEARTBEAT_S: Final = 60.0
"""Between two writes when nothing has: they say that etcd was heard (`--max-stale`)."""

RELIST_S: Final = 300.0
"""Between two listings that are made for nothing but the snapshot."""

LAST_WRITE_S: Final = 5.0
"""How long the end of a mount waits for the last write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotStatistics:
    """The snapshot, as an operator wants it.

    Attributes:
        offline: Whether it is shown because etcd has not answered since the mount began.
        keys: How many are in it; 0 if there is none.
        revision: Of which revision it is; 0 if there is none.
        size: Bytes on disk.
        age_s: Seconds since it was known to be what etcd had; 0 if there is none.
        waiting: Changes and listed keys that are not written yet.
        writes: Times that it was written.
        failures: Times that it could not be.
        error: Why not, the last time; "" once it was.
        refused: Why the one that was found at the start was not loaded; "" if it was, or none was.
    """

    offline: bool
    keys: int
    revision: int
    size: int
    age_s: float
    waiting: int
    writes: int
    failures: int
    error: str
    refused: str


@final
class Snapshots:
    """The snapshot of one mount; see `Snapshot`.

    Attributes:
        keys: Who is told of the keys.
        attributes: Who is told of the attribute records.
        is_offline: Whether it is shown although etcd has not confirmed all of it.
    """

    def __init__(self, file: SnapshotFile, options: MountOptions, clock: Clock) -> None:
        """Make one; nothing is loaded or written yet."""
        # --- dependencies
        self._file = file
        self._clock = clock
        # --- mutable state
        self.keys = StreamRecorder()
        self.attributes = StreamRecorder()
        self.is_offline = False
        self._streams = {Stream.KEYS: self.keys, Stream.ATTRIBUTES: self.attributes}
        self._identity = identity_of(options)
        self._threads = trio.CapacityLimiter(2)
        self._writing = trio.Lock()
        self._reading = trio.Lock()
        self._beaten = float("-inf")  # trio's time of the last write
        self._relisted = float("-inf")  # and of when a listing was last asked for
        self._size = file.size()
        self._writes = self._failures = 0
        self._error = self._refused = ""

    # --- loading ----------------------------------------------------------------------------

    async def load(self, mirror: Mirror, *, cluster: int) -> str:
        """Load what there is into a mirror that has nothing yet.

        Args:
            mirror: The mirror.
            cluster: etcd's number of itself; 0: it does not answer, so what is loaded is shown.

        Returns:
            Why there is nothing to be loaded; "" if it was.
        """
        for recorder in self._streams.values():
            recorder.begin(None)  # there may have been part of a listing
        manifest = self._file.manifest
        if manifest is None and not self._file.damage:
            fault = "there is none yet"
        elif manifest is None:
            fault = await self._refuse(self._file.damage, cluster)
        else:
            fault = fault_in(manifest, replace(self._identity, cluster=cluster)) or ""
            try:
                if not fault:
                    await self._load(mirror, manifest)
            except SnapshotDamagedError as exc:
                fault = str(exc)
            if fault:
                await self._refuse(fault, cluster)
        known = cluster if fault or manifest is None else manifest.identity.cluster
        self._identity = replace(self._identity, cluster=known)
        if manifest is not None and not fault and not cluster:
            mirror.staleness.last_heard(self._age_s(manifest, mirror.staleness.max_stale_s))
        return fault

    async def _load(self, mirror: Mirror, manifest: Manifest) -> None:
        """Load a snapshot; what it has of attributes first, as files are shown with theirs.

        Raises:
            SnapshotDamagedError: It is not what was written.
        """
        tree = mirror.update.tree
        tree.revisions.merge(manifest.times, self._clock())
        mirror.load((), first=True)
        mirror.loaded_pages = []
        async for entries in self._pages(Stream.KEYS):
            mirror.load(entries, first=False)
            mirror.loaded_pages.append(entries[0].key)
        keys = manifest.streams[Stream.KEYS].position
        attributes = manifest.streams.get(Stream.ATTRIBUTES)
        if mirror.stored_records is not None:
            if attributes is None:
                tree.rights.refuse_reading(StorePermissionError("the snapshot has none"))
            else:
                mirror.stored_records.loaded_pages = []
                async for entries in self._pages(Stream.ATTRIBUTES):
                    mirror.stored_records.load(entries)
                    mirror.stored_records.loaded_pages.append(entries[0].key)
                mirror.stored_records.loaded_at = attributes.position
                self.attributes.begin(attributes.position)
        mirror.loaded_at = keys
        self.keys.begin(keys)

    async def _pages(self, stream: Stream) -> AsyncIterator[tuple[KeyValue, ...]]:
        async with self._reading:
            with closing(self._file.pages(stream)) as pages:
                while (entries := await self._in_thread(lambda: next(pages, None))) is not None:
                    yield entries

    async def _refuse(self, fault: str, cluster: int) -> str:
        """Say that a snapshot is of no use; where etcd answers, begin another one."""
        self._refused = fault
        log.warning("the snapshot %s is refused: %s", self._file.path, fault)
        if cluster:
            await self._discard()
        return fault

    def _age_s(self, manifest: Manifest, max_stale_s: float) -> float:
        """Return how old a snapshot is; as old as is allowed, if the clock was put back since."""
        age_s = (self._clock() - manifest.heard_ns) / 1e9
        return age_s if age_s >= 0 else max_stale_s

    # --- reading values ---------------------------------------------------------------------

    async def recall(self, key: bytes, revision: Revision) -> bytes | None:
        """See `Snapshot.recall`."""
        about_to_wait()
        try:
            async with self._reading:
                return await self._in_thread(lambda: self._file.value(key, revision))
        except SnapshotDamagedError as exc:
            log.warning("the snapshot %s: %s", self._file.path, exc)
            return None

    # --- writing ----------------------------------------------------------------------------

    async def run(self, mirror: Mirror) -> None:
        """Write what comes, for ever."""
        while True:
            wanted = trio.Event()
            for recorder in self._streams.values():
                recorder.wanted = wanted
            with trio.move_on_after(INTERVAL_S):
                await wanted.wait()
            await self.write(mirror)
            if mirror.staleness.denied and self._file.manifest is not None:
                await self.forget("etcd no longer lets this mount read")
            self._catch_up(mirror)

    async def write(self, mirror: Mirror) -> None:
        """Write all that there is to be written; what cannot be written waits."""
        async with self._writing:
            try:
                await self._write_pages()
                await self._write_changes(mirror)
            except SnapshotWriteError as exc:
                self._failures += 1
                if not self._error:
                    log.warning("the snapshot %s cannot be written: %s", self._file.path, exc)
                self._error = str(exc)

    async def _write_pages(self) -> None:
        for stream, recorder in self._streams.items():
            while recorder.pages:
                page = recorder.pages[0]
                await self._in_thread(partial(self._file.stage, stream, page[1], first=page[0]))
                recorder.wrote(page)

    async def _write_changes(self, mirror: Mirror) -> None:
        dropped = set[Stream]()
        if not mirror.update.tree.rights.readable:  # nobody may be shown more than they would allow
            dropped.add(Stream.ATTRIBUTES)
            self.attributes.fall_behind()
        taken = {
            stream: changes
            for stream, recorder in self._streams.items()
            if (changes := recorder.take()) is not None
        }
        staleness = mirror.staleness.statistics()
        now = trio.current_time()
        has_base = self._file.manifest is not None and self.keys.position is not None
        if not taken and not (
            has_base and staleness.connected and now >= self._beaten + HEARTBEAT_S
        ):
            return
        head = Manifest(
            identity=self._identity,
            heard_ns=self._clock() - int(0 if staleness.connected else staleness.silent_s * 1e9),
            times=mirror.update.tree.revisions.encode(),
        )
        try:
            await self._in_thread(lambda: self._commit(head, taken, dropped))
        except SnapshotWriteError:
            for stream, changes in taken.items():
                self._streams[stream].give_back(changes)
            raise
        if self._error:
            log.info("the snapshot %s is written again", self._file.path)
        self._error = ""
        self._writes += 1
        self._beaten = now

    def _commit(
        self, head: Manifest, changes: Mapping[Stream, Changes], dropped: Collection[Stream]
    ) -> None:
        self._file.commit(head, changes, dropped)
        self._size = self._file.size()

    def _catch_up(self, mirror: Mirror) -> None:
        """Have everything listed anew if what is on disk cannot follow otherwise."""
        now = trio.current_time()
        if self._error or not mirror.staleness.connected or now < self._relisted + RELIST_S:
            return
        behind = "the snapshot cannot follow"
        readable = mirror.update.tree.rights.readable
        if self.keys.is_behind:
            self._relisted = now
            mirror.doubt(behind)
        elif mirror.stored_records is not None and self.attributes.is_behind and readable:
            self._relisted = now
            mirror.stored_records.doubt(behind)

    # --- forgetting -------------------------------------------------------------------------

    async def forget(self, reason: str) -> None:
        """Delete the snapshot: what is in it must not be shown any more."""
        log.warning("the snapshot %s is deleted: %s", self._file.path, reason)
        for recorder in self._streams.values():
            recorder.fall_behind()
        await self._discard()

    async def recognize(self, mirror: Mirror, cluster: int) -> None:
        """Note which cluster it is that answers, after a mount that began without."""
        if cluster != self._identity.cluster:
            self._identity = replace(self._identity, cluster=cluster)
            await self.forget(f"etcd is another cluster now ({cluster:x})")
            mirror.doubt("the snapshot was of another cluster")

    async def _discard(self) -> None:
        async with self._writing, self._reading:
            try:
                await self._in_thread(self._file.discard)
            except SnapshotWriteError as exc:
                self._failures += 1
                self._error = str(exc)
                log.warning("the snapshot %s cannot be made anew: %s", self._file.path, exc)

    async def aclose(self, mirror: Mirror) -> None:
        """Write what is left, within bounds, and let go of the file."""
        with trio.move_on_after(LAST_WRITE_S, shield=True):
            await self.write(mirror)
            async with self._writing, self._reading:
                await self._in_thread(self._file.close)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        # A disk that hangs must not keep the mount from ending.
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._threads)

    def statistics(self) -> SnapshotStatistics:
        """Say how the snapshot is."""
        manifest = self._file.manifest
        keys = None if manifest is None else manifest.streams.get(Stream.KEYS)
        age_ns = 0 if manifest is None else self._clock() - manifest.heard_ns
        return SnapshotStatistics(
            offline=self.is_offline,
            keys=0 if keys is None else keys.rows,
            revision=0 if keys is None else keys.position.revision,
            size=self._size,
            age_s=max(0, age_ns) / 1e9,
            waiting=self.keys.waiting + self.attributes.waiting,
            writes=self._writes,
            failures=self._failures,
            error=self._error,
            refused=self._refused,
        )


def open_snapshots(options: MountOptions, clock: Clock) -> Snapshots | None:
    """Return the snapshot of a mount that is to have one.

    Raises:
        StateDirectoryError: Its directory cannot be used.
    """
    if options.state_dir is None:
        return None
    return Snapshots(SnapshotFile.open(Path(options.state_dir)), options, clock)


def identity_of(options: MountOptions) -> Identity:
    """Return whose a mount's snapshot is; the cluster is known when etcd has answered."""
    security = options.security
    certificate = "" if security.cert is None else f"certificate {security.cert}"
    return Identity(
        cluster=0,
        prefix=options.prefix,
        user=security.user or certificate,
        attributes=not options.no_attrs,
        endpoints=tuple(map(str, options.endpoints)),
    )
