"""Attributes between a store in memory and the calls: races, rights, and what is only remembered."""

import json
import os
import random
import stat
from collections.abc import Awaitable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from etcdfs.errors import (
    EtcdfsError,
    OutcomeUnknownError,
    StorePermissionError,
    StoreUnavailableError,
)
from etcdfs.keyspace.attribute_records import RECHECK_S, is_record_key, record_key
from etcdfs.keyspace.store import Delete, Operation, Put, Transaction
from etcdfs.vfs.attributes import Attributes, Caller, Change
from etcdfs.vfs.leases import NUMBER_BITS, OURS
from tests.support.fake_kernel import FakeMount, open_mount
from tests.support.fake_store import FakeStore, FakeWatch

CLOSED = "attributes cannot be read: all is its owner's alone (%s); --no-attrs opens it"
CALLER = Caller(7, 8)  # the default owner of a FakeMount
LONG_AGO = 1_000_000_007


@pytest.fixture(params=[True, False], ids=["cache", "direct"])
def cache(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[b"/", b"/p/"], ids=["inside", "outside"])
def prefix(request: pytest.FixtureRequest) -> bytes:
    """Return a prefix that has the record keys inside, and one that has not."""
    return bytes(request.param)


def record(store: FakeStore, key: bytes) -> bytes | None:
    found = store.current(record_key(key))
    return None if found is None else found.value


async def errno_of(call: Awaitable[Any]) -> int:
    try:
        await call
    except (OSError, EtcdfsError) as exc:
        return exc.errno or -1
    return 0


async def stat_of(mount: FakeMount, *path: bytes) -> Attributes:
    return await mount.kernel.stat(path)


def record_keys_of(operations: tuple[Operation, ...]) -> list[bytes]:
    found: list[bytes] = []
    for operation in operations:
        if isinstance(operation, Transaction):
            found += record_keys_of((*operation.then, *operation.otherwise))
        elif is_record_key(operation.key):
            found.append(operation.key)
    return found


def forbid(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch, *, reading: bool, writing: bool
) -> None:
    """Have etcd refuse whatever touches record keys, as roles without that range do."""
    commit, look = store.commit, store.range

    async def guarded_commit(transaction: Transaction) -> Any:
        found = record_keys_of((transaction,))
        writes = [o for o in _flat((transaction,)) if isinstance(o, (Put, Delete))]
        if (reading and found) or (writing and any(is_record_key(o.key) for o in writes)):
            raise StorePermissionError("etcdserver: permission denied")
        return await commit(transaction)

    async def guarded_range(start: bytes, *args: Any, **kwargs: Any) -> Any:
        if reading and is_record_key(start):
            raise StorePermissionError("etcdserver: permission denied")
        return await look(start, *args, **kwargs)

    monkeypatch.setattr(store, "commit", guarded_commit)
    monkeypatch.setattr(store, "range", guarded_range)


def _flat(operations: tuple[Operation, ...]) -> list[Operation]:
    found: list[Operation] = []
    for operation in operations:
        if isinstance(operation, Transaction):
            found += _flat((*operation.then, *operation.otherwise))
        else:
            found.append(operation)
    return found


async def test_a_change_is_one_transaction(
    autojump_clock: MockClock, store: FakeStore, cache: bool, prefix: bytes
) -> None:
    store.put_now(prefix + b"f", b"value")
    async with open_mount(store, cache=cache, prefix=prefix) as mount:
        inode = (await stat_of(mount, b"f")).inode
        before = store.revision
        got = await mount.filesystem.setattr(inode, Change(mode=0o600, uid=1))
        assert store.revision == before + 1
        assert (got.mode & 0o7777, got.uid, got.gid) == (0o600, 1, 8)
        assert record(store, prefix + b"f") == b'{"mode":"0600","uid":1}'
        assert (await stat_of(mount, b"f")).mode & 0o7777 == 0o600
        await mount.filesystem.setattr(inode, Change(mode=0o644, uid=7))
        assert record(store, prefix + b"f") is None
        assert await mount.view.value(mount.tree.root.children[b"f"]) == b"value"  # type: ignore[arg-type]
        assert trio.current_time() == 0, "no timeout was waited for"


async def test_a_foreign_change_arrives(
    autojump_clock: MockClock, store: FakeStore, cache: bool, prefix: bytes
) -> None:
    store.put_now(prefix + b"d/f", b"value")
    async with open_mount(store, cache=cache, prefix=prefix) as mount:
        inode = (await stat_of(mount, b"d", b"f")).inode
        store.put_now(
            record_key(prefix + b"d/f"), b'{"mode":"0400","mtime_ns":7,"mtime_revision":2}'
        )
        store.put_now(prefix + b"d/", b"")
        store.put_now(record_key(prefix + b"d/"), b'{"mode":"0700","uid":5}')
        await trio.testing.wait_all_tasks_blocked()
        found = await stat_of(mount, b"d", b"f")
        assert (found.mode & 0o7777, found.mtime_ns, found.inode) == (0o400, 7, inode)
        found = await stat_of(mount, b"d")
        assert (found.mode, found.uid) == (stat.S_IFDIR | 0o700, 5)
        store.put_now(prefix + b"d/f", b"other")
        await trio.testing.wait_all_tasks_blocked()
        found = await stat_of(mount, b"d", b"f")
        assert found.mode & 0o7777 == 0o400
        assert found.mtime_ns != 7, "the time was that of the other version"
        store.delete_now(record_key(prefix + b"d/f"))
        store.delete_now(prefix + b"d/")
        await trio.testing.wait_all_tasks_blocked()
        assert (await stat_of(mount, b"d", b"f")).mode & 0o7777 == 0o644
        assert (await stat_of(mount, b"d")).mode & 0o7777 == 0o755


async def test_a_name_that_an_attribute_of_an_open_file_shows_to_be_gone_is_gone(
    autojump_clock: MockClock, store: FakeStore, cache: bool, prefix: bytes
) -> None:
    """The watch, when it comes, finds nothing left to tell the kernel of."""
    store.put_now(prefix + b"f", b"value")
    async with open_mount(store, cache=cache, prefix=prefix) as mount:
        opened = await mount.kernel.open((b"f",), os.O_RDONLY)
        store.hold_watches()
        store.delete_now(prefix + b"f")
        await mount.filesystem.setattr(opened.inode.number, Change(mtime_ns=LONG_AGO))
        with pytest.raises(FileNotFoundError):
            await stat_of(mount, b"f")
        store.release_watches()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(FileNotFoundError):
            await stat_of(mount, b"f")
        await mount.kernel.close(opened)


async def test_the_listing_has_attributes(
    autojump_clock: MockClock, store: FakeStore, cache: bool, prefix: bytes
) -> None:
    for key in (b"f", b"plain", b"v", b"v/below", b"d/", b"d/deep/er/x", b"void"):
        store.put_now(prefix + key, b"value")
    for key in (b"f", b"v", b"v/below", b"d/", b"d/deep/er/x", b"missing"):
        store.put_now(record_key(prefix + key), b'{"uid":5}')
    store.put_now(record_key(prefix + b"void"), b'{"uid":5}')
    store.delete_now(prefix + b"void")
    store.put_now(prefix + b"void", b"new")
    store.put_now(record_key(prefix + b"v/"), b'{"uid":6}')  # there is no such marker
    async with open_mount(store, cache=cache, prefix=prefix) as mount:
        owners: dict[bytes, int] = {}
        for path in ((), (b"v",)):
            for name in await mount.kernel.listdir(path):
                owners[b"/".join((*path, name))] = (await stat_of(mount, *path, name)).uid
    assert owners == {
        b"f": 5,
        b"plain": 7,
        b"v": 7,
        b"v/%value": 5,
        b"v/below": 5,
        b"d": 5,
        b"void": 7,
    }


async def test_a_directorys_time_can_be_set_again(
    autojump_clock: MockClock, store: FakeStore, cache: bool, prefix: bytes
) -> None:
    """As rsync does: when it makes the directory, and when all is in it."""
    store.put_now(prefix + b"d/", b"")
    async with open_mount(store, cache=cache, prefix=prefix) as mount:
        for name in (b"a", b"b"):
            inode = (await stat_of(mount, b"d")).inode
            await mount.filesystem.setattr(inode, Change(mtime_ns=LONG_AGO))
            assert (await stat_of(mount, b"d")).mtime_ns == LONG_AGO
            await mount.kernel.mknod((b"d", name))
            assert (await stat_of(mount, b"d")).mtime_ns != LONG_AGO
        before = store.revision
        inode = (await stat_of(mount, b"d")).inode
        await mount.filesystem.setattr(inode, Change(mtime_ns=LONG_AGO))
        assert store.revision == before + 1
        assert (await stat_of(mount, b"d")).mtime_ns == LONG_AGO
        await mount.filesystem.setattr(inode, Change(mtime_ns=LONG_AGO))
        assert store.revision == before + 1
    async with open_mount(store, cache=cache, prefix=prefix) as mount:
        assert (await stat_of(mount, b"d")).mtime_ns == LONG_AGO


async def test_a_lost_race_is_run_again(
    autojump_clock: MockClock,
    store: FakeStore,
    cache: bool,
    prefix: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.put_now(prefix + b"f", b"value")
    async with open_mount(store, cache=cache, prefix=prefix) as mount:
        inode = (await stat_of(mount, b"f")).inode
        foreign = [b'{"xattrs":{"user.theirs":"Yg=="}}', b'{"gid":3}']
        commit = store.commit

        async def racing(transaction: Transaction) -> Any:
            if foreign and any(isinstance(o, Put) for o in transaction.then):
                store.put_now(record_key(prefix + b"f"), foreign.pop())
            return await commit(transaction)

        monkeypatch.setattr(store, "commit", racing)
        await mount.filesystem.xattrs.setxattr(inode, b"user.ours", b"a")
        expected = b'{"xattrs":{"user.ours":"YQ==","user.theirs":"Yg=="}}'
        assert record(store, prefix + b"f") == expected
        names = await mount.filesystem.xattrs.listxattr(inode)
        assert names == (b"user.ours", b"user.theirs")


@pytest.mark.parametrize("again", [True, False])
async def test_a_key_that_is_another_by_now(
    autojump_clock: MockClock,
    store: FakeStore,
    cache: bool,
    again: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.put_now(b"/f", b"value")
    async with open_mount(store, cache=cache) as mount:
        inode = (await stat_of(mount, b"f")).inode
        commit = store.commit

        async def racing(transaction: Transaction) -> Any:
            if any(isinstance(o, Put) for o in transaction.then):
                store.delete_now(b"/f")
                if again:
                    store.put_now(b"/f", b"new")
            return await commit(transaction)

        monkeypatch.setattr(store, "commit", racing)
        number = await errno_of(mount.filesystem.setattr(inode, Change(mode=0o600)))
        assert os.strerror(number) == (
            "Stale file handle" if again else "No such file or directory"
        )
        assert record(store, b"/f") is None


async def test_what_is_made_has_its_attributes_in_the_same_transaction(
    autojump_clock: MockClock, store: FakeStore, cache: bool, prefix: bytes
) -> None:
    async with open_mount(store, cache=cache, prefix=prefix) as mount:
        made = mount.filesystem
        before = store.revision
        await made.mkdir(1, b"d", 0o700, CALLER)
        await made.mknod(1, b"n", stat.S_IFREG | 0o600, Caller(1, 2))
        await made.symlink(1, b"l", b"to", CALLER)
        handle, found = await made.create(1, b"f", os.O_CREAT | os.O_WRONLY, 0o640, CALLER)
        assert found.mode & 0o7777 == 0o640
        await mount.files.write(handle, 0, b"value")
        await mount.files.flush(handle)
        await mount.files.release(handle)
        assert store.revision == before + 4
        assert record(store, prefix + b"d/") == b'{"mode":"0700"}'
        assert record(store, prefix + b"n") == b'{"gid":2,"mode":"0600","uid":1}'
        assert record(store, prefix + b"l") == b'{"type":"symlink"}'
        assert record(store, prefix + b"f") == b'{"mode":"0640"}'
        assert (await stat_of(mount, b"f")).mode & 0o7777 == 0o640
        link = await stat_of(mount, b"l")
        assert (stat.S_ISLNK(link.mode), link.size) == (True, 2)
        assert await made.readlink(link.inode) == b"to"


async def test_times_go_along_with_what_was_written(
    autojump_clock: MockClock, store: FakeStore, cache: bool, prefix: bytes
) -> None:
    key = prefix + b"f"
    store.put_now(key, b"value")
    store.put_now(record_key(key), b'{"mode":"0600","mtime_ns":5}')
    async with open_mount(store, cache=cache, prefix=prefix) as mount:
        inode = (await stat_of(mount, b"f")).inode
        for data, times in ((b"1", True), (b"1", True), (b"2", False)):
            handle = await mount.filesystem.open(inode, os.O_WRONLY | os.O_TRUNC)
            await mount.files.write(handle, 0, data)
            time_ns = LONG_AGO if times else mount.tree.clock()
            change = Change(mtime_ns=time_ns, atime_ns=time_ns)
            await mount.filesystem.setattr(inode, change)
            before = store.revision
            await mount.files.flush(handle)
            await mount.files.release(handle)
            assert store.revision == before + 1
            own, stored_record = store.current(key), store.current(record_key(key))
            assert own is not None
            assert stored_record is not None
            if times:
                assert stored_record.mod_revision == store.revision
                assert (await stat_of(mount, b"f")).mtime_ns == LONG_AGO
            else:
                assert stored_record.value == b'{"mode":"0600"}', "what no longer holds is dropped"


@pytest.mark.parametrize(
    ("after_s", "kept"), [(-1, True), (0, False), (29, False), (31, True)], ids=str
)
async def test_b54_now_is_told_from_a_time_that_is_set(
    autojump_clock: MockClock, store: FakeStore, cache: bool, after_s: int, kept: bool
) -> None:
    """The request of a `touch` may be late by any time; it is stamped when it is made."""
    async with open_mount(store, cache=cache) as mount:
        await trio.sleep(100)
        handle, made = await mount.filesystem.create(1, b"f", os.O_CREAT | os.O_WRONLY)
        time_ns = mount.tree.clock() + after_s * 10**9
        await trio.sleep(30)
        await mount.filesystem.setattr(made.inode, Change(mtime_ns=time_ns, atime_ns=time_ns))
        await mount.files.flush(handle)
        await mount.files.release(handle)
        assert (await stat_of(mount, b"f")).mtime_ns == time_ns
        assert (record(store, b"/f") is not None) == kept


@pytest.mark.expect_log("attributes cannot be written: %s")
@pytest.mark.expect_log(CLOSED)
@pytest.mark.parametrize("reading", [True, False])
async def test_b70_without_rights_to_side_keys_content_still_works(
    autojump_clock: MockClock,
    store: FakeStore,
    cache: bool,
    reading: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store.put_now(b"/p/f", b"value")
    store.put_now(record_key(b"/p/f"), b'{"mode":"0600"}')
    forbid(store, monkeypatch, reading=reading, writing=True)
    async with open_mount(store, cache=cache, prefix=b"/p/") as mount:
        inode = (await stat_of(mount, b"f")).inode
        assert (await stat_of(mount, b"f")).mode & 0o7777 == 0o600
        for change in (Change(mode=0o640), Change(uid=1)):
            number = await errno_of(mount.filesystem.setattr(inode, change))
            assert os.strerror(number) == "Operation not permitted"
        assert await errno_of(mount.filesystem.symlink(1, b"l", b"x", CALLER)) == 1
        handle, _ = await mount.filesystem.create(1, b"new", os.O_CREAT | os.O_RDWR, 0o600, CALLER)
        await mount.files.write(handle, 0, b"1")
        await mount.files.flush(handle)
        await mount.files.release(handle)
        await mount.filesystem.create(1, b"x", os.O_CREAT | os.O_EXCL, 0o600, CALLER)
        await mount.filesystem.mkdir(1, b"d", 0o700, CALLER)
        assert sorted(await mount.kernel.listdir(())) == [b"d", b"f", b"new", b"x"]
        expected = 0o600 if reading else 0o644
        assert (await stat_of(mount, b"new")).mode & 0o7777 == expected
        await mount.kernel.unlink((b"f",))
        assert store.current(b"/p/f") is None
        said = [r.message for r in caplog.records if r.levelname == "WARNING"]
        assert sum("cannot be read" in line for line in said) == reading
        assert sum("cannot be written" in line for line in said) == 1


@pytest.mark.expect_log("attributes cannot be written: %s")
async def test_b70_a_mode_that_could_not_go_along_with_a_content_is_told_of(
    autojump_clock: MockClock, store: FakeStore, cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer cannot be: what is written is there, and that has no errno."""
    forbid(store, monkeypatch, reading=False, writing=True)
    async with open_mount(store, cache=cache) as mount:
        handle, _ = await mount.filesystem.create(1, b"f", os.O_CREAT | os.O_RDWR, 0o600, CALLER)
        assert mount.tree.rights.statistics().writable
        await mount.files.write(handle, 0, b"1")
        await mount.files.flush(handle)
        await mount.files.release(handle)
        rights = mount.tree.rights.statistics()
        assert (rights.writable, rights.refusals) == (False, 1)
        assert store.current(b"/f") is not None
        assert record(store, b"/f") is None


@pytest.mark.expect_log(CLOSED)
@pytest.mark.parametrize("outage", [False, True])
async def test_b71_what_was_missed_is_known_before_anything_opens(
    autojump_clock: MockClock, store: FakeStore, outage: bool
) -> None:
    """Files are made before, while and after attributes are listed that may be read again."""
    names = iter(range(100))
    refusing = True
    look, commit = store.range, store.commit

    def make() -> None:
        key = b"/p/%d" % next(names)
        puts = (Put(key, b"secret"), Put(record_key(key), b'{"mode":"0600"}'))
        store.commit_now(Transaction(then=puts))

    async def guarded_range(start: bytes, *args: Any, **kwargs: Any) -> Any:
        if not is_record_key(start):
            return await look(start, *args, **kwargs)
        if refusing:
            raise StorePermissionError("etcdserver: permission denied")
        make()
        if outage and trio.current_time() < 40:
            raise StoreUnavailableError("away")
        found = await look(start, *args, **kwargs)
        make()
        return found

    async def guarded_commit(transaction: Transaction) -> Any:
        if refusing and record_keys_of((transaction,)):
            raise StorePermissionError("etcdserver: permission denied")
        return await commit(transaction)

    store.range, store.commit = guarded_range, guarded_commit  # type: ignore[method-assign]
    store.put_now(b"/p/open", b"value")
    async with open_mount(store, prefix=b"/p/") as mount:
        make()
        await trio.testing.wait_all_tasks_blocked()
        assert (await stat_of(mount, b"0")).mode & 0o7777 == 0o600
        assert (await stat_of(mount, b"open")).mode & 0o7777 == 0o600
        refusing = False
        rights, opened = mount.tree.rights, trio.Event()
        forget = rights.on_turn

        def on_turn() -> None:
            forget()
            opened.set()

        rights.on_turn = on_turn
        with trio.fail_after(120):
            await opened.wait()
        for name in set(mount.tree.root.children) - {b"open"}:
            assert (await stat_of(mount, name)).mode & 0o7777 == 0o600
        make()
        await trio.testing.wait_all_tasks_blocked()
        assert (await stat_of(mount, b"open")).mode & 0o7777 == 0o644
        assert {(await stat_of(mount, b"%d" % n)).mode & 0o7777 for n in range(next(names))} == {
            0o600
        }


@pytest.mark.expect_log(CLOSED)
async def test_b71_what_can_be_read_says_nothing_of_what_is_refused(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    """A role reaches some records; that of one arrives just after another was refused."""
    commit, refused = store.commit, trio.Event()

    async def guarded_commit(transaction: Transaction) -> Any:
        found = record_keys_of((transaction,))
        if record_key(b"/secret") in found:
            refused.set()
            raise StorePermissionError("etcdserver: permission denied")
        committed = await commit(transaction)
        if record_key(b"/open") in found:
            await refused.wait()
            await trio.sleep(0.1)
        return committed

    store.commit = guarded_commit  # type: ignore[method-assign]
    store.put_now(b"/open", b"value")
    store.put_now(b"/secret", b"value")
    store.put_now(record_key(b"/secret"), b'{"mode":"0600"}')
    async with open_mount(store, cache=False) as mount, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(stat_of, mount, b"open")
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(10):
                assert (await stat_of(mount, b"secret")).mode & 0o7777 == 0o600
                await trio.sleep(RECHECK_S / 5)
            assert not mount.tree.rights.readable
            refused = trio.Event()


async def test_changes_that_other_rights_forbid_say_so(
    autojump_clock: MockClock, store: FakeStore, cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_mount(store, cache=cache) as mount:

        async def refuse(transaction: Transaction) -> Any:
            raise StorePermissionError("etcdserver: permission denied")

        monkeypatch.setattr(store, "commit", refuse)
        if cache:
            number = await errno_of(mount.filesystem.mkdir(1, b"d", 0o700, CALLER))
            assert os.strerror(number) == "Permission denied"
            rights = mount.tree.rights.statistics()
            assert rights.writable, "it was not the record key that was refused"


async def test_a_ttl(autojump_clock: MockClock, store: FakeStore, cache: bool) -> None:
    store.put_now(b"/f", b"value")
    async with open_mount(store, cache=cache) as mount:
        inode = (await stat_of(mount, b"f")).inode
        xattrs = mount.filesystem.xattrs
        await xattrs.setxattr(inode, b"user.etcd.ttl", b"60")
        (lease,) = store.leases
        assert await xattrs.getxattr(inode, b"user.etcd.ttl") == b"60"
        assert await xattrs.getxattr(inode, b"user.etcd.lease") == b"%016x" % lease
        assert (await stat_of(mount, b"f")).inode == inode
        await store.lease_revoke(lease)
        await trio.testing.wait_all_tasks_blocked()
        assert await errno_of(stat_of(mount, b"f")) == 2


async def test_a_file_that_a_rename_replaces_lets_its_lease_go(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/f", b"value")
    store.put_now(b"/g", b"replaced")
    async with open_mount(store, cache=cache) as mount:
        inode = (await stat_of(mount, b"g")).inode
        await mount.filesystem.xattrs.setxattr(inode, b"user.etcd.ttl", b"60")
        assert store.leases
        await mount.kernel.rename((b"f",), (b"g",))
        assert not store.leases


@pytest.mark.expect_log("attributes cannot be written: %s")
async def test_a_lease_needs_no_right_to_attributes(
    autojump_clock: MockClock, store: FakeStore, cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_now(b"/f", b"value")
    store.put_now(record_key(b"/f"), b'{"mode":"0640","mtime_ns":5,"mtime_revision":2}')
    async with open_mount(store, cache=cache) as mount:
        inode = (await stat_of(mount, b"f")).inode
        assert (await stat_of(mount, b"f")).mtime_ns == 5
        forbid(store, monkeypatch, reading=False, writing=True)
        await mount.filesystem.xattrs.setxattr(inode, b"user.etcd.ttl", b"60")
        assert await mount.filesystem.xattrs.getxattr(inode, b"user.etcd.ttl") == b"60"
        assert (await stat_of(mount, b"f")).mode & 0o7777 == 0o640


async def test_a_lease_whose_number_is_taken_gets_another(
    autojump_clock: MockClock, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in the end one of etcd's, which is nobody's to end."""
    for name in (b"/f", b"/g"):
        store.put_now(name, b"value")
    monkeypatch.setattr(random, "getrandbits", lambda _bits: 7)
    async with open_mount(store) as mount:
        xattrs = mount.filesystem.xattrs
        leases = []
        for name in (b"f", b"g"):
            inode = (await stat_of(mount, name)).inode
            await xattrs.setxattr(inode, b"user.etcd.ttl", b"60")
            leases.append(int(await xattrs.getxattr(inode, b"user.etcd.lease"), 16))
            await mount.kernel.unlink((name,))
            store.leases.add(OURS << NUMBER_BITS | 7)
        assert leases[0] == OURS << NUMBER_BITS | 7
        assert leases[1] >> NUMBER_BITS != OURS
        assert leases[1] in store.leases


@pytest.mark.parametrize(("unknown", "left"), [(False, 0), (True, 1)])
async def test_a_lease_that_was_not_attached(
    autojump_clock: MockClock, store: FakeStore, unknown: bool, left: int
) -> None:
    """It is revoked; but not if that might delete the file."""
    store.put_now(b"/f", b"value")
    async with open_mount(store) as mount:
        inode = (await stat_of(mount, b"f")).inode
        error = OutcomeUnknownError("no answer") if unknown else StorePermissionError("no")
        store.fail_next("commit", error, applied=unknown)
        if unknown:  # nor can etcd be asked what became of it
            store.fail_next("commit", StoreUnavailableError("still away"))
        setting = mount.filesystem.xattrs.setxattr(inode, b"user.etcd.ttl", b"60")
        assert await errno_of(setting) != 0
        assert len(store.leases) == left
        assert store.current(b"/f") is not None


async def test_a_key_is_never_seen_before_its_attributes(
    autojump_clock: MockClock, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record keys have a watch of their own, and it may be late."""
    pull = FakeWatch.pull

    def late(watch: FakeWatch) -> None:
        if not is_record_key(watch._start):
            pull(watch)

    async with open_mount(store, prefix=b"/p/") as mount:
        monkeypatch.setattr(FakeWatch, "pull", late)
        store.commit_now(
            Transaction(
                then=(Put(b"/p/f", b"secret"), Put(record_key(b"/p/f"), b'{"mode":"0600"}'))
            )
        )
        await trio.testing.wait_all_tasks_blocked()
        assert (await stat_of(mount, b"f")).mode & 0o7777 == 0o600


@pytest.mark.expect_log("%s; %s (attempt %d)")
async def test_side_keys_are_listed_again_after_a_compaction(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    for name in (b"a", b"b", b"c"):
        store.put_now(b"/p/" + name, b"value")
        store.put_now(record_key(b"/p/" + name), b'{"uid":5}')
    async with open_mount(store, prefix=b"/p/") as mount:
        assert [(await stat_of(mount, n)).uid for n in (b"a", b"b", b"c")] == [5, 5, 5]
        store.hold_watches()
        store.delete_now(record_key(b"/p/a"))
        store.put_now(record_key(b"/p/b"), b'{"uid":6}')
        store.compact_now(store.revision)
        store.break_watches()
        store.release_watches()
        await trio.sleep(60)
        assert [(await stat_of(mount, n)).uid for n in (b"a", b"b", b"c")] == [7, 6, 5]


async def test_an_empty_root_keeps_what_is_set(
    autojump_clock: MockClock, store: FakeStore, cache: bool, prefix: bytes
) -> None:
    async with open_mount(store, cache=cache, prefix=prefix) as mount:
        await mount.filesystem.setattr(1, Change(mode=0o700, mtime_ns=LONG_AGO))
        found = await stat_of(mount)
        assert (stat.S_IMODE(found.mode), found.mtime_ns) == (0o700, LONG_AGO)


async def test_what_is_set_as_it_is_already_puts_nothing(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(b"/f", b"1")
    async with open_mount(store, cache=cache) as mount:
        inode = (await stat_of(mount, b"f")).inode
        await mount.filesystem.xattrs.setxattr(inode, b"user.a", b"b")
        await mount.filesystem.setattr(inode, Change(mode=0o600))
        revision = store.revision
        await mount.filesystem.xattrs.setxattr(inode, b"user.a", b"b")
        await mount.filesystem.setattr(inode, Change(mode=0o600))
        assert store.revision == revision


async def test_a_time_that_was_set_outlasts_a_change_of_anything_else(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """In etcd as well, for every other mount; but not what it was set for."""
    store.put_now(b"/f", b"1")
    async with open_mount(store, cache=cache) as mount:
        inode = (await stat_of(mount, b"f")).inode
        await mount.filesystem.setattr(inode, Change(mtime_ns=7, atime_ns=7))
        await mount.filesystem.setattr(inode, Change(mode=0o600))
        await mount.filesystem.xattrs.setxattr(inode, b"user.a", b"b")
        kept = json.loads(record(store, b"/f") or b"")
        assert (kept["mtime_ns"], kept["mode"]) == (7, "0600")
        store.put_now(b"/f", b"2")
        await trio.testing.wait_all_tasks_blocked()
        inode = (await stat_of(mount, b"f")).inode
        await mount.filesystem.setattr(inode, Change(mode=0o640))
        assert "mtime_ns" not in json.loads(record(store, b"/f") or b"")


async def test_a_directory_whose_marker_another_client_makes_meanwhile(
    autojump_clock: MockClock, store: FakeStore, cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_now(b"/d/f", b"1")
    commit, left = store.commit, [b"/d/"]

    async def raced(transaction: Transaction) -> Any:
        if left and any(isinstance(o, Put) for o in _flat((transaction,))):
            key = left.pop()
            puts = (Put(key, b""), Put(record_key(key), b'{"uid":5}'))
            store.commit_now(Transaction(then=puts))
        return await commit(transaction)

    async with open_mount(store, cache=cache) as mount:
        inode = (await stat_of(mount, b"d")).inode
        monkeypatch.setattr(store, "commit", raced)
        await mount.filesystem.setattr(inode, Change(mode=0o700))
        assert not left
        assert json.loads(record(store, b"/d/") or b"") == {"mode": "0700", "uid": 5}
