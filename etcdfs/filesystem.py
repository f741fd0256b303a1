"""The system calls, as one file system over one view of etcd.

What this room knows: what each call means for names, inodes and keys, and which errno says why
not. What it must not know: FUSE, gRPC, how the tree is kept true.

Methods bear the names of the system calls, take inode numbers and `bytes`, and raise
`CallerError` or `StoreError`. Every inode handed out by `lookup`, `create`, `mkdir` and `mknod`
counts as one lookup; entries of a listing count when `remember` says that the kernel took them.

Concurrency: trio thread only. After every `await` the tree may have changed; what was found
before is looked up again (`# checkpoint`).
"""

import json
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, NewType, final

import trio

from etcdfs.answers import page_of, parent_event, put_event, tombstone
from etcdfs.attributes import BLOCK_SIZE, Attributes, Defaults
from etcdfs.errors import (
    CallerError,
    CrossDirectoryError,
    ExistsError,
    InvalidRequestError,
    IsADirectoryFileError,
    NameReservedError,
    NameTooLongError,
    NotADirectoryFileError,
    NotEmptyError,
    NotFoundError,
    NotPermittedError,
    ReadOnlyError,
    StaleError,
    StoreError,
    StoreTimeoutError,
)
from etcdfs.keys import MARKER_NAME, NAME_MAX, VALUE_NAME
from etcdfs.openfiles import Handle, OpenFiles
from etcdfs.store import Committed, Event, KeyValue, Put, Store, Transaction
from etcdfs.switch import Intent
from etcdfs.transactions import (
    clear_marker,
    make_directory,
    make_file,
    move_file,
    parent_prefix,
    remove_directory,
    remove_file,
)
from etcdfs.tree import Directory, Entry, File, Node, Overrides, Tree
from etcdfs.view import View

DirectoryHandle = NewType("DirectoryHandle", int)

STATISTICS_XATTR: Final = b"user.etcdfs.statistics"
WAIT_XATTR: Final = b"user.etcdfs.wait."
ASSUMED_QUOTA: Final = 2 * 1024**3  # etcd's default --quota-backend-bytes
ASSUMED_FREE_INODES: Final = 2**31
MAX_RETRIES: Final = 16
"""Lost races before a rename gives up; each loss means that somebody changed the file."""

RENAME_NOREPLACE: Final = 1  # include/uapi/linux/fs.h


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change of attributes; None leaves one as it is."""

    size: int | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


@final
class Filesystem:
    """The calls on one mounted keyspace."""

    def __init__(
        self,
        store: Store,
        view: View,
        files: OpenFiles,
        defaults: Defaults,
        *,
        kernel_timeout_s: float,
        timeout_s: float,
        read_only: bool,
        statistics: Callable[[], Mapping[str, Any]],
    ) -> None:
        # --- dependencies
        self._store = store
        self._view = view
        self._files = files
        self._defaults = defaults
        self._statistics = statistics
        # --- constants
        self._kernel_timeout_s = kernel_timeout_s
        self._timeout_s = timeout_s
        self._read_only = read_only
        # --- mutable state
        self._listings: dict[DirectoryHandle, tuple[Directory, list[bytes]]] = {}
        self._next_listing = 1
        self._last_size = 0

    @property
    def _tree(self) -> Tree:
        return self._view.switch.tree

    # --- looking ----------------------------------------------------------------------------

    async def lookup(self, parent: int, name: bytes) -> Attributes | None:
        """Find a name; None if there is none and the kernel may remember that.

        Raises:
            NotFoundError: There is none, and that must be asked again every time.
        """
        directory = self._tree.directory(parent)
        _check_length(name)
        await self._view.entry(directory, name)
        node = directory.children.get(name)
        if node is not None:
            return self._hand_out(node)
        lifetime_ns = int(self._kernel_timeout_s * 1e9)
        if lifetime_ns and self._tree.tell_negative(directory, name, lifetime_ns):
            return None
        msg = f"no {name!r} in inode {parent}"
        raise NotFoundError(msg)

    @property
    def kernel_timeout_s(self) -> float:
        """How long the kernel may keep a missing name, in seconds."""
        return self._kernel_timeout_s

    async def getattr(self, inode: int) -> Attributes:
        """Return the attributes of an inode.

        Raises:
            StaleError: It is an old version; the kernel looks the path up again.
        """
        node = self._tree.node(inode)
        await self._view.refresh(node)
        if isinstance(node, File) and node.gone:
            return self._defaults.of(node, 0.0)  # held by O_PATH: unlinked, no links
        return self.attributes(node)

    def attributes(self, node: Node) -> Attributes:
        """Return the attributes of a node that is attached or open."""
        if isinstance(node, File):
            self._tree.check_usable(node)
        return self._defaults.of(node, self._kernel_timeout_s if self._may_cache(node) else 0.0)

    def _may_cache(self, node: Node) -> bool:
        parent = node.directory
        if parent is None and node is not self._tree.root:
            return False  # superseded or deleted while the call went on
        if isinstance(node, Directory) and not self._tree.may_cache(self._tree.listing_of(node)):
            return False
        return self._tree.may_cache(
            Entry(self._tree.root.inode if parent is None else parent.inode, node.name)
        )

    def forget(self, counts: Sequence[tuple[int, int]]) -> None:
        """Take back lookups: pairs of inode and count."""
        for inode, count in counts:
            self._tree.forget(inode, count)

    async def opendir(self, inode: int) -> DirectoryHandle:
        """Open a directory; the listing is taken when it is first read."""
        directory = self._tree.directory(inode)
        handle = DirectoryHandle(self._next_listing)
        self._next_listing += 1
        self._listings[handle] = (directory, [])
        return handle

    async def readdir(self, handle: int, position: int) -> Iterator[Listed]:
        """Return the entries from a position on; a listing from 0 on is a new one.

        Names are those of one moment. One that has gone since is left out.
        """
        directory, names = self._listings[DirectoryHandle(handle)]
        if position == 0:
            await self._view.listing(directory)
            names = list(directory.children)
            self._listings[DirectoryHandle(handle)] = (directory, names)
        return self._listed(directory, names, position)

    def _listed(self, directory: Directory, names: list[bytes], start: int) -> Iterator[Listed]:
        for position in range(start, len(names)):
            node = directory.children.get(names[position])
            if node is not None:
                yield Listed(names[position], node, position + 1)

    def dots(self, handle: int) -> tuple[tuple[bytes, Directory], tuple[bytes, Directory]]:
        """Return `.` and `..` of an open directory; the root is its own parent."""
        directory, _ = self._listings[DirectoryHandle(handle)]
        return (b".", directory), (b"..", directory.directory or directory)

    def remember_listed(self, listed: Listed, attributes: Attributes) -> None:
        """Note that the kernel took an entry of a listing: it counts as a lookup."""
        self._tree.remember(listed.node)
        listed.node.told = listed.node.told or attributes.timeout_s > 0

    async def releasedir(self, handle: int) -> None:
        """Close a directory."""
        directory, names = self._listings.pop(DirectoryHandle(handle))
        if not self._tree.complete:
            for node in [directory.children[name] for name in names if name in directory.children]:
                self._tree.prune(node)

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

    async def getxattr(self, inode: int, name: bytes) -> bytes | None:
        """Return an extended attribute; None if there is none.

        The root has two that no listing shows: the counters of the mount, and
        `user.etcdfs.wait.<revision>`, which answers once readers see that revision.

        Raises:
            StoreTimeoutError: The revision did not come within `--timeout`.
        """
        self._tree.node(inode)
        if inode != self._tree.root.inode:
            return None
        if name == STATISTICS_XATTR:
            return json.dumps(self._statistics(), sort_keys=True).encode()
        wanted = name.removeprefix(WAIT_XATTR)
        if wanted == name or not wanted.isdigit():
            return None
        with trio.move_on_after(self._timeout_s):
            await self._view.reached(int(wanted))
            return wanted
        msg = f"revision {int(wanted)} was not reached within {self._timeout_s} s"
        raise StoreTimeoutError(msg)

    async def open(self, inode: int, flags: int) -> Handle:
        """Open a file.

        Raises:
            IsADirectoryFileError: It is a directory.
            StaleError: It is an old version; the kernel looks the path up again.
        """
        node = self._tree.node(inode)
        if isinstance(node, Directory):
            msg = f"inode {inode} is a directory"
            raise IsADirectoryFileError(msg)
        await self._view.refresh(node)
        return await self._files.open(node, flags)

    # --- making -----------------------------------------------------------------------------

    async def create(self, parent: int, name: bytes, flags: int) -> tuple[Handle, Attributes]:
        """Make and open a file. Only O_EXCL claims the name in etcd now; else close does.

        Raises:
            ExistsError: O_EXCL, and the name is taken.
            IsADirectoryFileError: The name is a directory.
        """
        self._check_writable()
        directory, key = await self._place(parent, name)
        node = directory.children.get(name)
        if isinstance(node, Directory):
            msg = f"{key!r} is a directory"
            raise IsADirectoryFileError(msg)
        if node is not None and not flags & os.O_EXCL:
            handle = await self._files.open(node, flags)
            return handle, self._hand_out(node)
        if flags & os.O_EXCL:
            file = await self._claim(directory, name, key)
        else:
            file = self._tree.new_file(None)
            self._tree.attach(directory, name, file)
        return self._files.open_new(file, flags), self._hand_out(file)

    async def mknod(self, parent: int, name: bytes, mode: int) -> Attributes:
        """Make an empty file in etcd.

        Raises:
            NotPermittedError: It is not a regular file (mknod(2): EPERM).
            ExistsError: The name is taken.
        """
        self._check_writable()
        if not stat.S_ISREG(mode) and stat.S_IFMT(mode):
            msg = "only regular files and directories can be made in etcd"
            raise NotPermittedError(msg)
        directory, key = await self._place(parent, name)
        file = await self._claim(directory, name, key)
        return self._hand_out(file)

    async def mkdir(self, parent: int, name: bytes) -> Attributes:
        """Make a directory: put its marker key.

        Raises:
            ExistsError: The name is taken.
        """
        self._check_writable()
        directory, _ = await self._place(parent, name)
        if name in directory.children:
            raise _exists(name)
        marker = self._tree.keyspace.directory_prefix(self._tree.names(directory, name))
        async with self._changing((directory, name)) as locked:
            committed = await self._store.commit(make_directory(marker[:-1]))
            if not committed.succeeded:
                raise _exists(name)
            await self._settle(committed, (put_event(committed, 1, marker, b""),), locked)
        node = directory.children.get(name)
        if node is None:
            msg = f"{marker!r} was deleted again by another client"
            raise NotFoundError(msg)
        return self._hand_out(node)

    async def _claim(self, directory: Directory, name: bytes, key: bytes) -> File:
        if name in directory.children:
            raise _exists(name)
        if name == MARKER_NAME:
            msg = f"{name!r} shows a marker's value, and an empty one is not shown"
            raise NameReservedError(msg)
        file = self._tree.new_file(None)
        async with self._changing((directory, name)) as locked:
            intent = self._view.switch.intents[key] = Intent(file=file, value=b"")
            try:
                committed = await self._store.commit(make_file(key, is_value=name == VALUE_NAME))
                if not committed.succeeded:
                    raise _exists(name)
                await self._settle(committed, (put_event(committed, 1, key, b""),), locked)
            finally:
                self._view.switch.withdraw_intent(key, intent)
        return file

    # --- removing ---------------------------------------------------------------------------

    async def unlink(self, parent: int, name: bytes) -> None:
        """Delete a file's key.

        Raises:
            NotFoundError: There is none (any more).
            IsADirectoryFileError: The name is a directory.
        """
        self._check_writable()
        directory, key = await self._place(parent, name)
        file = self._file(directory, name)
        if file.facts is None and not await self._is_published(file, directory):
            self._view.let_go(self._view.switch.withdraw(directory, name, gone=True))
            return
        if name == MARKER_NAME:
            await self._unlink_marker(directory, key)
            return
        async with self._changing((directory, name)) as locked:
            intent = self._view.switch.intents[key] = Intent()
            try:
                committed = await self._store.commit(self._removal(name, key))
                if not committed.succeeded:
                    raise _not_removed(key, committed)
                events = (tombstone(committed, key), *parent_event(committed, key, self._root))
                await self._settle(committed, events, locked)
            finally:
                self._view.switch.withdraw_intent(key, intent)

    async def rmdir(self, parent: int, name: bytes) -> None:
        """Delete an empty directory's marker.

        Raises:
            NotEmptyError: It has entries; decided by etcd.
            NotADirectoryFileError: The name is a file.
        """
        self._check_writable()
        directory = await self._parent(parent, name)
        node = directory.children.get(name)
        if node is None:
            raise _missing(name)
        if not isinstance(node, Directory):
            msg = f"{name!r} is a file"
            raise NotADirectoryFileError(msg)
        await self._view.entry(node, MARKER_NAME)
        if _has_entries(node, complete=self._tree.complete):
            raise _not_empty(name)
        marker = self._tree.prefix_of(node)
        async with self._changing((directory, name)) as locked:
            committed = await self._store.commit(
                remove_directory(marker, parent_prefix(marker, self._root))
            )
            if not committed.succeeded:
                raise _not_empty(name)
            events = (tombstone(committed, marker), *parent_event(committed, marker, self._root))
            # The kernel holds the directory's own lock as well.
            with self._view.holding((Entry(node.inode, b""),)):
                await self._settle(committed, events, locked)
            if directory.children.get(name) is node and not node.children:
                self._tree.detach(directory, name, gone=True)
            if not committed.results[0]:
                raise _missing(name)

    async def _unlink_marker(self, directory: Directory, key: bytes) -> None:
        async with self._changing((directory, MARKER_NAME)) as locked:
            committed = await self._store.commit(clear_marker(key))
            if not committed.succeeded:
                raise _missing(MARKER_NAME)
            await self._settle(committed, (put_event(committed, 1, key, b""),), locked)

    def _removal(self, name: bytes, key: bytes) -> Transaction:
        is_value = name == VALUE_NAME
        parent = None if is_value else parent_prefix(key, self._root)
        return remove_file(key, parent, is_value=is_value)

    async def _is_published(self, file: File, directory: Directory) -> bool:
        """Wait for a publication on its way; say whether the file is in etcd after it."""
        with self._view.holding((Entry(directory.inode, file.name),)):
            async with self._files.settled(file):
                return file.facts is not None

    # --- moving -----------------------------------------------------------------------------

    async def rename(
        self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> None:
        """Move a file to another name, replacing what is there.

        Raises:
            CrossDirectoryError: It is a directory; `mv` then copies (README, Limits).
            ExistsError: RENAME_NOREPLACE, and the new name is taken.
            IsADirectoryFileError: The new name is a directory.
        """
        self._check_writable()
        if flags & ~RENAME_NOREPLACE:
            msg = f"rename flags {flags:#x} are not supported"
            raise InvalidRequestError(msg)
        source_directory, source = await self._place(old_parent, old_name)
        target_directory, target = await self._place(new_parent, new_name)
        if isinstance(source_directory.children.get(old_name), Directory):
            msg = f"{old_name!r} is a directory: renaming would be many keys"
            raise CrossDirectoryError(msg)
        if old_name == MARKER_NAME:
            msg = f"{source!r} is the directory's own key and stays: only its value can be taken"
            raise CrossDirectoryError(msg)
        file = self._file(source_directory, old_name)
        if source == target:
            return
        move = _Move(source_directory, old_name, source, target_directory, new_name, target)
        locked = (Entry(source_directory.inode, old_name), Entry(target_directory.inode, new_name))
        with self._view.holding(locked):
            await self._files.publish(file)
            if file.facts is None:
                raise _missing(old_name)
            async with self._files.settled(file):
                await self._move(file, move, replace=not flags & RENAME_NOREPLACE)

    async def _move(self, file: File, move: "_Move", *, replace: bool) -> None:
        value = await self._view.value(file)
        assert file.facts is not None
        mod_revision, lease = file.facts.mod_revision, file.facts.lease
        intents = self._view.switch.intents
        places = ((move.from_directory, move.from_name), (move.to_directory, move.to_name))
        mover: File | None = file
        async with self._changing(*places) as locked:
            try:
                for _ in range(MAX_RETRIES):
                    intents[move.source] = Intent(file=mover)
                    intents[move.target] = Intent(file=mover, value=value, replaces=True)
                    committed = await self._store.commit(
                        self._moving(move, mod_revision, Put(move.target, value, lease), replace)
                    )
                    if committed.succeeded:
                        break
                    found = _why_not_moved(move, committed, replace=replace)
                    value, mod_revision, lease = found.value, found.mod_revision, found.lease
                    mover = None  # what moves is a version that this inode is not
                else:
                    msg = f"{move.source!r} changed {MAX_RETRIES} times while it was renamed"
                    raise StaleError(msg)
                events = (
                    tombstone(committed, move.source),
                    put_event(committed, 1, move.target, value),
                    *parent_event(committed, move.source, self._root),
                )
                await self._settle(committed, events, locked)
            finally:
                intents.pop(move.source, None)
                intents.pop(move.target, None)
        # The kernel moves the inode it had under the old name, which another client's change
        # may have made an old version meanwhile.
        self._view.let_go(locked[1:])
        if mover is None and file.directory is None:
            # Until then the new name leads to it: an open must be sent to look again (ESTALE).
            # It was a version of the old key, which is deleted.
            file.lost_key, file.gone = None, False
        file.ctime_ns = max(self._tree.clock(), file.ctime_ns + 1)

    def _moving(self, move: "_Move", mod_revision: int, put: Put, replace: bool) -> Transaction:
        # A directory's %value is an entry of it whose key is not below it.
        same = move.from_directory is move.to_directory and move.to_name != VALUE_NAME
        same = same or move.from_name == VALUE_NAME
        return move_file(
            move.source,
            mod_revision,
            move.target,
            put,
            parent=None if same else parent_prefix(move.source, self._root),
            replace=replace,
            is_value=move.to_name == VALUE_NAME,
        )

    # --- attributes -------------------------------------------------------------------------

    async def setattr(self, inode: int, change: Change) -> Attributes:
        """Change size, mode, owner or times.

        Mode, owner and times are kept in memory, for as long as this mount lasts.

        Raises:
            IsADirectoryFileError: A directory is to be truncated.
        """
        self._check_writable()
        node = self._tree.node(inode)
        if change.size is not None:
            if isinstance(node, Directory):
                msg = f"inode {inode} is a directory"
                raise IsADirectoryFileError(msg)
            await self._files.truncate(node, change.size)
        self._override(node, change)
        return self.attributes(node)

    def _override(self, node: Node, change: Change) -> None:
        old = node.overrides or Overrides()
        node.overrides = Overrides(
            mode=old.mode if change.mode is None else stat.S_IMODE(change.mode),
            uid=old.uid if change.uid is None else change.uid,
            gid=old.gid if change.gid is None else change.gid,
            atime_ns=old.atime_ns if change.atime_ns is None else change.atime_ns,
        )
        if change.mtime_ns is not None:
            self._files.set_mtime(node, change.mtime_ns)
        if change != Change(size=change.size):
            node.ctime_ns = max(self._tree.clock(), node.ctime_ns + 1)

    # --- helpers ----------------------------------------------------------------------------

    @property
    def _root(self) -> bytes:
        return self._tree.keyspace.prefix

    def _check_writable(self) -> None:
        if self._read_only:
            msg = "the mount is read-only"
            raise ReadOnlyError(msg)

    async def _place(self, parent: int, name: bytes) -> tuple[Directory, bytes]:
        """Return a directory and the key that `name` has, or would have, in it."""
        directory = await self._parent(parent, name)
        return directory, self._tree.keyspace.file_key(self._tree.names(directory, name))

    async def _parent(self, parent: int, name: bytes) -> Directory:
        """Return a directory, in which what is under `name` is true as of now."""
        directory = self._tree.directory(parent)
        _check_length(name)
        await self._view.entry(directory, name)
        # checkpoint: another client may have removed the directory
        if not self._tree.is_attached(directory):
            msg = f"inode {parent} is no longer a directory of this tree"
            raise NotFoundError(msg)
        return directory

    def _file(self, directory: Directory, name: bytes) -> File:
        node = directory.children.get(name)
        if node is None:
            raise _missing(name)
        if isinstance(node, Directory):
            msg = f"{name!r} is a directory"
            raise IsADirectoryFileError(msg)
        return node

    def _hand_out(self, node: Node) -> Attributes:
        """Count a lookup and return the attributes that go with it."""
        attributes = self.attributes(node)
        self._tree.remember(node)
        node.told = node.told or attributes.timeout_s > 0
        return attributes

    @asynccontextmanager
    async def _changing(self, *places: tuple[Directory, bytes]) -> AsyncIterator[list[Entry]]:
        """Mark names that the kernel holds locked for us until this call returns.

        If the call fails, the kernel keeps what it had cached of them, which may be what
        another client has changed by now: it is told to ask again.
        """
        entries = [Entry(directory.inode, name) for directory, name in places]
        locked = self._view.switch.locked
        for entry in entries:
            locked[entry] = locked.get(entry, 0) + 1
        try:
            yield entries
        except (CallerError, StoreError):
            self._view.let_go(entries)
            raise
        finally:
            for entry in entries:
                locked[entry] -= 1
                if not locked[entry]:
                    del locked[entry]

    async def _settle(
        self, committed: Committed, events: Sequence[Event], locked: Sequence[Entry]
    ) -> None:
        await self._view.settle(committed.revision, events, locked)


@dataclass(frozen=True, slots=True)
class _Move:
    from_directory: Directory
    from_name: bytes
    source: bytes
    to_directory: Directory
    to_name: bytes
    target: bytes


def _why_not_moved(move: _Move, committed: Committed, *, replace: bool) -> KeyValue:
    source, target, below = (page_of(result).entries for result in committed.results)
    if not source:
        raise _missing(move.from_name)
    if target and not replace:
        raise _exists(move.to_name)
    if below and move.to_name != VALUE_NAME:
        msg = f"{move.target!r} is a directory"
        raise IsADirectoryFileError(msg)
    return source[0]


def _not_removed(key: bytes, committed: Committed) -> CallerError:
    own, _below = (page_of(result).entries for result in committed.results)
    if own:
        return IsADirectoryFileError(f"{key!r} is a directory")
    return NotFoundError(f"{key!r} was deleted by another client")


def _has_entries(directory: Directory, *, complete: bool) -> bool:
    """Say whether a directory is known to have entries; without a mirror, etcd decides most."""
    if complete:
        return bool(directory.children)
    return MARKER_NAME in directory.children or any(
        isinstance(child, File) and child.facts is None for child in directory.children.values()
    )


def _check_length(name: bytes) -> None:
    if len(name) > NAME_MAX:
        msg = f"the name {name[:32]!r}... has {len(name)} bytes"
        raise NameTooLongError(msg)


def _missing(name: bytes) -> NotFoundError:
    return NotFoundError(f"there is no {name!r}")


def _exists(name: bytes) -> ExistsError:
    return ExistsError(f"{name!r} is there already")


def _not_empty(name: bytes) -> NotEmptyError:
    return NotEmptyError(f"{name!r} has entries")
