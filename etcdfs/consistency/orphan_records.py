"""Void side keys, deleted.

What this room knows: which side keys say nothing any more, and how they are deleted without
taking away one that does. What it must not know: when that is done (the auditor's).

A client that knows of no side keys leaves one behind when it deletes a file, and so does a lease
that expires. It is void (`sidekeys`), but it takes space, in etcd and in every mirror. Each is
deleted on condition that the side key is the version that is known, and that its key is not
there, or younger. Whoever makes the key anew with attributes writes the side key in the same
transaction: it is another version then, and stays.

Concurrency: trio thread; what was read before an `await` is a condition of the transaction.
"""

import logging
from typing import Final, final

import trio

from etcdfs.errors import StoreError
from etcdfs.keyspace.attribute_records import side_key
from etcdfs.keyspace.store import Compare, Delete, Store, Transaction, absent, unchanged
from etcdfs.keyspace.transactions import WIDTH
from etcdfs.tree.node_attributes import holds
from etcdfs.tree.tree import Side, Tree

log = logging.getLogger(__name__)

SLICE: Final = 100
"""Side keys looked at at a time; well below a millisecond."""


@final
class Sweeper:
    """Sweeps out what one mirror sees of void side keys."""

    def __init__(self, store: Store, tree: Tree) -> None:
        # --- dependencies
        self._store = store
        self._tree = tree
        # --- mutable state
        self.swept = 0

    async def sweep(self) -> None:
        """Delete the side keys that are void by now; leave the rest to the next time on failure."""
        sides = list(self._tree.sides.items())
        for first in range(0, len(sides), SLICE):
            void = [pair for pair in sides[first : first + SLICE] if self._is_void(*pair)]
            for start in range(0, len(void), WIDTH):
                try:
                    await self._delete(dict(void[start : start + WIDTH]))
                except StoreError as exc:
                    log.debug("void side keys could not be deleted: %s", exc)
                    return
            await trio.lowlevel.checkpoint()

    def _is_void(self, key: bytes, side: Side) -> bool:
        found = self._tree.find(key)
        return not holds(side, None if found is None else found[1])

    async def _delete(self, void: dict[bytes, Side]) -> None:
        # checkpoint: any of these keys may be there by now; etcd decides
        parts = tuple(self._deletion(key, side.facts.mod_revision) for key, side in void.items())
        committed = await self._store.commit(Transaction((), parts))
        self.swept += sum(getattr(result, "succeeded", False) for result in committed.results)

    def _deletion(self, key: bytes, mod_revision: int) -> Transaction:
        found = self._tree.find(key)
        younger = Compare(key, "create_revision", ">", mod_revision)
        conditions = (
            unchanged(side_key(key), mod_revision),
            absent(key) if found is None else younger,
        )
        return Transaction(conditions, (Delete(side_key(key)),))
