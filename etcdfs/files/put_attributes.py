"""What goes along with a put of a file's value: its attributes, in the same transaction.

Knows: which attributes a new key begins with, which times were set for the version that is about to
be written back, and which no longer hold; and what is done where etcd's roles do not let attributes be
written: all is done without them, for content still works.

Concurrency: trio thread.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final, TypeVar, overload

from etcdfs.errors import StorePermissionError
from etcdfs.files.write_buffer import WriteBuffer
from etcdfs.keyspace.attribute_records import Record, Rights, is_record_key
from etcdfs.keyspace.keys import MARKER_NAME
from etcdfs.keyspace.store import (
    Committed,
    Compare,
    Delete,
    Operation,
    Put,
    Store,
    Transaction,
    absent,
)
from etcdfs.keyspace.transactions import same_record, write_record
from etcdfs.tree.inodes import File
from etcdfs.tree.node_attributes import record_of
from etcdfs.tree.tree import Tree

_Done = TypeVar("_Done")


@dataclass(frozen=True, slots=True)
class PutAttributes:
    """Operations on a record key. Both keep out of the way if somebody else was there first.

    Attributes:
        changed: What goes along with a put.
        same: What is done if the value is the one that is there already, and nothing is put.
    """

    changed: tuple[Operation, ...] = ()
    same: tuple[Operation, ...] = ()


NO_ATTRIBUTES: Final = PutAttributes()


async def with_attributes(
    rights: Rights,
    attempt: Callable[[bool], Awaitable[_Done]],
    *,
    may_drop: Callable[[], bool] = lambda: True,
) -> _Done:
    """Have something done with attributes; without, if that is what roles forbid.

    Args:
        rights: Where it is noted that they cannot be written.
        attempt: Does it, with attributes or without.
        may_drop: Whether it may be done without.

    Raises:
        StoreError: It was refused for another reason, or without as well.
    """
    try:
        return await attempt(True)
    except StorePermissionError as exc:
        if not exc.is_of_role or not may_drop():
            raise
        done = await attempt(False)
        rights.refuse_writing(exc)
        return done


@overload
async def commit_with(
    store: Store, rights: Rights, with_record: Transaction, bare: Transaction
) -> Committed: ...
@overload
async def commit_with(
    store: Store, rights: Rights, with_record: Transaction, bare: None
) -> Committed | None: ...
async def commit_with(
    store: Store, rights: Rights, with_record: Transaction, bare: Transaction | None
) -> Committed | None:
    """Commit a transaction with records; the bare one, or nothing, if that is what roles forbid."""

    async def attempt(has_records: bool) -> Committed | None:
        if has_records:
            return await store.commit(with_record)
        return None if bare is None else await store.commit(bare)

    committed = await with_attributes(rights, attempt, may_drop=lambda: with_record != bare)
    if committed is not None and committed.of is with_record:
        written = (each.key for each in with_record.then if isinstance(each, Put | Delete))
        if any(map(is_record_key, written)):
            rights.allow_writing()
    return committed


def put_attributes_of(tree: Tree, file: File, buffer: WriteBuffer, key: bytes) -> PutAttributes:
    """Return what goes along with the publication of a write buffer; mostly nothing."""
    record, times = record_of(file), buffer.times_set
    if not tree.attributes or file.name == MARKER_NAME:  # a marker's are its directory's
        return NO_ATTRIBUTES
    if file.key_state is None:
        changed = _timed(record, times, 0)
        # Not for a file that somebody else has made meanwhile.
        return PutAttributes(_guarded((absent(key),), write_record(key, changed, 0)))
    if times is None and record.mtime_ns is None:
        return NO_ATTRIBUTES
    known = 0 if file.stored_record is None else file.stored_record.key_state.mod_revision
    guard = same_record(key, known, file.key_state.create_revision)
    changed = _timed(record.without_mtime(), times, 0)
    same = _timed(record, times, file.key_state.mod_revision)
    return PutAttributes(
        _guarded(guard, write_record(key, changed, known)),
        _guarded(guard, write_record(key, same, known)) if times is not None else (),
    )


def _timed(record: Record, times: tuple[int, int | None] | None, revision: int) -> Record:
    if times is None:
        return record
    mtime_ns, atime_ns = times
    if atime_ns is None:
        atime_ns = record.atime_ns
    elif atime_ns == mtime_ns:
        atime_ns = None  # as it is shown without
    return replace(record, mtime_ns=mtime_ns, mtime_revision=revision, atime_ns=atime_ns)


def _guarded(
    guard: tuple[Compare, ...], operations: tuple[Operation, ...]
) -> tuple[Operation, ...]:
    return (Transaction(guard, operations),) if operations else ()
