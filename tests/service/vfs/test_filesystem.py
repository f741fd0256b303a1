"""System calls that change names: one transaction each, decided by etcd, whatever the tree knew."""

import errno
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from etcdfs.errors import (
    EtcdfsError,
    NotFoundError,
    OutcomeUnknownError,
    StaleError,
    StoreFullError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from etcdfs.keyspace.store import Committed, Get, Put, Transaction
from etcdfs.tree.tree import ROOT_INODE
from etcdfs.vfs.attributes import Change
from tests.support.fake_kernel import FakeMount, Path, open_mount
from tests.support.fake_store import FakeStore

NOREPLACE = 1


def keys(store: FakeStore) -> dict[bytes, bytes]:
    return {kv.key: kv.value for kv in store.range_now(b"/", b"0").entries}


async def errno_of(call: Awaitable[Any]) -> int:
    try:
        await call
    except (OSError, EtcdfsError) as exc:
        return exc.errno or -1
    return 0


async def racing(
    store: FakeStore, call: Callable[[], Awaitable[Any]], change: Callable[[], Any]
) -> int:
    """Make a call; another client commits between its check and its commit. Return its errno."""
    commit = store.commit
    changes = [change]

    async def intercept(transaction: Transaction) -> Committed:
        # Without a mirror, there are transactions that only ask.
        if changes and not all(isinstance(o, Get) for o in transaction.then):
            changes.pop()()
            await trio.testing.wait_all_tasks_blocked()
        return await commit(transaction)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "commit", intercept)
        number = await errno_of(call())
    assert not changes, "it committed nothing"
    return number


async def content(mount: FakeMount, path: Path) -> bytes:
    handle = await mount.kernel.open(path, os.O_RDONLY)
    try:
        return await mount.kernel.read(handle)
    finally:
        await mount.kernel.close(handle)


async def quiet(mount: FakeMount) -> None:
    await trio.testing.wait_all_tasks_blocked()
    mount.check_invariants()
    mount.kernel.check_coherence(mount.tree, mount.filesystem)


# --- directories ----------------------------------------------------------------------------


async def test_mkdir_puts_the_marker(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    async with open_mount(store, cache=cache) as mount:
        before = store.revision
        await mount.kernel.mkdir((b"d",))
        assert keys(store) == {b"/d/": b""}
        assert store.revision == before + 1
        assert await errno_of(mount.kernel.mkdir((b"d",))) == errno.EEXIST
        await mount.kernel.rmdir((b"d",))
        assert keys(store) == {}
        assert store.revision == before + 2


@pytest.mark.parametrize("other", [b"/d", b"/d/", b"/d/x"])
async def test_mkdir_that_lost_the_race(
    autojump_clock: MockClock, store: FakeStore, cache: bool, other: bytes
) -> None:
    async with open_mount(store, cache=cache) as mount:
        number = await racing(
            store, lambda: mount.kernel.mkdir((b"d",)), lambda: store.put_now(other, b"")
        )
        assert number == errno.EEXIST
        assert list(keys(store)) == [other]
        await quiet(mount)
        assert await mount.kernel.listdir(()) == [b"d"]


async def test_rmdir_is_decided_by_etcd(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/d/", b"")
    async with open_mount(store, cache=cache) as mount:
        number = await racing(
            store, lambda: mount.kernel.rmdir((b"d",)), lambda: store.put_now(b"/d/new", b"1")
        )
        assert number == errno.ENOTEMPTY
        assert keys(store) == {b"/d/": b"", b"/d/new": b"1"}
        await quiet(mount)
        assert await content(mount, (b"d", b"new")) == b"1"


async def test_rmdir_that_lost_the_race(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/d/", b"")
    async with open_mount(store, cache=cache) as mount:
        number = await racing(
            store, lambda: mount.kernel.rmdir((b"d",)), lambda: store.delete_now(b"/d/")
        )
        assert number == errno.ENOENT
        await quiet(mount)
        assert await mount.kernel.listdir(()) == []


async def test_rmdir_counts_the_value_of_its_own_key(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/d", b"value")
    store.put_now(b"/d/", b"")
    async with open_mount(store, cache=cache) as mount:
        assert await mount.kernel.listdir((b"d",)) == [b"%value"]
        assert await errno_of(mount.kernel.rmdir((b"d",))) == errno.ENOTEMPTY
        await mount.kernel.unlink((b"d", b"%value"))
        await mount.kernel.rmdir((b"d",))
        assert keys(store) == {}


async def test_directory_with_an_empty_name_can_be_removed(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """`rm -r` of a tree with the key `a//b` in it."""
    store.put_now(b"/a/", b"")
    store.put_now(b"/a//b", b"1")
    async with open_mount(store, cache=cache) as mount:
        await mount.kernel.unlink((b"a", b"%=", b"b"))
        assert keys(store) == {b"/a/": b"", b"/a//": b""}
        await mount.kernel.rmdir((b"a", b"%="))
        assert keys(store) == {b"/a/": b""}
        await mount.kernel.rmdir((b"a",))
        assert keys(store) == {}


async def test_rmdir_of_a_file_and_of_nothing(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/f", b"")
    async with open_mount(store, cache=cache) as mount:
        filesystem = mount.filesystem
        with pytest.raises(NotFoundError):
            await filesystem.rmdir(1, b"missing")
        with pytest.raises(Exception, match="is a file"):
            await filesystem.rmdir(1, b"f")
        with pytest.raises(Exception, match="is a directory"):
            await filesystem.open(1, os.O_RDONLY)


@pytest.mark.parametrize("name", [b"%value", b"%marker", b"%+" + b"%" * 253, b".."])
async def test_reserved_names_cannot_be_directories(
    autojump_clock: MockClock, store: FakeStore, cache: bool, name: bytes
) -> None:
    async with open_mount(store, cache=cache) as mount:
        number = await errno_of(mount.filesystem.mkdir(ROOT_INODE, name))
        assert number in (errno.EPERM, errno.EINVAL)
        assert keys(store) == {}


# --- files ----------------------------------------------------------------------------------


async def test_exclusive_creation_claims_the_name(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open((b"f",), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        assert keys(store) == {b"/f": b""}
        await mount.kernel.write(handle, 0, b"1")
        await mount.kernel.close(handle)
        assert keys(store) == {b"/f": b"1"}


@pytest.mark.parametrize("other", [b"/f", b"/f/", b"/f/x"])
async def test_exclusive_creation_that_lost_the_race(
    autojump_clock: MockClock, store: FakeStore, cache: bool, other: bytes
) -> None:
    async with open_mount(store, cache=cache) as mount:
        number = await racing(
            store,
            lambda: mount.kernel.open((b"f",), os.O_WRONLY | os.O_CREAT | os.O_EXCL),
            lambda: store.put_now(other, b"theirs"),
        )
        assert number == errno.EEXIST
        assert keys(store) == {other: b"theirs"}
        assert len(mount.files) == 0
        await quiet(mount)
        assert (await mount.kernel.stat((b"f",))).inode


async def test_creation_of_what_another_client_made_opens_it(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """The kernel believes that the name is missing; CREATE is then an open."""
    async with open_mount(store) as mount:
        store.put_now(b"/f", b"theirs")
        await quiet(mount)
        handle, attributes = await mount.filesystem.create(1, b"f", os.O_RDONLY | os.O_CREAT)
        assert attributes.size == 6
        assert mount.files.read(handle, 0, 10) == b"theirs"
        await mount.files.release(handle)
        mount.filesystem.forget([(attributes.inode, 1)])


async def test_superseded_while_created_is_not_cached(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """An answer about a version that is not at the path any more must not be kept."""
    store.put_now(b"/f", b"one")
    async with open_mount(store, cache_size=0) as mount:
        answers: list[Any] = []

        async def create() -> None:
            answers.extend(await mount.filesystem.create(1, b"f", os.O_RDONLY | os.O_CREAT))

        async with trio.open_nursery() as nursery:
            store.hold("range")  # opening fetches the value
            nursery.start_soon(create)
            await trio.testing.wait_all_tasks_blocked()
            store.put_now(b"/f", b"two")
            await trio.testing.wait_all_tasks_blocked()
            store.release("range")
        handle, attributes = answers
        assert attributes.timeout_s == 0.0
        await mount.files.release(handle)
        mount.filesystem.forget([(attributes.inode, 1)])


async def test_value_of_a_directory_can_be_claimed(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/d/f", b"1")
    async with open_mount(store, cache=cache) as mount:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        await mount.kernel.close(await mount.kernel.open((b"d", b"%value"), flags))
        assert keys(store) == {b"/d": b"", b"/d/f": b"1"}
        assert await errno_of(mount.kernel.open((b"d", b"%value"), flags)) == errno.EEXIST


@pytest.mark.parametrize("mode", [0o060644, 0o020644])
async def test_devices_cannot_be_made(
    autojump_clock: MockClock, store: FakeStore, mode: int
) -> None:
    async with open_mount(store) as mount:
        with pytest.raises(Exception, match="devices"):
            await mount.filesystem.mknod(1, b"fifo", mode)


async def test_mknod(autojump_clock: MockClock, store: FakeStore, cache: bool) -> None:
    async with open_mount(store, cache=cache) as mount:
        await mount.kernel.mknod((b"f",))
        assert keys(store) == {b"/f": b""}
        assert (await mount.kernel.stat((b"f",))).size == 0
        assert await errno_of(mount.kernel.mknod((b"f",))) == errno.EEXIST


async def test_last_entry_removed_through_the_mount_leaves_the_directory(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/d/f", b"1")
    async with open_mount(store, cache=cache) as mount:
        before = store.revision
        await mount.kernel.unlink((b"d", b"f"))
        assert keys(store) == {b"/d/": b""}
        assert store.revision == before + 1
        assert await mount.kernel.listdir((b"d",)) == []


async def test_last_entry_removed_by_another_client_takes_the_directory(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/a/b/c", b"1")
    async with open_mount(store, cache=cache) as mount:
        assert await content(mount, (b"a", b"b", b"c")) == b"1"
        store.delete_now(b"/a/b/c")
        await quiet(mount)
        assert await mount.kernel.listdir(()) == []


async def test_directory_of_an_unpublished_file_stays_as_long_as_it(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/d/f", b"1")
    async with open_mount(store) as mount:
        handle = await mount.kernel.open((b"d", b"new"), os.O_WRONLY | os.O_CREAT)
        store.delete_now(b"/d/f")
        await quiet(mount)
        assert await mount.kernel.listdir((b"d",)) == [b"new"]
        await mount.kernel.unlink((b"d", b"new"))
        mount.check_invariants()
        await trio.testing.wait_all_tasks_blocked()
        await mount.kernel.close(handle)
        assert keys(store) == {}
        await quiet(mount)


async def test_unlink_that_lost_the_race(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/f", b"1")
    async with open_mount(store, cache=cache) as mount:
        number = await racing(
            store, lambda: mount.kernel.unlink((b"f",)), lambda: store.delete_now(b"/f")
        )
        assert number == errno.ENOENT
        await quiet(mount)


@pytest.mark.parametrize("value", [b"1", None])
async def test_b26_unlink_of_what_became_a_directory(
    autojump_clock: MockClock, store: FakeStore, cache: bool, value: bytes | None
) -> None:
    store.put_now(b"/f", b"1")

    def make_directory() -> None:
        store.put_now(b"/f/x", b"2")
        if value is None:
            store.delete_now(b"/f")

    async with open_mount(store, cache=cache) as mount:
        number = await racing(store, lambda: mount.kernel.unlink((b"f",)), make_directory)
        assert number == errno.EISDIR
        await quiet(mount)
        assert await content(mount, (b"f", b"x")) == b"2"
        names = {b"x"} if value is None else {b"x", b"%value"}
        assert set(await mount.kernel.listdir((b"f",))) == names


async def test_b26_unlink_of_a_directorys_value_that_is_gone(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/f", b"1")
    store.put_now(b"/f/x", b"2")
    async with open_mount(store, cache=cache) as mount:
        number = await racing(
            store,
            lambda: mount.kernel.unlink((b"f", b"%value")),
            lambda: store.delete_now(b"/f"),
        )
        assert number == errno.ENOENT
        assert keys(store) == {b"/f/x": b"2"}


@pytest.mark.parametrize("other", [b"/f/", b"/f/x"])
async def test_a_new_file_whose_name_becomes_a_directory_and_comes_back(
    autojump_clock: MockClock, store: FakeStore, cache: bool, other: bytes
) -> None:
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open((b"f",), os.O_RDWR | os.O_CREAT)
        await mount.kernel.write(handle, 0, b"mine")
        store.put_now(other, b"")
        await quiet(mount)
        below = [b"x"] if other.endswith(b"x") else []
        assert sorted(await mount.kernel.listdir((b"f",))) == [b"%value", *below]
        assert await content(mount, (b"f", b"%value")) == b"mine"
        assert await errno_of(mount.kernel.rmdir((b"f",))) == errno.ENOTEMPTY
        store.delete_now(other)
        await quiet(mount)
        assert await mount.kernel.listdir(()) == [b"f"]
        assert await content(mount, (b"f",)) == b"mine"
        await mount.kernel.close(handle)
        assert keys(store) == {b"/f": b"mine"}


async def test_unlink_of_a_file_that_was_never_published(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open((b"f",), os.O_WRONLY | os.O_CREAT)
        await mount.kernel.write(handle, 0, b"1")
        await mount.kernel.unlink((b"f",))
        await mount.kernel.close(handle)
        assert keys(store) == {}
        assert await mount.kernel.listdir(()) == []


async def test_unlink_waits_for_a_publication(autojump_clock: MockClock, store: FakeStore) -> None:
    """A file on its way to etcd is deleted there, too."""
    async with open_mount(store) as mount:
        handle = await mount.kernel.open((b"f",), os.O_WRONLY | os.O_CREAT)
        await mount.kernel.write(handle, 0, b"1")
        async with trio.open_nursery() as nursery:
            store.hold("answer")
            nursery.start_soon(mount.kernel.flush, handle)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(mount.kernel.unlink, (b"f",))
            await trio.testing.wait_all_tasks_blocked()
            store.release("answer")
        assert keys(store) == {}
        await mount.kernel.close(handle)
        assert keys(store) == {}
        await quiet(mount)


async def test_unlink_and_flush_of_one_file_at_once(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """Both have an intent about the key; each takes back its own."""
    store.put_now(b"/f", b"old")
    async with open_mount(store) as mount:
        handle = await mount.kernel.open((b"f",), os.O_RDWR)
        await mount.kernel.write(handle, 0, b"new")
        store.hold_watches()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.kernel.unlink, (b"f",))
            await trio.testing.wait_all_tasks_blocked()
            await mount.kernel.flush(handle)
            store.release_watches()
        assert keys(store) == {}
        assert not mount.view.update.intents
        await mount.kernel.close(handle)
        await quiet(mount)


async def test_marker_value(autojump_clock: MockClock, store: FakeStore, cache: bool) -> None:
    store.put_now(b"/d/", b"annotation")
    async with open_mount(store, cache=cache) as mount:
        assert await content(mount, (b"d", b"%marker")) == b"annotation"
        assert await errno_of(mount.kernel.rmdir((b"d",))) == errno.ENOTEMPTY
        await mount.kernel.unlink((b"d", b"%marker"))
        assert keys(store) == {b"/d/": b""}
        assert await mount.kernel.listdir((b"d",)) == []
        handle = await mount.kernel.open((b"d", b"%marker"), os.O_WRONLY | os.O_CREAT)
        await mount.kernel.write(handle, 0, b"new")
        await mount.kernel.close(handle)
        assert keys(store) == {b"/d/": b"new"}
        assert await content(mount, (b"d", b"%marker")) == b"new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        await mount.kernel.unlink((b"d", b"%marker"))
        handle = await mount.kernel.open((b"d", b"%marker"), flags)
        assert await errno_of(mount.kernel.open((b"d", b"%marker"), flags)) == errno.EEXIST
        assert await errno_of(mount.kernel.mknod((b"d", b"%marker"))) == errno.EEXIST
        await mount.kernel.close(handle)
        assert await mount.kernel.listdir((b"d",)) == [], "an empty value is not shown"
        await quiet(mount)


# --- rename ---------------------------------------------------------------------------------


async def test_rename_is_one_revision(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/a/f", b"1")
    store.put_now(b"/b/g", b"2")
    async with open_mount(store, cache=cache) as mount:
        inode = (await mount.kernel.stat((b"a", b"f"))).inode
        before = store.revision
        await mount.kernel.rename((b"a", b"f"), (b"b", b"g"))
        assert keys(store) == {b"/a/": b"", b"/b/g": b"1"}
        assert store.revision == before + 1
        assert (await mount.kernel.stat((b"b", b"g"))).inode == inode
        assert await content(mount, (b"b", b"g")) == b"1"
        await quiet(mount)


async def test_rename_to_itself_changes_nothing(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/f", b"1")
    async with open_mount(store, cache=cache) as mount:
        before = store.revision
        await mount.filesystem.rename(1, b"f", 1, b"f", 0)
        assert store.revision == before


async def test_rename_noreplace(autojump_clock: MockClock, store: FakeStore, cache: bool) -> None:
    store.put_now(b"/f", b"1")
    async with open_mount(store, cache=cache) as mount:
        number = await racing(
            store,
            lambda: mount.kernel.rename((b"f",), (b"g",), NOREPLACE),
            lambda: store.put_now(b"/g", b"theirs"),
        )
        assert number == errno.EEXIST
        assert keys(store) == {b"/f": b"1", b"/g": b"theirs"}
        await quiet(mount)
        assert await content(mount, (b"g",)) == b"theirs"


async def test_rename_whose_source_changed_moves_the_new_value(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """Whoever has the old version open keeps it; the path shows what etcd has."""
    store.put_now(b"/f", b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open((b"f",), os.O_RDONLY)
        assert await mount.kernel.read(handle) == b"old"
        number = await racing(
            store,
            lambda: mount.kernel.rename((b"f",), (b"g",)),
            lambda: store.put_now(b"/f", b"changed meanwhile"),
        )
        assert number == 0
        assert keys(store) == {b"/g": b"changed meanwhile"}
        await quiet(mount)
        assert await content(mount, (b"g",)) == b"changed meanwhile"
        assert await mount.kernel.read(handle) == b"old"
        await mount.kernel.close(handle)


async def test_rename_whose_source_is_gone(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/f", b"1")
    async with open_mount(store, cache=cache) as mount:
        number = await racing(
            store,
            lambda: mount.kernel.rename((b"f",), (b"g",)),
            lambda: store.delete_now(b"/f"),
        )
        assert number == errno.ENOENT
        assert keys(store) == {}
        await quiet(mount)


async def test_rename_onto_what_became_a_directory(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/f", b"1")
    async with open_mount(store, cache=cache) as mount:
        number = await racing(
            store,
            lambda: mount.kernel.rename((b"f",), (b"g",)),
            lambda: store.put_now(b"/g/x", b"2"),
        )
        assert number == errno.EISDIR
        assert keys(store) == {b"/f": b"1", b"/g/x": b"2"}
        await quiet(mount)


async def test_rename_publishes_what_was_written_first(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open((b"tmp",), os.O_RDWR | os.O_CREAT)
        await mount.kernel.write(handle, 0, b"new")
        await mount.kernel.rename((b"tmp",), (b"f",))
        assert keys(store) == {b"/f": b"new"}
        await mount.kernel.write(handle, 3, b"er")
        await mount.kernel.close(handle)
        assert keys(store) == {b"/f": b"newer"}
        assert await content(mount, (b"f",)) == b"newer"
        await quiet(mount)


@pytest.mark.parametrize(
    ("old", "new"), [((b"d", b"%marker"), (b"f",)), ((b"f",), (b"d", b"%marker"))]
)
async def test_rename_of_a_markers_value(
    autojump_clock: MockClock, store: FakeStore, cache: bool, old: Path, new: Path
) -> None:
    """The directory stays, whatever becomes of its marker's value."""
    store.put_now(b"/d/", b"annotation")
    store.put_now(b"/f", b"1")
    async with open_mount(store, cache=cache) as mount:
        number = await errno_of(mount.kernel.rename(old, new))
        assert number in (0, errno.EXDEV)
        assert b"/d/" in keys(store)
        await quiet(mount)


async def test_last_entry_renamed_to_the_value_leaves_the_directory(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/d/f", b"1")
    async with open_mount(store, cache=cache) as mount:
        await mount.kernel.rename((b"d", b"f"), (b"d", b"%value"))
        assert keys(store) == {b"/d": b"1", b"/d/": b""}
        assert await mount.kernel.listdir((b"d",)) == [b"%value"]
        await quiet(mount)


# --- looking --------------------------------------------------------------------------------


async def test_names_side_by_side(autojump_clock: MockClock, store: FakeStore, cache: bool) -> None:
    names = [b"foo-bar", b"foo.conf", b"foo2", b"\xff\xfe"]
    for name in names:
        store.put_now(b"/" + name, name)
    store.put_now(b"/foo/x", b"x")
    store.put_now(b"/foo", b"value")
    async with open_mount(store, cache=cache) as mount:
        assert sorted(await mount.kernel.listdir(())) == sorted([b"foo", *names])
        assert sorted(await mount.kernel.listdir((b"foo",))) == [b"%value", b"x"]
        for name in names:
            assert await content(mount, (name,)) == name


async def test_listing_while_it_changes(autojump_clock: MockClock, store: FakeStore) -> None:
    """A name that has gone since is left out; none comes twice."""
    for i in range(9):
        store.put_now(b"/%d" % i, b"")
    async with open_mount(store) as mount:
        handle = await mount.filesystem.opendir(1)
        first = [
            e.name
            for e, _ in zip(await mount.filesystem.readdir(handle, 0), range(3), strict=False)
        ]
        store.delete_now(b"/0")
        store.delete_now(b"/5")
        store.put_now(b"/new", b"")
        await quiet(mount)
        rest = [entry.name for entry in await mount.filesystem.readdir(handle, 3)]
        assert first + rest == [b"0", b"1", b"2", b"3", b"4", b"6", b"7", b"8"]
        again = [entry.name for entry in await mount.filesystem.readdir(handle, 0)]
        assert again == [b"1", b"2", b"3", b"4", b"6", b"7", b"8", b"new"]
        assert [name for name, _ in mount.filesystem.dots(ROOT_INODE)] == [b".", b".."]
        await mount.filesystem.releasedir(handle)


async def test_lookups_are_counted_and_given_back(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/a/b/c", b"1")
    async with open_mount(store, cache=cache) as mount:
        await content(mount, (b"a", b"b", b"c"))
        await mount.kernel.listdir((b"a", b"b"))
        assert mount.tree.statistics().inodes_known == 4
        mount.kernel.evict_all()
        assert mount.tree.statistics().inodes_known == 1
        assert cache or not mount.tree.root.children


async def test_inode_that_was_never_handed_out(autojump_clock: MockClock, store: FakeStore) -> None:
    async with open_mount(store) as mount:
        with pytest.raises(StaleError):
            await mount.filesystem.getattr(999)
        mount.filesystem.forget([(999, 1)])  # never raises


async def test_name_that_is_too_long(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    async with open_mount(store, cache=cache) as mount:
        assert await errno_of(mount.kernel.stat((b"x" * 256,))) == errno.ENAMETOOLONG
        handle = await mount.kernel.open((b"x" * 255,), os.O_WRONLY | os.O_CREAT)
        await mount.kernel.close(handle)
        assert keys(store) == {b"/" + b"x" * 255: b""}


# --- attributes -----------------------------------------------------------------------------


async def test_mtime_changes_exactly_with_the_content(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """Even if the clock stands still."""
    store.put_now(b"/f", b"1")
    async with open_mount(store, clock=lambda: 1000) as mount:
        seen = [(await mount.kernel.stat((b"f",))).mtime_ns]
        store.put_now(b"/f", b"2")
        await quiet(mount)
        seen.append((await mount.kernel.stat((b"f",))).mtime_ns)
        handle = await mount.kernel.open((b"f",), os.O_WRONLY | os.O_TRUNC)
        await mount.kernel.write(handle, 0, b"3")
        await mount.kernel.close(handle)
        seen.append((await mount.kernel.stat((b"f",))).mtime_ns)
        assert seen == sorted(set(seen))
        await content(mount, (b"f",))
        await mount.kernel.rename((b"f",), (b"g",))
        assert (await mount.kernel.stat((b"g",))).mtime_ns == seen[-1]


async def test_attributes_can_be_set(autojump_clock: MockClock, store: FakeStore) -> None:
    store.put_now(b"/f", b"12345")
    async with open_mount(store) as mount:
        inode = (await mount.kernel.stat((b"f",))).inode
        change = Change(size=2, mode=0o600, uid=1, gid=2, atime_ns=3, mtime_ns=4)
        got = await mount.filesystem.setattr(inode, change)
        assert (got.size, got.mode & 0o7777, got.uid, got.gid) == (2, 0o600, 1, 2)
        assert (got.atime_ns, got.mtime_ns) == (3, 4)
        stored_record = (
            b'{"atime_ns":3,"gid":2,"mode":"0600","mtime_ns":4,"mtime_revision":3,"uid":1}'
        )
        assert keys(store) == {b"/f": b"12", b"/.etcdfs/attrs//f": stored_record}
        with pytest.raises(Exception, match="directory"):
            await mount.filesystem.setattr(1, Change(size=0))
        got = await mount.filesystem.setattr(1, Change(mode=0o700))
        assert got.mode & 0o7777 == 0o700


async def test_extended_attributes_of_the_root(autojump_clock: MockClock, store: FakeStore) -> None:
    store.put_now(b"/f", b"1")
    async with open_mount(store) as mount:
        get = mount.filesystem.xattrs.getxattr
        assert await get(1, b"user.etcdfs.statistics") == b"{}"
        assert await errno_of(get(1, b"user.other")) == errno.ENODATA
        assert await errno_of(get(1, b"user.etcdfs.wait.x")) == errno.ENODATA
        revision = store.revision
        assert await get(1, b"user.etcdfs.wait.%d" % revision) == b"%d" % revision
        with pytest.raises(StoreTimeoutError):
            await get(1, b"user.etcdfs.wait.%d" % (revision + 1))
        inode = (await mount.kernel.stat((b"f",))).inode
        assert await errno_of(get(inode, b"user.etcdfs.statistics")) == errno.ENODATA


async def test_statfs_answers_while_etcd_is_away(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/f", b"x" * 10_000)
    async with open_mount(store) as mount:
        space = await mount.filesystem.statfs()
        assert (space.name_max, space.blocks - space.blocks_free) == (255, 3)
        store.fail_next("status", StoreUnavailableError("away"))
        assert await mount.filesystem.statfs() == space


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "number"),
    [(StoreFullError("full"), errno.ENOSPC), (OutcomeUnknownError("?"), errno.ETIMEDOUT)],
)
async def test_failed_changes_leave_everything_as_it_was(
    autojump_clock: MockClock, store: FakeStore, error: Exception, number: int
) -> None:
    store.put_now(b"/d/", b"")
    store.put_now(b"/f", b"1")
    async with open_mount(store) as mount:
        before = keys(store)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        for call in (
            lambda: mount.kernel.mkdir((b"new",)),
            lambda: mount.kernel.rmdir((b"d",)),
            lambda: mount.kernel.unlink((b"f",)),
            lambda: mount.kernel.rename((b"f",), (b"g",)),
            lambda: mount.kernel.open((b"new",), flags),
        ):
            store.fail_next("commit", error)
            assert await errno_of(call()) == number
            assert keys(store) == before
            await quiet(mount)
            assert sorted(await mount.kernel.listdir(())) == [b"d", b"f"]
            assert not mount.view.update.intents
            assert not mount.view.update.locked


async def test_read_only_mount_refuses_every_change(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/f", b"1")
    store.put_now(b"/d/", b"")
    async with open_mount(store, cache=cache, read_only=True) as mount:
        inode = await mount.kernel.walk((b"f",))
        for call in (
            mount.kernel.mkdir((b"new",)),
            mount.kernel.mknod((b"new",)),
            mount.kernel.rmdir((b"d",)),
            mount.kernel.unlink((b"f",)),
            mount.kernel.rename((b"f",), (b"g",)),
            mount.kernel.open((b"new",), os.O_WRONLY | os.O_CREAT),
            mount.kernel.open((b"f",), os.O_WRONLY),
            mount.kernel.truncate(inode, 0),
        ):
            assert await errno_of(call) == errno.EROFS
        assert await content(mount, (b"f",)) == b"1"
        assert not [c for c in store.commit_calls if any(isinstance(o, Put) for o in c.then)]


async def test_a_directory_that_was_removed_never_comes_back_even_if_the_watch_was_first(
    autojump_clock: MockClock, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the kernel it is dead: whoever is in it must not see what others make in its place."""
    store.put_now(b"/d/", b"")
    commit = store.commit

    async def late(transaction: Transaction) -> Committed:
        committed = await commit(transaction)
        await trio.testing.wait_all_tasks_blocked()
        return committed

    async with open_mount(store) as mount:
        held = await mount.kernel.walk((b"d",))
        monkeypatch.setattr(store, "commit", late)
        await mount.kernel.rmdir((b"d",))
        store.put_now(b"/d/x", b"1")
        await trio.testing.wait_all_tasks_blocked()
        assert (await mount.kernel.stat((b"d",))).inode != held.number
