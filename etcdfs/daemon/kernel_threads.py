"""The threads that make calls on the mount itself: how they begin, by which way, until when.

They invalidate what the kernel has cached (`etcdfs.fuse.notify`), look whether files are open for
that, and replay changes for those who watch through inotify.

Knows: when a mount can have events, and why not; Linux's newer calls for mounts (open_tree(2),
mount_setattr(2), fspick(2)), for which Python has none. Does not know: what is replayed
(`etcdfs.fuse.inotify`), and how (`etcdfs.fuse.replay`).

A *clone* of a mount stands at no place, and nobody else can reach it. Paths below it lead to the
same files, whatever is mounted over the mount's own place, and the mount is not busy for it. But it
keeps the file system alive: whoever has one must let go when the mount is gone (`unmounted`).

A mount made with `ro` is read-only twice: the mount itself is, and so is the file system, for all its
mounts. Here the latter is taken back, and the clone made writable. Each mount that anybody has,
in a container too, stays read-only.

/proc says who has a file open, but not of everybody: a descriptor may be on its way through a
socket, be held by the kernel itself (an overlay, a loop device), or in a process that hides it. The
kernel gives a lease for writing on a file that nobody else has open in any way (fcntl(2),
F_SETLEASE); what is only mounted elsewhere, watched or opened with O_PATH does not count. To ask
for one takes a descriptor, which is had by the inode's number (open_by_handle_at(2)): whatever
path leads there, whatever is mounted over it, and without a request to us but for attributes.

Concurrency: trio thread, but for `Openings.open` and what it returns. Of what is called here, only
that sends requests to the file system, which `Openings.answer` answers.
"""

import ctypes
import errno
import logging
import os
import select
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, final

import trio

from etcdfs.errors import StaleError
from etcdfs.files.walks import Walks
from etcdfs.fuse.fastpath import Feature, Use, look_at
from etcdfs.fuse.inotify import Inotify, InotifyStatistics
from etcdfs.fuse.notify import KernelCache
from etcdfs.fuse.operations import FuseMount, Operations, pack
from etcdfs.fuse.procfs import Watches, sees_all_watches
from etcdfs.fuse.replay import Replayer
from etcdfs.mirror.mirror import Mirror
from etcdfs.options import MountOptions
from etcdfs.process.mountpoint import Mounted, is_mounted_over, open_root, tear_down
from etcdfs.tree.tree import ROOT_INODE, Tree
from etcdfs.tree.value_cache import ValueCache
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
WRITES_S: Final = 0.02
"""How long a replay of ours may have a file open; it is 0.3 ms (`etcdfs.fuse.replay`)."""

LOOK_AGAIN_S: Final = 0.0005

_HANDLE: Final = struct.Struct("=Ii3I")  # struct file_handle; fs/fuse/inode.c, fuse_encode_fh
_HANDLE_TYPE: Final = 0x81  # FILEID_INO64_GEN
_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CAPABILITIES: Final = (2, 21, 28)  # CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN, CAP_LEASE
_FIRST_USER_NAMESPACE: Final = "user:[4026531837]"  # PROC_USER_INIT_INO, include/linux/proc_ns.h
_OURS: Final = frozenset(("getattr", "lookup"))
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
        operations.own.append(replayer)
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
class UnseenOpens:
    """Has the kernel open files without asking, where we can find out which are open."""

    def __init__(
        self,
        tree: Tree,
        mirror: Mirror | None,
        value_cache: ValueCache,
        filesystem: Filesystem,
        kernel: KernelCache,
        operations: Operations,
    ) -> None:
        # --- dependencies
        self._tree = tree
        self._mirror = mirror
        self._value_cache = value_cache
        self._filesystem = filesystem
        self._kernel = kernel
        self._operations = operations
        # --- mutable state
        self._openings: Openings | None = None
        self._clone: MountClone | None = None

    def start(self, tasks: trio.Nursery, mounted: Mounted | None) -> None:
        """Begin, once the file system is mounted and before the kernel's first request."""
        mirror, fast_path = self._mirror, self._operations.fast_path
        if mirror is None or not fast_path.opens_unseen:
            return
        try:
            if mounted is None:
                raise FileNotFoundError(errno.ENOENT, "another file system stands there")
            self._clone = MountClone(mounted.path, writable=False)
        except OSError as exc:
            log.info("files are opened by request: %s", exc.strerror)
            fast_path.forgo(Feature.NO_OPEN)
            return
        self._openings = Openings(self._tree, self._filesystem, self._clone.open)
        self._operations.own.append(self._openings)
        self._kernel.openings = self._openings
        self._tree.unseen.is_so = True
        mirror.unopened.walks = Walks(self._tree, self._value_cache, self._kernel.hand_over)
        tasks.start_soon(mirror.unopened.run)
        tasks.start_soon(self._run, os.makedev(*map(int, mounted.device.split(":"))))

    async def _run(self, device: int) -> None:
        await unmounted(device)
        self.close()

    def close(self) -> None:
        """Let go of the mount: from then on each file is taken to be open."""
        if self._openings is not None and self._clone is not None:
            self._openings.close()
            self._clone.close()


def may_look() -> bool:
    """Say whether this process may ask the kernel who has a file open, whosever it is."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        effective = int(next(line for line in lines if line.startswith("CapEff:"))[7:], 16)
        return (
            all(effective >> number & 1 for number in _CAPABILITIES)
            and Path("/proc/self/ns/user").readlink() == Path(_FIRST_USER_NAMESPACE)
            and Path("/proc/sys/fs/leases-enable").read_text().strip() == "1"
            and _open_by_handle(-1, ROOT_INODE) == -errno.EBADF  # no filter of calls is in the way
        )
    return False


def _open_by_handle(mount: int, inode: int) -> int:
    """Open a file of a mount by its number; return the descriptor, or the errno, negative."""
    handle = _HANDLE.pack(12, _HANDLE_TYPE, inode >> 32, inode & 0xFFFFFFFF, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.open_by_handle_at(mount, ctypes.create_string_buffer(handle), _FLAGS)
    return int(fd) if fd >= 0 else -ctypes.get_errno()


@final
class Opening:
    """One open descriptor of a file, or that the kernel has no such file; closed by its context."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)

    @property
    def is_there(self) -> bool:
        """Whether the kernel has the file."""
        return self._fd is not None

    def is_alone(self) -> bool:
        """Say whether nobody else has it open, or mapped; a replay of ours is waited for."""
        if self._fd is None:
            return True
        until = time.monotonic() + WRITES_S
        while (use := look_at(self._fd)) is Use.WRITTEN and time.monotonic() < until:
            threading.Event().wait(LOOK_AGAIN_S)
        return use is Use.ALONE


@final
class Openings:
    """Who has the files of one mount open."""

    def __init__(self, tree: Tree, filesystem: Filesystem, open_root: Callable[[], int]) -> None:
        """Make one; `open_root` opens the root of the mount (O_PATH), and is called in a thread."""
        # --- dependencies
        self._tree = tree
        self._filesystem = filesystem
        self._open_root = open_root
        # --- mutable state, of the threads
        self._root = -1
        self._is_closed = False
        self._lock = threading.Lock()
        # --- mutable state, shared
        self._threads: set[int] = set()

    def open(self, inode: int) -> Opening:
        """Open a regular file, in a thread.

        Raises:
            OSError: It cannot be found out who has it open.
        """
        thread = threading.get_native_id()
        self._threads.add(thread)
        try:
            return Opening(self._open(inode))
        except OSError as exc:
            if exc.errno == errno.ESTALE:
                return Opening(None)
            raise
        finally:
            self._threads.discard(thread)

    def _open(self, inode: int) -> int:
        with self._lock:
            if self._root < 0 and not self._is_closed:
                self._root = self._open_directory()
        fd = _open_by_handle(self._root, inode)
        if fd < 0:
            raise OSError(-fd, os.strerror(-fd))
        return fd

    def _open_directory(self) -> int:
        root = self._open_root()
        try:
            return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
        finally:
            os.close(root)

    def close(self) -> None:
        """Let go of the mount; nothing can be found out from then on."""
        self._is_closed = True
        root, self._root = self._root, -1
        if root >= 0:
            os.close(root)

    # --- the trio thread --------------------------------------------------------------------

    def answers(self, name: str, arguments: tuple[Any, ...]) -> bool:
        """Say whether a request is our own, and to be answered by `answer`."""
        pid = getattr(arguments[-1], "pid", 0)
        return bool(self._threads) and name in _OURS and pid in self._threads

    def answer(self, name: str, arguments: tuple[Any, ...]) -> object:
        """Answer it: for nobody to keep, and at once, as others wait for what we find out.

        Raises:
            StaleError: The kernel does not hold the inode.
        """
        if name == "lookup":
            raise StaleError(f"inode {arguments[0]} is not in the kernel")
        attributes = self._filesystem.attributes(self._tree.node(arguments[0]))
        return pack(replace(attributes, timeout_s=0.0))


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
