"""Directories whose lock somebody holds, so that the kernel goes on showing older names of them.

What this room knows: what must not be kept of such a directory, and who is told of it. What it must
not know: how it is found out (`etcdfs.kernel`).

What is published does not wait for a stuck directory: then one user could stop all others. The
kernel may go on showing what it had cached of it: for as long as it is stuck, or until
`--kernel-timeout` has passed since it cached that. This breaks what is promised of what has been
published, and so it is said: in the log, in the statistics, in `stale_s`. What the kernel asks
meanwhile it is told, but must not keep.

Concurrency: synchronous, on the trio thread.
"""

import logging
from typing import Final, final

import trio

from etcdfs.errors import StaleError
from etcdfs.letting import Letting
from etcdfs.link import Link
from etcdfs.tree import Inode, Tree

log = logging.getLogger(__name__)

WARN_EVERY_S: Final = 60.0
"""Who makes one directory stuck can make a thousand, and the log is read by people."""


@final
class StuckDirectories:
    """Hears of stuck directories. Owned by the mirror."""

    def __init__(self, tree: Tree, link: Link, letting: Letting) -> None:
        # --- dependencies
        self._tree = tree
        self._link = link
        self._letting = letting
        # --- mutable state
        self._quiet_until = float("-inf")

    def note(self, directory: Inode | None, since: float | None) -> None:
        """Note since when a directory is stuck, None: no longer. No directory stands for all."""
        self._link.stick(directory, since=since)
        if since is None:
            self._tree.stuck.discard(directory)
            log.info("%s: the kernel has let go of what was old", self._name(directory))
            return
        self._tree.stuck.add(directory)
        now = trio.current_time()
        # A call of ours that holds the lock waits for etcd, for as long as --timeout allows it.
        is_expected = self._letting.holds(directory) or now < self._quiet_until
        level = logging.INFO if is_expected else logging.WARNING
        if level == logging.WARNING:
            self._quiet_until = now + WARN_EVERY_S
        log.log(
            level,
            "%s: the kernel may go on showing what is old, as some process has not let go of the "
            "directory's lock for %.1f s",
            self._name(directory),
            now - since,
        )

    def _name(self, directory: Inode | None) -> str:
        if directory is None:
            return "all directories"
        try:
            names = self._tree.names(self._tree.node(directory))
        except StaleError:
            return f"inode {directory}"
        return f"directory {b'/'.join(names)!r} (inode {directory})"
