"""Publishing: how the bytes written to a file become one put in etcd.

Knows: the transaction for each kind of change, what a lost race means for it, and how a put whose
answer never came is resolved. Does not know: handles, names, the kernel.

Rules: one put per flush; nothing changed, nothing put; a key that was deleted or
made anew by another client is never resurrected; a put without an answer is not sent again by
itself, it is recognised by reading back, unless it appends. Each put is for one version of the
key, so that one which etcd carries out late undoes nothing; and what failed goes over nothing that
may be newer.

Concurrency: trio thread. One publication of a file at a time, under the file's lock, which
writers take too: a write buffer does not change while it is on its way.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, final

from etcdfs.errors import (
    FileTooLargeError,
    OutcomeUnknownError,
    StoreError,
    WriteConflictError,
)
from etcdfs.files.locks import NodeLocks
from etcdfs.files.put_attributes import (
    NO_ATTRIBUTES,
    PutAttributes,
    put_attributes_of,
    with_attributes,
)
from etcdfs.files.write_buffer import Kind, WriteBuffer
from etcdfs.keyspace.keys import MARKER_NAME
from etcdfs.keyspace.store import (
    Committed,
    Event,
    Get,
    KeyValue,
    Put,
    Revision,
    Store,
    Transaction,
    absent,
    unchanged,
)
from etcdfs.keyspace.transaction_results import events_of
from etcdfs.tree.changes import Intent
from etcdfs.tree.inodes import Cached, Dentry, File, KeyState, key_state_of
from etcdfs.tree.value_cache import ValueCache
from etcdfs.tree.view import View

MAX_REBASES: Final = 1000
"""Lost races before a publication gives up; each loss means that somebody else's write won."""

REQUEST_OVERHEAD: Final = 512
"""Bytes a put's request has besides key and value: the transaction around it and etcd's own
header. Measured below 200 with etcd 3.4 and 3.5; etcd refuses by the size of the whole request
(server/etcdserver/v3_server.go, processInternalRaftRequestOnce)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WritebackStatistics:
    """What became of write buffers since the start."""

    puts: int
    unchanged: int
    rebased_appends: int
    dropped: int
    resolved: int


@dataclass(frozen=True, slots=True)
class _Done:
    """A publication that reached etcd.

    Attributes:
        key state: What etcd says of the key.
        value: What it holds.
        merged: Whether that is not, or not only, what was written back.
        stored_records: What became of its attributes.
    """

    key_state: KeyState
    value: bytes
    merged: bool
    stored_records: tuple[Event, ...] = ()


@final
class Writeback:
    """Publishes write buffers through one store."""

    def __init__(
        self, store: Store, view: View, value_cache: ValueCache, *, max_file_size: int
    ) -> None:
        # --- dependencies
        self._store = store
        self._view = view
        self._value_cache = value_cache
        self.locks = NodeLocks(view.update.tree)
        # --- constants
        self._max_file_size = max_file_size
        # --- mutable state
        self._puts = self._unchanged = self._rebased = self._dropped = self._resolved = 0

    def statistics(self) -> WritebackStatistics:
        """Count what became of write buffers."""
        return WritebackStatistics(
            puts=self._puts,
            unchanged=self._unchanged,
            rebased_appends=self._rebased,
            dropped=self._dropped,
            resolved=self._resolved,
        )

    @property
    def max_file_size(self) -> int:
        """What fits into a request, as far as we are told."""
        return self._max_file_size

    def check_size(self, file: File, size: int) -> None:
        """Refuse a value that etcd would refuse, at the write that makes it so large.

        Raises:
            FileTooLargeError: It is over the limit.
        """
        key = self._view.update.tree.key_of(file) or b""
        limit = self._max_file_size - REQUEST_OVERHEAD - 4 * len(key)
        if size > limit:
            msg = f"{size} bytes are more than the {limit} that fit under {key!r}"
            raise FileTooLargeError(msg)

    async def write_back(self, file: File) -> None:
        """Bring a file's write buffer to etcd; return when it is there and visible here.

        Raises:
            WriteConflictError: Part of the file was overwritten and its key had changed.
            FileTooLargeError: It does not fit.
            StoreError: etcd refused it, or could not be asked. The write buffer stays, and so does
                the published value; the path shows the published value again.
        """
        if not self.locks.is_held(file) and not _is_dirty(file):
            return
        async with self.locks.settled(file):
            buffer = file.buffer
            if not isinstance(buffer, WriteBuffer) or not buffer.is_dirty:
                return
            key = self._view.update.tree.key_of(file)
            if key is None:
                self._dropped += 1
                return
            try:
                _check_whole(buffer, key)
                await self._write_back(file, buffer, key)
            except (StoreError, WriteConflictError, FileTooLargeError):
                await self._abandon(file)
                raise

    async def _write_back(self, file: File, buffer: WriteBuffer, key: bytes) -> None:
        # checkpoint: commit and settle; the file may be unlinked or superseded by another client
        # meanwhile, never renamed or written to (the locks).
        update = self._view.update
        with update.own(key, Intent(file=file)) as intent, ExitStack() as own_records:
            done = await self._recognise_earlier(file, buffer, key)
            if done is None:
                done = await self._accompanied(file, buffer, key, intent, own_records)
            if done is None:
                # The key was deleted or made anew: the file is as good as unlinked.
                self._dropped += 1
                _live_on(file, buffer)
                return
            if done.merged:
                # What this file's readers have is not what the key holds now.
                intent.file = None
                _live_on(file, buffer, done.key_state)
            else:
                buffer.written_back(buffer.value)
                file.value = done.value
            self._value_cache.put(key, done.key_state.mod_revision, done.value)
            buffer.times = None
            self._view.update.tree.revisions.learn(done.key_state.mod_revision, buffer.changed_ns)
            events = (_event(key, done), *done.stored_records)
            await self._view.wait_until_visible(max(e.mod_revision for e in events), events)
        if not done.merged:
            _keep_newer(file, done.key_state)
            file.mtime_ns = max(buffer.mtime_ns, file.mtime_ns)
            file.ctime_ns = max(file.ctime_ns, file.mtime_ns)

    async def _accompanied(
        self,
        file: File,
        buffer: WriteBuffer,
        key: bytes,
        intent: Intent,
        own_records: ExitStack,
    ) -> _Done | None:
        """Publish with the attributes that go along; without, if etcd's roles say so."""
        update = self._view.update
        put_attributes = put_attributes_of(update.tree, file, buffer, key)
        operations = (*put_attributes.changed, *put_attributes.same)
        own_records.enter_context(update.writing_records(operations))

        async def attempt(has_attributes: bool) -> _Done | None:
            along = put_attributes if has_attributes else NO_ATTRIBUTES
            return await self._resolve(file, buffer, key, intent, along)

        return await with_attributes(
            update.tree.rights, attempt, may_drop=lambda: put_attributes != NO_ATTRIBUTES
        )

    async def _resolve(
        self,
        file: File,
        buffer: WriteBuffer,
        key: bytes,
        intent: Intent,
        put_attributes: PutAttributes,
    ) -> _Done | None:
        """Commit, and if no answer comes, read back what became of it."""
        try:
            return await self._commit(file, buffer, key, intent, put_attributes)
        except OutcomeUnknownError as unknown:
            if not buffer.is_tellable:
                raise  # what was found could be another's, see `_check_tellable`
            try:
                entries = (await self._store.range(key)).entries
            except StoreError as exc:
                raise unknown from exc
            if not entries or self._recognise(buffer, entries[0]) != buffer.value:
                raise
            self._resolved += 1
            return _Done(
                key_state_of(entries[0]), entries[0].value, merged=entries[0].value != buffer.value
            )

    async def _commit(
        self,
        file: File,
        buffer: WriteBuffer,
        key: bytes,
        intent: Intent,
        put_attributes: PutAttributes,
    ) -> _Done | None:
        match buffer.kind:
            case Kind.WHOLE if file.key_state is None:
                return await self._put_new(file, buffer, key, intent, put_attributes)
            case Kind.WHOLE:
                return await self._replace(file, buffer, key, intent, put_attributes)
            case _:
                return await self._change(file, buffer, key, intent, put_attributes)

    async def _put_new(
        self,
        file: File,
        buffer: WriteBuffer,
        key: bytes,
        intent: Intent,
        put_attributes: PutAttributes,
    ) -> _Done | None:
        """Publish a file made here: it takes the name, whoever else took it meanwhile.

        Unless nothing was written, for what O_CREAT finds stays as it is, or all was appended:
        then it is added to what is there.
        """
        value = intent.value = buffer.value
        put = Transaction((absent(key),), (Put(key, value), *put_attributes.changed), (Get(key),))
        committed = await self._send(buffer, put, value)
        if committed.succeeded:
            made = committed.revision
            return _done(committed, KeyState(made, made, 1, 0, len(value)), value)
        (found,) = committed.entries
        if file.name == MARKER_NAME:  # it is there with its directory, and means no file then
            buffer.is_bare = buffer.is_added = False
        if buffer.is_bare:
            return _Done(key_state_of(found), found.value, merged=True)
        _check_not_refused(buffer, found)
        return await self._change(file, buffer, key, intent, put_attributes, found)

    async def _replace(
        self,
        file: File,
        buffer: WriteBuffer,
        key: bytes,
        intent: Intent,
        put_attributes: PutAttributes,
    ) -> _Done | None:
        """Replace the whole value: the last writer wins, over the same incarnation."""
        assert file.key_state is not None
        value = intent.value = buffer.value
        if value == buffer.base:
            # Nothing changed, unless somebody else changed it: decided by etcd, not by us.
            same = unchanged(key, file.key_state.mod_revision)
            nothing = Transaction((same,), put_attributes.same)
            committed = await self._send(buffer, nothing, value)
            if committed.succeeded:
                self._unchanged += 1
                stored_records = events_of(committed)
                return _Done(file.key_state, value, merged=False, stored_records=stored_records)
        return await self._change(file, buffer, key, intent, put_attributes)

    async def _change(
        self,
        file: File,
        buffer: WriteBuffer,
        key: bytes,
        intent: Intent,
        put_attributes: PutAttributes,
        others: KeyValue | None = None,
    ) -> _Done | None:
        """Append to the newest value, overwrite part of the one that was read, or replace any.

        Start from `others`, if the file is a new one and they were first. Each try is for one
        version of the key, the last one that we know: a request that etcd carries out when we
        have long given up on it must not undo what was written since.
        """
        key_state = file.key_state if others is None else key_state_of(others)
        assert key_state is not None
        base, merged = (buffer.base, False) if others is None else (others.value, buffer.adds)
        for _ in range(MAX_REBASES):
            value = intent.value = base + buffer.tail if buffer.adds else buffer.value
            self.check_size(file, len(value))
            if merged:
                intent.file = None
            put = Put(key, value, key_state.lease, keep_lease=True)
            known = unchanged(key, key_state.mod_revision)
            operations = (put, *put_attributes.changed)
            committed = await self._send(
                buffer, Transaction((known,), operations, (Get(key),)), value
            )
            if committed.succeeded:
                self._rebased += merged
                done = key_state._replace(
                    mod_revision=committed.revision,
                    version=key_state.version + 1,
                    size=len(value),
                )
                return _done(committed, done, value, merged=merged)
            current = committed.entries
            if not current or current[0].create_revision != key_state.create_revision:
                return None
            found = current[0]
            arrived = self._recognise(buffer, found)
            if arrived == buffer.value:
                _check_tellable(buffer, found)
                self._resolved += 1
                return _Done(key_state_of(found), found.value, merged=found.value != arrived)
            if arrived is not None:
                _go_on_from(file, buffer, arrived, found)
            if found.value != arrived:
                _check_may_go_over(buffer, found)
            key_state = key_state_of(found)
            base, merged = found.value, merged or (buffer.adds and found.value != arrived)
        msg = f"{key!r}: lost the race {MAX_REBASES} times"
        raise WriteConflictError(msg)

    async def _send(self, buffer: WriteBuffer, transaction: Transaction, value: bytes) -> Committed:
        try:
            committed = await self._store.commit(transaction)
        except OutcomeUnknownError:
            buffer.tries.append((value, buffer.value))
            raise
        self._puts += 1
        return committed

    async def _recognise_earlier(self, file: File, buffer: WriteBuffer, key: bytes) -> _Done | None:
        """See whether an earlier try without an answer arrived after all.

        If the write buffer has changed since, it goes on from there: only the rest is to be written back.
        """
        if not buffer.tries:
            return None
        entries = (await self._store.range(key)).entries
        arrived = self._recognise(buffer, entries[0]) if entries else None
        if arrived is None:
            return None
        found = entries[0]
        if arrived == buffer.value:
            _check_tellable(buffer, found)
        self._resolved += 1
        if arrived == buffer.value:
            return _Done(key_state_of(found), found.value, merged=found.value != arrived)
        _go_on_from(file, buffer, arrived, found)
        return None

    def _recognise(self, buffer: WriteBuffer, found: KeyValue) -> bytes | None:
        """Return what the write buffer was when it was sent and, it seems, became what was found, or None.

        Others may have appended to it since; and they may have appended the same, see
        `_check_tellable`. Its writer was told that this is not known, and goes on from there.
        """
        for sent, meant in reversed(buffer.tries):
            if found.value == sent:
                return meant
            if buffer.adds and found.value.startswith(sent):
                return meant
        return None

    async def _abandon(self, file: File) -> None:
        """Show the last published value at the path again, under a fresh inode.

        The kernel's pages hold the failed attempt; they belong to the old inode and leave with
        it. The old inode keeps its write buffer, so that a later flush of it can still succeed.
        """
        directory, name = file.directory, file.name
        if directory is None:
            return
        update, tree = self._view.update, self._view.update.tree
        stale: set[Cached] = {Dentry(directory.inode, name), tree.listing_of(file)}
        if file.key_state is None:
            stale |= update.withdraw(directory, name, gone=False)
        else:
            update.restore_version(file)
        await self._view.invalidate_first(stale)


def _is_dirty(file: File) -> bool:
    return isinstance(file.buffer, WriteBuffer) and file.buffer.is_dirty


def _check_whole(buffer: WriteBuffer, key: bytes) -> None:
    if buffer.is_torn:
        msg = f"{key!r}: a write did not fit, and half a value is not written back"
        raise FileTooLargeError(msg)


def _check_tellable(buffer: WriteBuffer, found: KeyValue) -> None:
    """Refuse to take an append that was found for one's own: two may append the same bytes.

    Then one of them would be reported as done and be nowhere. No trace in etcd says whose put made
    a version. A whole value is another matter: it is there, whoever put it, and a request that is
    on its way yet cannot be carried out any more, as it is for an older version. Neither can one
    that makes an empty file, and whoever made that, O_CREAT asks for no more.

    Raises:
        OutcomeUnknownError: All that there is to publish are added bytes.
    """
    if not buffer.is_tellable:
        msg = (
            f"{found.key!r}: the append may be there (revision {found.mod_revision}), or another's"
        )
        raise OutcomeUnknownError(msg)


def _check_not_refused(buffer: WriteBuffer, found: KeyValue) -> None:
    """Refuse to go over a version that may be newer than an attempt which failed."""
    if buffer.is_refused and not buffer.adds:
        msg = f"{found.key!r} was changed (revision {found.mod_revision}) since it was written"
        raise WriteConflictError(msg)


def _check_may_go_over(buffer: WriteBuffer, found: KeyValue) -> None:
    """Refuse to overwrite what another client wrote, but for the last writer of a whole value."""
    _check_not_refused(buffer, found)
    if not buffer.adds and buffer.kind is not Kind.WHOLE:
        msg = f"{found.key!r} was changed by another client (revision {found.mod_revision})"
        raise WriteConflictError(msg)


def _done(
    committed: Committed, key_state: KeyState, value: bytes, *, merged: bool = False
) -> _Done:
    """Return what a put came to: its conditions name the version that it was put over."""
    along = [op for op in committed.operations if isinstance(op, Transaction)]
    stored_records = tuple(event for op in along for event in events_of(committed[op]))
    return _Done(key_state, value, merged=merged, stored_records=stored_records)


def _event(key: bytes, done: _Done) -> KeyValue:
    key_state = done.key_state
    return KeyValue(
        key,
        done.value,
        key_state.create_revision,
        key_state.mod_revision,
        key_state.version,
        key_state.lease,
    )


def _live_on(file: File, buffer: WriteBuffer, merged: KeyState | None = None) -> None:
    """Let a file whose content is not what its key holds be read as it was written.

    One that was made here and `merged` into what another client had made is a version of that from
    then on: what is yet to be appended to it is added there, and does not take its place.
    """
    buffer.written_back(buffer.value)
    file.value = buffer.base
    if file.key_state is None and merged is not None:
        file.key_state = _before(merged)
    if file.key_state is not None:
        file.key_state = file.key_state._replace(size=len(buffer))


def _go_on_from(file: File, buffer: WriteBuffer, arrived: bytes, found: KeyValue) -> None:
    """Leave of a write buffer what was written after a try that arrived, whatever was put over that."""
    buffer.written_back(arrived)
    if found.value == arrived:
        file.key_state = key_state_of(found)
    elif file.key_state is None:
        file.key_state = _before(key_state_of(found))


def _before(key_state: KeyState) -> KeyState:
    """Return the key state of a version older than any that another client has made of a key.

    So it is a version of that key, and never taken for what the key holds.
    """
    return key_state._replace(mod_revision=Revision(key_state.create_revision - 1))


def _keep_newer(file: File, key_state: KeyState) -> None:
    """Take over key state that the tree did not: the file was superseded while it settled."""
    if file.key_state is None or file.key_state.mod_revision < key_state.mod_revision:
        file.key_state = key_state
