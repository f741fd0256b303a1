"""The door to etcd: the port `Store`, over aetcd's generated stubs on gRPC channels of our own.

What this room knows: endpoints, deadlines, what may be sent twice and what must not. What it
must not know: the file system. With `etcd_bridge`, `etcd_watch` and `etcd_wire` it is the only
place that may import aetcd, grpc, asyncio or trio-asyncio.

Two rules carry it. A read is sent again when the connection failed, until its deadline. A
write is sent at most once, and only on a connection that just answered; when no answer comes,
the outcome is unknown, and is said to be.

Concurrency: any number of tasks may call at once; all of it runs on the trio thread.
"""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, final

import grpc
import trio
from aetcd import rpc

from etcdfs import etcd_wire as wire
from etcdfs.errors import (
    OutcomeUnknownError,
    StoreError,
    StorePermissionError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from etcdfs.etcd_bridge import Bridge, CancelledElsewhereError, open_bridge
from etcdfs.etcd_lease import LeaseCalls
from etcdfs.etcd_watch import EtcdWatch, Stream
from etcdfs.options import Endpoint
from etcdfs.store import (
    Committed,
    Page,
    StoreStatistics,
    StoreStatus,
    Transaction,
)

Method = Callable[..., Awaitable[Any]]
"""A unary method of a generated stub."""

Metadata = tuple[tuple[str, str], ...]

_RETRY_FIRST_S = 0.025
_RETRY_MAX_S = 0.5
_RETRY_FACTOR = 2.0
_RETRY_JITTER = 0.2

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A range or a watch's catch-up may be of any size; gRPC's default is 4 MiB.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A silent peer is noticed after 13 s. Without the ping timeout it took 69 s. etcd closes
    # connections that ping more often than every 5 s (--grpc-keepalive-min-time), and at all
    # while no call is under way (its PermitWithoutStream is off: GOAWAY too_many_pings after
    # 30 s). The watch is a call that is always under way; others have deadlines.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 0),
    # Bounded, so that an etcd that comes back is found soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Channels with equal options share a connection otherwise; the watch must not wait behind
    # a large range (etcd issue 15402).
    ("grpc.use_local_subchannel_pool", 1),
    # etcd is reached directly, as etcdctl does; http_proxy is for web servers.
    ("grpc.enable_http_proxy", 0),
    # Nobody but this module decides what is sent again.
    ("grpc.service_config_disable_resolution", 1),
)

_ANY_KEY = b"\0"
"""Any key does for a question whose answer is that there is one."""


@final
class Connection:
    """The channels to one endpoint, and what goes with each call.

    A request is sent exactly once; what a failure means is for the caller to say.

    Attributes:
        endpoint: Where it leads.
    """

    def __init__(self, bridge: Bridge, endpoint: Endpoint) -> None:
        # dependencies
        self._bridge = bridge
        # constants
        self.endpoint = endpoint
        # A member without a leader refuses at once, before it looks at the request, instead of
        # letting it wait.
        self._metadata: Metadata = (("hasleader", "true"),)
        # mutable state
        self._channel = grpc.aio.insecure_channel(str(endpoint), options=_CHANNEL_OPTIONS)
        self._watch_channel = grpc.aio.insecure_channel(str(endpoint), options=_CHANNEL_OPTIONS)
        self._kv = rpc.KVStub(self._channel)
        self._leases = rpc.LeaseStub(self._channel)
        self._maintenance = rpc.MaintenanceStub(self._channel)
        self._watch = rpc.WatchStub(self._watch_channel)

    @classmethod
    async def open(cls, bridge: Bridge, endpoint: Endpoint) -> "Connection":
        """Return a connection; nothing is sent yet."""

        async def on_the_loop() -> Connection:  # gRPC asks which loop is running
            return cls(bridge, endpoint)

        return await bridge.run(on_the_loop)

    @property
    def ready(self) -> bool:
        """Whether it works, as far as is known; starts to connect if not."""
        state = self._channel.get_state(try_to_connect=True)
        return state is grpc.ChannelConnectivity.READY

    async def range(self, request: wire.Message, deadline: float) -> wire.Message:
        """Send a range."""
        return await self._call(self._kv.Range, request, deadline)

    async def txn(self, request: wire.Message, deadline: float) -> wire.Message:
        """Send a transaction."""
        return await self._call(self._kv.Txn, request, deadline)

    async def lease(self, method: str, request: wire.Message, deadline: float) -> wire.Message:
        """Send a request about a lease."""
        return await self._call(getattr(self._leases, method), request, deadline)

    async def status(self, deadline: float) -> wire.Message:
        """Ask the member for its status, which it knows by itself."""
        return await self._call(self._maintenance.Status, rpc.StatusRequest(), deadline)

    async def watch(self) -> Stream:
        """Open a stream of watch requests and responses."""

        async def on_the_loop() -> Stream:
            return self._watch.Watch(metadata=self._metadata)

        return await self._bridge.run(on_the_loop)

    async def close(self) -> None:
        """End every call and close both channels. Only local work, so bounded."""
        with trio.CancelScope(shield=True):
            await self._bridge.run(self._channel.close)
            await self._bridge.run(self._watch_channel.close)

    async def _call(self, method: Method, request: wire.Message, deadline: float) -> wire.Message:
        """Call a unary method and wait for the answer, no longer than the deadline.

        Raises:
            grpc.RpcError: It failed.
            CancelledElsewhereError: The channel was closed.
        """
        remaining = max(deadline - trio.current_time(), 0.001)
        return await self._bridge.run(_unary, method, request, remaining, self._metadata)


async def _unary(
    method: Method, request: wire.Message, timeout_s: float, metadata: Metadata
) -> wire.Message:
    """Call a unary method (an asyncio coroutine)."""
    return await method(request, timeout=timeout_s, metadata=metadata)


@final
class EtcdStore(LeaseCalls):
    """etcd, as the port `Store` describes it. Made by `open_store`."""

    def __init__(self, bridge: Bridge, connection: Connection, timeout_s: float) -> None:
        # dependencies
        self._bridge = bridge
        # constants
        self._timeout_s = timeout_s
        # mutable state
        self._connection = connection
        self._ranges = 0
        self._transactions = 0
        self._watches = 0

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint in use."""
        return self._connection.endpoint

    async def range(
        self,
        start: bytes,
        end: bytes | None = None,
        *,
        limit: int = 0,
        revision: int = 0,
        keys_only: bool = False,
    ) -> Page:
        """Read a range, linearizable; see the port."""
        self._ranges += 1
        request = wire.range_request(
            start, end, limit=limit, revision=revision, keys_only=keys_only
        )
        deadline = self._deadline()
        answer = await self._read(lambda c: c.range(request, deadline), deadline)
        return wire.page(answer)

    async def commit(self, transaction: Transaction) -> Committed:
        """Carry out a transaction, at most once; see the port."""
        self._transactions += 1
        request = wire.txn_request(transaction)
        deadline = self._deadline()
        await self._wait_until_ready(deadline)
        try:
            answer = await self._connection.txn(request, deadline)
        except grpc.RpcError as exc:
            raise wire.write_error(exc, self.endpoint) from exc
        except CancelledElsewhereError as exc:
            raise OutcomeUnknownError(
                f"{self.endpoint}: the connection was closed before the answer came"
            ) from exc
        return wire.committed(answer)

    @asynccontextmanager
    async def watch(self, start: bytes, end: bytes, from_revision: int) -> AsyncIterator[EtcdWatch]:
        """Watch a range from a revision on; see the port."""
        self._watches += 1
        watch = EtcdWatch(
            self._bridge,
            await self._connection.watch(),
            wire.watch_create_request(start, end, from_revision),
            endpoint=self.endpoint,
            timeout_s=self._timeout_s,
        )
        try:
            yield watch
        finally:
            await watch.close()

    async def _lease(self, method: str, request: wire.Message) -> wire.Message:
        deadline = self._deadline()
        return await self._read(lambda c: c.lease(method, request, deadline), deadline)

    async def status(self) -> StoreStatus:
        """Ask the member in use for its version and size."""
        deadline = self._deadline()
        return wire.store_status(await self._read(lambda c: c.status(deadline), deadline))

    def statistics(self) -> StoreStatistics:
        """Count the requests so far; what is sent again counts once."""
        return StoreStatistics(
            ranges=self._ranges, transactions=self._transactions, watches=self._watches
        )

    def _deadline(self) -> float:
        return trio.current_time() + self._timeout_s

    async def _wait_until_ready(self, deadline: float) -> None:
        """Make sure of a connection before a write is entrusted to it.

        gRPC would let the write wait for a connection itself, but could not tell us afterwards
        whether it was ever sent. So something that may be sent twice goes first.

        Raises:
            StoreUnavailableError: There is none in time; the write was not sent.
        """
        if self._connection.ready:
            return
        try:
            await self._read(lambda c: c.status(deadline), deadline)
        except StorePermissionError:
            return  # an answer is an answer
        except StoreTimeoutError as exc:
            raise StoreUnavailableError(str(exc)) from exc

    async def _read(
        self, send: Callable[[Connection], Awaitable[wire.Message]], deadline: float
    ) -> wire.Message:
        """Send what may be sent twice, again after a lost connection, until the deadline."""
        pause = _RETRY_FIRST_S
        while True:
            try:
                return await send(self._connection)
            except grpc.RpcError as exc:
                if not wire.is_transient(exc) or trio.current_time() + pause >= deadline:
                    raise wire.read_error(exc, self.endpoint) from exc
            except CancelledElsewhereError as exc:
                raise StoreUnavailableError(f"{self.endpoint}: the connection was closed") from exc
            await trio.sleep(_jittered(pause))
            pause = min(pause * _RETRY_FACTOR, _RETRY_MAX_S)


def _jittered(pause: float) -> float:
    """Return a little less, so that many clients do not come back as one."""
    return pause * random.uniform(1 - _RETRY_JITTER, 1)  # noqa: S311 (not a secret)


# --- opening --------------------------------------------------------------------------------


@asynccontextmanager
async def open_store(
    endpoints: Sequence[Endpoint], *, timeout_s: float
) -> AsyncIterator[EtcdStore]:
    """Connect to the first endpoint that answers a linearizable read.

    Args:
        endpoints: Tried in order; each gets its share of the time that is left.
        timeout_s: Bound of the whole attempt, and of every request afterwards.

    Raises:
        StoreUnavailableError: None answered; one line that names each and its reason.
        StorePermissionError: etcd wants a user.
    """
    async with open_bridge() as bridge:
        connection = await _connect(bridge, endpoints, timeout_s)
        try:
            yield EtcdStore(bridge, connection, timeout_s)
        finally:
            await connection.close()


async def _connect(bridge: Bridge, endpoints: Sequence[Endpoint], timeout_s: float) -> Connection:
    deadline = trio.current_time() + timeout_s
    reasons: list[str] = []
    for index, endpoint in enumerate(endpoints):
        now = trio.current_time()
        share = (deadline - now) / (len(endpoints) - index)
        connection = await Connection.open(bridge, endpoint)
        proven = False
        try:
            await _prove(connection, now + share)
            proven = True
        except StorePermissionError:
            raise
        except StoreError as exc:
            reasons.append(str(exc))
        finally:
            if not proven:
                await connection.close()
        if proven:
            return connection
    raise StoreUnavailableError("; ".join(reasons) or "no endpoints")


async def _prove(connection: Connection, deadline: float) -> None:
    """Have the endpoint answer a linearizable read, which takes a leader and a quorum.

    An etcd that is not ready yet is asked again; where nobody listens, the next one is tried.
    """
    request = wire.range_request(_ANY_KEY, None, limit=1, revision=0, keys_only=True)
    while True:
        try:
            await connection.range(request, deadline)
        except grpc.RpcError as exc:
            if exc.code() is grpc.StatusCode.PERMISSION_DENIED:
                return  # a user who may not read this key; it was answered after the quorum
            ready_soon = wire.is_transient(exc) and wire.is_from_etcd(exc)
            if not ready_soon or trio.current_time() + _RETRY_MAX_S >= deadline:
                raise wire.read_error(exc, connection.endpoint) from exc
        else:
            return
        await trio.sleep(_jittered(_RETRY_MAX_S))
