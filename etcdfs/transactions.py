"""The one etcd transaction behind each change of a name.

What this room knows: which conditions make create, mkdir, unlink, rmdir and rename atomic across
the cluster, and how a directory that loses its last entry stays. What it must not know: the tree,
inodes, who asks.

A directory is there while its marker or any key below it is. Removing its last entry through the
mount must leave it (DESIGN.md section 3), so each removal carries an inner transaction: *if
nothing else is below the parent, put the parent's marker*. Inner conditions are judged on the
state before the removal, so "nothing else" is spelled as two empty ranges beside the key.

Concurrency: none; pure functions.
"""

from etcdfs.store import (
    Compare,
    Delete,
    Get,
    Operation,
    Put,
    Transaction,
    absent,
    exists,
    range_end,
    unchanged,
)


def parent_prefix(key: bytes, root: bytes) -> bytes | None:
    """Return the prefix of the directory that a key or marker is in, None for the root's."""
    inner = key.removesuffix(b"/")
    prefix = inner[: inner.rfind(b"/") + 1]
    return prefix if len(prefix) > len(root) else None


def make_file(key: bytes, value: bytes = b"", *, is_value: bool) -> Transaction:
    """Claim a name for a new file; fails if it is a file or a directory.

    Args:
        key: The file's key.
        value: What it holds.
        is_value: Whether it is the `%value` of a directory, which has keys below it.
    """
    conditions: tuple[Compare, ...] = (absent(key),)
    if not is_value:
        conditions += (absent(key + b"/", range_end(key + b"/")),)
    return Transaction(
        conditions,
        (Put(key, value), Get(key, keys_only=True)),
    )


def make_directory(key: bytes) -> Transaction:
    """Put the marker of the directory `key`; fails if the name is a file or a directory."""
    marker = key + b"/"
    return Transaction(
        (absent(key), absent(marker, range_end(marker))),
        (Put(marker, b""), Get(marker, keys_only=True)),
    )


def remove_file(key: bytes, parent: bytes | None, *, is_value: bool) -> Transaction:
    """Delete a file's key. If it fails: a page of the key, then a page of what is below it.

    Args:
        key: The file's key.
        parent: Prefix of its directory; None if that needs no marker to stay.
        is_value: Whether it is the `%value` of a directory, which may well have keys below it.
    """
    below = key + b"/"
    conditions: tuple[Compare, ...] = (exists(key),)
    if not is_value:
        conditions += (absent(below, range_end(below)),)
    return Transaction(
        conditions,
        (Delete(key), *_stay(parent, key)),
        (Get(key, keys_only=True), Get(below, range_end(below), limit=1, keys_only=True)),
    )


def clear_marker(marker: bytes) -> Transaction:
    """Empty the value of a directory's marker: what unlinking `%marker` means."""
    return Transaction((exists(marker),), (Put(marker, b""), Get(marker, keys_only=True)))


def remove_directory(marker: bytes, parent: bytes | None) -> Transaction:
    """Delete a directory's marker if nothing else is there.

    The key of the directory's own name (its `%value`) counts as an entry.
    """
    own = marker[:-1]
    conditions: tuple[Compare, ...] = (absent(marker + b"\0", range_end(marker)),)
    if own and not own.endswith(b"/"):  # else the name is empty, and that key another's marker
        conditions += (absent(own),)
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
        is_value: Whether the target is a `%value`, which may have keys below it.
    """
    below = target + b"/"
    conditions: tuple[Compare, ...] = (unchanged(source, mod_revision),)
    if not is_value:
        conditions += (absent(below, range_end(below)),)
    if not replace:
        conditions += (absent(target),)
    return Transaction(
        conditions,
        (put, Get(target, keys_only=True), Delete(source), *_stay(parent, source)),
        (
            Get(source),
            Get(target, keys_only=True),
            Get(below, range_end(below), limit=1, keys_only=True),
        ),
    )


def _stay(parent: bytes | None, leaving: bytes) -> tuple[Operation, ...]:
    if parent is None:
        return ()
    alone = (absent(parent, leaving), absent(leaving + b"\0", range_end(parent)))
    return (Transaction(alone, (Put(parent, b""), Get(parent, keys_only=True))),)
