"""The door to etcd: the port `Store`, over aetcd's generated stubs on gRPC channels of our own.

Knows: deadlines, what may be sent twice and what must not. Does not know: the file system.

Two rules carry it. A read is sent again, to each member in turn, until its deadline. A write is
sent to a member that has answered just now; again only if the first was certainly not carried
out; when no answer comes, the outcome is unknown, and is said to be. Calls about leases may all be
sent again: a grant that was carried out twice leaves a lease that nobody uses and that ends by
itself.

Concurrency: any number of tasks may call at once; all of it runs on the trio thread.
"""

import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final, Protocol, final

import grpc
import trio
from aetcd import rpc

from etcdfs.admission import about_to_wait
from etcdfs.errors import (
    OutcomeUnknownError,
    StoreError,
    StoreProtocolError,
    StoreTimeoutError,
    StoreUnavailableError,
    WatchLostError,
)
from etcdfs.etcd import codec as wire
from etcdfs.etcd.connection import ANY_SIZE, Connection, Login
from etcdfs.etcd.hedged_read import HedgedRead, Send
from etcdfs.etcd.members import Members
from etcdfs.etcd.tls import check
from etcdfs.etcd.watch import EtcdWatch
from etcdfs.keyspace.store import (
    Committed,
    Get,
    Page,
    StoreStatistics,
    StoreStatus,
    Transaction,
)
from etcdfs.keyspace.transaction_results import fault_in_page, fault_in_results
from etcdfs.options import OPEN, Endpoint, Security

Message = Any
"""A generated protobuf message: `aetcd.rpc` has no types."""


class LeaseCalls(Protocol):
    """The part of `EtcdStore` that is about leases."""

    async def _lease(self, method: str, request: Message) -> Message:
        """Send a request to a method of etcd's service Lease, again after a lost connection."""
        ...

    async def lease_grant(self, ttl_s: int, lease: int = 0) -> int:
        """Make a lease; see the port."""
        answer = await self._lease("LeaseGrant", rpc.LeaseGrantRequest(TTL=ttl_s, ID=lease))
        if answer.ID <= 0 or answer.TTL <= 0:
            raise StoreProtocolError(f"etcd made no lease: {answer.error!r}")
        return int(answer.ID)

    async def lease_time_to_live(self, lease: int) -> int | None:
        """Return the seconds a lease has left; see the port."""
        answer = await self._lease("LeaseTimeToLive", rpc.LeaseTimeToLiveRequest(ID=lease))
        return int(answer.TTL) if answer.TTL >= 0 else None

    async def lease_has_keys(self, lease: int) -> bool:
        """Tell whether a lease holds any key; see the port."""
        request = rpc.LeaseTimeToLiveRequest(ID=lease, keys=True)
        return bool((await self._lease("LeaseTimeToLive", request)).keys)

    async def lease_revoke(self, lease: int) -> None:
        """End a lease; see the port."""
        try:
            await self._lease("LeaseRevoke", rpc.LeaseRevokeRequest(ID=lease))
        except StoreError as exc:
            if "lease not found" not in str(exc):
                raise


RETRY_FIRST_S: Final = 0.025
RETRY_MAX_S: Final = 0.5
_RETRY_FACTOR: Final = 2.0
_RETRY_JITTER: Final = 0.2

_PROBE: Final = wire.range_request(b"\0", None, limit=1, revision=0, keys_only=True)
"""A question whose answer is that there is one, whatever it says."""


@final
class EtcdStore(LeaseCalls):
    """etcd, as the port `Store` describes it. Made by `open_store`."""

    def __init__(self, members: Members, timeout_s: float) -> None:
        # dependencies
        self._members = members
        # constants
        self._timeout_s = timeout_s
        # mutable state
        self._ranges = 0
        self._transactions = 0
        self._watches = 0

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint in use."""
        return self._members.endpoint

    async def range(
        self,
        start: bytes,
        end: bytes | None = None,
        *,
        limit: int = 0,
        revision: int = 0,
        keys_only: bool = False,
        newest: bool = False,
    ) -> Page:
        """Read a range, linearizable; see the port."""
        about_to_wait()
        self._ranges += 1
        limit = 1 if newest else limit
        request = wire.range_request(
            start, end, limit=limit, revision=revision, keys_only=keys_only, newest=newest
        )
        deadline = self._deadline()
        page = wire.page(await self._read(lambda c: c.range(request, deadline), deadline))
        fault = fault_in_page(page, Get(start, end, limit, keys_only), revision)
        if fault is not None:
            raise self._disbelieve(fault)
        return page

    async def commit(self, transaction: Transaction) -> Committed:
        """Carry out a transaction, at most once; see the port."""
        about_to_wait()
        self._transactions += 1
        request = wire.txn_request(transaction)
        deadline = self._deadline()
        if transaction.only_reads:
            answer = await self._read(lambda c: c.txn(request, deadline), deadline)
            return self._checked(answer, transaction)
        for pause in _pauses():
            connection = await self._trusted(deadline)
            known = self._members.watermark.known
            try:
                answer = await connection.txn(request, deadline)
            except grpc.RpcError as exc:
                error = self._write_error(connection, exc)
                if not isinstance(error, StoreUnavailableError):
                    raise error from exc
            except StoreUnavailableError as exc:  # it has not been sent
                error = exc
            else:
                committed = self._checked(answer, transaction)
                header = wire.header(answer)
                if not self._members.watermark.holds(header, known):
                    self._members.watermark.move_back(header)
                return committed
            if trio.current_time() + pause >= deadline:
                raise error
            await trio.sleep(pause)
        raise AssertionError("there is always a next pause")

    def _checked(self, answer: wire.Message, transaction: Transaction) -> Committed:
        try:
            committed = wire.committed(answer)
            fault = fault_in_results(committed, transaction)
        except StoreProtocolError as exc:
            fault = str(exc)
        else:
            if fault is None:
                return replace(committed, of=transaction)
        error = self._disbelieve(fault)
        raise error if transaction.only_reads else OutcomeUnknownError(str(error))

    def _disbelieve(self, fault: str) -> StoreProtocolError:
        """Return the error for an answer that cannot be; others are asked first from now on."""
        self._members.failed(self.endpoint)
        return StoreProtocolError(f"{self.endpoint}: etcd answers what cannot be: {fault}")

    def _write_error(self, connection: Connection, failure: wire.Message) -> StoreError:
        """Return what a failed write means, having learnt from it about the member."""
        if wire.is_of_connection(failure):
            self._members.broke(connection)
        elif failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._members.silent(connection)
        elif wire.is_transient(failure):
            self._members.failed(connection.endpoint)
        return wire.write_error(failure, connection.endpoint)

    @asynccontextmanager
    async def watch(self, start: bytes, end: bytes, from_revision: int) -> AsyncIterator[EtcdWatch]:
        """Watch a range from a revision on; see the port.

        A member that has just answered is trusted with it, on a connection of its own: it need
        not wait behind a large range (etcd issue 15402).
        """
        self._watches += 1
        try:
            connection = await self._separate()
        except (StoreUnavailableError, StoreTimeoutError) as exc:
            raise WatchLostError(str(exc)) from exc
        try:
            watch = await self._open_watch(
                connection, wire.watch_create_request(start, end, from_revision)
            )
            self._members.watches(watch, connection.endpoint)
            try:
                yield watch
            finally:
                self._members.left(watch)
                if watch.is_lost:
                    self._members.failed(connection.endpoint)
                await watch.close()
        finally:
            await connection.close()

    async def _separate(self) -> Connection:
        trusted = await self._trusted(self._deadline())
        return await self._members.separate(trusted.endpoint, answer_max=ANY_SIZE)

    async def _open_watch(self, connection: Connection, request: wire.Message) -> EtcdWatch:
        try:
            stream = await connection.watch(self._deadline())
        except (StoreUnavailableError, StoreTimeoutError) as exc:
            self._members.failed(connection.endpoint)
            raise WatchLostError(str(exc)) from exc
        return EtcdWatch(stream, request, endpoint=connection.endpoint, timeout_s=self._timeout_s)

    async def _lease(self, method: str, request: wire.Message) -> wire.Message:
        about_to_wait()
        deadline = self._deadline()
        return await self._read(
            lambda c: c.lease(method, request, deadline), deadline, linearizable=False
        )

    async def ready(self) -> None:
        """Return if a write could be entrusted to a member; see the port."""
        await self._trusted(self._deadline())

    async def renew(self) -> None:
        """Connect anew, with what certificates and the password file hold now.

        The member in use is asked on the new connection first. If it does not answer there, all
        stays as it was; else every call goes that way from now on, or over connections that are
        made later. A watch stays on the one it has: nobody would look at a certificate again.

        Raises:
            StoreError: A file is of no use, or the member does not answer, or lets us in no more.
        """
        deadline = self._deadline()
        made = await self._members.separate(self.endpoint)
        try:
            await made.range(_PROBE, deadline)
        except grpc.RpcError as exc:
            if exc.code() is not grpc.StatusCode.PERMISSION_DENIED:  # it knows who we are
                await made.close()
                raise wire.read_error(exc, made.endpoint) from exc
        except StoreError:
            await made.close()
            raise
        self._members.renew(made)

    async def status(self) -> StoreStatus:
        """Ask the member in use for its version and size."""
        about_to_wait()
        deadline = self._deadline()
        return wire.store_status(
            await self._read(lambda c: c.status(deadline), deadline, linearizable=False)
        )

    def statistics(self) -> StoreStatistics:
        """Count the requests so far; what is sent again counts once."""
        members = self._members
        return StoreStatistics(
            ranges=self._ranges,
            transactions=self._transactions,
            watches=self._watches,
            endpoints=tuple(map(str, members.endpoints)),
            endpoint=str(members.endpoint),
            moves=members.moves,
            revision=members.watermark.known.revision,
        )

    def _deadline(self) -> float:
        return trio.current_time() + self._timeout_s

    async def probe_quorum(self, *, at_once: bool = False) -> None:
        """Have a member answer a linearizable read, which takes a leader and a majority.

        Args:
            at_once: Do not wait for members that nobody answers for.

        Raises:
            StoreError: None does.
        """
        await self._probe_quorum(self._deadline(), at_once=at_once)

    async def _probe_quorum(self, deadline: float, *, at_once: bool = False) -> None:
        async def send(connection: Connection) -> wire.Message:
            try:
                return await connection.range(_PROBE, deadline)
            except grpc.RpcError as exc:
                if exc.code() is grpc.StatusCode.PERMISSION_DENIED:
                    connection.heard = trio.current_time()
                    return None  # who may not read this key; it was answered after the majority
                raise

        await self._read(send, deadline, at_once=at_once)

    async def _trusted(self, deadline: float) -> Connection:
        """Return a connection to which a write may be entrusted.

        gRPC would let the write wait for a connection itself, but could not tell us afterwards
        whether it was ever sent. So something that may be sent twice goes first, unless the
        member has just answered.

        Raises:
            StoreUnavailableError: There is none in time; the write was not sent.
        """
        while True:
            connection = self._members.trusted()
            if connection is not None:
                return connection
            try:
                await self._probe_quorum(deadline)
            except StoreTimeoutError as exc:
                raise StoreUnavailableError(str(exc)) from exc
            if self._members.trusted() is None and trio.current_time() >= deadline:
                raise StoreUnavailableError(f"{self.endpoint}: no answer in time")

    async def _read(
        self,
        send: Send,
        deadline: float,
        *,
        linearizable: bool = True,
        at_once: bool = False,
    ) -> wire.Message:
        """Send what may be sent twice to each member in turn, again until the deadline.

        Args:
            send: How it is sent.
            deadline: When it must be answered.
            linearizable: Whether an answer from the past is no answer.
            at_once: Do not wait for members that nobody answers for.

        Raises:
            StoreError: It was refused, or not answered.
        """
        was_behind = False
        for pause in _pauses():
            asked = HedgedRead(self._members, send, linearizable=linearizable)
            await asked.run()
            if asked.answer is not None:
                return asked.answer[0]
            if asked.refusal is not None:
                raise asked.refusal
            if asked.behind is not None and was_behind:
                # They had time to catch up, and nobody knows better.
                self._members.watermark.move_back(wire.header(asked.behind))
                return asked.behind
            was_behind = asked.behind is not None
            if asked.is_disbelieved:
                raise asked.error()
            hopeless = self._members.closed or (at_once and not asked.may_serve_soon)
            if hopeless or trio.current_time() + pause >= deadline:
                raise asked.error()
            await trio.sleep(pause)
        raise AssertionError("there is always a next pause")


def _pauses() -> Iterator[float]:
    """Yield ever longer pauses, jittered so that many clients do not come back as one."""
    pause = RETRY_FIRST_S
    while True:
        yield pause * random.uniform(1 - _RETRY_JITTER, 1)  # noqa: S311 - no secret
        pause = min(pause * _RETRY_FACTOR, RETRY_MAX_S)


@asynccontextmanager
async def open_store(
    endpoints: Sequence[Endpoint],
    *,
    timeout_s: float,
    security: Security = OPEN,
    reachable: bool = True,
) -> AsyncIterator[EtcdStore]:
    """Connect to etcd; the first endpoint that answers a linearizable read is used first.

    Args:
        endpoints: The members, in order of preference.
        timeout_s: Bound of the whole attempt, and of every request afterwards.
        security: Certificates, and the user.
        reachable: Whether one must answer now; else one is asked when there is something to ask.

    Raises:
        StoreTlsError: A certificate is missing, of no use, or not trusted.
        StoreLoginError: The user or the password is not accepted, or cannot be read.
        StorePermissionError: etcd wants a user.
        StoreUnavailableError: None answered; one line that names each and its reason.
    """
    if not endpoints:
        raise StoreUnavailableError("no endpoints")
    await check(security, tuple(endpoints), timeout_s)
    members = Members(endpoints, Login(security), timeout_s)
    try:
        store = EtcdStore(members, timeout_s)
        try:
            if reachable:
                await store.probe_quorum(at_once=True)
        except StoreTimeoutError as exc:
            raise StoreUnavailableError(str(exc)) from exc
        yield store
    finally:
        await members.close()
