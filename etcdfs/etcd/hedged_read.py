"""One round of asking the members for what may be asked twice: the first good answer counts.

Knows: in which order members are asked, when the next one is, and what a failure says about a
member. Does not know: what is asked. It is part of the etcd door.

The next member is asked when the one before fails or keeps quiet for the members' patience;
a quiet one is not cut off, so that a slow link to all of them still works.

Concurrency: a round is used once, by one task.
"""

from collections.abc import Awaitable, Callable
from typing import final

import grpc
import trio

from etcdfs.errors import (
    StoreError,
    StoreProtocolError,
    StoreTimeoutError,
    StoreTlsError,
    StoreUnavailableError,
)
from etcdfs.etcd import codec as wire
from etcdfs.etcd.connection import Connection
from etcdfs.etcd.members import Members
from etcdfs.keyspace.transaction_results import REVISION_MAX
from etcdfs.options import Endpoint

Send = Callable[[Connection], Awaitable[wire.Message]]
"""Sends a request that may be sent twice. An answer of None says that there was one."""


@final
class HedgedRead:
    """Asks each member once, until one answers.

    Attributes:
        answer: What the first good answer was.
        refusal: What etcd refused with, for certain; no other member will say anything else.
        behind: The newest answer that was older than one we had before, if there was none better.
        failures: Why each member failed that did.
        may_serve_soon: Whether one of them is there, and only cannot serve now.
    """

    def __init__(self, members: Members, send: Send, *, linearizable: bool) -> None:
        # --- dependencies
        self._members = members
        self._send = send
        # --- constants
        # What was known when the question was put; answers that crossed may be older than others.
        self._known = members.watermark.known if linearizable else None
        # --- mutable state
        self.answer: tuple[wire.Message] | None = None
        self.refusal: StoreError | None = None
        self.behind: wire.Message | None = None
        self.failures: dict[Endpoint, StoreError] = {}
        self.may_serve_soon = False
        self._turn = trio.Event()
        self._endpoints = tuple(members.in_turn())
        self._asked: list[Connection] = []

    @property
    def decided(self) -> bool:
        """Whether no other member need be asked."""
        return self.answer is not None or self.refusal is not None

    async def run(self) -> None:
        """Ask; the result is in the attributes."""
        endpoints = self._endpoints
        if len(endpoints) == 1:
            await self._ask(endpoints[0])
            return
        async with trio.open_nursery() as nursery:
            for endpoint in endpoints:
                nursery.start_soon(self._ask, endpoint)
                if await self._decided_in_turn():
                    break
            while not self.decided and len(self.failures) < len(endpoints):
                await self._next_turn()
            nursery.cancel_scope.cancel()

    def error(self) -> StoreError:
        """Return what all failures come to, in one line."""
        failures = [self.failures[e] for e in self._endpoints if e in self.failures]
        message = "; ".join(str(failure) for failure in failures)
        if all(isinstance(failure, StoreTlsError) for failure in failures):
            return StoreTlsError(message)
        if any(isinstance(failure, StoreTimeoutError) for failure in failures):
            return StoreTimeoutError(message)
        return (
            StoreProtocolError(message) if self.is_disbelieved else StoreUnavailableError(message)
        )

    @property
    def is_disbelieved(self) -> bool:
        """Whether a member said what cannot be, and no other anything better."""
        failures = self.failures.values()
        return any(isinstance(failure, StoreProtocolError) for failure in failures)

    async def _decided_in_turn(self) -> bool:
        with trio.move_on_after(self._members.patience_s):
            await self._next_turn()
        return self.decided

    async def _next_turn(self) -> None:
        await self._turn.wait()
        self._turn = trio.Event()

    async def _ask(self, endpoint: Endpoint) -> None:
        connection: Connection | None = None
        try:
            connection = await self._members.connection(endpoint)
            self._asked.append(connection)
            answer = await self._send(connection)
        except grpc.RpcError as exc:
            assert connection is not None
            self._on_failure(connection, exc)
        except (StoreUnavailableError, StoreTimeoutError) as exc:
            self._fail(endpoint, exc)
        except StoreError as exc:
            self.refusal = exc
        else:
            self._on_answer(connection, answer)
        self._turn.set()

    def _on_answer(self, connection: Connection, answer: wire.Message) -> None:
        header = None if answer is None or self._known is None else wire.header(answer)
        if header is not None and not 0 < header.revision <= REVISION_MAX:
            # It must not count as the newest that was heard of, or nothing after it would do.
            message = f"{connection.endpoint}: it says that it is at revision {header.revision}"
            self._fail(connection.endpoint, StoreProtocolError(message))
            return
        if header is not None and not self._members.watermark.holds(header, self._known):
            if self.behind is None or header > wire.header(self.behind):
                self.behind = answer
            self.may_serve_soon = True
            message = f"{connection.endpoint}: it answers from the past, or is another etcd"
            self._fail(connection.endpoint, StoreUnavailableError(message))
            return
        if self.answer is None:
            self.answer = (answer,)
            self._members.answered(connection.endpoint)
            for earlier in self._asked[: self._asked.index(connection)]:
                if earlier.endpoint not in self.failures:
                    self._members.silent(earlier)

    def _on_failure(self, connection: Connection, failure: wire.Message) -> None:
        error = wire.read_error(failure, connection.endpoint)
        if wire.is_of_connection(failure):
            self._members.broke(connection)
        elif failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._members.silent(connection)
        elif not wire.is_transient(failure):
            self.refusal = error
            return
        self.may_serve_soon = self.may_serve_soon or wire.is_from_etcd(failure)
        self._fail(connection.endpoint, error)

    def _fail(self, endpoint: Endpoint, error: StoreError) -> None:
        self.failures[endpoint] = error
        self._members.failed(endpoint)
