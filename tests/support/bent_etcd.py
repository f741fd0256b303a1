"""An etcd that misbehaves: a real one behind a server that bends what it says.

Knows: etcd's services on the wire, and how each kind of answer can be wrong. Does not know: who is
told the lies, and what comes of it.

Concurrency: gRPC's threads; `bend` may be changed at any time.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, final

import grpc
from aetcd import rpc
from aetcd.rpc import kv_pb2, rpc_pb2_grpc

from etcdfs.options import Endpoint

Message = Any

_SERVICES: Final[dict[str, tuple[str, ...]]] = {
    "KV": ("Range", "Txn"),
    "Lease": ("LeaseGrant", "LeaseTimeToLive", "LeaseRevoke"),
    "Auth": ("Authenticate",),
    "Maintenance": ("Status",),
}
HUGE: Final = 2**63 - 1


@dataclass(frozen=True)
class Bend:
    """One kind of misbehaviour.

    Attributes:
        method: Whose answers are bent.
        how: What is said instead of an answer; of a stream's, a list, in which None is its end.
    """

    method: Literal["Range", "Txn", "Watch", "Authenticate", "Status", "LeaseGrant"]
    how: Callable[[Message, Any], Any]


@final
class BentEtcd:
    """Passes on what is asked and answered, bent. A context manager.

    Attributes:
        endpoint: Where clients connect.
        bend: How it misbehaves just now; None: not at all.
        on_bent: Called on gRPC's threads whenever it has.
        on_asked: Called there with each question, before it is passed on.
    """

    def __init__(self, target: Endpoint) -> None:
        self.bend: Bend | None = None
        self.on_bent: Callable[[], None] = lambda: None
        self.on_asked: Callable[[Message], None] = lambda _request: None
        self._channel = grpc.insecure_channel(
            str(target), options=[("grpc.max_receive_message_length", -1)]
        )
        self._server = grpc.server(ThreadPoolExecutor(max_workers=16))
        for service, methods in _SERVICES.items():
            stub = getattr(rpc_pb2_grpc, f"{service}Stub")(self._channel)
            servicer = type(
                service,
                (getattr(rpc_pb2_grpc, f"{service}Servicer"),),
                {name: self._passing_on(name, getattr(stub, name)) for name in methods},
            )
            getattr(rpc_pb2_grpc, f"add_{service}Servicer_to_server")(servicer(), self._server)
        watching = type("Watch", (rpc_pb2_grpc.WatchServicer,), {"Watch": self._watch})
        rpc_pb2_grpc.add_WatchServicer_to_server(watching(), self._server)
        self._watches = rpc_pb2_grpc.WatchStub(self._channel)
        self.endpoint = Endpoint("127.0.0.1", self._server.add_insecure_port("127.0.0.1:0"))

    def __enter__(self) -> "BentEtcd":
        self._server.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._server.stop(None).wait()
        self._channel.close()

    def _passing_on(self, name: str, method: Any) -> Any:
        def answer(_self: object, request: Message, context: Any) -> Message:
            self.on_asked(request)
            if self.bend is not None and self.bend.method == name == "Authenticate":
                return self.bend.how(request, rpc.AuthenticateResponse())  # whoever it is
            try:
                response = method(request, timeout=10, metadata=context.invocation_metadata())
            except grpc.RpcError as exc:
                context.abort(exc.code(), exc.details())
                raise  # abort has
            bend = self.bend
            if bend is None or bend.method != name:
                return response
            bent = bend.how(request, response)
            if bent is not response:
                self.on_bent()
            return bent

        return answer

    def _watch(self, requests: Iterator[Message], context: Any) -> Iterator[Message]:
        call = self._watches.Watch(_until_gone(requests))
        context.add_callback(call.cancel)
        try:
            for response in call:
                bend = self.bend
                if bend is None or bend.method != "Watch":
                    yield response
                    continue
                bent = bend.how(None, response)
                if bent != [response]:
                    self.on_bent()
                for told in bent:
                    if told is None:
                        return
                    yield told
        except grpc.RpcError as exc:
            if exc.code() is not grpc.StatusCode.CANCELLED:
                context.abort(exc.code(), exc.details())


def _until_gone(requests: Iterator[Message]) -> Iterator[Message]:
    with contextlib.suppress(grpc.RpcError):
        yield from requests


# --- how answers can be bent ----------------------------------------------------------------


def _kv(key: bytes, revision: int = 1, created: int = 1, version: int = 1) -> Message:
    return kv_pb2.KeyValue(
        key=key, value=b"forged", create_revision=created, mod_revision=revision, version=version
    )


def _range(change: Callable[[Message, Message], None]) -> Bend:
    """Bend the answers to questions about more than one key."""

    def how(request: Message, response: Message) -> Message:
        if not request.range_end:
            return response
        bent = rpc.RangeResponse()
        bent.CopyFrom(response)
        change(request, bent)
        return response if bent == response else bent

    return Bend("Range", how)


def _add(*found: Message) -> Bend:
    return _range(lambda _request, response: response.kvs.extend(found))


def _each(**fields: int) -> Bend:
    def change(_request: Message, response: Message) -> None:
        for kv in response.kvs:
            for name, value in fields.items():
                setattr(kv, name, value)

    return _range(change)


def _at(revision: int) -> Bend:
    def change(_request: Message, response: Message) -> None:
        response.header.revision = revision

    return _range(change)


def _reversed(_request: Message, response: Message) -> None:
    found = list(response.kvs)[::-1]
    del response.kvs[:]
    response.kvs.extend(found)


def _twice(_request: Message, response: Message) -> None:
    response.kvs.extend(list(response.kvs)[-1:])


def _endless(_request: Message, response: Message) -> None:
    response.more = True
    response.count = max(response.count, len(response.kvs)) + 1


def _made_up(request: Message, response: Message) -> None:
    """Go on for ever with keys that are in order, and in the range."""
    del response.kvs[:]
    response.kvs.append(_kv(request.key.rstrip(b"\0") + b"\1"))
    response.more, response.count = True, 1000


def _more_of_nothing(_request: Message, response: Message) -> None:
    del response.kvs[:]
    response.more, response.count = True, 7


def _too_many(request: Message, response: Message) -> None:
    start = request.key.rstrip(b"\0")
    response.kvs.extend(_kv(start + b"\xfe%06d" % n) for n in range(request.limit + 1))


def _single(_request: Message, response: Message) -> Message:
    return (
        response
        if _request.range_end
        else rpc.RangeResponse(header=response.header, kvs=[_kv(b"/other")], count=1)
    )


def _txn(change: Callable[[Message], None]) -> Bend:
    def how(_request: Message, response: Message) -> Message:
        bent = rpc.TxnResponse()
        bent.CopyFrom(response)
        change(bent)
        return bent

    return Bend("Txn", how)


def _of_another_kind(answer: Message) -> None:
    for response in answer.responses:
        response.response_put.SetInParent()


def _of_no_kind(answer: Message) -> None:
    for response in answer.responses:
        response.Clear()


def _events(
    *forged: tuple[bytes, int, int],
    header: int | None = None,
) -> Bend:
    """Have events sent before real ones: a key, a revision, whether that counts from the newest."""

    def how(_request: Message, response: Message) -> list[Message]:
        if not response.events:
            return [response]
        newest = response.header.revision
        found = []
        for key, revision, ahead in forged:
            bent = rpc.WatchResponse(
                header=response.header,
                watch_id=response.watch_id,
                events=[kv_pb2.Event(kv=_kv(key, revision + (newest if ahead else 0)))],
            )
            if header is not None:
                bent.header.revision = header
            found.append(bent)
        return [*found, response]

    return Bend("Watch", how)


def _said(*others: Callable[[Message], Message | None], before: bool = False) -> Bend:
    """Have other things said when there are events, or, with `before`, when a watch is created."""

    def how(_request: Message, response: Message) -> list[Message]:
        if not (response.created if before else response.events):
            return [response]
        return [make(response) for make in others]

    return Bend("Watch", how)


def _changed(response: Message, **fields: Any) -> Message:
    bent = rpc.WatchResponse()
    bent.CopyFrom(response)
    for name, value in fields.items():
        setattr(bent, name, value)
    return bent


def _without_events(response: Message, **fields: Any) -> Message:
    return rpc.WatchResponse(header=response.header, watch_id=response.watch_id, **fields)


def _same(response: Message) -> Message:
    return response


def _shuffled(response: Message) -> Message:
    bent = _changed(response)
    found = list(bent.events)[::-1]
    del bent.events[:]
    bent.events.extend(found)
    return bent


def _doubled(response: Message) -> Message:
    bent = _changed(response)
    bent.events.extend(list(bent.events))
    return bent


_SURROGATE: Final = "\N{LATIN SMALL LETTER E WITH ACUTE}"

RANGES: Final[dict[str, Bend]] = {
    "a key after the range": _add(_kv(b"\xff/out")),
    "a key before the range": _range(lambda _, page: page.kvs.insert(0, _kv(b"\0"))),
    "an empty key": _range(lambda _, page: page.kvs.insert(0, _kv(b""))),
    "out of order": _range(_reversed),
    "a key twice": _range(_twice),
    "the same page for ever": _range(_endless),
    "made-up pages for ever": _range(_made_up),
    "more of nothing": _range(_more_of_nothing),
    "more than was asked for": _range(_too_many),
    "keys from the future": _each(mod_revision=2**40),
    "keys of the last revision": _each(mod_revision=HUGE),
    "negative revisions": _each(mod_revision=-5, create_revision=-5),
    "made after it was changed": _each(create_revision=2**30),
    "a version of nothing": _each(version=0),
    "revision 0": _at(0),
    "a negative revision": _at(-3),
    "the last revision": _at(HUGE),
    "another key": Bend("Range", _single),
}
TXNS: Final[dict[str, Bend]] = {
    "no results": _txn(lambda answer: answer.ClearField("responses")),
    "results of another kind": _txn(_of_another_kind),
    "results of no kind": _txn(_of_no_kind),
    "one result more": _txn(lambda answer: answer.responses.add().response_put.SetInParent()),
    "it did not succeed": _txn(lambda answer: setattr(answer, "succeeded", False)),
    "in no revision": _txn(lambda answer: setattr(answer.header, "revision", 0)),
}
WATCHES: Final[dict[str, Bend]] = {
    "an event out of range": _events((b"\xff/out", 0, 1)),
    "an event of no key": _events((b"", 0, 1)),
    "an event from the past": _events((b"/t/past", 1, 0)),
    "an event of a negative revision": _events((b"/t/x", -3, 0)),
    "an event of the last revision": _events((b"/t/x", HUGE, 0)),
    "the last revision of all": _events((b"/t/x", HUGE, 0), header=HUGE),
    "an event from the future": _events((b"/t/x", 50, 1)),
    "created twice": _said(lambda r: _without_events(r, created=True), _same),
    "of another watch": _said(lambda r: _changed(r, watch_id=77)),
    "created with events": _said(
        lambda r: rpc.WatchResponse(
            header=r.header,
            watch_id=r.watch_id,
            created=True,
            events=[kv_pb2.Event(kv=_kv(b"/t/x"))],
        ),
        before=True,
    ),
    "never created": _said(lambda r: _changed(r, created=False), before=True),
    "a fragment of nothing": _said(lambda r: _changed(r, fragment=True), _without_events),
    "fragments that contradict": _said(lambda r: _changed(r, fragment=True), _same),
    "cancelled": _said(lambda r: _without_events(r, canceled=True, cancel_reason="\x1b[31mno\n")),
    "compacted": _said(lambda r: _without_events(r, canceled=True, compact_revision=9)),
    "compacted for ever": _said(
        lambda r: _without_events(r, canceled=True, compact_revision=2**62), before=True
    ),
    "shuffled": _said(_shuffled),
    "doubled": _said(_doubled),
    "progress of revision 0": _said(lambda _: rpc.WatchResponse(), _same),
    "the end of the stream": _said(lambda _: None),
}
OTHERS: Final[dict[str, Bend]] = {
    "a database of less than nothing": Bend(
        "Status", lambda _, r: rpc.StatusResponse(header=r.header, dbSize=-5, version="\x1b[0m")
    ),
    "no lease": Bend(
        "LeaseGrant", lambda _, r: rpc.LeaseGrantResponse(header=r.header, ID=-1, error="no")
    ),
}


def _token(text: str) -> Bend:
    return Bend("Authenticate", partial(lambda text, _, r: _authenticated(text, r), text))


def _authenticated(text: str, response: Message) -> Message:
    return rpc.AuthenticateResponse(header=response.header, token=text)


TOKENS: Final[dict[str, Bend]] = {
    "of two lines": _token("a\nb"),
    "with a NUL": _token("a\0b"),
    "beyond ASCII": _token(f"a{_SURROGATE}b"),
    "of a megabyte": _token("x" * 1_000_000),
}
