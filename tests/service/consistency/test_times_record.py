"""When the record of times is read and written, and by whom it is not."""

import pytest
import trio
from trio.testing import MockClock

from etcdfs.consistency.times_record import INTERVAL_S, TIMES_KEY, TimesRecord
from etcdfs.errors import StorePermissionError, StoreUnavailableError
from etcdfs.keyspace.revision_times import RevisionTimes
from tests.support.fake_kernel import open_mount
from tests.support.fake_store import FakeStore

NOW = 1_700_000_000_000_000_000


def record(store: FakeStore, *, writes: bool = True) -> tuple[RevisionTimes, TimesRecord]:
    times = RevisionTimes()
    return times, TimesRecord(store, times, lambda: NOW, writes=writes)


def kept(store: FakeStore) -> list[tuple[int, bytes]]:
    return [(entry.version, entry.value) for entry in store.range_now(TIMES_KEY).entries]


async def test_it_is_written_when_there_is_something_to_say(store: FakeStore) -> None:
    times, first = record(store)
    await first.load()
    await first.save()
    assert kept(store) == []
    times.learn(7, NOW)
    await first.save()
    await first.save()
    assert kept(store) == [(1, times.encode())]
    others, second = record(store)
    await second.load()
    assert others.time_of(7) == NOW
    await second.save()
    assert len(store.commit_calls) == 1


async def test_two_mounts_keep_what_both_have_learnt(store: FakeStore) -> None:
    (times, first), (others, second) = record(store), record(store)
    await first.load()
    await second.load()
    times.learn(7, NOW)
    others.learn(9, NOW + 10**9)
    await first.save()
    await second.save()
    assert kept(store) == [(2, others.encode())]
    assert others.time_of(7) == NOW


async def test_it_is_written_from_time_to_time(
    autojump_clock: MockClock, store: FakeStore, nursery: trio.Nursery
) -> None:
    times, mine = record(store)
    await mine.load()
    nursery.start_soon(mine.run)
    times.learn(7, NOW)
    await trio.sleep(INTERVAL_S + 1)
    assert len(store.commit_calls) == 1
    await trio.sleep(3 * INTERVAL_S)
    assert len(store.commit_calls) == 1
    nursery.cancel_scope.cancel()


async def test_who_may_not_goes_without(store: FakeStore) -> None:
    times, mine = record(store)
    store.fail_next("range", StorePermissionError("no"))
    await mine.load()
    times.learn(7, NOW)
    await mine.save()
    assert store.commit_calls == []
    times, mine = record(store)
    await mine.load()
    times.learn(7, NOW)
    store.fail_next("commit", StorePermissionError("read only"))
    await mine.save()
    await mine.save()
    assert len(store.commit_calls) == 1
    times, mine = record(store, writes=False)
    times.learn(7, NOW)
    await mine.save()
    assert kept(store) == []


async def test_an_outage_puts_it_off(store: FakeStore) -> None:
    times, mine = record(store)
    await mine.load()
    times.learn(7, NOW)
    store.fail_next("commit", StoreUnavailableError("away"))
    await mine.save()
    await mine.save()
    assert kept(store) == [(1, times.encode())]


@pytest.mark.expect_log("%r does not say when revisions were made, and is left alone")
async def test_what_is_no_record_is_left_alone(store: FakeStore) -> None:
    store.put_now(TIMES_KEY, b"mine")
    times, mine = record(store)
    await mine.load()
    times.learn(7, NOW)
    await mine.save()
    assert kept(store) == [(1, b"mine")]


@pytest.mark.parametrize("prefix", [b"/", b"", b"/app/"])
async def test_it_is_no_file(
    autojump_clock: MockClock, store: FakeStore, cache: bool, prefix: bytes
) -> None:
    store.put_now(TIMES_KEY, b'{"revisions":[]}')
    store.put_now(prefix + b"file", b"")
    async with open_mount(store, cache=cache, prefix=prefix) as mount:
        store.put_now(TIMES_KEY, b'{"revisions":[[1,1,1]]}')
        await trio.testing.wait_all_tasks_blocked()
        assert await mount.kernel.listdir(()) == [b"file"]
        if prefix == b"":
            await mount.kernel.mkdir((b"%=",))
            assert await mount.kernel.listdir((b"%=",)) == []
            await mount.kernel.rmdir((b"%=",))
