"""What stat(2) says of a node.

What this room knows: default owner and modes, sizes, link counts and times. What it must not
know: how FUSE packs them.

Concurrency: none; pure functions.
"""

import stat
from dataclasses import dataclass
from typing import final

from etcdfs.drafts import Draft
from etcdfs.tree import ROOT_INODE, Directory, File, Inode, Node, Overrides

BLOCK_SIZE = 4096


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


@final
class Defaults:
    """Owner and modes of what has no attributes of its own."""

    __slots__ = ("_directory_mode", "_file_mode", "_gid", "_uid")

    def __init__(self, *, uid: int, gid: int, file_mode: int, dir_mode: int, umask: int) -> None:
        self._uid = uid
        self._gid = gid
        self._file_mode = stat.S_IFREG | (file_mode & ~umask & 0o7777)
        self._directory_mode = stat.S_IFDIR | (dir_mode & ~umask & 0o7777)

    def of(self, node: Node, timeout_s: float) -> Attributes:
        """Return the attributes of a node."""
        if isinstance(node, Directory):
            mode, size = self._directory_mode, 0
            removed = node.directory is None and node.inode != ROOT_INODE
            nlink = 0 if removed else 2 + node.subdirectories
        else:
            mode, nlink, size = self._file_mode, int(node.directory is not None), size_of(node)
        overrides = node.overrides or _NONE
        mtime_ns = mtime_of(node)
        return Attributes(
            node.inode,
            mode if overrides.mode is None else stat.S_IFMT(mode) | overrides.mode,
            nlink,
            self._uid if overrides.uid is None else overrides.uid,
            self._gid if overrides.gid is None else overrides.gid,
            size,
            mtime_ns if overrides.atime_ns is None else overrides.atime_ns,
            mtime_ns,
            max(node.ctime_ns, mtime_ns) if isinstance(node, File) else node.ctime_ns,
            timeout_s,
        )


def size_of(file: File) -> int:
    """Return the size in bytes that a reader of this file would find."""
    if isinstance(file.draft, Draft):
        return len(file.draft)
    return 0 if file.facts is None else file.facts.size


def mtime_of(node: Node) -> int:
    """Return the mtime, that of unpublished writes included."""
    if isinstance(node, File) and isinstance(node.draft, Draft):
        return max(node.mtime_ns, node.draft.mtime_ns)
    return node.mtime_ns


_NONE = Overrides()
