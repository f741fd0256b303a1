"""The members of etcd that can be asked, which of them is asked first, and how far etcd is.

Knows: one connection per endpoint, made when it is needed and given up when it fails; the endpoint
in use. Does not know: what a call asks for. It is part of the etcd door.

The endpoint in use stays in use until it fails. Then the next one is, in the order of
`--endpoints` and round again.

Concurrency: trio thread; state changes have no checkpoint in them.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Final, Protocol, final

import trio

from etcdfs.errors import StoreUnavailableError
from etcdfs.etcd.codec import Header
from etcdfs.etcd.connection import ANSWER_MAX, Connection, Login
from etcdfs.options import Endpoint

log = logging.getLogger(__name__)

SILENCE_MAX_S: Final = 2.0
"""How long a member may keep quiet, at most, before another is asked as well."""

FRESH_S: Final = 1.0
"""How long a member that has answered is believed to be there, when a write is to be entrusted to
it: a write cannot be sent again elsewhere."""


class Leaving(Protocol):
    """A watch, as far as members are concerned."""

    def abandon(self) -> None:
        """End the stream at once; whoever receives from it is told that it is lost."""
        ...


@final
class RevisionWatermark:
    """The newest revision that etcd has answered with: no answer may be older.

    A member that was frozen may answer from the past (etcd issue 20418), and one of another
    cluster from nowhere. etcd itself may go back, too, when it is restored from a snapshot or
    wiped: then all say so, and go on saying so, and are believed.
    """

    def __init__(self) -> None:
        self.known = Header(0, 0)

    def holds(self, header: Header, known: Header | None = None) -> bool:
        """Say whether an answer is of this cluster and not of the past; learn from it if so.

        Args:
            header: The answer's.
            known: What was known when the question was put.
        """
        at_least = self.known if known is None else known
        if at_least.cluster not in {0, header.cluster} or header.revision < at_least.revision:
            return False
        if header.cluster != self.known.cluster or header.revision > self.known.revision:
            self.known = header
        return True

    def move_back(self, header: Header) -> None:
        """Believe that etcd went back, or is another one."""
        log.warning(
            "etcd is at revision %d, and was at %d: it was restored or replaced",
            header.revision,
            self.known.revision,
        )
        self.known = header


@final
class Members:
    """The connections of a store. Owned by it; `close` ends them.

    Attributes:
        endpoints: All of them, in order of preference.
        closed: Whether that has happened.
        patience_s: How long a member may keep quiet before another is asked as well.
        watermark: How far etcd is.
    """

    def __init__(self, endpoints: Sequence[Endpoint], login: Login, timeout_s: float) -> None:
        # --- dependencies
        self._login = login
        # --- constants
        self.endpoints = tuple(dict.fromkeys(endpoints))
        self._timeout_s = timeout_s
        # One that is alone has all the time there is.
        count = len(self.endpoints)
        self.patience_s = timeout_s if count == 1 else min(timeout_s / count, SILENCE_MAX_S)
        # --- mutable state
        self.watermark = RevisionWatermark()
        self._preferred = 0
        self._connections: dict[Endpoint, Connection] = {}
        self._given_up: list[Connection] = []
        self._watches: dict[Leaving, Endpoint] = {}
        self._rename = 0
        self.closed = False

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint in use."""
        return self.endpoints[self._preferred]

    @property
    def moves(self) -> int:
        """How often another endpoint was taken into use."""
        return self._rename

    def in_turn(self) -> Iterator[Endpoint]:
        """Yield all endpoints, the one in use first."""
        first = self._preferred
        yield from self.endpoints[first:]
        yield from self.endpoints[:first]

    async def connection(self, endpoint: Endpoint) -> Connection:
        """Return the connection to a member; nothing is sent.

        Raises:
            StoreTlsError: Its certificates are of no use.
            StoreTimeoutError: They could not be read in time.
            StoreUnavailableError: The store has been closed.
        """
        if self.closed:
            raise StoreUnavailableError(f"{endpoint}: the connection was closed")
        found = self._connections.get(endpoint)
        if found is None:
            # checkpoint: another call may have made one meanwhile, and it is as good
            made = await self.separate(endpoint)
            found = self._connections.setdefault(endpoint, made)
            if found is not made:
                self._put_aside(made)
        return found

    async def separate(self, endpoint: Endpoint, *, answer_max: int = ANSWER_MAX) -> Connection:
        """Return a connection of the caller's own, to be closed by it."""
        return await Connection.open(endpoint, self._login, self._timeout_s, answer_max=answer_max)

    def trusted(self) -> Connection | None:
        """Return the connection in use if its member answered on it just now."""
        found = self._connections.get(self.endpoint)
        if found is None or not found.ready:
            return None
        return found if found.heard >= trio.current_time() - FRESH_S else None

    # --- what is learnt ---------------------------------------------------------------------

    def answered(self, endpoint: Endpoint) -> None:
        """Use the endpoint that answered."""
        if endpoint != self.endpoint:
            self._rename += 1
            log.info("%s answers instead of %s", endpoint, self.endpoint)
            self._preferred = self.endpoints.index(endpoint)

    def failed(self, endpoint: Endpoint) -> None:
        """Use the next endpoint, if this is the one in use."""
        if endpoint == self.endpoint and len(self.endpoints) > 1:
            self._rename += 1
            self._preferred = (self._preferred + 1) % len(self.endpoints)
            log.info("%s does not serve; trying %s", endpoint, self.endpoint)

    def broke(self, connection: Connection) -> None:
        """Give up a connection, so that the next call makes another, and move on."""
        if self._connections.get(connection.endpoint) is connection:
            del self._connections[connection.endpoint]
            self._put_aside(connection)
        self.failed(connection.endpoint)

    def renew(self, made: Connection) -> None:
        """Give up all connections; this one, on which its member has just answered, is used."""
        for connection in self._connections.values():
            self._put_aside(connection)
        self._connections = {made.endpoint: made}

    def silent(self, connection: Connection) -> None:
        """Give up a connection whose member keeps quiet, and the watches on it too.

        They would notice only by gRPC's pings, much later.
        """
        self.broke(connection)
        if len(self.endpoints) > 1:
            for watch in [w for w, e in self._watches.items() if e == connection.endpoint]:
                watch.abandon()

    def watches(self, watch: Leaving, endpoint: Endpoint) -> None:
        """Learn of a watch on a member."""
        self._watches[watch] = endpoint

    def left(self, watch: Leaving) -> None:
        """Learn that a watch has ended."""
        self._watches.pop(watch, None)

    async def close(self) -> None:
        """End all connections. Only local work, so bounded."""
        self.closed = True
        for connection in (*self._connections.values(), *self._given_up):
            await connection.close()

    def _put_aside(self, connection: Connection) -> None:
        connection.give_up()
        self._given_up = [c for c in self._given_up if not c.closed] + [connection]
