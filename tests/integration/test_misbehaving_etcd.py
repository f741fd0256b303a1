"""A mirror of an etcd that says what cannot be: it goes on, and is right once etcd is."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import pytest
import trio

from etcdfs.errors import OutcomeUnknownError, StoreError, StoreProtocolError, StoreUnavailableError
from etcdfs.etcd.client import EtcdStore, open_store
from etcdfs.keyspace.store import Delete, Get, Put, Transaction
from etcdfs.options import Security
from tests.service.mirrors import AGAIN
from tests.support.bent_etcd import OTHERS, RANGES, TOKENS, TXNS, WATCHES, Bend, BentEtcd
from tests.support.etcd_process import EtcdProcess, find_etcds
from tests.support.fake_kernel import FakeMount, make_mount

pytestmark = [pytest.mark.etcd, pytest.mark.expect_log(AGAIN)]

BOUND_S = 30.0
TIMEOUT_S = 5.0
LIES = 3
"""How often etcd misbehaves before it comes to its senses."""


@pytest.fixture(scope="module")
def process() -> Iterator[EtcdProcess]:
    with EtcdProcess(next(iter(find_etcds().values()))) as process:
        yield process


@pytest.fixture
def bent(process: EtcdProcess) -> Iterator[BentEtcd]:
    with BentEtcd(process.endpoint) as bent:
        yield bent


@pytest.fixture
async def honest(process: EtcdProcess) -> AsyncIterator[EtcdStore]:
    """Yield another client of the etcd behind it, with two keys in an empty range."""
    async with open_store([process.endpoint], timeout_s=TIMEOUT_S) as store:
        await store.commit(Transaction((), (Delete(b"/t/", b"/t0"),)))
        await store.commit(Transaction((), (Put(b"/t/a", b"1"), Put(b"/t/d/b", b"1"))))
        yield store


@asynccontextmanager
async def mirrored(bent: BentEtcd) -> AsyncIterator[FakeMount]:
    async with open_store([bent.endpoint], timeout_s=TIMEOUT_S) as store:
        mount = make_mount(
            cast("Any", store), prefix=b"/t/", audit_interval_s=0.05, watch_timeout_s=60.0
        )
        async with trio.open_nursery() as nursery:
            await mount.start(nursery)
            yield mount
            mount.check_invariants()
            nursery.cancel_scope.cancel()


class Lies:
    """Hears of each lie, so that a test can wait for them."""

    def __init__(self, bent: BentEtcd) -> None:
        self._told = 0
        self._enough = trio.Event()
        token = trio.lowlevel.current_trio_token()
        bent.on_bent = lambda: token.run_sync_soon(self._count)

    async def enough(self) -> None:
        await self._enough.wait()

    def _count(self) -> None:
        self._told += 1
        if self._told == LIES:
            self._enough.set()


@pytest.mark.parametrize("bend", [*RANGES.values(), *WATCHES.values()], ids=[*RANGES, *WATCHES])
async def test_b77_a_mirror_survives_and_is_right_again(
    bent: BentEtcd, honest: EtcdStore, bend: Bend
) -> None:
    with trio.fail_after(BOUND_S):
        async with mirrored(bent) as mount, trio.open_nursery() as nursery:
            lies = Lies(bent)
            bent.bend = bend
            nursery.start_soon(keep_changing, honest)
            mount.mirror.doubt("to have everything listed again")
            await lies.enough()
            nursery.cancel_scope.cancel()
            bent.bend = None
            await honest.commit(Transaction((), (Put(b"/t/last", b"1"), Put(b"/t/d/b", b"2"))))
            await is_right(mount, honest)


async def keep_changing(honest: EtcdStore) -> None:
    """Have something to be told of, until cancelled."""
    for number in range(1_000_000):
        await honest.commit(Transaction((), (Put(b"/t/a", b"%d" % number), Put(b"/t/c", b""))))
        await trio.sleep(0.01)


async def is_right(mount: FakeMount, honest: EtcdStore) -> None:
    """Return when the mirror has all that etcd has, and nothing else."""
    while True:
        page = await honest.range(b"/t/", b"/t0")
        await mount.mirror.reached(max(entry.mod_revision for entry in page.entries))
        shown = {key: key_state.mod_revision for key, key_state in mount.tree.key_state()}
        if shown == {entry.key: entry.mod_revision for entry in page.entries}:
            return
        await mount.mirror.advanced()


@pytest.mark.parametrize("bend", RANGES.values(), ids=RANGES)
async def test_b77_a_first_listing_that_cannot_be_is_an_error(
    bent: BentEtcd, honest: EtcdStore, bend: Bend
) -> None:
    bent.bend = bend
    with trio.fail_after(BOUND_S), pytest.raises(ExceptionGroup) as caught:
        async with mirrored(bent):
            raise AssertionError("it was believed")
    assert caught.group_contains(StoreError)


@pytest.mark.parametrize("bend", [*RANGES.values(), *TXNS.values()], ids=[*RANGES, *TXNS])
async def test_b77_without_a_mirror_calls_fail_until_etcd_is_right(
    bent: BentEtcd, honest: EtcdStore, bend: Bend
) -> None:
    async with open_store([bent.endpoint], timeout_s=TIMEOUT_S) as store:
        mount = make_mount(cast("Any", store), cache=False, prefix=b"/t/")
        async with trio.open_nursery() as nursery:
            await mount.start(nursery)
            bent.bend = bend
            with trio.fail_after(BOUND_S):
                for path in ((), (b"d",)):
                    with suppress(OSError):
                        assert set(await mount.kernel.listdir(path)) <= {b"a", b"b", b"d"}
                    with suppress(OSError):
                        await mount.kernel.stat((*path, b"b"))
            bent.bend = None
            assert sorted(await mount.kernel.listdir(())) == [b"a", b"d"]
            assert await mount.kernel.listdir((b"d",)) == [b"b"]
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("bend", TXNS.values(), ids=TXNS)
async def test_what_a_transaction_did_is_unknown_if_etcd_says_what_cannot_be(
    bent: BentEtcd, honest: EtcdStore, bend: Bend
) -> None:
    async with open_store([bent.endpoint], timeout_s=TIMEOUT_S) as store:
        bent.bend = bend
        with pytest.raises(OutcomeUnknownError):
            await store.commit(Transaction((), (Put(b"/t/a", b"2"), Get(b"/t/a"))))
        with pytest.raises(StoreProtocolError):
            await store.commit(Transaction((), (Get(b"/t/a"), Get(b"/t/d/b"))))
        bent.bend = None
        assert (await store.range(b"/t/a")).entries[0].value == b"2"


@pytest.mark.parametrize("bend", TOKENS.values(), ids=TOKENS)
async def test_a_token_that_cannot_be_sent_is_none(
    bent: BentEtcd, honest: EtcdStore, bend: Bend
) -> None:
    bent.bend = bend
    security = Security(user="u", password="p")
    with pytest.raises(StoreUnavailableError):
        async with open_store([bent.endpoint], timeout_s=1.0, security=security):
            raise AssertionError("it was believed")


@pytest.mark.parametrize("bend", OTHERS.values(), ids=OTHERS)
async def test_other_answers_are_looked_at_too(
    bent: BentEtcd, honest: EtcdStore, bend: Bend
) -> None:
    async with open_store([bent.endpoint], timeout_s=TIMEOUT_S) as store:
        bent.bend = bend
        assert (await store.status()).database_size >= 0
        if bend.method == "LeaseGrant":
            with pytest.raises(StoreProtocolError):
                await store.lease_grant(10)
