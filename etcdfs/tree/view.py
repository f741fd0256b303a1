"""What the filesystem asks of whoever keeps the tree true: the mirror, or etcd directly.

Knows: the port between the system calls and the two ways of knowing what etcd holds. Does not know:
how either does it.

Concurrency: declarations only. All methods run on the trio thread.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from etcdfs.keyspace.store import Event
from etcdfs.tree.inodes import Cached, Dentry, Directory, File, Node
from etcdfs.tree.update import Update


class View(Protocol):
    """Keeps one tree in step with etcd, each in its own way."""

    @property
    def update(self) -> Update:
        """The tree's one door for changes."""
        ...

    def check(self) -> None:
        """Refuse to show anything that is not asked of etcd just now, if it must not be shown.

        Raises:
            StoreError: It must not: it may be too old, or is no longer permitted.
        """
        ...

    async def revalidate_name(self, directory: Directory, name: bytes) -> None:
        """Make what the tree has under `name` true as of now.

        Raises:
            StoreError: It cannot be known.
        """
        ...

    async def revalidate_directory(self, directory: Directory) -> None:
        """Make all of a directory's names true as of now."""
        ...

    async def revalidate_node(self, node: Node) -> None:
        """Make an attached node's own key state true as of now; it may be superseded by that."""
        ...

    async def value(self, file: File) -> bytes:
        """Return the value of the very version that `file` is.

        Raises:
            StaleError: That version is gone and was not kept.
            StoreError: etcd cannot be asked.
        """
        ...

    async def wait_until_visible(
        self, revision: int, events: Sequence[Event], locked: Sequence[Dentry] = ()
    ) -> None:
        """Return once this mount's own change is in the tree.

        Args:
            revision: The change's revision.
            events: What the change did, as the watch would tell it.
            locked: The names whose directories the kernel holds locked until the call that
                made the change returns.
        """
        ...

    def holding(self, locked: Sequence[Dentry]) -> AbstractContextManager[None]:
        """Say that a call waits which holds the locks of these names' directories.

        For as long as the context lasts. Whatever it waits for must not wait for these locks.
        """
        ...

    async def reached(self, revision: int) -> None:
        """Return once readers see `revision`, or something newer."""
        ...

    async def invalidate_first(self, stale: Collection[Cached]) -> None:
        """Have the kernel forget, and return when it has; at once if a waiting call is in its way.

        Bounded by `--wait_until_visible-timeout`.
        """
        ...

    def invalidate(self, stale: Collection[Cached]) -> None:
        """Have the kernel forget cached names soon, without waiting for it."""
        ...
