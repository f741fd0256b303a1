"""`--consistency linearizable`: a reader sees what etcd held when it came, or an error."""

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from etcdfs.errors import StoreTimeoutError, StoreUnavailableError
from etcdfs.store import Delete, Put, Transaction
from tests.service.mirrors import content, quiet
from tests.support.fake_kernel import FakeMount, open_mount
from tests.support.fake_store import FakeStore

TIMEOUT_S = 5.0


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


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
    async with open_mount(store, linearizable=True, timeout_s=TIMEOUT_S) as mount:
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
    async with open_mount(store, prefix=b"/app/", linearizable=True, timeout_s=TIMEOUT_S) as mount:
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


async def test_a_watch_that_does_not_come_is_an_error(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/f", b"one")
    async with open_mount(store, linearizable=True, timeout_s=TIMEOUT_S) as mount:
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
    async with open_mount(store, linearizable=True, timeout_s=TIMEOUT_S) as mount:
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
    async with open_mount(store, linearizable=True, timeout_s=TIMEOUT_S) as mount:
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
