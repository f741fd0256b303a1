"""The system calls, as one file system over one view of etcd.

Knows: what each call means for names, inodes and keys, and which errno says why not. Does not know:
FUSE, gRPC, how the tree is kept true.

Methods bear the names of the system calls, take inode numbers and `bytes`, and raise
`CallerError` or `StoreError`. Every inode handed out by `lookup`, `create`, `mkdir` and `mknod`
counts as one lookup; entries of a listing count when `remember` says that the kernel took them.

Concurrency: trio thread only. After every `await` the tree may have changed; what was found
before is looked up again (`# checkpoint`).
"""

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, final

from etcdfs.consistency.staleness import Liveness
from etcdfs.errors import (
    InvalidRequestError,
    IsADirectoryFileError,
    NameReservedError,
    NameTooLongError,
    NotFoundError,
    NotPermittedError,
    ReadOnlyError,
    StaleError,
    StoreError,
)
from etcdfs.files.handles import Handle, Handles, may_change
from etcdfs.files.open_directories import DirectoryHandle, ListingsByHash, OpenDirectories
from etcdfs.files.put_attributes import commit_with
from etcdfs.keyspace.attribute_records import Record, Type
from etcdfs.keyspace.keys import MARKER_NAME, NAME_MAX, VALUE_NAME, has_keys_below, is_part
from etcdfs.keyspace.store import Committed, Delete, Store, Transaction
from etcdfs.keyspace.transaction_results import events_of
from etcdfs.keyspace.transactions import (
    clear_marker,
    drop_record,
    make_directory,
    make_file,
    parent_prefix,
    remove_directory,
    remove_file,
    write_record,
)
from etcdfs.tree.changes import Intent
from etcdfs.tree.inodes import NOT_IN_ETCD, Dentry, Directory, File, Inode, Node, StoredRecord
from etcdfs.tree.node_attributes import record_of
from etcdfs.tree.tree import Tree
from etcdfs.tree.view import View
from etcdfs.vfs.attributes import BLOCK_SIZE, Attributes, Caller, Change, Defaults
from etcdfs.vfs.leases import Leases, lease_of
from etcdfs.vfs.namei import (
    Namei,
    Newcomers,
    check_length,
    file_in,
    is_a_file,
    missing,
    node_of,
    not_empty,
    parent_of,
    taken,
    within,
)
from etcdfs.vfs.rename import Rename
from etcdfs.vfs.rename_tree import MAX_RETRIES
from etcdfs.vfs.setattr import Setattr
from etcdfs.vfs.xattr import Xattrs

ASSUMED_QUOTA: Final = 2 * 1024**3  # etcd's default --quota-backend-bytes
ASSUMED_FREE_INODES: Final = 2**31
PATH_MAX: Final = 4096  # include/uapi/linux/limits.h; the NUL at the end included


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry of an open directory; `position` is where the listing goes on after it."""

    name: bytes
    node: Node
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceStatistics:
    """What statvfs(3) says; blocks of `BLOCK_SIZE` bytes."""

    blocks: int
    blocks_free: int
    files: int
    files_free: int
    name_max: int = NAME_MAX


@final
class Filesystem:
    """The calls on one mounted keyspace."""

    def __init__(
        self,
        store: Store,
        view: View,
        files: Handles,
        defaults: Defaults,
        liveness: Liveness,
        *,
        kernel_timeout_s: float,
        timeout_s: float,
        read_only: bool,
        statistics: Callable[[], Mapping[str, Any]],
        statistics_owner: int | None = None,
    ) -> None:
        # --- dependencies
        self._store = store
        self._view = view
        self._files = files
        self._defaults = defaults
        self._liveness = liveness
        self._newcomers = Newcomers(view.update.tree)
        self._namei = Namei(view, files.locks)
        self._leases = Leases(store, view, files)
        self._rename = Rename(store, view, files, self._namei, self._leases)
        self._setattr = Setattr(store, view, files, defaults)
        self.xattrs = Xattrs(
            view,
            self._leases,
            self._setattr,
            timeout_s=timeout_s,
            read_only=read_only,
            statistics=statistics,
            statistics_owner=statistics_owner,
        )
        # --- constants
        self._kernel_timeout_s = kernel_timeout_s
        self._read_only = read_only
        # --- mutable state
        self._open_directories = OpenDirectories()
        self._listings_by_hash = ListingsByHash()
        self._last_size = 0

    @property
    def _tree(self) -> Tree:
        return self._view.update.tree

    # --- looking ----------------------------------------------------------------------------

    async def lookup(self, parent: int, name: bytes) -> Attributes | None:
        """Find a name; None if there is none and the kernel may remember that.

        Raises:
            NotFoundError: There is none, and that must be asked again every time.
        """
        if name in _DOTS:
            return self._lookup_inode(parent, name)
        directory = self._tree.directory(parent)
        check_length(name)
        await self._view.revalidate_name(directory, name)
        node = directory.children.get(name)
        if node is not None:
            return self.hand_out(node)
        lifetime_ns = int(self._kernel_timeout_s * 1e9)
        if lifetime_ns and self._tree.tell_negative(directory, name, lifetime_ns):
            return None
        msg = f"no {name!r} in inode {parent}"
        raise NotFoundError(msg)

    def _lookup_inode(self, inode: int, name: bytes) -> Attributes:
        """Find the inode itself (`.`) or its parent (`..`): the kernel was given a file handle.

        Nothing of it may be cached for a while: no lock of a directory is held by this call, for
        which an invalidation would wait.

        Raises:
            StaleError: There is no such inode, or no longer.
        """
        node: Node = self._tree.numbered(inode)
        if name == b"..":
            node = node.directory or self._tree.root
        self._tree.remember(node)
        return self._defaults.of(node, 0.0)

    @property
    def kernel_timeout_s(self) -> float:
        """How long the kernel may keep a missing name, in seconds."""
        return self._kernel_timeout_s

    async def getattr(self, inode: int) -> Attributes:
        """Return the attributes of an inode.

        Raises:
            StaleError: The inode is unknown.
        """
        return self._of_inode(inode, await node_of(self._view, inode))

    def _of_inode(self, inode: int, node: Node) -> Attributes:
        """Return the attributes of an inode for which a node answers."""
        attributes = self.attributes(node)
        if inode == node.inode:
            return attributes
        self._tree.prune(node)
        return replace(attributes, inode=Inode(inode), timeout_s=0.0)

    def attributes(self, node: Node) -> Attributes:
        """Return the attributes of a node."""
        return self._defaults.of(node, self._kernel_timeout_s if self._may_cache(node) else 0.0)

    def _may_cache(self, node: Node) -> bool:
        parent = node.directory
        if parent is None and node is not self._tree.root:
            return False  # superseded or deleted while the call went on
        if isinstance(node, Directory) and not self._tree.may_cache(self._tree.listing_of(node)):
            return False
        return self._tree.may_cache(
            Dentry(self._tree.root.inode if parent is None else parent.inode, node.name)
        )

    def forget(self, counts: Sequence[tuple[int, int]]) -> None:
        """Take back lookups: pairs of inode and count."""
        for inode, count in counts:
            if self._tree.forget(inode, count):
                self._listings_by_hash.drop(inode)
        self._files.forgotten()

    async def opendir(self, inode: int) -> DirectoryHandle:
        """Open a directory; the listing is taken when it is first read."""
        directory = self._tree.directory(inode)
        return self._open_directories.open(directory)

    async def readdir(self, handle: int, position: int) -> Iterator[Listed]:
        """Return the entries from a position on; a listing from 0 on is a new one.

        Names are those of one moment. One that has gone since is left out.
        """
        directory = self._open_directories.directory(handle)
        if position == 0:
            await self._view.revalidate_directory(directory)
            self._open_directories.take(handle)
        return _listed(directory, self._open_directories.names(handle, position))

    async def readdir_by_inode(self, inode: int, position: int) -> Iterator[Listed]:
        """As `readdir`, of a directory that was not opened.

        The kernel keeps the listing until the directory's mtime is another one.
        """
        directory = self._tree.directory(inode)
        self._view.check()
        if position == 0:
            await self._view.revalidate_directory(directory)
        await self._listings_by_hash.take(directory, anew=position == 0)
        return _listed(directory, self._listings_by_hash.names(directory, position))

    def opened_directory(self, handle: int) -> Inode:
        """Return the inode that a handle is for."""
        return self._open_directories.directory(handle).inode

    def dots(self, inode: int) -> tuple[tuple[bytes, Directory], tuple[bytes, Directory]]:
        """Return `.` and `..` of a directory; the root is its own parent."""
        directory = self._tree.directory(inode)
        return (b".", directory), (b"..", directory.directory or directory)

    def remember_listed(self, listed: Listed, attributes: Attributes) -> None:
        """Note that the kernel took an entry of a listing: it counts as a lookup."""
        self._tree.remember(listed.node)
        listed.node.kernel_may_cache = listed.node.kernel_may_cache or attributes.timeout_s > 0

    async def releasedir(self, handle: int) -> None:
        """Close a directory."""
        directory = self._open_directories.directory(handle)
        if not self._tree.complete:
            for _, name in self._open_directories.names(handle):
                node = directory.children.get(name)
                if node is not None:
                    self._tree.prune(node)
        self._open_directories.close(handle)

    async def statfs(self) -> SpaceStatistics:
        """Return the database's size against its quota; the last known one if etcd is away."""
        # df must answer while etcd is away; the sizes are no promise anyway.
        with suppress(StoreError):
            self._last_size = (await self._store.status()).database_size
        used = -(-self._last_size // BLOCK_SIZE)
        blocks = max(ASSUMED_QUOTA // BLOCK_SIZE, used)
        return SpaceStatistics(
            blocks=blocks,
            blocks_free=blocks - used,
            files=ASSUMED_FREE_INODES,
            files_free=ASSUMED_FREE_INODES,
        )

    async def readlink(self, inode: int) -> bytes:
        """Return the target of a symbolic link: the value of its key.

        Raises:
            InvalidRequestError: It is none.
            NameTooLongError: What another client has put there is too long for a path.
        """
        node = await node_of(self._view, inode, anew=True)
        if not isinstance(node, File) or record_of(node).type != "symlink":
            msg = f"inode {inode} is no symbolic link"
            raise InvalidRequestError(msg)
        if self._kernel_timeout_s:
            node.pages = node.version  # the kernel may keep the target
        target = await self._view.value(node)
        if len(target) >= PATH_MAX:
            msg = f"the target of inode {inode} has {len(target)} bytes"
            raise NameTooLongError(msg)
        return target

    async def open(self, inode: int, flags: int, uid: int = 0, thread: int = 0) -> Handle:
        """Open a file, for a user's thread.

        Raises:
            IsADirectoryFileError: It is a directory.
            StaleError: It is an old version: the kernel is to look its path up again, or the
                value is nowhere to be had.
            StoreError: It is opened for writing, and etcd is away.
        """
        if may_change(flags) and not self._read_only:
            await self._liveness.check()
        node = await node_of(self._view, inode, anew=True)
        if isinstance(node, Directory):
            msg = f"inode {inode} is a directory"
            raise IsADirectoryFileError(msg)
        file = self._newcomers.admit(inode, node, thread)
        return await self._files.open(file, flags, inode, uid=uid)

    # --- making -----------------------------------------------------------------------------

    async def create(
        self,
        parent: int,
        name: bytes,
        flags: int,
        mode: int | None = None,
        caller: Caller | None = None,
    ) -> tuple[Handle, Attributes]:
        """Make and open a file. Only O_EXCL claims the name in etcd now; else close does.

        Without a mode and a caller it gets the mount's defaults, as in `mknod` and `mkdir`.

        Raises:
            ExistsError: O_EXCL, and the name is taken.
            IsADirectoryFileError: The name is a directory.
            StoreError: etcd is away.
        """
        self._check_writable()
        uid = 0 if caller is None else caller.uid
        if not flags & os.O_EXCL:
            with self._view.holding((Dentry(Inode(parent), name),)):
                await self._liveness.check()
        directory, key = await self._namei.place(parent, name)
        node = directory.children.get(name)
        if isinstance(node, Directory):
            msg = f"{key!r} is a directory"
            raise IsADirectoryFileError(msg)
        if node is not None:
            if flags & os.O_EXCL:
                raise taken(name)
            handle = await self._files.open(node, flags, uid=uid)
            return handle, self.hand_out(node)
        record = self._record(directory, mode, caller)
        if flags & os.O_EXCL and name != MARKER_NAME:  # an empty one is not shown: close makes it
            file = await self._claim(directory, name, key, record)
        else:
            file = self._tree.new_file(None)
            file.stored_record = StoredRecord(record, NOT_IN_ETCD) if record else None
            self._view.update.add_local(directory, name, file)
        return self._files.open_new(file, flags, uid), self.hand_out(file)

    async def mknod(
        self, parent: int, name: bytes, mode: int, caller: Caller | None = None
    ) -> Attributes:
        """Make an empty file, a FIFO or a socket in etcd.

        Raises:
            NotPermittedError: It is a device node, or there is nowhere to keep what it is
                (mknod(2): EPERM).
            ExistsError: The name is taken.
        """
        self._check_writable()
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind not in _TYPES:
            msg = "devices cannot be made in etcd"
            raise NotPermittedError(msg)
        return await self._make(parent, name, b"", _TYPES[kind], mode, caller)

    async def symlink(
        self, parent: int, name: bytes, target: bytes, caller: Caller | None = None
    ) -> Attributes:
        """Make a symbolic link: a key whose value is the target.

        Raises:
            NotPermittedError: There is nowhere to keep what it is (symlink(2): EPERM).
            ExistsError: The name is taken.
        """
        self._check_writable()
        return await self._make(parent, name, target, "symlink", None, caller)

    async def _make(
        self,
        parent: int,
        name: bytes,
        value: bytes,
        kind: Type | None,
        mode: int | None,
        caller: Caller | None,
    ) -> Attributes:
        if kind is not None and not self._tree.attributes:
            msg = f"there is nowhere to keep that {name!r} is a {kind}"
            raise NotPermittedError(msg)
        directory, key = await self._namei.place(parent, name)
        record = self._record(directory, mode, caller, kind)
        file = await self._claim(directory, name, key, record, value)
        return self.hand_out(file)

    async def mkdir(
        self, parent: int, name: bytes, mode: int | None = None, caller: Caller | None = None
    ) -> Attributes:
        """Make a directory: put its marker key.

        Raises:
            ExistsError: The name is taken.
        """
        self._check_writable()
        directory = await self._namei.parent(parent, name)
        if name in directory.children:
            raise taken(name)
        if is_part(name):
            return self.hand_out(self._namei.make_part(directory, name))
        marker = self._tree.keyspace.directory_prefix(self._tree.names(directory, name))
        record = self._record(directory, None if mode is None else mode | stat.S_IFDIR, caller)
        async with self._namei.changing((directory, name)) as locked:
            making = make_directory(marker)
            committed = await self._make_in(directory, name, making, marker, record)
            await self._wait_until_visible(committed, locked)
        # By its path: what was above it may have been deleted and made anew meanwhile.
        found = self._tree.find(marker)
        if found is None:
            msg = f"{marker!r} was deleted again by another client"
            raise NotFoundError(msg)
        return self.hand_out(found[0])

    async def _claim(
        self, directory: Directory, name: bytes, key: bytes, record: Record, value: bytes = b""
    ) -> File:
        if name in directory.children:
            raise taken(name)
        if name == MARKER_NAME:
            msg = f"{name!r} shows a marker's value, and an empty one is not shown"
            raise NameReservedError(msg)
        file = self._tree.new_file(None)
        names = self._tree.names(directory, name)
        async with self._namei.changing((directory, name)) as locked:
            with self._view.update.own(key, Intent(file=file, value=value)):
                making = make_file(key, value, is_value=has_keys_below(names))
                committed = await self._make_in(directory, name, making, key, record)
                await self._wait_until_visible(committed, locked)
        file.mtime_ns = file.ctime_ns = self._tree.revisions.time_of(committed.revision)
        return file

    def _record(
        self,
        directory: Directory,
        mode: int | None,
        caller: Caller | None,
        kind: Type | None = None,
    ) -> Record:
        """Return the attributes of what is to be made; nothing where they cannot be kept."""
        if not self._tree.attributes or caller is None:
            return Record(type=kind)
        return self._defaults.of_new(directory, caller, mode, kind)

    async def _make_in(
        self, directory: Directory, name: bytes, making: Transaction, key: bytes, record: Record
    ) -> Committed:
        """Make a key with its attributes, on condition that its directory is there.

        Raises:
            ExistsError: The name is taken.
            NotFoundError: The directory has been deleted by another client.
            StaleError: It was deleted and made anew all the time.
        """
        parent = parent_of(self._tree, directory)
        for _ in range(MAX_RETRIES):
            committed = await self._commit_with(within(parent, making), key, record)
            if committed.succeeded:
                return committed
            before = parent
            parent = None if parent is None else parent.after(committed)
            if parent == before:
                raise taken(name)
        msg = f"the directory of {key!r} changed {MAX_RETRIES} times meanwhile"
        raise StaleError(msg)

    async def _commit_with(self, making: Transaction, key: bytes, record: Record) -> Committed:
        """Make a key with its attributes; without, if etcd's roles say so: content still works."""
        operations = write_record(key, record, 0) if record else ()
        with_record = replace(making, then=(*making.then, *operations))
        if record.type is None:
            return await commit_with(self._store, self._tree.rights, with_record, making)
        committed = await commit_with(self._store, self._tree.rights, with_record, None)
        if committed is None:
            msg = f"etcd's roles let nobody keep that {key!r} is a {record.type}"
            raise NotPermittedError(msg)
        return committed

    # --- removing ---------------------------------------------------------------------------

    async def unlink(self, parent: int, name: bytes) -> None:
        """Delete a file's key.

        Raises:
            NotFoundError: There is none (any more).
            IsADirectoryFileError: The name is a directory.
        """
        self._check_writable()
        directory, key = await self._namei.place(parent, name)
        file = file_in(directory, name)
        async with self._namei.changing((directory, name)) as locked:
            with self._view.holding(locked):
                async with self._files.locks.still((key,)):
                    lease = lease_of(file)
                    await self._unlink(file, directory, name, key, locked)
                    self._files.give_up((key,))
        await self._leases.release(lease)

    async def _unlink(
        self, file: File, directory: Directory, name: bytes, key: bytes, locked: Sequence[Dentry]
    ) -> None:
        if file.key_state is None:
            self._view.invalidate(self._view.update.withdraw(directory, name, gone=True))
            return
        if name == MARKER_NAME:
            await self._unlink_marker(key, locked)
            return
        self._files.keep(file)
        with self._view.update.own(key, Intent()):
            bare = self._removal(directory, name, key)
            committed = await self._remove(bare, key, file)
            if not committed.succeeded:
                if committed.entries and not has_keys_below(self._tree.names(directory, name)):
                    raise IsADirectoryFileError(f"{key!r} is a directory")
                raise NotFoundError(f"{key!r} was deleted by another client")
            await self._wait_until_visible(committed, locked)

    async def rmdir(self, parent: int, name: bytes) -> None:
        """Delete an empty directory's marker.

        Raises:
            NotEmptyError: It has entries; decided by etcd.
            NotADirectoryFileError: The name is a file.
        """
        self._check_writable()
        directory = await self._namei.parent(parent, name)
        node = directory.children.get(name)
        if node is None:
            raise missing(name)
        if not isinstance(node, Directory):
            raise is_a_file(name)
        if is_part(name):
            await self._namei.remove_part(directory, name, node)
            return
        async with self._namei.changing((directory, name)) as locked:
            await self._view.revalidate_name(node, MARKER_NAME)
            if self._namei.has_entries(node):
                raise not_empty(name)
            marker = self._tree.prefix_of(node)
            removal = remove_directory(marker, parent_prefix(marker, self._root))
            # From now on, as the watch may be first: for the kernel it is dead when this is done.
            node.removed = True
            committed = None
            try:
                committed = await self._remove(removal, marker, node)
            finally:
                node.removed = committed is not None and committed.succeeded
            if not committed.succeeded:
                raise not_empty(name)
            # The kernel holds the directory's own lock as well.
            with self._view.holding((Dentry(node.inode, b""),)):
                await self._wait_until_visible(committed, locked)
            if directory.children.get(name) is node and not node.children:
                self._view.update.remove(directory, name)
            if not committed[Delete(marker)]:
                raise missing(name)
        self._files.give_up((marker[:-1],), (marker,))

    async def _unlink_marker(self, key: bytes, locked: Sequence[Dentry]) -> None:
        committed = await self._store.commit(clear_marker(key))
        if not committed.succeeded:
            raise missing(MARKER_NAME)
        await self._wait_until_visible(committed, locked)

    def _removal(self, directory: Directory, name: bytes, key: bytes) -> Transaction:
        parent = None if name == VALUE_NAME else parent_prefix(key, self._root)
        is_value = has_keys_below(self._tree.names(directory, name))
        return remove_file(key, parent, is_value=is_value)

    async def _remove(self, removal: Transaction, key: bytes, node: Node) -> Committed:
        """Remove a key with its attributes; one that is void as well, if it is known.

        Without, if etcd's roles say so: what is left behind is void then.
        """
        with_record = removal
        if self._tree.attributes:
            stored_record = (
                self._tree.stored_records.get(key) if self._tree.complete else node.stored_record
            )
            drop = drop_record(
                key, 0 if stored_record is None else stored_record.key_state.mod_revision
            )
            with_record = replace(removal, then=(*removal.then, *drop))
        return await commit_with(self._store, self._tree.rights, with_record, removal)

    # --- moving -----------------------------------------------------------------------------

    async def rename(
        self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> None:
        """See `Rename.rename`."""
        self._check_writable()
        await self._rename.rename(old_parent, old_name, new_parent, new_name, flags)

    # --- attributes -------------------------------------------------------------------------

    async def setattr(
        self, inode: int, change: Change, uid: int = 0, *, by_path: bool = False
    ) -> Attributes:
        """Change size, mode, owner or times, for a user, by a path or through a descriptor.

        Raises:
            IsADirectoryFileError: A directory is to be truncated.
            NotPermittedError: Mode or owner cannot be kept.
        """
        self._check_writable()
        node = await node_of(self._view, inode)
        if change.size is not None:
            if isinstance(node, Directory):
                msg = f"inode {inode} is a directory"
                raise IsADirectoryFileError(msg)
            await self._files.truncate(node, change.size, uid, by_path=by_path)
        await self._setattr.change(node, change)
        is_listed = isinstance(node, Directory) and change.mtime_ns is not None
        if inode != node.inode or is_listed:
            # Of a directory, the kernel keeps what was listed when it had that mtime before.
            pages = is_listed or change.size is not None
            await self._view.invalidate_first({self._tree.listing_of(node)._replace(pages=pages)})
        return self._of_inode(inode, node)

    # --- helpers ----------------------------------------------------------------------------

    @property
    def _root(self) -> bytes:
        return self._tree.keyspace.prefix

    def _check_writable(self) -> None:
        if self._read_only:
            msg = "the mount is read-only"
            raise ReadOnlyError(msg)

    def hand_out(self, node: Node) -> Attributes:
        """Count a lookup and return the attributes that go with it."""
        attributes = self.attributes(node)
        self._tree.remember(node)
        node.kernel_may_cache = node.kernel_may_cache or attributes.timeout_s > 0
        return attributes

    async def _wait_until_visible(self, committed: Committed, locked: Sequence[Dentry]) -> None:
        await self._view.wait_until_visible(committed.revision, events_of(committed), locked)


_DOTS: Final = (b".", b"..")


def _listed(directory: Directory, names: Iterator[tuple[int, bytes]]) -> Iterator[Listed]:
    for position, name in names:
        node = directory.children.get(name)
        if node is not None:
            yield Listed(name, node, position)


_TYPES: Final[dict[int, Type | None]] = {
    stat.S_IFREG: None,
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
