"""Renames of whole directories and exchanges: one transaction, whatever happens meanwhile."""

import errno
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from etcdfs.errors import EtcdfsError, StorePermissionError
from etcdfs.keyspace.attribute_records import Record, encode, record_key
from etcdfs.keyspace.store import Committed, Get, Put, Transaction
from etcdfs.tree.inodes import Directory, File
from tests.support.fake_kernel import FakeMount, Path, open_mount
from tests.support.fake_store import FakeStore

NOREPLACE = 1
EXCHANGE = 2
WHITEOUT = 4

CLOSED = "attributes cannot be read: all is its owner's alone (%s); --no-attrs opens it"


def keys(store: FakeStore) -> dict[bytes, bytes]:
    found = store.range_now(b"/", b"0").entries
    return {kv.key: kv.value for kv in found if not kv.key.startswith(b"/.etcdfs/")}


async def errno_of(call: Awaitable[Any]) -> int:
    try:
        await call
    except (OSError, EtcdfsError) as exc:
        return exc.errno or -1
    return 0


async def racing(
    store: FakeStore,
    call: Callable[[], Awaitable[Any]],
    *changes: Callable[[], Any],
    after: bool = False,
) -> int:
    """Make a call; other clients commit before (or after) each of its commits. Return its errno."""
    commit = store.commit
    left = list(changes)

    async def intercept(transaction: Transaction) -> Committed:
        asks = all(isinstance(o, Get) for o in transaction.then)
        if left and not asks and not after:
            left.pop(0)()
            await trio.testing.wait_all_tasks_blocked()
        committed = await commit(transaction)
        if left and not asks and after:
            left.pop(0)()
            await trio.testing.wait_all_tasks_blocked()
        return committed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "commit", intercept)
        number = await errno_of(call())
    assert not left, "it committed less often"
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


TREE = {b"/d/": b"", b"/d/f": b"1", b"/d/e/g": b"2", b"/d/e/h/": b"", b"/d-x": b"", b"/d0": b""}


def fill(store: FakeStore, entries: dict[bytes, bytes]) -> None:
    for key, value in entries.items():
        store.put_now(key, value)


def moved(entries: dict[bytes, bytes], old: bytes, new: bytes) -> dict[bytes, bytes]:
    return {
        new + key[len(old) :] if key == old or key.startswith(old + b"/") else key: value
        for key, value in entries.items()
    }


@pytest.mark.parametrize("size", [1, 37, 36 * 36 + 1])
async def test_a_directory_of_any_size_is_one_revision(
    autojump_clock: MockClock, store: FakeStore, cache: bool, size: int
) -> None:
    entries = {b"/d/%d" % n: b"%d" % n for n in range(size)}
    fill(store, entries)
    async with open_mount(store, cache=cache) as mount:
        before = store.revision
        inode = (await mount.kernel.walk((b"d", b"0"))).number
        await mount.kernel.rename((b"d",), (b"e",))
        assert store.revision == before + 1
        assert keys(store) == moved(entries, b"/d", b"/e")
        assert (await mount.kernel.walk((b"e", b"0"))).number == inode
        assert await content(mount, (b"e", b"0")) == b"0"
        assert await errno_of(mount.kernel.walk((b"d",))) == errno.ENOENT
        await quiet(mount)


async def test_all_below_goes_along_and_keeps_its_inodes(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    odd = {
        b"/d": b"value",
        b"/d//x": b"3",
        b"/d/./y": b"4",
        b"/d/\0": b"5",
        b"/d/" + b"n" * 300: b"6",
    }
    entries = {**TREE, **odd, b"/t/": b""}
    entries[b"/d/"] = b"a marker's value"
    fill(store, entries)
    lease = await store.lease_grant(60)
    store.commit_now(Transaction(then=(Put(b"/d/leased", b"7", lease=lease),)))
    entries[b"/d/leased"] = b"7"
    paths: list[Path] = [(), (b"f",), (b"e",), (b"e", b"g"), (b"%value",), (b"%marker",)]
    async with open_mount(store, cache=cache) as mount:
        inodes = [(await mount.kernel.walk((b"d", *path))).number for path in paths]
        await mount.kernel.rename((b"d",), (b"t", b"n"))
        assert keys(store) == moved(entries, b"/d", b"/t/n")
        assert inodes == [(await mount.kernel.walk((b"t", b"n", *path))).number for path in paths]
        assert await content(mount, (b"t", b"n", b"%=", b"x")) == b"3"
        assert await content(mount, (b"t", b"n", b"%=%00")) == b"5"
        found = store.current(b"/t/n/leased")
        assert found is not None
        assert found.lease == lease
        await quiet(mount)


async def test_what_is_open_below_goes_on_under_its_new_name(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    fill(store, {b"/d/f": b"1", b"/d/read": b"2"})
    async with open_mount(store, cache=cache) as mount:
        reader = await mount.kernel.open((b"d", b"read"), os.O_RDONLY)
        writer = await mount.kernel.open((b"d", b"f"), os.O_RDWR)
        await mount.kernel.write(writer, 1, b"x")
        made = await mount.kernel.open((b"d", b"new"), os.O_RDWR | os.O_CREAT)
        await mount.kernel.write(made, 0, b"made")
        await mount.kernel.rename((b"d",), (b"e",))
        assert keys(store) == {b"/e/f": b"1", b"/e/read": b"2"}
        await mount.kernel.close(writer)
        await mount.kernel.close(made)
        assert keys(store) == {b"/e/f": b"1x", b"/e/read": b"2", b"/e/new": b"made"}
        assert await mount.kernel.read(reader) == b"2"
        await mount.kernel.close(reader)
        await quiet(mount)


async def test_what_is_closed_meanwhile_is_not_lost(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """A close that comes between the commit and its answer waits for the move."""
    fill(store, {b"/d/f": b"1"})
    async with open_mount(store, cache=cache) as mount, trio.open_nursery() as nursery:
        writer = await mount.kernel.open((b"d", b"f"), os.O_RDWR)
        await mount.kernel.write(writer, 0, b"two")
        number = await racing(
            store,
            lambda: mount.kernel.rename((b"d",), (b"e",)),
            lambda: nursery.start_soon(mount.kernel.close, writer),
            after=True,
        )
        assert number == 0
        await trio.testing.wait_all_tasks_blocked()
        assert keys(store) == {b"/e/f": b"two"}
        await quiet(mount)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.put_now(b"/d/f", b"theirs"), {b"/e/f": b"theirs", b"/e/g": b"2"}),
        (lambda s: s.put_now(b"/d/new", b"3"), {b"/e/f": b"1", b"/e/g": b"2", b"/e/new": b"3"}),
        (lambda s: s.delete_now(b"/d/g"), {b"/e/f": b"1"}),
        (lambda s: s.put_now(b"/d", b"own"), {b"/e": b"own", b"/e/f": b"1", b"/e/g": b"2"}),
        (lambda s: s.put_now(b"/e/", b""), {b"/e/f": b"1", b"/e/g": b"2"}),
    ],
    ids=["changed", "added", "deleted", "own", "target"],
)
async def test_a_foreign_change_meanwhile_goes_along(
    autojump_clock: MockClock,
    store: FakeStore,
    cache: bool,
    change: Callable[[FakeStore], object],
    expected: dict[bytes, bytes],
) -> None:
    fill(store, {b"/d/f": b"1", b"/d/g": b"2"})
    async with open_mount(store, cache=cache) as mount:
        for path in ((b"d", b"f"), (b"d", b"g")):
            await mount.kernel.walk(path)
        number = await racing(
            store, lambda: mount.kernel.rename((b"d",), (b"e",)), lambda: change(store)
        )
        assert number == 0
        assert keys(store) == expected
        await quiet(mount)
        for key, value in expected.items():
            shown = key[1:] if key != b"/e" else b"e/%value"
            assert await content(mount, tuple(shown.split(b"/"))) == value


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (lambda s: s.delete_now(b"/d/", b"/d0"), errno.ENOENT),
        (lambda s: s.put_now(b"/e", b"file"), errno.ENOTDIR),
        (lambda s: s.put_now(b"/e/x", b""), errno.ENOTEMPTY),
        (lambda s: s.put_now(b"/e/", b"annotated"), errno.ENOTEMPTY),
    ],
    ids=["gone", "file", "full", "value"],
)
async def test_a_foreign_change_that_forbids_it(
    autojump_clock: MockClock,
    store: FakeStore,
    cache: bool,
    change: Callable[[FakeStore], object],
    number: int,
) -> None:
    fill(store, {b"/d/f": b"1"})
    async with open_mount(store, cache=cache) as mount:
        found = await racing(
            store, lambda: mount.kernel.rename((b"d",), (b"e",)), lambda: change(store)
        )
        assert found == number
        assert (b"/d/f" in keys(store)) == (number != errno.ENOENT)
        await quiet(mount)


async def test_races_are_lost_only_so_often(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    fill(store, {b"/d/f": b"1"})
    async with open_mount(store, cache=cache) as mount:
        number = await racing(
            store,
            lambda: mount.kernel.rename((b"d",), (b"e",)),
            *([lambda: store.put_now(b"/d/f", b"again")] * 16),
        )
        assert number == errno.ESTALE
        assert keys(store) == {b"/d/f": b"again"}
        await quiet(mount)


@pytest.mark.parametrize("flags", [0, NOREPLACE])
async def test_over_an_empty_directory(
    autojump_clock: MockClock, store: FakeStore, cache: bool, flags: int
) -> None:
    fill(store, {b"/p/d/f": b"1", b"/q/e/": b""})
    async with open_mount(store, cache=cache) as mount:
        number = await errno_of(mount.kernel.rename((b"p", b"d"), (b"q", b"e"), flags))
        if flags:
            assert number == errno.EEXIST
            assert keys(store) == {b"/p/d/f": b"1", b"/q/e/": b""}
        else:
            assert number == 0
            assert keys(store) == {b"/p/": b"", b"/q/e/f": b"1"}
        await quiet(mount)


@pytest.mark.parametrize(
    ("new", "number"),
    [
        ((b"f",), errno.ENOTDIR),
        ((b"full",), errno.ENOTEMPTY),
        ((b"d", b"x"), errno.EINVAL),
        ((b"missing", b"x"), errno.ENOENT),
        ((b"full", b"%value"), errno.EPERM),
        ((b"n" * 256,), errno.ENAMETOOLONG),
    ],
)
async def test_what_cannot_be(
    autojump_clock: MockClock, store: FakeStore, cache: bool, new: Path, number: int
) -> None:
    entries = {b"/d/f": b"1", b"/f": b"2", b"/full/x": b"3"}
    fill(store, entries)
    async with open_mount(store, cache=cache) as mount:
        assert await errno_of(mount.kernel.rename((b"d",), new)) == number
        assert await errno_of(mount.kernel.rename((b"d",), (b"x",), WHITEOUT)) == errno.EINVAL
        assert keys(store) == entries
        await quiet(mount)


async def test_a_file_takes_no_name_that_stands_for_no_key(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """The root of a keyspace is no key."""
    entries = {b"/d/f": b"1", b"/f": b"2"}
    fill(store, entries)
    async with open_mount(store, cache=cache) as mount:
        assert await errno_of(mount.kernel.rename((b"f",), (b"%value",))) == errno.EPERM
        assert keys(store) == entries
        await quiet(mount)


@pytest.mark.parametrize("kind", ["bytes", "keys"])
async def test_what_is_too_large_does_not_move(
    autojump_clock: MockClock,
    store: FakeStore,
    cache: bool,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "keys":
        monkeypatch.setattr("etcdfs.keyspace.transactions.MAX_KEYS", 8)
    value = bytes(10 if kind == "keys" else 200_000)
    entries = {b"/d/%d" % n: value for n in range(9)}
    fill(store, entries)
    async with open_mount(store, cache=cache) as mount:
        assert await errno_of(mount.kernel.rename((b"d",), (b"e",))) == errno.EXDEV
        assert keys(store) == entries
        await quiet(mount)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({b"/a": b"1"}, {b"/b": b"2"}),
        ({b"/a/x": b"1", b"/a/y": b"2"}, {b"/b/": b"", b"/b/x": b"3", b"/b/z/w": b"4"}),
        ({b"/a": b"1"}, {b"/b/x": b"2", b"/b": b"3"}),
    ],
    ids=["files", "directories", "mixed"],
)
async def test_exchange(
    autojump_clock: MockClock,
    store: FakeStore,
    cache: bool,
    first: dict[bytes, bytes],
    second: dict[bytes, bytes],
) -> None:
    fill(store, {**first, **second})
    async with open_mount(store, cache=cache) as mount:
        before = store.revision
        inodes = [(await mount.kernel.walk((name,))).number for name in (b"a", b"b")]
        await mount.kernel.rename((b"a",), (b"b",), EXCHANGE)
        assert store.revision == before + 1
        expected = {**moved(first, b"/a", b"/b"), **moved(second, b"/b", b"/a")}
        assert keys(store) == expected
        found = [(await mount.kernel.walk((name,))).number for name in (b"b", b"a")]
        assert found == inodes
        await quiet(mount)
        for key, value in expected.items():
            path = tuple(key[1:].rstrip(b"/").split(b"/"))
            is_value = any(other.startswith(key + b"/") for other in expected)
            if not key.endswith(b"/"):
                assert await content(mount, (*path, b"%value") if is_value else path) == value


async def test_exchange_of_what_changes_meanwhile(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    fill(store, {b"/a": b"1", b"/b/x": b"2"})
    async with open_mount(store, cache=cache) as mount:
        number = await racing(
            store,
            lambda: mount.kernel.rename((b"a",), (b"b",), EXCHANGE),
            lambda: store.put_now(b"/a", b"newer"),
            lambda: store.put_now(b"/b/y", b"3"),
        )
        assert number == 0
        assert keys(store) == {b"/b": b"newer", b"/a/x": b"2", b"/a/y": b"3"}
        await quiet(mount)
        assert await content(mount, (b"b",)) == b"newer"
        number = await racing(
            store,
            lambda: mount.kernel.rename((b"a",), (b"b",), EXCHANGE),
            lambda: store.delete_now(b"/b"),
        )
        assert number == errno.ENOENT
        await quiet(mount)


async def test_attributes_go_along(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    fill(store, {b"/d/f": b"1", b"/d/": b"", b"/g": b"2"})
    for key, mode in ((b"/d/f", 0o600), (b"/d/", 0o700), (b"/g", 0o640)):
        store.put_now(record_key(key), encode(Record(mode=mode)))

    def modes() -> set[bytes]:
        found = store.range_now(b"/.etcdfs/", b"/.etcdfs0").entries
        return {kv.key.removeprefix(b"/.etcdfs/attrs/") for kv in found}

    async def permissions(*path: bytes) -> int:
        inode = await mount.kernel.walk(path)
        return (await mount.filesystem.getattr(inode.number)).mode & 0o777

    async with open_mount(store, cache=cache) as mount:
        await mount.kernel.rename((b"d",), (b"e",))
        assert modes() == {b"/e/f", b"/e/", b"/g"}
        assert (await permissions(b"e"), await permissions(b"e", b"f")) == (0o700, 0o600)
        await mount.kernel.rename((b"e", b"f"), (b"h",))
        assert modes() == {b"/h", b"/e/", b"/g"}
        assert await permissions(b"h") == 0o600
        await mount.kernel.rename((b"h",), (b"g",), EXCHANGE)
        assert (await permissions(b"h"), await permissions(b"g")) == (0o640, 0o600)
        await mount.kernel.rename((b"h",), (b"g",))
        assert modes() == {b"/g", b"/e/"}
        assert await permissions(b"g") == 0o640
        store.put_now(b"/plain", b"")
        await trio.testing.wait_all_tasks_blocked()
        await mount.kernel.rename((b"plain",), (b"g",))
        assert modes() == {b"/e/"}
        assert await permissions(b"g") == 0o644
        await quiet(mount)


@pytest.mark.expect_log("attributes cannot be written: %s")
@pytest.mark.expect_log(CLOSED)
@pytest.mark.parametrize("name", [b"d", b"g"])
@pytest.mark.parametrize("known", [True, False])
async def test_without_rights_on_attributes_content_moves_unless_they_would_be_lost(
    autojump_clock: MockClock, store: FakeStore, cache: bool, name: bytes, known: bool
) -> None:
    """What is kept from others must not be open to all under its new name."""
    fill(store, {b"/d/f": b"1", b"/g": b"2"})
    before = keys(store)
    if known:
        for key in (b"/d/f", b"/g"):
            store.put_now(record_key(key), encode(Record(mode=0o600)))
    async with open_mount(store, cache=cache) as mount:
        for path in ((b"d", b"f"), (b"g",)):
            await mount.kernel.walk(path)
        commit = store.commit

        async def forbid(transaction: Transaction) -> Committed:
            if b"/.etcdfs/" in repr(transaction).encode():
                raise StorePermissionError("permission denied")
            return await commit(transaction)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "commit", forbid)
            if known:
                with pytest.raises(PermissionError):
                    await mount.kernel.rename((name,), (b"e",))
            else:
                await mount.kernel.rename((name,), (b"e",))
        after = {key.replace(b"/" + name, b"/e"): value for key, value in before.items()}
        assert keys(store) == (before if known else after)
        await quiet(mount)


async def test_a_change_below_waits_for_the_move(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """Or it would bring back the old directory."""
    fill(store, {b"/d/e/f": b"1"})
    async with open_mount(store, cache=cache) as mount:
        inode = (await mount.kernel.walk((b"d", b"e"))).number
        async with trio.open_nursery() as nursery:
            number = await racing(
                store,
                lambda: mount.kernel.rename((b"d",), (b"n",)),
                lambda: nursery.start_soon(mount.filesystem.mkdir, inode, b"made"),
                after=True,
            )
        assert number == 0
        assert keys(store) == {b"/n/e/f": b"1", b"/n/e/made/": b""}
        node = mount.tree.node(inode)
        assert isinstance(node, Directory)
        assert b"made" in node.children


async def test_a_look_meanwhile_takes_nothing_away(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """Between the commit and its answer, etcd has nothing under the old names."""
    fill(store, {b"/d/f": b"1", b"/d/g": b"2"})
    async with open_mount(store, cache=cache) as mount, trio.open_nursery() as nursery:
        writer = await mount.kernel.open((b"d", b"f"), os.O_RDWR)
        await mount.kernel.write(writer, 0, b"new")
        inode = (await mount.kernel.walk((b"d",))).number

        def look() -> None:
            nursery.start_soon(mount.filesystem.lookup, 1, b"d")
            nursery.start_soon(mount.filesystem.lookup, inode, b"f")

        number = await racing(
            store, lambda: mount.kernel.rename((b"d",), (b"n",)), look, after=True
        )
        assert number == 0
        await mount.kernel.close(writer)
        assert keys(store) == {b"/n/f": b"new", b"/n/g": b"2"}
        assert (await mount.kernel.walk((b"n",))).number == inode
        await quiet(mount)


async def test_an_inode_that_is_made_old_while_it_is_renamed_is_known_by_the_new_name(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    fill(store, {b"/f": b"1"})
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open((b"f",), os.O_RDONLY)
        number = await racing(
            store,
            lambda: mount.kernel.rename((b"f",), (b"g",)),
            lambda: store.put_now(b"/f", b"newer"),
        )
        assert (number, keys(store)) == (0, {b"/g": b"newer"})
        await trio.testing.wait_all_tasks_blocked()
        file = mount.tree.node(handle.inode.number)
        assert isinstance(file, File)
        assert (file.lost_key, file.removed) == (b"/g", False)
        assert await mount.kernel.read(handle) == b"1"
        await mount.kernel.close(handle)
        await quiet(mount)
