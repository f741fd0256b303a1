"""The etcd door against a server that says whatever a test wants: every refusal and every end.

The server is gRPC's own, with the servicers that aetcd generated; no etcd is needed.
"""

import queue
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import trio
from aetcd import rpc
from aetcd.rpc import rpc_pb2_grpc

from etcdfs.errors import (
    CompactedError,
    FutureRevisionError,
    OutcomeUnknownError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreProtocolError,
    StoreTimeoutError,
    StoreUnavailableError,
    StoreUserError,
    StoreValueTooLargeError,
    TooManyOperationsError,
    TransactionAbortedError,
    WatchLostError,
)
from etcdfs.etcd.client import EtcdStore, open_store
from etcdfs.etcd.watch import EtcdWatch
from etcdfs.keyspace.store import (
    END_OF_KEYS,
    Get,
    KeyValue,
    Operation,
    Put,
    Tombstone,
    Transaction,
    WatchEvents,
    WatchOpened,
    WatchProgress,
)
from etcdfs.options import Endpoint

BOUND_S = 20.0
TIMEOUT_S = 10.0
PUT = Transaction(then=(Put(b"a", b"1"),))

Requests = Iterator[Any]
Code = grpc.StatusCode


class ScriptedEtcd(rpc_pb2_grpc.KVServicer, rpc_pb2_grpc.WatchServicer):  # type: ignore[misc]
    """An etcd whose answers a test writes. Its handlers run in threads of gRPC's.

    Attributes:
        refusals: What the next ranges or transactions are refused with.
        ranges: How many ranges arrived.
        cluster: The id of the cluster it says it belongs to.
        revision: The revision it answers ranges with.
        answer: What it answers transactions with; by default something that makes no sense.
        transactions: How many transactions arrived.
        metadata: What the last request came with.
        play: What a watch sends; gets the client's requests.
    """

    def __init__(self) -> None:
        self.refusals: queue.SimpleQueue[tuple[Any, str]] = queue.SimpleQueue()
        self.ranges = 0
        self.cluster = 0
        self.revision = 7
        self.transactions = 0
        self.answer = rpc.TxnResponse(
            header=header(8), succeeded=True, responses=[rpc.ResponseOp()]
        )
        self.metadata: dict[str, str] = {}
        self.play: Callable[[Requests], Iterator[Any]] = lambda _requests: iter(())
        self._server = grpc.server(ThreadPoolExecutor(max_workers=8))
        rpc_pb2_grpc.add_KVServicer_to_server(self, self._server)
        rpc_pb2_grpc.add_WatchServicer_to_server(self, self._server)
        self.endpoint = Endpoint("127.0.0.1", self._server.add_insecure_port("127.0.0.1:0"))
        self._server.start()

    def Range(self, _request: Any, context: Any) -> Any:  # noqa: N802 (gRPC's name)
        self.ranges += 1
        self._maybe_refuse(context)
        return rpc.RangeResponse(header=header(self.revision, self.cluster))

    def Txn(self, _request: Any, context: Any) -> Any:  # noqa: N802 (gRPC's name)
        self.transactions += 1
        self._maybe_refuse(context)
        return self.answer

    def Watch(self, requests: Requests, context: Any) -> Iterator[Any]:  # noqa: N802
        self.metadata = dict(context.invocation_metadata())
        for response in self.play(requests):
            if isinstance(response, tuple):
                context.abort(*response)
            yield response

    def stop(self) -> None:
        """End every call and connection."""
        self._server.stop(None).wait()

    def _maybe_refuse(self, context: Any) -> None:
        self.metadata = dict(context.invocation_metadata())
        if not self.refusals.empty():
            context.abort(*self.refusals.get())


def header(revision: int, cluster: int = 0) -> Any:
    return rpc.ResponseHeader(revision=revision, cluster_id=cluster)


def created(revision: int = 5) -> Any:
    return rpc.WatchResponse(header=header(revision), created=True)


def put_event(key: bytes, revision: int) -> Any:
    kv = {"key": key, "create_revision": revision, "mod_revision": revision, "version": 1}
    return rpc.Event(type="PUT", kv=kv)


def events(revision: int, *found: Any, fragment: bool = False) -> Any:
    return rpc.WatchResponse(header=header(revision), events=found, fragment=fragment)


@pytest.fixture
def server() -> Iterator[ScriptedEtcd]:
    server = ScriptedEtcd()
    yield server
    server.stop()


@pytest.fixture
async def store(server: ScriptedEtcd) -> AsyncIterator[EtcdStore]:
    with trio.fail_after(BOUND_S):
        async with open_store([server.endpoint], timeout_s=TIMEOUT_S) as store:
            server.ranges = 0
            yield store


@asynccontextmanager
async def watching(
    store: EtcdStore, server: ScriptedEtcd, *responses: Any, from_revision: int = 0
) -> AsyncIterator[EtcdWatch]:
    """Watch a server that sends these responses and then ends the stream without a word."""

    def play(requests: Requests) -> Iterator[Any]:
        next(requests)
        yield from responses

    server.play = play
    async with store.watch(b"", END_OF_KEYS, from_revision) as watch:
        yield watch


# --- reads and writes -----------------------------------------------------------------------

CERTAIN_REFUSALS = [
    (Code.INVALID_ARGUMENT, "etcdserver: request is too large", StoreValueTooLargeError),
    (
        Code.RESOURCE_EXHAUSTED,
        "grpc: received message larger than max (3600008 vs. 2097152)",
        StoreValueTooLargeError,
    ),
    (
        Code.INVALID_ARGUMENT,
        "etcdserver: too many operations in txn request",
        TooManyOperationsError,
    ),
    (Code.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", StoreFullError),
    (Code.PERMISSION_DENIED, "etcdserver: permission denied", StorePermissionError),
    (Code.INVALID_ARGUMENT, "etcdserver: user name is empty", StoreUserError),
    (Code.UNAUTHENTICATED, "etcdserver: invalid auth token", StoreUserError),
    (
        Code.OUT_OF_RANGE,
        "etcdserver: mvcc: required revision has been compacted",
        CompactedError,
    ),
    (
        Code.OUT_OF_RANGE,
        "etcdserver: mvcc: required revision is a future revision",
        FutureRevisionError,
    ),
    (Code.INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request", StoreError),
    (Code.NOT_FOUND, "etcdserver: requested lease not found", StoreError),
    (Code.UNIMPLEMENTED, "Received http2 header with status: 404", StoreProtocolError),
]


@pytest.mark.parametrize(("code", "details", "error"), CERTAIN_REFUSALS)
async def test_a_refusal_is_certain_and_final(
    store: EtcdStore, server: ScriptedEtcd, code: Any, details: str, error: type[StoreError]
) -> None:
    server.refusals.put((code, details))
    with pytest.raises(StoreError) as caught:
        await store.range(b"a")
    assert type(caught.value) is error
    assert str(caught.value) == f"{server.endpoint}: {details}"
    server.refusals.put((code, details))
    with pytest.raises(StoreError) as caught:
        await store.commit(PUT)
    in_a_transaction = TransactionAbortedError if error is FutureRevisionError else error
    assert type(caught.value) is in_a_transaction
    assert (server.ranges, server.transactions) == (1, 1)


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (Code.UNKNOWN, "context deadline exceeded"),
        (Code.UNAVAILABLE, "etcdserver: request timed out"),
        (Code.UNAVAILABLE, "etcdserver: leader changed"),
        (Code.UNAVAILABLE, "etcdserver: server stopped"),
        (Code.UNAVAILABLE, "Socket closed"),
        (Code.UNKNOWN, "raft proposal dropped"),
        (Code.INTERNAL, ""),
        (Code.CANCELLED, "context canceled"),
        (Code.DATA_LOSS, "etcdserver: corrupt cluster"),
    ],
)
async def test_a_write_without_an_answer_is_unknown_and_not_sent_again(
    store: EtcdStore, server: ScriptedEtcd, code: Any, details: str
) -> None:
    server.refusals.put((code, details))
    with pytest.raises(OutcomeUnknownError):
        await store.commit(PUT)
    assert server.transactions == 1


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (Code.UNAVAILABLE, "etcdserver: no leader"),
        (Code.RESOURCE_EXHAUSTED, "etcdserver: too many requests"),
        (Code.UNAVAILABLE, "etcdserver: rpc not supported for learner"),
    ],
)
async def test_a_write_refused_before_it_is_looked_at_is_sent_again(
    server: ScriptedEtcd, code: Any, details: str
) -> None:
    with trio.fail_after(BOUND_S):
        async with open_store([server.endpoint], timeout_s=0.3) as store:
            server.refusals.put((code, details))
            with pytest.raises(OutcomeUnknownError, match="answered a transaction with None"):
                await store.commit(PUT)
            assert server.transactions == 2
            for _ in range(100):
                server.refusals.put((code, details))
            with pytest.raises(StoreUnavailableError, match=details):
                await store.commit(PUT)
    assert 2 < server.transactions < 20


async def test_a_write_under_way_when_the_connection_ends_is_unknown(
    store: EtcdStore, server: ScriptedEtcd
) -> None:
    arrived, finish = trio.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()

    def refuse(_context: Any) -> None:
        token.run_sync_soon(arrived.set)
        trio.from_thread.run(finish.wait, trio_token=token)

    server._maybe_refuse = refuse  # type: ignore[method-assign,assignment]

    async def commit() -> None:
        with pytest.raises(OutcomeUnknownError):
            await store.commit(PUT)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(commit)
        await arrived.wait()
        await trio.to_thread.run_sync(lambda: server._server.stop(None))
        finish.set()
    assert server.transactions == 1


async def test_a_read_is_sent_again(store: EtcdStore, server: ScriptedEtcd) -> None:
    for details in ("etcdserver: leader changed", "Socket closed", "etcdserver: no leader"):
        server.refusals.put((Code.UNAVAILABLE, details))
    page = await store.range(b"a")
    assert page.revision == 7
    assert server.ranges == 4
    assert store.statistics().ranges == 1


@pytest.mark.parametrize(
    "operation", [Get(b"a"), Transaction((), (Get(b"a"),), (Get(b"b"),))], ids=["flat", "nested"]
)
async def test_a_transaction_that_only_reads_is_sent_again(
    store: EtcdStore, server: ScriptedEtcd, operation: Operation
) -> None:
    found = rpc.ResponseOp(response_range=rpc.RangeResponse(header=header(8)))
    if isinstance(operation, Transaction):
        inner = rpc.TxnResponse(header=header(8), succeeded=True, responses=[found])
        found = rpc.ResponseOp(response_txn=inner)
    server.answer = rpc.TxnResponse(header=header(8), succeeded=True, responses=[found])
    server.refusals.put((Code.UNAVAILABLE, "Socket closed"))
    assert (await store.commit(Transaction((), (operation,)))).succeeded
    assert server.transactions == 2


@pytest.mark.parametrize(
    ("details", "error"),
    [
        ("etcdserver: no leader", StoreUnavailableError),
        ("etcdserver: request timed out", StoreTimeoutError),
    ],
)
async def test_a_read_is_not_sent_again_for_ever(
    server: ScriptedEtcd, details: str, error: type[StoreError]
) -> None:
    with trio.fail_after(BOUND_S):
        async with open_store([server.endpoint], timeout_s=0.3) as store:
            for _ in range(100):
                server.refusals.put((Code.UNAVAILABLE, details))
            with pytest.raises(error, match=details):
                await store.range(b"a")
    assert 2 < server.ranges < 20


async def test_an_answer_that_makes_no_sense_leaves_the_outcome_open(store: EtcdStore) -> None:
    with pytest.raises(OutcomeUnknownError, match="answered a transaction with None"):
        await store.commit(PUT)


async def test_every_request_asks_for_a_leader(store: EtcdStore, server: ScriptedEtcd) -> None:
    await store.range(b"a")
    assert server.metadata["hasleader"] == "true"
    server.metadata = {}
    async with watching(store, server, created()) as watch:
        await watch.receive()
    assert server.metadata["hasleader"] == "true"


async def test_opening_waits_for_a_leader(server: ScriptedEtcd) -> None:
    server.refusals.put((Code.UNAVAILABLE, "etcdserver: no leader"))
    with trio.fail_after(BOUND_S):
        async with open_store([server.endpoint], timeout_s=TIMEOUT_S):
            assert server.ranges == 2


async def test_a_user_is_asked_for_at_opening(server: ScriptedEtcd) -> None:
    server.refusals.put((Code.INVALID_ARGUMENT, "etcdserver: user name is empty"))
    with pytest.raises(StorePermissionError, match="user name is empty"):
        async with open_store([server.endpoint], timeout_s=TIMEOUT_S):
            pass


async def test_a_user_with_few_rights_may_open(server: ScriptedEtcd) -> None:
    server.refusals.put((Code.PERMISSION_DENIED, "etcdserver: permission denied"))
    async with open_store([server.endpoint], timeout_s=TIMEOUT_S):
        assert server.ranges == 1


# --- several members ------------------------------------------------------------------------


@pytest.fixture
def second() -> Iterator[ScriptedEtcd]:
    server = ScriptedEtcd()
    yield server
    server.stop()


@pytest.fixture
async def both(server: ScriptedEtcd, second: ScriptedEtcd) -> AsyncIterator[EtcdStore]:
    with trio.fail_after(BOUND_S):
        endpoints = (server.endpoint, second.endpoint)
        async with open_store(endpoints, timeout_s=TIMEOUT_S) as store:
            server.ranges = second.ranges = 0
            yield store


async def test_one_member_is_used_as_long_as_it_serves(
    both: EtcdStore, server: ScriptedEtcd, second: ScriptedEtcd
) -> None:
    for _ in range(3):
        await both.range(b"a")
    assert (server.ranges, second.ranges) == (3, 0)
    assert both.endpoint == server.endpoint


async def test_a_member_without_a_leader_is_left(
    both: EtcdStore, server: ScriptedEtcd, second: ScriptedEtcd
) -> None:
    server.refusals.put((Code.UNAVAILABLE, "etcdserver: no leader"))
    await both.range(b"a")
    await both.range(b"a")
    assert (server.ranges, second.ranges) == (1, 2)
    assert both.endpoint == second.endpoint


async def test_a_watch_without_a_leader_is_opened_elsewhere(
    both: EtcdStore, server: ScriptedEtcd, second: ScriptedEtcd
) -> None:
    async with watching(both, server, created(), (Code.UNAVAILABLE, "etcdserver: no leader")) as w:
        await w.receive()
        with pytest.raises(WatchLostError, match="no leader"):
            await w.receive()
    async with watching(both, second, created(9)) as w:
        assert await w.receive() == WatchOpened(9)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"revision": 6}, {"cluster": 2}], ids=["past", "foreign"])
async def test_an_answer_from_the_past_or_from_elsewhere_is_no_answer(
    both: EtcdStore, server: ScriptedEtcd, second: ScriptedEtcd, change: dict[str, int]
) -> None:
    """A frozen member that wakes up answers from the past (etcd issue 20418)."""
    server.cluster = second.cluster = 1
    await both.range(b"a")
    for name, value in change.items():
        setattr(server, name, value)
    assert (await both.range(b"a")).revision == 7
    assert both.endpoint == second.endpoint


@pytest.mark.expect_log("etcd is at revision %d, and was at %d: it was restored or replaced")
async def test_when_all_members_go_back_they_are_believed(
    both: EtcdStore, server: ScriptedEtcd, second: ScriptedEtcd
) -> None:
    """Restored from a snapshot, or wiped: the mirror finds out, and must not be kept waiting."""
    server.revision = second.revision = 3
    assert (await both.range(b"a")).revision == 3
    assert (server.ranges, second.ranges) == (2, 2)  # they had time to catch up
    assert (await both.range(b"a")).revision == 3
    assert server.ranges + second.ranges == 5


@pytest.mark.expect_log("etcd is at revision %d, and was at %d: it was restored or replaced")
async def test_a_single_member_that_goes_back_is_believed(
    store: EtcdStore, server: ScriptedEtcd
) -> None:
    server.revision = 3
    assert (await store.range(b"a")).revision == 3
    assert server.ranges == 2


async def test_answers_that_cross_may_be_older_than_others(
    store: EtcdStore, server: ScriptedEtcd
) -> None:
    """Only what was known when the question was put counts."""
    arrived, finish = trio.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()
    hold = [True]

    def maybe_hold(_context: Any) -> None:
        if hold and hold.pop():
            token.run_sync_soon(arrived.set)
            trio.from_thread.run(finish.wait, trio_token=token)

    server._maybe_refuse = maybe_hold  # type: ignore[method-assign,assignment]
    revisions: list[int] = []

    async def early() -> None:
        revisions.append((await store.range(b"a")).revision)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(early)
        await arrived.wait()
        server.revision = 9
        await store.range(b"a")
        server.revision = 8
        finish.set()
    assert revisions == [8]
    assert server.ranges == 2


async def test_a_slow_member_is_helped_out_not_cut_off(
    server: ScriptedEtcd, second: ScriptedEtcd
) -> None:
    """When both are slow, the first to answer counts."""
    finish, released = trio.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()
    with trio.fail_after(BOUND_S):
        async with open_store((server.endpoint, second.endpoint), timeout_s=1.0) as store:

            def hold(_context: Any) -> None:
                trio.from_thread.run(finish.wait, trio_token=token)

            def answer_the_first(_context: Any) -> None:
                token.run_sync_soon(finish.set)
                trio.from_thread.run(released.wait, trio_token=token)

            server._maybe_refuse = hold  # type: ignore[method-assign,assignment]
            second._maybe_refuse = answer_the_first  # type: ignore[method-assign,assignment]
            await store.range(b"a")
            assert store.endpoint == server.endpoint
            released.set()


# --- watches --------------------------------------------------------------------------------


async def test_a_watch_that_is_refused_as_it_is_created(
    store: EtcdStore, server: ScriptedEtcd
) -> None:
    """`created` and `canceled` in one, and an id that is shared by all who are refused."""
    refused = rpc.WatchResponse(
        header=header(5),
        created=True,
        canceled=True,
        watch_id=-1,
        cancel_reason="rpc error: code = PermissionDenied desc = etcdserver: permission denied",
    )
    async with watching(store, server, refused) as watch:
        for _ in range(2):
            with pytest.raises(StorePermissionError, match="permission denied"):
                await watch.receive()


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ({"compact_revision": 9}, CompactedError),
        ({"cancel_reason": "etcdserver: permission denied"}, StorePermissionError),
        ({"cancel_reason": "etcdserver: no leader"}, WatchLostError),
        ({}, WatchLostError),
    ],
    ids=["compacted", "permission", "leader", "nothing said"],
)
async def test_a_watch_that_is_cancelled_later(
    store: EtcdStore, server: ScriptedEtcd, response: dict[str, Any], error: type[StoreError]
) -> None:
    cancelled = rpc.WatchResponse(header=header(5), canceled=True, **response)
    async with watching(store, server, created(), cancelled) as watch:
        assert await watch.receive() == WatchOpened(5)  # type: ignore[arg-type]
        with pytest.raises(error) as caught:
            await watch.receive()
    assert type(caught.value) is error
    if isinstance(caught.value, CompactedError):
        assert caught.value.compact_revision == 9


async def test_a_stream_that_ends_without_a_word(store: EtcdStore, server: ScriptedEtcd) -> None:
    async with watching(store, server, created()) as watch:
        await watch.receive()
        for _ in range(2):
            with pytest.raises(WatchLostError, match="without a word"):
                await watch.receive()


async def test_a_stream_that_ends_before_it_began(store: EtcdStore, server: ScriptedEtcd) -> None:
    async with watching(store, server) as watch:
        with pytest.raises(WatchLostError):
            await watch.receive()


@pytest.mark.parametrize(
    ("code", "details", "error"),
    [
        (Code.UNAVAILABLE, "etcdserver: no leader", WatchLostError),
        (Code.UNAUTHENTICATED, "etcdserver: invalid auth token", StoreUserError),
        (Code.PERMISSION_DENIED, "etcdserver: permission denied", StorePermissionError),
        (Code.RESOURCE_EXHAUSTED, "trying to send message larger than max", WatchLostError),
        (Code.UNKNOWN, "", WatchLostError),
    ],
)
async def test_a_stream_that_fails(
    store: EtcdStore, server: ScriptedEtcd, code: Any, details: str, error: type[StoreError]
) -> None:
    async with watching(store, server, created(), (code, details)) as watch:
        await watch.receive()
        with pytest.raises(error) as caught:
            await watch.receive()
    assert type(caught.value) is error


async def test_fragments_are_joined(store: EtcdStore, server: ScriptedEtcd) -> None:
    deleted = rpc.Event(type="DELETE", kv={"key": b"c", "mod_revision": 6})
    responses = (
        created(),
        events(6, put_event(b"a", 6), fragment=True),
        events(6, put_event(b"b", 6), fragment=True),
        events(6, deleted),
        events(7, put_event(b"d", 7)),
    )
    async with watching(store, server, *responses) as watch:
        await watch.receive()
        first = await watch.receive()
        second = await watch.receive()
    assert first == WatchEvents(
        (
            KeyValue(b"a", b"", 6, 6, 1),  # type: ignore[arg-type]
            KeyValue(b"b", b"", 6, 6, 1),  # type: ignore[arg-type]
            Tombstone(b"c", 6),  # type: ignore[arg-type]
        ),
        6,  # type: ignore[arg-type]
    )
    assert second == WatchEvents((KeyValue(b"d", b"", 7, 7, 1),), 7)  # type: ignore[arg-type]


async def test_a_revision_whose_last_fragment_is_missing_is_never_delivered(
    store: EtcdStore, server: ScriptedEtcd
) -> None:
    responses = (created(), events(6, put_event(b"a", 6), fragment=True))
    async with watching(store, server, *responses) as watch:
        await watch.receive()
        with pytest.raises(WatchLostError):
            await watch.receive()


async def test_a_batch_says_how_far_it_goes_not_how_far_the_store_is(
    store: EtcdStore, server: ScriptedEtcd
) -> None:
    """While etcd replays history, the header already has the newest revision."""
    responses = (created(99), events(99, put_event(b"a", 6), put_event(b"b", 7)))
    async with watching(store, server, *responses) as watch:
        await watch.receive()
        message = await watch.receive()
    assert isinstance(message, WatchEvents)
    assert message.revision == 7


async def test_events_from_before_the_start_are_dropped(
    store: EtcdStore, server: ScriptedEtcd
) -> None:
    """A watch on a future revision may be told of older ones (etcd issue 20221)."""
    responses = (
        created(),
        events(6, put_event(b"a", 6)),
        events(8, put_event(b"a", 7), put_event(b"a", 8)),
    )
    async with watching(store, server, *responses, from_revision=8) as watch:
        await watch.receive()
        message = await watch.receive()
    assert isinstance(message, WatchEvents)
    assert [e.mod_revision for e in message.events] == [8]


async def test_progress_is_asked_for_and_told_apart(store: EtcdStore, server: ScriptedEtcd) -> None:
    asked: list[str] = []

    def play(requests: Requests) -> Iterator[Any]:
        for request in requests:
            kind = request.WhichOneof("request_union")
            asked.append(kind)
            if kind == "create_request":
                yield created()
            else:  # etcd answers with no watch's id
                yield rpc.WatchResponse(header=header(11), watch_id=-1)

    server.play = play
    async with store.watch(b"k", b"l", 4) as watch:
        await watch.receive()
        await watch.request_progress()
        assert await watch.receive() == WatchProgress(11)  # type: ignore[arg-type]
        await watch.request_progress()
        assert await watch.receive() == WatchProgress(11)  # type: ignore[arg-type]
    assert asked == ["create_request", "progress_request", "progress_request"]


async def test_a_watch_is_asked_for_as_it_should_be(store: EtcdStore, server: ScriptedEtcd) -> None:
    asked: list[Any] = []

    def play(requests: Requests) -> Iterator[Any]:
        asked.append(next(requests).create_request)
        yield created()

    server.play = play
    async with store.watch(b"k", b"l", 4) as watch:
        await watch.receive()
    (request,) = asked
    assert (request.key, request.range_end, request.start_revision) == (b"k", b"l", 4)
    assert request.progress_notify
    assert not request.fragment  # etcd cuts them in quadratic time


async def test_a_server_that_reads_nothing_does_not_hold_up_anybody(
    server: ScriptedEtcd,
) -> None:
    def play(_requests: Requests) -> Iterator[Any]:
        trio.from_thread.run(left.wait, trio_token=token)
        return iter(())

    left = trio.Event()
    token = trio.lowlevel.current_trio_token()
    server.play = play
    with trio.fail_after(BOUND_S):
        async with (
            open_store([server.endpoint], timeout_s=0.2) as store,
            store.watch(b"", END_OF_KEYS, 0) as watch,
        ):
            with pytest.raises(WatchLostError, match="not opened in time"):
                await watch.receive()
    left.set()


async def test_what_nobody_receives_stays_with_the_server(
    store: EtcdStore, server: ScriptedEtcd
) -> None:
    """Back-pressure: an idle receiver makes the server wait, and memory does not grow."""
    sent: list[int] = []
    value = bytes(1_000_000)

    def play(requests: Requests) -> Iterator[Any]:
        next(requests)
        yield created()
        for revision in range(10, 110):
            sent.append(revision)
            kv = {"key": b"k", "value": value, "mod_revision": revision}
            kv |= {"create_revision": 1, "version": revision}
            yield events(revision, rpc.Event(type="PUT", kv=kv))

    server.play = play
    async with store.watch(b"", END_OF_KEYS, 0) as watch:
        await watch.receive()
        for revision in range(10, 60):
            message = await watch.receive()
            assert isinstance(message, WatchEvents)
            assert message.revision == revision
            assert len(sent) < revision - 10 + 30
