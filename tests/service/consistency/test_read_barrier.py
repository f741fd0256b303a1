"""`--consistency linearizable`: a reader sees what etcd held when it came, or an error."""

from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from etcdfs.errors import StorePermissionError, StoreTimeoutError, StoreUnavailableError
from etcdfs.keyspace.attribute_records import record_key
from etcdfs.keyspace.store import Delete, Put, Transaction
from tests.service.mirrors import content, quiet
from tests.support.fake_kernel import FakeMount, open_mount
from tests.support.fake_store import FakeStore

TIMEOUT_S = 5.0


async def read_late(mount: FakeMount, store: FakeStore, *path: bytes) -> bytes | list[bytes] | None:
    """Read a file, or list a directory, while the watch comes a second late."""
    seen: list[bytes | list[bytes] | None] = []

    async def read() -> None:
        try:
            seen.append(await content(mount, path))
        except IsADirectoryError:
            seen.append(await mount.kernel.listdir(path))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.sleep(1)
        store.release_watches()
    return seen[0]


async def test_what_was_put_before_an_open_is_seen(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/d/f", b"one")
    async with open_mount(store, consistency="linearizable", timeout_s=TIMEOUT_S) as mount:
        assert await content(mount, (b"d", b"f")) == b"one"
        assert await content(mount, (b"d", b"new")) is None
        for change, path, expected in (
            (Put(b"/d/f", b"two"), (b"d", b"f"), b"two"),
            (Put(b"/d/new", b"three"), (b"d", b"new"), b"three"),
            (Delete(b"/d/f"), (b"d", b"f"), None),
            (Put(b"/e/f", b"four"), (b"e", b"f"), b"four"),
            (Put(b"/d/last", b""), (b"d",), [b"new", b"last"]),
            (Delete(b"/d/", b"/d0"), (b"d",), None),
        ):
            store.hold_watches()
            store.commit_now(Transaction(then=(change,)))
            assert await read_late(mount, store, *path) == expected, change
            await quiet(mount)
        assert mount.mirror.barrier is not None
        assert mount.mirror.barrier.waits >= 6


async def test_other_peoples_revisions_do_not_hold_anybody(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """The mirror of a prefix never reaches the revision of a key outside of it."""
    for key in (b"/app/d/f", b"/app/v", b"/app/v/below", b"/app/empty/", b"/app/d/"):
        store.put_now(key, b"")
    async with open_mount(
        store, prefix=b"/app/", consistency="linearizable", timeout_s=TIMEOUT_S
    ) as mount:
        store.put_now(b"/other", b"1")
        began = trio.current_time()
        assert await content(mount, (b"d", b"f")) == b""
        assert await content(mount, (b"d", b"missing")) is None
        assert await content(mount, (b"missing", b"f")) is None
        assert await mount.kernel.listdir(()) == [b"d", b"empty", b"v"]
        assert await mount.kernel.listdir((b"v",)) == [b"%value", b"below"]
        assert await mount.kernel.listdir((b"empty",)) == []
        await mount.kernel.stat((b"v", b"%value"))
        assert trio.current_time() == began
        # Nor is anything older shown than was put before them.
        store.hold_watches()
        store.put_now(b"/app/d/f", b"two")
        store.put_now(b"/other", b"2")
        assert await read_late(mount, store, b"d", b"f") == b"two"
        store.hold_watches()
        store.put_now(b"/app/d/g", b"new")
        store.delete_now(b"/app/d/f")
        store.put_now(b"/other", b"3")
        assert await read_late(mount, store, b"d") == [b"g"]
        store.hold_watches()
        store.delete_now(b"/app/d/", b"/app/d0")
        store.put_now(b"/other", b"4")
        assert await read_late(mount, store, b"d") is None


@pytest.mark.parametrize("prefix", [b"/", b"/app/"])
async def test_attributes_that_others_set_before_are_seen(
    autojump_clock: MockClock, store: FakeStore, prefix: bytes
) -> None:
    """Whether record keys come by the mirror's own watch or not, and whose revision is the newest."""
    top = () if prefix == b"/app/" else (b"app",)
    for key in (b"/app/d/", b"/app/d/f", b"/app/d/g"):
        store.put_now(key, b"")
    async with open_mount(
        store, prefix=prefix, consistency="linearizable", timeout_s=TIMEOUT_S
    ) as mount:
        seen: dict[tuple[bytes, ...], int] = {}

        async def look(path: tuple[bytes, ...]) -> None:
            seen[path] = (await mount.kernel.stat((*top, *path))).mode & 0o7777

        async def look_all(*paths: tuple[bytes, ...]) -> list[int]:
            seen.clear()
            store.put_now(b"elsewhere", b"")  # in no mirror's reach
            async with trio.open_nursery() as nursery:
                for path in paths:
                    nursery.start_soon(look, path)
                await trio.sleep(1)
                store.release_watches()
            await quiet(mount)
            return [seen[path] for path in paths]

        file, other, directory = (b"d", b"f"), (b"d", b"g"), (b"d",)
        assert await look_all(file, other, directory) == [0o644, 0o644, 0o755]
        store.hold_watches()
        store.put_now(record_key(b"/app/d/f"), b'{"mode":"0600"}')
        store.put_now(record_key(b"/app/d/"), b'{"mode":"0700"}')
        assert await look_all(file, other, directory) == [0o600, 0o644, 0o700]
        store.hold_watches()
        store.delete_now(record_key(b"/app/d/f"))
        store.put_now(record_key(b"/app/d/g"), b'{"mode":"0400"}')
        assert await look_all(file, other) == [0o644, 0o400]
        # A listing has the attributes of what it lists.
        store.hold_watches()
        store.delete_now(record_key(b"/app/d/g"))
        store.put_now(record_key(b"/app/d/f"), b'{"mode":"0440"}')
        listed: list[int] = []

        async def list_them() -> None:
            node = await mount.kernel.stat((*top, *directory))
            opened = await mount.filesystem.opendir(node.inode)
            listed.extend(
                mount.filesystem.attributes(entry.node).mode & 0o7777
                for entry in await mount.filesystem.readdir(opened, 0)
            )
            await mount.filesystem.releasedir(opened)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(list_them)
            await trio.sleep(1)
            store.release_watches()
        assert listed == [0o440, 0o644]


async def test_attributes_whose_own_watch_is_late_are_seen(
    autojump_clock: MockClock, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mirror has reached etcd's revision, and its attributes have not."""
    store.put_now(b"/app/f", b"")
    async with open_mount(store, prefix=b"/app/", consistency="linearizable") as mount:
        stored_records, come = mount.mirror.stored_records, trio.Event()
        assert stored_records is not None
        on_time = stored_records._apply

        async def late(*arguments: Any, **named: Any) -> None:
            await come.wait()
            await on_time(*arguments, **named)

        monkeypatch.setattr(stored_records, "_apply", late)
        store.put_now(record_key(b"/app/f"), b'{"mode":"0600"}')
        store.put_now(b"/app/g", b"")
        await quiet(mount)
        assert mount.mirror.revision == store.revision
        seen: list[int] = []

        async def look() -> None:
            seen.append((await mount.kernel.stat((b"f",))).mode & 0o7777)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await trio.sleep(1)
            assert seen == []
            come.set()
        assert seen == [0o600]


@pytest.mark.expect_log(
    "attributes cannot be read: all is its owner's alone (%s); --no-attrs opens it"
)
async def test_rights_to_attributes_that_are_lost_hold_nobody(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/app/f", b"one")
    async with open_mount(store, prefix=b"/app/", consistency="linearizable") as mount:
        store.fail_next("commit", StorePermissionError("permission denied"))
        assert await content(mount, (b"f",)) == b"one"
        assert not mount.tree.rights.readable
        await trio.sleep(10)
        assert mount.tree.rights.readable, "it is tried again"


async def test_a_watch_that_does_not_come_is_an_error(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/f", b"one")
    async with open_mount(store, consistency="linearizable", timeout_s=TIMEOUT_S) as mount:
        store.hold_watches()
        store.put_now(b"/f", b"two")
        began = trio.current_time()
        with pytest.raises(StoreTimeoutError):
            await mount.filesystem.lookup(1, b"f")
        assert trio.current_time() - began == pytest.approx(TIMEOUT_S)
        store.release_watches()


async def test_an_etcd_that_does_not_answer_is_an_error_for_all_in_time(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/f", b"one")
    async with open_mount(store, consistency="linearizable", timeout_s=TIMEOUT_S) as mount:
        store.hold("range")
        began = trio.current_time()
        failures = 0

        async def look() -> None:
            nonlocal failures
            with pytest.raises(StoreTimeoutError):
                await mount.filesystem.lookup(1, b"f")
            failures += 1

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(look)
        assert failures == 50
        assert trio.current_time() - began == pytest.approx(TIMEOUT_S)
        store.release("range")
        store.fail_next("range", StoreUnavailableError("away"))
        with pytest.raises(StoreUnavailableError):
            await mount.filesystem.lookup(1, b"f")
        assert await mount.filesystem.lookup(1, b"f") is not None
        mount.filesystem.forget([(mount.tree.root.children[b"f"].inode, 1)])


async def test_readers_that_come_together_share_a_question(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/f", b"one")
    async with open_mount(store, consistency="linearizable", timeout_s=TIMEOUT_S) as mount:
        store.hold("range")
        before = len(store.range_calls)
        seen: list[int] = []

        async def look() -> None:
            attributes = await mount.filesystem.lookup(1, b"f")
            assert attributes is not None
            seen.append(attributes.size)
            mount.filesystem.forget([(attributes.inode, 1)])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(100):
                nursery.start_soon(look)
            await trio.testing.wait_all_tasks_blocked()
            store.put_now(b"/f", b"longer")
            store.release("range")
        assert len(store.range_calls) - before == 2, "the first one's, and one for all others"
        assert seen[1:] == [6] * 100


async def test_the_default_asks_nothing(autojump_clock: MockClock, store: FakeStore) -> None:
    store.put_now(b"/d/f", b"one")
    async with open_mount(store) as mount:
        assert await content(mount, (b"d", b"f")) == b"one"
        before = store.statistics()
        for _ in range(10):
            assert await content(mount, (b"d", b"f")) == b"one"
            assert await mount.kernel.listdir((b"d",)) == [b"f"]
        assert store.statistics() == before
