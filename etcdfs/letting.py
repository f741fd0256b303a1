"""Having the kernel let go of what it has cached, without waiting for oneself.

What this room knows: whose lock stands in the way of an invalidation. What it must not know: why
something is to be forgotten, how the kernel is told.

A call of this mount that changes a name holds its directory's lock in the kernel until it
returns, and it returns when the batch with its change is published. If that batch, or one before
it, must invalidate another name in the same directory, the kernel would wait for the call and the
call for the batch; then whoever waits is told (`on_hold`), the batch is published first and the
kernel lets go after.

Concurrency: synchronous, on the trio thread, but for `first`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, final

import trio

from etcdfs.tree import Cached, Entry, Inode


class KernelCache(Protocol):
    """The kernel's caches, as the mirror needs them."""

    def submit(self, cached: Collection[Cached], done: Callable[[], None] | None = None) -> None:
        """Have the kernel forget; never blocks; call `done` on the trio thread afterwards."""
        ...

    def listen(self, listener: Callable[[Inode | None, float | None], None]) -> None:
        """Have `listener` told which directory (None: all) is stuck, since when; None: no longer.

        `done` does not wait for what is to be forgotten in a stuck directory.
        """
        ...


@final
class Letting:
    """What the kernel has been asked to let go of, and who holds the locks it needs for that."""

    def __init__(self, kernel: KernelCache, on_hold: Callable[[], None]) -> None:
        """Make one; `on_hold` is called whenever a call begins to hold a lock."""
        # --- dependencies
        self._kernel = kernel
        self._on_hold = on_hold
        # --- mutable state
        self._held: Counter[int] = Counter()  # directories whose lock a waiting call holds
        self._wanted: Counter[int] = Counter()  # those whose lock the kernel needs, or will

    @contextmanager
    def holding(self, locked: Sequence[Entry]) -> Iterator[None]:
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
    entry = cached if isinstance(cached, Entry) else cached.within
    return 0 if entry is None else entry.directory
