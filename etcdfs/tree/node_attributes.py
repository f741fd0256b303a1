"""Which attributes hold for which node.

Knows: how the records in record keys and the nodes of a tree come together, and until when a record
holds. Does not know: what the attributes mean, how they change.

A record holds for a node if it was written for the key that is there now, and not for an earlier
one of the same name. The mtime in it holds for one version of the key only; that of a directory
until something in it is made or removed, as far as this mount can know.

Concurrency: synchronous; used on the trio thread only.
"""

from collections.abc import Iterator

from etcdfs.keyspace.attribute_records import (
    Record,
    is_record_key,
    owner_of,
    read,
    record_key,
)
from etcdfs.keyspace.store import KeyValue
from etcdfs.tree.inodes import Directory, File, KeyState, Node, StoredRecord, key_state_of
from etcdfs.tree.tree import Tree

NOTHING = Record()


def stored_record_of(entry: KeyValue) -> StoredRecord:
    """Return what is in a record key."""
    return StoredRecord(read(entry), key_state_of(entry))


def record_of(node: Node) -> Record:
    """Return the attributes a node has of its own."""
    return NOTHING if node.stored_record is None else node.stored_record.record


def key_state_of_node(node: Node) -> KeyState | None:
    """Return what etcd says of the key that a node's attributes belong to; None without one."""
    return node.marker if isinstance(node, Directory) else node.key_state


def holds(stored_record: StoredRecord | None, key_state: KeyState | None) -> bool:
    """Tell whether a record belongs to the key with these key state."""
    return (
        stored_record is not None
        and key_state is not None
        and stored_record.key_state.mod_revision >= key_state.create_revision
    )


def is_mtime_true(node: Node) -> bool:
    """Tell whether the mtime in a node's record still is that of the node."""
    mtime_ns = record_of(node).mtime_ns
    if isinstance(node, Directory):
        return mtime_ns == node.mtime_ns
    return mtime_ns is not None and (
        node.key_state is None or record_of(node).mtime_at(node.key_state.mod_revision) is not None
    )


def is_news(stored_record: StoredRecord | None, node: Node, key_state: KeyState | None) -> bool:
    """Tell whether `bind` would change anything once the node has these key state."""
    if stored_record is None or node.stored_record is None:
        return stored_record is not node.stored_record
    if stored_record != node.stored_record:
        return True
    # The same record can come before the version of the key that its time was set for.
    return (
        isinstance(node, File)
        and key_state is not None
        and _sets_time(stored_record, node, key_state)
    )


def bind(node: Node, stored_record: StoredRecord | None) -> None:
    """Give a node the attributes that hold for it, the mtime among them."""
    known = (
        node.stored_record is not None
        and stored_record is not None
        and node.stored_record.key_state == stored_record.key_state
    )
    node.stored_record = stored_record
    key_state = key_state_of_node(node)
    if stored_record is None or key_state is None or (known and isinstance(node, Directory)):
        return  # what is in a directory may have changed since its time was set
    mtime_ns = stored_record.record.mtime_at(key_state.mod_revision)
    if mtime_ns is not None:
        node.mtime_ns = mtime_ns


def _sets_time(stored_record: StoredRecord, file: File, key_state: KeyState) -> bool:
    return stored_record.record.mtime_at(key_state.mod_revision) not in (None, file.mtime_ns)


def bind_all(tree: Tree) -> None:
    """Give the nodes of a new tree their attributes; nobody is told."""
    for key, stored_record in tree.stored_records.items():
        found = tree.find(key)
        if found is not None and holds(stored_record, found[1]):
            node = found[0]
            mtime_ns = node.mtime_ns
            bind(node, stored_record)
            if isinstance(node, Directory) and _has_newer(node, stored_record):
                node.mtime_ns = mtime_ns


def is_foreign(tree: Tree, key: bytes) -> bool:
    """Tell whether a key is a record key that says nothing of what this tree shows."""
    return is_record_key(key) and not (tree.attributes and owner_of(key) in tree.keyspace)


def find_key_state(tree: Tree, key: bytes) -> tuple[object, KeyState] | None:
    """Return who stands for a key, a record key or any other, and what is known of it."""
    if not is_record_key(key):
        return tree.find(key)
    stored_record = tree.stored_records.get(owner_of(key))
    return None if stored_record is None else (stored_record, stored_record.key_state)


def record_key_state(tree: Tree) -> Iterator[tuple[bytes, KeyState]]:
    """Iterate over the record keys that come with the others, and what is known of each."""
    if tree.keyspace.holds_records:
        for key, stored_record in tree.stored_records.items():
            yield record_key(key), stored_record.key_state


def _has_newer(directory: Directory, stored_record: StoredRecord) -> bool:
    """Say whether something was made in a directory after its time was set."""
    return any(
        isinstance(child, File)
        and child.key_state is not None
        and child.key_state.create_revision > stored_record.key_state.mod_revision
        for child in directory.children.values()
    )
