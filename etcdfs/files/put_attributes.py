"""What goes along with a put of a file's value: its attributes, in the same transaction.

What this room knows: which attributes a new key begins with, which times were set for the version
that is about to be published, and which no longer hold. What it must not know: how it is sent.

Concurrency: none; pure functions.
"""

from dataclasses import dataclass, replace
from typing import Final

from etcdfs.files.write_buffer import Draft
from etcdfs.keyspace.attribute_records import Record
from etcdfs.keyspace.keys import MARKER_NAME
from etcdfs.keyspace.store import Compare, Operation, Transaction, absent
from etcdfs.keyspace.transactions import same_record, write_record
from etcdfs.tree.node_attributes import record_of
from etcdfs.tree.tree import File, Tree


@dataclass(frozen=True, slots=True)
class Company:
    """Operations on a side key. Both keep out of the way if somebody else was there first.

    Attributes:
        changed: What goes along with a put.
        same: What is done if the value is the one that is there already, and nothing is put.
    """

    changed: tuple[Operation, ...] = ()
    same: tuple[Operation, ...] = ()


ALONE: Final = Company()


def company_of(tree: Tree, file: File, draft: Draft, key: bytes) -> Company:
    """Return what goes along with the publication of a draft; mostly nothing."""
    record, times = record_of(file), draft.times_set
    if not tree.attributes or file.name == MARKER_NAME:  # a marker's are its directory's
        return ALONE
    if file.facts is None:
        changed = _timed(record, times, 0)
        # Not for a file that somebody else has made meanwhile.
        return Company(_guarded((absent(key),), write_record(key, changed, 0)))
    if times is None and record.mtime_ns is None:
        return ALONE
    known = 0 if file.side is None else file.side.facts.mod_revision
    guard = same_record(key, known, file.facts.create_revision)
    changed = _timed(record.without_mtime(), times, 0)
    same = _timed(record, times, file.facts.mod_revision)
    return Company(
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
