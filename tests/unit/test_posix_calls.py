"""Children of the POSIX suite: each runs its function once, whatever becomes of the fork."""

import os
import signal

import pytest

from tests.mount.posix import calls


def test_a_child_that_does_not_come_to_life_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, children = os.fork, []

    def stuck_at_first() -> int:
        children.append(fork())
        if children == [0]:
            signal.pause()
        return children[-1]

    monkeypatch.setattr(calls, "PATIENCE_S", 0.2)
    monkeypatch.setattr(os, "fork", stuck_at_first)
    assert calls.in_child(os.getpid) == children[1]
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


def test_a_child_that_dies_is_not_replaced() -> None:
    assert calls.in_child(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM
