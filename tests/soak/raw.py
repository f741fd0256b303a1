"""A plain etcd client on the generated stubs: the foreign writer, and the witness.

Knows: how to ask etcd directly, on gRPC's blocking interface, which shares nothing with etcdfs but
the generated messages. Nothing is ever sent twice.

Concurrency: blocking calls, each bounded; one thread per client.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, final

import grpc
from aetcd import rpc

from tests.soak.control import nap

Message = Any

TIMEOUT_S: Final = 3.0
LONG_S: Final = 30.0
"""For what etcd takes its time for."""
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 500),
)
_HAS_LEADER: Final = (("hasleader", "true"),)
_NOT_DONE: Final = ("failed to connect to all addresses", "no leader", "too many requests")


class RawError(Exception):
    """etcd did not answer, or refused. `refused`: the request was certainly not carried out."""

    def __init__(self, failure: Message) -> None:
        details = failure.details() or ""
        super().__init__(f"{failure.code().name} {details}")
        refusing = (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.PERMISSION_DENIED,
        )
        self.refused = failure.code() in refusing or any(text in details for text in _NOT_DONE)


class Found(NamedTuple):
    """A key as etcd has it."""

    value: bytes
    mod_revision: int


@final
class Raw:
    """A client of some members; after a failure the next request goes to the next one."""

    def __init__(self, endpoints: Sequence[str], login: tuple[str, str] | None = None) -> None:
        self._endpoints = endpoints
        self._login = login
        self._metadata: tuple[tuple[str, str], ...] = _HAS_LEADER
        self._next = 0
        self._channel: Message = None
        self._connect()

    def close(self) -> None:
        self._channel.close()

    def put(self, *pairs: tuple[bytes, bytes]) -> int:
        """Put keys in one transaction; return the revision."""
        operations = [
            rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value)) for key, value in pairs
        ]
        return self._revision(self._txn(rpc.TxnRequest(success=operations)))

    def put_if(self, key: bytes, value: bytes, mod_revision: int) -> int | None:
        """Put a key if it is unchanged; None if it is not."""
        compare = rpc.Compare(
            result=rpc.Compare.EQUAL,
            target=rpc.Compare.MOD,
            key=key,
            mod_revision=mod_revision,
        )
        put = rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value))
        answer = self._txn(rpc.TxnRequest(compare=[compare], success=[put]))
        return self._revision(answer) if answer.succeeded else None

    def delete(self, key: bytes, end: bytes = b"") -> int:
        """Delete a key or a range; return the revision."""
        request = rpc.DeleteRangeRequest(key=key, range_end=end)
        return self._revision(self._call("DeleteRange", request))

    def get(self, key: bytes) -> Found | None:
        """Return a key, linearizable."""
        answer = self._call("Range", rpc.RangeRequest(key=key))
        return Found(answer.kvs[0].value, answer.kvs[0].mod_revision) if answer.kvs else None

    def entries(self, prefix: bytes) -> Message:
        """Return every key with a prefix as etcd tells it, linearizable."""
        end = prefix[:-1] + bytes((prefix[-1] + 1,))
        return self._call("Range", rpc.RangeRequest(key=prefix, range_end=end)).kvs

    def below(self, prefix: bytes) -> dict[bytes, bytes]:
        """Return every key with a prefix and its value, linearizable."""
        return {kv.key: kv.value for kv in self.entries(prefix)}

    def revision(self) -> int:
        """Return the revision of the store."""
        return self._revision(self._call("Range", rpc.RangeRequest(key=b"\0", limit=1)))

    def compact(self, revision: int) -> None:
        """Drop history before a revision."""
        request = rpc.CompactionRequest(revision=revision, physical=True)
        self._send(rpc.KVStub, "Compact", request, LONG_S)

    def status(self) -> Message:
        """Return what the member in use says of itself."""
        return self._send(rpc.MaintenanceStub, "Status", rpc.StatusRequest())

    def set_no_space(self, member: int, *, on: bool) -> None:
        """Raise a member's alarm that makes etcd refuse writes, or disarm it."""
        action = rpc.AlarmRequest.ACTIVATE if on else rpc.AlarmRequest.DEACTIVATE
        request = rpc.AlarmRequest(action=action, memberID=member, alarm=rpc.NOSPACE)
        self._send(rpc.MaintenanceStub, "Alarm", request)

    def move_leader(self, member: int) -> None:
        """Have another member lead; this client's must be the leader."""
        self._send(rpc.MaintenanceStub, "MoveLeader", rpc.MoveLeaderRequest(targetID=member))

    def defragment(self) -> None:
        """Have the member in use rewrite its database; it answers nobody meanwhile."""
        self._send(rpc.MaintenanceStub, "Defragment", rpc.DefragmentRequest(), LONG_S)

    def watch(self, prefix: bytes, start: int) -> Iterator[Message]:
        """Yield the responses of a watch until it breaks or is cancelled."""
        end = prefix[:-1] + bytes((prefix[-1] + 1,))
        create = rpc.WatchCreateRequest(
            key=prefix, range_end=end, start_revision=start, progress_notify=True
        )
        requests = iter([rpc.WatchRequest(create_request=create)])

        def stay() -> Iterator[Message]:
            yield from requests
            while not call_ended():
                nap(1.0)

        call: list[Message] = []

        def call_ended() -> bool:
            return bool(call) and not call[0].is_active()

        stream = rpc.WatchStub(self._channel).Watch(stay(), metadata=_HAS_LEADER)
        call.append(stream)
        try:
            yield from stream
        except grpc.RpcError as exc:
            raise RawError(exc) from exc
        finally:
            stream.cancel()

    # --- sending ----------------------------------------------------------------------------

    def _txn(self, request: Message) -> Message:
        return self._call("Txn", request)

    def _call(self, name: str, request: Message) -> Message:
        return self._send(rpc.KVStub, name, request)

    def _send(
        self, stub: Any, name: str, request: Message, timeout_s: float = TIMEOUT_S
    ) -> Message:
        method = getattr(stub(self._channel), name)
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as exc:
            self._connect()
            raise RawError(exc) from exc

    def _connect(self) -> None:
        if self._channel is not None:
            self._channel.close()
        endpoint = self._endpoints[self._next % len(self._endpoints)]
        self._next += 1
        self._channel = grpc.insecure_channel(endpoint, options=_OPTIONS)
        if self._login is not None:
            self._metadata = (*_HAS_LEADER, ("token", self._token(*self._login)))

    def _token(self, name: str, password: str) -> str:
        """Return a fresh token; none will do for the next request when etcd gives none."""
        request = rpc.AuthenticateRequest(name=name, password=password)
        try:
            answer = rpc.AuthStub(self._channel).Authenticate(request, timeout=TIMEOUT_S)
        except grpc.RpcError:
            return ""
        token: str = answer.token
        return token

    @staticmethod
    def _revision(answer: Message) -> int:
        revision: int = answer.header.revision
        return revision
