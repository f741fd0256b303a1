"""What /proc says of who opened a file, and of this process's memory.

Knows: the descriptors and mounts of a process (proc(5)), how Python says that there is no memory,
and where the limits are. Does not know: why anybody asks, pyfuse3.

Nothing here touches what a descriptor leads to: it may be a file of our own mount, whose daemon
would wait for itself.

Only a limit of the process itself is heard of as an error (`ulimit -v`, RLIMIT_AS). What exceeds
that of a container is killed by the kernel, without a word; whoever waits for the process, and the
next mount, can tell that it was killed, and the kernel's log says why.

Concurrency: plain reads of /proc, on the trio thread.
"""

import errno
import os
import resource
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final, Protocol, Self, final

MAX_FDS: Final = 256
"""Descriptors of a process that are looked at when it closes a file it has not written to."""


@final
class Openers:
    """Who opened what, by handle.

    Attributes:
        device: The mount's own device, `MAJOR:MINOR` as mountinfo has it; None while it is not
            known. An inode number is only one of a file system's, and every mount of it has
            the same device, whatever name space it is in.
    """

    def __init__(self) -> None:
        self.device: str | None = None
        self._opened: dict[int, tuple[int, int]] = {}

    def note(self, handle: int, flags: int, pid: int, inode: int) -> None:
        """Note who opened what, if it was for writing."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self._opened[handle] = (pid, inode)

    def forget(self, handle: int) -> None:
        """Note that a file is closed for good."""
        self._opened.pop(handle, None)

    def has_still(self, handle: int) -> bool:
        """Say whether the opener has a descriptor for writing of the file; False if it is hidden.

        The one that is being closed is no longer in its table.
        """
        opened = self._opened.get(handle)
        return (
            opened is not None and self.device is not None and has_open(*opened, device=self.device)
        )


def has_open(pid: int, inode: int, *, device: str) -> bool:
    """Say whether a process has a descriptor for writing of an inode of a device."""
    process = Path("/proc", str(pid))
    try:
        with os.scandir(process / "fdinfo") as entries:
            mounts = [_written_through(inode, entry.path) for entry in islice(entries, MAX_FDS)]
        wanted = {mount for mount in mounts if mount is not None}
        return bool(wanted) and not wanted.isdisjoint(_mounts_of(process, device))
    except OSError:  # it has ended, or is another user's, or in another name space of processes
        return False


def _written_through(inode: int, fdinfo: str) -> bytes | None:
    """Return the number of the mount through which an inode of that number is written to."""
    with suppress(OSError), Path(fdinfo).open("rb") as file:
        fields = dict(line.split(b":", 1) for line in file if b":" in line)
        writes = int(fields[b"flags"], 8) & os.O_ACCMODE != os.O_RDONLY
        if writes and int(fields.get(b"ino", b"0")) == inode:
            return fields[b"mnt_id"].strip()
    return None


def _mounts_of(process: Path, device: str) -> set[bytes]:
    """Return the numbers of a device's mounts, as a process sees them."""
    lines = (line.split(b" ", 3) for line in (process / "mountinfo").read_bytes().splitlines())
    return {line[0] for line in lines if line[2] == device.encode()}


class Opening(Protocol):
    """One open descriptor of a file, or that the kernel has none; closed by its context."""

    @property
    def is_there(self) -> bool:
        """Whether the kernel has the file."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def is_alone(self) -> bool:
        """Say whether nobody else has the file open."""
        ...


class Opens(Protocol):
    """See `Openings`."""

    def open(self, inode: int) -> Opening:
        """Open a file, in a thread, to find out who else has; `OSError` if that cannot be."""
        ...


_STATM: Final = Path("/proc/self/statm")
_MIB: Final = 1024 * 1024


def is_shortage(error: BaseException) -> bool:
    """Tell whether an error comes from memory that could not be had."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_shortage, error.exceptions))
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # A thread needs memory for its stack; Python has no class for that.
    return isinstance(error, MemoryError) or "can't start new thread" in str(error)


def describe_shortage() -> str:
    """Return what a person needs to know about it."""
    used = int(_STATM.read_text().split()[0]) * resource.getpagesize() // _MIB
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return f"no memory is left; this process has {used} MiB of address space"
    return (
        f"no memory is left; this process has {used} MiB of address space, "
        f"and may have {limit // _MIB} (ulimit -v)"
    )


# --- who watches through inotify ------------------------------------------------------------

_INOTIFY: Final = "anon_inode:inotify"
_FIRST_NAMESPACE: Final = "pid:[4026531836]"  # PROC_PID_INIT_INO, include/linux/proc_ns.h


def sees_all_watches(*, allow_other: bool) -> bool:
    """Say whether all who can watch a mount of ours can be seen.

    A container does not see the processes outside it, and a user not those of others.
    """
    is_first = Path("/proc/self/ns/pid").readlink() == Path(_FIRST_NAMESPACE)
    return is_first and (os.geteuid() == 0 or not allow_other)


@final
class Watches:
    """The watches on one file system."""

    def __init__(self, device: int) -> None:
        """Look at the file system of this number (st_dev)."""
        # As Linux has it inside (include/linux/kdev_t.h).
        self._device = b"%x" % (os.major(device) << 20 | os.minor(device))

    def find(self) -> tuple[frozenset[int], float]:
        """Return the inode numbers that somebody watches, and the processor time this took (s)."""
        begun = time.thread_time()
        found = frozenset(n for info in _instances() for n in _watched(info, self._device))
        return found, time.thread_time() - begun


def _instances() -> Iterator[str]:
    """Yield the fdinfo of all inotify instances."""
    with os.scandir("/proc") as processes:
        for process in processes:
            if process.name.isdigit():
                with suppress(OSError):  # it has ended, or is another user's
                    yield from _instances_of(process.path)


def _instances_of(process: str) -> Iterator[str]:
    with os.scandir(f"{process}/fd") as descriptors:
        for descriptor in descriptors:
            with suppress(OSError):
                if os.readlink(descriptor.path) == _INOTIFY:  # noqa: PTH115 -- there are many
                    yield f"{process}/fdinfo/{descriptor.name}"


def _watched(info: str, device: bytes) -> Iterator[int]:
    with suppress(OSError), open(info, "rb") as lines:  # noqa: PTH123 -- there are many
        for line in lines:
            if line.startswith(b"inotify "):
                fields = dict(part.split(b":", 1) for part in line.split()[1:])
                if fields[b"sdev"] == device:
                    yield int(fields[b"ino"], 16)
