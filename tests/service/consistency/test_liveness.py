"""An open for writing fails when a close would, and all that open ask once."""

import errno
import os

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from etcdfs.errors import StoreUnavailableError
from tests.support.fake_kernel import FakeMount, Path, open_mount
from tests.support.fake_store import FakeStore

FILE: Path = (b"f",)
NEW: Path = (b"new",)
AWAY = StoreUnavailableError("away")

WRITING = {
    "O_WRONLY": (FILE, os.O_WRONLY),
    "O_RDWR": (FILE, os.O_RDWR),
    "O_TRUNC": (FILE, os.O_RDONLY | os.O_TRUNC),
    "O_APPEND": (FILE, os.O_WRONLY | os.O_APPEND),
    "O_CREAT": (NEW, os.O_RDONLY | os.O_CREAT),
    "O_CREAT | O_WRONLY": (NEW, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
}


@pytest.fixture
def store() -> FakeStore:
    store = FakeStore()
    store.put_now(b"/f", b"old")
    return store


async def errno_of(mount: FakeMount, path: Path, flags: int) -> int:
    try:
        handle = await mount.kernel.open(path, flags)
    except OSError as exc:
        return exc.errno or -1
    await mount.kernel.release(handle)
    return 0


@pytest.mark.parametrize("how", WRITING)
async def test_b74_an_open_for_writing_fails_during_an_outage(
    autojump_clock: MockClock, store: FakeStore, how: str
) -> None:
    async with open_mount(store) as mount:
        before = store.revision
        store.fail_next("ready", AWAY)
        assert await errno_of(mount, *WRITING[how]) == errno.EIO
        assert NEW[0] not in mount.tree.root.children
        assert store.revision == before
        assert await errno_of(mount, FILE, os.O_RDONLY) == 0
        assert store.ready_calls == 1, "nobody asks for a reader"
        assert await errno_of(mount, *WRITING[how]) == 0


async def test_b74_many_openers_ask_once(autojump_clock: MockClock, store: FakeStore) -> None:
    async with open_mount(store) as mount:
        for number, error in ((errno.EIO, AWAY), (0, None)):
            before = store.ready_calls
            found: list[int] = []

            async def opener() -> None:
                found.append(await errno_of(mount, FILE, os.O_RDWR))  # noqa: B023

            store.hold("status")
            if error is not None:
                store.fail_next("ready", error)
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(opener)
                await trio.testing.wait_all_tasks_blocked()
                store.release("status")
            assert found == [number] * 50
            assert store.ready_calls == before + 1


async def test_b74_what_was_opened_before_is_told_at_close(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(FILE, os.O_RDWR)
        await mount.kernel.write(handle, 0, b"new")
        store.fail_next("commit", AWAY)
        with pytest.raises(OSError, match="away") as caught:
            await mount.kernel.flush(handle)
        assert caught.value.errno == errno.EIO
        await mount.kernel.release(handle)


async def test_b74_a_creation_that_waits_holds_up_nobody(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """The kernel holds the directory's lock, and other clients' changes are shown nevertheless."""
    async with open_mount(store) as mount:
        await mount.kernel.stat(FILE)
        store.hold("status")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.kernel.open, NEW, os.O_WRONLY | os.O_CREAT)
            await trio.testing.wait_all_tasks_blocked()
            revision = store.put_now(b"/f", b"another's")
            await trio.testing.wait_all_tasks_blocked()
            assert mount.mirror.revision == revision
            store.release("status")
