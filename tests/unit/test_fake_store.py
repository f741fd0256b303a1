"""The fake passes the contract of the real thing, and its knobs do what tests rely on."""

import pytest
import trio
import trio.testing

from etcdfs.errors import CompactedError, OutcomeUnknownError, StoreTimeoutError, WatchLostError
from etcdfs.keyspace.store import (
    END_OF_KEYS,
    Put,
    Transaction,
    WatchEvents,
    WatchOpened,
    WatchProgress,
)
from tests.support.fake_store import FakeStore
from tests.support.store_contract import Lab, StoreContract


def lab_of(store: FakeStore) -> Lab:
    async def compact(revision: int) -> None:
        await trio.lowlevel.checkpoint()
        store.compact_now(revision)

    return Lab(store=store, compact=compact)


class TestFakeStore(StoreContract):
    @pytest.fixture
    def lab(self, autojump_clock: trio.testing.MockClock) -> Lab:
        del autojump_clock  # the fake takes no time, so every bound could be minutes
        return lab_of(FakeStore(revision=41))


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


PUT = Transaction(then=(Put(b"a", b"1"),))


async def test_a_failed_range_fails_once(store: FakeStore) -> None:
    store.fail_next("range", StoreTimeoutError("planned"))
    with pytest.raises(StoreTimeoutError, match="planned"):
        await store.range(b"a")
    assert (await store.range(b"a")).entries == ()


async def test_a_failed_commit_may_have_been_applied(store: FakeStore) -> None:
    store.fail_next("commit", OutcomeUnknownError("lost"))
    store.fail_next("commit", OutcomeUnknownError("late"), applied=True)
    with pytest.raises(OutcomeUnknownError, match="lost"):
        await store.commit(PUT)
    assert store.range_now(b"a").entries == ()
    with pytest.raises(OutcomeUnknownError, match="late"):
        await store.commit(PUT)
    assert len(store.range_now(b"a").entries) == 1


async def test_held_commits_wait_before_or_after_they_are_applied(store: FakeStore) -> None:
    async with trio.open_nursery() as nursery:
        store.hold("commit")
        store.hold("answer")
        nursery.start_soon(store.commit, PUT)
        await trio.testing.wait_all_tasks_blocked()
        assert store.revision == 1
        store.release("commit")
        await trio.testing.wait_all_tasks_blocked()
        assert store.revision == 2
        assert len(nursery.child_tasks) == 1
        store.release("answer")
        await trio.testing.wait_all_tasks_blocked()
        assert not nursery.child_tasks


async def test_held_watches_catch_up(store: FakeStore) -> None:
    async with store.watch(b"", END_OF_KEYS, 0) as watch:
        await watch.receive()
        store.hold_watches()
        store.put_now(b"a", b"1")
        store.delete_now(b"a")
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch.receive)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
        store.release_watches()
        message = await watch.receive()
    assert isinstance(message, WatchEvents)
    assert [e.mod_revision for e in message.events] == [2, 3]


async def test_held_watches_may_miss_what_is_compacted(store: FakeStore) -> None:
    async with store.watch(b"", END_OF_KEYS, 0) as watch:
        await watch.receive()
        store.hold_watches()
        store.put_now(b"a", b"1")
        store.put_now(b"a", b"2")
        store.compact_now(3)
        store.release_watches()
        with pytest.raises(CompactedError):
            await watch.receive()


async def test_broken_watches_lose_what_was_on_its_way(store: FakeStore) -> None:
    async with store.watch(b"", END_OF_KEYS, 0) as watch:
        assert store.watch_count == 1
        store.put_now(b"a", b"1")
        store.break_watches()
        for _ in range(2):
            with pytest.raises(WatchLostError):
                await watch.receive()
        with pytest.raises(WatchLostError):
            await watch.request_progress()
    assert store.watch_count == 0


async def test_a_watch_can_be_made_to_fail_from_the_start(store: FakeStore) -> None:
    store.fail_next("watch", CompactedError("planned", 7))
    async with store.watch(b"", END_OF_KEYS, 0) as watch:
        with pytest.raises(CompactedError, match="planned"):
            await watch.receive()
    async with store.watch(b"", END_OF_KEYS, 0) as watch:
        assert isinstance(await watch.receive(), WatchOpened)


async def test_progress_waits_while_watches_are_held(store: FakeStore) -> None:
    async with store.watch(b"", END_OF_KEYS, 0) as watch:
        await watch.receive()
        store.hold_watches()
        await watch.request_progress()
        store.put_now(b"a", b"1")
        store.release_watches()
        assert isinstance(await watch.receive(), WatchEvents)
        assert await watch.receive() == WatchProgress(store.revision)


async def test_what_was_asked_is_on_record(store: FakeStore) -> None:
    await store.range(b"a", b"b", limit=3, keys_only=True)
    await store.commit(PUT)
    (call,) = store.range_calls
    assert (call.start, call.end, call.limit, call.keys_only) == (b"a", b"b", 3, True)
    assert store.commit_calls == [PUT]
