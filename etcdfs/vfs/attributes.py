"""What stat(2) says of a node.

Knows: default owner and modes, sizes, link counts and times, and which attributes need not be kept
because they are the default. Does not know: how FUSE packs them.

When in doubt, closed: what has a record that does not say who may have it, and everything while
no record can be read, is shown without the rights of group and others.

Concurrency: none; pure functions.
"""

import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, final

from etcdfs.files.write_buffer import WriteBuffer
from etcdfs.keyspace.attribute_records import Record, Rights, Type
from etcdfs.tree.inodes import Directory, File, Inode, Node
from etcdfs.tree.node_attributes import key_state_of_node, record_of
from etcdfs.tree.tree import ROOT_INODE

BLOCK_SIZE = 4096

_FORMATS: Final[dict[Type | None, int]] = {
    None: stat.S_IFREG,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
}
_CLOSED: Final = stat.S_IRWXG | stat.S_IRWXO | stat.S_ISUID
_LINK_MODE: Final = 0o777  # of a symbolic link; nobody asks for it, and chmod(2) cannot change it


@dataclass(frozen=True, slots=True)
class Attributes:
    """The fields of struct stat, and how long the kernel may keep them (seconds)."""

    inode: Inode
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change of attributes; None leaves one as it is.

    Attributes:
        is_now: Whether all times that are set are the present (UTIME_NOW); None: not known.
    """

    size: int | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    is_now: bool | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a system call: the owner of what it makes."""

    uid: int
    gid: int


@final
class Defaults:
    """Owner and modes of what has no attributes of its own."""

    __slots__ = ("_directory_mode", "_file_mode", "_gid", "_rights", "_uid")

    def __init__(
        self,
        *,
        uid: int,
        gid: int,
        file_mode: int,
        dir_mode: int,
        umask: int,
        rights: Rights | None = None,
    ) -> None:
        self._rights = rights or Rights()
        self._uid = uid
        self._gid = gid
        self._file_mode = stat.S_IFREG | (file_mode & ~umask & 0o7777)
        self._directory_mode = stat.S_IFDIR | (dir_mode & ~umask & 0o7777)

    def of(self, node: Node, timeout_s: float) -> Attributes:
        """Return the attributes of a node."""
        record = record_of(node)
        mode, uid, gid = self.permissions(node)
        if record.is_doubtful or not self._rights.readable:
            mode = _closed(mode)
        if isinstance(node, Directory):
            size = 0
            removed = node.directory is None and node.inode != ROOT_INODE
            nlink = 0 if removed else 2 + node.subdirectories
            ctime_ns = node.ctime_ns
        else:
            nlink, size = int(node.directory is not None), size_of(node)
            ctime_ns = max(node.ctime_ns, mtime_of(node))
        mtime_ns = mtime_of(node)
        return Attributes(
            node.inode,
            mode,
            nlink,
            uid,
            gid,
            size,
            atime_of(node, record, mtime_ns),
            mtime_ns,
            ctime_ns,
            timeout_s,
        )

    def permissions(self, node: Node) -> tuple[int, int, int]:
        """Return mode, owner and group of a node as far as they are known, doubts aside."""
        record = record_of(node)
        return (
            self._mode(node, record),
            self._uid if record.uid is None else record.uid,
            self._gid if record.gid is None else record.gid,
        )

    def _mode(self, node: Node, record: Record) -> int:
        if isinstance(node, Directory):
            return self._directory_mode if record.mode is None else stat.S_IFDIR | record.mode
        if record.type == "symlink":
            return stat.S_IFLNK | _LINK_MODE
        mode = stat.S_IMODE(self._file_mode) if record.mode is None else record.mode
        return _FORMATS[record.type] | mode

    def of_new(
        self, directory: Directory, caller: Caller, mode: int | None, kind: Type | None = None
    ) -> Record:
        """Return the attributes of what a caller makes in a directory.

        Args:
            directory: Where. If it has the set-group-ID bit, its group goes to all that is made
                in it, and the bit to directories (inode(7)).
            caller: The owner.
            mode: As mknod(2) has it, with the umask taken away already; None for the default.
            kind: What it is, if not a file or a directory.
        """
        is_directory = mode is not None and stat.S_ISDIR(mode)
        gid = caller.gid
        bits = None if mode is None else stat.S_IMODE(mode)
        above = self.of(directory, 0.0)
        if above.mode & stat.S_ISGID:
            gid = above.gid
            bits = bits | stat.S_ISGID if is_directory and bits is not None else bits
        record = Record(mode=bits, uid=caller.uid, gid=gid, type=kind)
        return self.trimmed(record, is_directory=is_directory)

    def changed(self, node: Node, change: Change, *, mtime_holds: bool) -> Record:
        """Return a node's own attributes after a change of mode, owner or times.

        Who sets a mode decides who may have the file: no doubt is left.
        """
        record = record_of(node).settled(*_set_by(change))
        if not mtime_holds:
            record = record.without_mtime()
        record = replace(
            record,
            mode=record.mode if change.mode is None else stat.S_IMODE(change.mode),
            uid=record.uid if change.uid is None else change.uid,
            gid=record.gid if change.gid is None else change.gid,
        )
        if change.mtime_ns is not None or change.atime_ns is not None:
            record = self._timed(node, record, change)
        return self.trimmed(record, is_directory=isinstance(node, Directory))

    def _timed(self, node: Node, record: Record, change: Change) -> Record:
        # What is not set keeps the time it is shown with, which is the mtime without one.
        atime_ns = self.of(node, 0.0).atime_ns if change.atime_ns is None else change.atime_ns
        if change.mtime_ns is not None:
            key_state = key_state_of_node(node)
            revision = 0 if key_state is None else key_state.mod_revision
            record = replace(record, mtime_ns=change.mtime_ns, mtime_revision=revision)
        shown = mtime_of(node) if change.mtime_ns is None else change.mtime_ns
        return replace(record, atime_ns=None if atime_ns == shown else atime_ns)

    def trimmed(self, record: Record, *, is_directory: bool) -> Record:
        """Return a record without what is the default anyway."""
        mode = stat.S_IMODE(self._directory_mode if is_directory else self._file_mode)
        return replace(
            record,
            mode=None if record.mode == mode or record.type == "symlink" else record.mode,
            uid=None if record.uid == self._uid else record.uid,
            gid=None if record.gid == self._gid else record.gid,
        )


def _closed(mode: int) -> int:
    """Return a mode without what it lets group and others do; nobody asks that of a link."""
    return mode if stat.S_ISLNK(mode) else mode & ~_CLOSED


def _set_by(change: Change) -> Iterator[str]:
    """Iterate over the fields of a record that a change leaves nothing unread of."""
    if change.mode is not None:
        yield from ("mode", "uid", "gid", "type")
    if change.mtime_ns is not None:
        yield from ("mtime_ns", "mtime_revision")
    for name in ("uid", "gid", "atime_ns"):
        if getattr(change, name) is not None:
            yield name


def size_of(file: File) -> int:
    """Return the size in bytes that a reader of this file would find."""
    if record_of(file).type in ("fifo", "socket"):
        return 0
    if isinstance(file.buffer, WriteBuffer):
        return len(file.buffer)
    return 0 if file.key_state is None else file.key_state.size


def mtime_of(node: Node) -> int:
    """Return the mtime, that of unpublished writes included."""
    if isinstance(node, File) and isinstance(node.buffer, WriteBuffer):
        if node.buffer.times_set is not None:
            return node.buffer.mtime_ns
        return max(node.mtime_ns, node.buffer.mtime_ns)
    return node.mtime_ns


def atime_of(node: Node, record: Record, mtime_ns: int) -> int:
    """Return the atime, which is the mtime unless it was set; of unpublished writes, too."""
    if isinstance(node, File) and isinstance(node.buffer, WriteBuffer):
        times = node.buffer.times_set
        if times is not None and times[1] is not None:
            return times[1]
    return mtime_ns if record.atime_ns is None else record.atime_ns
