"""The port's values as etcd's protobuf messages and back, and etcd's refusals as errors.

Knows: the generated messages of `aetcd.rpc` and the texts of etcd's errors
(api/v3rpc/rpctypes/error.go). Does not know: channels, time, who asks. It is part of the etcd door.

Concurrency: none; pure functions.
"""

import re
from collections.abc import Iterable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, assert_never

import grpc
from aetcd import rpc

from etcdfs.errors import (
    AnswerTooLargeError,
    CompactedError,
    FutureRevisionError,
    LeaseExistsError,
    OutcomeUnknownError,
    StoreError,
    StoreFullError,
    StoreLoginError,
    StorePermissionError,
    StoreProtocolError,
    StoreTimeoutError,
    StoreTlsError,
    StoreUnavailableError,
    StoreUserError,
    StoreValueTooLargeError,
    TooManyOperationsError,
    TransactionAbortedError,
    WatchLostError,
)
from etcdfs.keyspace.store import (
    Abort,
    Committed,
    Compare,
    Delete,
    Event,
    Get,
    KeyValue,
    Operation,
    Page,
    Put,
    Revision,
    StoreStatus,
    Tombstone,
    Transaction,
)

Message = Any
"""A generated protobuf message: `aetcd.rpc` has no types."""

Code = Any
"""A grpc.StatusCode: it has none either."""


class Header(NamedTuple):
    """What every answer says of the cluster it comes from."""

    cluster: int
    revision: int


# --- requests -------------------------------------------------------------------------------

_FIRST_KEY = b"\0"
"""etcd has no empty key, and refuses it even as the start of a range."""

_NEVER = 2**63 - 1
"""A revision that no store reaches."""

_OPERATORS = {
    "==": rpc.Compare.EQUAL,
    "!=": rpc.Compare.NOT_EQUAL,
    "<": rpc.Compare.LESS,
    ">": rpc.Compare.GREATER,
}
_DESCENDING = rpc.RangeRequest.DESCEND
_BY_MOD_REVISION = rpc.RangeRequest.MOD
_FIELDS = {
    "create_revision": rpc.Compare.CREATE,
    "mod_revision": rpc.Compare.MOD,
    "version": rpc.Compare.VERSION,
}


def range_request(
    start: bytes,
    end: bytes | None,
    *,
    limit: int,
    revision: int,
    keys_only: bool,
    newest: bool = False,
) -> Message:
    """Return the request for a linearizable range in key order, or with the newest key first."""
    order = {"sort_order": _DESCENDING, "sort_target": _BY_MOD_REVISION} if newest else {}
    return rpc.RangeRequest(
        **_range(start, end), limit=limit, revision=revision, keys_only=keys_only, **order
    )


def txn_request(transaction: Transaction) -> Message:
    """Return the request for a transaction, inner ones included."""
    return rpc.TxnRequest(
        compare=[_compare(compare) for compare in transaction.when],
        success=[_request_op(operation) for operation in transaction.then],
        failure=[_request_op(operation) for operation in transaction.otherwise],
    )


def watch_create_request(start: bytes, end: bytes, from_revision: int) -> Message:
    """Return the request that opens a watch, progress notices welcome.

    Fragments are understood but not asked for: with our receive limit they gain nothing, and
    etcd cuts them in quadratic time (it sums up the fragment for each event; a backlog of
    40 000 small events took 4 s instead of 0.3 s, and kept a server's core busy).
    """
    return rpc.WatchRequest(
        create_request=rpc.WatchCreateRequest(
            **_range(start, end),
            start_revision=from_revision,
            progress_notify=True,
        )
    )


def watch_progress_request() -> Message:
    """Return the request for a progress notice."""
    return rpc.WatchRequest(progress_request=rpc.WatchProgressRequest())


def _range(start: bytes, end: bytes | None) -> dict[str, bytes]:
    if end is None:
        return {"key": start}
    return {"key": start or _FIRST_KEY, "range_end": end}


def _compare(compare: Compare) -> Message:
    return rpc.Compare(
        result=_OPERATORS[compare.operator],
        target=_FIELDS[compare.field],
        **_range(compare.key, compare.end),
        **{compare.field: compare.number},
    )


def _request_op(operation: Operation) -> Message:
    match operation:
        case Get(key, end, limit, keys_only):
            request = range_request(key, end, limit=limit, revision=0, keys_only=keys_only)
            return rpc.RequestOp(request_range=request)
        case Put(key, value, lease, keep_lease):
            lease = 0 if keep_lease else lease
            put = rpc.PutRequest(key=key, value=value, lease=lease, ignore_lease=keep_lease)
            return rpc.RequestOp(request_put=put)
        case Delete(key, end):
            delete = rpc.DeleteRangeRequest(**_range(key, end))
            return rpc.RequestOp(request_delete_range=delete)
        case Abort(key):
            # etcd looks at the revisions of all ranges that are to run before it changes
            # anything (server/etcdserver/apply.go, checkRequests), and refuses this one.
            never = rpc.RangeRequest(key=key, revision=_NEVER, limit=1, keys_only=True)
            return rpc.RequestOp(request_range=never)
        case Transaction():
            return rpc.RequestOp(request_txn=txn_request(operation))
        case _:
            assert_never(operation)


# --- answers --------------------------------------------------------------------------------


def page(response: Message, revision: int | None = None) -> Page:
    """Return a range's answer; `revision` is the transaction's when it ran inside one."""
    return Page(
        entries=key_values(response.kvs),
        revision=response.header.revision if revision is None else Revision(revision),
        more=response.more,
        remaining=response.count - len(response.kvs) if response.more else None,
    )


_key_value_fields = attrgetter(*KeyValue._fields)  # they bear the names etcd gives them
_make_key_value = partial(tuple.__new__, KeyValue)  # what `KeyValue._make` does, less a call


def key_values(messages: Iterable[Message]) -> tuple[KeyValue, ...]:
    """Return the keys of an answer. All in C: this is the hot loop of a start."""
    return tuple(map(_make_key_value, map(_key_value_fields, messages)))


_kv = attrgetter("kv")
_type = attrgetter("type")


def events(messages: Sequence[Message]) -> list[Event]:
    """Return the events of a watch response, in etcd's order."""
    if not any(map(_type, messages)):  # PUT is 0, DELETE is 1; there are no others
        return list(key_values(map(_kv, messages)))
    return [_event(message.type, message.kv) for message in messages]


def _event(kind: int, kv: Message) -> Event:
    if kind:
        return Tombstone(kv.key, kv.mod_revision)
    return _make_key_value(_key_value_fields(kv))


def committed(response: Message) -> Committed:
    """Return a transaction's answer.

    Raises:
        StoreProtocolError: It cannot be understood; it may have been carried out.
    """
    return _committed(response, response.header.revision)


def _committed(response: Message, revision: int) -> Committed:
    return Committed(
        succeeded=response.succeeded,
        revision=Revision(revision),
        results=tuple(_result(op, revision) for op in response.responses),
    )


def _result(op: Message, revision: int) -> Page | Committed | int | None:
    match op.WhichOneof("response"):
        case "response_range":
            return page(op.response_range, revision)
        case "response_put":
            return None
        case "response_delete_range":
            deleted: int = op.response_delete_range.deleted
            return deleted
        case "response_txn":
            return _committed(op.response_txn, revision)
        case kind:
            raise StoreProtocolError(f"etcd answered a transaction with {kind!r}")


def header(response: Message) -> Header:
    """Return which cluster answered, and how far it was."""
    return Header(response.header.cluster_id, response.header.revision)


def auth_request(user: str, password: str) -> Message:
    """Return the request for a token."""
    return rpc.AuthenticateRequest(name=user, password=password)


def store_status(response: Message) -> StoreStatus:
    """Return what a member says of itself."""
    return StoreStatus(
        version=response.version,
        database_size=max(0, response.dbSize),
        revision=response.header.revision,
        cluster=response.header.cluster_id,
        problems=tuple(response.errors),
    )


# --- refusals -------------------------------------------------------------------------------

_REFUSALS: tuple[tuple[str, type[StoreError]], ...] = (
    ("Received message larger than max", AnswerTooLargeError),  # gRPC's limit, on this side
    ("request is too large", StoreValueTooLargeError),
    ("larger than max", StoreValueTooLargeError),  # gRPC's own limit, before etcd sees it
    ("too many operations", TooManyOperationsError),
    ("database space exceeded", StoreFullError),
    ("permission denied", StorePermissionError),
    ("user name is empty", StoreUserError),
    ("user name not found", StoreUserError),
    ("invalid auth token", StoreUserError),
    ("revision of auth store is old", StoreUserError),
    ("authentication failed", StoreLoginError),
    ("lease already exists", LeaseExistsError),
    ("required revision has been compacted", CompactedError),
    ("required revision is a future revision", FutureRevisionError),
)
"""Texts that etcd sends only when it did not carry out the request."""

_REFUSING_CODES: dict[Code, type[StoreError]] = {
    grpc.StatusCode.PERMISSION_DENIED: StorePermissionError,
    grpc.StatusCode.UNAUTHENTICATED: StoreUserError,
    grpc.StatusCode.INVALID_ARGUMENT: StoreError,
    grpc.StatusCode.FAILED_PRECONDITION: StoreError,
    grpc.StatusCode.NOT_FOUND: StoreError,
    grpc.StatusCode.OUT_OF_RANGE: StoreError,
    grpc.StatusCode.UNIMPLEMENTED: StoreProtocolError,
}
"""Codes that etcd and gRPC send only when the request was not carried out."""

_NOT_SENT = (
    "failed to connect to all addresses",  # no transport existed
    "errors resolving",
    "etcdserver: no leader",  # the `hasleader` check, before the request is looked at
    "etcdserver: too many requests",  # before it is proposed
    "etcdserver: rpc not supported for learner",  # the same check
)
"""Texts of failures that prove a write was never proposed."""


_WANTS_LOGIN = (
    "invalid auth token",  # it expired, the member was restarted, the password was changed
    "user name is empty",  # users were switched on since
    "revision of auth store is old",  # users or roles were changed since
)
"""Texts that etcd sends when a new token is worth a try; it has not carried out anything."""

_TLS_FAILURES = (
    ("Hostname Verification Check failed", "its certificate is for another name"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS"),
    ("Handshake read failed", "it does not speak TLS"),
    ("TSI_DATA_CORRUPTED", "it does not accept our certificate, or wants one (--cert)"),
    ("CERTIFICATE_REQUIRED", "it wants a certificate of ours (--cert)"),
    ("BAD_CERTIFICATE", "it does not accept our certificate, or wants one (--cert)"),
    ("Failed to create security handshaker", "the certificates cannot be used"),
)


def refusal(code: Code | None, details: str, endpoint: object) -> StoreError | None:
    """Return the error for a request that was certainly refused; None if it may have run."""
    message = f"{endpoint}: {details}"
    for text, error in _REFUSALS:
        if text in details:
            return error(message)
    if any(text in details for text in _NOT_SENT):  # another member may take it, whatever the code
        return None
    error_of_code = _REFUSING_CODES.get(code)
    return None if error_of_code is None else error_of_code(message)


def read_error(failure: Message, endpoint: object) -> StoreError:
    """Return what a failed read means."""
    code, details = failure.code(), failure.details() or ""
    refused = refusal(code, details, endpoint)
    if refused is not None:
        return refused
    message = f"{endpoint}: {reason(code, details)}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED or "timed out" in details:
        return StoreTimeoutError(message)
    return StoreTlsError(message) if tls_reason(details) else StoreUnavailableError(message)


def write_error(failure: Message, endpoint: object) -> StoreError:
    """Return what a failed write means; unknown unless it is proven that it did not run."""
    code, details = failure.code(), failure.details() or ""
    refused = refusal(code, details, endpoint)
    if isinstance(refused, FutureRevisionError):  # only an `Abort` asks for one
        return TransactionAbortedError(str(refused))
    if refused is not None:
        return refused
    message = f"{endpoint}: {reason(code, details)}"
    if any(text in details for text in _NOT_SENT):
        return StoreUnavailableError(message)
    return OutcomeUnknownError(message)


def is_transient(failure: Message) -> bool:
    """Tell whether a read that failed so may succeed when it is sent again."""
    code = failure.code()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return False
    return refusal(code, failure.details() or "", "") is None


def is_of_connection(failure: Message) -> bool:
    """Tell whether the connection is what failed, so that another had better be made."""
    return failure.code() is grpc.StatusCode.UNAVAILABLE and not is_from_etcd(failure)


def wants_login(failure: Message) -> bool:
    """Tell whether etcd refused for want of a (still valid) token; then it did nothing."""
    details = failure.details() or ""
    return any(text in details for text in _WANTS_LOGIN)


def has_no_users(failure: Message) -> bool:
    """Tell whether a login failed because etcd lets everybody in."""
    return "authentication is not enabled" in (failure.details() or "")


def is_from_etcd(failure: Message) -> bool:
    """Tell whether etcd itself says no (in contrast to: nobody is there)."""
    return "etcdserver:" in (failure.details() or "")


def reason(code: Code, details: str) -> str:
    """Return gRPC's explanation in as few words as it allows."""
    details = details.replace("\0", "")  # it has some when there are no descriptors left
    if "Channel closed!" in details:  # on this side
        return "the connection was closed"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer in time"
    refused = re.search(r"Failed to connect to remote host: (.+)$", details)
    if refused is not None:
        return refused[1].lower()
    if re.search(r"failed to connect to all addresses.*Socket closed$", details):
        # So it is, too, when one side speaks TLS and the other does not.
        return "it closed the connection at once"
    return tls_reason(details) or " ".join(details.split()) or code.name.lower()


def tls_reason(details: str) -> str | None:
    """Return why TLS could not be agreed upon, None if that is not what failed."""
    distrusted = re.search(r"CERTIFICATE_VERIFY_FAILED: (.+?)(?:: OK)?$", details)
    if distrusted is not None:
        return f"its certificate is not trusted: {distrusted[1]}"
    for text, meaning in _TLS_FAILURES:
        if text in details:
            return meaning
    return "TLS failed" if "Tls handshake failed" in details else None


def stream_error(failure: Message, endpoint: object) -> StoreError:
    """Return what the failure of a watch's stream means."""
    code, details = failure.code(), failure.details() or ""
    refused = refusal(code, details, endpoint)
    if isinstance(refused, StorePermissionError):
        return refused
    return WatchLostError(f"{endpoint}: {reason(code, details)}")


def watch_cancelled(response: Message, endpoint: object) -> StoreError:
    """Return why etcd cancelled a watch."""
    if response.compact_revision:
        message = f"{endpoint}: history before revision {response.compact_revision} is gone"
        return CompactedError(message, response.compact_revision)
    refused = refusal(None, response.cancel_reason, endpoint)
    if isinstance(refused, StorePermissionError):
        return refused
    return WatchLostError(f"{endpoint}: {response.cancel_reason or 'etcd cancelled the watch'}")
