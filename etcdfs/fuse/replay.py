"""Raising inotify's events: what another client did is done once more through our own mount.

FUSE has no way to raise an event; Linux does it in the system call that changes a file. So a
thread of ours makes such calls on the mount, and the requests that come of them are answered here
as if they had changed something: nothing of them reaches etcd, open files, times or versions.

Knows: which calls raise which events, and what the kernel asks on the way. Does not know: what has
changed, who watches, when it is time (`etcdfs.fuse.inotify`).

A request says which thread made it (fuse_in_header.pid is a thread's number), and that is how ours
is told from all others. Only closing a file says no thread; there the handle tells, which nobody
else ever gets.

What a replay must not do, it cannot: it opens no symbolic link and nothing that is mounted over a
file (openat2(2)), never waits for a reader of a FIFO, and writes past the kernel's page cache.

Nor is Linux told anything that may be out of date when it gets to know. Of an answer to SETATTR,
CREATE or MKNOD it believes the size whatever has become of the inode since, and cuts off pages of
a newer version. So a file is not truncated but written to (O_DIRECT), and one that is new is made
under a number of no other, which no later look at the name finds.

Concurrency: `perform` runs in a thread and shares with the trio thread nothing but `_active`,
whose every access is one operation of a dict. `answer` runs on the trio thread, never waits, and
builds each answer from the tree as it is then.
"""

import ctypes
import errno
import os
import stat
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, Final, final

import pyfuse3
from pyfuse3 import FileHandleT, FileInfo, FUSEError

from etcdfs.errors import StaleError
from etcdfs.fuse.operations import pack
from etcdfs.keyspace.keys import NAME_MAX
from etcdfs.tree.inodes import Dentry, Directory, File, Inode, Node, type_of
from etcdfs.tree.tree import ROOT_INODE, Tree
from etcdfs.vfs.attributes import Attributes
from etcdfs.vfs.filesystem import Filesystem

HANDLE: Final = FileHandleT((1 << 64) - 1)
"""Of every file that a replay opens; those of others are counted from 1."""

OLD_VERSIONS: Final = b"old-versions".ljust(NAME_MAX + 1, b"-")
"""A directory at the root that replays alone can see: its files are old versions, by inode number.

Nothing else can have this name: it is longer than a name may be, which Linux leaves to us."""

NO_XATTR: Final = b"system.etcdfs"
"""Set to raise ATTRIB. Linux leaves it to us who may set one of the system's, and on what."""

_SYS_OPENAT2: Final = 437  # on every architecture; Python has no function for it
_RESOLVE: Final = 0x01 | 0x04 | 0x08  # RESOLVE_NO_XDEV | _NO_SYMLINKS | _BENEATH
_OPEN_HOW: Final = struct.Struct("=QQQ")
_PATH_MAX: Final = 4096
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_FILE: Final = (
    os.O_WRONLY | os.O_DIRECT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
)

_LEASES_MAX: Final = 100
"""Times that one is opened which has a lease for a microsecond (`etcdfs.daemon.kernel_threads`): EAGAIN."""


class Step(Enum):
    """One thing to be done once more."""

    ORPHAN = auto()  # nothing, but Linux then knows that a directory has no links
    REMOVE = auto()  # DELETE, DELETE_SELF
    MAKE = auto()  # CREATE, and for a file CLOSE_WRITE
    CHANGE = auto()  # MODIFY, CLOSE_WRITE
    DRESS = auto()  # ATTRIB
    SUPERSEDE = auto()  # DELETE_SELF, for those who watch an old version


@dataclass(slots=True, kw_only=True, eq=False)
class Replay:
    """What becomes of one name.

    Attributes:
        directory: Where it is.
        above: The directory and those above it, by their places, as they were: they may be gone.
        path: Their names.
        name: The name.
        was: What stood there before; it may be gone.
        now: What stood there after.
        old: Versions that are superseded while somebody has them open.
        stand_in: The inode of what is gone, if the kernel does not know it any more, and of a
            file that is made.
        steps: What is to be done.
        step: What is being done.
    """

    directory: Directory
    above: Mapping[Dentry, Directory]
    path: tuple[bytes, ...]
    name: bytes
    was: Node | None
    now: Node | None
    old: Mapping[bytes, File]
    stand_in: Inode
    steps: tuple[Step, ...]
    step: Step | None = field(default=None, init=False)

    @property
    def replaces_directory(self) -> bool:
        """Whether a directory that the kernel may hold is taken away, or put there again."""
        return any(isinstance(node, Directory) and node.lookups for node in (self.was, self.now))


@final
class Replayer:
    """Makes the calls, and answers them."""

    def __init__(
        self,
        tree: Tree,
        filesystem: Filesystem,
        open_root: Callable[[], int],
        is_mounted_over: Callable[[bytes], bool],
    ) -> None:
        """Make a replayer; what it is given is called in the thread.

        Args:
            tree: What is mounted.
            filesystem: Who shows it.
            open_root: Opens the root of the mount (O_PATH).
            is_mounted_over: Says whether something is mounted at a path, or below it.
        """
        # --- dependencies
        self._filesystem = filesystem
        self._tree = tree
        self._open_root = open_root
        self._is_mounted_over = is_mounted_over
        # --- constants
        self._old_versions = Inode(next(self._tree.numbers))
        self._answers: Mapping[str, Callable[..., object]] = {
            "lookup": self._lookup,
            "getattr": self._getattr,
            "setattr": self._setattr,
            "getxattr": self._getxattr,
            "setxattr": self._setxattr,
            "open": self._open,
            "create": self._create,
            "mknod": self._make,
            "mkdir": self._make,
            "symlink": self._make,
            "unlink": self._remove,
            "rmdir": self._remove,
        }
        # --- mutable state, shared with the threads
        self._active: dict[int, Replay] = {}

    # --- the threads ------------------------------------------------------------------------

    def perform(self, replayed: Replay) -> None:
        """Do all that is to be done, in a thread.

        Raises:
            OSError: It cannot be done, or what is replayed is no longer so.
        """
        path = b"/".join((*replayed.path, replayed.name))
        if replayed.replaces_directory and self._is_mounted_over(path):
            # Linux would unmount it, as for a directory that is looked for and not there.
            raise OSError(errno.EBUSY, "something is mounted there")
        thread = threading.get_native_id()
        self._active[thread] = replayed
        try:
            root = self._open_root()
            try:
                self._replay(root, replayed)
            finally:
                os.close(root)
        finally:
            del self._active[thread]

    def _replay(self, root: int, replayed: Replay) -> None:
        directory = _descend(root, replayed.path)
        try:
            for step in replayed.steps:
                replayed.step = step
                _STEPS[step](root, directory, replayed)
        finally:
            os.close(directory)

    # --- the trio thread --------------------------------------------------------------------

    def answers(self, name: str, arguments: tuple[Any, ...]) -> bool:
        """Say whether a request is of a replay, and to be answered by `answer`."""
        if name in _BY_HANDLE:
            return bool(arguments[0] == HANDLE)
        return bool(self._active) and getattr(arguments[-1], "pid", 0) in self._active

    def answer(self, name: str, arguments: tuple[Any, ...]) -> object:
        """Answer a request of a replay.

        Raises:
            FUSEError: As it would be for anybody, or since the replay is out of date.
        """
        if name in _BY_HANDLE:
            return self._write(*arguments) if name == "write" else None
        *given, context = arguments
        replayed = self._active[context.pid]
        if name not in self._answers:
            raise FUSEError(errno.EPERM)
        return self._answers[name](replayed, *given)

    def _lookup(self, replayed: Replay, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        if parent == ROOT_INODE and name == OLD_VERSIONS:
            return pack(self._own_directory())
        if parent == self._old_versions:
            old = replayed.old.get(name)
            return pack(self._gone(old if old is not None and old.lookups else None))
        if parent == replayed.directory.inode and name == replayed.name:
            if replayed.step is Step.MAKE:
                raise FUSEError(errno.ENOENT)
            if replayed.step is Step.ORPHAN and replayed.was is not None:
                return pack(self._filesystem.hand_out(replayed.was))
            if replayed.step is Step.REMOVE:
                return pack(self._gone(replayed.was, replayed.stand_in))
        place = Dentry(Inode(parent), name)
        node = replayed.above.get(place) or self._current(place)
        if node is None:
            raise FUSEError(errno.ENOENT)
        return pack(self._filesystem.hand_out(node))

    def _own_directory(self) -> Attributes:
        shown = self._filesystem.attributes(self._tree.root)
        mode = stat.S_IFDIR | stat.S_IRWXU
        return replace(shown, inode=self._old_versions, mode=mode, uid=os.geteuid(), timeout_s=0.0)

    def _gone(self, node: Node | None, stand_in: Inode | None = None) -> Attributes:
        """Return the attributes of what is not there any more, for nobody to keep.

        An inode that is not, or must not be, the node's own stands in for one that the kernel
        does not hold, and for a directory: Linux would take that for dead, and it may come back.
        """
        if node is None:
            raise FUSEError(errno.ENOENT)
        if isinstance(node, File) and node.lookups:
            return replace(self._filesystem.hand_out(node), nlink=1, timeout_s=0.0)
        assert stand_in is not None
        return replace(self._filesystem.attributes(node), inode=stand_in, nlink=1, timeout_s=0.0)

    def _current(self, place: Dentry) -> Node | None:
        node = self._known(place.directory)
        return node.children.get(place.name) if isinstance(node, Directory) else None

    def _known(self, inode: int) -> Node | None:
        try:
            return self._tree.node(inode)
        except StaleError:
            return None

    def _file(self, replayed: Replay, inode: int) -> File:
        """Return the file that is changed, if that is what the kernel has come to."""
        node = replayed.directory.children.get(replayed.name)
        if not isinstance(node, File) or node.inode != inode:
            raise FUSEError(errno.ESTALE)
        return node

    def _getattr(self, replayed: Replay, inode: int) -> pyfuse3.EntryAttributes:
        if inode == self._old_versions:
            return pack(self._own_directory())
        if inode == replayed.stand_in and replayed.step is Step.MAKE:
            return pack(self._stand_in(replayed))
        node = self._known(inode)
        if node is None:
            raise FUSEError(errno.ESTALE)
        return pack(self._filesystem.attributes(node))

    def _setattr(self, replayed: Replay, inode: int, *_change: object) -> pyfuse3.EntryAttributes:
        # Linux takes this answer even after an invalidation that came later: it must not keep it.
        shown = self._filesystem.attributes(self._file(replayed, inode))
        return pack(replace(shown, timeout_s=0.0))

    def _getxattr(self, _replayed: Replay, _inode: int, _name: bytes) -> bytes:
        raise FUSEError(errno.ENODATA)  # of security.capability, which a change would take away

    def _setxattr(self, replayed: Replay, inode: int, name: bytes, _value: bytes) -> None:
        if replayed.step is not Step.DRESS or name != NO_XATTR:
            raise FUSEError(errno.EPERM)
        place = Dentry(replayed.directory.inode, replayed.name)
        node = self._tree.root if replayed.name == b"." else self._current(place)
        if node is None or node.inode != inode:
            raise FUSEError(errno.ESTALE)

    def _open(self, replayed: Replay, inode: int, _flags: int) -> FileInfo:
        self._file(replayed, inode)
        return FileInfo(fh=HANDLE, keep_cache=True)

    def _write(self, _handle: int, _offset: int, data: bytes) -> int:
        return len(data)

    def _create(
        self, replayed: Replay, parent: int, name: bytes, *_how: object
    ) -> tuple[FileInfo, pyfuse3.EntryAttributes]:
        self._made(replayed, parent, name)
        return FileInfo(fh=HANDLE, keep_cache=True), pack(self._stand_in(replayed))

    def _stand_in(self, replayed: Replay) -> Attributes:
        assert replayed.now is not None
        shown = self._filesystem.attributes(replayed.now)
        return replace(shown, inode=replayed.stand_in, timeout_s=0.0)

    def _make(
        self, replayed: Replay, parent: int, name: bytes, *_how: object
    ) -> pyfuse3.EntryAttributes:
        return pack(self._filesystem.hand_out(self._made(replayed, parent, name)))

    def _made(self, replayed: Replay, parent: int, name: bytes) -> Node:
        node = self._current(Dentry(Inode(parent), name))
        is_replayed = (parent, name) == (replayed.directory.inode, replayed.name)
        if node is None or not is_replayed or replayed.step is not Step.MAKE:
            raise FUSEError(errno.ESTALE)
        if replayed.now is None or kind(node) != kind(replayed.now):
            raise FUSEError(errno.ESTALE)  # Linux would say EIO, as to a broken filesystem
        return node

    def _remove(self, replayed: Replay, parent: int, name: bytes) -> None:
        if parent == self._old_versions and name in replayed.old:
            return
        place = Dentry(Inode(parent), name)
        is_replayed = place == Dentry(replayed.directory.inode, replayed.name)
        is_back = replayed.now is None and self._current(place) is not None
        if not is_replayed or is_back or replayed.step is not Step.REMOVE:
            raise FUSEError(errno.ESTALE)


_BY_HANDLE: Final = frozenset(("write", "flush", "release", "fsync"))
"""Requests that do not say which thread made them, or may come when it has gone on."""


def kind(node: Node) -> str:
    """Return "directory", "file", or what else an attribute record makes of a key."""
    if isinstance(node, Directory):
        return "directory"
    return type_of(node.stored_record) or "file"


# --- the calls -------------------------------------------------------------------------------


def _descend(root: int, path: tuple[bytes, ...]) -> int:
    """Open a directory below another, however long its path is."""
    directory = os.dup(root)
    names = list(path)
    while names:
        part = names.pop(0)
        while names and len(part) + len(names[0]) + 1 < _PATH_MAX:
            part += b"/" + names.pop(0)
        above, directory = directory, -1
        try:
            directory = _open_beneath(above, part, _DIRECTORY)
        finally:
            os.close(above)
    return directory


def _open_beneath(directory: int, path: bytes, flags: int, mode: int = 0) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    how = _OPEN_HOW.pack(flags, mode, _RESOLVE)
    failure = 0
    for _ in range(_LEASES_MAX):
        opened = libc.syscall(
            _SYS_OPENAT2, directory, ctypes.c_char_p(path), how, ctypes.c_size_t(len(how))
        )
        if opened >= 0:
            return int(opened)
        failure = ctypes.get_errno()
        if failure != errno.EAGAIN:
            break
    raise OSError(failure, os.strerror(failure))


def _change(_root: int, directory: int, replayed: Replay) -> None:
    file = _open_beneath(directory, replayed.name, _FILE)
    try:
        os.pwrite(file, b"\0", 0)
    finally:
        os.close(file)


def _make(_root: int, directory: int, replayed: Replay) -> None:
    name, now = replayed.name, replayed.now
    assert now is not None
    match kind(now):
        case "directory":
            os.mkdir(name, dir_fd=directory)
        case "file":
            file = _open_beneath(directory, name, _FILE | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                if isinstance(now, File) and now.key_state is not None and now.key_state.size:
                    os.pwrite(file, b"\0", 0)
            finally:
                os.close(file)
        case "symlink":
            os.symlink(b"/", name, dir_fd=directory)
        case "fifo":
            os.mkfifo(name, dir_fd=directory)
        case _:
            os.mknod(name, stat.S_IFSOCK | 0o600, dir_fd=directory)


def _orphan(_root: int, directory: int, replayed: Replay) -> None:
    os.stat(replayed.name, dir_fd=directory, follow_symlinks=False)


def _remove(_root: int, directory: int, replayed: Replay) -> None:
    if isinstance(replayed.was, Directory):
        os.rmdir(replayed.name, dir_fd=directory)
    else:
        os.unlink(replayed.name, dir_fd=directory)


def _dress(_root: int, directory: int, replayed: Replay) -> None:
    node = _open_beneath(directory, replayed.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.setxattr(f"/proc/self/fd/{node}", NO_XATTR, b"")
    finally:
        os.close(node)


def _supersede(root: int, _directory: int, replayed: Replay) -> None:
    hidden = _open_beneath(root, OLD_VERSIONS, _DIRECTORY)
    try:
        for number in replayed.old:
            with suppress(FileNotFoundError):  # nobody holds it any more
                os.unlink(number, dir_fd=hidden)
    finally:
        os.close(hidden)


_STEPS: Final[Mapping[Step, Callable[[int, int, Replay], None]]] = {
    Step.ORPHAN: _orphan,
    Step.REMOVE: _remove,
    Step.MAKE: _make,
    Step.CHANGE: _change,
    Step.DRESS: _dress,
    Step.SUPERSEDE: _supersede,
}
