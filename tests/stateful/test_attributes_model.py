"""Whatever is done to keys and record keys, by whom and in which order: what is shown is what holds.

The model is naive: an attribute holds if its record was written since its key was made, and a time
if it was set for the version that is there. The kernel's caches are in between, so that nothing
that was told to it may be forgotten when it changes.
"""

import json
import stat
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from etcdfs.errors import EtcdfsError
from etcdfs.keyspace.attribute_records import record_key
from etcdfs.keyspace.store import Delete, KeyValue, Operation, Put, Transaction
from etcdfs.vfs.attributes import Attributes, Caller, Change
from tests.support.fake_kernel import FakeMount, open_mount
from tests.support.fake_store import FakeStore

NAMES = (b"f", b"g", b"d/", b"d/f")
CALLER = Caller(7, 8)

_names = st.sampled_from(NAMES)
_modes = st.sampled_from((0o600, 0o640, 0o644, 0o755))
_foreign = st.lists(
    st.tuples(st.sampled_from(("put", "delete", "record", "no record")), _names, _modes),
    min_size=1,
    max_size=4,
    unique_by=lambda step: (step[0] in ("put", "delete"), step[1]),
)
_own = st.tuples(
    st.sampled_from(("chmod", "utime", "make", "remove", "write", "xattr")), _names, _modes
)
_steps = st.lists(st.one_of(_foreign, _foreign, _own), max_size=12)


def _operation(prefix: bytes, what: str, name: bytes, mode: int) -> Operation:
    key = prefix + name
    match what:
        case "put":
            return Put(key, b"" if name.endswith(b"/") else b"%o" % mode)
        case "delete":
            return Delete(key)
        case "record":
            record = {"mode": f"{mode:04o}", "uid": mode, "mtime_ns": mode}
            return Put(record_key(key), json.dumps(record).encode())
        case _:
            return Delete(record_key(key))


async def _change(mount: FakeMount, what: str, name: bytes, mode: int) -> None:
    """Do something through the mount; it may fail, for the name may be missing."""
    path = tuple(name.strip(b"/").split(b"/"))
    filesystem, kernel = mount.filesystem, mount.kernel
    if what == "make":
        await (kernel.mkdir if name.endswith(b"/") else kernel.mknod)(path, mode, CALLER)
        return
    if what == "remove":
        await (kernel.rmdir if name.endswith(b"/") else kernel.unlink)(path)
        return
    inode = (await mount.kernel.stat(path)).inode
    if what == "chmod":
        await filesystem.setattr(inode, Change(mode=mode))
    elif what == "utime":
        await filesystem.setattr(inode, Change(mtime_ns=mode, atime_ns=mode))
    elif what == "xattr":
        await filesystem.xattrs.setxattr(inode, b"user.a", b"%o" % mode)
    else:
        await filesystem.setattr(inode, Change(size=mode))


def _expected(store: FakeStore, prefix: bytes, name: bytes) -> tuple[int, int, int | None] | None:
    """Return mode, owner and the time that was set; None if there is no such path."""
    own, stored_record = store.current(prefix + name), store.current(record_key(prefix + name))
    if own is None and (name != b"d/" or store.current(prefix + b"d/f") is None):
        return None
    found: dict[str, Any] = {}
    if (
        own is not None
        and stored_record is not None
        and stored_record.mod_revision >= own.create_revision
    ):
        found = json.loads(stored_record.value)
    mode = int(found["mode"], 8) if "mode" in found else (0o755 if name.endswith(b"/") else 0o644)
    mtime_ns = None
    if stored_record is not None and own is not None and not name.endswith(b"/"):
        holds = found.get("mtime_revision", stored_record.mod_revision) == own.mod_revision
        mtime_ns = found.get("mtime_ns") if holds else None
    return mode, found.get("uid", 7), mtime_ns


async def _shown(mount: FakeMount, name: bytes) -> Attributes | None:
    try:
        return await mount.kernel.stat(tuple(name.strip(b"/").split(b"/")))
    except OSError:
        return None


async def _check(mount: FakeMount, store: FakeStore, prefix: bytes) -> None:
    for name in NAMES:
        expected = _expected(store, prefix, name)
        shown = await _shown(mount, name)
        if expected is None:
            assert shown is None, name
            continue
        assert shown is not None, name
        mode, uid, mtime_ns = expected
        assert (stat.S_IMODE(shown.mode), shown.uid) == (mode, uid), name
        if mtime_ns is not None:
            assert shown.mtime_ns == mtime_ns, name


async def _run(steps: list[Any], prefix: bytes, *, cache: bool, loaded: bool) -> None:
    store = FakeStore()
    if loaded:  # what is there when the mount begins comes another way
        store.commit_now(Transaction(then=(Put(prefix + b"f", b"1"), Put(prefix + b"d/", b""))))
        for name in (b"f", b"d/", b"d/f", b"g"):
            store.put_now(record_key(prefix + name), b'{"mode":"0600","uid":3,"mtime_ns":5}')
        store.put_now(prefix + b"g", b"later than its record")
    async with open_mount(store, cache=cache, prefix=prefix) as mount:
        await _check(mount, store, prefix)
        for step in steps:
            if isinstance(step, list):
                operations = tuple(_operation(prefix, *each) for each in step)
                store.commit_now(Transaction(then=operations))
            else:
                # The name may be missing, or taken, or be no longer what it was.
                with suppress(OSError, EtcdfsError):
                    await _change(mount, *step)
            await trio.testing.wait_all_tasks_blocked()
            await _check(mount, store, prefix)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "direct"])
@pytest.mark.parametrize("prefix", [b"/", b"/p/"], ids=["inside", "outside"])
@given(steps=_steps, loaded=st.booleans())
def test_what_is_shown_is_what_holds(
    cache: bool, prefix: bytes, steps: list[Any], loaded: bool
) -> None:
    trio.run(
        lambda: _run(steps, prefix, cache=cache, loaded=loaded),
        clock=trio.testing.MockClock(autojump_threshold=0),
    )


def test_the_model_can_fail() -> None:
    """A record that is older than its key does not hold; one that is not, does."""
    store = FakeStore()
    store.put_now(record_key(b"/f"), b'{"mode":"0600"}')
    store.put_now(b"/f", b"")
    assert _expected(store, b"/", b"f") == (0o644, 7, None)
    store.put_now(record_key(b"/f"), b'{"mode":"0600"}')
    assert _expected(store, b"/", b"f") == (0o600, 7, None)
    assert isinstance(store.current(b"/f"), KeyValue)
