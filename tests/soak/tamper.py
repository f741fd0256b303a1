"""A gRPC proxy in front of etcd that tells lies about a watch.

Knows: etcd's methods by name, and the watch's responses. Does not know: who is lied to.

Concurrency: gRPC's own threads; a lie may be set from any thread and holds for what comes next.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, final

import grpc
from aetcd import rpc

Message = Any
Lie = Callable[[Message], list[Message]]
"""What is sent in the place of a response of the watch."""

_WATCH: Final = "/etcdserverpb.Watch/Watch"
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
)
_HOP: Final = ("user-agent", "grpc-accept-encoding", "accept-encoding", "te", "content-type")


@final
class Tamper(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc has no types
    """A server that passes everything on, and lies when told to."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, options=_OPTIONS)
        self._lie: Lie | None = None
        self.told = 0
        self._streams: set[Message] = set()
        self._server = grpc.server(ThreadPoolExecutor(32), options=_OPTIONS)
        self._server.add_generic_rpc_handlers((self,))
        self.endpoint = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    @property
    def url(self) -> str:
        return f"http://{self.endpoint}"

    def lie(self, lie: Lie | None) -> None:
        """Put `lie` in the place of what etcd says from now on; None is the truth."""
        self._lie = lie
        self.told = 0

    def break_watches(self) -> None:
        """End every watch there is."""
        for stream in list(self._streams):
            stream.cancel()

    def close(self) -> None:
        self._server.stop(0).wait(10)
        self._channel.close()

    def service(self, details: Message) -> Message:
        """Return the handler of a method (gRPC's interface)."""
        if details.method == _WATCH:
            return grpc.stream_stream_rpc_method_handler(self._watch)

        def unary(request: bytes, context: Message) -> bytes:
            method = self._channel.unary_unary(details.method)
            try:
                answer: bytes = method(
                    request, timeout=context.time_remaining(), metadata=_metadata(context)
                )
            except grpc.RpcError as exc:
                context.abort(exc.code(), exc.details())
                raise
            return answer

        return grpc.unary_unary_rpc_method_handler(unary)

    def _watch(self, requests: Iterator[bytes], context: Message) -> Iterator[bytes]:
        stream = self._channel.stream_stream(_WATCH)(requests, metadata=_metadata(context))
        context.add_callback(stream.cancel)
        self._streams.add(stream)
        try:
            for data in stream:
                lie = self._lie
                if lie is None:
                    yield data
                    continue
                for response in lie(rpc.WatchResponse.FromString(data)):
                    self.told += 1
                    yield response.SerializeToString()
        except grpc.RpcError as exc:
            if context.is_active():
                context.abort(grpc.StatusCode.UNAVAILABLE, exc.details())
        finally:
            self._streams.discard(stream)


def _metadata(context: Message) -> tuple[tuple[str, str], ...]:
    return tuple((k, v) for k, v in context.invocation_metadata() if k not in _HOP)


# --- lies -----------------------------------------------------------------------------------


def twice(response: Message) -> list[Message]:
    """Tell every event twice (etcd issue 15275)."""
    return [response, response] if response.events else [response]


@final
class OldAgain:
    """Tell an event that is long past again, after newer ones (etcd issue 15271)."""

    def __init__(self) -> None:
        self._kept: Message = None

    def __call__(self, response: Message) -> list[Message]:
        if not response.events:
            return [response]
        if self._kept is None:
            self._kept = response
            return [response]
        old, self._kept = self._kept, response
        return [response, old]


def low_notice(response: Message) -> list[Message]:
    """Say after every event that the watch is not as far as that."""
    return _with_notice(response, -1)


def high_notice(response: Message) -> list[Message]:
    """Say before every event that the watch is past it (etcd issue 15220)."""
    if not response.events:
        return [response]
    return [*_with_notice(response, 0)[1:], response]


def _with_notice(response: Message, off: int) -> list[Message]:
    if not response.events:
        return [response]
    notice = rpc.WatchResponse(header=response.header, watch_id=response.watch_id)
    notice.header.revision = response.events[-1].kv.mod_revision + off
    return [response, notice]


def refused(response: Message) -> list[Message]:
    """Refuse the watch as etcd refuses one without the right to it."""
    denied = rpc.WatchResponse(
        header=response.header,
        watch_id=-1,
        created=True,
        canceled=True,
        cancel_reason="etcdserver: permission denied",
    )
    return [denied] if response.created else []


def in_fragments(response: Message) -> list[Message]:
    """Cut what comes at once into pieces of one event."""
    parts = []
    for number, event in enumerate(response.events, 1):
        part = rpc.WatchResponse(header=response.header, watch_id=response.watch_id)
        part.events.append(event)
        part.fragment = number < len(response.events)
        parts.append(part)
    return parts or [response]


def nothing(response: Message) -> list[Message]:
    """Say nothing at all: a watch that is open and dead."""
    return []
