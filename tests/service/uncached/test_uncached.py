"""Asking etcd at every call: what is asked, how much of it, and what is kept."""

import os

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from etcdfs.errors import CompactedError
from etcdfs.keyspace.attribute_records import is_record_key, record_key
from etcdfs.keyspace.store import Get, Put, Transaction
from etcdfs.uncached.uncached import MAX_LISTINGS
from tests.support.fake_kernel import FakeMount, Path, open_mount
from tests.support.fake_store import FakeStore

LONG = b"x" * 600  # shown as two names, one below the other


async def content(mount: FakeMount, path: Path) -> bytes:
    handle = await mount.kernel.open(path, os.O_RDONLY)
    try:
        return await mount.kernel.read(handle)
    finally:
        await mount.kernel.close(handle)


async def test_foreign_changes_are_seen_at_once(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    async with open_mount(store, cache=False) as mount:
        for value in (b"1", b"2", b"3"):
            store.put_now(b"/d/f", value)
            assert await content(mount, (b"d", b"f")) == value
        store.delete_now(b"/d/f")
        assert await mount.kernel.listdir(()) == []


async def test_the_kernel_caches_nothing(autojump_clock: MockClock, store: FakeStore) -> None:
    store.put_now(b"/f", b"1")
    async with open_mount(store, cache=False) as mount:
        assert (await mount.kernel.stat((b"f",))).timeout_s == 0.0
        before = len(store.commit_calls)
        await mount.kernel.stat((b"f",))
        assert len(store.commit_calls) > before


async def test_listing_a_level_does_not_depend_on_what_is_below(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    for directory in range(5):
        puts = tuple(Put(b"/%d/%03d/x" % (directory, i), b"v" * 100) for i in range(100))
        store.commit_now(Transaction(then=puts))
    store.put_now(b"/f", b"1")
    async with open_mount(store, cache=False) as mount:
        before = len(store.range_calls)
        names = sorted(await mount.kernel.listdir(()))
        assert names == [b"0", b"1", b"2", b"3", b"4", b"f"]
        asked = store.range_calls[before:]
        assert len(asked) <= 2 * 6 + 2
        with_values = [call for call in asked if not call.keys_only]
        assert [(call.start, call.end) for call in with_values] == [
            (b"/f", b"/f\0"),
            (b"/.etcdfs/attrs//", b"/.etcdfs/attrs/0"),
        ]


async def test_listing_is_of_one_revision(autojump_clock: MockClock, store: FakeStore) -> None:
    for i in range(300):
        store.put_now(b"/d/%03d" % i, b"%d" % i)
    async with open_mount(store, cache=False) as mount:
        before = len(store.range_calls)
        names = await mount.kernel.listdir((b"d",))
        assert sorted(names) == [b"%03d" % i for i in range(300)]
        revisions = {call.revision for call in store.range_calls[before:]}
        assert revisions == {0, store.revision}


async def test_values_that_are_known_are_not_fetched_again(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    for name in (b"a", b"b", b"c"):
        store.put_now(b"/d/" + name, name)
    async with open_mount(store, cache=False) as mount:
        await mount.kernel.listdir((b"d",))
        before = len(store.range_calls)
        await mount.kernel.listdir((b"d",))
        others = [c for c in store.range_calls[before:] if not is_record_key(c.start)]
        assert all(call.keys_only or call.end is None for call in others)


async def test_listing_begins_anew_when_its_revision_is_compacted(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/f", b"1")
    async with open_mount(store, cache=False) as mount:
        store.fail_next("range", CompactedError("gone", 5), times=MAX_LISTINGS - 1)
        assert await mount.kernel.listdir(()) == [b"f"]
        store.fail_next("range", CompactedError("gone", 5), times=MAX_LISTINGS)
        with pytest.raises(OSError, match="gone"):
            await mount.kernel.listdir(())


async def test_key_that_is_a_file_and_a_directory(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/d", b"value")
    store.put_now(b"/d/", b"marker")
    store.put_now(b"/d/f", b"1")
    store.put_now(b"/d-e", b"2")
    async with open_mount(store, cache=False) as mount:
        assert sorted(await mount.kernel.listdir(())) == [b"d", b"d-e"]
        assert sorted(await mount.kernel.listdir((b"d",))) == [b"%marker", b"%value", b"f"]
        assert await content(mount, (b"d", b"%value")) == b"value"
        assert await content(mount, (b"d", b"%marker")) == b"marker"
        store.delete_now(b"/d/")
        store.delete_now(b"/d/f")
        assert await content(mount, (b"d",)) == b"value"


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDWR | os.O_CREAT])
async def test_file_whose_name_becomes_a_directory_is_published_as_its_value(
    autojump_clock: MockClock, store: FakeStore, flags: int
) -> None:
    if not flags & os.O_CREAT:
        store.put_now(b"/f", b"old")
    async with open_mount(store, cache=False) as mount:
        handle = await mount.kernel.open((b"f",), flags)
        await mount.kernel.write(handle, 0, b"new")
        store.put_now(b"/f/below", b"1")
        assert await mount.kernel.listdir(()) == [b"f"]
        await mount.kernel.close(handle)
        assert await content(mount, (b"f", b"%value")) == b"new"


async def test_times_outlast_the_kernels_memory(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/d/e/f", b"1")
    store.put_now(b"/d/e/g", b"1")
    async with open_mount(store, cache=False) as mount:
        paths: list[Path] = [(), (b"d",), (b"d", b"e"), (b"d", b"e", b"f")]

        async def times() -> list[tuple[int, int]]:
            await trio.sleep(10)
            found = [await mount.kernel.stat(path) for path in paths]
            return [(attributes.mtime_ns, attributes.ctime_ns) for attributes in found]

        await times()  # what is seen first changes its directory
        first = await times()
        mount.kernel.evict_all()
        assert await times() == first

        mount.kernel.evict_all()
        store.put_now(b"/d/e/f", b"2")
        changed = await times()
        assert changed[:3] == first[:3]
        assert changed[3] > first[3]

        mount.kernel.evict_all()
        store.delete_now(b"/d/e/f")
        with pytest.raises(FileNotFoundError):
            await mount.kernel.stat((b"d", b"e", b"f"))
        store.put_now(b"/d/e/f", b"3")
        await times()
        new = await times()
        assert new[2] > changed[2], "a name has come"
        assert new[3] > changed[3]


async def test_long_names(autojump_clock: MockClock, store: FakeStore) -> None:
    """They are shown under names of several parts; etcd knows nothing of these."""
    store.put_now(b"/d/" + LONG, b"long")
    store.put_now(b"/d/" + LONG[:300], b"shorter")
    async with open_mount(store, cache=False) as mount:
        (part,) = await mount.kernel.listdir((b"d",))
        below = sorted(await mount.kernel.listdir((b"d", part)))
        assert len(below) == 2
        found: dict[bytes, bytes] = {}
        for name in below:
            if (await mount.kernel.stat((b"d", part, name))).size:
                found[name] = await content(mount, (b"d", part, name))
            else:
                (rest,) = await mount.kernel.listdir((b"d", part, name))
                found[name] = await content(mount, (b"d", part, name, rest))
        assert sorted(found.values()) == [b"long", b"shorter"]


async def test_looking_for_part_of_a_long_name_is_about_nothing_else(
    autojump_clock: MockClock, store: FakeStore, nursery: trio.Nursery
) -> None:
    store.put_now(b"/" + LONG, b"long")
    go_on, looked = trio.Event(), trio.Event()

    async def pace() -> None:
        if len(store.range_calls) > 1 and not looked.is_set():  # the scan for keys is over
            looked.set()
            await go_on.wait()

    async with open_mount(store, cache=False) as mount:
        (part,) = await mount.kernel.listdir(())
        store.range_calls.clear()
        store.pace = pace
        nursery.start_soon(mount.filesystem.lookup, 1, part)
        await looked.wait()
        handle = await mount.kernel.open((b"f",), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        go_on.set()
        await trio.testing.wait_all_tasks_blocked()
        await mount.kernel.write(handle, 0, b"kept")
        await mount.kernel.close(handle)
        assert store.range_now(b"/f").entries[0].value == b"kept"


async def test_nothing_is_kept_that_nobody_refers_to(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    for i in range(50):
        store.put_now(b"/d%d/f" % (i % 5), b"%d" % i)
    async with open_mount(store, cache=False) as mount:
        for name in await mount.kernel.listdir(()):
            await content(mount, (name, b"f"))
        mount.kernel.evict_all()
        assert mount.tree.statistics().inodes_known == 1
        assert not mount.tree.root.children


async def test_whole_keyspace(autojump_clock: MockClock, store: FakeStore) -> None:
    for key in (b"plain", b"/rooted", b"\xff\xff"):
        store.put_now(key, key)
    async with open_mount(store, cache=False, prefix=b"") as mount:
        assert sorted(await mount.kernel.listdir(())) == [b"%=", b"plain", b"\xff\xff"]
        assert await content(mount, (b"%=", b"rooted")) == b"/rooted"


async def test_file_in_a_directory_that_went_keeps_its_key(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """It must never be published under another key."""
    store.put_now(b"/d/e/f", b"1")
    store.put_now(b"/f", b"root")
    async with open_mount(store, cache=False) as mount:
        old = await mount.kernel.open((b"d", b"e", b"f"), os.O_WRONLY | os.O_TRUNC)
        new = await mount.kernel.open((b"d", b"e", b"new"), os.O_WRONLY | os.O_CREAT)
        store.delete_now(b"/d/e/f")
        assert (await mount.kernel.stat((b"d",))).nlink >= 2, "an unpublished file keeps it"
        assert await mount.kernel.listdir(()) == [b"d", b"f"]
        await mount.kernel.write(old, 0, b"dropped")
        await mount.kernel.close(old)
        await mount.kernel.write(new, 0, b"new")
        await mount.kernel.close(new)
        entries = store.range_now(b"/", b"0").entries
        assert {e.key: e.value for e in entries} == {b"/f": b"root", b"/d/e/new": b"new"}


async def test_open_file_in_a_directory_that_went_is_gone(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """Even if a key that its remaining path would make was made in the same transaction."""
    store.commit_now(Transaction(then=(Put(b"/d/e/f", b"1"), Put(b"/e/f", b"2"))))
    async with open_mount(store, cache=False) as mount:
        handle = await mount.kernel.open((b"d", b"e", b"f"), os.O_RDWR)
        store.delete_now(b"/d/e/f")
        assert await mount.kernel.listdir(()) == [b"e"]
        await mount.kernel.write(handle, 0, b"dropped")
        assert await mount.kernel.read(handle) == b"dropped"
        await mount.kernel.close(handle)
        entries = store.range_now(b"/", b"0").entries
        assert {e.key: e.value for e in entries} == {b"/e/f": b"2"}


def ranges_asked(store: FakeStore, since: int) -> list[bytes]:
    """Return the starts of all ranges, but those of single keys, that transactions asked for."""
    return [
        operation.key
        for transaction in store.commit_calls[since:]
        for operation in transaction.then
        if isinstance(operation, Get) and operation.end is not None
    ]


@pytest.mark.parametrize("marker", [True, False])
async def test_a_directory_that_is_known_is_asked_for_by_one_key(
    autojump_clock: MockClock, store: FakeStore, marker: bool
) -> None:
    """Of a range, etcd walks all, however little is asked for."""
    if marker:
        store.put_now(b"/d/", b"")
    for n in range(3):
        store.put_now(b"/d/e/%d" % n, b"v")
    async with open_mount(store, cache=False) as mount:
        await mount.kernel.stat((b"d", b"e", b"0"))
        before = len(store.commit_calls)
        await mount.kernel.stat((b"d", b"e", b"1"))
        assert b"/d/" not in ranges_asked(store, before)
        assert b"/d/e/" not in ranges_asked(store, before)
        store.delete_now(b"/d/e/0")
        store.delete_now(b"/d/")
        await mount.kernel.stat((b"d", b"e", b"1"))
        before = len(store.commit_calls)
        await mount.kernel.stat((b"d", b"e", b"1"))
        assert set(ranges_asked(store, before)) == {b"/d/e/1/"}
        store.put_now(b"/d/", b"")
        store.put_now(record_key(b"/d/"), b'{"uid":5}')
        assert (await mount.kernel.stat((b"d",))).uid == 5, "its own marker is looked at"
        store.delete_now(b"/d/", b"/d0")
        with pytest.raises(FileNotFoundError):
            await mount.kernel.stat((b"d",))


async def test_a_directory_that_has_moved_is_not_shown_by_a_key_it_had(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/d/a", b"v")
    async with open_mount(store, cache=False) as mount:
        await mount.kernel.stat((b"d", b"a"))
        await mount.kernel.rename((b"d",), (b"moved",))
        store.put_now(b"/d/a", b"other")
        store.delete_now(b"/moved/a")
        with pytest.raises(FileNotFoundError):
            await mount.kernel.stat((b"moved",))


async def test_an_answer_from_before_a_file_was_made_does_not_take_it_away(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """Who has it open goes on appending; it was taken for deleted, and nobody was told."""
    store.put_now(b"/e", b"1")

    async def hold_the_second() -> None:
        if len(store.range_calls) == 2:
            store.hold("range")

    async with open_mount(store, cache=False) as mount, trio.open_nursery() as nursery:
        append = os.O_WRONLY | os.O_APPEND
        one = await mount.kernel.open((b"f",), append | os.O_CREAT)
        two = await mount.kernel.open((b"f",), append)
        await mount.kernel.write(one, 0, b"one ")
        store.pace = hold_the_second
        nursery.start_soon(mount.kernel.listdir, ())
        await trio.testing.wait_all_tasks_blocked()  # names are listed, values yet to be read
        await mount.kernel.close(one)
        store.pace = None
        store.release("range")
        await trio.testing.wait_all_tasks_blocked()
        await mount.kernel.write(two, 4, b"two ")
        await mount.kernel.close(two)
        found = store.current(b"/f")
        assert found is not None
        assert found.value == b"one two "
        store.delete_now(b"/f")
        assert await mount.kernel.listdir(()) == [b"e"]


async def test_a_directory_that_is_held_is_found_again_with_those_above_it(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """Nobody comes by its path: a working directory, a bind mount."""
    store.put_now(b"/a/b/f", b"1")
    async with open_mount(store, cache=False) as mount:
        above = await mount.kernel.walk((b"a",))
        held = await mount.kernel.walk((b"a", b"b"))
        store.delete_now(b"/a/b/f")
        assert await mount.kernel.listdir(()) == []
        store.put_now(b"/a/b/g", b"2")
        assert (await mount.kernel.fstat(held)).inode == held.number
        assert mount.tree.is_attached(mount.tree.node(held.number))
        assert (await mount.kernel.stat((b"a",))).inode == above.number
        assert await mount.kernel.listdir((b"a", b"b")) == [b"g"]
