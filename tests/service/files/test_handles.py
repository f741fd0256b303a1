"""Handles: how they are opened, shared and given back."""

import os

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from etcdfs.errors import BadHandleError, ReadOnlyError, StaleError, StoreUnavailableError
from etcdfs.files.handles import STORE_MAX
from etcdfs.keyspace.store import Revision
from etcdfs.tree.inodes import File
from tests.support.fake_kernel import FakeMount, open_mount
from tests.support.fake_store import FakeStore

KEY = b"/f"
PATH = (b"f",)


@pytest.fixture
def store() -> FakeStore:
    store = FakeStore()
    store.put_now(KEY, b"one")
    return store


def file_of(mount: FakeMount) -> File:
    found = mount.tree.root.children[b"f"]
    assert isinstance(found, File)
    return found


async def test_handles_are_given_back(autojump_clock: MockClock, store: FakeStore) -> None:
    async with open_mount(store) as mount:
        file = file_of(mount)
        first = await mount.files.open(file, os.O_RDONLY)
        second = await mount.files.open(file, os.O_RDWR)
        assert first != second
        assert (len(mount.files), file.handles, file.value) == (2, 2, b"one")
        await mount.files.release(first)
        assert file.value == b"one"
        await mount.files.release(second)
        assert (len(mount.files), file.handles) == (0, 0)
        assert file_of(mount).value is None
        for use in (mount.files.flush(first), mount.files.release(first)):
            with pytest.raises(BadHandleError):
                await use
        with pytest.raises(BadHandleError):
            mount.files.read(first, 0, 1)


async def test_the_kernel_is_given_a_value_once(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    async with open_mount(store) as mount:
        file = file_of(mount)
        mount.tree.remember(file)
        first = await mount.files.open(file, os.O_RDONLY)
        assert mount.files.to_store(first) == b"one"
        await mount.files.release(first)
        second = await mount.files.open(file, os.O_RDONLY)
        assert mount.files.to_store(second) is None
        await mount.files.release(second)
        mount.filesystem.forget([(file.inode, 1)])  # and with it all that it had
        third = await mount.files.open(file, os.O_RDONLY)
        assert mount.files.to_store(third) == b"one"
        await mount.files.release(third)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR | os.O_TRUNC])
async def test_the_kernel_is_given_nothing_that_it_may_not_keep(
    autojump_clock: MockClock, store: FakeStore, flags: int
) -> None:
    async with open_mount(store) as mount:
        file = file_of(mount)
        first = await mount.files.open(file, flags)
        assert mount.files.to_store(first) is None
        # With a second handle somebody may be reading by now.
        second = await mount.files.open(file, os.O_RDONLY)
        assert mount.files.to_store(second) is None
        await mount.files.release(first)
        await mount.files.release(second)
        assert not file.pages_pushed


@pytest.mark.parametrize(
    ("size", "is_given"), [(0, False), (1, True), (STORE_MAX, True), (STORE_MAX + 1, False)]
)
async def test_the_kernel_is_given_what_fits_into_one_read(
    autojump_clock: MockClock, store: FakeStore, size: int, is_given: bool
) -> None:
    store.put_now(KEY, b"x" * size)
    async with open_mount(store) as mount:
        handle = await mount.files.open(file_of(mount), os.O_RDONLY)
        assert (mount.files.to_store(handle) is not None) == is_given
        await mount.files.release(handle)


async def test_reader_cannot_write(autojump_clock: MockClock, store: FakeStore) -> None:
    async with open_mount(store) as mount:
        handle = await mount.files.open(file_of(mount), os.O_RDONLY)
        with pytest.raises(BadHandleError):
            await mount.files.write(handle, 0, b"x")
        await mount.files.release(handle)


async def test_read_only_mount(autojump_clock: MockClock, store: FakeStore) -> None:
    async with open_mount(store, read_only=True) as mount:
        with pytest.raises(ReadOnlyError):
            await mount.files.open(file_of(mount), os.O_RDWR)
        with pytest.raises(ReadOnlyError):
            await mount.files.truncate(file_of(mount), 0)
        assert file_of(mount).handles == 0


async def test_reads_see_unpublished_writes_of_all_writers(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    async with open_mount(store) as mount:
        file = file_of(mount)
        reader = await mount.files.open(file, os.O_RDONLY)
        first = await mount.files.open(file, os.O_RDWR)
        second = await mount.files.open(file, os.O_WRONLY | os.O_APPEND)
        await mount.files.write(first, 0, b"O")
        await mount.files.write(second, 0, b"!")
        assert mount.files.read(reader, 0, 10) == b"One!"
        assert mount.files.read(reader, 1, 2) == b"ne"
        assert mount.files.read(reader, 9, 2) == b""
        for handle in (reader, first, second):
            await mount.files.flush(handle)
            await mount.files.release(handle)
        found = store.current(KEY)
        assert found is not None
        assert found.value == b"One!"


async def test_value_that_cannot_be_fetched(autojump_clock: MockClock, store: FakeStore) -> None:
    async with open_mount(store, cache_size=0) as mount:
        store.fail_next("range", StoreUnavailableError("away"))
        with pytest.raises(StoreUnavailableError):
            await mount.files.open(file_of(mount), os.O_RDONLY)
        assert (len(mount.files), file_of(mount).handles) == (0, 0)


async def superseded(mount: FakeMount, store: FakeStore) -> File:
    """Return a file that was open when another client wrote its key, and is no longer."""
    old = file_of(mount)
    handle = await mount.files.open(old, os.O_RDONLY)
    store.put_now(KEY, b"two")
    await trio.testing.wait_all_tasks_blocked()
    await mount.files.release(handle)
    assert old is not file_of(mount)
    return old


async def test_old_version_whose_value_is_gone(autojump_clock: MockClock, store: FakeStore) -> None:
    """Superseded, not in memory, compacted away: there is nothing to be read."""
    async with open_mount(store, cache_size=0) as mount:
        old = await superseded(mount, store)
        store.compact_now(store.revision)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(StaleError):
            await mount.files.open(old, os.O_RDONLY)
        assert old.handles == 0


async def test_old_version_while_etcd_is_away(autojump_clock: MockClock, store: FakeStore) -> None:
    """The kernel has found it, and then there is a newer one: it is to look again, not to fail."""
    async with open_mount(store) as mount:
        old = await superseded(mount, store)
        store.put_now(KEY, b"three")
        await trio.testing.wait_all_tasks_blocked()
        assert old is not file_of(mount)
        mount.value_cache.discard(KEY, Revision(2))
        store.fail_next("range", StoreUnavailableError("away"))
        with pytest.raises(StaleError):
            await mount.files.open(old, os.O_RDONLY)
        assert old.handles == 0
        handle = await mount.files.open(file_of(mount), os.O_RDONLY)
        assert mount.files.read(handle, 0, 9) == b"three"
        await mount.files.release(handle)


async def test_newest_value_survives_compaction(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    async with open_mount(store, cache_size=0) as mount:
        store.put_now(b"/g", b"x")
        store.compact_now(store.revision)
        await trio.testing.wait_all_tasks_blocked()
        handle = await mount.files.open(file_of(mount), os.O_RDONLY)
        assert mount.files.read(handle, 0, 10) == b"one"
        await mount.files.release(handle)


async def test_truncate_by_path_publishes_at_once(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    async with open_mount(store) as mount:
        await mount.files.truncate(file_of(mount), 2)
        found = store.current(KEY)
        assert found is not None
        assert found.value == b"on"
        revision = store.revision
        await mount.files.truncate(file_of(mount), 2)
        assert store.revision == revision, "nothing changed"
        assert file_of(mount).handles == 0


async def test_truncate_with_a_writer_waits_for_its_close(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    async with open_mount(store) as mount:
        revision = store.revision
        handle = await mount.files.open(file_of(mount), os.O_RDWR)
        await mount.files.truncate(file_of(mount), 1)
        assert store.revision == revision
        await mount.files.flush(handle)
        await mount.files.release(handle)
        assert store.revision == revision + 1


async def test_empty_draft_waits_while_its_opener_holds_another_descriptor(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """A shell's redirection closes a duplicate before anything is written."""
    async with open_mount(store) as mount:
        revision = store.revision
        handle = await mount.files.open(file_of(mount), os.O_WRONLY | os.O_TRUNC)
        await mount.files.flush(handle, lambda: True)
        assert store.revision == revision
        await mount.files.write(handle, 0, b"x")
        await mount.files.flush(handle, lambda: True)
        assert store.revision == revision + 1
        await mount.files.release(handle)


async def test_flush_all_is_for_who_was_not_told(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """Of two writers one closes while etcd is away; the other one's bytes are still to come."""
    async with open_mount(store) as mount:
        told, other = [
            await mount.files.open(file_of(mount), os.O_WRONLY | os.O_APPEND) for _ in range(2)
        ]
        await mount.files.write(other, 0, b"2")
        await mount.files.write(told, 0, b"1")
        store.fail_next("commit", StoreUnavailableError("away"), times=2)
        with pytest.raises(StoreUnavailableError):
            await mount.files.flush(told)
        await mount.files.release(told)
        ((_, error),) = await mount.files.flush_all()
        assert isinstance(error, StoreUnavailableError)
        assert len(mount.files.unpublished()) == 1
        assert await mount.files.flush_all() == []
        assert mount.files.unpublished() == []
        await mount.files.release(other)


async def test_flush_all_is_for_who_has_children(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """What a program starts closes its descriptors, and looks at no error."""
    async with open_mount(store) as mount:
        handle = await mount.files.open(file_of(mount), os.O_WRONLY)
        await mount.files.write(handle, 0, b"1")
        store.fail_next("commit", StoreUnavailableError("away"))
        with pytest.raises(StoreUnavailableError):
            await mount.files.flush(handle, lambda: True)
        assert len(mount.files.unpublished()) == 1
        assert await mount.files.flush_all() == []
        assert mount.files.unpublished() == []
        await mount.files.release(handle)


async def test_flush_all(autojump_clock: MockClock, store: FakeStore) -> None:
    """At unmount every write buffer is published, and what fails is returned."""
    async with open_mount(store) as mount:
        handle = await mount.files.open(file_of(mount), os.O_RDWR)
        await mount.files.write(handle, 0, b"1")
        store.fail_next("commit", StoreUnavailableError("away"))
        ((file, error),) = await mount.files.flush_all()
        assert isinstance(error, StoreUnavailableError)
        assert file.handles == 1
        assert await mount.files.flush_all() == []
        found = store.current(KEY)
        assert found is not None
        assert found.value == b"1ne"
        await mount.files.release(handle)


async def test_utimens_on_an_open_file(autojump_clock: MockClock, store: FakeStore) -> None:
    async with open_mount(store) as mount:
        file = file_of(mount)
        handle = await mount.files.open(file, os.O_RDWR)
        await mount.files.write(handle, 0, b"1")
        mount.files.set_times(file, 12345, None, keep=True)
        await mount.files.flush(handle)
        await mount.files.release(handle)
        assert file.mtime_ns == 12345, "cp -p writes, sets the time, and closes"
