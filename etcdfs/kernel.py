"""Telling the kernel to let go of what it has cached, and what it may keep.

What this room knows: pyfuse3's notifications, and that they block. What it must not know: why
something is to be forgotten.

`invalidate_entry` waits for the directory's lock, which any LOOKUP, CREATE or READDIR in flight
holds; called on the trio thread it would wait for a handler that only the trio thread can finish
(FACTS.md 1.1, 7). So one thread of our own makes the calls, in order. Files are never invalidated
in place: each remote version has an inode of its own.

When the kernel is slow, what waits does not grow with what happens: something that is waiting to be
forgotten already is not queued again, so that at most everything the kernel knows waits once.

Concurrency: `submit` is called on the trio thread and never blocks; its `done` is called there,
too. The thread touches nothing but its queue and the set of what is in it.
"""

import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import final

import pyfuse3
import trio

from etcdfs.tree import Cached, Entry, Listing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelStatistics:
    """What the kernel was told.

    Attributes:
        submitted: Times that something was to be forgotten.
        finished: Those that are done.
        invalidated: Entries and attributes that the kernel has let go of.
        waiting: Those that it still has to.
        stored: Values that it was given when their file was opened.
    """

    submitted: int
    finished: int
    invalidated: int
    waiting: int
    stored: int


@dataclass(frozen=True, slots=True)
class _Job:
    cached: tuple[Cached, ...]
    done: Callable[[], None] | None


@final
class KernelCache:
    """The kernel's caches of this mount, as seen from the daemon."""

    def __init__(self) -> None:
        # --- mutable state
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._done: deque[Callable[[], None]] = deque()
        self._bell = -1  # rung when something is done; open until the process ends
        self._thread: threading.Thread | None = None
        # INVARIANT: each of these will be invalidated by a job that has not come to it yet.
        self._waiting: set[Cached] = set()
        self._submitted = 0
        self._finished = 0
        self._invalidated = 0
        self._stored = 0

    def start(self, tasks: trio.Nursery) -> None:
        """Start the thread, and a task that hears of it; once the file system is mounted."""
        # trio's own way from a thread to its loop takes a turn of the loop more, which is a
        # twentieth of what a change takes from etcd to a reader.
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        tasks.start_soon(self._listen)
        # A daemon thread: it may sit in the kernel waiting for a lock when we have to go.
        self._thread = threading.Thread(target=self._run, name="kernel-cache", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end after what is queued; does not wait for it."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread = None

    def submit(self, cached: Collection[Cached], done: Callable[[], None] | None = None) -> None:
        """Have the kernel forget `cached`; call `done` on the trio thread afterwards.

        Before `start` nothing is mounted and the kernel has nothing to forget.
        """
        if self._thread is None or not cached:
            if done is not None:
                done()
            return
        # Jobs are done in order: what waits already is let go of before `done` is called. The
        # thread takes something out of the set before it tells the kernel, never afterwards.
        fresh = [entry for entry in cached if entry not in self._waiting]
        if not fresh and done is None:
            return
        self._submitted += 1
        self._waiting.update(fresh)
        self._jobs.put(_Job(tuple(fresh), done))

    def store(self, inode: int, value: bytes) -> None:
        """Give the kernel all of a file's content; it does not ask for it then.

        Called on the trio thread, for it does not wait: nobody may be reading the inode
        (`OpenFiles.to_store`), as a READ under way holds the lock of its page.
        """
        try:
            pyfuse3.notify_store(pyfuse3.InodeT(inode), 0, value)
        except OSError as exc:  # it has no memory for it, say; then it asks
            log.debug("the kernel did not take inode %d: %s", inode, exc)
            return
        self._stored += 1

    def statistics(self) -> KernelStatistics:
        """Count jobs and invalidations."""
        return KernelStatistics(
            submitted=self._submitted,
            finished=self._finished,
            invalidated=self._invalidated,
            waiting=len(self._waiting),
            stored=self._stored,
        )

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            for cached in job.cached:
                self._waiting.discard(cached)
                try:
                    _invalidate(cached)
                except Exception:  # the thread must live; the kernel's timeout bounds what is lost
                    log.exception("could not invalidate %s", cached)
                self._invalidated += 1
            self._finished += 1
            if job.done is not None:
                self._done.append(job.done)
                os.eventfd_write(self._bell, 1)

    async def _listen(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._bell)
            os.eventfd_read(self._bell)
            while self._done:
                self._done.popleft()()


def _invalidate(cached: Cached) -> None:
    match cached:
        case Entry(directory, name):
            _invalidate_entry(directory, name)
        case Listing(inode, within):
            try:
                # Attributes only: directories have no cached pages (pyfuse3 cannot ask for
                # FOPEN_CACHE_DIR), and this form never waits for a lock.
                pyfuse3.invalidate_inode(pyfuse3.InodeT(inode), attr_only=True)
            except FileNotFoundError:
                # Not an inode yet: a LOOKUP answered with the old attributes may still be on
                # its way into the caches. This waits for it (FACTS.md 8).
                if within is not None:
                    _invalidate_entry(within.directory, within.name)


def _invalidate_entry(directory: int, name: bytes) -> None:
    # ENOENT: the kernel has already let go of it.
    with suppress(FileNotFoundError):
        pyfuse3.invalidate_entry(pyfuse3.InodeT(directory), pyfuse3.FileNameT(name))
