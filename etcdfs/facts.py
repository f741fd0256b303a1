"""What etcd says of a key, without its value, and the attributes a key has of its own.

What this room knows: the form of both. What it must not know: nodes, which of them it is about.

Concurrency: none; frozen values.
"""

from typing import Final, NamedTuple

from etcdfs.sidekeys import Record
from etcdfs.store import KeyValue, Revision


class Facts(NamedTuple):  # as `KeyValue`: one per key
    """What etcd says of a key, without its value. `size` in bytes."""

    create_revision: Revision
    mod_revision: Revision
    version: int
    lease: int
    size: int


def facts_of(entry: KeyValue) -> Facts:
    """Return the facts of a key that was read with its value."""
    return Facts(
        entry.create_revision, entry.mod_revision, entry.version, entry.lease, len(entry.value)
    )


class Side(NamedTuple):
    """Attributes of a key's own, and what etcd says of the side key that has them."""

    record: Record
    facts: Facts


NOT_IN_ETCD: Final = Facts(Revision(0), Revision(0), 0, 0, 0)  # not yet, or no longer
