"""The operations, as system calls on the files below a directory.

Knows: which calls make up an operation, and which files they work on. Does not know: what file
system that is, how often they are made and what is made of the figures.

Concurrency: plain blocking calls.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, final

VALUE_SIZE: Final = 200
SMALL: Final = 100
LARGE: Final = 10_000

MISSING: Final = "missing"
"""A name that is not there."""

LINK: Final = "link"
MADE: Final = "made"
"""A directory for new files."""


def value_of(number: int) -> bytes:
    """Return a value that no other number has."""
    return b"%0*d" % (VALUE_SIZE, number)


def layout(large: int) -> Iterator[tuple[str, bytes]]:
    """Return the names and values that every target has; `large` is the larger directory."""
    yield "read", value_of(0)
    yield "written", value_of(0)
    for directory, size in (("small", SMALL), ("large", large)):
        for number in range(size):
            yield f"{directory}/entry-{number:05d}", value_of(number)


def make_files(root: Path, large: int) -> None:
    """Make all that the operations need, by system calls."""
    for name, value in layout(large):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(value)
    add_what_keys_lack(root)


def add_what_keys_lack(root: Path) -> None:
    """Make the link and the directory for new files, where there are files already."""
    (root / LINK).symlink_to("read")
    (root / MADE).mkdir()


@final
class FileOperations:
    """The operations on the files below a directory. Owned by its target, which closes it."""

    def __init__(self, root: Path) -> None:
        """Open the file that pread reads."""
        self._read = os.fspath(root / "read")
        self._written = os.fspath(root / "written")
        self._small = os.fspath(root / "small")
        self._large = os.fspath(root / "large")
        self._missing = os.fspath(root / MISSING)
        self._link = os.fspath(root / LINK)
        self._made = os.fspath(root / MADE)
        self._opened = os.open(self._read, os.O_RDONLY)
        self._numbers = itertools.count(1)

    def close(self) -> None:
        os.close(self._opened)

    def call(self, operation: str) -> Callable[[], object]:
        """Return what does an operation once."""
        calls: dict[str, Callable[[], object]] = {
            "stat": lambda: os.stat(self._read),
            "open+read+close": self._open_read_close,
            "pread": lambda: os.pread(self._opened, 4096, 0),
            "listing of 100": lambda: os.listdir(self._small),
            "listing of 10 000": lambda: os.listdir(self._large),
            "missing name": lambda: _fails(os.stat, self._missing),
            "readlink": lambda: os.readlink(self._link),
            "access": lambda: os.access(self._read, os.R_OK),
            "getxattr, missing name": lambda: _fails(os.getxattr, self._missing, "user.none"),
            "getxattr, missing attribute": lambda: _fails(os.getxattr, self._read, "user.none"),
            "write+close": self._write_close,
            "create+write+close": self._create_write_close,
        }
        return calls[operation]

    def _open_read_close(self) -> None:
        # Not `open()`: it asks for the size and sets up buffers, which says nothing of a file
        # system.
        fd = os.open(self._read, os.O_RDONLY)
        os.read(fd, 4096)
        os.close(fd)

    def _write_close(self) -> None:
        fd = os.open(self._written, os.O_WRONLY | os.O_TRUNC)
        os.write(fd, value_of(next(self._numbers)))
        os.close(fd)

    def _create_write_close(self) -> None:
        number = next(self._numbers)
        fd = os.open(f"{self._made}/{number:07d}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(fd, value_of(number))
        os.close(fd)


def _fails(call: Callable[..., object], *arguments: str) -> None:
    """Make a call that cannot succeed."""
    try:
        call(*arguments)
    except OSError:
        return
    raise AssertionError("it is there")
