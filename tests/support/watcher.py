"""A program that watches files through inotify(7), as most reloaders do.

Knows: the system calls and their struct. It shares no code with etcdfs.

Concurrency: plain blocking calls, each bounded; one owner.
"""

import ctypes
import os
import select
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self, final

EVENTS: Final = {
    "MODIFY": 0x2,
    "ATTRIB": 0x4,
    "CLOSE_WRITE": 0x8,
    "OPEN": 0x20,
    "MOVED_FROM": 0x40,
    "MOVED_TO": 0x80,
    "CREATE": 0x100,
    "DELETE": 0x200,
    "DELETE_SELF": 0x400,
    "MOVE_SELF": 0x800,
    "IGNORED": 0x8000,
}
ALL: Final = sum(EVENTS.values()) & ~(EVENTS["OPEN"] | EVENTS["IGNORED"])
IS_DIR: Final = 0x40000000
PATIENCE_S: Final = 20.0

_EVENT: Final = struct.Struct("=iIII")
_BUFFER: Final = 1 << 16


@final
class Watcher:
    """Watches some paths; a context manager.

    Attributes:
        seen: All events so far, in order, each as text: `CREATE a`, `DELETE,ISDIR d`; of a watched
            file `MODIFY`.
    """

    def __init__(self, *paths: Path, mask: int = ALL) -> None:
        """Begin to watch `paths`."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._fd >= 0
        self.seen: list[str] = []
        self._reported = 0
        self._mask = mask
        for path in paths:
            self.add(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        """Return the descriptor, for select(2)."""
        return int(self._fd)

    def add(self, path: Path) -> None:
        """Watch one more."""
        watch = self._libc.inotify_add_watch(self._fd, bytes(path), self._mask)
        if watch < 0:
            failure = ctypes.get_errno()
            raise OSError(failure, os.strerror(failure), str(path))

    def until(self, *wanted: str) -> list[str]:
        """Wait until each of some events was seen since the last call; return all since then."""
        deadline = time.monotonic() + PATIENCE_S
        while not set(wanted) <= set(self.seen[self._reported :]):
            left = deadline - time.monotonic()
            assert left > 0, f"{wanted} not among {self.seen[self._reported :]}"
            self._read(left)
        return self._since()

    def now(self) -> list[str]:
        """Return what was seen since the last call, without waiting."""
        self._read(0)
        return self._since()

    def _since(self) -> list[str]:
        since = self.seen[self._reported :]
        self._reported = len(self.seen)
        return since

    def _read(self, patience_s: float) -> None:
        if not select.select([self._fd], [], [], patience_s)[0]:
            return
        data = os.read(self._fd, _BUFFER)
        while data:
            _watch, mask, _cookie, size = _EVENT.unpack_from(data)
            name = data[_EVENT.size : _EVENT.size + size].rstrip(b"\0")
            data = data[_EVENT.size + size :]
            kinds = [kind for kind, bit in EVENTS.items() if mask & bit]
            kinds += ["ISDIR"] if mask & IS_DIR else []
            self.seen.append(" ".join(filter(None, (",".join(kinds), os.fsdecode(name)))))
