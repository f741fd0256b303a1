"""The etcd door on real etcd: the contract, and what only a real connection can do."""

import ctypes
import os
import posix
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from etcdfs.errors import (
    OutcomeUnknownError,
    StoreTimeoutError,
    StoreUnavailableError,
    WatchLostError,
)
from etcdfs.etcd.client import EtcdStore, open_store
from etcdfs.keyspace.store import (
    END_OF_KEYS,
    Delete,
    Put,
    Transaction,
    WatchEvents,
    WatchOpened,
)
from etcdfs.options import Endpoint
from tests.support.etcd_process import EtcdProcess
from tests.support.store_contract import BOUND_S, Lab, StoreContract

pytestmark = [pytest.mark.etcd, pytest.mark.oldest_and_newest_etcd]

TIMEOUT_S = 10.0
"""For what is meant to succeed: generous, the machine may be busy."""
SHORT_S = 1.5
"""For what is meant to fail."""

PUT = Transaction(then=(Put(b"a", b"1"),))


@pytest.fixture(scope="module")
def etcd(etcd_binary: Path) -> Iterator[EtcdProcess]:
    """One etcd of each release for the whole module; `restore` it after doing harm."""
    with EtcdProcess(etcd_binary) as process:
        yield process


@pytest.fixture
def fragile_etcd(etcd: EtcdProcess) -> Iterator[EtcdProcess]:
    """The same etcd, for a test that kills or freezes it."""
    yield etcd
    etcd.resume()
    if not etcd.running:
        etcd.start()


@pytest.fixture
async def store(etcd: EtcdProcess) -> AsyncIterator[EtcdStore]:
    async with open_store([etcd.endpoint], timeout_s=TIMEOUT_S) as store:
        await store.commit(Transaction(then=(Delete(b"", END_OF_KEYS),)))
        yield store


class TestEtcdStore(StoreContract):
    @pytest.fixture
    def lab(self, store: EtcdStore, etcd: EtcdProcess) -> Lab:
        async def compact(revision: int) -> None:
            await trio.to_thread.run_sync(etcd.etcdctl, "compact", str(revision))

        return Lab(store=store, compact=compact)


@asynccontextmanager
async def bounded(seconds: float) -> AsyncIterator[None]:
    """Fail when the body takes longer, with room for a busy machine."""
    with trio.fail_after(seconds + 5):
        yield


@pytest.fixture
def nobody() -> Iterator[Endpoint]:
    """An address where nobody listens, and nobody else will during the test."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        yield Endpoint("127.0.0.1", sock.getsockname()[1])


# --- opening --------------------------------------------------------------------------------


async def test_a_dead_endpoint_is_passed_over(etcd: EtcdProcess, nobody: Endpoint) -> None:
    async with bounded(0), open_store([nobody, etcd.endpoint], timeout_s=TIMEOUT_S) as store:
        assert store.endpoint == etcd.endpoint
        await store.commit(PUT)


async def test_nobody_listening_is_told_at_once(nobody: Endpoint) -> None:
    with pytest.raises(StoreUnavailableError) as caught:
        async with bounded(0), open_store([nobody, nobody], timeout_s=60):
            pass
    assert str(caught.value) == f"{nobody}: connection refused"  # said twice, asked once


async def test_a_frozen_endpoint_takes_only_its_share(
    fragile_etcd: EtcdProcess, nobody: Endpoint
) -> None:
    fragile_etcd.pause()
    with pytest.raises(StoreUnavailableError) as caught:
        async with bounded(SHORT_S), open_store([fragile_etcd.endpoint, nobody], timeout_s=SHORT_S):
            pass
    assert str(caught.value) == (
        f"{fragile_etcd.endpoint}: no answer in time; {nobody}: connection refused"
    )


async def test_no_endpoint_is_an_error_too() -> None:
    with pytest.raises(StoreUnavailableError, match="no endpoints"):
        async with open_store([], timeout_s=SHORT_S):
            pass


async def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(StoreUnavailableError) as caught:
        async with bounded(1), open_store([Endpoint("no.such.invalid", 1)], timeout_s=1):
            pass
    assert "\n" not in str(caught.value)


async def test_two_stores_in_one_run(etcd: EtcdProcess) -> None:
    """Whoever opened first may leave first: they share nothing."""
    first_left = trio.Event()

    async def first(*, task_status: trio.TaskStatus[None]) -> None:
        async with open_store([etcd.endpoint], timeout_s=TIMEOUT_S):
            task_status.started()
        first_left.set()

    async with bounded(TIMEOUT_S), trio.open_nursery() as nursery:
        await nursery.start(first)
        async with open_store([etcd.endpoint], timeout_s=TIMEOUT_S) as second:
            await first_left.wait()
            await second.commit(PUT)
    async with open_store([etcd.endpoint], timeout_s=TIMEOUT_S) as third:
        await third.commit(PUT)


def forked_true() -> int:
    """Return the status of a child that becomes true(1), forked as a library in C would.

    The interpreter's lock is held by whoever forks, and nobody in the child could ever give it
    back: so no thread may ask for it then, as one does that has waited for the update interval.
    """
    libc = ctypes.PyDLL(None)  # whose calls keep the lock
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        os.stat("/")  # whoever has waited for the lock gets it
        child: int = libc.fork()
        if not child:
            libc.close_range(3, 256, 0)
            posix.execv("/bin/true", ["true"])  # os.execv is coverage's, which takes locks
    finally:
        sys.setswitchinterval(interval)
    return os.waitpid(child, 0)[1]


async def test_a_child_beside_an_open_store_becomes_what_it_should(etcd: EtcdProcess) -> None:
    """One in twenty died before exec(2), in the handlers of fork(2) that gRPC has."""
    async with open_store([etcd.endpoint], timeout_s=TIMEOUT_S) as store:
        for _ in range(100):
            await store.range(b"a")
            assert forked_true() == 0


async def test_stores_of_two_runs_at_once(etcd: EtcdProcess) -> None:
    """No loop is asked for, and none is in the way: grpc.aio could serve one alone."""

    async def another() -> None:
        async with open_store([etcd.endpoint], timeout_s=TIMEOUT_S) as store:
            await store.commit(PUT)

    async with bounded(TIMEOUT_S), open_store([etcd.endpoint], timeout_s=TIMEOUT_S) as store:
        await trio.to_thread.run_sync(trio.run, another)
        await store.commit(PUT)


async def test_calls_under_way_take_no_threads(fragile_etcd: EtcdProcess) -> None:
    """Two thousand of them; and all are told when the store is closed."""
    told = 0

    async def read(store: EtcdStore) -> None:
        nonlocal told
        with pytest.raises(StoreUnavailableError, match="the connection was closed"):
            await store.range(b"a")
        told += 1

    opening = open_store([fragile_etcd.endpoint], timeout_s=60)
    async with bounded(TIMEOUT_S), trio.open_nursery() as nursery, opening as store:
        fragile_etcd.pause()
        before = threading.active_count()
        for _ in range(2000):
            nursery.start_soon(read, store)
        await trio.testing.wait_all_tasks_blocked()
        assert threading.active_count() <= before + 1
    assert told == 2000


async def test_want_of_threads_passes(etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call for which gRPC cannot start its thread is told, and takes no later one with it."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    # Both refusals take the whole of the store's timeout.
    opening = open_store([etcd.endpoint], timeout_s=TIMEOUT_S / 3)
    async with bounded(TIMEOUT_S), opening as store:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(StoreUnavailableError, match="no thread can be started"):
                await store.renew()
            with pytest.raises(WatchLostError, match="no thread can be started"):
                async with store.watch(b"", END_OF_KEYS, 0):
                    pass
        await store.range(b"a")
        await store.commit(PUT)


async def test_calls_one_after_the_other_take_no_new_thread(
    etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself, gRPC starts a thread for each, and the caller waits for that."""

    def refuse(thread: threading.Thread) -> None:
        raise AssertionError(f"{thread} is started")

    async with bounded(TIMEOUT_S), open_store([etcd.endpoint], timeout_s=TIMEOUT_S) as store:
        await store.range(b"a")
        monkeypatch.setattr(threading.Thread, "start", refuse)
        for _ in range(10):
            await store.commit(PUT)


# --- failing --------------------------------------------------------------------------------


async def test_a_frozen_etcd(fragile_etcd: EtcdProcess) -> None:
    """A read times out; a write may have been applied; leaving takes no time."""
    with trio.fail_after(BOUND_S):
        async with (
            open_store([fragile_etcd.endpoint], timeout_s=SHORT_S) as store,
            store.watch(b"", END_OF_KEYS, 0) as watch,
        ):
            await watch.receive()
            await store.range(b"a")
            fragile_etcd.pause()
            await store.ready()  # it has answered just now
            with pytest.raises(OutcomeUnknownError):
                await store.commit(PUT)
            with pytest.raises(StoreTimeoutError):
                await store.range(b"a")
            # Nothing more is entrusted to it.
            with pytest.raises(StoreUnavailableError):
                await store.commit(PUT)
            with pytest.raises(StoreUnavailableError):
                await store.ready()
            with pytest.raises(WatchLostError):
                async with store.watch(b"", END_OF_KEYS, 0):
                    pass


async def test_a_frozen_etcd_that_comes_back(fragile_etcd: EtcdProcess) -> None:
    with trio.fail_after(BOUND_S):
        async with open_store([fragile_etcd.endpoint], timeout_s=TIMEOUT_S) as store:
            async with trio.open_nursery() as nursery:
                fragile_etcd.pause()
                nursery.start_soon(store.range, b"a")
                nursery.start_soon(store.commit, PUT)
                await trio.testing.wait_all_tasks_blocked()
                fragile_etcd.resume()
            page = await store.range(b"a")
            assert [kv.value for kv in page.entries] == [b"1"]


async def test_a_killed_etcd(fragile_etcd: EtcdProcess) -> None:
    """The watch says so, nothing hangs, a write that was not sent says that it was not."""
    with trio.fail_after(BOUND_S):
        async with (
            open_store([fragile_etcd.endpoint], timeout_s=SHORT_S) as store,
            store.watch(b"", END_OF_KEYS, 0) as watch,
        ):
            await watch.receive()
            fragile_etcd.kill()
            for _ in range(2):
                with pytest.raises(WatchLostError):
                    await watch.receive()
            with pytest.raises(WatchLostError):
                await watch.request_progress()
            with pytest.raises((StoreUnavailableError, StoreTimeoutError)):
                await store.range(b"a")
            with pytest.raises(StoreUnavailableError):
                await store.commit(PUT)
            with pytest.raises(WatchLostError):
                async with store.watch(b"", END_OF_KEYS, 0):
                    pass


async def test_a_restarted_etcd_is_found_again(fragile_etcd: EtcdProcess) -> None:
    with trio.fail_after(BOUND_S):
        async with open_store([fragile_etcd.endpoint], timeout_s=TIMEOUT_S) as store:
            revision = (await store.commit(PUT)).revision
            fragile_etcd.restart()
            assert (await store.range(b"a")).revision == revision
            assert (await store.commit(PUT)).revision == revision + 1
            async with store.watch(b"", END_OF_KEYS, revision) as watch:
                assert await watch.receive() == WatchOpened((await store.range(b"a")).revision)
                message = await watch.receive()
    assert isinstance(message, WatchEvents)
    assert [e.mod_revision for e in message.events] == [revision, revision + 1]


@pytest.mark.parametrize("what", ["range", "commit", "status", "receive"])
async def test_cancelling_is_clean(fragile_etcd: EtcdProcess, what: str) -> None:
    """No stray log, warning or unretrieved exception; the store can be used afterwards."""
    async with (
        open_store([fragile_etcd.endpoint], timeout_s=TIMEOUT_S) as store,
        store.watch(b"", END_OF_KEYS, 0) as watch,
    ):
        await watch.receive()
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "range": partial(store.range, b"a"),
            "commit": partial(store.commit, PUT),
            "status": store.status,
            "receive": watch.receive,
        }
        fragile_etcd.pause()
        with trio.fail_after(BOUND_S), trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                for _ in range(10 if what != "receive" else 1):
                    nursery.start_soon(calls[what])
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
        fragile_etcd.resume()
        await store.range(b"a")


async def test_leaving_with_calls_under_way_is_clean(fragile_etcd: EtcdProcess) -> None:
    with trio.fail_after(BOUND_S), trio.CancelScope() as scope:
        async with (
            open_store([fragile_etcd.endpoint], timeout_s=TIMEOUT_S) as store,
            store.watch(b"", END_OF_KEYS, 0) as watch,
            trio.open_nursery() as nursery,
        ):
            await watch.receive()
            fragile_etcd.pause()
            for call in (partial(store.range, b"a"), partial(store.commit, PUT), watch.receive):
                nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught


async def test_a_closed_store_says_so(etcd: EtcdProcess) -> None:
    """Calls that outlive the store end as errors, never as a foreign cancellation."""
    errors: list[Exception] = []

    async def expect_error(call: Callable[[], Awaitable[object]]) -> None:
        try:
            await call()
        except (StoreUnavailableError, OutcomeUnknownError, WatchLostError) as exc:
            errors.append(exc)

    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:
            async with open_store([etcd.endpoint], timeout_s=TIMEOUT_S) as store:
                async with store.watch(b"", END_OF_KEYS, 0) as watch:
                    await watch.receive()
                    nursery.start_soon(expect_error, watch.receive)
                    await trio.testing.wait_all_tasks_blocked()
                etcd.pause()
                nursery.start_soon(expect_error, partial(store.range, b"a"))
                nursery.start_soon(expect_error, partial(store.commit, PUT))
                await trio.testing.wait_all_tasks_blocked()
            etcd.resume()
    assert sorted(type(e).__name__ for e in errors) == [
        "OutcomeUnknownError",
        "StoreUnavailableError",
        "WatchLostError",
    ]
