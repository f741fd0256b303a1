"""Inodes that are held without being open: who answers for them, and to whom."""

import os

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from etcdfs.errors import StaleError
from etcdfs.vfs.namei import LOOK_AGAIN_S
from tests.support.fake_kernel import FakeMount, KernelHandle, open_mount
from tests.support.fake_store import FakeStore

PATH = (b"f",)
KEY = b"/f"


async def put(mount: FakeMount, store: FakeStore, value: bytes) -> None:
    store.put_now(KEY, value)
    await trio.testing.wait_all_tasks_blocked()


async def superseded(mount: FakeMount, store: FakeStore) -> KernelHandle:
    """Return a handle of a version that another client has overwritten since."""
    handle = await mount.kernel.open(PATH, os.O_RDONLY)
    await put(mount, store, b"newer")
    return handle


async def test_whoever_comes_by_a_path_is_sent_to_look_again(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store) as mount:
        old = await superseded(mount, store)
        inode = old.inode.number
        with pytest.raises(StaleError):
            await mount.filesystem.open(inode, os.O_RDONLY, thread=1)
        found = await mount.kernel.stat(PATH)
        assert found.inode != inode
        handle = await mount.filesystem.open(found.inode, os.O_RDONLY, thread=1)
        assert not mount.files.how(handle).is_direct
        # It has found what it looked for: the next call is another one.
        with pytest.raises(StaleError):
            await mount.filesystem.open(inode, os.O_RDONLY, thread=1)
        await mount.files.release(handle)
        await mount.kernel.close(old)


async def test_whoever_holds_the_inode_reads_the_newest_version(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store) as mount:
        old = await superseded(mount, store)
        new = await mount.kernel.reopen(old.inode, os.O_RDONLY)
        assert new.is_direct
        assert await mount.kernel.read(new) == b"newer"
        assert await mount.kernel.read(old) == b"old"
        assert (await mount.kernel.fstat(old.inode)).size == len(b"old")
        await mount.kernel.close(old)
        await put(mount, store, b"newest of all")
        assert (await mount.kernel.fstat(old.inode)).size == len(b"newer"), "what is open"
        await mount.kernel.close(new)
        assert (await mount.kernel.fstat(old.inode)).size == len(b"newest of all")


async def test_a_key_that_is_always_written_can_be_opened(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(KEY, b"one")
    async with open_mount(store) as mount:
        first = await superseded(mount, store)
        with pytest.raises(StaleError):
            await mount.filesystem.open(first.inode.number, os.O_RDONLY, thread=1)
        second = await superseded(mount, store)  # while the kernel looks again
        handle = await mount.filesystem.open(second.inode.number, os.O_RDONLY, thread=1)
        assert not mount.files.how(handle).is_direct
        assert mount.files.read(handle, 0, 10) == b"newer"
        await mount.files.release(handle)
        for opened in (first, second):
            await mount.kernel.close(opened)


async def test_a_thread_that_did_not_look_again_is_sent_once_more(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store) as mount:
        old = await superseded(mount, store)
        for _ in range(2):
            with pytest.raises(StaleError):
                await mount.filesystem.open(old.inode.number, os.O_RDONLY, thread=1)
            await trio.sleep(2 * LOOK_AGAIN_S)
        await mount.kernel.close(old)
