"""Names in directories, as the calls that change them need them.

What this room knows: how a name becomes a key, that what is under it must be true before a change
is decided, and which names the kernel holds locked meanwhile. What it must not know: what is
changed, and how.

Concurrency: trio thread. A directory that is being moved is no place for a change: its keys are
about to be others. Changes wait for the move, and the move for those that have begun.
"""

from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import final

import trio

from etcdfs.admission import about_to_wait
from etcdfs.errors import (
    CallerError,
    ExistsError,
    IsADirectoryFileError,
    NameTooLongError,
    NotADirectoryFileError,
    NotEmptyError,
    NotFoundError,
    StoreError,
)
from etcdfs.keys import MARKER_NAME, NAME_MAX, is_part
from etcdfs.tree import NOT_IN_ETCD, Directory, Entry, File, Node, is_local, is_within
from etcdfs.view import View


@final
class Places:
    """Where changes of names are made."""

    def __init__(self, view: View) -> None:
        # --- dependencies
        self._view = view
        self._tree = view.switch.tree
        # --- mutable state
        self._moving: list[Node] = []
        self._busy: Counter[Directory] = Counter()  # where a change is under way
        self._stir = trio.Event()

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
        await self._view.entry(directory, name)
        await self.at_rest((directory, name))
        # checkpoint: another client may have removed the directory
        if not self._tree.is_attached(directory):
            msg = f"inode {parent} is no longer a directory of this tree"
            raise NotFoundError(msg)
        return directory

    async def at_rest(self, *places: tuple[Directory, bytes]) -> None:
        """Return when none of some names, which the kernel holds locked, is being moved."""
        while any(self._is_moving(directory) for directory, _ in places):
            about_to_wait()
            with self._view.holding([Entry(directory.inode, name) for directory, name in places]):
                await self._stir.wait()

    def has_entries(self, directory: Directory) -> bool:
        """Say whether a directory is known to have entries; without a mirror, etcd decides most."""
        if self._tree.complete:
            return bool(directory.children)
        return MARKER_NAME in directory.children or any(map(is_local, directory.children.values()))

    # --- changing ---------------------------------------------------------------------------

    @asynccontextmanager
    async def changing(self, *places: tuple[Directory, bytes]) -> AsyncIterator[list[Entry]]:
        """Mark names that the kernel holds locked for us until this call returns.

        If the call fails, the kernel keeps what it had cached of them, which may be what
        another client has changed by now: it is told to ask again.
        """
        entries = [Entry(directory.inode, name) for directory, name in places]
        for directory, _ in places:
            if is_part(directory.name):  # no marker can have it stay when it loses its last entry
                directory.marker = NOT_IN_ETCD
        locked = self._view.switch.locked
        for entry in entries:
            locked[entry] = locked.get(entry, 0) + 1
        self._busy.update(directory for directory, _ in places)
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
            self._busy.subtract(directory for directory, _ in places)
            self._busy = +self._busy
            self._wake()

    def make_part(self, directory: Directory, name: bytes) -> Directory:
        """Make part of a long name: no key says that it is there, so this mount remembers it.

        Raises:
            NameReservedError: No long name has this part.
        """
        self._tree.keyspace.check_part(self._tree.names(directory, name))
        made = self._tree.new_directory()
        made.marker = NOT_IN_ETCD
        self._tree.attach(directory, name, made)
        return made

    async def remove_part(self, directory: Directory, name: bytes, node: Directory) -> None:
        """Remove part of a long name.

        Raises:
            NotEmptyError: A key is there of which it is part.
        """
        async with self.changing((directory, name)):
            await self._view.listing(node)
            # checkpoint: another client may have made or removed something
            if node.children:
                raise not_empty(name)
            if directory.children.get(name) is not node:
                raise missing(name)
            self._tree.detach(directory, name, gone=True)

    @asynccontextmanager
    async def still(self, nodes: Collection[Node]) -> AsyncIterator[None]:
        """Hold back changes below these nodes; those under way are waited for."""
        self._moving.extend(nodes)
        try:
            while any(is_within(directory, node) for directory in self._busy for node in nodes):
                await self._stir.wait()
            yield
        finally:
            for node in nodes:
                self._moving.remove(node)
            self._wake()

    def _is_moving(self, directory: Directory) -> bool:
        return any(is_within(directory, node) for node in self._moving)

    def _wake(self) -> None:
        self._stir.set()
        self._stir = trio.Event()


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
