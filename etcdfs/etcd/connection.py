"""One channel to one member, and what goes with each call on it: deadline, token, `hasleader`.

Knows: channel options, and etcd's tokens. Does not know: the other members, and whether a call may
be sent again. It is part of the etcd door.

A token is fetched by the first call of a connection that has a user, and again when etcd says
that it is no longer good: it expired (300 s unused, by default), the member was restarted, the
password or a role was changed, users were switched on. etcd says so before it looks at the
request, so that the call can be sent again, once. A watch gets a token of its own: an old one
would have it refused as "permission denied" (etcd issue 12385).

Concurrency: any number of calls at once. A connection that is given up ends when the last call
on it has.
"""

import random
from typing import Final, final

import grpc
import trio
from aetcd import rpc

from etcdfs.errors import StoreError, StoreLoginError, StorePermissionError, StoreUnavailableError
from etcdfs.etcd import codec as wire
from etcdfs.etcd.calls import (
    Channel,
    InThread,
    Metadata,
    Method,
    NoThreadError,
    Stream,
    call,
)
from etcdfs.etcd.tls import credentials, password
from etcdfs.options import Endpoint, Security

_HAS_LEADER: Final = ("hasleader", "true")
"""A member without a leader refuses at once, before it looks at the request, instead of letting
it wait."""

LOGIN_PAUSE_S: Final = 1.0
"""How long a refused password is not tried again: etcd spends a tenth of a second on each."""

TOKEN_MAX: Final = 8192
"""Characters of a token: what gRPC sends along with a call."""

ANSWER_MAX: Final = 32 << 20
"""Bytes of an answer: above what etcd is ever told to take as a value (`--max-request-bytes`), and
bearable in memory. Whoever may get more asks for less at a time (`paging`)."""

ANY_SIZE: Final = -1
"""For a watch: etcd catches up in answers of any size, and nobody can ask for less."""

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
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
    # Nobody but the etcd door decides what is sent again.
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.enable_retries", 0),
)


@final
class Login:
    """What is known of our user, for all connections of a store.

    A password that etcd refused is not tried again at once: etcd makes each try costly.
    """

    def __init__(self, security: Security) -> None:
        self.security = security
        self._refused: tuple[str, float, StoreLoginError] | None = None

    async def password(self, timeout_s: float) -> str:
        """Return the password to log in with.

        Raises:
            StoreLoginError: It cannot be read, or was refused a moment ago.
        """
        found = await password(self.security, timeout_s)
        if self._refused is not None:
            refused, until, error = self._refused
            if found == refused and trio.current_time() < until:
                raise StoreLoginError(str(error))
        return found

    def refused(self, tried: str, error: StoreLoginError) -> None:
        """Remember a password that is no good."""
        # Jittered, so that the mounts of a cluster do not ask all at once.
        pause_s = random.uniform(LOGIN_PAUSE_S / 2, LOGIN_PAUSE_S)  # noqa: S311 - no secret
        self._refused = (tried, trio.current_time() + pause_s, error)


@final
class Connection:
    """A channel to one member. A request is sent once; what a failure means is for the caller.

    Attributes:
        endpoint: Where it leads.
        heard: When the member last answered on it; minus infinity: not yet.
    """

    def __init__(self, endpoint: Endpoint, login: Login, channel: Channel) -> None:
        # dependencies
        self._login = login
        # constants
        self.endpoint = endpoint
        # mutable state
        self.heard = float("-inf")
        self._channel = channel
        self._auth = rpc.AuthStub(channel)
        self._kv = rpc.KVStub(channel)
        self._leases = rpc.LeaseStub(channel)
        self._maintenance = rpc.MaintenanceStub(channel)
        self._watch = rpc.WatchStub(channel)
        self._token: str | None = None
        self._logging_in = trio.Lock()
        self._calls = 0
        self._is_given_up = False
        self._is_lost = False
        self._closing: InThread[None] | None = None

    @classmethod
    async def open(
        cls, endpoint: Endpoint, login: Login, timeout_s: float, *, answer_max: int = ANSWER_MAX
    ) -> "Connection":
        """Return a connection; nothing is sent yet, but certificates are read.

        Raises:
            StoreTlsError: They are of no use.
            StoreTimeoutError: They could not be read in time.
        """
        trust, options = await credentials(login.security, endpoint, timeout_s)
        options += (*_CHANNEL_OPTIONS, ("grpc.max_receive_message_length", answer_max))
        if trust is None:
            channel = grpc.insecure_channel(str(endpoint), options=options)
        else:
            channel = grpc.secure_channel(str(endpoint), trust, options=options)
        return cls(endpoint, login, Channel(channel))

    @property
    def ready(self) -> bool:
        """Whether it works, as far as is known; starts to connect if not."""
        return not self._is_given_up and self._channel.is_ready

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

    async def watch(self, deadline: float) -> Stream:
        """Open a stream of watch requests and responses, with a token if there is a user.

        Raises:
            StoreError: There is no token to be had, or no thread.
        """
        metadata = await self._metadata(deadline)
        try:
            return Stream(self._watch.Watch, metadata)
        except NoThreadError as exc:
            self._lose()
            raise wire.read_error(exc, self.endpoint) from exc

    @property
    def closed(self) -> bool:
        """Whether its channel has been closed."""
        return self._is_lost or (self._closing is not None and self._closing.done)

    def give_up(self) -> None:
        """Close the channel once the calls on it have ended; each has its deadline."""
        self._is_given_up = True
        if not self._calls and not self._is_lost:
            self._close()

    async def close(self) -> None:
        """End every call and close the channel. Only local work, so bounded."""
        self._is_given_up = True
        if self._is_lost:
            return
        closing = self._close()
        with trio.CancelScope(shield=True):
            await closing.wait()

    def _lose(self) -> None:
        """Leave a channel that nobody listens to any more; it has no other calls."""
        self._is_lost = True
        self._channel.keep_for_ever()

    def _close(self) -> InThread[None]:
        if self._closing is None:
            self._closing = InThread(self._channel.close)  # it waits for what it cancels
        return self._closing

    # --- calls ------------------------------------------------------------------------------

    async def _call(self, method: Method, request: wire.Message, deadline: float) -> wire.Message:
        """Call a unary method and wait for the answer, no longer than the deadline.

        Raises:
            grpc.RpcError: It failed.
            StoreError: It was not sent, since there is no token to be had.
        """
        self._calls += 1
        try:
            metadata = await self._metadata(deadline)
            try:
                answer = await self._send(method, request, deadline, metadata)
            except grpc.RpcError as exc:
                if self._login.security.user is None or not wire.wants_login(exc):
                    raise
                # Refused unseen (module docstring): to send it again is safe.
                again = await self._metadata(deadline, stale=self._token_of(metadata))
                answer = await self._send(method, request, deadline, again)
            self.heard = trio.current_time()
            return answer
        finally:
            self._calls -= 1
            if self._is_given_up:
                self.give_up()

    async def _send(
        self, method: Method, request: wire.Message, deadline: float, metadata: Metadata
    ) -> wire.Message:
        if self._is_lost or self._closing is not None:
            raise StoreUnavailableError(f"{self.endpoint}: the connection was closed")
        remaining = max(deadline - trio.current_time(), 0.001)
        try:
            return await call(method, request, remaining, metadata)
        except NoThreadError:
            self._lose()
            raise

    # --- tokens -----------------------------------------------------------------------------

    async def _metadata(self, deadline: float, stale: str | None = None) -> Metadata:
        """Return what goes with a call; logs in first if there is no token but `stale`."""
        user = self._login.security.user
        if user is None:
            return (_HAS_LEADER,)
        async with self._logging_in:  # many calls, one login
            if self._token is None or self._token == stale:
                self._token = await self._log_in(user, deadline)
        return (_HAS_LEADER, ("token", self._token)) if self._token else (_HAS_LEADER,)

    async def _log_in(self, user: str, deadline: float) -> str:
        """Return a token; an empty one if etcd has no users and lets everybody in.

        Raises:
            StoreLoginError: The user or password is not accepted.
            StoreUnavailableError: etcd cannot be asked.
        """
        word = await self._login.password(max(deadline - trio.current_time(), 0.001))
        request = wire.auth_request(user, word)
        try:
            answer = await self._send(self._auth.Authenticate, request, deadline, (_HAS_LEADER,))
        except grpc.RpcError as exc:
            if wire.has_no_users(exc):
                return ""
            error = wire.read_error(exc, self.endpoint)
            if isinstance(error, StorePermissionError):
                refused = StoreLoginError(
                    f"{self.endpoint}: the user {user!r} is not let in: "
                    "unknown, or the password is wrong"
                )
                self._login.refused(word, refused)
                raise refused from exc
            raise _as_unavailable(error) from exc
        token = str(answer.token)
        if len(token) > TOKEN_MAX or not (token.isascii() and token.isprintable()):
            raise StoreUnavailableError(f"{self.endpoint}: the token it gave cannot be sent back")
        return token

    @staticmethod
    def _token_of(metadata: Metadata) -> str:
        return dict(metadata).get("token", "")


def _as_unavailable(error: StoreError) -> StoreUnavailableError:
    """Return the failure of a login, which says that what it was for has not been sent."""
    if isinstance(error, StoreUnavailableError):
        return error
    return StoreUnavailableError(str(error))
