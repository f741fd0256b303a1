"""How trio's tasks wait for gRPC's calls, with calls that end when the test says so.

What gRPC itself does is in integration/test_etcd_store.py and test_etcd_door.py.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import trio
import trio.testing
from grpc._cython import cygrpc

from etcdfs.etcd.calls import CallError, InThread, NoThreadError, Stream, call

OK, BUSY = grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED


@dataclass
class Done:
    """An operation that is done."""

    kind: int
    content: bytes | None = None
    status: grpc.StatusCode = OK

    def type(self) -> int:
        return self.kind

    def message(self) -> bytes | None:
        return self.content

    def code(self) -> int:
        return int(self.status.value[0])

    def details(self) -> str:
        return "no room" if self.status is BUSY else ""


@dataclass
class Event:
    batch_operations: Sequence[Done]


STATUS = cygrpc.OperationType.receive_status_on_client
MESSAGE = cygrpc.OperationType.receive_message
SENT = cygrpc.OperationType.send_message


@dataclass
class Begun:
    """A cygrpc.IntegratedCall.

    Attributes:
        cancelled: Whether it was.
        is_over: Whether gRPC takes no more operations.
        operations: What was begun on it later.
    """

    on_event: Callable[[Event], bool]
    cancelled: bool = False
    is_over: bool = False
    operations: list[int] = field(default_factory=list)
    was_last: bool = False

    def cancel(self, _code: int, _details: str) -> None:
        self.cancelled = True

    def operate(self, operations: Sequence[Any], _on_event: object) -> bool:
        if not self.is_over:
            self.operations += (operation.type() for operation in operations)
        return not self.is_over

    def tell(self, *done: Done) -> None:
        """Say that operations are done, in a thread of its own as gRPC's would be."""

        def run() -> None:
            self.was_last = self.on_event(Event(done))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    def end(self, message: bytes | None, status: grpc.StatusCode = OK) -> None:
        """Say that a unary call is over."""
        self.tell(Done(MESSAGE, message), Done(STATUS, status=status))


class Method:
    """A method of a stub.

    Attributes:
        begun: The calls.
        asked: What each was begun with: time and metadata.
    """

    def __init__(self) -> None:
        self.begun: list[Begun] = []
        self.asked: list[tuple[float | None, object]] = []
        self.encoded: list[str] = []

    def encode(self, message: str) -> bytes:
        self.encoded.append(message)
        return message.encode()

    def decode(self, message: bytes) -> str:
        return message.decode()

    def begin(
        self,
        _batches: object,
        metadata: object,
        timeout_s: float | None,
        on_event: Callable[[Event], bool],
    ) -> Begun:
        self.asked.append((timeout_s, metadata))
        self.begun.append(Begun(on_event))
        return self.begun[-1]


METADATA = (("a", "b"),)


async def outcome_of(method: Any, message: bytes | None, status: grpc.StatusCode = OK) -> object:
    """Make a call that ends so, and return what it returned or raised."""
    found: list[object] = []

    async def caller() -> None:
        try:
            found.append(await call(method, "question", 2.0, METADATA))
        except grpc.RpcError as exc:
            found.append(exc)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller)
        await trio.testing.wait_all_tasks_blocked()
        method.begun[-1].end(message, status)
    return found[0]


async def test_the_answer_of_another_thread() -> None:
    method = Method()
    assert await outcome_of(method, b"answer") == "answer"
    assert method.asked == [(2.0, METADATA)]
    assert method.encoded == ["question"]
    assert method.begun[0].was_last


async def test_a_failure_is_raised() -> None:
    found = await outcome_of(Method(), None, BUSY)
    assert isinstance(found, CallError)
    assert (found.code(), found.details()) == (BUSY, "no room")


@pytest.mark.parametrize("message", [None, b"\xff"])
async def test_an_answer_that_cannot_be_read_is_a_failure(message: bytes | None) -> None:
    found = await outcome_of(Method(), message)
    assert isinstance(found, CallError)
    assert found.code() is grpc.StatusCode.INTERNAL


async def test_a_cancelled_caller_cancels_the_call_and_leaves_at_once() -> None:
    method: Any = Method()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, method, "", 1.0, ())
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert method.begun[0].cancelled
    # gRPC says so in its own time; nobody must be woken for it.
    method.begun[0].end(None)
    await trio.testing.wait_all_tasks_blocked()


async def test_nothing_is_sent_for_a_caller_who_is_cancelled_already() -> None:
    """A write would have an unknown outcome, and need not have been sent."""
    method: Any = Method()
    with trio.CancelScope() as scope:
        scope.cancel()
        await call(method, "", 1.0, ())
    assert scope.cancelled_caught
    assert method.begun == []


def test_what_ends_after_the_run_is_of_no_interest() -> None:
    method: Any = Method()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, method, "", 1.0, ())
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    trio.run(main)
    method.begun[0].end(None)
    assert method.begun[0].was_last  # it did not raise: the channel's thread would end by that


# --- streams --------------------------------------------------------------------------------


@pytest.fixture
async def stream() -> tuple[Stream, Begun]:
    method: Any = Method()
    made = Stream(method, ())
    return made, method.begun[0]


async def read(stream: Stream, begun: Begun, *done: Done) -> object:
    """Read while these operations are done, and return what is read."""
    found: list[object] = []

    async def reader() -> None:
        try:
            found.append(await stream.read())
        except grpc.RpcError as exc:
            found.append(exc)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        for each in done:
            await trio.testing.wait_all_tasks_blocked()
            begun.tell(each)
    return found[0]


async def test_a_message_is_asked_for_when_somebody_waits(stream: tuple[Stream, Begun]) -> None:
    made, begun = stream
    assert begun.operations == []
    assert await read(made, begun, Done(MESSAGE, b"one")) == "one"
    assert begun.operations == [MESSAGE]


async def test_what_a_cancelled_reader_waited_for_is_not_lost(
    stream: tuple[Stream, Begun],
) -> None:
    made, begun = stream
    with trio.move_on_after(0):
        await made.read()
    begun.tell(Done(MESSAGE, b"one"))
    assert await read(made, begun) == "one"
    assert begun.operations == [MESSAGE]


async def test_the_end_of_a_stream(stream: tuple[Stream, Begun]) -> None:
    made, begun = stream
    assert await read(made, begun, Done(MESSAGE), Done(STATUS)) is None
    begun.is_over = True
    assert await read(made, begun) is None
    assert made.ended


async def test_a_stream_that_fails_gives_what_came_before(stream: tuple[Stream, Begun]) -> None:
    made, begun = stream
    failed = Done(STATUS, status=BUSY)
    assert await read(made, begun, failed, Done(MESSAGE, b"one")) == "one"
    begun.is_over = True
    found = await read(made, begun)
    assert isinstance(found, CallError)
    assert found.code() is BUSY


async def test_messages_are_sent_one_after_the_other(stream: tuple[Stream, Begun]) -> None:
    made, begun = stream
    first, second = made.write("1"), made.write("2")
    assert begun.operations == [SENT]
    begun.tell(Done(SENT))
    await first.wait()
    assert not second.is_set()
    assert begun.operations == [SENT, SENT]
    begun.tell(Done(STATUS, status=BUSY))
    await second.wait()  # of no use any more
    assert made.write("3").is_set()
    assert begun.operations == [SENT, SENT]


async def test_the_last_event_is_known_as_such(stream: tuple[Stream, Begun]) -> None:
    """The thread of a channel is kept for as long as operations are under way."""
    made, begun = stream
    made.write("1")
    begun.tell(Done(cygrpc.OperationType.receive_initial_metadata))
    assert not begun.was_last
    begun.tell(Done(STATUS))
    assert not begun.was_last
    begun.is_over = True
    made.write("2")
    begun.tell(Done(SENT))
    assert begun.was_last


async def test_a_closed_stream_has_been_cancelled(stream: tuple[Stream, Begun]) -> None:
    made, begun = stream
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.close)
        await trio.testing.wait_all_tasks_blocked()
        assert begun.cancelled
        begun.tell(Done(STATUS, status=grpc.StatusCode.CANCELLED))
    assert made.ended


# --- threads --------------------------------------------------------------------------------


async def test_a_thread_whose_waiters_come_and_go() -> None:
    release = threading.Event()

    def work() -> str:
        release.wait()
        return "done"

    thread = InThread(work)
    with trio.move_on_after(0) as scope:
        await thread.wait()
    assert scope.cancelled_caught
    release.set()
    await thread.wait()
    assert thread.done
    assert thread.result() == "done"


async def test_a_thread_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.lowlevel, "start_thread_soon", refuse)
    thread = InThread(lambda: None)
    assert thread.done
    with pytest.raises(NoThreadError):
        thread.result()


async def test_what_a_thread_raised_is_raised() -> None:
    def work() -> None:
        raise ZeroDivisionError

    thread = InThread(work)
    await thread.wait()
    with pytest.raises(ZeroDivisionError):
        thread.result()
