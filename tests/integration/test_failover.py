"""What becomes of reads, writes and watches when the member in use fails."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio

from etcdfs.errors import (
    OutcomeUnknownError,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
    WatchLostError,
)
from etcdfs.etcd import connection as etcd_connection
from etcdfs.etcd.client import EtcdStore, open_store
from etcdfs.keyspace.store import END_OF_KEYS, Put, Transaction, WatchEvents, WatchOpened, unchanged
from etcdfs.options import Endpoint
from tests.support.cluster import Cluster
from tests.support.etcd_process import EtcdProcess, EtcdProcessError
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.etcd, pytest.mark.oldest_and_newest_etcd]

TIMEOUT_S = 6.0
BOUND_S = 40.0
PUT = Transaction(then=(Put(b"a", b"1"),))


@pytest.fixture(scope="module")
def shared(etcd_binary: Path) -> Iterator[Cluster]:
    """Three members for the whole module."""
    with Cluster(etcd_binary) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    yield shared
    shared.heal()


@asynccontextmanager
async def opened(
    *endpoints: Endpoint, timeout_s: float = TIMEOUT_S, bound_s: float = BOUND_S
) -> AsyncIterator[EtcdStore]:
    with trio.fail_after(bound_s):
        async with open_store(endpoints, timeout_s=timeout_s) as store:
            yield store


def ordered(cluster: Cluster, *, leader_first: bool) -> tuple[Endpoint, ...]:
    """Return the endpoints so that the leader, or a follower, is used first."""
    leader = cluster.leader()
    followers = [m for m in cluster.members if m is not leader]
    members = [leader, *followers] if leader_first else [*followers, leader]
    return tuple(member.endpoint for member in members)


def member_at(cluster: Cluster, endpoint: Endpoint) -> EtcdProcess:
    return next(member for member in cluster.members if member.endpoint == endpoint)


# --- a member fails -------------------------------------------------------------------------


@pytest.mark.parametrize("leader_first", [False, True], ids=["follower", "leader"])
@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_the_member_in_use_fails(cluster: Cluster, how: str, leader_first: bool) -> None:
    """Reads and writes go on elsewhere, the watch ends at once, and goes on elsewhere, too."""
    endpoints = ordered(cluster, leader_first=leader_first)
    async with opened(*endpoints) as store:
        revision = (await store.commit(PUT)).revision
        async with store.watch(b"", END_OF_KEYS, revision + 1) as watch:
            await watch.receive()
            assert store.endpoint == endpoints[0]
            getattr(member_at(cluster, endpoints[0]), how)()
            assert (await store.range(b"a")).revision == revision
            assert store.endpoint != endpoints[0]
            with pytest.raises(WatchLostError):
                await watch.receive()
        assert (await store.commit(PUT)).revision == revision + 1
        async with store.watch(b"", END_OF_KEYS, revision + 1) as watch:
            assert isinstance(await watch.receive(), WatchOpened)
            message = await watch.receive()
    assert isinstance(message, WatchEvents)
    assert [event.mod_revision for event in message.events] == [revision + 1]


async def test_a_write_after_a_while_is_not_entrusted_to_a_frozen_member(
    cluster: Cluster,
) -> None:
    endpoints = ordered(cluster, leader_first=False)
    async with opened(*endpoints) as store:
        revision = (await store.commit(PUT)).revision
        member_at(cluster, endpoints[0]).pause()
        await trio.sleep(1.1)  # FRESH_S
        assert (await store.commit(PUT)).revision == revision + 1


async def test_a_majority_is_lost_and_found(cluster: Cluster) -> None:
    """Nobody pretends: reads and writes fail in time, and the watch is told."""
    async with opened(*cluster.endpoints, timeout_s=2.0) as store:
        revision = (await store.commit(PUT)).revision
        in_use = member_at(cluster, store.endpoint)
        async with store.watch(b"", END_OF_KEYS, 0) as watch:
            await watch.receive()
            for member in cluster.members:
                if member is not in_use:
                    member.kill()
            with pytest.raises((StoreTimeoutError, StoreUnavailableError)):
                await store.range(b"a")
            with pytest.raises(StoreError) as caught:
                await store.commit(PUT)
            assert isinstance(caught.value, (OutcomeUnknownError, StoreUnavailableError))
            with pytest.raises(WatchLostError):
                await watch.receive()
        await trio.to_thread.run_sync(cluster.heal)
        assert (await store.range(b"a")).revision >= revision


@pytest.fixture(scope="module")
def wired(etcd_binary: Path) -> Iterator[Cluster]:
    with Cluster(etcd_binary, wired=True, election_ms=500) as cluster:
        yield cluster


def put_with_whoever_leads(member: EtcdProcess) -> int:
    """Put a key by a member, again while the leader changes; return its last revision."""
    for _ in range(10):
        with suppress(EtcdProcessError):
            answer = json.loads(member.etcdctl("put", "a", "others", "--write-out=json"))
            return int(answer["header"]["revision"])
    pytest.fail("nobody leads")


@pytest.mark.parametrize(
    ("leader_first", "deaf_only"),
    [(False, True), (True, False)],
    ids=["deaf follower", "leader cut off"],
)
async def test_the_member_in_use_is_cut_off_from_the_others_not_from_us(
    wired: Cluster, leader_first: bool, deaf_only: bool
) -> None:
    """It answers, but not from the past: others are asked, and the watch goes to them."""
    wired.heal()
    endpoints = ordered(wired, leader_first=leader_first)
    other = member_at(wired, endpoints[1])
    async with opened(*endpoints) as store:
        revision = (await store.commit(PUT)).revision
        async with store.watch(b"", END_OF_KEYS, revision + 1) as watch:
            await watch.receive()
            assert store.endpoint == endpoints[0]
            wired.cut_off(member_at(wired, endpoints[0]), deaf_only=deaf_only)
            newer = await trio.to_thread.run_sync(put_with_whoever_leads, other)
            # From now on nobody may say anything older.
            (found,) = (await store.range(b"a")).entries
            assert (found.value, found.mod_revision) == (b"others", newer)
            assert store.endpoint != endpoints[0]
            with pytest.raises(WatchLostError):
                await watch.receive()
        done = await store.commit(PUT)
        assert done.revision == newer + 1
        async with store.watch(b"", END_OF_KEYS, revision + 1) as watch:
            assert isinstance(await watch.receive(), WatchOpened)
            assert isinstance(await watch.receive(), WatchEvents)
    wired.heal()


async def test_a_learner_is_passed_over(etcd_binary: Path) -> None:
    """It serves no linearizable reads, and no writes."""
    with Cluster(etcd_binary, size=1) as cluster:
        learner = cluster.add(learner=True)
        async with opened(learner.endpoint, cluster.members[0].endpoint) as store:
            assert store.endpoint == cluster.members[0].endpoint
            await store.commit(PUT)
            async with store.watch(b"", END_OF_KEYS, 0) as watch:
                await watch.receive()


async def test_acknowledged_writes_survive_changes_of_the_leader(cluster: Cluster) -> None:
    """Each is a compare on the one before: a lost or repeated write would break the chain."""
    acknowledged = unknown = 0
    async with opened(*cluster.endpoints) as store:
        page = await store.range(b"count")
        last = page.entries[0].mod_revision if page.entries else 0
        sent = 0

        async def count() -> None:
            nonlocal acknowledged, unknown, last, sent
            while acknowledged < 60:
                sent += 1
                value = b"%d" % sent
                put = Transaction((unchanged(b"count", last),), (Put(b"count", value),))
                try:
                    done = await store.commit(put)
                except OutcomeUnknownError:
                    unknown += 1
                    (found,) = (await store.range(b"count")).entries
                    # Either it came in, or nothing did: nobody else writes.
                    assert found.mod_revision == last or found.value == value
                    acknowledged += found.value == value
                    last = found.mod_revision
                else:
                    assert done.succeeded
                    acknowledged += 1
                    last = done.revision

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            for member in cluster.members:
                await trio.to_thread.run_sync(partial(cluster.move_leader, member))
    assert acknowledged == 60


# --- the network fails ----------------------------------------------------------------------


@pytest.fixture
def plain_etcd(etcd_binary: Path) -> Iterator[EtcdProcess]:
    with EtcdProcess(etcd_binary) as etcd:
        yield etcd


async def test_an_answer_that_is_lost(plain_etcd: EtcdProcess) -> None:
    """The write is in etcd, once; it is not known to be, and is never sent again."""
    with Proxy(plain_etcd.endpoint) as proxy:
        async with opened(proxy.endpoint, plain_etcd.endpoint, timeout_s=2.0) as store:
            await store.commit(PUT)
            assert store.endpoint == proxy.endpoint
            proxy.lose_answers = True
            with pytest.raises(OutcomeUnknownError):
                await store.commit(PUT)
            (found,) = (await store.range(b"a")).entries
            assert found.version == 2
            assert store.endpoint == plain_etcd.endpoint


async def test_a_connection_that_swallows_everything(plain_etcd: EtcdProcess) -> None:
    """A half-open connection: nothing ends, nothing comes. Alone, too, it is made anew."""
    with Proxy(plain_etcd.endpoint) as proxy:
        async with opened(proxy.endpoint, timeout_s=1.0) as store:
            await store.commit(PUT)
            proxy.swallow = True
            with pytest.raises(StoreTimeoutError):
                await store.range(b"a")
            proxy.swallow = False
            await store.commit(PUT)
            (found,) = (await store.range(b"a")).entries
            assert found.version == 2


async def test_a_watch_with_nothing_else_notices_a_frozen_member(
    plain_etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By gRPC's pings, here each second: there is no call that could run into its deadline."""
    quick = dict(etcd_connection._CHANNEL_OPTIONS)
    for option in ("keepalive_time_ms", "keepalive_timeout_ms", "http2.ping_timeout_ms"):
        assert quick[f"grpc.{option}"]
        quick[f"grpc.{option}"] = 1000
    monkeypatch.setattr(etcd_connection, "_CHANNEL_OPTIONS", tuple(quick.items()))
    async with opened(plain_etcd.endpoint) as store, store.watch(b"", END_OF_KEYS, 0) as watch:
        await watch.receive()
        plain_etcd.pause()
        with pytest.raises(WatchLostError):
            await watch.receive()
        plain_etcd.resume()


# --- names ----------------------------------------------------------------------------------

_MOVE_WITH_THE_NAME = """
import sys
from pathlib import Path
import trio
from etcdfs.etcd.client import open_store
from etcdfs.options import Endpoint
from etcdfs.keyspace.store import END_OF_KEYS, Put, Transaction

async def main(hosts, port):
    put = Transaction(then=(Put(b"a", b"1"),))
    async with open_store([Endpoint("etcd.example", int(port))], timeout_s=10.0) as store:
        revision = (await store.commit(put)).revision
        async with store.watch(b"", END_OF_KEYS, 0) as watch:
            await watch.receive()
            print(revision, flush=True)
            Path(hosts).write_text("127.0.0.2 etcd.example\\n")
            await trio.to_thread.run_sync(sys.stdin.readline)
            page = await store.range(b"a")
        async with store.watch(b"", END_OF_KEYS, 0) as watch:
            await watch.receive()
            await store.commit(put)
            await watch.receive()
    print(page.entries[0].value.decode(), flush=True)

trio.run(main, *sys.argv[1:])
"""


def test_a_name_that_leads_elsewhere_is_followed(plain_etcd: EtcdProcess, tmp_path: Path) -> None:
    """In a mount namespace of its own, with another /etc/hosts; a new connection looks it up."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 etcd.example\n")
    inside = ("unshare", "--mount", "--map-root-user", "/bin/sh", "-ec")
    bind = 'mount --bind "$1" /etc/hosts; exec "$2" -c "$3" "$1" "$4"'
    tried = subprocess.run(
        [*inside, 'mount --bind "$1" /etc/hosts', "sh", hosts], capture_output=True, check=False
    )
    if tried.returncode != 0:
        pytest.skip(f"no mount namespace can be made here: {tried.stderr.decode()}")
    port = plain_etcd.endpoint.port
    program = [*inside, bind, "sh", str(hosts), sys.executable, _MOVE_WITH_THE_NAME, str(port)]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout is not None
        assert client.stdin is not None
        try:
            assert client.stdout.readline().strip().isdigit()
            plain_etcd.stop()
            plain_etcd.endpoint = replace(plain_etcd.endpoint, host="127.0.0.2")
            plain_etcd.start()
            plain_etcd.etcdctl("put", "a", "elsewhere")
            client.stdin.write("\n")
            client.stdin.flush()
            assert client.stdout.readline() == "elsewhere\n"
            assert client.wait(BOUND_S) == 0
        finally:
            client.kill()
