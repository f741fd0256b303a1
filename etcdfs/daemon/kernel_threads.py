"""The threads that make calls on the mount itself: how they begin, by which way, until when.

They invalidate what the kernel has cached (`etcdfs.fuse.notify`), and replay changes for those who
watch through inotify.

Knows: when a mount can have events, and why not; Linux's newer calls for mounts (open_tree(2),
mount_setattr(2), fspick(2)), for which Python has none. Does not know: what is replayed
(`etcdfs.fuse.inotify`), and how (`etcdfs.fuse.replay`).

A *clone* of a mount stands at no place, and nobody else can reach it. Paths below it lead to the
same files, whatever is mounted over the mount's own place, and the mount is not busy for it. But it
keeps the file system alive: whoever has one must let go when the mount is gone (`unmounted`).

A mount made with `ro` is read-only twice: the mount itself is, and so is the file system, for all its
mounts. Here the latter is taken back, and the clone made writable. Each mount that anybody has,
in a container too, stays read-only.

Concurrency: trio thread; the calls send no request to the file system.
"""

import ctypes
import logging
import os
import select
import struct
from functools import partial
from pathlib import Path
from typing import Final, final

import trio

from etcdfs.fuse.inotify import Inotify, InotifyStatistics
from etcdfs.fuse.notify import KernelCache
from etcdfs.fuse.operations import FuseMount, Operations
from etcdfs.fuse.procfs import Watches, sees_all_watches
from etcdfs.fuse.replay import Replayer
from etcdfs.mirror.mirror import Mirror
from etcdfs.options import MountOptions
from etcdfs.process.mountpoint import Mounted, is_mounted_over, open_root, tear_down
from etcdfs.tree.tree import Tree
from etcdfs.vfs.filesystem import Filesystem

log = logging.getLogger(__name__)

# The same numbers on every architecture.
_SYS_OPEN_TREE: Final = 428
_SYS_FSCONFIG: Final = 431
_SYS_FSPICK: Final = 433
_SYS_MOUNT_SETATTR: Final = 442

_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_OPEN_TREE_CLONE: Final = 0x1
_FSPICK_CLOEXEC: Final = 0x1
_FSPICK_EMPTY_PATH: Final = 0x8
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_CMD_RECONFIGURE: Final = 7
_MOUNT_ATTR_RDONLY: Final = 0x1
_MOUNT_ATTR: Final = struct.Struct("=4Q")
_MOUNTINFO: Final = Path("/proc/self/mountinfo")


@final
class InotifyEvents:
    """Inotify's events of one mount."""

    def __init__(
        self,
        options: MountOptions,
        tree: Tree,
        mirror: Mirror | None,
        filesystem: Filesystem,
    ) -> None:
        # --- dependencies
        self._options = options
        self._tree = tree
        self._mirror = mirror
        self._filesystem = filesystem
        # --- mutable state
        self._inotify: Inotify | None = None
        self._clone: MountClone | None = None

    def start(self, tasks: trio.Nursery, mounted: Mounted | None, operations: Operations) -> str:
        """Begin, once the file system is mounted; return what a person should know of that."""
        options = self._options
        if options.inotify == "off" or mounted is None:
            return ""
        device = os.makedev(*map(int, mounted.device.split(":")))
        why_not = self._start(tasks, device, operations)
        if not why_not:
            return ""
        note = f"--inotify does nothing here: {why_not}"
        log.info("%s", note)
        # Who mounts without a cache has not asked for any events, unless he says so.
        return note if options.cache or options.inotify == "on" else ""

    def _start(self, tasks: trio.Nursery, device: int, operations: Operations) -> str:
        """Begin, or return why there can be no events."""
        options = self._options
        if self._mirror is None:
            return "without --cache nothing is heard of other clients"
        try:
            self._clone = MountClone(options.mountpoint, writable=options.read_only)
        except OSError as exc:
            if options.read_only:
                return f"only root can raise events on a read-only mount: {exc.strerror}"
        replayer = Replayer(
            self._tree,
            self._filesystem,
            # By its path it is busy for moments: umount(8) may have to be told twice.
            self._clone.open if self._clone else partial(open_root, options.mountpoint, device),
            partial(is_mounted_over, device),
        )
        sees = options.inotify == "auto" and sees_all_watches(allow_other=options.allow_other)
        self._inotify = Inotify(self._tree, replayer, Watches(device) if sees else None)
        operations.replays = replayer
        self._mirror.tell(self._inotify.observe)
        tasks.start_soon(self._run, self._inotify, device)
        return ""

    async def _run(self, inotify: Inotify, device: int) -> None:
        async with trio.open_nursery() as tasks:
            tasks.start_soon(inotify.run)
            if self._clone is not None:
                await unmounted(device)
                await self.aclose()

    async def aclose(self) -> bool:
        """Raise no more events, and let go of the mount; return whether no replay is under way."""
        has_ended = self._inotify is None or await self._inotify.aclose()
        if self._clone is not None:
            self._clone.close()
        return has_ended

    def statistics(self) -> InotifyStatistics:
        """Count what was replayed: nothing where nothing ever is."""
        return InotifyStatistics() if self._inotify is None else self._inotify.statistics()


@final
class MountClone:
    """A clone of a mount."""

    def __init__(self, mountpoint: str, *, writable: bool) -> None:
        """Clone what is mounted at a place; `writable` even if that is read-only.

        Raises:
            OSError: It may not be done (CAP_SYS_ADMIN), or Linux is older than 5.12.
        """
        flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
        self._root = _call(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(mountpoint), flags)
        if writable:
            try:
                _make_writable(self._root)
            except OSError:
                self.close()
                raise

    def open(self) -> int:
        """Return a new descriptor of the root (O_PATH)."""
        return os.dup(self._root)

    def close(self) -> None:
        """Let go of the file system, at the latest when what was opened is closed; once more is fine."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1


async def close_threads(kernel: KernelCache, events: InotifyEvents) -> bool:
    """Have all end that waits in the kernel, and return whether it has."""
    return all((await events.aclose(), await kernel.aclose()))


async def leave_kernel(
    kernel: KernelCache, events: InotifyEvents, mount: FuseMount, mounted: Mounted | None
) -> None:
    """End what talks to the kernel, before the session is gone that it talks through.

    A thread may be waiting for a lock which a request holds that nobody answers any more, or
    which a user holds for as long as he likes (`etcdfs.fuse.notify`).
    """
    if await close_threads(kernel, events) or mounted is None:
        return
    tear_down(mounted)  # all requests end, and let go of their locks
    if not await close_threads(kernel, events):
        mount.abandon()
        log.error(
            "a thread waits in the kernel for a directory's lock that some process holds; what is "
            "left of this one (%d) ends when that process does",
            os.getpid(),
        )


async def unmounted(device: int) -> None:
    """Return when a file system is mounted nowhere any more, as this process sees it."""
    number = b"%d:%d" % (os.major(device), os.minor(device))
    mountinfo = os.open(_MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
    with os.fdopen(mountinfo, "rb"), select.epoll() as changes:
        changes.register(mountinfo, select.EPOLLPRI)  # a change (proc(5)); it is always readable
        while number in _devices():
            await trio.lowlevel.wait_readable(changes.fileno())
            changes.poll(0)


def _devices() -> set[bytes]:
    return {line.split(b" ", 3)[2] for line in _MOUNTINFO.read_bytes().splitlines()}


def _make_writable(clone: int) -> None:
    attributes = _MOUNT_ATTR.pack(0, _MOUNT_ATTR_RDONLY, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    _call(_SYS_MOUNT_SETATTR, clone, b"", _AT_EMPTY_PATH, attributes, size)
    context = _call(_SYS_FSPICK, clone, b"", _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH)
    try:
        _call(_SYS_FSCONFIG, context, _FSCONFIG_SET_FLAG, b"rw", None, 0)
        _call(_SYS_FSCONFIG, context, _FSCONFIG_CMD_RECONFIGURE, None, None, 0)
    finally:
        os.close(context)


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(number, *arguments)
    if result < 0:
        failure = ctypes.get_errno()
        raise OSError(failure, os.strerror(failure))
    return int(result)
