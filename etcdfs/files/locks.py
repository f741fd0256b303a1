"""Which calls may change what belongs to a key, and when: one at a time, and not while it moves.

Knows: who waits for whom. Does not know: what is changed, and how.

Two kinds of calls meet here. A call about *one node* (a publication, a write, chmod, a lease)
holds the node's lock. A call that changes *names* (rename, exchange, unlink, the rename of a
directory) holds still whatever belongs to the keys that it takes away, brings or replaces: what
is under way there arrives first, what comes later waits and then finds the keys as they are
afterwards. Versions that lost their key to another client count by the key that they had: they
would go over what is put there otherwise.

A directory that moves holds still as well the names below it: changes of these that are under way
are waited for, later ones wait (`is_moving`).

Nothing can deadlock: who waits for names holds no lock, who holds a lock waits for no names, and
names wait for locks and for changes below them only.

Concurrency: trio thread. `trio.Lock` queues without a checkpoint, so that between the check and
the queue no name begins to move.
"""

from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import final

import trio

from etcdfs.admission import about_to_wait
from etcdfs.tree.inodes import Directory, Node, is_within
from etcdfs.tree.tree import Tree


@dataclass(frozen=True, slots=True, eq=False)
class _Names:
    """Keys that a call changes, and prefixes of others."""

    keys: frozenset[bytes]
    prefixes: tuple[bytes, ...]

    def holds(self, key: bytes) -> bool:
        return key in self.keys or key.startswith(self.prefixes)


@final
class NodeLocks:
    """The locks of all nodes of a tree, each there while somebody wants it."""

    def __init__(self, tree: Tree) -> None:
        # --- dependencies
        self._tree = tree
        # --- mutable state
        self._locks: dict[Node, trio.Lock] = {}
        self._changing: list[_Names] = []
        self._moving: list[Node] = []
        self._busy: Counter[Directory] = Counter()  # where a change of names is under way
        self._changed = trio.Event()

    def held(self, node: Node) -> "_Held":
        """Hold a node's lock for a change that needs no key: a write to its write buffer.

        Raises:
            BusyError: It would have to wait, and too many do.
        """
        return _Held(self._locks, node)

    @asynccontextmanager
    async def settled(self, node: Node) -> AsyncIterator[None]:
        """Hold a node's lock while its key is not changing; it stays what it is meanwhile."""
        while self.is_changing(node):
            await self._changed.wait()
        async with self.held(node):
            yield

    @asynccontextmanager
    async def still(
        self,
        keys: Collection[bytes | None],
        prefixes: Collection[bytes | None] = (),
        nodes: Collection[Node] = (),
    ) -> AsyncIterator[None]:
        """Hold still what belongs to some keys, or to any with a prefix, and names below nodes.

        None stands for a name that has no key.
        """
        names = _Names(
            frozenset(key for key in keys if key is not None),
            tuple(prefix for prefix in prefixes if prefix is not None),
        )
        self._moving.extend(nodes)
        try:
            while any(is_within(directory, node) for directory in self._busy for node in nodes):
                await self._changed.wait()
            self._changing.append(names)
            for node, lock in list(self._locks.items()):
                key = self._tree.own_key(node)
                if lock.locked() and key is not None and names.holds(key):
                    async with self.held(node):
                        pass
            yield
        finally:
            if names in self._changing:
                self._changing.remove(names)
            for node in nodes:
                self._moving.remove(node)
            self._wake()

    @contextmanager
    def busy(self, directories: Collection[Directory]) -> Iterator[None]:
        """Say that names in some directories are being changed."""
        self._busy.update(directories)
        try:
            yield
        finally:
            self._busy.subtract(directories)
            self._busy = +self._busy
            self._wake()

    def is_moving(self, directory: Directory) -> bool:
        """Say whether names in a directory are held still."""
        return any(is_within(directory, node) for node in self._moving)

    async def changed(self) -> None:
        """Return when something is held still no longer."""
        await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def is_changing(self, node: Node) -> bool:
        """Say whether a node's key is being changed by a call of this mount."""
        if not self._changing:
            return False
        key = self._tree.own_key(node)
        return key is not None and any(names.holds(key) for names in self._changing)

    def is_held(self, node: Node) -> bool:
        """Say whether somebody holds a node's lock."""
        return node in self._locks


@final
class _Held:
    """A node's lock while it is held. Where nobody has it, that takes no turn of trio's loop."""

    __slots__ = ("_lock", "_locks", "_node")

    def __init__(self, locks: dict[Node, trio.Lock], node: Node) -> None:
        self._locks = locks
        self._node = node
        self._lock = locks.setdefault(node, trio.Lock())

    async def __aenter__(self) -> None:
        if not self._lock.locked():
            self._lock.acquire_nowait()
            return
        about_to_wait()
        await self._lock.acquire()

    async def __aexit__(self, *_exc: object) -> None:
        self._lock.release()
        if not self._lock.locked():
            self._locks.pop(self._node, None)
