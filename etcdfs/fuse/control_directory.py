"""The control directory `.etcdfs` at the root: files that are made when they are looked up.

Knows: their names, inodes and who may read them. Does not know: what is in them.

It stands beside the tree, not in it: no key is behind it, it is in no listing, and it needs
nothing of what the tree needs, so that it answers while etcd is away and while nothing else may
be shown. `handler` in `etcdfs.fuse.operations` asks `answering` first, for each request; whatever is about
something here never reaches the filesystem.

The kernel keeps no name of it. So each time one is looked up it gets another inode, with content
that is made then and never changes, until the kernel forgets it. Nothing is to be done when it is
opened: on some mounts the kernel does not say when that is (`etcdfs.fuse.fastpath`). A listing
(READDIRPLUS) has inodes without content: nobody comes to one, as its name is looked up first.

Concurrency: trio thread; no `await` but pyfuse3's.
"""

import errno
import itertools
import os
import stat
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NoReturn, final

import pyfuse3
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FileNameT, FUSEError, InodeT, ModeT

from etcdfs.keyspace.keys import CONTROL_NAME
from etcdfs.tree.tree import ROOT_INODE

FIRST: Final = 1 << 62
"""The directory's inode. Those of its files follow, and are their handles, too: the tree counts its
own from 1 on, and never comes so far."""

_INODES_AT: Final[Mapping[str, tuple[int, ...]]] = {"rename": (0, 2), "link": (0, 1)}
"""Where the arguments of a request have inodes or handles, if not in the first place only. Behind
that of a directory comes a name."""

_ITSELF: Final = (ROOT_INODE, CONTROL_NAME)

Answer = Callable[..., Awaitable[Any]]


@final
class ControlDirectory:
    """The requests about the control directory; those not here are refused (EPERM).

    Not with ENOSYS, as pyfuse3 would: the kernel would not ask again, for any file.
    """

    def __init__(
        self, files: Mapping[bytes, Callable[[], bytes]], *, owner: int, is_private: bool
    ) -> None:
        """Show `files`, each with what makes its content.

        With `is_private`, only `owner` and root may enter; the kernel checks it.
        """
        # --- constants
        self._owner = owner
        self._rights = 0o500 if is_private else 0o555
        self._files = dict(files)
        self._listed = {name: FIRST + at for at, name in enumerate(files, 1)}
        self._answers: Mapping[str, Answer] = {
            "lookup": self._lookup,
            "getattr": self._getattr,
            "open": self._open,
            "read": self._read,
            "opendir": self._opendir,
            "readdir": self._readdir,
            "getxattr": _fail_with(pyfuse3.ENOATTR),
            "listxattr": _succeed_with(()),
            "flush": _succeed_with(None),
            "fsync": _succeed_with(None),
            "fsyncdir": _succeed_with(None),
            "release": _succeed_with(None),
            "releasedir": _succeed_with(None),
        }
        # --- mutable state
        self._numbers = itertools.count(FIRST + len(files) + 1)
        # INVARIANT: by inode, of those that the kernel holds.
        self._contents: dict[int, bytes] = {}

    def answering(self, request: str, arguments: tuple[object, ...]) -> Answer | None:
        """Return what answers a request, if it is about something here."""
        for at in _INODES_AT.get(request, (0,)):
            if arguments[at : at + 2] == _ITSELF:
                return self._lookup_itself if request == "lookup" else _fail_with(errno.EPERM)
            if is_control_inode(arguments[at]):
                return self._answers.get(request, _fail_with(errno.EPERM))
        return None

    # --- names ------------------------------------------------------------------------------

    async def _lookup_itself(self, *_arguments: object) -> EntryAttributes:
        return self._pack(FIRST)

    async def _lookup(self, inode: int, name: bytes, _ctx: object) -> EntryAttributes:
        if name == b".":
            return self._pack(inode)
        if name == b".." or name not in self._files:  # nobody exports this by NFS
            raise FUSEError(errno.ENOENT)
        content = self._files[name]()
        made = next(self._numbers)
        self._contents[made] = content
        return self._pack(made)

    def forget(self, inode: int) -> None:
        """Drop what the kernel has forgotten; it has looked up each inode but once."""
        self._contents.pop(inode, None)

    async def _getattr(self, inode: int, _ctx: object) -> EntryAttributes:
        return self._pack(inode)

    def _pack(self, inode: int) -> EntryAttributes:
        is_directory = inode == FIRST
        packed = EntryAttributes()
        packed.st_ino = InodeT(inode)
        kind = stat.S_IFDIR if is_directory else stat.S_IFREG
        packed.st_mode = ModeT(kind | (self._rights if is_directory else self._rights & 0o444))
        packed.st_nlink = 2 if is_directory else 1
        packed.st_size = len(self._contents.get(inode, b""))
        packed.st_uid = packed.st_gid = self._owner
        packed.entry_timeout = packed.attr_timeout = 0
        return packed

    # --- files ------------------------------------------------------------------------------

    async def _open(self, inode: int, flags: int, _ctx: object) -> FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EPERM)
        return FileInfo(fh=FileHandleT(inode))

    async def _read(self, inode: int, offset: int, size: int) -> bytes:
        return self._contents[inode][offset : offset + size]

    async def _opendir(self, _inode: int, _ctx: object) -> FileHandleT:
        return FileHandleT(FIRST)

    async def _readdir(self, _handle: int, start: int, token: pyfuse3.ReaddirToken) -> None:
        listed = {b".": FIRST, b"..": FIRST, **self._listed}
        for position, (name, inode) in enumerate(listed.items()):
            if position >= start and not pyfuse3.readdir_reply(
                token, FileNameT(name), self._pack(inode), position + 1
            ):
                return


def is_control_inode(number: object) -> bool:
    """Tell whether a number is an inode or a handle of the control directory."""
    return isinstance(number, int) and number >= FIRST


def _succeed_with(answer: object) -> Answer:
    async def succeed(*_arguments: object) -> object:
        return answer

    return succeed


def _fail_with(number: int) -> Answer:
    async def fail(*_arguments: object) -> NoReturn:
        raise FUSEError(number)

    return fail
