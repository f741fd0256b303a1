"""A directory in a mount and one on tmpfs, to which the same is done.

Knows: how to make one system call on both and compare what came of it, and how to compare all that
both show. Does not know: etcd.

Concurrency: plain blocking calls, one owner.
"""

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn, final

OLD_NS: Final = 1_262_304_000 * 10**9
"""2010: a time before it was set by utimensat(2), a later one is that of a change."""

ALL: Final = 1 << 20
"""More than any file here has."""


@final
@dataclass(frozen=True)
class StoredRecord:
    """One of the two."""

    root: bytes
    at: int
    """Which: also the place of its descriptors in `Slot.fds`."""

    def path(self, path: bytes) -> bytes:
        return os.path.join(self.root, path) if path else self.root


@final
@dataclass(eq=False)
class Slot:
    """A file that is open in both.

    Attributes:
        fds: The descriptors, in the mount and on tmpfs.
        inode: Its number on tmpfs.
        flags: What it was opened with.
        is_overtaken: Whether another client has put its key since, so that it is an old version:
            only read, as what becomes of a write is no matter of POSIX (B15).
    """

    fds: tuple[int, int]
    inode: int
    flags: int
    is_overtaken: bool = False

    @property
    def is_readable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def is_writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


@final
@dataclass
class Twins:
    """Both directories, and what is open in them.

    Attributes:
        mount: The one that is looked at.
        twin: The one on tmpfs, which is right.
        slots: The open files.
        untimed: Files and directories (their inodes on tmpfs) whose mtime says nothing.
        hears_late: Whether the mount hears of what others made or removed in a directory only
            when it lists that: until then the directory may have the time that was set.
        has_differed: Whether a difference was found already.
    """

    mount: StoredRecord
    twin: StoredRecord
    slots: list[Slot] = field(default_factory=list)
    untimed: set[int] = field(default_factory=set)
    hears_late: bool = False
    has_differed: bool = False

    @classmethod
    def of(cls, mount: Path, twin: Path) -> "Twins":
        return cls(StoredRecord(os.fsencode(mount), 0), StoredRecord(os.fsencode(twin), 1))

    # --- one call -------------------------------------------------------------------------------

    def same(self, what: object, call: Callable[[StoredRecord], Any]) -> tuple[Any, Any] | None:
        """Make a call on both, with the same outcome; return both results, None if both failed.

        A result that is a descriptor is not compared.
        """
        there, here = outcome(call, self.mount), outcome(call, self.twin)
        are_descriptors = isinstance(there[1], Descriptor) and isinstance(here[1], Descriptor)
        if there[0] != here[0] or (there[1] != here[1] and not are_descriptors):
            for result in (there[1], here[1]):
                if isinstance(result, Descriptor):
                    os.close(result.fd)
            self.differ(f"{what}: {there} in the mount, {here} on tmpfs")
        return None if here[0] else (there[1], here[1])

    def refuses(self, what: object, call: Callable[[StoredRecord], Any], name: str) -> None:
        """Make a call in the mount alone, which must fail so."""
        found = outcome(call, self.mount)
        if found[0] != name:
            self.differ(f"{what}: {found} instead of {name}")

    def differ(self, message: str) -> NoReturn:
        self.has_differed = True
        raise AssertionError(message)

    # --- all there is to see --------------------------------------------------------------------

    def paths(self) -> list[bytes]:
        """Return every path on tmpfs, in order."""
        return list(walk(self.twin))

    def look(self) -> None:
        """Compare both trees, and what is open."""
        there, here = dict(self._seen(self.mount)), dict(self._seen(self.twin))
        if there.keys() != here.keys():
            more, less = sorted(there.keys() - here.keys()), sorted(here.keys() - there.keys())
            self.differ(f"the mount shows {more} and lacks {less}")
        for path, facts in here.items():
            found = there[path]
            is_timed = self._is_timed(path)
            for name, value in facts.items():
                if found[name] != value and not (name == "mtime" and not is_timed):
                    self.differ(f"{name} of {path!r}: {found[name]!r} instead of {value!r}")
        for slot in self.slots:
            self.look_at(slot)

    def _is_timed(self, path: bytes) -> bool:
        found = os.lstat(self.twin.path(path))
        is_late = self.hears_late and stat.S_ISDIR(found.st_mode) and found.st_mtime_ns >= OLD_NS
        return found.st_ino not in self.untimed and not is_late

    def look_at(self, slot: Slot) -> None:
        """Compare what is open."""
        if slot.is_readable:
            self.same(("pread", slot), lambda s: os.pread(slot.fds[s.at], ALL, 0))
        if not slot.is_overtaken:
            self.same(("fstat", slot), lambda s: _of_open(slot.fds[s.at]))

    @staticmethod
    def _seen(side: StoredRecord) -> Iterator[tuple[bytes, dict[str, object]]]:
        for path in (b"", *walk(side)):
            yield path, key_state_at(side.path(path))

    def close(self) -> None:
        """Close what a failure has left open."""
        while self.slots:
            for fd in self.slots.pop().fds:
                with contextlib.suppress(OSError):
                    os.close(fd)


@final
@dataclass(frozen=True)
class Descriptor:
    """A result that is a number of no meaning."""

    fd: int


def outcome(call: Callable[[StoredRecord], Any], side: StoredRecord) -> tuple[str | None, Any]:
    """Return the name of the errno, and the result."""
    try:
        return None, call(side)
    except OSError as exc:
        return errno.errorcode[exc.errno or 0], None


def walk(side: StoredRecord) -> Iterator[bytes]:
    """Iterate over the paths of a tree, each directory's in order."""
    pending = [b""]
    while pending:
        above = pending.pop()
        names = sorted(os.listdir(side.path(above)))
        for name in names:
            path = os.path.join(above, name)
            yield path
            if stat.S_ISDIR(os.lstat(side.path(path)).st_mode):
                pending.append(path)


def key_state_at(path: bytes) -> dict[str, object]:
    """Return what is to be seen at a path."""
    found = os.lstat(path)
    facts: dict[str, object] = {
        "mode": oct(found.st_mode),
        "nlink": found.st_nlink,
        "owner": (found.st_uid, found.st_gid),
        "mtime": _if_set(found.st_mtime_ns),
    }
    if stat.S_ISREG(found.st_mode):
        facts["size"] = found.st_size
        with open(path, "rb", buffering=0) as file:
            facts["content"] = file.read()
    elif stat.S_ISLNK(found.st_mode):
        facts["size"] = found.st_size
        facts["target"] = os.readlink(path)
    if not stat.S_ISLNK(found.st_mode) and not stat.S_ISFIFO(found.st_mode):
        facts["xattrs"] = xattrs_at(path)
    return facts


def xattrs_at(path: bytes) -> dict[str, bytes]:
    """Return the extended attributes at a path that programs can set."""
    names = [name for name in os.listxattr(path) if name.startswith("user.")]
    return {name: os.getxattr(path, name) for name in sorted(names)}


def _of_open(fd: int) -> tuple[object, ...]:
    found = os.fstat(fd)
    size = None if stat.S_ISDIR(found.st_mode) else found.st_size
    return oct(found.st_mode), found.st_nlink, found.st_uid, found.st_gid, size


def _if_set(time_ns: int) -> int | None:
    return time_ns if time_ns < OLD_NS else None


_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_MS_NOSUID_NODEV_REMOUNT: Final = 2 | 4 | 32


def drop_caches(mountpoint: Path) -> None:
    """Have the kernel forget what nobody uses in one mount, as a remount does; root's to do."""
    path = os.fsencode(mountpoint)
    if _LIBC.mount(None, path, None, _MS_NOSUID_NODEV_REMOUNT, None):
        raise OSError(ctypes.get_errno(), "mount(2)")
