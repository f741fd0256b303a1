"""Invalidating what the kernel has cached, without waiting for oneself, or for ever for others.

Knows: whose lock stands in the way of an invalidation, and what must not be cached of a directory
whose lock somebody holds. Does not know: why something is to be invalidated, how the kernel is
told, how a stuck directory is found out (`etcdfs.fuse.notify`).

A call of this mount that changes a name holds its directory's lock in the kernel until it returns,
and it returns when the batch with its change is applied. If that batch, or one before it, must
invalidate another name in the same directory, the kernel would wait for the call and the call for
the batch; then whoever waits is told (`on_hold`), the batch is applied first and the invalidation
done after.

What is applied does not wait for a directory that is stuck because a process holds its lock: then
one user could stop all others. The kernel may go on showing what it had cached of it: for as long
as it is stuck, or until `--kernel-timeout` has passed since it cached that. This breaks a promise,
and so it is said: in the log, in the statistics, in `stale_s`. What the kernel asks meanwhile it is
told, but must not keep.

Concurrency: synchronous, on the trio thread, but for `invalidate_first`.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol, final

import trio

from etcdfs.consistency.staleness import Staleness
from etcdfs.errors import StaleError
from etcdfs.tree.inodes import Cached, CachedAttributes, Dentry, Inode
from etcdfs.tree.tree import Tree

AT_ONCE_MAX: Final = 16
"""Things that the kernel is told from the trio thread; about 5 us each."""


class KernelCache(Protocol):
    """The kernel's caches, as the mirror needs them.

    Attributes:
        unopened: Inodes that nobody had open when the kernel let go of their content (`Content`);
            whoever asks for that takes them out before.
    """

    unopened: set[Inode]

    def submit(self, cached: Collection[Cached], done: Callable[[], None] | None = None) -> None:
        """Have the kernel forget; never blocks; call `done` on the trio thread afterwards."""
        ...

    def at_once(self, cached: Collection[Cached]) -> bool:
        """Have the kernel forget attributes, and contents that nobody has open; return whether it has.

        If not, nothing is lost: `submit` it.
        """
        ...

    def listen(self, listener: Callable[[Inode | None, float | None], None]) -> None:
        """Have `listener` told which directory (None: all) is stuck, since when; None: no longer.

        `done` does not wait for what is to be forgotten in a stuck directory.
        """
        ...


@final
class Invalidator:
    """What the kernel has been asked to invalidate, and who holds the locks it needs for that."""

    def __init__(self, kernel: KernelCache, on_hold: Callable[[], None]) -> None:
        """Make one; `on_hold` is called whenever a call begins to hold a lock."""
        # --- dependencies
        self._kernel = kernel
        self._on_hold = on_hold
        # --- mutable state
        self._held: Counter[int] = Counter()  # directories whose lock a waiting call holds
        self._wanted: Counter[int] = Counter()  # those whose lock the kernel needs, or will

    @contextmanager
    def holding(self, locked: Sequence[Dentry]) -> Iterator[None]:
        """See `View.holding`."""
        held = {entry.directory for entry in locked}
        self._held.update(held)
        self._on_hold()
        try:
            yield
        finally:
            self._held.subtract(held)
            self._held = +self._held  # or every directory ever changed would stay

    def submit(self, stale: Collection[Cached], done: Callable[[], None] | None = None) -> None:
        """Have the kernel forget; call `done` when it has."""
        locks = {_lock_of(cached) for cached in stale}

        def finish() -> None:
            self._wanted.subtract(locks)
            self._wanted = +self._wanted
            if done is not None:
                done()

        self._wanted.update(locks)
        self._kernel.submit(stale, finish)

    def at_once(self, stale: Collection[Cached], unopened: Collection[Inode]) -> bool:
        """Have the kernel forget now, if that takes nobody's lock; return whether it has.

        No READ is under way of a file that nobody has open, so that its pages are not locked.
        """
        takes_no_lock = len(stale) <= AT_ONCE_MAX and all(
            isinstance(each, CachedAttributes) and (not each.pages or each.inode in unopened)
            for each in stale
        )
        return takes_no_lock and self._kernel.at_once(stale)

    async def first(self, stale: Collection[Cached], *, timeout_s: float) -> None:
        """Have the kernel forget; return when it has, at once if a call of ours is in its way."""
        done = trio.Event()
        self.submit(stale, done.set)
        if not self.is_held():
            with trio.move_on_after(timeout_s):
                await done.wait()

    def holds(self, directory: Inode | None) -> bool:
        """Say whether a call of this mount holds a directory's lock."""
        return directory is not None and self._held[directory] > 0

    def is_held(self) -> bool:
        """Say whether a call that waits for us holds a lock that the kernel waits for.

        Not for this batch alone: the kernel is told in order, so that what was asked of it
        before stands in the way as well.
        """
        return any(self._held[lock] > 0 for lock in self._wanted)


def _lock_of(cached: Cached) -> int:
    """Return the directory whose lock the kernel needs to let go of it; 0 for none."""
    entry = cached if isinstance(cached, Dentry) else cached.within
    return 0 if entry is None else entry.directory


log = logging.getLogger(__name__)

WARN_EVERY_S: Final = 60.0
"""Who makes one directory stuck can make a thousand, and the log is read by people."""


@final
class StuckDirectories:
    """Hears of stuck directories. Owned by the mirror."""

    def __init__(self, tree: Tree, staleness: Staleness, invalidator: Invalidator) -> None:
        # --- dependencies
        self._tree = tree
        self._staleness = staleness
        self._invalidator = invalidator
        # --- mutable state
        self._quiet_until = float("-inf")

    def note(self, directory: Inode | None, since: float | None) -> None:
        """Note since when a directory is stuck, None: no longer. No directory stands for all."""
        self._staleness.stick(directory, since=since)
        if since is None:
            self._tree.stuck.discard(directory)
            log.info("%s: the kernel has let go of what was old", self._name(directory))
            return
        self._tree.stuck.add(directory)
        now = trio.current_time()
        # A call of ours that holds the lock waits for etcd, for as long as --timeout allows it.
        is_expected = self._invalidator.holds(directory) or now < self._quiet_until
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
