"""Following the watch: what readers see, in which order, and what the kernel is told of it."""

import logging
import os
from collections.abc import Callable, Collection
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from etcdfs.consistency.audit_index import COUNT_S, HeldKeys, Staging
from etcdfs.errors import CompactedError, NotFoundError, StoreUnavailableError
from etcdfs.keyspace.store import Delete, KeyValue, Put, Revision, Transaction
from etcdfs.mirror.mirror import Mirror
from etcdfs.tree.bulk_load import load
from etcdfs.tree.inodes import Cached, CachedAttributes, Dentry
from etcdfs.tree.tree import ROOT_INODE
from tests.service.mirrors import AGAIN, BOUND_S, content, quiet
from tests.support.fake_kernel import FakeMount, Path, open_mount
from tests.support.fake_store import FakeStore

STUCK = (
    "%s: the kernel may go on showing what is old, as some process has not let go of the "
    "directory's lock for %.1f s"
)
LATE = "the watch is over %.1f s late: revision %d is shown before it brings it"


async def write(mount: FakeMount, path: Path, value: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    handle = await mount.kernel.open(path, flags)
    await mount.kernel.write(handle, 0, value)
    await mount.kernel.close(handle)


# --- coherence ------------------------------------------------------------------------------


async def test_foreign_changes_arrive(autojump_clock: MockClock, store: FakeStore) -> None:
    store.put_now(b"/d/old", b"1")
    async with open_mount(store) as mount:
        assert await content(mount, (b"d", b"old")) == b"1"
        assert await content(mount, (b"d", b"new")) is None
        store.put_now(b"/d/old", b"2")
        store.put_now(b"/d/new", b"3")
        await quiet(mount)
        assert await content(mount, (b"d", b"old")) == b"2"
        assert await content(mount, (b"d", b"new")) == b"3"
        assert sorted(await mount.kernel.listdir((b"d",))) == [b"new", b"old"]
        store.delete_now(b"/d/old")
        store.delete_now(b"/d/new")
        await quiet(mount)
        assert await mount.kernel.listdir(()) == [], "its last key went, and so did the directory"


async def test_what_is_known_costs_no_request(autojump_clock: MockClock, store: FakeStore) -> None:
    store.put_now(b"/d/f", b"1")
    async with open_mount(store) as mount:
        handle = await mount.kernel.open((b"d", b"f"), os.O_RDONLY)
        await mount.kernel.read(handle)
        assert await content(mount, (b"d", b"gone")) is None
        before = mount.kernel.requests.copy()
        for _ in range(10):
            await mount.kernel.stat((b"d", b"f"))
            await mount.kernel.read(handle)
            with pytest.raises(FileNotFoundError):
                await mount.kernel.stat((b"d", b"gone"))
        assert mount.kernel.requests == before
        await mount.kernel.close(handle)


async def test_only_what_the_kernel_knows_is_invalidated(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/d/known", b"1")
    store.put_now(b"/d/unknown", b"1")
    async with open_mount(store) as mount:
        known = await mount.kernel.stat((b"d", b"known"))
        directory = await mount.kernel.stat((b"d",))
        store.put_now(b"/d/unknown", b"2")
        await quiet(mount)
        assert mount.kernel.invalidated == []
        store.put_now(b"/d/known", b"2")
        await quiet(mount)
        assert mount.kernel.invalidated == [
            CachedAttributes(known.inode, Dentry(directory.inode, b"known"))
        ]
        after = await mount.kernel.stat((b"d", b"known"))
        assert after.inode == known.inode
        assert after.mtime_ns > known.mtime_ns
        assert (await mount.kernel.stat((b"d",))).mtime_ns == directory.mtime_ns
        store.put_now(b"/d/new", b"1")
        await quiet(mount)
        listing = CachedAttributes(directory.inode, Dentry(mount.tree.root.inode, b"d"))
        assert mount.kernel.invalidated[1:] == [listing]
        assert (await mount.kernel.stat((b"d",))).mtime_ns > directory.mtime_ns


async def test_keys_and_bytes_are_counted_when_something_has_changed(
    autojump_clock: MockClock, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_now(b"/d/f", b"12345")
    async with open_mount(store) as mount:

        def counted() -> tuple[int, int]:
            found = mount.mirror.statistics()
            return found.keys, found.bytes

        await trio.sleep(1)
        assert counted() == (1, 5)
        store.put_now(b"/d/", b"")
        store.put_now(b"/d/f", b"123")
        await write(mount, (b"g",), b"4567")
        store.delete_now(b"/d/f")
        await trio.sleep(COUNT_S)
        assert counted() == (2, 4), "the marker, and what was written here"
        monkeypatch.setattr(HeldKeys, "slices", None)
        await trio.sleep(10 * COUNT_S)  # nothing is gone through for nothing


async def test_open_handle_keeps_its_version(autojump_clock: MockClock, store: FakeStore) -> None:
    store.put_now(b"/f", b"one")
    async with open_mount(store, cache_size=0) as mount:
        handle = await mount.kernel.open((b"f",), os.O_RDONLY)
        store.put_now(b"/f", b"another")
        store.compact_now(store.revision)
        await quiet(mount)
        assert await mount.kernel.read(handle) == b"one"
        assert (await mount.kernel.fstat(handle.inode)).size == 3
        assert await content(mount, (b"f",)) == b"another"
        await mount.kernel.close(handle)


async def test_own_change_keeps_the_inode(autojump_clock: MockClock, store: FakeStore) -> None:
    store.put_now(b"/f", b"one")
    async with open_mount(store) as mount:
        inode = (await mount.kernel.stat((b"f",))).inode
        await write(mount, (b"f",), b"two")
        assert (await mount.kernel.stat((b"f",))).inode == inode
        assert mount.kernel.invalidated == []


async def test_own_value_is_not_fetched_back(autojump_clock: MockClock, store: FakeStore) -> None:
    async with open_mount(store) as mount:
        await write(mount, (b"f",), b"one")
        ranges = len(store.range_calls)
        assert await content(mount, (b"f",)) == b"one"
        assert len(store.range_calls) == ranges


async def test_evicted_value_is_fetched_at_its_revision(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    revision = store.put_now(b"/f", b"one")
    async with open_mount(store, cache_size=0) as mount:
        store.put_now(b"/g", b"other")
        await quiet(mount)
        assert await content(mount, (b"f",)) == b"one"
        assert store.range_calls[-1].revision == revision


# --- switching ------------------------------------------------------------------------------


async def test_both_keys_of_a_revision_flip_together(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """While the kernel lets go, lookups answer the old state, and nothing may keep that."""
    store.put_now(b"/a", b"1")
    store.put_now(b"/b", b"1")
    async with open_mount(store) as mount:
        for path in ((b"a",), (b"b",)):
            assert await content(mount, path) == b"1"
        mount.kernel.hold_notifications()
        store.commit_now(Transaction(then=(Put(b"/a", b"2"), Put(b"/b", b"2"))))
        await trio.testing.wait_all_tasks_blocked()
        for name in (b"a", b"b"):
            answer = await mount.filesystem.lookup(1, name)
            assert answer is not None
            assert answer.timeout_s == 0.0
            assert (await mount.filesystem.getattr(answer.inode)).timeout_s == 0.0
            node = mount.tree.root.children[name]
            assert await mount.view.value(node) == b"1"  # type: ignore[arg-type]
            mount.filesystem.forget([(answer.inode, 1)])
        mount.kernel.release_notifications()
        await quiet(mount)
        for path in ((b"a",), (b"b",)):
            assert (await mount.kernel.stat(path)).timeout_s > 0
            assert await content(mount, path) == b"2"


async def test_a_directory_that_a_call_of_ours_holds_is_no_alarm(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """No warning is expected: the call waits for etcd, and that is said elsewhere."""
    store.put_now(b"/d/a", b"1")
    async with open_mount(store) as mount:
        assert await content(mount, (b"d", b"a")) == b"1"
        directory = mount.tree.root.children[b"d"].inode
        with mount.view.holding((Dentry(directory, b"b"),)):
            mount.kernel.stick(directory, trio.current_time() - 1)
            assert mount.mirror.staleness.statistics().stale_s == 1
            mount.kernel.stick(directory, None)


@pytest.mark.expect_log(STUCK)
async def test_what_is_in_a_stuck_directory_is_not_kept(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/d/a", b"1")
    store.put_now(b"/e/a", b"1")
    async with open_mount(store) as mount:
        for path in ((b"d", b"a"), (b"e", b"a")):
            assert await content(mount, path) == b"1"
        d, e = (mount.tree.root.children[name].inode for name in (b"d", b"e"))

        async def lifetimes(directory: int) -> list[float]:
            found = await mount.filesystem.lookup(directory, b"a")
            assert found is not None
            try:
                missing = await mount.filesystem.lookup(directory, b"b")
            except NotFoundError:
                return [found.timeout_s, 0]
            assert missing is None
            return [found.timeout_s, mount.filesystem.kernel_timeout_s]

        stick, staleness = mount.kernel.stick, mount.mirror.staleness
        stick(d, trio.current_time() - 1)
        assert (await lifetimes(d), await lifetimes(e)) == ([0, 0], [60, 60])
        await trio.sleep(2)
        assert staleness.statistics().stale_s == 3
        stick(None, trio.current_time())
        assert (await lifetimes(d), await lifetimes(e)) == ([0, 0], [0, 0])
        stick(d, None)
        await trio.sleep(2)
        assert staleness.statistics().stale_s == 2
        assert staleness.statistics().connected
        stick(None, None)
        assert (await lifetimes(d), await lifetimes(e)) == ([60, 60], [60, 60])
        assert staleness.statistics().stale_s == 0


async def test_a_name_that_appears_is_not_cached_as_missing_meanwhile(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    async with open_mount(store) as mount:
        assert await content(mount, (b"new",)) is None
        mount.kernel.hold_notifications()
        store.put_now(b"/new", b"1")
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Exception, match="no b'new'"):
            await mount.filesystem.lookup(1, b"new")
        mount.kernel.release_notifications()
        await quiet(mount)
        assert await content(mount, (b"new",)) == b"1"


async def test_changes_of_this_mount_while_the_kernel_lets_go(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """A plan is made anew before it is applied: nothing that came between is lost."""
    store.put_now(b"/a", b"1")
    async with open_mount(store) as mount:
        await mount.kernel.stat((b"a",))
        mount.kernel.hold_notifications()
        store.commit_now(Transaction(then=(Put(b"/a", b"2"), Put(b"/c", b"2"))))
        await trio.testing.wait_all_tasks_blocked()
        handle = await mount.kernel.open((b"c",), os.O_WRONLY | os.O_CREAT)
        await mount.kernel.write(handle, 0, b"mine")
        mount.kernel.release_notifications()
        await quiet(mount)
        await mount.kernel.close(handle)
        assert await content(mount, (b"c",)) == b"mine"
        current = store.current(b"/c")
        assert current is not None
        assert current.value == b"mine"
        await quiet(mount)


# --- settling -------------------------------------------------------------------------------


async def test_own_change_is_visible_when_the_call_returns(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    async with open_mount(store) as mount:
        await mount.kernel.mkdir((b"d",))
        assert await mount.kernel.listdir(()) == [b"d"]
        await mount.kernel.rmdir((b"d",))
        assert await mount.kernel.listdir(()) == []
        assert mount.mirror.statistics().ahead == 0
        assert not mount.mirror._invalidator._held  # nothing of what was changed is kept


async def test_own_put_is_shown_before_the_watch_brings_it(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """If what is shown is the revision before it, nobody would have to see anything first."""
    store.put_now(b"/f", b"old")
    async with open_mount(store) as mount:
        inode = (await mount.kernel.stat((b"f",))).inode
        store.hold_watches()
        began = trio.current_time()
        for value in (b"mine", b"and again"):
            await write(mount, (b"f",), value)
            assert mount.mirror.revision == store.revision
            assert await content(mount, (b"f",)) == value
        assert trio.current_time() == began
        store.release_watches()
        await quiet(mount)
        assert await content(mount, (b"f",)) == b"and again"
        assert (await mount.kernel.stat((b"f",))).inode == inode
        statistics = mount.mirror.statistics()
        assert (statistics.ahead, statistics.events) == (0, 2)
        store.put_now(b"/f", b"foreign")
        await quiet(mount)
        assert await content(mount, (b"f",)) == b"foreign"


async def test_own_put_is_not_shown_before_what_others_did_first(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/f", b"old")
    async with open_mount(store, settle_timeout_s=60.0) as mount:
        store.hold_watches()
        store.put_now(b"/other", b"first")
        seen: list[bytes | None] = []

        async def writer() -> None:
            await write(mount, (b"f",), b"mine")
            seen.append(await content(mount, (b"other",)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer)
            await trio.testing.wait_all_tasks_blocked()
            assert mount.mirror.revision < store.revision
            store.release_watches()
        assert seen == [b"first"]


@pytest.mark.expect_log(AGAIN)
async def test_own_put_is_not_shown_at_once_while_the_watch_is_lost(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """What etcd answers then may be of another history, in which the revision means nothing."""
    store.put_now(b"/f", b"old")
    async with open_mount(store) as mount:
        store.hold_watches()
        store.break_watches()
        await trio.testing.wait_all_tasks_blocked()
        assert not mount.mirror.staleness.connected
        await write(mount, (b"f",), b"mine")
        assert mount.mirror.statistics().ahead == 1


async def test_attributes_of_what_this_mount_has_made_are_not_read(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """Of a key that another client makes they are, lest it be shown open to all."""
    async with open_mount(store, prefix=b"/a/") as mount:
        store.hold_watches()
        await write(mount, (b"f",), b"mine")
        before = len(store.commit_calls)
        store.release_watches()
        await quiet(mount)
        assert len(store.commit_calls) == before
        store.put_now(b"/a/g", b"foreign")
        await quiet(mount)
        assert len(store.commit_calls) == before + 1


@pytest.mark.expect_log(LATE)
async def test_late_watch_is_not_waited_for_for_ever(
    autojump_clock: MockClock, store: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.put_now(b"/f", b"old")
    async with open_mount(store, settle_timeout_s=2.0) as mount:
        inode = (await mount.kernel.stat((b"f",))).inode
        store.hold_watches()
        store.put_now(b"/other", b"")
        began = trio.current_time()
        await write(mount, (b"f",), b"mine")
        assert trio.current_time() - began == pytest.approx(2.0)
        assert LATE in [record.msg for record in caplog.records]
        assert mount.mirror.statistics().ahead == 1
        assert await content(mount, (b"f",)) == b"mine"
        store.release_watches()
        await quiet(mount)
        assert (await mount.kernel.stat((b"f",))).inode == inode
        assert await content(mount, (b"f",)) == b"mine"


@pytest.mark.expect_log(LATE)
async def test_older_events_do_not_overwrite_what_was_applied_ahead(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/f", b"old")
    async with open_mount(store) as mount:
        await mount.kernel.stat((b"f",))
        store.hold_watches()
        store.put_now(b"/f", b"foreign and older")
        await write(mount, (b"f",), b"mine")
        seen: list[bytes | None] = []
        store.release_watches()
        while mount.mirror.revision < store.revision:
            await trio.lowlevel.checkpoint()
            seen.append(await content(mount, (b"f",)))
        await quiet(mount)
        seen.append(await content(mount, (b"f",)))
        assert set(seen) == {b"mine"}


@pytest.mark.expect_log(LATE)
async def test_older_deletion_does_not_undo_what_was_applied_ahead(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/f", b"old")
    async with open_mount(store) as mount:
        store.hold_watches()
        store.delete_now(b"/f")
        handle = await mount.kernel.open((b"f",), os.O_WRONLY | os.O_TRUNC)
        await mount.kernel.write(handle, 0, b"dropped")
        await mount.kernel.close(handle)  # the key was deleted: as good as unlinked
        store.release_watches()
        await quiet(mount)
        assert await content(mount, (b"f",)) is None
        assert store.current(b"/f") is None


@pytest.mark.expect_log(LATE)
async def test_what_is_applied_ahead_is_invalidated_too(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """An old version that is published again puts its inode back at the path."""
    store.put_now(b"/f", b"old")
    async with open_mount(store) as mount:
        handle = await mount.kernel.open((b"f",), os.O_WRONLY | os.O_TRUNC)
        await mount.kernel.write(handle, 0, b"mine")
        store.put_now(b"/f", b"foreign")
        await quiet(mount)
        assert await content(mount, (b"f",)) == b"foreign"
        store.hold_watches()
        store.put_now(b"/other", b"")
        await mount.kernel.close(handle)
        assert mount.mirror.statistics().ahead == 1
        await quiet(mount)
        assert await content(mount, (b"f",)) == b"mine"
        store.release_watches()
        await quiet(mount)
        assert await content(mount, (b"f",)) == b"mine"


@pytest.mark.expect_log(LATE)
async def test_newer_event_replaces_what_was_applied_ahead(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/f", b"old")
    async with open_mount(store) as mount:
        store.hold_watches()
        await write(mount, (b"f",), b"mine")
        store.put_now(b"/f", b"foreign and newer")
        store.release_watches()
        await quiet(mount)
        assert await content(mount, (b"f",)) == b"foreign and newer"


async def test_event_that_deletes_what_was_just_published(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """The put of a new file and its deletion by another client come in one batch."""
    async with open_mount(store) as mount:
        handle = await mount.kernel.open((b"f",), os.O_WRONLY | os.O_CREAT)
        await mount.kernel.write(handle, 0, b"mine")
        store.hold_watches()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.kernel.close, handle)
            await trio.testing.wait_all_tasks_blocked()
            store.delete_now(b"/f")
            store.release_watches()
        await quiet(mount)
        assert await content(mount, (b"f",)) is None
        assert not mount.tree.root.children


async def test_a_value_of_a_file_that_nobody_has_open_is_visible_at_once(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """The kernel is told in the same step; the thread that tells it of names is not woken."""
    for name in (b"/x", b"/open"):
        store.put_now(name, b"1")
    async with open_mount(store) as mount:
        assert await content(mount, (b"x",)) == b"1"
        inode = (await mount.kernel.stat((b"x",))).inode
        handle = await mount.kernel.open((b"open",), os.O_RDONLY)
        mount.kernel.submit = _refuse  # type: ignore[method-assign]
        store.put_now(b"/x", b"2")
        await trio.testing.wait_all_tasks_blocked()
        assert mount.mirror.revision == store.revision
        assert mount.kernel.invalidated[-1].inode == inode  # type: ignore[union-attr]
        assert await content(mount, (b"x",)) == b"2"
        del mount.kernel.submit
        store.put_now(b"/open", b"2")
        await quiet(mount)
        assert await mount.kernel.read(handle, 0, 9) == b"1"
        assert await content(mount, (b"open",)) == b"2"
        await mount.kernel.close(handle)


def _refuse(cached: Collection[Cached], done: Callable[[], None] | None = None) -> None:
    """Stand for a thread that nobody may wake."""
    assert not cached
    assert done is not None
    done()


async def test_batch_that_needs_the_lock_of_a_waiting_call(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """MKDIR holds the directory and waits for its own batch; one with it wants that lock."""
    store.put_now(b"/x", b"1")
    async with open_mount(store, settle_timeout_s=60.0) as mount:
        assert await content(mount, (b"x",)) == b"1"
        assert await content(mount, (b"y",)) is None  # cached as missing
        store.hold_watches()
        async with trio.open_nursery() as nursery:
            store.put_now(b"/x", b"between")
            nursery.start_soon(mount.kernel.mkdir, (b"d",))
            await trio.testing.wait_all_tasks_blocked()
            store.put_now(b"/y", b"2")
            began = trio.current_time()
            store.release_watches()
        assert trio.current_time() == began, "it was stuck until a timeout"
        assert mount.mirror.statistics().early == 1
        assert mount.mirror.statistics().ahead == 0
        await quiet(mount)
        assert await content(mount, (b"y",)) == b"2"
        assert sorted(await mount.kernel.listdir(())) == [b"d", b"x", b"y"]


async def test_batch_before_its_own_needs_the_lock(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/x", b"1")
    async with open_mount(store, settle_timeout_s=60.0) as mount:
        assert await content(mount, (b"x",)) == b"1"
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            store.hold("commit")
            nursery.start_soon(mount.kernel.mkdir, (b"d",))
            await trio.testing.wait_all_tasks_blocked()
            store.put_now(b"/x", b"2")
            await trio.testing.wait_all_tasks_blocked()
            store.release("commit")
        assert trio.current_time() == began
        await quiet(mount)
        assert await content(mount, (b"x",)) == b"2"


async def test_rmdir_holds_the_lock_of_what_goes_as_well(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/d/", b"")
    store.put_now(b"/d/x", b"1")
    async with open_mount(store, settle_timeout_s=60.0) as mount:
        assert await content(mount, (b"d", b"x")) == b"1"
        store.delete_now(b"/d/x")
        await quiet(mount)
        assert await content(mount, (b"d", b"x")) is None  # cached as missing
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            store.hold("commit")

            async def rmdir() -> None:
                with pytest.raises(OSError, match="entries"):
                    await mount.kernel.rmdir((b"d",))

            nursery.start_soon(rmdir)
            await trio.testing.wait_all_tasks_blocked()
            store.put_now(b"/d/x", b"2")
            await trio.testing.wait_all_tasks_blocked()
            store.release("commit")
        assert trio.current_time() == began
        await quiet(mount)
        assert await content(mount, (b"d", b"x")) == b"2"


async def test_revisions_outside_of_the_prefix_are_not_waited_for(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/p/d/x", b"1")
    async with open_mount(store, prefix=b"/p/") as mount:
        await mount.kernel.stat((b"d",))
        store.hold("commit")
        began = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def rmdir() -> None:
                with pytest.raises(OSError, match="d"):
                    await mount.kernel.rmdir((b"d",))

            nursery.start_soon(rmdir)
            await trio.testing.wait_all_tasks_blocked()
            store.delete_now(b"/p/d/x")
            store.put_now(b"/elsewhere", b"")
            store.release("commit")
        assert trio.current_time() == began


# --- breaking and mending -------------------------------------------------------------------


@pytest.mark.expect_log(AGAIN)
async def test_broken_watch_is_resumed(autojump_clock: MockClock, store: FakeStore) -> None:
    store.put_now(b"/f", b"1")
    async with open_mount(store) as mount:
        ranges = len(store.range_calls)
        store.break_watches()
        store.put_now(b"/f", b"2")
        with trio.fail_after(BOUND_S):
            await mount.mirror.reached(store.revision)
        assert await content(mount, (b"f",)) == b"2"
        assert all(call.end is None for call in store.range_calls[ranges:]), "listed again"
        await quiet(mount)


@pytest.mark.expect_log(AGAIN)
async def test_after_compaction_only_what_changed_is_invalidated(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/same", b"1")
    store.put_now(b"/changed", b"1")
    store.put_now(b"/deleted", b"1")
    store.put_now(b"/d/", b"")
    async with open_mount(store) as mount:
        same = await mount.kernel.stat((b"same",))
        for name in (b"changed", b"deleted", b"d"):
            await mount.kernel.stat((name,))
        assert await content(mount, (b"new",)) is None
        store.hold_watches()
        store.put_now(b"/changed", b"2")
        store.delete_now(b"/deleted")
        store.put_now(b"/new", b"1")
        store.compact_now(store.revision)
        store.break_watches(CompactedError("gone", store.revision))
        store.release_watches()
        with trio.fail_after(BOUND_S):
            await mount.mirror.reached(store.revision)
        root = mount.tree.root.inode
        told = {c for c in mount.kernel.invalidated if isinstance(c, Dentry)}
        assert told == {Dentry(root, b"deleted"), Dentry(root, b"new")}
        followed = {c.within for c in mount.kernel.invalidated if isinstance(c, CachedAttributes)}
        assert followed == {None, Dentry(root, b"changed")}, "the root's attributes, and its"
        assert (await mount.kernel.stat((b"same",))).inode == same.inode
        assert await content(mount, (b"changed",)) == b"2"
        assert await content(mount, (b"deleted",)) is None
        assert await content(mount, (b"new",)) == b"1"
        await quiet(mount)


@pytest.mark.expect_log(AGAIN)
async def test_etcd_out_of_reach_leaves_what_is_known(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/f", b"1")
    async with open_mount(store) as mount:
        store.fail_next("watch", StoreUnavailableError("away"), times=5)
        store.break_watches()
        await trio.sleep(1.0)
        assert not mount.mirror.statistics().connected
        assert await content(mount, (b"f",)) == b"1"
        store.put_now(b"/f", b"2")
        with trio.fail_after(BOUND_S):
            await mount.mirror.reached(store.revision)
        assert mount.mirror.statistics().connected
        await quiet(mount)


@pytest.mark.expect_log(AGAIN, LATE)
async def test_another_history_is_listed_and_compared(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """An etcd restored from a snapshot: older revisions, other values, and they are right."""
    store.put_now(b"/kept", b"1")
    store.put_now(b"/lost", b"1")
    store.put_now(b"/changed", b"1")
    async with open_mount(store) as mount:
        for name in (b"kept", b"lost", b"changed"):
            await mount.kernel.stat((name,))
        store.hold_watches()
        await write(mount, (b"ahead",), b"mine")  # applied ahead of the watch
        other = FakeStore()
        other.put_now(b"/kept", b"1")
        other.put_now(b"/changed", b"other")
        replace_history(store, other)
        store.break_watches()
        store.release_watches()
        await trio.sleep(BOUND_S)
        assert mount.mirror.revision == other.revision < 6
        assert sorted(await mount.kernel.listdir(())) == [b"changed", b"kept"]
        assert await content(mount, (b"changed",)) == b"other"
        await quiet(mount)
        now_ns = int(trio.current_time() * 1e9)
        store.put_now(b"/ahead", b"new history")
        await quiet(mount)
        assert await content(mount, (b"ahead",)) == b"new history"
        stat = await mount.kernel.stat((b"ahead",))
        assert stat.mtime_ns >= now_ns, "when another revision of that number was made says nothing"


def replace_history(store: FakeStore, other: FakeStore) -> None:
    """Make the store hold what the other does, its revisions included."""
    for name in ("_first", "_live", "_keys", "_versions", "_history", "_compacted"):
        setattr(store, name, getattr(other, name))


@pytest.mark.expect_log(AGAIN, "a batch could not be applied; this is a bug of etcdfs")
async def test_batch_that_cannot_be_applied_leads_to_a_new_listing(
    autojump_clock: MockClock,
    store: FakeStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A bug of ours in the core must not end the mirror; it is logged with its traceback."""
    store.put_now(b"/f", b"1")
    async with open_mount(store) as mount:
        await mount.kernel.stat((b"f",))
        update = mount.mirror.update
        plan = update.plan
        calls = iter([True])

        def failing(*args: object, **kwargs: object) -> object:
            if next(calls, False):
                raise RuntimeError("planted")
            return plan(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(update, "plan", failing)
        store.put_now(b"/f", b"2")
        with trio.fail_after(BOUND_S):
            await mount.mirror.reached(store.revision)
        assert await content(mount, (b"f",)) == b"2"
        assert any(r.exc_info and r.levelno == logging.ERROR for r in caplog.records)


# --- starting -------------------------------------------------------------------------------


async def test_first_listing_that_fails_is_an_error(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.fail_next("range", StoreUnavailableError("away"))
    with pytest.raises(ExceptionGroup) as caught:
        async with open_mount(store):
            raise AssertionError("it started")
    assert caught.group_contains(StoreUnavailableError)


async def test_keyspace_of_several_pages(autojump_clock: MockClock, store: FakeStore) -> None:
    store.commit_now(Transaction(then=tuple(Put(b"/d/%03d" % i, b"") for i in range(100))))
    store.commit_now(Transaction(then=(Delete(b"/d/050"),)))
    async with open_mount(store) as mount:
        names = await mount.kernel.listdir((b"d",))
        assert names == [b"%03d" % i for i in range(100) if i != 50]
        assert mount.mirror.statistics().listed_keys == 99


# --- a tree that cannot be believed ---------------------------------------------------------

BROKEN = "a batch could not be applied; this is a bug of etcdfs"
WRONG = "%sfollowing etcd went wrong; this is a bug of etcdfs"


@pytest.mark.expect_log(AGAIN, BROKEN)
@pytest.mark.parametrize("calls_before", [0, 3, 6])
async def test_a_publish_that_fails_half_way_leaves_nothing_of_itself(
    autojump_clock: MockClock,
    store: FakeStore,
    monkeypatch: pytest.MonkeyPatch,
    calls_before: int,
) -> None:
    names = (b"a", b"b", b"c")
    for name in names:
        store.put_now(b"/d/" + name, b"1")
        store.put_now(b"/gone/" + name, b"1")
    store.put_now(b"/same/f", b"1")
    async with open_mount(store) as mount:
        same = await mount.kernel.stat((b"same", b"f"))
        above = await mount.kernel.stat((b"d",))
        opened = await mount.kernel.open((b"same", b"f"), os.O_RDONLY)
        old = await mount.kernel.open((b"gone", b"b"), os.O_RDONLY)
        buffer = await mount.kernel.open((b"d", b"new"), os.O_WRONLY | os.O_CREAT)
        await mount.kernel.write(buffer, 0, b"mine")
        with pytest.raises(FileNotFoundError):
            await mount.kernel.stat((b"d", b"missing"))
        tree, left = mount.tree, iter(range(calls_before))
        detach = tree.detach

        def failing(*args: object, **kwargs: object) -> object:
            if next(left, None) is None:
                monkeypatch.undo()
                raise RecursionError("planted")
            return detach(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(tree, "detach", failing)
        changed = [Put(b"/d/" + name, b"2") for name in names]
        gone = Delete(b"/gone/", b"/gone0")
        store.commit_now(Transaction((), (*changed, Put(b"/d/missing", b"2"), gone)))
        with trio.fail_after(BOUND_S):
            await mount.mirror.reached(store.revision)
        await quiet(mount)
        assert sorted(await mount.kernel.listdir(())) == [b"d", b"same"]
        for name in (*names, b"missing"):
            assert await content(mount, (b"d", name)) == b"2"
        assert (await mount.kernel.stat((b"same", b"f"))).inode == same.inode
        assert (await mount.kernel.stat((b"d",))).inode == above.inode
        assert await mount.kernel.read(opened) == b"1"
        for handle in (opened, old):
            await mount.kernel.close(handle)
        await mount.kernel.close(buffer)
        assert store.current(b"/d/new") is not None
        store.put_now(b"/gone/b", b"3")
        await quiet(mount)
        assert await content(mount, (b"gone", b"b")) == b"3"


@pytest.mark.expect_log(AGAIN)
async def test_an_audit_finds_a_directory_that_nothing_keeps(
    autojump_clock: MockClock, store: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.put_now(b"/d/f", b"1")
    async with open_mount(store, audit_interval_s=10.0) as mount:
        tree = mount.tree
        tree.attach(tree.root, b"ghost", tree.new_directory())
        assert sorted(await mount.kernel.listdir(())) == [b"d", b"ghost"]
        await trio.sleep(20.0)
        assert await mount.kernel.listdir(()) == [b"d"]
        await quiet(mount)
        await trio.sleep(20.0)
        assert mount.mirror.auditor.statistics().differing == 1
        assert not tree.doubtful


@pytest.mark.expect_log(AGAIN, WRONG)
async def test_whatever_goes_wrong_with_what_comes_the_mirror_goes_on(
    autojump_clock: MockClock, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_now(b"/f", b"1")
    async with open_mount(store) as mount:
        state_machine = mount.mirror.state_machine
        assert state_machine is not None
        receive, calls = state_machine.receive, iter(range(1))

        def failing(*args: object) -> object:
            if next(calls, None) is not None:
                raise ValueError("planted")
            return receive(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(state_machine, "receive", failing)
        store.put_now(b"/f", b"2")
        with trio.fail_after(BOUND_S):
            await mount.mirror.reached(store.revision)
        assert await content(mount, (b"f",)) == b"2"


# --- memory and pauses ----------------------------------------------------------------------


async def test_a_first_listing_holds_no_more_values_than_are_kept(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    for n in range(100):
        store.put_now(b"/%03d" % n, b"x" * 100_000)
    async with open_mount(store, cache_size=1 << 20) as mount:
        statistics = mount.value_cache.statistics()
        assert (statistics.entries, statistics.evictions) == (10, 0)
        assert statistics.size <= 1 << 20
        assert await content(mount, (b"007",)) == b"x" * 100_000


@pytest.mark.expect_log(AGAIN)
@pytest.mark.parametrize("room", [100_000, 10_000_000], ids=["too much", "all of it"])
async def test_however_much_differs_after_a_new_listing(
    autojump_clock: MockClock, store: FakeStore, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr("etcdfs.mirror.mirror.STAGED_BYTES", room)
    for n in range(50):
        store.put_now(b"/d/%03d" % n, b"1" * 10_000)
    async with open_mount(store, cache_size=room // 100) as mount:
        above = await mount.kernel.stat((b"d",))
        same = await mount.kernel.stat((b"d", b"049"))
        store.hold_watches()
        for n in range(40):
            store.put_now(b"/d/%03d" % n, b"2" * 10_000)
        store.delete_now(b"/d/048")
        store.compact_now(store.revision)
        store.break_watches(CompactedError("gone", store.revision))
        store.release_watches()
        with trio.fail_after(BOUND_S):
            await mount.mirror.reached(store.revision)
        await quiet(mount)
        for n in range(50):
            expected = None if n == 48 else (b"2" if n < 40 else b"1") * 10_000
            assert await content(mount, (b"d", b"%03d" % n)) == expected
        assert (await mount.kernel.stat((b"d",))).inode == above.inode
        assert (await mount.kernel.stat((b"d", b"049"))).inode == same.inode


async def test_comparing_a_listing_lets_others_have_their_turn(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    keys = [b"/%02d/%04d" % (n % 10, n) for n in range(20_000)]
    entries = [KeyValue(key, b"v", Revision(2), Revision(2), 1) for key in sorted(keys)]
    async with open_mount(store) as mount:
        load(mount.tree, entries)
        staging = Staging(mount.tree, mount.value_cache, most_bytes=1000)
        staging.add(entries[: len(entries) // 2])
        turns = 0

        async def take_turns() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_turns)
            await trio.lowlevel.checkpoint()
            gone = await staging.differences(Revision(3))
            nursery.cancel_scope.cancel()
        assert len(gone) == len(entries) // 2
        assert turns > len(entries) // 100, "no more than a hundred keys at a time or so"


async def test_the_first_listing_says_how_far_it_is(
    autojump_clock: MockClock, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    run = Mirror.run

    async def run_and_tell(mirror: Mirror, _progress: object, **named: Any) -> None:
        await run(mirror, lambda keys, size: told.append((keys, size)), **named)

    monkeypatch.setattr(Mirror, "run", run_and_tell)
    for number in range(100):
        store.put_now(b"/%d" % number, b"12345")
    async with open_mount(store):
        assert told == sorted(told)
        assert told[-1] == (100, 500)


async def test_the_target_of_a_link_that_was_asked_for_meanwhile_is_not_kept(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """A READLINK that comes when the kernel has let go, and before the change is shown."""
    store.put_now(b"/beside", b"")
    async with open_mount(store) as mount:
        await mount.filesystem.symlink(ROOT_INODE, b"link", b"old")
        await mount.kernel.stat((b"beside",))
        assert await mount.kernel.readlink((b"link",)) == b"old"
        async with mount.kernel.inodes[ROOT_INODE].lock.held(exclusive=False):
            await store.commit(Transaction(then=(Put(b"/link", b"new"), Delete(b"/beside"))))
            await trio.testing.wait_all_tasks_blocked()
            assert await mount.kernel.readlink((b"link",)) == b"old"
        await quiet(mount)
        assert await mount.kernel.readlink((b"link",)) == b"new"
