"""What is made or moved needs its directory to be there, in etcd, at that very moment."""

import errno
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from etcdfs.keyspace.store import Delete, Put, Transaction
from tests.support.fake_kernel import FakeKernel, FakeMount, open_mount
from tests.support.fake_store import FakeStore

Make = Callable[[FakeKernel], Awaitable[object]]
X = (b"d", b"x")

MAKINGS: dict[str, Make] = {
    "mkdir": lambda kernel: kernel.mkdir(X),
    "create": lambda kernel: kernel.open(X, os.O_WRONLY | os.O_CREAT | os.O_EXCL),
    "mknod": lambda kernel: kernel.mknod(X),
    "rename": lambda kernel: kernel.rename((b"file",), X),
    "rename directory": lambda kernel: kernel.rename((b"full",), X),
}


@pytest.fixture(params=MAKINGS)
def make(request: pytest.FixtureRequest) -> Make:
    return MAKINGS[request.param]


async def during(
    store: FakeStore, mount: FakeMount, make: Make, then: Callable[[FakeStore], object]
) -> int:
    """Make something; let another client do `then` right before its first commit."""
    await mount.kernel.stat((b"d",))
    commit, pending = store.commit, [then]

    async def commit_after(transaction: Transaction) -> Any:
        if pending and any(isinstance(o, (Put, Delete)) for o in transaction.then):
            pending.pop()(store)
        return await commit(transaction)

    store.commit = commit_after  # type: ignore[method-assign]
    try:
        await make(mount.kernel)
    except OSError as exc:
        return exc.errno or -1
    finally:
        store.commit = commit  # type: ignore[method-assign]
        assert not pending
    return 0


def fill(store: FakeStore, *witnesses: bytes) -> None:
    for key in (b"/file", b"/full/", b"/full/a", *witnesses):
        store.put_now(key, b"value" if not key.endswith(b"/") else b"")


def below(store: FakeStore, prefix: bytes) -> list[bytes]:
    return [entry.key for entry in store.range_now(prefix, prefix[:-1] + b"0").entries]


@pytest.mark.parametrize("witness", [b"/d/", b"/d/a", b"/d/e/a"])
async def test_b27_nothing_is_made_in_a_directory_that_has_gone(
    autojump_clock: MockClock, store: FakeStore, cache: bool, make: Make, witness: bytes
) -> None:
    fill(store, witness)
    async with open_mount(store, cache=cache) as mount:
        gone = await during(store, mount, make, lambda s: s.delete_now(witness))
        assert gone == errno.ENOENT
        assert not below(store, b"/d/")
        assert store.current(b"/file") is not None
        assert below(store, b"/full/") == [b"/full/", b"/full/a"]
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(await mount.kernel.listdir(())) == [b"file", b"full"]


@pytest.mark.parametrize("witness", [b"/d/", b"/d/a", b"/d/e/a"])
async def test_b27_another_key_shows_as_well_that_the_directory_is_there(
    autojump_clock: MockClock, store: FakeStore, cache: bool, make: Make, witness: bytes
) -> None:
    fill(store, witness)

    def replace(store: FakeStore) -> None:
        store.delete_now(witness)
        store.put_now(b"/d/other", b"")

    async with open_mount(store, cache=cache) as mount:
        assert await during(store, mount, make, replace) == 0
        assert any(key.startswith(b"/d/x") for key in below(store, b"/d/"))
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(await mount.kernel.listdir((b"d",))) == [b"other", b"x"]


async def test_b27_a_name_that_is_taken_is_so_although_the_witness_has_gone(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    fill(store, b"/d/a")

    def take(store: FakeStore) -> None:
        store.delete_now(b"/d/a")
        store.put_now(b"/d/x", b"theirs")

    for name in ("mkdir", "create", "mknod"):
        store.put_now(b"/d/a", b"")
        store.delete_now(b"/d/x")
        async with open_mount(store, cache=cache) as mount:
            assert await during(store, mount, MAKINGS[name], take) == errno.EEXIST


async def test_b27_a_directory_made_anew_around_a_new_one(
    autojump_clock: MockClock, store: FakeStore, cache: bool, make: Make
) -> None:
    """What is made is there, so that the call must not say otherwise."""
    fill(store, b"/d/")

    def anew(store: FakeStore) -> None:
        store.delete_now(b"/d/")
        store.put_now(b"/d/", b"")

    async with open_mount(store, cache=cache) as mount:
        assert await during(store, mount, make, anew) == 0
        await trio.testing.wait_all_tasks_blocked()
        assert await mount.kernel.listdir((b"d",)) == [b"x"]
