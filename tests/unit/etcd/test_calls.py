"""How trio's tasks wait for gRPC's calls, with calls that end when the test says so.

What gRPC itself does is in integration/test_etcd_store.py and test_etcd_door.py.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from etcdfs.etcd.calls import InThread, NoThreadError, call


class Future:
    """A grpc.Future whose end a test decides, in a thread of its own as gRPC's would be."""

    def __init__(self) -> None:
        self.cancelled = False
        self._callbacks: list[Callable[[Future], None]] = []
        self._result: object = None

    def add_done_callback(self, callback: Callable[["Future"], None]) -> None:
        self._callbacks.append(callback)

    def cancel(self) -> None:
        self.cancelled = True

    def result(self) -> object:
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def end(self, result: object) -> None:
        self._result = result
        for callback in self._callbacks:
            thread = threading.Thread(target=callback, args=(self,))
            thread.start()
            thread.join()


class Method:
    """A unary method of a stub.

    Attributes:
        calls: What was sent, each with its deadline and metadata.
        future: The last call.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.future_ = Future()

    def future(self, request: object, *, timeout: float, metadata: object) -> Future:
        self.calls.append((request, timeout, metadata))
        self.future_ = Future()
        return self.future_


async def test_the_answer_of_another_thread() -> None:
    method = Method()
    answers: list[object] = []

    async def caller() -> None:
        answers.append(await call(method, "question", 2.0, (("a", "b"),)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller)
        await trio.testing.wait_all_tasks_blocked()
        method.future_.end("answer")
    assert answers == ["answer"]
    assert method.calls == [("question", 2.0, (("a", "b"),))]


async def test_a_failure_is_raised() -> None:
    method = Method()

    async def caller() -> None:
        with pytest.raises(ZeroDivisionError):
            await call(method, None, 1.0, ())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller)
        await trio.testing.wait_all_tasks_blocked()
        method.future_.end(ZeroDivisionError())


async def test_a_cancelled_caller_cancels_the_call_and_leaves_at_once() -> None:
    method = Method()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, method, None, 1.0, ())
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert method.future_.cancelled
    # gRPC says so in its own time; nobody must be woken for it.
    method.future_.end(None)
    await trio.testing.wait_all_tasks_blocked()


async def test_nothing_is_sent_for_a_caller_who_is_cancelled_already() -> None:
    """A write would have an unknown outcome, and need not have been sent."""
    method = Method()
    with trio.CancelScope() as scope:
        scope.cancel()
        await call(method, None, 1.0, ())
    assert scope.cancelled_caught
    assert method.calls == []


def test_what_ends_after_the_run_is_of_no_interest() -> None:
    method = Method()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, method, None, 1.0, ())
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    trio.run(main)
    callback, *_ = method.future_._callbacks
    callback(method.future_)  # does not raise: gRPC would log it


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
