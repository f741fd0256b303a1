"""Void record keys are swept out, and nothing else is, whatever happens meanwhile."""

from collections.abc import Callable

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from etcdfs.consistency import audit as audit_room
from etcdfs.consistency.orphan_records import Sweeper
from etcdfs.errors import StorePermissionError, StoreUnavailableError
from etcdfs.keyspace.attribute_records import is_record_key, record_key
from etcdfs.keyspace.store import Delete, Put, Transaction
from tests.service.mirrors import quiet
from tests.support.fake_kernel import FakeMount, open_mount
from tests.support.fake_store import FakeStore, FakeWatch

INTERVAL_S = 100.0
RECORD = b'{"uid":5}'


@pytest.fixture(params=[b"/", b"/app/"], ids=["all", "prefix"])
def prefix(request: pytest.FixtureRequest) -> bytes:
    found: bytes = request.param
    return found


def with_record(store: FakeStore, *keys: bytes) -> None:
    """Put keys with attributes, as another mount does."""
    for key in keys:
        store.commit_now(Transaction(then=(Put(key, b""), Put(record_key(key), RECORD))))


def is_dressed(store: FakeStore, key: bytes) -> bool:
    return store.current(record_key(key)) is not None


async def audited(mount: FakeMount) -> None:
    await trio.sleep(INTERVAL_S * (1 + audit_room.JITTER) + 10)
    await quiet(mount)


async def test_void_side_keys_are_deleted_by_the_audit(
    autojump_clock: MockClock, store: FakeStore, prefix: bytes
) -> None:
    keys = [b"/app/%03d" % n for n in range(150)]
    with_record(store, *keys, b"/app/kept", b"/app/d/", b"/app/e/", b"/app/anew", b"/other")
    async with open_mount(store, prefix=prefix, audit_interval_s=INTERVAL_S) as mount:
        assert len(mount.tree.stored_records) == len(keys) + (5 if prefix == b"/" else 4)
        store.delete_now(b"/app/0", b"/app/1")
        store.delete_now(b"/app/1", b"/app/2")
        store.delete_now(b"/app/e/")
        store.delete_now(b"/app/anew")
        store.put_now(b"/app/anew", b"")
        before = store.revision
        await audited(mount)
        assert [is_dressed(store, k) for k in (b"/app/kept", b"/app/d/", b"/other")] == [True] * 3
        assert not any(is_dressed(store, key) for key in (*keys, b"/app/e/", b"/app/anew"))
        assert len(mount.tree.stored_records) == (3 if prefix == b"/" else 2)
        assert mount.mirror.auditor.statistics().swept == 152
        assert store.revision <= before + 7, "many at a time"
        quiet_since = store.revision
        await audited(mount)
        assert store.revision == quiet_since


def _remade(store: FakeStore, key: bytes) -> None:
    with_record(store, key)


def _changed(store: FakeStore, key: bytes) -> None:
    store.put_now(key, b"")
    store.put_now(record_key(key), b'{"uid":6}')


def _gone(store: FakeStore, key: bytes) -> None:
    store.commit_now(Transaction(then=(Delete(record_key(key)),)))
    with_record(store, key)


@pytest.mark.parametrize("change", [_remade, _changed, _gone])
@pytest.mark.parametrize("is_anew", [False, True])
async def test_what_is_made_anew_meanwhile_keeps_its_attributes(
    autojump_clock: MockClock,
    store: FakeStore,
    change: Callable[[FakeStore, bytes], None],
    is_anew: bool,
) -> None:
    with_record(store, b"/f", b"/g")
    async with open_mount(store, audit_interval_s=INTERVAL_S) as mount:
        store.delete_now(b"/f")
        store.delete_now(b"/g")
        if is_anew:
            store.put_now(b"/f", b"")
        await quiet(mount)
        store.hold("commit")
        await audited(mount)
        change(store, b"/f")
        store.release("commit")
        await quiet(mount)
        assert is_dressed(store, b"/f")
        assert not is_dressed(store, b"/g"), "the others of the same transaction go"
        assert (await mount.kernel.stat((b"f",))).uid in (5, 6)


async def test_a_mount_that_may_not_tidies_nothing(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    with_record(store, b"/f")
    async with open_mount(store, audit_interval_s=INTERVAL_S, read_only=True) as mount:
        store.delete_now(b"/f")
        await audited(mount)
        assert is_dressed(store, b"/f")
        assert not store.commit_calls


@pytest.mark.parametrize("error", [StorePermissionError("no"), StoreUnavailableError("away")])
async def test_what_was_refused_is_tried_after_the_next_audit(
    autojump_clock: MockClock, store: FakeStore, error: Exception
) -> None:
    """A password that was just changed must not leave them there for good."""
    with_record(store, b"/f")
    async with open_mount(store, audit_interval_s=INTERVAL_S) as mount:
        store.delete_now(b"/f")
        store.fail_next("commit", error)
        await audited(mount)
        assert is_dressed(store, b"/f")
        await audited(mount)
        assert not is_dressed(store, b"/f")


async def test_a_key_that_its_own_watch_has_not_brought_yet_keeps_its_attributes(
    autojump_clock: MockClock, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull = FakeWatch.pull

    def late(watch: FakeWatch) -> None:
        if is_record_key(watch._start):
            pull(watch)

    async with open_mount(store, prefix=b"/app/") as mount:
        monkeypatch.setattr(FakeWatch, "pull", late)
        with_record(store, b"/app/f")
        await trio.testing.wait_all_tasks_blocked()
        assert b"/app/f" in mount.tree.stored_records
        assert mount.tree.find(b"/app/f") is None
        await Sweeper(store, mount.tree).sweep()
        assert is_dressed(store, b"/app/f")
