"""The etcd operations that write side keys.

What this room knows: which conditions and operations keep the attributes of a key true across the
cluster. What it must not know: the tree, inodes, what attributes mean.

Concurrency: none; pure functions.
"""

from etcdfs.sidekeys import Record, encode, side_key
from etcdfs.store import (
    Compare,
    Delete,
    Get,
    Operation,
    Put,
    Transaction,
    range_end,
    unchanged,
)


def write_record(key: bytes, record: Record, known: int) -> tuple[Operation, ...]:
    """Return what makes a record that of a key.

    Args:
        key: The key it belongs to.
        record: What to write; one that says nothing is deleted.
        known: The mod_revision of the side key, 0 if there is none.
    """
    side = side_key(key)
    if record:
        return (Put(side, encode(record)), Get(side, keys_only=True))
    return drop_record(key, known)


def drop_record(key: bytes, known: int) -> tuple[Operation, ...]:
    """Return what deletes the record of a key, if there is one; arguments as above."""
    return (Delete(side_key(key)),) if known else ()


def same_record(key: bytes, known: int, create_revision: int) -> tuple[Compare, ...]:
    """Return the conditions that the record of a key is the one that is known.

    Args:
        key: The key it belongs to.
        known: The mod_revision of the side key; 0 if the key has no record, or a void one.
        create_revision: That of the key; 0 if it is not there, and its record void in any case.
    """
    if known:
        return (unchanged(side_key(key), known),)
    if create_revision:
        return (Compare(side_key(key), "mod_revision", "<", create_revision),)
    return ()


def change_record(
    key: bytes, record: Record, *, create_revision: int, known: int, is_root: bool = False
) -> Transaction:
    """Write the record of a key that is there; a directory without a marker gets one.

    If it fails: a page of the key, one of its side key.

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
        operations = (Put(key, b""), Get(key, keys_only=True), *operations)
    # The value of a marker is mostly empty, and needed by whoever takes it over.
    own = Get(key, keys_only=not key.endswith(b"/"))
    return Transaction(conditions, operations, (own, Get(side_key(key))))
