"""Keys that expire: a file's lease, as `user.etcd.ttl` shows and sets it.

Knows: how a key is given a lease, and loses it, without its value being touched. Does not know:
names of attributes, FUSE.

A lease that is made here is for one key, so that the key does not go with others. It has a number
that says who made it: once its key has another lease, or none, or is gone, whichever mount did
that ends it, if nobody else has put a key on it. Another client's lease is never revoked: it may
be for keys that are still to come.

Concurrency: trio thread; a file's publications are held off meanwhile.
"""

import random
from contextlib import suppress
from dataclasses import replace
from typing import Final, final

from etcdfs.errors import (
    LeaseExistsError,
    NotFoundError,
    OutcomeUnknownError,
    StaleError,
    StoreError,
)
from etcdfs.files.handles import Handles
from etcdfs.files.put_attributes import commit_with
from etcdfs.keyspace.store import Operation, Put, Store, Transaction, unchanged
from etcdfs.keyspace.transaction_results import events_of
from etcdfs.keyspace.transactions import put_and_read, same_record, write_record
from etcdfs.tree.changes import Intent
from etcdfs.tree.inodes import File, Node
from etcdfs.tree.node_attributes import record_of
from etcdfs.tree.view import View

OURS: Final = 0x65746366
"""The upper half of the numbers of our leases: "etcf"."""

NUMBER_BITS: Final = 32
GRANT_ATTEMPTS: Final = 3
"""Numbers tried, should they be taken, before etcd is asked for one; that lease is never ended."""


@final
class Leases:
    """The leases of files."""

    def __init__(self, store: Store, view: View, files: Handles) -> None:
        # --- dependencies
        self._store = store
        self._view = view
        self._files = files

    async def release(self, lease: int) -> None:
        """End a lease that a file had, if it is one of ours that holds nothing any more.

        It ends by itself, else: the change that took the key away is done, and stays.
        """
        if lease >> NUMBER_BITS == OURS:
            with suppress(StoreError):
                if not await self._store.lease_has_keys(lease):
                    await self._store.lease_revoke(lease)

    async def time_left(self, lease: int) -> int | None:
        """Return the seconds a lease has left; None without one, or once it has expired."""
        return await self._store.lease_time_to_live(lease) if lease else None

    async def attach(self, file: File, ttl_s: int) -> None:
        """Let a file expire after so many seconds.

        Raises:
            NotFoundError: It is not in etcd (any more).
        """
        lease = await self._grant(ttl_s)
        try:
            await self._put_again(file, lease)
        except OutcomeUnknownError:
            raise  # if it was done, revoking the lease would delete the file
        except BaseException:
            with suppress(StoreError):
                await self._store.lease_revoke(lease)
            raise

    async def detach(self, file: File) -> bool:
        """Let a file last again; False if it had no lease."""
        await self._view.revalidate_node(file)
        if file.key_state is None or not file.key_state.lease:
            return False
        await self._put_again(file, 0)
        return True

    async def _grant(self, ttl_s: int) -> int:
        for _ in range(GRANT_ATTEMPTS):
            number = random.getrandbits(NUMBER_BITS)
            with suppress(LeaseExistsError):
                return await self._store.lease_grant(ttl_s, OURS << NUMBER_BITS | number)
        return await self._store.lease_grant(ttl_s)

    async def _put_again(self, file: File, lease: int) -> None:
        """Put a file's value as it is, with another lease."""
        async with self._files.locks.settled(file):
            # checkpoint: another client may have written or deleted it
            key, key_state = self._view.update.tree.key_of(file), file.key_state
            if key is None or key_state is None or file.directory is None:
                msg = f"inode {file.inode} is no key"
                raise NotFoundError(msg)
            before = key_state.lease
            value = await self._view.value(file)
            bare = Transaction(
                (unchanged(key, key_state.mod_revision),),
                put_and_read(Put(key, value, lease)),
            )
            with_record = replace(bare, then=(*bare.then, *self._record(file, key)))
            rights = self._view.update.tree.rights
            with self._view.update.own(key, Intent(file=file, value=value)):
                committed = await commit_with(self._store, rights, with_record, bare)
                if not committed.succeeded:
                    msg = f"{key!r} was changed by another client"
                    raise StaleError(msg)
                await self._view.wait_until_visible(committed.revision, events_of(committed))
        await self.release(before)

    def _record(self, file: File, key: bytes) -> tuple[Operation, ...]:
        """Keep the time that was set for this version; it is the same content."""
        if (
            file.stored_record is None
            or file.key_state is None
            or not self._view.update.tree.attributes
        ):
            return ()
        record = record_of(file)
        if record.mtime_at(file.key_state.mod_revision) is None:
            return ()
        known = file.stored_record.key_state.mod_revision
        guard = same_record(key, known, file.key_state.create_revision)
        own = replace(record, mtime_revision=0)
        return (Transaction(guard, write_record(key, own, known)),)


def lease_of(node: Node | None) -> int:
    """Return the lease of a file's key; 0 without one."""
    return node.key_state.lease if isinstance(node, File) and node.key_state is not None else 0
