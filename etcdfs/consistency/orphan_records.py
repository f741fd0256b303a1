"""Void record keys, deleted.

Knows: which record keys say nothing any more, and how they are deleted without taking away one that
does. Does not know: when that is done (the auditor's).

A client that knows of no record keys leaves one behind when it deletes a file, and so does a lease
that expires. It is void (`attribute_records`), but it takes space, in etcd and in every mirror. Each is
deleted on condition that the record key is the version that is known, and that its key is not
there, or younger. Whoever makes the key anew with attributes writes the record key in the same
transaction: it is another version then, and stays.

Concurrency: trio thread; what was read before an `await` is a condition of the transaction.
"""

import logging
from typing import Final, final

import trio

from etcdfs.errors import StoreError
from etcdfs.keyspace.attribute_records import record_key
from etcdfs.keyspace.store import Compare, Delete, Store, Transaction, absent, unchanged
from etcdfs.keyspace.transactions import WIDTH
from etcdfs.tree.inodes import StoredRecord
from etcdfs.tree.node_attributes import holds
from etcdfs.tree.tree import Tree

log = logging.getLogger(__name__)

SLICE: Final = 100
"""Record keys looked at at a time; well below a millisecond."""


@final
class Sweeper:
    """Sweeps out what one mirror sees of void record keys."""

    def __init__(self, store: Store, tree: Tree) -> None:
        # --- dependencies
        self._store = store
        self._tree = tree
        # --- mutable state
        self.swept = 0

    async def sweep(self) -> None:
        """Delete the record keys that are void by now; leave the rest to the next time on failure."""
        stored_records = list(self._tree.stored_records.items())
        for first in range(0, len(stored_records), SLICE):
            void = [pair for pair in stored_records[first : first + SLICE] if self._is_void(*pair)]
            for start in range(0, len(void), WIDTH):
                try:
                    await self._delete(dict(void[start : start + WIDTH]))
                except StoreError as exc:
                    log.debug("void record keys could not be deleted: %s", exc)
                    return
            await trio.lowlevel.checkpoint()

    def _is_void(self, key: bytes, stored_record: StoredRecord) -> bool:
        found = self._tree.find(key)
        return not holds(stored_record, None if found is None else found[1])

    async def _delete(self, void: dict[bytes, StoredRecord]) -> None:
        # checkpoint: any of these keys may be there by now; etcd decides
        parts = tuple(
            self._deletion(key, stored_record.key_state.mod_revision)
            for key, stored_record in void.items()
        )
        committed = await self._store.commit(Transaction((), parts))
        self.swept += sum(committed[part].succeeded for part in parts)

    def _deletion(self, key: bytes, mod_revision: int) -> Transaction:
        found = self._tree.find(key)
        younger = Compare(key, "create_revision", ">", mod_revision)
        conditions = (
            unchanged(record_key(key), mod_revision),
            absent(key) if found is None else younger,
        )
        return Transaction(conditions, (Delete(record_key(key)),))
