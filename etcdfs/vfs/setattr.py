"""Attributes that last: chmod, chown, utimens and user.* xattrs, as transactions on record keys.

Knows: when a change of attributes goes to etcd and when it can only be remembered, and how it
survives a race. Does not know: FUSE, names, how records are written.

A change is one transaction, on condition that the key is the one that is meant and that nobody
else has changed its attributes meanwhile; else it is made again, on top of theirs.

Not everything has a key to keep attributes with: a file that is not written back yet (they go along
with its first put), an old version that is still open, the root of the whole keyspace. And etcd's
roles, or `--no-attrs`, may forbid it. Then times are remembered until the mount ends, because
tools that copy files give up without; a mode or an owner is refused (EPERM), because it would
protect nothing. Roles are asked each time: they change.

Concurrency: trio thread. What was read before an `await` is a condition of the transaction.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, final

from etcdfs.errors import (
    AttributesFullError,
    ExistsError,
    NoAttributeError,
    NotFoundError,
    NotPermittedError,
    NotSupportedError,
    StaleError,
)
from etcdfs.files.handles import Handles
from etcdfs.files.put_attributes import commit_with
from etcdfs.files.write_buffer import WriteBuffer
from etcdfs.keyspace.attribute_records import (
    XATTR_LIST_MAX,
    Record,
    clamped,
    encode,
    xattr_list_size,
)
from etcdfs.keyspace.keys import MARKER_NAME
from etcdfs.keyspace.store import Committed, Store
from etcdfs.keyspace.transaction_results import events_of
from etcdfs.keyspace.transactions import change_record
from etcdfs.tree.inodes import NOT_IN_ETCD, Dentry, Directory, File, Node, StoredRecord
from etcdfs.tree.node_attributes import (
    holds,
    is_mtime_true,
    key_state_of_node,
    record_of,
    stored_record_of,
)
from etcdfs.tree.tree import Tree
from etcdfs.tree.view import View
from etcdfs.vfs.attributes import Change, Defaults

MAX_RETRIES: Final = 16
"""Lost races before a change gives up; each loss means that somebody changed the attributes."""

MAX_RECORD_SIZE: Final = 256 * 1024
"""Bytes of a record. Each change writes all of it, and every mount keeps it in memory."""

TICK_NS: Final = 10_000_000
"""How far behind the kernel's coarse clock may be, which stamps calls (CONFIG_HZ=100).

With UTIME_NOW, Linux sends the time of the call; without the fast path it is not passed on that it
is that, nor is it always a tick (multigrain timestamps, Linux 6.13). So what lies between the last write and this
moment counts as now, however long the request took to reach us. A program that sets such a time
itself gets it, too, but only as long as this mount shows it: it is not kept in etcd.
"""

Edit = Callable[[Node], Record]
"""What a node's record becomes, from what it is at that moment."""


@final
class Setattr:
    """Changes the attributes of nodes."""

    def __init__(self, store: Store, view: View, files: Handles, defaults: Defaults) -> None:
        # --- dependencies
        self._store = store
        self._view = view
        self._files = files
        self._defaults = defaults

    @property
    def _tree(self) -> Tree:
        return self._view.update.tree

    def owner(self, node: Node) -> int:
        """Return who owns a node, as far as that is known."""
        return self._defaults.permissions(node)[1]

    # --- mode, owner, times -----------------------------------------------------------------

    async def change(self, node: Node, change: Change) -> None:
        """Change mode, owner or times.

        Raises:
            NotPermittedError: A mode or an owner cannot be kept.
            StaleError: Another client has replaced the file meanwhile.
        """
        change = _clamped(change)
        if isinstance(node, File) and await self._set_times(node, change):
            change = replace(change, mtime_ns=None, atime_ns=None)
        if change == Change(size=change.size, is_now=change.is_now):
            return

        def edit(node: Node) -> Record:
            return self._defaults.changed(node, change, mtime_holds=is_mtime_true(node))

        if await self._keep(node, edit):
            node.ctime_ns = max(self._tree.clock(), node.ctime_ns + 1)
        else:
            self._remember(node, change)

    async def _set_times(self, file: File, change: Change) -> bool:
        """Set the times of writes that are still to be written back; False if there are none.

        "Now" is what they have anyway: `touch` of a new file keeps nothing in etcd but the file.
        """
        if change.mtime_ns is None:
            return False
        async with self._files.locks.settled(file):
            buffer = file.buffer
            if not isinstance(buffer, WriteBuffer) or not buffer.is_dirty:
                return False
            now_ns = self._tree.clock()
            since_ns = min(buffer.changed_ns, now_ns) - TICK_NS
            times = (change.mtime_ns, change.atime_ns)
            is_now = change.is_now
            if is_now is None:
                is_now = all(since_ns <= t_ns <= now_ns for t_ns in times if t_ns is not None)
            self._files.set_times(file, change.mtime_ns, change.atime_ns, keep=not is_now)
            file.ctime_ns = max(self._tree.clock(), file.ctime_ns + 1)
            return True

    def _remember(self, node: Node, change: Change) -> None:
        """Change what has no key to keep it with, for as long as the mount lasts."""
        known = mode, uid, gid = self._defaults.permissions(node)
        wanted = (
            mode if change.mode is None else mode & ~0o7777 | change.mode & 0o7777,
            uid if change.uid is None else change.uid,
            gid if change.gid is None else change.gid,
        )
        if node.directory is not None or node is self._tree.root:
            is_new = isinstance(node, File) and node.key_state is None and self._tree.attributes
            if not is_new and wanted != known:
                msg = f"inode {node.inode}: nothing but its times can be changed here"
                raise NotPermittedError(msg)
        record = self._defaults.changed(node, change, mtime_holds=is_mtime_true(node))
        self._set(node, record)
        if change.mtime_ns is not None:
            node.mtime_ns = change.mtime_ns

    def _set(self, node: Node, record: Record) -> None:
        node.stored_record = StoredRecord(record, NOT_IN_ETCD) if record else None
        node.ctime_ns = max(self._tree.clock(), node.ctime_ns + 1)

    # --- extended attributes ----------------------------------------------------------------

    def xattrs(self, node: Node) -> Mapping[bytes, bytes]:
        """Return the user.* attributes of a node."""
        return record_of(node).xattrs

    async def set_xattr(
        self, node: Node, name: bytes, value: bytes, *, is_there: bool | None = None
    ) -> None:
        """Set a user.* attribute, if there is one (`is_there`), is none, or in either case.

        Raises:
            AttributesFullError: It does not fit beside the others.
            ExistsError: There is one.
            NoAttributeError: There is none.
            NotSupportedError: It cannot be kept.
        """

        def edit(node: Node) -> Record:
            record = self._current(node)
            if is_there is not None and is_there != (name in record.xattrs):
                raise no_attribute(name) if is_there else there_already(name)
            found = {**record.xattrs, name: value}
            record = replace(record, xattrs=found)
            names_size = sum(map(xattr_list_size, found))
            if names_size > XATTR_LIST_MAX or len(encode(record)) > MAX_RECORD_SIZE:
                msg = f"{len(value)} bytes as {name!r} do not fit beside the other attributes"
                raise AttributesFullError(msg)
            return record

        await self._keep_xattrs(node, edit, claims=is_there is False)

    async def remove_xattr(self, node: Node, name: bytes) -> None:
        """Remove a user.* attribute.

        Raises:
            NoAttributeError: There is none of that name.
            NotSupportedError: It cannot be kept.
        """

        def edit(node: Node) -> Record:
            record = self._current(node)
            if name not in record.xattrs:
                raise no_attribute(name)
            found = {each: value for each, value in record.xattrs.items() if each != name}
            return replace(record, xattrs=found)

        await self._keep_xattrs(node, edit)

    async def _keep_xattrs(self, node: Node, edit: Edit, *, claims: bool = False) -> None:
        if await self._keep(node, edit, claims=claims):
            return
        is_unpublished = isinstance(node, File) and node.key_state is None
        if not self._tree.attributes or not (is_unpublished or node.directory is None):
            msg = f"inode {node.inode} has nowhere to keep attributes"
            raise NotSupportedError(msg)
        self._set(node, edit(node))

    def _current(self, node: Node) -> Record:
        record = record_of(node)
        return record if is_mtime_true(node) else record.without_mtime()

    # --- in etcd ----------------------------------------------------------------------------

    async def _keep(self, node: Node, edit: Edit, *, claims: bool = False) -> bool:
        """Bring a change to etcd; False if there is no key to keep it with, or roles forbid it.

        Of one that `claims`, one of many clients that make the same may succeed.

        Raises:
            StaleError: The key was made anew by another client, or races were lost.
            NotFoundError: It was deleted.
        """
        if isinstance(node, Directory):
            # The kernel holds the directory's own lock.
            with self._view.holding((Dentry(node.inode, b""),)):
                return await self._keep_settled(node, edit, claims=claims)
        return await self._keep_settled(node, edit, claims=claims)

    async def _keep_settled(self, node: Node, edit: Edit, *, claims: bool) -> bool:
        async with self._files.locks.settled(node):
            return await self._keep_still(node, edit, claims=claims)

    async def _keep_still(self, node: Node, edit: Edit, *, claims: bool) -> bool:
        for _ in range(MAX_RETRIES):
            key = self._key_of(node)
            if key is None:
                return False
            record = edit(node)
            # A time that is set again holds from now on: what is in a directory may have changed.
            if record == record_of(node) and (record.mtime_ns is None or is_mtime_true(node)):
                return True
            key_state = key_state_of_node(node)
            wanted = change_record(
                key,
                record,
                create_revision=0 if key_state is None else key_state.create_revision,
                known=0
                if node.stored_record is None
                else node.stored_record.key_state.mod_revision,
                is_root=node is self._tree.root,
            )
            wanted = replace(wanted, claims=claims)
            with self._view.update.writing_records(wanted.then):
                committed = await commit_with(self._store, self._tree.rights, wanted, None)
                if committed is None:
                    return False
                if committed.succeeded:
                    await self._view.wait_until_visible(committed.revision, events_of(committed))
                    return True
            # checkpoint: the view may have changed the node, or taken it away
            await self._catch_up(node, key, committed)
        msg = f"the attributes of inode {node.inode} changed {MAX_RETRIES} times meanwhile"
        raise StaleError(msg)

    async def _catch_up(self, node: Node, key: bytes, committed: Committed) -> None:
        """Take over what another client has made of the attributes."""
        own = [entry for entry in committed.entries if entry.key == key]
        stored_records = [entry for entry in committed.entries if entry.key != key]
        known = key_state_of_node(node)
        is_made_anew = known is not None and (
            not own or own[0].create_revision != known.create_revision
        )
        if isinstance(node, File) and node.handles and is_made_anew:
            await self._lose_name(node)
            return
        if not own and isinstance(node, File):
            msg = f"{key!r} was deleted by another client"
            raise NotFoundError(msg)
        if is_made_anew:
            msg = f"{key!r} was made anew by another client"
            raise StaleError(msg)
        events = [*own, *stored_records] if isinstance(node, Directory) else [*stored_records]
        if events:
            await self._view.wait_until_visible(max(e.mod_revision for e in events), events)
        stored_record = stored_record_of(stored_records[0]) if stored_records else None
        node.stored_record = (
            stored_record if holds(stored_record, key_state_of_node(node)) else None
        )

    async def _lose_name(self, file: File) -> None:
        """Let an open file go on without its name, which another client has taken."""
        if file.directory is not None:
            entry = Dentry(file.directory.inode, file.name)
            stale = self._view.update.withdraw(file.directory, file.name, gone=True)
            # The watch will find nothing left to tell the kernel of.
            await self._view.invalidate_first({entry, *stale})

    def _key_of(self, node: Node) -> bytes | None:
        """Return the key whose attributes are those of a node, None if it has none."""
        if not self._tree.attributes or not self._tree.is_attached(node):
            return None
        if isinstance(node, File) and (node.key_state is None or node.name == MARKER_NAME):
            return None
        return self._tree.own_key(node) or None  # the root of the whole keyspace has an empty one


def _clamped(change: Change) -> Change:
    """Return a change whose times can be kept."""
    mtime_ns, atime_ns = change.mtime_ns, change.atime_ns
    return replace(
        change,
        mtime_ns=None if mtime_ns is None else clamped(mtime_ns),
        atime_ns=None if atime_ns is None else clamped(atime_ns),
    )


def no_attribute(name: bytes) -> NoAttributeError:
    """Return the error for a missing extended attribute."""
    return NoAttributeError(f"there is no attribute {name!r}")


def there_already(name: bytes) -> ExistsError:
    """Return the error for an extended attribute that is not to be there."""
    return ExistsError(f"there is an attribute {name!r} already")
