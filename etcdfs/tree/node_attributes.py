"""Which attributes hold for which node.

What this room knows: how the records in side keys and the nodes of a tree come together, and until
when a record holds. What it must not know: what the attributes mean, how they change.

A record holds for a node if it was written for the key that is there now, and not for an earlier
one of the same name. The mtime in it holds for one version of the key only; that of a directory
until something in it is made or removed, as far as this mount can know.

Concurrency: synchronous; used on the trio thread only.
"""

from collections.abc import Iterator

from etcdfs.keyspace.attribute_records import Record, Type, is_side_key, owner_of, read, side_key
from etcdfs.keyspace.store import KeyValue
from etcdfs.tree.tree import Directory, Facts, File, Node, Side, Tree, facts_of

NOTHING = Record()


def side_of(entry: KeyValue) -> Side:
    """Return what is in a side key."""
    return Side(read(entry), facts_of(entry))


def record_of(node: Node) -> Record:
    """Return the attributes a node has of its own."""
    return NOTHING if node.side is None else node.side.record


def facts_of_node(node: Node) -> Facts | None:
    """Return what etcd says of the key that a node's attributes belong to; None without one."""
    return node.marker if isinstance(node, Directory) else node.facts


def holds(side: Side | None, facts: Facts | None) -> bool:
    """Tell whether a record belongs to the key with these facts."""
    return (
        side is not None and facts is not None and side.facts.mod_revision >= facts.create_revision
    )


def is_mtime_true(node: Node) -> bool:
    """Tell whether the mtime in a node's record still is that of the node."""
    mtime_ns = record_of(node).mtime_ns
    if isinstance(node, Directory):
        return mtime_ns == node.mtime_ns
    return mtime_ns is not None and (
        node.facts is None or record_of(node).mtime_at(node.facts.mod_revision) is not None
    )


def type_of(side: Side | None) -> Type | None:
    """Return what a node is, if not a file or a directory."""
    return None if side is None else side.record.type


def is_news(side: Side | None, node: Node, facts: Facts | None) -> bool:
    """Tell whether `put_on` would change anything once the node has these facts."""
    if side is None or node.side is None:
        return side is not node.side
    if side != node.side:
        return True
    # The same record can come before the version of the key that its time was set for.
    return isinstance(node, File) and facts is not None and _sets_time(side, node, facts)


def put_on(node: Node, side: Side | None) -> None:
    """Give a node the attributes that hold for it, the mtime among them."""
    known = node.side is not None and side is not None and node.side.facts == side.facts
    node.side = side
    facts = facts_of_node(node)
    if side is None or facts is None or (known and isinstance(node, Directory)):
        return  # what is in a directory may have changed since its time was set
    mtime_ns = side.record.mtime_at(facts.mod_revision)
    if mtime_ns is not None:
        node.mtime_ns = mtime_ns


def _sets_time(side: Side, file: File, facts: Facts) -> bool:
    return side.record.mtime_at(facts.mod_revision) not in (None, file.mtime_ns)


def dress(tree: Tree) -> None:
    """Give the nodes of a new tree their attributes; nobody is told."""
    for key, side in tree.sides.items():
        found = tree.find(key)
        if found is not None and holds(side, found[1]):
            node = found[0]
            mtime_ns = node.mtime_ns
            put_on(node, side)
            if isinstance(node, Directory) and _has_newer(node, side):
                node.mtime_ns = mtime_ns


def is_foreign(tree: Tree, key: bytes) -> bool:
    """Tell whether a key is a side key that says nothing of what this tree shows."""
    return is_side_key(key) and not (tree.attributes and owner_of(key) in tree.keyspace)


def find_facts(tree: Tree, key: bytes) -> tuple[object, Facts] | None:
    """Return who stands for a key, a side key or any other, and what is known of it."""
    if not is_side_key(key):
        return tree.find(key)
    side = tree.sides.get(owner_of(key))
    return None if side is None else (side, side.facts)


def side_facts(tree: Tree) -> Iterator[tuple[bytes, Facts]]:
    """Iterate over the side keys that come with the others, and what is known of each."""
    if tree.keyspace.holds_sides:
        for key, side in tree.sides.items():
            yield side_key(key), side.facts


def _has_newer(directory: Directory, side: Side) -> bool:
    """Say whether something was made in a directory after its time was set."""
    return any(
        isinstance(child, File)
        and child.facts is not None
        and child.facts.create_revision > side.facts.mod_revision
        for child in directory.children.values()
    )
