"""Notifications to the kernel: what it must invalidate, and pages that it may keep.

Knows: pyfuse3's notifications, and that they block. Does not know: why something is to be
forgotten.

`invalidate_entry` waits for the directory's lock, which any LOOKUP, CREATE or READDIR in flight
holds; called on the trio thread it would wait for a handler that only the trio thread can finish. So
a thread of our own makes the calls, in order. A file that is open is never invalidated in place:
what another client writes has an inode of its own then. Where we are not asked to open files, the
thread looks whether one is open (`etcdfs.daemon.kernel_threads`).

When the kernel is slow, what waits does not grow with what happens: something that is waiting to be
forgotten already is not queued again, so that at most everything the kernel knows waits once.

The lock may be held for as long as somebody likes: getdents(2) holds it while it copies to the
caller's memory, and that may be a page which a file system of the caller's never delivers. The
call waits then where no signal reaches it (fs/fuse/dir.c, fuse_reverse_inval_entry). So a
directory whose lock is not had within `STUCK_S` is *stuck*: the thread is left to it, with
whatever is to be forgotten in it until then, and another thread goes on with the rest. Nobody
waits for a stuck directory; who shows it must know that the kernel may have older names of it
(`listen`). There is a thread for each of `STUCK_MAX` stuck directories; beyond that nobody
waits for the kernel at all until one is free, as if all of them were stuck.

Attributes take no lock, nor do the pages of a file that nobody has open. If that is all, and nothing
else is under way, the trio thread tells the kernel itself (`at_once`): a thread that is woken for it
costs ten times as much.

Concurrency: `submit` is called on the trio thread and never blocks; its `done` is called there,
too. What threads and the trio thread share is guarded by a lock that nobody holds while waiting,
but for the queue and the set of what is in it.
"""

import errno
import logging
import os
import queue
import struct
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Final, final

import pyfuse3
import trio

from etcdfs.fuse.procfs import Opens
from etcdfs.tree.inodes import Cached, CachedAttributes, Content, Dentry, Expiry, Inode

log = logging.getLogger(__name__)

STUCK_S: Final = 1.0
"""How long the kernel may take to invalidate one name; it is 0.2 ms, and as long as a call of this
mount waits for etcd if that call holds the directory's lock."""

LOOKS: Final = 4
"""Times that is looked at a waiting thread in `STUCK_S`. What stops the whole process, or its
machine, costs one of them, and makes nothing stuck."""

STUCK_MAX: Final = 64
"""Directories that may be stuck, each with a thread; a thread takes about 30 KiB."""

WAITING_MAX: Final = 4096
"""Things that may wait to be told to the kernel before it is given what it has not asked for."""

CLOSE_S: Final = 1.0
"""How long threads may take to end when the mount is taken down."""

_THREAD_NAME: Final = "kernel-cache"
REPLAY_THREAD: Final = "inotify"
"""The name of a thread that makes calls on the mount itself (`etcdfs.fuse.inotify`)."""

# include/uapi/linux/fuse.h: fuse_out_header, fuse_notify_inval_entry_out and their codes
_OUT_HEADER: Final = struct.Struct("=IiQ")
_INVAL_ENTRY: Final = struct.Struct("=QII")
_NOTIFY_INVAL_ENTRY: Final = 3
_EXPIRE_ONLY: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelStatistics:
    """What the kernel was told.

    Attributes:
        submitted: Times that something was to be forgotten.
        finished: Those that are done, but for what was stuck.
        invalidated: Entries and attributes that were invalidated.
        waiting: Those that it still has to.
        stored: Values that it was given before it asked for them.
        stuck: Directories whose lock somebody holds, so that nothing in them can be invalidated.
        stuck_ever: Times that one was stuck.
    """

    submitted: int
    finished: int
    invalidated: int
    waiting: int
    stored: int
    stuck: int
    stuck_ever: int


@dataclass(eq=False, slots=True)
class _Mark:
    """The end of what was submitted at one time; `done` is called once."""

    done: Callable[[], None] | None


@dataclass(eq=False, slots=True)
class _Given:
    """A content that the kernel is to have."""

    inode: Inode
    value: bytes


@final
class _Work:
    """What the threads have to do, in order."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Cached | _Mark | _Given | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._begun = self._ended = 0

    def put(self, task: Cached | _Mark | _Given | None) -> None:
        """Add something (on the trio thread)."""
        self._begun += 1
        self._queue.put(task)

    def get(self) -> Cached | _Mark | _Given | None:
        """Wait for what is next, in a thread, which must say when it is `done`."""
        return self._queue.get()

    def done(self) -> None:
        """Note that something is done, in a thread."""
        with self._lock:
            self._ended += 1

    def __len__(self) -> int:
        """Count what is not done."""
        return self._begun - self._ended


@dataclass(eq=False, slots=True)
class _Worker:
    """One thread.

    Attributes:
        lock: The inode whose lock it waits for, negative if for those of its pages; 0: none.
        turn: How many locks it has waited for.
        stuck: The lock that it is left to; 0: it does what comes.
    """

    lock: int = 0
    turn: int = 0
    stuck: int = 0


@final
class KernelCache:
    """The kernel's caches of this mount, as seen from the daemon."""

    def __init__(self) -> None:
        # --- dependencies
        self.openings: Opens | None = None
        self._listener: Callable[[Inode | None, float | None], None] = _nobody
        # --- mutable state, of the trio thread
        self._bell = -1  # rung when something is done; open until the process ends
        self._stir = trio.lowlevel.ParkingLot()
        self._ended = trio.Event()
        self._marks: dict[_Mark, None] = {}  # not reached yet, oldest first
        self._is_overrun = False  # more is stuck than there may be threads
        self._submitted = self._stored = self._stuck_ever = self._at_once = 0
        # --- mutable state, shared
        self._work = _Work()
        self._done: deque[Callable[[], None]] = deque()
        # INVARIANT: each of these will be invalidated by a thread that has not come to it yet.
        self._waiting: set[Cached] = set()
        self._lock = threading.Lock()
        self._main: _Worker | None = None  # who does what comes
        self._threads = 0
        self._stuck: dict[int, deque[Cached]] = {}  # by lock: what is left to its thread
        self._invalidated = 0
        self._is_closed = False
        self.unopened: set[Inode] = set()

    def listen(self, listener: Callable[[Inode | None, float | None], None]) -> None:
        """Have `listener` told, on the trio thread, since when a directory is stuck.

        Until it is told that it is no longer (None), the kernel may show older names in it. No
        directory (None) stands for all there are.
        """
        self._listener = listener

    def start(self, tasks: trio.Nursery) -> None:
        """Start the thread, and tasks that hear of it; once the file system is mounted."""
        # trio's own way from a thread to its loop takes a turn of the loop more, which is a
        # twentieth of what a change takes from etcd to a reader.
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        tasks.start_soon(self._hear)
        tasks.start_soon(self._look)
        self._main = self._start_worker()

    async def aclose(self) -> bool:
        """Have the threads end, within `CLOSE_S`; return whether they have.

        What the kernel has not been told by then, it is not told any more. Call it while requests
        are still answered, which may hold the locks that are waited for, and before the file
        system is unmounted: a thread that does not end must go on finding its session.
        """
        if self._main is None:
            return True
        self._is_closed = True
        self._work.put(None)
        self._reach_all()
        with trio.move_on_after(CLOSE_S):
            await self._ended.wait()
        return self._ended.is_set()

    def submit(self, cached: Collection[Cached], done: Callable[[], None] | None = None) -> None:
        """Have the kernel forget `cached`; call `done` on the trio thread afterwards.

        Before `start` nothing is mounted and the kernel has nothing to forget.
        """
        if self._main is None or self._is_closed or not cached:
            if done is not None:
                done()
            return
        # All is done in order: what waits already is invalidated before `done` is called. A
        # thread takes something out of the set before it tells the kernel, never afterwards.
        fresh = [entry for entry in cached if entry not in self._waiting]
        if not fresh and done is None:
            return
        if not self._marks:
            self._stir.unpark_all()
        self._submitted += 1
        self._waiting.update(fresh)
        for entry in fresh:
            self._work.put(entry)
        mark = _Mark(done)
        self._marks[mark] = None
        self._work.put(mark)
        if self._is_overrun:
            _reach(mark)

    def at_once(self, cached: Collection[Cached]) -> bool:
        """Have the kernel forget attributes, and contents that nobody has open, on this thread.

        Nothing is done, or only part of it, if that cannot be: what is under way goes first, and an
        inode that the kernel does not know yet takes more (`_invalidate_inode`).

        Returns:
            Whether all of it is done.
        """
        if self._main is None or self._is_closed or self._work:
            return False
        try:
            for each in cached:
                if not (
                    isinstance(each, CachedAttributes)
                    and invalidate_attributes(each.inode, pages=each.pages)
                ):
                    return False
        except OSError:  # the thread will say
            return False
        self._at_once += len(cached)
        return True

    def store(self, inode: int, value: bytes) -> None:
        """Give the kernel all of a file's content; it does not ask for it then.

        Called on the trio thread, for it does not wait: nobody may be reading the inode
        (`Handles.to_store`), as a READ under way holds the lock of its page.
        """
        try:
            pyfuse3.notify_store(pyfuse3.InodeT(inode), 0, value)
        except OSError as exc:  # it has no memory for it, say; then it asks
            log.debug("the kernel did not take inode %d: %s", inode, exc)
            return
        self._stored += 1

    def hand_over(self, contents: Sequence[tuple[Inode, bytes]]) -> None:
        """Give the kernel contents of files that somebody may be reading, when all before is done.

        What becomes untrue is to be submitted after: it is done in this order.
        """
        if self._main is None or self._is_closed or len(self._work) > WAITING_MAX:
            return
        self._stored += len(contents)
        for inode, value in contents:
            self._work.put(_Given(inode, value))

    def statistics(self) -> KernelStatistics:
        """Count what was submitted, and what became of it."""
        return KernelStatistics(
            submitted=self._submitted,
            finished=self._submitted - len(self._marks),
            invalidated=self._invalidated + self._at_once,
            waiting=len(self._waiting),
            stored=self._stored,
            stuck=len(self._stuck) + self._is_overrun,
            stuck_ever=self._stuck_ever,
        )

    # --- the trio thread --------------------------------------------------------------------

    async def _hear(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._bell)
            os.eventfd_read(self._bell)
            while self._done:
                self._done.popleft()()

    def _finish(self, mark: _Mark) -> None:
        del self._marks[mark]
        _reach(mark)
        if self._is_overrun and not self._marks:
            self._is_overrun = False
            self._listener(None, None)

    def _reach_all(self) -> None:
        """Let nobody wait any longer."""
        for mark in list(self._marks):
            _reach(mark)

    async def _look(self) -> None:
        """Look at the thread now and then, while there is something to be done."""
        seen, looks = 0, 0
        while True:
            if not self._marks:
                await self._stir.park()
            await trio.sleep(STUCK_S / LOOKS)
            assert self._main is not None
            turn = self._main.turn if self._main.lock else 0
            seen, looks = turn, looks + 1 if turn and turn == seen else 0
            if looks >= LOOKS and self._leave(self._main, turn):
                seen, looks = 0, 0

    def _leave(self, worker: _Worker, turn: int) -> bool:
        """Leave a thread to its directory, and have another one do the rest, if there may be one.

        Returns:
            Whether there is another one.
        """
        with self._lock:
            lock = worker.lock
            if not lock or worker.turn != turn:
                return False
            may_start = len(self._stuck) < STUCK_MAX
            if may_start:
                worker.stuck = lock
                self._stuck[lock] = deque()
        since = trio.current_time() - STUCK_S
        if may_start:
            self._stuck_ever += 1
            self._main = self._start_worker()
            self._listener(Inode(abs(lock)), since)
        elif not self._is_overrun:
            self._stuck_ever += 1
            self._is_overrun = True
            self._listener(None, since)
            self._reach_all()
        return may_start

    def _free(self, lock: int) -> None:
        if lock not in self._stuck:  # nor again
            self._listener(Inode(abs(lock)), None)

    def _start_worker(self) -> _Worker:
        worker = _Worker()
        with self._lock:
            self._threads += 1
        # A daemon thread: it may sit in the kernel waiting for a lock when we have to go.
        target = partial(self._run, worker)
        threading.Thread(target=target, name=_THREAD_NAME, daemon=True).start()
        return worker

    # --- the threads ------------------------------------------------------------------------

    def _run(self, worker: _Worker) -> None:
        while not worker.stuck and (task := self._work.get()) is not None:
            if isinstance(task, _Mark):
                self._ring(partial(self._finish, task))
            elif isinstance(task, _Given):
                self._give(worker, task)
            else:
                self._tell(worker, task)
            self._work.done()
        while worker.stuck and (cached := self._next_left(worker)) is not None:
            self._tell(worker, cached)
        with self._lock:
            self._threads -= 1
            is_last = not self._threads
        if is_last:
            self._ring(self._ended.set)

    def _ring(self, done: Callable[[], None]) -> None:
        self._done.append(done)
        os.eventfd_write(self._bell, 1)

    def _next_left(self, worker: _Worker) -> Cached | None:
        """Return what is still to be forgotten in a stuck directory; None, and it is not stuck."""
        with self._lock:
            left = self._stuck[worker.stuck]
            if left:
                return left.popleft()
            del self._stuck[worker.stuck]
        self._ring(partial(self._free, worker.stuck))
        return None

    def _give(self, worker: _Worker, given: _Given) -> None:
        """Give the kernel a content; this waits for a READ of the same page, if there is one."""
        lock = _pages_of(given.inode)
        with self._lock:
            if self._is_closed or lock in self._stuck:
                return
            worker.lock = lock
            worker.turn += 1
        try:
            pyfuse3.notify_store(pyfuse3.InodeT(given.inode), 0, given.value)
        except OSError as exc:  # it has forgotten the inode, or has no memory; then it asks
            log.debug("the kernel did not take inode %d: %s", given.inode, exc)
        finally:
            with self._lock:
                worker.lock = 0

    def _tell(self, worker: _Worker, cached: Cached) -> None:
        if self._is_closed:
            return
        try:
            self._invalidate(worker, cached)
        except Exception as exc:  # the thread must live; the kernel's timeout bounds what is lost
            # ENOSYS is libfuse's word for before the kernel's first request: it has nothing then.
            is_early = isinstance(exc, OSError) and exc.errno == errno.ENOSYS
            if not is_early and not self._is_closed:
                log.exception("could not invalidate %s", cached)

    def _invalidate(self, worker: _Worker, cached: Cached) -> None:
        match cached:
            case Dentry():
                self._call(worker, cached, cached.directory, partial(invalidate_entry, cached))
            case Expiry(within):
                self._call(worker, cached, within.directory, partial(expire_entry, within))
            case CachedAttributes(inode, within, pages):
                call = partial(invalidate_attributes, inode, pages=pages)
                # Attributes alone wait for nobody.
                self._invalidate_inode(
                    worker, cached, within, _pages_of(inode) if pages else 0, call
                )
            case Content(inode, within):
                call = partial(self._let_go_unless_open, inode)
                self._invalidate_inode(worker, cached, within, _pages_of(inode), call)

    def _invalidate_inode(
        self,
        worker: _Worker,
        cached: Cached,
        within: Dentry | None,
        lock: int,
        invalidate: Callable[[], bool],
    ) -> None:
        # Not an inode yet: a LOOKUP answered with the old attributes may still be on its way into
        # the caches. Its name waits for it.
        if self._call(worker, cached, lock, invalidate) is not False or within is None:
            return
        if self._call(worker, cached, within.directory, partial(expire_entry, within)) is not None:
            # Whoever looked it up may be about to use it.
            self._call(worker, cached, lock, invalidate)

    def _let_go_unless_open(self, inode: Inode) -> bool:
        """Have the kernel forget a file's attributes, and its pages unless somebody has it open.

        Whoever opens it once its attributes are forgotten has us asked for them first, and waits
        (`Applier.decided`). Pages that somebody read until then, and closed the file, go with all.

        Returns:
            Whether the kernel has it.
        """
        assert self.openings is not None, "the kernel opens files without asking"
        self.unopened.discard(inode)
        try:
            opening = self.openings.open(inode)  # before: this would have to ask for attributes
        except OSError as exc:
            log.debug("inode %d may be open: %s", inode, exc)
            return invalidate_attributes(inode, pages=False)
        with opening:
            is_held = invalidate_attributes(inode, pages=False)
            is_alone = opening.is_alone()
        if is_held and is_alone:
            invalidate_attributes(inode, pages=True)
        if is_held == opening.is_there and is_alone:
            self.unopened.add(inode)
        return is_held

    def _call(
        self, worker: _Worker, cached: Cached, lock: int, call: Callable[[], bool | None]
    ) -> bool | None:
        """Make a call that waits for a lock, and return what it returns, or else True.

        None if it is left to a thread that waits for that lock already.
        """
        with self._lock:
            left = self._stuck.get(lock)
            if left is not None and worker.stuck != lock:
                left.append(cached)
                return None
            self._waiting.discard(cached)
            self._invalidated += 1
            worker.lock = lock
            worker.turn += 1
        try:
            done = call()
        finally:
            with self._lock:
                worker.lock = 0
        return True if done is None else done


def _pages_of(inode: int) -> int:
    """Return what stands for the locks of an inode's pages, as the inode does for its own."""
    return -inode


def is_in_kernel() -> bool:
    """Say whether a thread of ours waits in the kernel, when all of them should have ended."""
    return any(thread.name in {_THREAD_NAME, REPLAY_THREAD} for thread in threading.enumerate())


def _nobody(_directory: Inode | None, _since: float | None) -> None:
    """Who is told of stuck directories where nobody listens."""


def _reach(mark: _Mark) -> None:
    done, mark.done = mark.done, None
    if done is not None:
        done()


def invalidate_attributes(inode: int, *, pages: bool) -> bool:
    """Have the kernel forget the attributes of an inode; False if it does not have it.

    This never waits for a lock; with its `pages`, for a READ under way. That waits for nothing
    here, but perhaps in Linux, behind other requests (`max_background`). Those of a directory are
    its listing; getdents(2) locks one while it copies from there to the caller's memory.
    """
    try:
        pyfuse3.invalidate_inode(pyfuse3.InodeT(inode), attr_only=not pages)
    except FileNotFoundError:
        return False
    return True


def invalidate_entry(entry: Dentry) -> None:
    """Have the kernel forget a name; waits for the lock of its directory."""
    # ENOENT: the kernel does not have it any more.
    with suppress(FileNotFoundError):
        pyfuse3.invalidate_entry(pyfuse3.InodeT(entry.directory), pyfuse3.FileNameT(entry.name))


def expire_entry(entry: Dentry) -> None:
    """Have the kernel ask for a name again, without throwing it out; waits for the same lock.

    libfuse can send this since 3.12, pyfuse3 cannot; a notification is one write to the kernel
    (include/uapi/linux/fuse.h). Before 6.2, Linux throws the name out all the same.
    """
    device = _device()
    if device is None:
        invalidate_entry(entry)
        return
    body = _INVAL_ENTRY.pack(entry.directory, len(entry.name), _EXPIRE_ONLY) + entry.name + b"\0"
    header = _OUT_HEADER.pack(_OUT_HEADER.size + len(body), _NOTIFY_INVAL_ENTRY, 0)
    with suppress(FileNotFoundError):
        os.write(device, header + body)


@cache
def _device() -> int | None:
    """Return a descriptor of our own of the mount's /dev/fuse, which pyfuse3 keeps to itself."""
    with suppress(OSError):
        for link in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # that of the listing itself is closed by now
                if link.readlink() == Path("/dev/fuse"):
                    return os.dup(int(link.name))
    return None
