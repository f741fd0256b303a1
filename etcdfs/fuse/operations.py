"""pyfuse3's requests, handed to the filesystem and back.

Knows: pyfuse3's types and what the kernel makes of them. Does not know: etcd, keys, what any call
means. It is a thin wrapper on purpose.

The one border: every handler wears `@handler`, which turns `EtcdfsError` into its errno and
anything else into EIO and a logged traceback, so that no fault of ours takes the mount down
(pyfuse3 ends its main loop on any other exception).

Concurrency: pyfuse3 runs each request as a trio task. Answers are built and sent without an
`await` in between.
"""

import errno
import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, Protocol, Self, TypeVar, cast, final

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
    XAttrNameT,
)

from etcdfs.admission import Admission, Request, current
from etcdfs.errors import EtcdfsError, FuseRefusedError, NoAttributeError
from etcdfs.files.handles import Handles
from etcdfs.fuse.control_directory import ControlDirectory, is_control_inode
from etcdfs.fuse.fastpath import NO_FAST_PATH, TASKS_MIN, FastPath, few_turns
from etcdfs.fuse.procfs import Openers, describe_shortage, is_shortage
from etcdfs.vfs.attributes import BLOCK_SIZE, Attributes, Caller, Change
from etcdfs.vfs.filesystem import Filesystem
from etcdfs.vfs.xattr import Xattrs

log = logging.getLogger(__name__)

SECTOR_SIZE: Final = 512  # the unit of st_blocks (stat(2))

MAX_TASKS: Final = 1 << 20
"""Requests handled at once: all there are. When so many wait, pyfuse3 reads no further request,
not even one that memory answers; so who may wait is decided by `etcdfs.admission`, not here."""

_asked: ContextVar[tuple[RequestContext, bool] | None] = ContextVar("_asked", default=None)
"""The last request for an extended attribute in this task, and whether there was one.

pyfuse3 keeps XATTR_CREATE and XATTR_REPLACE to itself: it calls getxattr first, and setxattr only
if that found none, or one. Both calls are for the same request, so that its context tells them
apart from calls of their own. What was found has to be so still when it is changed in etcd."""


class OwnRequests(Protocol):
    """Requests that are no user's, and are answered apart from all others.

    Of replays (`etcdfs.fuse.replay`), and of who looks whether a file is open
    (`etcdfs.daemon.kernel_threads`).
    """

    def answers(self, name: str, arguments: tuple[Any, ...]) -> bool:
        """Say whether a request is one of them."""
        ...

    def answer(self, name: str, arguments: tuple[Any, ...]) -> object:
        """Answer it, or raise `FUSEError`."""
        ...


class ReadsUnopened(Protocol):
    """See `UnopenedFiles`."""

    async def read(self, inode: int, offset: int, size: int) -> bytes:
        """Read a file that the kernel has opened without asking."""
        ...


P = ParamSpec("P")
R = TypeVar("R")


def handler(
    function: Callable[Concatenate["Operations", P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate["Operations", P], Coroutine[Any, Any, R]]:
    """Count a request, let it wait only if it may, and let nothing but `FUSEError` out."""
    name = function.__name__

    @functools.wraps(function)
    async def wrapped(self: "Operations", /, *args: P.args, **kwargs: P.kwargs) -> R:
        own = next((own for own in self.own if own.answers(name, args)), None)
        if own is None:
            self.requests[name] += 1
        reader = self.fast_path.reader if name == "read" else None
        request = Request(
            self.admission, lambda: self.user_of(name, args) if reader is None else reader
        )
        before = current.set(request)
        try:
            if own is not None:
                return cast("R", own.answer(name, args))
            if self._control is not None and (answering := self._control.answering(name, args)):
                answer: R = await answering(*args)
                return answer
            return await function(self, *args, **kwargs)
        except FUSEError:
            raise
        except EtcdfsError as exc:
            log.log(exc.level, "%s: %s", name, exc)
            raise FUSEError(exc.errno) from exc
        except Exception as exc:
            if is_shortage(exc):
                log.error("%s failed: %s", name, describe_shortage())  # noqa: TRY400 -- no bug
                raise FUSEError(errno.ENOMEM) from exc
            log.exception("%s failed; this is a bug of etcdfs", name)
            raise FUSEError(errno.EIO) from exc
        finally:
            current.reset(before)
            request.end()

    return wrapped


@final
class Operations(pyfuse3.Operations):
    """What pyfuse3 calls."""

    def __init__(
        self,
        filesystem: Filesystem,
        files: Handles,
        xattrs: Xattrs,
        *,
        store: Callable[[int, bytes], None] | None,
        control: ControlDirectory | None = None,
        fast_path: FastPath = NO_FAST_PATH,
        unopened: ReadsUnopened | None = None,
    ) -> None:
        """Serve `filesystem`, and beside it `control`.

        With `store`, which gives the kernel an inode's content, pages outlive the last close of
        a file; without, each open begins anew.
        """
        super().__init__()
        # --- dependencies
        self._filesystem = filesystem
        self._files = files
        self._xattrs = xattrs
        self._control = control
        self._unopened = unopened
        self.fast_path = fast_path
        # --- constants
        self._keep_cache = store is not None
        self._store = store
        self.own: list[OwnRequests] = []
        # --- mutable state
        self.requests: Counter[str] = Counter()
        self.openers = Openers()
        self.admission = Admission()
        self._users: dict[tuple[str, int], int] = {}  # who opened what, by kind and handle

    def user_of(self, name: str, arguments: tuple[object, ...]) -> int:
        """Return the user who makes a request.

        pyfuse3 does not tell with a handle who uses it: that is taken to be who opened it.
        """
        user = getattr(arguments[-1], "uid", None)  # of the context, which comes last if at all
        if user is not None:
            return int(user)
        assert isinstance(arguments[0], int)
        kind = _DIRECTORY if name in _OF_DIRECTORIES else _FILE
        return self._users.get((kind, arguments[0]), os.geteuid())

    # --- names ------------------------------------------------------------------------------

    @handler
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        attributes = await self._filesystem.lookup(parent_inode, name)
        if attributes is not None:
            return pack(attributes)
        # An answer with inode 0 is a missing name the kernel may remember (libfuse,
        # fuse_lowlevel.h, fuse_entry_param.ino).
        missing = EntryAttributes()
        missing.entry_timeout = self._filesystem.kernel_timeout_s
        return missing

    def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:  # type: ignore[override]
        self.requests["forget"] += 1
        try:
            known = [pair for pair in inode_list if not is_control_inode(pair[0])]
            self._filesystem.forget(known)
            if self._control is not None and len(known) < len(inode_list):
                for inode, _ in inode_list:
                    self._control.forget(inode)
        except Exception:
            log.exception("forget failed; this is a bug of etcdfs")

    @handler
    async def mknod(
        self,
        parent_inode: InodeT,
        name: FileNameT,
        mode: ModeT,
        rdev: int,
        ctx: RequestContext,
    ) -> EntryAttributes:
        return pack(await self._filesystem.mknod(parent_inode, name, mode, _caller(ctx)))

    @handler
    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        return pack(await self._filesystem.mkdir(parent_inode, name, mode, _caller(ctx)))

    @handler
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self._filesystem.unlink(parent_inode, name)

    @handler
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self._filesystem.rmdir(parent_inode, name)

    @handler
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        await self._filesystem.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    @handler
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        made = await self._filesystem.symlink(parent_inode, name, target, _caller(ctx))
        return pack(made)

    @handler
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        return FileNameT(await self._filesystem.readlink(inode))

    @handler
    async def link(
        self,
        inode: InodeT,
        new_parent_inode: InodeT,
        new_name: FileNameT,
        ctx: RequestContext,
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)  # link(2): the filesystem does not support it

    # --- attributes -------------------------------------------------------------------------

    @handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return pack(await self._filesystem.getattr(inode))

    @handler
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        change = Change(
            size=attr.st_size if fields.update_size else None,
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            is_now=_is_now(self.fast_path.flags, fields),
        )
        return pack(await self._filesystem.setattr(inode, change, ctx.uid, by_path=fh is None))

    @handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        space = await self._filesystem.statfs()
        packed = StatvfsData()
        packed.f_bsize = packed.f_frsize = BLOCK_SIZE
        packed.f_blocks = space.blocks
        packed.f_bfree = packed.f_bavail = space.blocks_free
        packed.f_files = space.files
        packed.f_ffree = packed.f_favail = space.files_free
        packed.f_namemax = space.name_max
        return packed

    @handler
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        _asked.set(None)
        try:
            value = await self._xattrs.getxattr(inode, name, _caller(ctx))
        except NoAttributeError:
            _asked.set((ctx, False))
            raise
        _asked.set((ctx, True))
        return value

    @handler
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        return [XAttrNameT(name) for name in await self._xattrs.listxattr(inode)]

    @handler
    async def setxattr(
        self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext
    ) -> None:
        flags = self.fast_path.flags
        if flags is not None:
            is_there = {os.XATTR_CREATE: False, os.XATTR_REPLACE: True}.get(flags)
        else:
            asked = _asked.get()
            is_there = asked[1] if asked is not None and asked[0] is ctx else None
        await self._xattrs.setxattr(inode, name, value, is_there, _caller(ctx))

    @handler
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        await self._xattrs.removexattr(inode, name, _caller(ctx))

    # --- files ------------------------------------------------------------------------------

    @handler
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        handle = await self._filesystem.open(inode, flags, ctx.uid, ctx.pid)
        self._users[_FILE, handle] = ctx.uid
        self.openers.note(handle, flags, ctx.pid, inode)
        if self._store is not None and (value := self._files.to_store(handle)) is not None:
            self._store(inode, value)
        return self._info(handle)

    def _info(self, handle: int) -> FileInfo:
        opened = self._files.how(handle)
        return FileInfo(
            fh=FileHandleT(handle),
            keep_cache=self._keep_cache and opened.keeps_pages,
            direct_io=opened.is_direct,
        )

    @handler
    async def create(
        self,
        parent_inode: InodeT,
        name: FileNameT,
        mode: ModeT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> tuple[FileInfo, EntryAttributes]:
        handle, attributes = await self._filesystem.create(
            parent_inode, name, flags, mode, _caller(ctx)
        )
        self._users[_FILE, handle] = ctx.uid
        self.openers.note(handle, flags, ctx.pid, attributes.inode)
        return self._info(handle), pack(attributes)

    @handler
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        if self._unopened is not None and self.fast_path.opens_unseen:
            return await self._unopened.read(fh, off, size)
        return self._files.read(fh, off, size)

    @handler
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        return await self._files.write(fh, off, buf)

    @handler
    async def flush(self, fh: FileHandleT) -> None:
        await self._files.flush(fh, lambda: self.openers.has_still(fh))

    @handler
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self._files.flush(fh)

    @handler
    async def release(self, fh: FileHandleT) -> None:
        self._users.pop((_FILE, fh), None)
        self.openers.forget(fh)
        current.set(None)  # never refused: nobody would be told
        if self._files.may_wait_to_release(fh):
            # The kernel has few RELEASEs, READs and WRITEs at once that nobody waits for
            # (fs/fuse, max_background, 12): those that wait for etcd would stop the others.
            trio.lowlevel.spawn_system_task(self._release, fh)
        else:
            await self._files.release(fh)

    async def _release(self, fh: FileHandleT) -> None:
        try:
            await self._files.release(fh)
        except EtcdfsError as exc:
            log.log(exc.level, "release: %s", exc)
        except Exception:
            log.exception("release failed; this is a bug of etcdfs")

    # --- directories ------------------------------------------------------------------------

    @handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        handle = await self._filesystem.opendir(inode)
        self._users[_DIRECTORY, handle] = ctx.uid
        return FileHandleT(handle)

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        filesystem = self._filesystem
        start = max(0, start_id - _DOTS)
        if self.fast_path.keeps_listings:
            inode = int(fh)
            listing = await filesystem.readdir_by_inode(inode, start)
        else:
            inode = filesystem.opened_directory(fh)
            listing = await filesystem.readdir(fh, start)
        for position, (name, node) in enumerate(filesystem.dots(inode)):
            if position >= start_id:
                # The kernel takes no lookup for these two (fs/fuse/readdir.c,
                # fuse_direntplus_link).
                packed = pack(filesystem.attributes(node))
                if not pyfuse3.readdir_reply(token, FileNameT(name), packed, position + 1):
                    return
        for listed in listing:
            attributes = filesystem.attributes(listed.node)
            position = listed.position + _DOTS
            if not pyfuse3.readdir_reply(token, FileNameT(listed.name), pack(attributes), position):
                return
            filesystem.remember_listed(listed, attributes)

    @handler
    async def releasedir(self, fh: FileHandleT) -> None:
        self._users.pop((_DIRECTORY, fh), None)
        await self._filesystem.releasedir(fh)

    @handler
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Nothing to do: changes of names are in etcd when their call returns."""


@final
class FuseMount:
    """The kernel mount itself: a context that mounts, serves and takes down.

    Attributes:
        unmounts: Whether to unmount in the end. Not if another mount stands there by then: ours
            was taken away, and what we served since was a copy of it, as a container has it.
    """

    def __init__(self, operations: Operations, mountpoint: str, options: set[str]) -> None:
        """Prepare to mount `operations` over the directory `mountpoint`."""
        self._operations = operations
        self._mountpoint = mountpoint
        self._options = options
        self._is_abandoned = False
        self.unmounts = True

    def __enter__(self) -> Self:
        """Mount.

        Raises:
            FuseRefusedError: The kernel or fusermount3 said no.
        """
        logging.getLogger(pyfuse3.__name__).addFilter(quieten)
        said: list[str] = []
        try:
            with _listening_to_stderr(said):
                self._operations.fast_path.prepare()
                pyfuse3.init(self._operations, self._mountpoint, self._options)
        except RuntimeError as exc:
            why = said[-1] if said else exc
            msg = f"the kernel refused to mount on {self._mountpoint}: {why}"
            raise FuseRefusedError(msg) from exc
        for line in said:
            log.info("%s", line)
        try:
            self._operations.fast_path.check()
        except FuseRefusedError:
            pyfuse3.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Unmount, lazily if it is in use; but not after a crash, see `etcdfs.daemon.main`.

        A crash of another task arrives here as its cancellation of this one.
        """
        if not self._is_abandoned:
            pyfuse3.close(unmount=self.unmounts and error is None)

    async def run(self) -> None:
        """Serve requests until unmounted or stopped."""
        with few_turns():
            await pyfuse3.main(min_tasks=TASKS_MIN, max_tasks=MAX_TASKS)

    def abandon(self) -> None:
        """Leave the session as it is: a thread that cannot end goes on using it."""
        self._is_abandoned = True

    def stop(self) -> None:
        """Make `run` return once the requests under way are answered."""
        pyfuse3.terminate()


def quieten(record: logging.LogRecord) -> bool:
    """Make an answer that nobody waited for any more a debug message, when pyfuse3 logs it.

    The kernel forgets the requests that are under way when the mount is taken away (its
    `fuse_abort_conn`), and has no such request then: ENOENT. What it says of any other answer
    stays an error.
    """
    if str(record.msg).endswith(_NOT_ANSWERED) and record.args == (os.strerror(errno.ENOENT),):
        record.levelno, record.levelname = logging.DEBUG, logging.getLevelName(logging.DEBUG)
    return logging.getLogger(record.name).isEnabledFor(record.levelno)


@contextmanager
def _listening_to_stderr(said: list[str]) -> Iterator[None]:
    """Collect the lines that are written to stderr: libfuse and fusermount3 say why only there."""
    ours = os.dup(2)
    with os.fdopen(os.memfd_create("etcdfs-fuse"), "rb") as heard:
        os.dup2(heard.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(ours, 2)
            os.close(ours)
            heard.seek(0)
            said += filter(None, heard.read().decode(errors="replace").split("\n"))


_NOT_ANSWERED: Final = "fuse_reply_* failed with %s"

_FILE: Final = "file"
_DIRECTORY: Final = "directory"
_OF_DIRECTORIES: Final = frozenset(("readdir", "releasedir", "fsyncdir"))

_DOTS: Final = 2  # "." and ".." come first in every listing


# libfuse, fuse_lowlevel.h, FUSE_SET_ATTR_ATIME_NOW and FUSE_SET_ATTR_MTIME_NOW
_ATIME_NOW: Final = 1 << 7
_MTIME_NOW: Final = 1 << 8


def _is_now(flags: int | None, fields: SetattrFields) -> bool | None:
    """Say whether all times that are set are the present, None if that is not known."""
    if flags is None:
        return None
    return (not fields.update_atime or bool(flags & _ATIME_NOW)) and (
        not fields.update_mtime or bool(flags & _MTIME_NOW)
    )


def _caller(ctx: RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid)


def pack(attributes: Attributes) -> EntryAttributes:
    """Return attributes as pyfuse3 takes them."""
    packed = EntryAttributes()
    packed.st_ino = InodeT(attributes.inode)
    packed.st_mode = ModeT(attributes.mode)
    packed.st_nlink = attributes.nlink
    packed.st_uid = attributes.uid
    packed.st_gid = attributes.gid
    packed.st_size = attributes.size
    packed.st_blksize = BLOCK_SIZE
    packed.st_blocks = -(-attributes.size // SECTOR_SIZE)
    packed.st_atime_ns = attributes.atime_ns
    packed.st_mtime_ns = attributes.mtime_ns
    packed.st_ctime_ns = attributes.ctime_ns
    packed.entry_timeout = attributes.timeout_s
    packed.attr_timeout = attributes.timeout_s
    return packed
