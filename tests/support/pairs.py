"""Two system calls at the same moment, and what a real file system makes of them.

Knows: the calls, the state that they start from, and how to make them on a path. On tmpfs, one
after the other in both orders, they say what is right anywhere.

Concurrency: plain blocking calls.
"""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Final, Literal, final

from tests.mount.lab import memory_directory

Kind = Literal["new", "whole", "append", "part"]
KINDS: Final[tuple[Kind, ...]] = ("new", "whole", "append", "part")
"""How `d/f` is open and written to, unpublished: made, emptied, appended to, overwritten in part.
`d/g` is emptied."""

FLAGS: Final = {
    "new": os.O_WRONLY | os.O_CREAT,
    "whole": os.O_WRONLY | os.O_TRUNC,
    "append": os.O_WRONLY | os.O_APPEND,
    "part": os.O_RDWR,
}

CALLS: Final = (
    "close f",
    "fsync f",
    "close g",
    "rename f g",
    "rename g f",
    "rename f h",
    "rename t f",
    "exchange f g",
    "exchange t f",
    "unlink f",
    "unlink g",
    "move d e",
    "truncate f",
    "chmod f",
    "utime f",
    "ttl f",
)
"""A call, and names in `d`; `move` renames `d` itself. `t` is a file that nobody has open."""

BASE: Final = {"f": b"base of f", "g": b"base of g", "t": b"base of t"}
WRITTEN: Final = {"f": b"written to f", "g": b"written to g"}
MODE: Final = 0o600
TIME_NS: Final = 10**18
TTL: Final = b"1000"
TRUNCATED: Final = 4

_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100
_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Found:
    """A file, as it is found in the end.

    Attributes:
        path: Where.
        content: What is in it.
        mode: Its permission bits.
        is_dated: Whether its time is the one that was set.
        is_leased: Whether it is the file that was given a lease.
    """

    path: str
    content: bytes
    mode: int
    is_dated: bool
    is_leased: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What two calls returned, and what they left."""

    errnos: tuple[int, ...]
    files: tuple[Found, ...]


def pairs() -> Iterator[tuple[Kind, str, str]]:
    """Yield all pairs of calls, with each kind of writing."""
    for kind in KINDS:
        for first, second in combinations(CALLS, 2):
            # What is not in etcd yet has no lease; see docs/semantics.md.
            if not (kind == "new" and "ttl f" in (first, second)):
                yield kind, first, second


@final
class World:
    """The state that two calls start from, in a directory of a real file system."""

    def __init__(self, root: Path, kind: Kind, *, has_leases: bool) -> None:
        """Make it; without leases, a file that is given one is known by its inode."""
        self._root = root
        self._has_leases = has_leases
        self._leased: set[int] = set()
        self._path = root / "d"
        self._path.mkdir()
        for name, value in BASE.items():
            if name != "f" or kind != "new":
                (self._path / name).write_bytes(value)
        self._fds = {"f": self._open("f", FLAGS[kind]), "g": self._open("g", FLAGS["whole"])}

    def _open(self, name: str, flags: int) -> int:
        fd = os.open(self._path / name, flags, 0o644)
        os.write(fd, WRITTEN[name])
        return fd

    def call(self, call: str) -> int:
        """Make a call; return its errno."""
        name, *paths = call.split()
        try:
            self._call(name, paths[0], *(self._path / path for path in paths))
        except OSError as exc:
            return exc.errno or -1
        return 0

    def _call(self, name: str, which: str, path: Path, to: Path | None = None) -> None:
        match name:
            case "close":
                os.close(self._fds.pop(which))
            case "fsync":
                os.fsync(self._fd(which))
            case "rename" if to is not None:
                path.rename(to)
            case "exchange" if to is not None:
                _exchange(path, to)
            case "unlink":
                path.unlink()
            case "move":
                self._path.rename(self._root / "e")
            case _:
                self._change(name, path)

    def _change(self, name: str, path: Path) -> None:
        match name:
            case "truncate":
                os.truncate(path, TRUNCATED)
            case "chmod":
                path.chmod(MODE)
            case "utime":
                os.utime(path, ns=(TIME_NS, TIME_NS))
            case "ttl" if self._has_leases:
                os.setxattr(path, "user.etcd.ttl", TTL)
            case "ttl":
                self._leased.add(path.stat().st_ino)
            case _:
                raise AssertionError(name)

    def _fd(self, which: str) -> int:
        if which not in self._fds:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._fds[which]

    def finish(self) -> tuple[int, ...]:
        """Close what is still open; return the errnos."""
        return tuple(self.call(f"close {name}") for name in sorted(self._fds))

    def files(self) -> tuple[Found, ...]:
        """Return what is there."""
        return tuple(self._found(path) for path in sorted(self._root.glob("*/*")) if path.is_file())

    def _found(self, path: Path) -> Found:
        status = path.stat()
        is_leased = status.st_ino in self._leased
        if self._has_leases:
            with suppress(OSError):
                is_leased = bool(os.getxattr(path, "user.etcd.lease"))
        return Found(
            str(path.relative_to(self._root)),
            path.read_bytes(),
            status.st_mode & 0o7777,
            status.st_mtime_ns == TIME_NS,
            is_leased,
        )


@cache
def possible(kind: Kind, first: str, second: str) -> frozenset[Outcome]:
    """Return what tmpfs makes of two calls in either order; errnos in the order of the calls."""
    found = {_outcome(kind, (first, second)), _outcome(kind, (second, first), swapped=True)}
    other = second if first == "ttl f" else first
    if "ttl f" in (first, second) and other in ("rename g f", "rename t f"):
        # It had found its file before that was replaced: what has no key can have no lease.
        found.add(_outcome(kind, (other, "ttl gone"), swapped=first == "ttl f"))
    return frozenset(found)


def _outcome(kind: Kind, calls: tuple[str, str], *, swapped: bool = False) -> Outcome:
    with memory_directory() as root:
        world = World(root, kind, has_leases=False)
        errnos = tuple(world.call(call) for call in calls)
        return Outcome((*errnos[:: -1 if swapped else 1], *world.finish()), world.files())


def _exchange(old: Path, new: Path) -> None:
    names = (os.fsencode(old), os.fsencode(new))
    if _libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
