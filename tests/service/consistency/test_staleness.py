"""Silence, loss and limits: what a mount knows of its etcd, and what it shows meanwhile."""

import os

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from etcdfs.consistency.staleness import StalenessStatistics
from etcdfs.errors import StorePermissionError, StoreUnavailableError
from tests.service.mirrors import AGAIN, REFUSED, content, quiet
from tests.support.fake_kernel import FakeMount, open_mount
from tests.support.fake_store import FakeStore

WATCH_TIMEOUT_S = 10.0
TIMEOUT_S = 5.0
AWAY = StoreUnavailableError("away")
DENIED = StorePermissionError("permission denied")


def staleness(mount: FakeMount) -> StalenessStatistics:
    return mount.mirror.staleness.statistics()


def breaks(mount: FakeMount) -> int:
    assert mount.mirror.state_machine is not None
    return mount.mirror.state_machine.statistics().breaks


async def broken(mount: FakeMount) -> None:
    while not breaks(mount):  # noqa: ASYNC110 - it counts, and tells nobody
        await trio.sleep(0.1)


# --- silence --------------------------------------------------------------------------------


async def test_a_quiet_etcd_is_no_lost_one(autojump_clock: MockClock, store: FakeStore) -> None:
    async with open_mount(store, watch_timeout_s=WATCH_TIMEOUT_S) as mount:
        ranges = len(store.range_calls)
        for _ in range(100):
            await trio.sleep(33.3)
            assert staleness(mount).connected
            assert staleness(mount).silent_s <= WATCH_TIMEOUT_S
            assert staleness(mount).stale_s == 0
        assert breaks(mount) == 0
        assert len(store.range_calls) == ranges, "a question on the watch is enough"


@pytest.mark.expect_log(AGAIN)
async def test_a_silent_etcd_is_found_out(autojump_clock: MockClock, store: FakeStore) -> None:
    store.put_now(b"/f", b"one")
    async with open_mount(store, watch_timeout_s=WATCH_TIMEOUT_S, timeout_s=TIMEOUT_S) as mount:
        assert await content(mount, (b"f",)) == b"one"
        began = trio.current_time()
        store.hold_watches()  # it takes requests, and says nothing
        store.fail_next("range", AWAY, times=2)
        store.put_now(b"/f", b"two")
        await broken(mount)
        assert trio.current_time() - began <= WATCH_TIMEOUT_S + TIMEOUT_S + 0.2
        assert not staleness(mount).connected
        assert staleness(mount).losses >= 1
        assert staleness(mount).stale_s >= WATCH_TIMEOUT_S
        assert await content(mount, (b"f",)) == b"one", "reads go on"
        store.release_watches()
        await trio.sleep(10)
        await quiet(mount)
        assert staleness(mount).connected
        assert staleness(mount).stale_s == 0
        assert await content(mount, (b"f",)) == b"two"


async def test_an_unanswered_question_is_not_the_end_if_etcd_is_no_further(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """Etcd issue 17507: some releases do not answer for a watch that has nothing to tell."""
    store.put_now(b"/f", b"one")
    async with open_mount(store, watch_timeout_s=WATCH_TIMEOUT_S) as mount:
        store.mute(muted=True)
        await trio.sleep(3600)
        assert breaks(mount) == 0
        assert (
            staleness(mount).connected or staleness(mount).silent_s <= WATCH_TIMEOUT_S + TIMEOUT_S
        )
        store.put_now(b"/f", b"two")
        await quiet(mount)
        assert await content(mount, (b"f",)) == b"two"


@pytest.mark.expect_log(AGAIN)
async def test_a_watch_that_is_silent_while_etcd_goes_on_is_left(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/f", b"one")
    async with open_mount(store, watch_timeout_s=WATCH_TIMEOUT_S) as mount:
        store.mute(muted=True)
        with store.losing_events():
            store.put_now(b"/f", b"two")
        await broken(mount)
        await trio.sleep(1)
        await quiet(mount)
        assert await content(mount, (b"f",)) == b"two", "resumed from where it was"


async def test_progress_is_never_taken_for_more_than_a_sign_of_life(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """Etcd issue 15220: it may name a revision whose events are still to come."""
    store.put_now(b"/f", b"one")
    async with open_mount(store, watch_timeout_s=WATCH_TIMEOUT_S) as mount:
        known = mount.mirror.state_machine
        assert known is not None
        before = known.revision
        with store.losing_events():
            store.put_now(b"/f", b"two")
        await trio.sleep(5 * WATCH_TIMEOUT_S)
        assert known.revision == mount.mirror.revision == before
        assert breaks(mount) == 0


# --- too old --------------------------------------------------------------------------------


@pytest.mark.expect_log(AGAIN)
@pytest.mark.expect_log(REFUSED)
async def test_what_is_too_old_is_not_shown(autojump_clock: MockClock, store: FakeStore) -> None:
    store.put_now(b"/d/f", b"one")
    async with open_mount(store, max_stale_s=60.0) as mount:
        inode = (await mount.kernel.stat((b"d", b"f"))).inode
        handle = await mount.kernel.open((b"d", b"f"), os.O_RDONLY)
        assert await content(mount, (b"d", b"missing")) is None
        heard = trio.current_time()
        store.fail_next("watch", AWAY, times=10_000)
        store.break_watches()
        while trio.current_time() < heard + 59.9:
            assert await content(mount, (b"d", b"f")) == b"one"
            assert await content(mount, (b"d", b"missing")) is None
            await trio.sleep(1)
        await trio.sleep_until(heard + 60.1)
        await trio.testing.wait_all_tasks_blocked()
        for path in ((b"d", b"f"), (b"d", b"missing"), (b"d",)):
            with pytest.raises(OSError, match="not been heard"):
                await mount.kernel.stat(path)
            with pytest.raises(OSError, match="not been heard"):
                await content(mount, path)
        with pytest.raises(OSError, match="not been heard"):
            await mount.kernel.listdir(())
        with pytest.raises(OSError, match="not been heard"):
            await mount.kernel.fstat(handle.inode)
        await mount.kernel.stat(())  # df, mountpoint and umount ask no more
        await mount.filesystem.statfs()
        assert "has not been heard for 60 s" in staleness(mount).refused
        store._failures.clear()
        await trio.sleep(5)
        await quiet(mount)
        assert staleness(mount).refused == ""
        assert (await mount.kernel.stat((b"d", b"f"))).inode == inode
        assert await content(mount, (b"d", b"f")) == b"one"
        assert await mount.kernel.listdir((b"d",)) == [b"f"]
        assert await mount.kernel.read(handle) == b"one"
        await mount.kernel.close(handle)
        assert staleness(mount).refusals == 1


@pytest.mark.parametrize("muted", [False, True])
async def test_a_quiet_etcd_is_asked_before_the_limit(
    autojump_clock: MockClock, store: FakeStore, *, muted: bool
) -> None:
    store.put_now(b"/f", b"one")
    store.mute(muted=muted)
    async with open_mount(store, max_stale_s=1.0, watch_timeout_s=600.0) as mount:
        for _ in range(100):
            await trio.sleep(0.77)
            assert (await mount.filesystem.lookup(1, b"f")) is not None
            mount.filesystem.forget([(mount.tree.root.children[b"f"].inode, 1)])


@pytest.mark.expect_log(AGAIN)
async def test_without_a_limit_everything_is_shown_for_ever(
    autojump_clock: MockClock, store: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    """For more attempts than 2 has powers in a float, and with few words about them."""
    store.put_now(b"/f", b"one")
    async with open_mount(store) as mount:
        assert await content(mount, (b"f",)) == b"one"
        store.fail_next("watch", AWAY, times=10_000)
        store.break_watches()
        await trio.sleep(3 * 3600)
        assert await content(mount, (b"f",)) == b"one"
        assert staleness(mount).stale_s > 2.9 * 3600
        assert breaks(mount) > 1100
        assert sum(record.levelname == "WARNING" for record in caplog.records) < 20
        store._failures.clear()


# --- not permitted --------------------------------------------------------------------------


@pytest.mark.expect_log(AGAIN)
@pytest.mark.expect_log(REFUSED)
async def test_a_watch_that_is_refused_stops_the_showing_if_reads_are_too(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """Fault 14, at run time."""
    store.put_now(b"/f", b"one")
    async with open_mount(store) as mount:
        assert await content(mount, (b"f",)) == b"one"
        store.fail_next("watch", DENIED, times=10_000)
        store.fail_next("range", DENIED, times=10_000)
        store.break_watches()
        await trio.sleep(1)
        with pytest.raises(PermissionError):
            await content(mount, (b"f",))
        store._failures.clear()
        await trio.sleep(10)
        await quiet(mount)
        assert await content(mount, (b"f",)) == b"one"


@pytest.mark.expect_log(AGAIN)
async def test_a_watch_that_alone_is_refused_is_a_lost_one(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """An expired token looks like this (etcd issue 12385)."""
    store.put_now(b"/f", b"one")
    async with open_mount(store) as mount:
        store.fail_next("watch", DENIED, times=3)
        store.break_watches(DENIED)
        await trio.sleep(0.01)
        assert await content(mount, (b"f",)) == b"one"
        store.put_now(b"/f", b"two")
        await trio.sleep(10)
        assert await content(mount, (b"f",)) == b"two"


async def test_a_watch_that_is_refused_at_the_start_is_an_error(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.fail_next("watch", DENIED, times=10_000)
    with pytest.RaisesGroup(StorePermissionError, flatten_subgroups=True):
        async with open_mount(store):
            raise AssertionError("it is not mounted")
