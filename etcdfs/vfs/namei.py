"""From names to nodes and keys, as the calls that look up or change them need it.

Knows: how a name becomes a key, that what is under it must be true before a change is decided,
which names the kernel holds locked meanwhile, how a transaction is bound to a directory that must
still be there, and which node a call on an inode is about. Does not know: what is changed, and how.

A directory is there while any key is below its prefix. A condition on the whole prefix would have
etcd read all of it, so it is on one key that is known to be there, its *evidence*: the marker, or
else any file below. If that has gone, the same transaction asks for another one; if there is none,
so has the directory.

A file that was superseded while somebody had it open gives way to the newer version once nobody
has; whoever comes by a path is told from whoever holds the inode (`Newcomers`).

Concurrency: trio thread. A directory that is being moved is no place for a change: its keys are
about to be others. Changes wait for the move, and the move for those that have begun.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final, final

import trio
from cachetools import LRUCache

from etcdfs.admission import about_to_wait
from etcdfs.errors import (
    CallerError,
    ExistsError,
    IsADirectoryFileError,
    NameTooLongError,
    NotADirectoryFileError,
    NotEmptyError,
    NotFoundError,
    StaleError,
    StoreError,
)
from etcdfs.files.locks import NodeLocks
from etcdfs.keyspace.attribute_records import ATTRIBUTES
from etcdfs.keyspace.keys import MARKER_NAME, NAME_MAX, is_part
from etcdfs.keyspace.store import Committed, Compare, Get, Store, Transaction, exists, range_end
from etcdfs.tree.inodes import (
    NOT_IN_ETCD,
    Dentry,
    Directory,
    File,
    Inode,
    Node,
    is_local,
)
from etcdfs.tree.tree import Tree
from etcdfs.tree.view import View


@final
class Namei:
    """Where changes of names are made."""

    def __init__(self, view: View, locks: NodeLocks) -> None:
        # --- dependencies
        self._view = view
        self._tree = view.update.tree
        self._locks = locks

    # --- finding ----------------------------------------------------------------------------

    async def place(self, parent: int, name: bytes) -> tuple[Directory, bytes]:
        """Return a directory and the key that `name` has, or would have, in it."""
        directory = await self.parent(parent, name)
        return directory, self._tree.keyspace.file_key(self._tree.names(directory, name))

    async def parent(self, parent: int, name: bytes) -> Directory:
        """Return a directory, in which what is under `name` is true as of now.

        Raises:
            NotFoundError: It has been removed by another client.
        """
        directory = self._tree.directory(parent)
        check_length(name)
        await self._view.revalidate_name(directory, name)
        await self.at_rest((directory, name))
        # checkpoint: another client may have removed the directory
        if not self._tree.is_attached(directory):
            msg = f"inode {parent} is no longer a directory of this tree"
            raise NotFoundError(msg)
        return directory

    async def at_rest(self, *places: tuple[Directory, bytes]) -> None:
        """Return when none of some names, which the kernel holds locked, is being moved."""
        while any(self._locks.is_moving(directory) for directory, _ in places):
            about_to_wait()
            with self._view.holding([Dentry(directory.inode, name) for directory, name in places]):
                await self._locks.changed()

    def has_entries(self, directory: Directory) -> bool:
        """Say whether a directory is known to have entries; without a mirror, etcd decides most."""
        if self._tree.complete:
            return bool(directory.children)
        return MARKER_NAME in directory.children or any(map(is_local, directory.children.values()))

    # --- changing ---------------------------------------------------------------------------

    @asynccontextmanager
    async def changing(self, *places: tuple[Directory, bytes]) -> AsyncIterator[list[Dentry]]:
        """Mark names that the kernel holds locked for us until this call returns.

        If the call fails, the kernel keeps what it had cached of them and of their directories,
        which may be what another client has changed by now: it is told to ask again.
        """
        entries = [Dentry(directory.inode, name) for directory, name in places]
        for directory, _ in places:
            if is_part(directory.name):  # no marker can have it stay when it loses its last entry
                directory.marker = NOT_IN_ETCD
        locked = self._view.update.locked
        for entry in entries:
            locked[entry] = locked.get(entry, 0) + 1
        try:
            with self._locks.busy([directory for directory, _ in places]):
                yield entries
        except (CallerError, StoreError):
            self._view.invalidate([*entries, *(self._tree.listing_of(d) for d, _ in places)])
            raise
        finally:
            for entry in entries:
                locked[entry] -= 1
                if not locked[entry]:
                    del locked[entry]

    def make_part(self, directory: Directory, name: bytes) -> Directory:
        """Make part of a long name: no key says that it is there, so this mount remembers it.

        Raises:
            NameReservedError: No long name has this part.
        """
        self._tree.keyspace.check_part(self._tree.names(directory, name))
        made = self._tree.new_directory()
        made.marker = NOT_IN_ETCD
        self._view.update.add_local(directory, name, made)
        return made

    async def remove_part(self, directory: Directory, name: bytes, node: Directory) -> None:
        """Remove part of a long name.

        Raises:
            NotEmptyError: A key is there of which it is part.
        """
        async with self.changing((directory, name)):
            await self._view.revalidate_directory(node)
            # checkpoint: another client may have made or removed something
            if node.children:
                raise not_empty(name)
            if directory.children.get(name) is not node:
                raise missing(name)
            self._view.update.remove(directory, name)


# --- what can be wrong with a name ----------------------------------------------------------


def file_in(directory: Directory, name: bytes) -> File:
    """Return the file under a name.

    Raises:
        NotFoundError: There is nothing.
        IsADirectoryFileError: It is a directory.
    """
    node = directory.children.get(name)
    if node is None:
        raise missing(name)
    if isinstance(node, Directory):
        raise is_a_directory(name)
    return node


def check_length(name: bytes) -> None:
    """Refuse a name that is too long for any file."""
    if len(name) > NAME_MAX:
        msg = f"the name {name[:32]!r}... has {len(name)} bytes"
        raise NameTooLongError(msg)


def missing(name: bytes) -> NotFoundError:
    """Return the error for a name that is not there."""
    return NotFoundError(f"there is no {name!r}")


def taken(name: bytes) -> ExistsError:
    """Return the error for a name that is there already."""
    return ExistsError(f"{name!r} is there already")


def not_empty(name: bytes) -> NotEmptyError:
    """Return the error for a directory that must be empty and is not."""
    return NotEmptyError(f"{name!r} has entries")


def is_a_directory(name: bytes) -> IsADirectoryFileError:
    """Return the error for a directory where a file is needed."""
    return IsADirectoryFileError(f"{name!r} is a directory")


def is_a_file(name: bytes) -> NotADirectoryFileError:
    """Return the error for a file where a directory is needed."""
    return NotADirectoryFileError(f"{name!r} is a file")


@final
@dataclass(frozen=True, slots=True)
class Parent:
    """A directory that must be there.

    Attributes:
        prefix: What the keys below it begin with.
        evidence_key: One of them, as far as is known.
    """

    prefix: bytes
    evidence_key: bytes

    @property
    def condition(self) -> Compare:
        """That the witness is there."""
        return exists(self.evidence_key)

    @property
    def question(self) -> Transaction:
        """Whether it is, and else what is: to be asked when the condition may have failed."""
        end = range_end(self.prefix)
        return Transaction((self.condition,), (), (Get(self.prefix, end, limit=1, keys_only=True),))

    def after(self, committed: Committed) -> "Parent":
        """Return the parent with the witness that the answer to its question names, if another.

        Raises:
            NotFoundError: There is none.
        """
        answer = committed[self.question]
        if answer.succeeded:
            return self
        found = answer.entries
        if not found:
            msg = f"the directory {self.prefix!r} was deleted by another client"
            raise NotFoundError(msg)
        return replace(self, evidence_key=found[0].key)


def parent_of(tree: Tree, directory: Directory) -> Parent | None:
    """Return a directory as the parent of what is to be made; None if it is always there."""
    if directory is tree.root:
        return None
    try:
        prefix = tree.prefix_of(directory)
    except CallerError:  # part of an escaped long name: no prefix bounds it
        return None
    if ATTRIBUTES.startswith(prefix):  # what is below it may be nothing that is shown
        return None
    if directory.marker is not None:
        return Parent(prefix, prefix)
    if directory.evidence_key is not None and directory.evidence_key.startswith(prefix):
        return Parent(prefix, directory.evidence_key)
    known = (key for key, _ in tree.key_state(directory) if key.startswith(prefix))
    return Parent(prefix, next(known, prefix))


@final
class Evidence:
    """A directory that something is moved to, try after try."""

    def __init__(self, store: Store, parent: Parent | None) -> None:
        self._store = store
        self._parent = parent
        self._is_tried = False

    async def parent(self) -> Parent | None:
        """Return it; for each try but the first with a witness that is there.

        Raises:
            NotFoundError: It has been deleted.
        """
        if self._parent is not None and self._is_tried:
            answer = await self._store.commit(Transaction((), (self._parent.question,)))
            self._parent = self._parent.after(answer)
        self._is_tried = True
        return self._parent


def within(parent: Parent | None, making: Transaction) -> Transaction:
    """Return a transaction on condition that a directory is there; its question comes last."""
    if parent is None:
        return making
    return replace(
        making,
        when=(*making.when, parent.condition),
        otherwise=(*making.otherwise, parent.question),
    )


LOOK_AGAIN_S: Final = 1.0
"""How long the kernel may take to look a path up again, once it was told ESTALE."""

SENT_BACK_MAX: Final = 1024
"""Threads that may be looking again; of more, one that holds an inode may get ESTALE."""


async def node_of(view: View, inode: int, *, anew: bool = False) -> Node:
    """Return the node that answers for an inode, true as of now.

    With `anew`, for somebody who is about to open it: that is what its key holds now, whoever has
    an older version open.

    Raises:
        StaleError: The inode is unknown.
        StoreError: It cannot be known.
    """
    tree = view.update.tree
    node = tree.node(inode)
    await view.revalidate_node(node)
    # checkpoint: it may have been superseded
    if isinstance(node, File) and not anew:
        if node.handles:
            return node
        if node.reopened is not None:
            return node.reopened
    return tree.current(node)


@final
class Newcomers:
    """Those who open an inode that a newer version has superseded.

    Whoever came by a path has just missed the new inode that it leads to. It is told ESTALE: the
    kernel looks the path up again then, once (fs/namei.c, do_filp_open), and finds that. Whoever
    holds the inode comes to the same one again, and reads the newest version through it.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._sent_back: LRUCache[int, tuple[int, float]] = LRUCache(SENT_BACK_MAX)

    def admit(self, inode: int, answering: File, thread: int) -> File:
        """Return what a thread opens of an inode for which a file answers.

        Raises:
            StaleError: It is to look again.
        """
        inode_before, since = self._sent_back.pop(thread, (0, 0.0))
        if answering.inode == inode:
            return answering
        now = trio.current_time()
        if not inode_before or now - since > LOOK_AGAIN_S:
            self._sent_back[thread] = (inode, now)
            msg = f"inode {inode} is an old version"
            raise StaleError(msg)
        if inode_before == inode:
            return answering
        # What it has found meanwhile is superseded as well, of a key that is always written. The
        # kernel would not look once more; and this version was the newest when the call began.
        node = self._tree.node(Inode(inode))
        return node if isinstance(node, File) else answering
