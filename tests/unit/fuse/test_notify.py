"""The kernel door's threads, with the kernel replaced by one that waits."""

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

import etcdfs.fuse.notify
from etcdfs.fuse.notify import LOOKS, STUCK_S, KernelCache
from etcdfs.tree.inodes import Cached, CachedAttributes, Dentry, Inode

PATIENCE_S = 20
UNKNOWN = Inode(1000)
"""An inode that the kernel does not have."""


class Locks:
    """Directories' locks, as fs/fuse takes them: some are held, by whoever does not let go."""

    def __init__(self) -> None:
        self._free: dict[int, threading.Event] = {}
        self.entered: dict[int, threading.Event] = {}
        self.told: list[Cached] = []

    def hold(self, *directories: int) -> None:
        for directory in directories:
            self._free[directory] = threading.Event()
            self.entered[directory] = threading.Event()

    def invalidate(self, *directories: int) -> None:
        for directory in directories:
            self._free.pop(directory).set()

    def let_all_go(self) -> None:
        self.invalidate(*list(self._free))

    def invalidate_entry(self, entry: Dentry) -> None:
        self._wait(entry.directory)
        self.told.append(entry)

    def invalidate_attributes(self, inode: int, *, pages: bool) -> bool:
        if pages:
            self._wait(inode)
        self.told.append(CachedAttributes(Inode(inode), None))
        return inode != UNKNOWN

    def _wait(self, lock: int) -> None:
        free = self._free.get(lock)
        if free is not None:
            self.entered[lock].set()
            assert free.wait(PATIENCE_S)


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> Locks:
    locks = Locks()
    monkeypatch.setattr(etcdfs.fuse.notify, "invalidate_entry", locks.invalidate_entry)
    monkeypatch.setattr(etcdfs.fuse.notify, "expire_entry", locks.invalidate_entry)
    monkeypatch.setattr(etcdfs.fuse.notify, "invalidate_attributes", locks.invalidate_attributes)
    return locks


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have directories be stuck at once: nothing here takes time but what is held."""
    monkeypatch.setattr(etcdfs.fuse.notify, "STUCK_S", 0.02)


class Listener:
    """Who is told of stuck directories."""

    def __init__(self) -> None:
        self.stuck: set[int | None] = set()
        self._changed = trio.Event()

    def note(self, directory: Inode | None, since: float | None) -> None:
        if since is None:
            self.stuck.remove(directory)
        else:
            self.stuck.add(directory)
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, *stuck: int | None) -> None:
        with trio.fail_after(PATIENCE_S):
            while self.stuck != set(stuck):
                await self._changed.wait()


@asynccontextmanager
async def started(locks: Locks) -> AsyncIterator[tuple[KernelCache, Listener]]:
    kernel, listener = KernelCache(), Listener()
    kernel.listen(listener.note)
    async with trio.open_nursery() as nursery:
        kernel.start(nursery)
        try:
            yield kernel, listener
        finally:
            locks.let_all_go()
        assert await kernel.aclose()
        nursery.cancel_scope.cancel()


def names(directory: int, count: int = 1) -> list[Cached]:
    return [Dentry(Inode(directory), b"%d" % number) for number in range(count)]


def submit(kernel: KernelCache, *cached: Cached) -> Callable[[], bool]:
    done = trio.Event()
    kernel.submit(cached, done.set)
    return done.is_set


async def finish(kernel: KernelCache, *cached: Cached) -> None:
    done = trio.Event()
    kernel.submit(cached, done.set)
    with trio.fail_after(PATIENCE_S):
        await done.wait()


async def test_what_waits_is_not_queued_again(locks: Locks) -> None:
    locks.hold(1)
    entries = names(1, 3)
    async with started(locks) as (kernel, _):
        kernel.submit(entries)
        assert locks.entered[1].wait(PATIENCE_S)
        for _ in range(1000):
            kernel.submit(entries)
        # The first one is being told just now, which may be too early: it is told again.
        assert kernel.statistics().waiting == len(entries)
        locks.invalidate(1)
        await finish(kernel, *entries)
        assert kernel.statistics().waiting == 0
    assert locks.told[:4] == [*entries, entries[0]]


async def test_a_stuck_directory_stops_no_other(locks: Locks, impatient: None) -> None:
    locks.hold(1)
    async with started(locks) as (kernel, listener):
        await finish(kernel, *names(1, 3), *names(2))
        await listener.until(1)
        assert locks.told == names(2), "what is not stuck is done, and waited for"
        await finish(kernel, *names(3), *names(1, 5))
        assert locks.told == [*names(2), *names(3)], "nobody waits for it again"
        statistics = kernel.statistics()
        assert (statistics.stuck, statistics.stuck_ever) == (1, 1)
        assert statistics.finished == statistics.submitted
        assert statistics.waiting == 5, "all of them: the first is being told, and once more"
        locks.invalidate(1)
        await listener.until()
        assert kernel.statistics().waiting == 0
        assert kernel.statistics().stuck == 0
    assert set(locks.told) == {*names(1, 5), *names(2), *names(3)}
    assert locks.told.count(names(1)[0]) == 2


async def test_attributes_wait_for_a_stuck_directory_only_by_their_name(
    locks: Locks, impatient: None
) -> None:
    locks.hold(1)
    entry = Dentry(Inode(1), b"name")
    async with started(locks) as (kernel, listener):
        await finish(kernel, entry)
        await listener.until(1)
        await finish(kernel, CachedAttributes(Inode(7), entry), CachedAttributes(UNKNOWN, entry))
        assert locks.told == [CachedAttributes(Inode(7), None), CachedAttributes(UNKNOWN, None)]
        locks.invalidate(1)
        await listener.until()
    unknown = CachedAttributes(UNKNOWN, None)
    assert locks.told[2:] == [entry, unknown, entry, unknown]


async def test_pages_may_be_stuck_as_names_may(locks: Locks, impatient: None) -> None:
    locks.hold(7)
    pages, attributes = (
        CachedAttributes(Inode(7), None, pages=True),
        CachedAttributes(Inode(7), None),
    )
    async with started(locks) as (kernel, listener):
        await finish(kernel, pages, *names(1))
        await listener.until(7)
        await finish(kernel, pages, attributes)
        assert locks.told[:2] == [*names(1), attributes], "these wait for no page"
        locks.invalidate(7)
        await listener.until()
    assert locks.told.count(attributes) == 3


async def test_a_directory_may_be_stuck_again(locks: Locks, impatient: None) -> None:
    async with started(locks) as (kernel, listener):
        for times in range(1, 4):
            locks.hold(1)
            await finish(kernel, *names(1))
            await listener.until(1)
            assert kernel.statistics().stuck_ever == times
            locks.invalidate(1)
            await listener.until()


async def test_beyond_the_threads_there_may_be_nobody_waits_for_the_kernel(
    locks: Locks, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcdfs.fuse.notify, "STUCK_MAX", 2)
    locks.hold(1, 2, 3, 4)
    async with started(locks) as (kernel, listener):
        is_done = submit(kernel, *names(1), *names(2), *names(3), *names(4), *names(5))
        await listener.until(1, 2, None)
        assert is_done()
        assert submit(kernel, *names(6))(), "at once"
        assert kernel.statistics().stuck == 3
        assert locks.told == []
        locks.invalidate(1)
        await listener.until(2, 3, None)
        locks.invalidate(4)
        await listener.until(2, 3)
        assert locks.told == [*names(1), *names(4), *names(5), *names(6)]
        await finish(kernel, *names(7))


async def test_what_goes_on_is_not_stuck(
    locks: Locks, autojump_clock: trio.testing.MockClock
) -> None:
    # Each name waits a little, and all of them together longer than one may.
    autojump_clock.autojump_threshold = float("inf")  # threads take real time
    async with started(locks) as (kernel, listener):
        for _ in range(3):
            locks.hold(1)
            done = trio.Event()
            kernel.submit(names(1), done.set)
            assert locks.entered[1].wait(PATIENCE_S)
            for _ in range(LOOKS - 1):
                await trio.testing.wait_all_tasks_blocked()
                autojump_clock.jump(STUCK_S / LOOKS)
            assert not done.is_set()
            locks.invalidate(1)
            await done.wait()
        assert kernel.statistics().stuck_ever == 0
        assert listener.stuck == set()


async def test_nobody_waits_for_a_thread_that_cannot_end(
    locks: Locks, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks.hold(1)
    async with started(locks) as (kernel, _):
        is_done = submit(kernel, *names(1), *names(2))
        assert locks.entered[1].wait(PATIENCE_S)
        monkeypatch.setattr(etcdfs.fuse.notify, "CLOSE_S", 0.05)
        assert not await kernel.aclose()
        monkeypatch.setattr(etcdfs.fuse.notify, "CLOSE_S", PATIENCE_S)
        assert etcdfs.fuse.notify.is_in_kernel()
        assert is_done(), "nobody waits any longer"
        assert submit(kernel, *names(3))()
    assert locks.told == names(1), "nothing is told to a kernel that may be gone"


# --- on the trio thread -----------------------------------------------------------------------

CONTENT = CachedAttributes(Inode(7), None, pages=True)


async def test_what_takes_no_lock_is_told_at_once(locks: Locks) -> None:
    async with started(locks) as (kernel, _):
        threads = threading.active_count()
        assert kernel.at_once({CONTENT})
        assert locks.told == [CONTENT._replace(pages=False)]
        assert kernel.statistics().invalidated == 1
        assert threading.active_count() == threads


async def test_nothing_goes_before_what_is_under_way(locks: Locks) -> None:
    """Nor before what a thread does just now: pages may be given to the kernel so."""
    async with started(locks) as (kernel, _):
        locks.hold(1)
        is_done = submit(kernel, Dentry(Inode(1), b"a"))
        assert not kernel.at_once({CONTENT})
        assert await trio.to_thread.run_sync(locks.entered[1].wait, PATIENCE_S)
        assert not kernel.at_once({CONTENT})
        assert CONTENT._replace(pages=False) not in locks.told
        locks.invalidate(1)
        with trio.fail_after(PATIENCE_S):
            while not (is_done() and kernel.at_once({CONTENT})):
                await trio.lowlevel.checkpoint()
        assert locks.told == [Dentry(Inode(1), b"a"), CONTENT._replace(pages=False)]


@pytest.mark.parametrize(
    "other", [Dentry(Inode(1), b"a"), CachedAttributes(UNKNOWN, Dentry(Inode(1), b"a"))]
)
async def test_what_may_take_a_lock_is_left_to_the_thread(locks: Locks, other: Cached) -> None:
    async with started(locks) as (kernel, _):
        assert not kernel.at_once({other})
