"""System calls that Python lacks, and calls made by other processes and users.

Knows: how to call libc, and how to run a function in a child process.

Concurrency: plain blocking calls. A child is a fork that does nothing but its function; it must
not touch what the parent's threads own.
"""

import ctypes
import errno
import gc
import os
import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Not os._exit: coverage makes that save its data first, and a child has none of its own.
from posix import _exit
from typing import Any, Final

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
AT_FDCWD: Final = -100

NOBODY: Final = 65534

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
_LIBC.opendir.restype = ctypes.c_void_p
_LIBC.readdir.restype = ctypes.c_void_p
_LIBC.telldir.restype = ctypes.c_long
for _function in (_LIBC.readdir, _LIBC.telldir, _LIBC.rewinddir, _LIBC.closedir):
    _function.argtypes = (ctypes.c_void_p,)
_LIBC.seekdir.argtypes = (ctypes.c_void_p, ctypes.c_long)
_NAME_OFFSET: Final = 19  # of d_name in struct dirent (readdir(3), 64 bits)


def _checked(result: int, *names: object) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *map(str, names))


def renameat2(old: Path, new: Path, flags: int) -> None:
    """Call renameat2(2)."""
    _checked(_LIBC.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags), old)


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """Call fallocate(2)."""
    _checked(_LIBC.fallocate(fd, mode, offset, size))


class DirectoryStream:
    """opendir(3) and its family, which know positions; os.scandir(3) hides them."""

    def __init__(self, path: Path) -> None:
        self._stream = _LIBC.opendir(os.fsencode(path))
        _checked(not self._stream, path)

    def read(self) -> str | None:
        """Return the next name, None at the end."""
        found = _LIBC.readdir(self._stream)
        return None if found is None else os.fsdecode(ctypes.string_at(found + _NAME_OFFSET))

    def rest(self) -> list[str]:
        """Return the names from here to the end."""
        return list(iter(self.read, None))

    def tell(self) -> int:
        return int(_LIBC.telldir(self._stream))

    def seek(self, position: int) -> None:
        _LIBC.seekdir(self._stream, position)

    def rewind(self) -> None:
        _LIBC.rewinddir(self._stream)

    def close(self) -> None:
        _LIBC.closedir(self._stream)


def errno_of(call: Callable[[], object]) -> str | None:
    """Return the name of the errno that a call fails with, None if it succeeds."""
    try:
        call()
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]
    return None


@contextmanager
def opened(path: Path | str, flags: int, mode: int = 0o644) -> Iterator[int]:
    """Yield a descriptor; close it whatever happens (an error of close is raised)."""
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


class Child:
    """A function that runs in a forked process; `result` waits for what it returned or raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._reader, writer = os.pipe()
        # The child must not collect the parent's garbage: what gRPC left there waits for threads
        # that only the parent has.
        with _no_collections(), warnings.catch_warnings():
            # Python 3.12 warns of threads: the child touches nothing of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
            if not self._pid:
                os.close(self._reader)
                _report(function, writer)
        os.close(writer)

    def result(self) -> Any:
        """Return what the function returned."""
        with open(self._reader, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(self._pid, 0)
        if not answer:
            return -os.WTERMSIG(status)
        value, failure = pickle.loads(answer)
        assert failure is None, f"in the child process:\n{failure}"
        return value


@contextmanager
def _no_collections() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _report(function: Callable[[], Any], writer: int) -> None:
    try:
        answer = pickle.dumps((function(), None))
    except BaseException:  # noqa: BLE001 - the parent is to hear of it, whatever it is
        answer = pickle.dumps((None, traceback.format_exc()))
    finally:
        os.write(writer, answer)
        _exit(0)


def in_child(function: Callable[[], Any]) -> Any:
    """Run a function in a child process, return what it returns; minus the signal it died of."""
    return Child(function).result()


def as_user(place: Path, function: Callable[[], Any], uid: int = NOBODY, gid: int = NOBODY) -> Any:
    """Run a function in `place` as another user, who is in no other group.

    Relative paths only: the way to `place` may be closed to them.
    """

    def run() -> Any:
        os.chdir(place)
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        return function()

    return in_child(run)
