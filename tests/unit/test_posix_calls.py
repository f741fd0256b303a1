"""Children of the POSIX suite: what becomes of the function, and of what the parent has left."""

import gc
import os
import signal

from tests.mount.posix import calls


class Left:
    """Garbage that only a collection finds."""

    def __init__(self, collected: list[int]) -> None:
        self._myself = self
        self._collected = collected

    def __del__(self) -> None:
        self._collected.append(os.getpid())


def test_a_child_does_not_collect_its_parents_garbage() -> None:
    collected: list[int] = []

    def work() -> list[int]:
        containers = [[i] for i in range(1_000_000)]  # more than any threshold
        assert containers
        return [pid for pid in collected if pid == os.getpid()]

    gc.disable()
    Left(collected)
    gc.enable()
    assert calls.in_child(work) == []
    assert gc.isenabled()
    gc.collect()
    assert collected == [os.getpid()]


def test_a_child_that_dies_is_told_by_its_signal() -> None:
    assert calls.in_child(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM
