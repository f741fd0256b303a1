"""A few numbers that all processes of a run share.

Knows: how they lie in memory. Every number has one writer, so none needs a lock (an aligned number
of 8 bytes is stored and loaded in one piece).

Concurrency: any process; `Control` is a view of one mapped file.
"""

import mmap
import threading
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Final, final

WORKERS_MAX: Final = 32
_STEP_S: Final = 0.005


class Flag(IntEnum):
    """What the conductor tells everybody."""

    STOP = 0
    HOLD_WRITERS = 1
    HOLD_READERS = 2
    FLOOR = 3  # a revision that the mount under test has said it shows
    RECORDED = 4  # the recorder knows every event up to here


class Mark(IntEnum):
    """What each worker tells everybody."""

    HELD = 0
    ACKNOWLEDGED = 1  # the newest revision etcd has acknowledged to it
    DONE = 2
    FAILED = 3


class StuckError(Exception):
    """Somebody did not do in time what was asked."""


@final
class Control:
    """The shared numbers."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        size = 8 * (len(Flag) + WORKERS_MAX * len(Mark))
        if create:
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self._numbers = memoryview(self._map).cast("q")

    def close(self) -> None:
        self._numbers.release()
        self._map.close()

    def flag(self, flag: Flag) -> int:
        return self._numbers[flag]

    def set_flag(self, flag: Flag, value: int) -> None:
        self._numbers[flag] = value

    def mark(self, worker: int, mark: Mark) -> int:
        return self._numbers[len(Flag) + worker * len(Mark) + mark]

    def set_mark(self, worker: int, mark: Mark, value: int) -> None:
        self._numbers[len(Flag) + worker * len(Mark) + mark] = value

    def acknowledged(self) -> int:
        """Return the newest revision that any writer has been told."""
        return max(self.mark(worker, Mark.ACKNOWLEDGED) for worker in range(WORKERS_MAX))

    @property
    def stopping(self) -> bool:
        return bool(self._numbers[Flag.STOP])


def nap(seconds: float) -> None:
    """Do nothing for a while: the pace of a load, never a wait for something."""
    threading.Event().wait(seconds)


def until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Return once a condition holds that another process brings about.

    Raises:
        StuckError: It did not in time.
    """
    for _ in range(int(seconds / _STEP_S) + 1):
        if condition():
            return
        nap(_STEP_S)
    raise StuckError(f"not within {seconds:.0f} s: {what}")
