"""gRPC's synchronous calls, as trio's tasks wait for them.

Knows: on which threads gRPC says what happened. Does not know: etcd. It is part of the etcd door.

gRPC's asyncio interface would need a foreign event loop beside trio's. The synchronous one needs
none: a unary call is a future with a callback, and only the messages of a stream are waited for
in a thread.

Concurrency: gRPC runs one thread for each channel, while calls are under way on it, and runs the
callbacks there. Here they do no more than hand over to the trio thread: they must not block, and
what they raised would be lost. All methods belong to the trio thread.
"""

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, final

import grpc
import trio
from outcome import Error, Outcome

T = TypeVar("T")

Channel = Any
"""A grpc.Channel: it has no types."""

Message = Any
"""A protobuf message: the generated ones have no types."""

Method = Any
"""A method of a generated stub: a grpc.UnaryUnaryMultiCallable, which has no types."""

StreamMethod = Any
"""The same for a grpc.StreamStreamMultiCallable."""

Metadata = tuple[tuple[str, str], ...]


@final
class NoThreadError(grpc.RpcError):  # type: ignore[misc] # grpc has no types
    """No thread could be started, as gRPC's own failures are told.

    Nobody hears of what a call comes to that began so, nor of any later one on its channel, not
    even that their time is over.
    """

    def code(self) -> grpc.StatusCode:
        """Return the code of a broken connection."""
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        """Say what is the matter."""
        return "no thread can be started"


async def call(method: Method, request: Message, timeout_s: float, metadata: Metadata) -> Message:
    """Call a unary method and wait for the answer.

    It is cancelled when the caller is: then the request may have been carried out. Nothing is
    sent for a caller who is cancelled already.

    Raises:
        grpc.RpcError: It failed.
        NoThreadError: The channel is of no use any more.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    task = trio.lowlevel.current_task()
    try:
        future = method.future(request, timeout=timeout_s, metadata=metadata)
    except RuntimeError as exc:
        raise NoThreadError from exc
    is_awaited = True

    def resume() -> None:
        if is_awaited:
            trio.lowlevel.reschedule(task)

    def abort(_raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
        nonlocal is_awaited
        is_awaited = False
        future.cancel()
        return trio.lowlevel.Abort.SUCCEEDED

    to_trio = _to_trio()
    future.add_done_callback(lambda _future: to_trio(resume))
    await trio.lowlevel.wait_task_rescheduled(abort)
    return future.result()


def keep_for_ever(channel: Channel) -> None:
    """Keep what a NoThreadError came of: to close or delete it would never end.

    Both wait for the thread that could not be started, and at the end of the program too.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(channel))


@final
class InThread(Generic[T]):
    """What runs in a thread, and cannot be cancelled; waiters may come and go."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._done = trio.Event()
        self._outcome: Outcome[T]
        to_trio = _to_trio()
        try:
            trio.lowlevel.start_thread_soon(
                function, lambda outcome: to_trio(self._on_done, outcome)
            )
        except RuntimeError:
            self._on_done(Error(NoThreadError()))

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._done.is_set()

    async def wait(self) -> None:
        """Wait for its end."""
        await self._done.wait()

    def result(self) -> T:
        """Return what it returned, or raise what it raised; once, after its end."""
        return self._outcome.unwrap()

    def _on_done(self, outcome: Outcome[T]) -> None:
        self._outcome = outcome
        self._done.set()


@final
class Stream:
    """A bidirectional call. Owned by whoever made it, who must close it.

    A message is read from gRPC when somebody waits for one, never ahead: its flow control then
    holds the server back.

    Raises:
        NoThreadError: The channel is of no use any more.
    """

    def __init__(self, method: StreamMethod, metadata: Metadata) -> None:
        self._to_trio = _to_trio()
        self._requests: SimpleQueue[Message | None] = SimpleQueue()
        self._unsent: deque[trio.Event] = deque()
        self._reading: InThread[Message | None] | None = None
        self.cancelled = False
        try:
            self._call = method(self._outgoing(), metadata=metadata)
        except RuntimeError as exc:
            raise NoThreadError from exc
        self._call.add_done_callback(lambda _call: self._to_trio(self._on_end))

    @property
    def ended(self) -> bool:
        """Whether either side has ended it."""
        return not self._call.is_active()

    def write(self, request: Message) -> trio.Event:
        """Send a message after those before it.

        Returns:
            An event that is set when it has been sent, or the stream has ended.
        """
        sent = trio.Event()
        self._unsent.append(sent)
        self._requests.put(request)
        if self.ended:
            self._on_end()
        return sent

    async def read(self) -> Message | None:
        """Wait for the next message; None is the end. Nothing is lost when that is cancelled.

        Raises:
            grpc.RpcError: The stream failed, or was cancelled on this side.
        """
        if self._reading is None:
            self._reading = InThread(partial(next, self._call, None))
        await self._reading.wait()
        read, self._reading = self._reading, None
        return read.result()

    def cancel(self) -> None:
        """End the stream at once; whoever reads is told."""
        self.cancelled = True
        self._call.cancel()
        self._requests.put(None)

    async def close(self) -> None:
        """End the stream and wait for the reading thread. Only local work, so bounded."""
        self.cancel()
        if self._reading is not None:
            with trio.CancelScope(shield=True):
                await self._reading.wait()

    def _outgoing(self) -> Iterator[Message]:
        """Yield what is to be sent (in a thread of gRPC's)."""
        while (request := self._requests.get()) is not None:
            yield request
            self._to_trio(self._on_sent)  # gRPC comes for the next one when this one is sent

    def _on_sent(self) -> None:
        if self._unsent:
            self._unsent.popleft().set()

    def _on_end(self) -> None:
        while self._unsent:
            self._unsent.popleft().set()


def _to_trio() -> Callable[..., None]:
    """Return what has a function called on the trio thread, soon; to be used on other threads."""
    run_sync_soon = trio.lowlevel.current_trio_token().run_sync_soon

    def to_trio(function: Callable[..., None], *arguments: object) -> None:
        with suppress(trio.RunFinishedError):  # nobody waits any more
            run_sync_soon(function, *arguments)

    return to_trio
