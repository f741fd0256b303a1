"""The audit: what it finds, what it must not be fooled by, and what it costs."""

import itertools
import random
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from etcdfs.consistency import audit as audit_room
from etcdfs.errors import StorePermissionError, StoreUnavailableError
from etcdfs.keyspace.attribute_records import is_record_key, record_key
from etcdfs.keyspace.store import Delete, Put, Transaction
from etcdfs.mirror.messages import Apply, Message, Step
from tests.service.mirrors import AGAIN, REFUSED, content, quiet
from tests.support.fake_kernel import FakeMount, make_mount, open_mount
from tests.support.fake_store import FakeStore

INTERVAL_S = 100.0
LONGEST_S = INTERVAL_S * (1 + audit_room.JITTER)


async def audited(mount: FakeMount) -> None:
    """Let an audit happen, and what follows from it."""
    await trio.sleep(LONGEST_S + 10)
    await quiet(mount)


def found(mount: FakeMount) -> tuple[int, int, int]:
    statistics = mount.mirror.auditor.statistics()
    return statistics.audits, statistics.differing, statistics.differences


def fill(store: FakeStore, count: int) -> None:
    for start in range(0, count, 100):
        puts = [Put(b"/d%d/%04d" % (n % 3, n), b"old") for n in range(start, start + 100)]
        store.commit_now(Transaction(then=tuple(puts)))


# --- what is found --------------------------------------------------------------------------


@pytest.mark.expect_log(AGAIN)
async def test_lost_events_are_found_and_mended(
    autojump_clock: MockClock, store: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (b"changed", b"deleted", b"remade", b"same"):
        store.put_now(b"/d/" + name, b"old")
    store.put_now(b"/emptied/", b"")
    async with open_mount(store, audit_interval_s=INTERVAL_S) as mount:
        assert await content(mount, (b"d", b"changed")) == b"old"
        assert await content(mount, (b"d", b"made")) is None
        same = (await mount.kernel.stat((b"d", b"same"))).inode
        with store.losing_events():
            store.put_now(b"/d/changed", b"new")
            store.delete_now(b"/d/deleted")
            store.delete_now(b"/d/remade")
            store.put_now(b"/d/remade", b"again")
            store.put_now(b"/d/made", b"new")
            store.delete_now(b"/emptied/")
        await quiet(mount)
        assert await content(mount, (b"d", b"changed")) == b"old", "nobody knows yet"
        await audited(mount)
        assert found(mount) == (1, 1, 5)
        warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(warnings) == 1
        assert "found 5 difference(s) from etcd, the first at b'/d/changed'" in warnings[0]
        assert await content(mount, (b"d", b"changed")) == b"new"
        assert await content(mount, (b"d", b"deleted")) is None
        assert await content(mount, (b"d", b"remade")) == b"again"
        assert await content(mount, (b"d", b"made")) == b"new"
        assert await mount.kernel.listdir(()) == [b"d"]
        assert (await mount.kernel.stat((b"d", b"same"))).inode == same
        await audited(mount)
        assert found(mount) == (2, 1, 5), "and now all is well"


@pytest.mark.expect_log(AGAIN)
async def test_only_the_first_listing_is_reported(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """Whoever waited for the mount is gone by the time of the second."""
    mount = make_mount(store)
    told: list[int] = []
    store.put_now(b"/f", b"one")
    async with trio.open_nursery() as nursery:
        await nursery.start(mount.mirror.run, lambda keys, _size: told.append(keys))
        mount.mirror.doubt("a test")
        await trio.sleep(10)
        assert mount.mirror.state_machine is not None
        assert mount.mirror.state_machine.statistics().lists == 2
        assert told == [1]
        nursery.cancel_scope.cancel()


@pytest.mark.expect_log(AGAIN)
async def test_another_value_at_the_same_revision_is_found(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/f", b"one")
    store.put_now(b"/g", b"last, and the witness")
    async with open_mount(store, audit_interval_s=INTERVAL_S) as mount:
        assert await content(mount, (b"f",)) == b"one"
        store.forge_now(b"/f", b"two")
        await audited(mount)
        assert found(mount) == (1, 1, 1)
        assert await content(mount, (b"f",)) == b"two"


@pytest.mark.expect_log(AGAIN)
async def test_a_key_that_no_file_can_have_is_compared_too(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    for key in (b"/a", b"/a/b", b"/a//c", b"/%value", b"/" + b"x" * 300, b"/.", b"/m/"):
        store.put_now(key, b"old")
    async with open_mount(store, audit_interval_s=INTERVAL_S) as mount:
        await audited(mount)
        assert found(mount) == (1, 0, 0)
        assert mount.mirror.auditor.statistics().keys == 7
        with store.losing_events():
            store.put_now(b"/a", b"new")
            store.delete_now(b"/" + b"x" * 300)
            store.put_now(b"/m/", b"new")
        await audited(mount)
        assert found(mount) == (2, 1, 3)


@pytest.mark.expect_log(AGAIN)
async def test_a_late_event_hastens_the_audit(autojump_clock: MockClock, store: FakeStore) -> None:
    """It looks like a repeated one, and is dropped (FAULTS 12)."""
    async with open_mount(store, audit_interval_s=INTERVAL_S) as mount:
        with store.losing_events():
            first, second = store.put_now(b"/a", b"1"), store.put_now(b"/b", b"2")
        store.deliver_now([second], [first])
        await quiet(mount)
        assert await content(mount, (b"b",)) == b"2"
        assert await content(mount, (b"a",)) is None
        await trio.sleep(2 * audit_room.RECHECK_S + 1)
        assert found(mount)[1:] == (1, 1)
        assert await content(mount, (b"a",)) == b"1"


# --- attributes -----------------------------------------------------------------------------


async def mode(mount: FakeMount, *path: bytes) -> int:
    return (await mount.kernel.stat(path)).mode & 0o7777


def found_in_records(mount: FakeMount) -> tuple[int, int, int]:
    """Return what audits of the record keys found, wherever they are audited."""
    if mount.mirror.stored_records is None:
        return found(mount)
    statistics = mount.mirror.stored_records.auditor.statistics()
    return statistics.audits, statistics.differing, statistics.differences


@pytest.mark.expect_log(AGAIN, "%s%s; listing them again")
@pytest.mark.parametrize("prefix", [b"/", b"/app/"])
async def test_lost_changes_of_attributes_are_found_and_mended(
    autojump_clock: MockClock, store: FakeStore, prefix: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether record keys are among the mirror's own keys or not."""
    for name in (b"changed", b"deleted", b"forged", b"made", b"same"):
        store.put_now(prefix + name, b"")
        if name != b"made":
            store.put_now(record_key(prefix + name), b'{"mode":"0600"}')
    store.put_now(prefix + b"last", b"and the witness")
    store.put_now(record_key(prefix + b"last"), b'{"mode":"0600"}')
    async with open_mount(store, prefix=prefix, audit_interval_s=INTERVAL_S) as mount:
        assert await mode(mount, b"deleted") == 0o600
        same = await mount.kernel.stat((b"same",))
        with store.losing_events():
            store.put_now(record_key(prefix + b"changed"), b'{"mode":"0700"}')
            store.delete_now(record_key(prefix + b"deleted"))
            store.put_now(record_key(prefix + b"made"), b'{"mode":"0400"}')
        store.forge_now(record_key(prefix + b"forged"), b'{"mode":"0440"}')
        await quiet(mount)
        assert await mode(mount, b"changed") == 0o600, "nobody knows yet"
        await audited(mount)
        assert found_in_records(mount) == (1, 1, 4)
        warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(warnings) == 1
        assert "found 4 difference(s) from etcd, the first at " in warnings[0]
        names = (b"changed", b"deleted", b"forged", b"made")
        modes = [await mode(mount, name) for name in names]
        assert modes == [0o700, 0o644, 0o440, 0o400]
        assert await mount.kernel.stat((b"same",)) == same
        await audited(mount)
        assert found_in_records(mount) == (2, 1, 4), "and now all is well"


@pytest.mark.parametrize("late", [False, True])
async def test_attributes_that_change_while_it_runs_are_no_difference(
    autojump_clock: MockClock, store: FakeStore, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Some come with their keys; then their own watch may bring them after the audit."""
    for n in range(3 * audit_room.PAGE):
        store.put_now(b"/app/%03d" % n, b"")
        store.put_now(record_key(b"/app/%03d" % n), b'{"mode":"0600"}')
    async with open_mount(store, prefix=b"/app/", audit_interval_s=INTERVAL_S) as mount:
        stored_records, read = mount.mirror.stored_records, store.range
        assert stored_records is not None
        follow = stored_records._carry_out
        pages: list[bytes] = []

        async def changing_range(start: bytes, *args: Any, **kwargs: Any) -> Any:
            if is_record_key(start) and kwargs["revision"]:
                key = b"/app/%03d" % (3 * audit_room.PAGE - 1 - len(pages))
                pages.append(start)
                mode = Put(record_key(key), b'{"mode":"0640"}')
                if late:
                    store.commit_now(Transaction(then=(Delete(key), Delete(record_key(key)))))
                    store.commit_now(Transaction(then=(Put(key, b""), mode)))
                else:
                    store.commit_now(Transaction(then=(mode,)))
                await trio.sleep(1)
            return await read(start, *args, **kwargs)

        async def follow_late(step: Step) -> Message | None:
            if late and isinstance(step, Apply):
                await trio.sleep(60)
            return await follow(step)

        monkeypatch.setattr(store, "range", changing_range)
        monkeypatch.setattr(stored_records, "_carry_out", follow_late)
        await audited(mount)
        assert len(pages) >= 2
        assert found_in_records(mount) == (1, 0, 0)


@pytest.mark.expect_log(AGAIN)
async def test_attributes_of_another_history_go_with_it(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """What is newer than all that etcd has now, too."""
    store.put_now(b"/app/f", b"one")
    before = store.revision
    async with open_mount(store, prefix=b"/app/") as mount:
        store.put_now(b"/app/g", b"two")
        store.put_now(record_key(b"/app/f"), b'{"mode":"0600"}')
        await quiet(mount)
        assert await mode(mount, b"f") == 0o600
        store.go_back_now(before)
        await trio.sleep(20)
        await quiet(mount)
        assert await mode(mount, b"f") == 0o644


@pytest.mark.expect_log(
    "attributes cannot be read: all is its owner's alone (%s); --no-attrs opens it"
)
async def test_an_audit_finds_that_attributes_may_no_longer_be_read(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/app/f", b"one")
    async with open_mount(store, prefix=b"/app/", audit_interval_s=INTERVAL_S) as mount:
        assert mount.mirror.stored_records is not None
        audit = mount.mirror.stored_records.auditor
        allowed = store.range

        async def guarded(start: bytes, *args: Any, **kwargs: Any) -> Any:
            if is_record_key(start):
                raise StorePermissionError("permission denied")
            return await allowed(start, *args, **kwargs)

        store.range = guarded  # type: ignore[method-assign]
        await audited(mount)
        assert (audit.statistics().failed, mount.tree.rights.readable) == (1, False)
        assert await content(mount, (b"f",)) == b"one"
        assert await mode(mount, b"f") == 0o600
        store.range = allowed  # type: ignore[method-assign]
        store.put_now(record_key(b"/app/f"), b'{"mode":"0664"}')
        await audited(mount)
        assert mount.tree.rights.readable
        assert await mode(mount, b"f") == 0o664


# --- what is no difference ------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
async def test_changes_while_it_runs_are_no_difference(
    autojump_clock: MockClock, store: FakeStore, seed: int
) -> None:
    """Many random changes, at every page of the audit, and a watch that comes in fits."""
    chance = random.Random(seed)
    fill(store, 1000)

    def change() -> None:
        keys = [b"/d%d/%04d" % (n % 3, n) for n in chance.sample(range(1100), 8)]
        operations = [Put(key, b"new %d" % chance.random()) for key in keys[:5]]
        store.commit_now(Transaction(then=(*operations, *(Delete(key) for key in keys[5:]))))

    async with open_mount(store, audit_interval_s=INTERVAL_S) as mount:
        store.hold("range")
        await trio.sleep(LONGEST_S)
        while not mount.mirror.auditor.statistics().audits:
            if chance.random() < 0.5:
                store.hold_watches()
            for _ in range(chance.randrange(4)):
                change()
            store.release("range")
            for _ in range(chance.randrange(20)):
                await trio.lowlevel.checkpoint()
            store.hold("range")
            change()
            store.release_watches()
            if chance.random() < 0.1:
                await trio.sleep(0.01)
        store.release("range")
        await quiet(mount)
        assert found(mount) == (1, 0, 0)
        assert mount.mirror.auditor.statistics().keys >= 600


async def test_a_late_watch_is_waited_for(autojump_clock: MockClock, store: FakeStore) -> None:
    store.put_now(b"/f", b"one")
    async with open_mount(store, audit_interval_s=INTERVAL_S, timeout_s=5.0) as mount:
        store.hold("range")
        await trio.sleep(LONGEST_S)
        store.hold_watches()
        store.put_now(b"/f", b"two")
        store.put_now(b"/g", b"new")
        store.release("range")
        await trio.sleep(4.9)
        store.release_watches()
        await quiet(mount)
        assert found(mount) == (1, 0, 0)


async def test_a_batch_that_waits_for_the_kernel_is_waited_for(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """It came before the audit began, and is published when everything has been read."""
    store.put_now(b"/f", b"one")
    async with open_mount(store, audit_interval_s=INTERVAL_S) as mount:
        assert await content(mount, (b"f",)) == b"one"
        await trio.sleep(INTERVAL_S - 1)
        mount.kernel.hold_notifications()
        store.put_now(b"/f", b"two")
        await trio.testing.wait_all_tasks_blocked()
        while not mount.mirror.auditor.is_waiting:  # noqa: ASYNC110 - it tells nobody
            await trio.sleep(1)
        mount.kernel.release_notifications()
        await quiet(mount)
        assert found(mount) == (1, 0, 0)


async def test_revisions_outside_of_the_prefix_are_not_waited_for(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/app/f", b"one")
    async with open_mount(store, prefix=b"/app/", audit_interval_s=INTERVAL_S) as mount:
        store.put_now(b"/other", b"1")
        await audited(mount)
        assert found(mount) == (1, 0, 0)
        assert mount.mirror.auditor.statistics().keys == 1
        assert mount.mirror.auditor.statistics().seconds == 0, "nothing differs: why wait?"


async def test_own_changes_are_no_difference(autojump_clock: MockClock, store: FakeStore) -> None:
    async with open_mount(store, audit_interval_s=INTERVAL_S) as mount:
        handle = await mount.kernel.open((b"draft",), 0o101)
        await mount.kernel.write(handle, 0, b"not published")
        await mount.kernel.mkdir((b"d",))
        await audited(mount)
        assert found(mount) == (1, 0, 0)
        await mount.kernel.close(handle)


# --- what comes of it -----------------------------------------------------------------------


@pytest.mark.expect_log(AGAIN)
async def test_it_is_void_when_the_watch_is_lost_meanwhile(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    fill(store, 300)
    async with open_mount(store, audit_interval_s=INTERVAL_S) as mount:
        store.hold("range")
        await trio.sleep(LONGEST_S)
        store.break_watches()
        await trio.testing.wait_all_tasks_blocked()
        store.release("range")
        await trio.sleep(1)
        assert found(mount) == (0, 0, 0)
        assert mount.mirror.auditor.statistics().void == 1


async def test_etcd_that_cannot_be_asked_is_no_difference(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    async with open_mount(store, audit_interval_s=INTERVAL_S) as mount:
        store.fail_next("range", StoreUnavailableError("away"))
        await trio.sleep(LONGEST_S + 1)
        assert found(mount) == (0, 0, 0)
        assert mount.mirror.auditor.statistics().failed == 1
        assert await mount.kernel.listdir(()) == []


@pytest.mark.expect_log(REFUSED)
async def test_what_we_may_no_longer_read_is_not_shown(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """Fault 16: the watch goes on delivering; only a read tells."""
    store.put_now(b"/d/f", b"one")
    async with open_mount(store, audit_interval_s=INTERVAL_S) as mount:
        handle = await mount.kernel.open((b"d", b"f"), 0)
        assert await content(mount, (b"d", b"missing")) is None
        store.fail_next("range", StorePermissionError("permission denied"), times=10_000)
        await audited(mount)
        for path in ((b"d", b"f"), (b"d", b"missing"), (b"d",)):
            with pytest.raises(PermissionError):
                await mount.kernel.stat(path)
        with pytest.raises(PermissionError):
            await mount.kernel.listdir(())
        with pytest.raises(PermissionError):
            await mount.kernel.read(handle)
        assert "no longer lets" in mount.mirror.staleness.statistics().refused
        await mount.kernel.stat(())
        store._failures.clear()
        await trio.sleep(audit_room.RECHECK_S + 1)
        assert await content(mount, (b"d", b"f")) == b"one"
        assert await mount.kernel.read(handle) == b"one"
        await mount.kernel.close(handle)


# --- what it costs --------------------------------------------------------------------------


async def test_no_interval_no_audit(autojump_clock: MockClock, store: FakeStore) -> None:
    async with open_mount(store, audit_interval_s=0.0) as mount:
        before = len(store.range_calls)
        await trio.sleep(3600)
        assert found(mount) == (0, 0, 0)
        assert len(store.range_calls) == before


async def test_intervals_are_jittered(autojump_clock: MockClock, store: FakeStore) -> None:
    async with open_mount(store, audit_interval_s=INTERVAL_S) as mount:
        await trio.sleep(100 * INTERVAL_S)
        audits = mount.mirror.auditor.statistics().audits
        assert 100 / (1 + audit_room.JITTER) <= audits < 95


async def test_every_page_is_small_at_one_revision_and_only_of_its_own_keys(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    fill(store, 1000)
    async with open_mount(store, audit_interval_s=INTERVAL_S) as mount:
        before = len(store.range_calls)
        await audited(mount)
        calls = store.range_calls[before:]
        assert calls[0].revision == 0
        assert {call.revision for call in calls[1:]} == {store.revision}
        assert {call.limit for call in calls} == {audit_room.PAGE}
        assert 10 <= len(calls) <= 14
        for call, following in itertools.pairwise(calls):
            more = call.end == following.end and call.start < following.start
            assert more or call.end == following.start, "all of them are everything, once"
        assert (calls[0].start, calls[-1].end) == (b"/", b"0")


async def test_large_values_make_small_pages(autojump_clock: MockClock, store: FakeStore) -> None:
    for n in range(600):
        store.put_now(b"/%04d" % n, b"x" * 100_000)
    async with open_mount(store, audit_interval_s=INTERVAL_S) as mount:
        before = len(store.range_calls)
        await audited(mount)
        assert found(mount) == (1, 0, 0)
        assert len(store.range_calls) - before == 600 // 11 + 1


async def test_the_whole_keyspace_is_audited_with_its_strangest_keys(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    for key in (b"\0", b"\0\0", b"a", b"a/", b"\xff", b"\xff\xff"):
        store.put_now(key, b"x" * audit_room.PAGE_BYTES)
    async with open_mount(store, prefix=b"", audit_interval_s=INTERVAL_S) as mount:
        await audited(mount)
        assert found(mount) == (1, 0, 0)
        assert mount.mirror.auditor.statistics().keys == 6
