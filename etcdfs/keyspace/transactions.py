"""The etcd transactions behind changes of names and attributes.

Knows: which conditions make create, mkdir, unlink, rmdir and rename atomic across the cluster, how
a directory that loses its last entry stays, and how an attribute record goes along. Does not know:
the tree, inodes, who asks.

A directory is there while its marker or any key below it is. Removing its last entry through the
mount must leave it, so each removal carries an inner transaction: *if
nothing else is below the parent, put the parent's marker*. Inner conditions are judged on the
state before the removal, so "nothing else" is spelled as two empty ranges beside the key.

A *rewriting* moves any number of keys: whole directories, or two names at once. It has a condition
for each key that it read, and etcd takes 128 operations (`--max-txn-ops`) on the way from the
outermost transaction to any inner one, conditions of it counted likewise. So the keys are spread
over a tree of inner transactions, each `WIDTH` wide; a condition in it that does not hold aborts
the whole (`Abort`). Such a tree holds `MAX_KEYS`; what is then in the way is the size of the
request (1.5 MiB, `--max-request-bytes`).

Concurrency: none; pure functions.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from etcdfs.keyspace.attribute_records import (
    Record,
    encode,
    is_record_key,
    record_key,
    shown_ranges,
)
from etcdfs.keyspace.keys import MAX_DEPTH
from etcdfs.keyspace.store import (
    Abort,
    Compare,
    Delete,
    Event,
    Get,
    KeyValue,
    Operation,
    Put,
    Revision,
    Tombstone,
    Transaction,
    absent,
    exists,
    range_end,
    unchanged,
)

WIDTH: Final = 36
"""Conditions and operations of each inner transaction. Three levels of them leave 20 for the
outermost: 3 * 36 + 20 = 128."""

MAX_KEYS: Final = WIDTH**3
"""Keys that one rewriting can read, and those it can put."""


def parent_prefix(key: bytes, root: bytes) -> bytes | None:
    """Return the prefix of the directory that a key or marker is in, None for the root's."""
    inner = key.removesuffix(b"/")
    above = inner[len(root) :].split(b"/", MAX_DEPTH - 1)[:-1]
    return root + b"/".join(above) + b"/" if above else None


def put_and_read(put: Put) -> tuple[Operation, ...]:
    """Return a put and what tells its revisions and version: a read sees it already."""
    return (put, Get(put.key, keys_only=True))


def make_file(key: bytes, value: bytes = b"", *, is_value: bool) -> Transaction:
    """Claim a name for a new file; fails if it is a file or a directory.

    Args:
        key: The file's key.
        value: What it holds.
        is_value: Whether there may be keys below it (`has_keys_below`).
    """
    conditions: tuple[Compare, ...] = (absent(key),)
    if not is_value:
        conditions += _nothing_below(key + b"/")
    return Transaction(conditions, put_and_read(Put(key, value)))


def make_directory(marker: bytes) -> Transaction:
    """Put the marker of a directory; fails if the name is a file or a directory."""
    return Transaction(
        (*_no_value(marker), *_nothing_below(marker)), put_and_read(Put(marker, b""))
    )


def remove_file(key: bytes, parent: bytes | None, *, is_value: bool) -> Transaction:
    """Delete a file's key. If it fails: a page of the key, then a page of what is below it.

    Args:
        key: The file's key.
        parent: Prefix of its directory; None if that needs no marker to stay.
        is_value: Whether there may be keys below it (`has_keys_below`).
    """
    below = key + b"/"
    conditions: tuple[Compare, ...] = (exists(key),)
    if not is_value:
        conditions += _nothing_below(below)
    return Transaction(
        conditions,
        (Delete(key), *_stay(parent, key)),
        (Get(key, keys_only=True), Get(below, range_end(below), limit=1, keys_only=True)),
    )


def clear_marker(marker: bytes) -> Transaction:
    """Empty the value of a directory's marker: what unlinking `%marker` means."""
    return Transaction((exists(marker),), put_and_read(Put(marker, b"")))


def remove_directory(marker: bytes, parent: bytes | None) -> Transaction:
    """Delete a directory's marker if nothing else is there.

    The key of the directory's own name (its `%value`) counts as an entry.
    """
    conditions = (*_nothing(marker + b"\0", range_end(marker)), *_no_value(marker))
    return Transaction(conditions, (Delete(marker), *_stay(parent, marker)))


def move_file(
    source: bytes,
    mod_revision: int,
    target: bytes,
    put: Put,
    *,
    parent: bytes | None,
    replace: bool,
    is_value: bool,
) -> Transaction:
    """Move a file's value to another key.

    If it fails: a page of the source with its value, one of the target, one of what is below
    the target.

    Args:
        source: The file's key.
        mod_revision: The version whose value `put` carries.
        target: The new key.
        put: What is written there.
        parent: Prefix of the source's directory if it loses an entry and needs a marker.
        replace: Whether an existing target may be replaced (else RENAME_NOREPLACE).
        is_value: Whether there may be keys below the target (`has_keys_below`).
    """
    below = target + b"/"
    conditions: tuple[Compare, ...] = (unchanged(source, mod_revision),)
    if not is_value:
        conditions += _nothing_below(below)
    if not replace:
        conditions += (absent(target),)
    return Transaction(
        conditions,
        (*put_and_read(put), Delete(source), *_stay(parent, source)),
        (
            Get(source),
            Get(target, keys_only=True),
            Get(below, range_end(below), limit=1, keys_only=True),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewriting:
    """Many keys that change at once.

    Attributes:
        before: The keys that were read, as they were found; all must still be so.
        after: What is put; the keys of `before` that are not in it are deleted.
        ranges: Ranges that are deleted as a whole, which spares a deletion for each key. Nothing
            in them is put.
    """

    before: Mapping[bytes, KeyValue]
    after: Mapping[bytes, Put]
    ranges: tuple[tuple[bytes, bytes], ...] = ()

    def is_possible(self) -> bool:
        """Tell whether one transaction has room for so many keys."""
        return max(len(self.before), len(self._changes())) <= MAX_KEYS

    def transaction(self, guards: Sequence[Compare], also: Sequence[Operation] = ()) -> Transaction:
        """Return it as one transaction.

        Args:
            guards: Further conditions, on what was not there; at most 20.
            also: Further operations, the last ones.
        """
        checks = [unchanged(key, found.mod_revision) for key, found in self.before.items()]
        ranges = tuple(Delete(start, end) for start, end in self.ranges)
        return Transaction(tuple(guards), (*ranges, *_tree(checks, self._changes()), *also))

    def events(self, revision: Revision) -> tuple[Event, ...]:
        """Return what it did, as the watch would tell it."""
        gone = (Tombstone(key, revision) for key in self.before if key not in self.after)
        return (*gone, *(self._event(put, revision) for put in self.after.values()))

    def _event(self, put: Put, revision: Revision) -> KeyValue:
        old = self.before.get(put.key)
        made = revision if old is None else old.create_revision
        version = 1 if old is None else old.version + 1
        return KeyValue(put.key, put.value, made, revision, version, put.lease)

    def _changes(self) -> list[Operation]:
        gone = (key for key in self.before if key not in self.after)
        deletes = (Delete(key) for key in gone if not any(s <= key < e for s, e in self.ranges))
        return [*self.after.values(), *deletes]


def _tree(checks: Sequence[Compare], changes: Sequence[Operation]) -> tuple[Operation, ...]:
    """Spread conditions and operations over inner transactions; at most one is returned."""
    level: list[Operation] = [
        Transaction(
            tuple(checks[start : start + WIDTH]),
            tuple(changes[start : start + WIDTH]),
            tuple(Abort(check.key) for check in checks[start : start + 1]),
        )
        for start in range(0, max(len(checks), len(changes)), WIDTH)
    ]
    while len(level) > 1:
        level = [
            Transaction((), tuple(level[start : start + WIDTH]))
            for start in range(0, len(level), WIDTH)
        ]
    return tuple(level)


def unmoved(prefix: bytes, revision: int) -> Compare:
    """Return the condition that nothing below a prefix was put after a revision."""
    return Compare(prefix, "mod_revision", "<", revision + 1, range_end(prefix))


def stay_without(parent: bytes | None, prefix: bytes) -> tuple[Transaction, ...]:
    """Return what keeps a directory that loses all below `prefix`, its directory's value too."""
    if parent is None:
        return ()
    # The names that come between `a` and `a/` in etcd's order are others: `a-b`, `a.conf`.
    own = prefix[:-1]
    before = _nothing(parent, own)
    if own.endswith(b"/"):  # the name is empty: what would be its value is the parent's marker
        before = (absent(parent),)
    after = _nothing(range_end(prefix), range_end(parent))
    return (_keep(parent, (*before, *_nothing(own + b"\0", prefix), *after)),)


def _nothing_below(prefix: bytes) -> tuple[Compare, ...]:
    """Return the conditions that no key begins with a prefix, record keys aside."""
    return _nothing(prefix, range_end(prefix))


def _nothing(start: bytes, end: bytes) -> tuple[Compare, ...]:
    return tuple(absent(first, last) for first, last in shown_ranges(start, end))


def _no_value(marker: bytes) -> tuple[Compare, ...]:
    """Return the condition that a directory has no `%value`; no empty name can have one."""
    own = marker[:-1]
    return () if not own or own.endswith(b"/") else (absent(own),)


def _stay(parent: bytes | None, leaving: bytes) -> tuple[Operation, ...]:
    if parent is None:
        return ()
    others = (*_nothing(parent, leaving), *_nothing(leaving + b"\0", range_end(parent)))
    return (_keep(parent, others),)


def _keep(parent: bytes, alone: tuple[Compare, ...]) -> Transaction:
    return Transaction(alone, put_and_read(Put(parent, b"")))


def write_record(key: bytes, record: Record, known: int) -> tuple[Operation, ...]:
    """Return what makes a record that of a key.

    Args:
        key: The key it belongs to.
        record: What to write; one that says nothing is deleted.
        known: The mod_revision of the record key, 0 if there is none.
    """
    stored_record = record_key(key)
    if record:
        return put_and_read(Put(stored_record, encode(record)))
    return drop_record(key, known)


def drop_record(key: bytes, known: int) -> tuple[Operation, ...]:
    """Return what deletes the record of a key, if there is one; arguments as above."""
    return (Delete(record_key(key)),) if known else ()


def records_written(operations: Iterable[Operation]) -> Iterator[tuple[bytes, bytes | None]]:
    """Yield each record key that operations may write, and its value; None: it is deleted."""
    for operation in operations:
        if isinstance(operation, Transaction):
            yield from records_written(operation.then)
        elif isinstance(operation, Put | Delete) and is_record_key(operation.key):
            yield operation.key, operation.value if isinstance(operation, Put) else None


def same_record(key: bytes, known: int, create_revision: int) -> tuple[Compare, ...]:
    """Return the conditions that the record of a key is the one that is known.

    Args:
        key: The key it belongs to.
        known: The mod_revision of the record key; 0 if the key has no record, or a void one.
        create_revision: That of the key; 0 if it is not there, and its record void in any case.
    """
    if known:
        return (unchanged(record_key(key), known),)
    if create_revision:
        return (Compare(record_key(key), "mod_revision", "<", create_revision),)
    return ()


def change_record(
    key: bytes, record: Record, *, create_revision: int, known: int, is_root: bool = False
) -> Transaction:
    """Write the record of a key that is there; a directory without a marker gets one.

    If it fails: a page of the key, one of its record key.

    Args:
        key: The key, or the marker of a directory.
        record: What to write.
        create_revision: That of the key; 0 for a directory without a marker.
        known: As for `same_record`.
        is_root: Whether it is the root of the mount, which is there whatever is below it.
    """
    conditions = (
        Compare(key, "create_revision", "==", create_revision),
        *same_record(key, known, create_revision),
    )
    operations = write_record(key, record, known)
    if not create_revision:
        # Something is below it, or it is no directory: a range without keys compares as 0.
        if not is_root:
            conditions += (Compare(key, "create_revision", ">", 0, range_end(key)),)
        operations = (*put_and_read(Put(key, b"")), *operations)
    # The value of a marker is mostly empty, and needed by whoever takes it over.
    own = Get(key, keys_only=not key.endswith(b"/"))
    return Transaction(conditions, operations, (own, Get(record_key(key))))
