"""A Linux kernel in memory: what fs/fuse and the VFS keep, lock and ask, and when they let go.

It caches names, missing names, attributes and pages for as long as the filesystem said, and with
the fast path listings for as long as the directory's mtime is the same. It lets go of what
`submit` names, and holds the lock of a directory during LOOKUP, READDIRPLUS (shared) and
CREATE, MKDIR, UNLINK, RMDIR, RENAME (exclusive), as the real one does. An invalidation of an
entry waits for that lock; jobs are done one after the other, as by the kernel door's thread.

A system call that fails raises `OSError`; an exception that is not an `EtcdfsError` passes.

Concurrency: trio primitives only. An answer of the filesystem takes a checkpoint to arrive.
"""

import errno
import os
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, final

import trio

from etcdfs.components import Components
from etcdfs.errors import EtcdfsError, NotFoundError
from etcdfs.files.handles import Handles
from etcdfs.files.writeback import Writeback
from etcdfs.keyspace.store import Clock
from etcdfs.mirror.mirror import Mirror, watch_over
from etcdfs.options import MountOptions
from etcdfs.tree.inodes import (
    Cached,
    CachedAttributes,
    Content,
    Dentry,
    Directory,
    Expiry,
    File,
    Inode,
)
from etcdfs.tree.tree import ROOT_INODE, Tree
from etcdfs.tree.value_cache import ValueCache
from etcdfs.uncached.uncached import Uncached
from etcdfs.vfs.attributes import Attributes, Caller, Change
from etcdfs.vfs.filesystem import Filesystem
from tests.support.fake_store import FakeStore

T = TypeVar("T")
Path = tuple[bytes, ...]

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
_S_IFMT, _S_IFDIR = 0o170000, 0o040000
_READDIR_ROOM = 3
"""Entries that fit into one READDIRPLUS answer."""


@final
class RwLock:
    """A directory's i_rwsem."""

    def __init__(self) -> None:
        self._readers = 0
        self._writer = False
        self._waiting = trio.lowlevel.ParkingLot()

    @asynccontextmanager
    async def held(self, *, exclusive: bool) -> AsyncIterator[None]:
        while self._writer or (exclusive and self._readers):
            await self._waiting.park()
        if exclusive:
            self._writer = True
        else:
            self._readers += 1
        try:
            yield
        finally:
            if exclusive:
                self._writer = False
            else:
                self._readers -= 1
            self._waiting.unpark_all()


@dataclass(eq=False, slots=True)
class KeptListing:
    """What a directory's pages have of its listing (fs/fuse/readdir.c, fuse_inode.rdc).

    Attributes:
        mtime_ns, changes: Of the directory, when the first entry was asked for.
        names: The entries that there are.
        position: Where the next one would be; -1 if a page is gone, so that there never is one.
        is_complete: Whether these are all.
    """

    mtime_ns: int
    changes: int
    names: list[bytes] = field(default_factory=list)
    position: int = 0
    is_complete: bool = False


@dataclass(eq=False, slots=True)
class KernelInode:
    """An inode in the kernel's memory."""

    number: int
    lookups: int = 0
    attributes: Attributes | None = None
    fresh_until: float = 0.0
    version: int = 0
    """Counts invalidations: an answer that was on its way then is not trusted (attr_version)."""
    pages: bytes | None = None
    listing: KeptListing | None = None
    changes: int = 0
    """Of a directory: counts names that the kernel itself knows to have changed (i_version)."""
    opens: int = 0
    lock: RwLock = field(default_factory=RwLock)

    @property
    def is_directory(self) -> bool:
        assert self.attributes is not None
        return self.attributes.mode & _S_IFMT == _S_IFDIR


@dataclass(eq=False, slots=True)
class KernelDentry:
    """A name in the dcache; without an inode it says that there is none."""

    inode: KernelInode | None
    fresh_until: float


@dataclass(frozen=True, slots=True)
class KernelHandle:
    """An open file description."""

    handle: int
    inode: KernelInode
    flags: int
    is_direct: bool


def fail(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@contextmanager
def errnos() -> Iterator[None]:
    """Raise what the filesystem refuses as the system call that fails."""
    try:
        yield
    except EtcdfsError as exc:
        raise OSError(exc.errno, str(exc)) from exc


@final
class FakeKernel:
    """One mount, from the kernel's side. Hand it to a `Mirror` as its `KernelCache`."""

    def __init__(self) -> None:
        # dependencies, see `mount`
        self._filesystem: Filesystem
        self._files: Handles
        # constants
        self.keep_cache = True
        self.keeps_listings = False
        # mutable state
        self.requests: Counter[str] = Counter()
        self.invalidated: list[Cached] = []
        self.inodes: dict[int, KernelInode] = {}
        self._dentries: dict[tuple[int, bytes], KernelDentry] = {}
        self._jobs: deque[tuple[list[Cached], Callable[[], None] | None]] = deque()
        self._wake = trio.Event()
        self._deaf: trio.Event | None = None
        self.is_idle = True
        self.unopened: set[Inode] = set()
        self.stick: Callable[[Inode | None, float | None], None]

    def mount(
        self, filesystem: Filesystem, files: Handles, *, keep_cache: bool, keeps_listings: bool
    ) -> None:
        """Serve a filesystem from now on."""
        self._filesystem = filesystem
        self._files = files
        self.keep_cache = keep_cache
        self.keeps_listings = keeps_listings
        self.inodes[ROOT_INODE] = KernelInode(ROOT_INODE, lookups=1)

    # --- notifications ----------------------------------------------------------------------

    def submit(self, cached: Collection[Cached], done: Callable[[], None] | None = None) -> None:
        """Queue a job; see `etcdfs.fuse.notify.KernelCache.submit`."""
        if not cached:
            if done is not None:
                done()
            return
        self._jobs.append((sorted(cached, key=repr), done))
        self.is_idle = False
        self._wake.set()

    def at_once(self, cached: Collection[Cached]) -> bool:
        """See `etcdfs.fuse.notify.KernelCache.at_once`."""
        if self._jobs or not self.is_idle or self._deaf is not None:
            return False
        for what in cached:
            assert isinstance(what, CachedAttributes), f"{what} takes a lock"
            inode = self.inodes.get(what.inode)
            assert not (what.pages and inode and inode.opens), f"{what} is open"
            if not self._invalidate_inode(what.inode, pages=what.pages):
                return False
            self.invalidated.append(what)
        return True

    def listen(self, listener: Callable[[Inode | None, float | None], None]) -> None:
        """See `etcdfs.fuse.notify.KernelCache.listen`; a test plays the kernel that is stuck."""
        self.stick = listener

    def hold_notifications(self) -> None:
        """Let no notification through until `release_notifications`."""
        if self._deaf is None:
            self._deaf = trio.Event()

    def release_notifications(self) -> None:
        """Let notifications through again."""
        if self._deaf is not None:
            self._deaf.set()
            self._deaf = None

    async def run(self) -> None:
        """Be the thread that makes the notifications, until cancelled."""
        while True:
            while not self._jobs:
                self.is_idle = True
                self._wake = trio.Event()
                await self._wake.wait()
            cached, done = self._jobs.popleft()
            for what in cached:
                while self._deaf is not None:
                    await self._deaf.wait()
                await trio.lowlevel.checkpoint()
                await self._invalidate(what)
                self.invalidated.append(what)
            if done is not None:
                done()

    async def _invalidate(self, what: Cached) -> None:
        match what:
            case Dentry(directory, name):
                await self._invalidate_entry(Dentry(directory, name))
            case Expiry(within):
                await self._invalidate_entry(within, expire_only=True)
            case Content():
                raise NotImplementedError("files are opened by request here")
            case CachedAttributes(number, within, pages):
                if not self._invalidate_inode(number, pages=pages) and within is not None:
                    await self._invalidate_entry(within, expire_only=True)
                    self._invalidate_inode(number, pages=pages)

    def _invalidate_inode(self, number: int, *, pages: bool) -> bool:
        """See fuse_reverse_inval_inode; a READ is answered at once here, so no page is locked."""
        inode = self.inodes.get(number)
        if inode is None:
            return False
        self._stale(inode)
        if pages:
            inode.pages = None
            self._drop_pages_of_listing(inode)
        return True

    def _drop_pages_of_listing(self, inode: KernelInode) -> None:
        listing = inode.listing
        if listing is not None and listing.is_complete:
            inode.listing = None  # as if it were missed by the next reader
        elif listing is not None and listing.names:
            listing.position = -1

    async def _invalidate_entry(self, entry: Dentry, *, expire_only: bool = False) -> None:
        """See fuse_reverse_inval_entry: the directory's lock, exclusively."""
        parent = self.inodes.get(entry.directory)
        if parent is None:
            return
        async with parent.lock.held(exclusive=True):
            dentry = self._dentries.get((entry.directory, entry.name))
            if dentry is None:
                return
            self._dir_changed(parent)
            if expire_only:
                dentry.fresh_until = 0.0
            else:
                self._drop(parent, entry.name)

    # --- caches -----------------------------------------------------------------------------

    def _stale(self, inode: KernelInode) -> None:
        inode.version += 1
        inode.fresh_until = 0.0

    def _dir_changed(self, directory: KernelInode) -> None:
        self._stale(directory)
        directory.changes += 1

    def _drop(self, directory: KernelInode, name: bytes) -> None:
        """Take a dentry out; what is below it stays, as if it were in use."""
        self._dentries.pop((directory.number, name), None)

    def _receive(self, attributes: Attributes, version: int | None) -> KernelInode:
        """Take in an answer about an inode (fuse_iget, fuse_change_attributes)."""
        inode = self.inodes.get(attributes.inode)
        if inode is None:
            inode = self.inodes[attributes.inode] = KernelInode(attributes.inode)
        elif version is not None and inode.version != version:
            return inode
        old = inode.attributes
        if old is not None and (old.size, old.mtime_ns) != (attributes.size, attributes.mtime_ns):
            inode.pages = None  # FUSE_AUTO_INVAL_DATA
        inode.attributes = attributes
        inode.fresh_until = trio.current_time() + attributes.timeout_s
        return inode

    def _forget(self, inode: KernelInode, count: int) -> None:
        inode.lookups -= count
        self.requests["forget"] += 1
        self._filesystem.forget([(inode.number, count)])

    def evict(self, number: int) -> bool:
        """Drop an inode from memory, with its dentries, unless it is in use."""
        inode = self.inodes.get(number)
        if inode is None or number == ROOT_INODE or inode.opens:
            return False
        below = [d for (n, _), d in self._dentries.items() if n == number]
        if any(dentry.inode is not None for dentry in below):
            return False
        for key in [k for k, d in self._dentries.items() if d.inode is inode or k[0] == number]:
            del self._dentries[key]
        del self.inodes[number]
        self._forget(inode, inode.lookups)
        return True

    def evict_all(self) -> None:
        """Drop whatever is not in use."""
        while sum(self.evict(number) for number in list(self.inodes)):
            pass

    def unreferenced(self) -> list[int]:
        """Return inodes that no dentry leads to, open ones left out."""
        named = {d.inode.number for d in self._dentries.values() if d.inode is not None}
        return [n for n, i in self.inodes.items() if n not in named and not i.opens]

    def check_coherence(self, tree: Tree, filesystem: Filesystem) -> None:
        """Assert that what would be answered from the caches is what the tree says."""
        now = trio.current_time()
        self._check_what_is_open(tree, filesystem)
        pending: list[tuple[Directory, Path]] = [(tree.root, ())]
        while pending:
            directory, path = pending.pop()
            inode = self.inodes[directory.inode]
            attributes = filesystem.attributes(directory)
            if inode.attributes is not None and inode.fresh_until > now:
                _same(inode.attributes, attributes, path)
                attributes = inode.attributes
            if _is_shown(inode, attributes):
                assert inode.listing is not None
                names = inode.listing.names
                assert sorted(names) == sorted(directory.children), f"{path}: an older listing"
            for (number, name), dentry in self._dentries.items():
                if number != directory.inode or dentry.fresh_until <= now:
                    continue
                child = directory.children.get(name)
                where = (*path, name)
                if dentry.inode is None:
                    assert child is None, f"{where}: cached as missing, and it is there"
                    continue
                assert child is not None, f"{where}: cached, and it is gone"
                assert child.inode == dentry.inode.number, f"{where}: an older inode is cached"
                if isinstance(child, Directory):
                    pending.append((child, where))
                elif dentry.inode.attributes is not None and dentry.inode.fresh_until > now:
                    _same(dentry.inode.attributes, filesystem.attributes(child), where)
                if isinstance(child, File) and child.buffer is None and child.value is not None:
                    pages = dentry.inode.pages
                    assert pages is None or pages == child.value, f"{where}: older pages"

    def _check_what_is_open(self, tree: Tree, filesystem: Filesystem) -> None:
        for inode in [inode for inode in self.inodes.values() if inode.opens]:
            if inode.attributes is not None and inode.fresh_until > trio.current_time():
                current = filesystem.attributes(tree.node(inode.number))
                _same(inode.attributes, current, (b"what is open",))

    # --- names ------------------------------------------------------------------------------

    async def walk(self, path: Path) -> KernelInode:
        """Resolve a path, with one more try that believes nothing after ESTALE."""
        return await self._retry(lambda reval: self._walk(path, reval=reval))

    async def _retry(self, attempt: Callable[[bool], Awaitable[T]]) -> T:
        try:
            return await attempt(False)
        except OSError as exc:
            if exc.errno != errno.ESTALE:
                raise
        return await attempt(True)

    async def _walk(self, path: Path, *, reval: bool) -> KernelInode:
        inode = self.inodes[ROOT_INODE]
        for name in path:
            if inode.number != ROOT_INODE and not inode.is_directory:
                raise fail(errno.ENOTDIR)
            found = await self._lookup(inode, name, reval=reval)
            if found is None:
                raise fail(errno.ENOENT)
            inode = found
        return inode

    async def _lookup(
        self, directory: KernelInode, name: bytes, *, reval: bool = False, locked: bool = False
    ) -> KernelInode | None:
        """Find a name (lookup_fast, fuse_dentry_revalidate, lookup_slow)."""
        dentry = self._dentries.get((directory.number, name))
        if dentry is not None and dentry.fresh_until > trio.current_time() and not reval:
            return dentry.inode
        if dentry is not None and dentry.inode is not None:
            # Without the directory's lock, unless the caller has it.
            inode = dentry.inode
            version = inode.version
            answer, _ = await self._ask(directory, name)
            if answer is not None and answer.inode == inode.number:
                inode.lookups += 1
                self._receive(answer, version)
                # Unhashed meanwhile, it is good for this walk alone.
                dentry.fresh_until = trio.current_time() + answer.timeout_s
                return inode
            if answer is not None:
                self._filesystem.forget([(answer.inode, 1)])
            if self._dentries.get((directory.number, name)) is dentry:
                self._drop(directory, name)
        if locked:
            return await self._lookup_slow(directory, name)
        async with directory.lock.held(exclusive=False):
            return await self._lookup_slow(directory, name)

    async def _lookup_slow(self, directory: KernelInode, name: bytes) -> KernelInode | None:
        answer, timeout_s = await self._ask(directory, name)
        now = trio.current_time()
        if answer is None:
            self._dentries[directory.number, name] = KernelDentry(None, now + timeout_s)
            return None
        inode = self._receive(answer, None)
        inode.lookups += 1
        self._dentries[directory.number, name] = KernelDentry(inode, now + answer.timeout_s)
        return inode

    async def _ask(self, directory: KernelInode, name: bytes) -> tuple[Attributes | None, float]:
        """Send LOOKUP; of a missing name, return how long it may be taken for missing."""
        self.requests["lookup"] += 1
        timeout_s = self._filesystem.kernel_timeout_s
        answer = None
        with errnos():
            try:
                answer = await self._filesystem.lookup(directory.number, name)
            except NotFoundError:
                timeout_s = 0.0
        await trio.lowlevel.checkpoint()
        return answer, timeout_s

    async def stat(self, path: Path) -> Attributes:
        """stat(2)."""

        async def attempt(reval: bool) -> Attributes:
            return await self.fstat(await self._walk(path, reval=reval))

        return await self._retry(attempt)

    async def fstat(self, inode: KernelInode) -> Attributes:
        """GETATTR, unless the attributes are fresh."""
        if inode.attributes is None or inode.fresh_until <= trio.current_time():
            version = inode.version
            self.requests["getattr"] += 1
            with errnos():
                answer = await self._filesystem.getattr(inode.number)
            await trio.lowlevel.checkpoint()
            self._receive(answer, version)
            return answer
        return inode.attributes

    async def listdir(self, path: Path) -> list[bytes]:
        """getdents(2), with READDIRPLUS."""
        inode = await self.walk(path)
        if inode.number != ROOT_INODE and not inode.is_directory:
            raise fail(errno.ENOTDIR)
        inode.opens += 1
        if self.keeps_listings:
            try:
                return sorted(await self._listdir_kept(inode))  # by hash: any order will do
            finally:
                inode.opens -= 1
        self.requests["opendir"] += 1
        names: list[bytes] = []
        with errnos():
            handle = await self._filesystem.opendir(inode.number)
            try:
                position, more = 0, True
                while more:
                    async with inode.lock.held(exclusive=False):
                        before = len(names)
                        position = await self._readdir(inode, handle, position, names)
                        more = len(names) > before
            finally:
                await self._filesystem.releasedir(handle)
                inode.opens -= 1
        return names

    async def _listdir_kept(self, inode: KernelInode) -> list[bytes]:
        """List a directory that is not opened (fuse_readdir_cached, fuse_readdir_uncached)."""
        async with inode.lock.held(exclusive=False):
            attributes = await self.fstat(inode)  # FUSE_AUTO_INVAL_DATA
            if _is_shown(inode, attributes):
                assert inode.listing is not None
                return list(inode.listing.names)
        if inode.listing is None or inode.listing.is_complete:
            inode.listing = KeptListing(attributes.mtime_ns, inode.changes)
        names: list[bytes] = []
        position, more = 0, True
        while more:
            async with inode.lock.held(exclusive=False):
                before = len(names)
                position = await self._readdir(inode, None, position, names)
                more = len(names) > before
        self._end_listing(inode, position)
        return names

    def _end_listing(self, directory: KernelInode, position: int) -> None:
        kept = directory.listing
        if kept is not None and kept.position == position:
            kept.is_complete = True

    async def _readdir(
        self, directory: KernelInode, handle: int | None, position: int, names: list[bytes]
    ) -> int:
        self.requests["readdir"] += 1
        filesystem = self._filesystem
        answer: list[tuple[bytes, int, Attributes]] = []
        with errnos():
            listing = (
                await filesystem.readdir_by_inode(directory.number, position)
                if handle is None
                else await filesystem.readdir(handle, position)
            )
        for listed in listing:
            if len(answer) == _READDIR_ROOM:
                break
            attributes = filesystem.attributes(listed.node)
            filesystem.remember_listed(listed, attributes)
            answer.append((listed.name, listed.position, attributes))
        await trio.lowlevel.checkpoint()
        for name, after, attributes in answer:
            names.append(name)
            kept = directory.listing
            if kept is not None and not kept.is_complete and kept.position == position:
                kept.names.append(name)
                kept.position = after
            position = after
            inode = self._receive(attributes, None)
            inode.lookups += 1
            until = trio.current_time() + attributes.timeout_s
            self._dentries[directory.number, name] = KernelDentry(inode, until)
        return position

    # --- files ------------------------------------------------------------------------------

    async def open(self, path: Path, flags: int) -> KernelHandle:
        """open(2), O_CREAT and O_EXCL included."""
        if flags & os.O_CREAT:
            return await self._retry(lambda reval: self._open_or_create(path, flags, reval))

        async def attempt(reval: bool) -> KernelHandle:
            return await self._open(await self._walk(path, reval=reval), flags)

        return await self._retry(attempt)

    async def reopen(self, inode: KernelInode, flags: int) -> KernelHandle:
        """open(2) of what is held: a bind mount, say. No path is looked up."""
        return await self._retry(lambda _reval: self._open(inode, flags))

    async def _open(self, inode: KernelInode, flags: int) -> KernelHandle:
        if inode.number == ROOT_INODE or inode.is_directory:
            raise fail(errno.EISDIR)
        await self.fstat(inode)  # may_open with default_permissions
        self.requests["open"] += 1
        inode.opens += 1
        try:
            with errnos():
                thread = id(trio.lowlevel.current_task())
                handle = await self._filesystem.open(inode.number, flags, thread=thread)
        except OSError:
            inode.opens -= 1
            raise
        if self.keep_cache and (value := self._files.to_store(handle)) is not None:
            assert inode.pages in (None, value), "what the kernel has is not what it is given"
            inode.pages = value
        await trio.lowlevel.checkpoint()
        return self._opened(handle, inode, flags)

    def _opened(self, handle: int, inode: KernelInode, flags: int) -> KernelHandle:
        opened = self._files.how(handle)
        if not (self.keep_cache and opened.keeps_pages) and not opened.is_direct:
            inode.pages = None
        if flags & os.O_TRUNC:
            inode.pages = b""
            self._stale(inode)
        return KernelHandle(handle, inode, flags, opened.is_direct)

    async def _open_or_create(self, path: Path, flags: int, reval: bool) -> KernelHandle:
        directory = await self._walk_directory(path[:-1], reval=reval)
        async with directory.lock.held(exclusive=True):
            inode = await self._lookup(directory, path[-1], reval=reval, locked=True)
            if inode is None:
                return await self._create(directory, path[-1], flags)
            if flags & os.O_EXCL:
                raise fail(errno.EEXIST)
        return await self._open(inode, flags)

    async def _create(self, directory: KernelInode, name: bytes, flags: int) -> KernelHandle:
        self.requests["create"] += 1
        with errnos():
            handle, answer = await self._filesystem.create(directory.number, name, flags)
        await trio.lowlevel.checkpoint()
        inode = self._made(directory, name, answer)
        inode.opens += 1
        return self._opened(handle, inode, flags)

    def _made(self, directory: KernelInode, name: bytes, answer: Attributes) -> KernelInode:
        inode = self._receive(answer, None)
        inode.lookups += 1
        until = trio.current_time() + answer.timeout_s
        self._dentries[directory.number, name] = KernelDentry(inode, until)
        self._dir_changed(directory)
        return inode

    async def readlink(self, path: Path) -> bytes:
        """readlink(2); the fast path has the target kept in the inode's pages."""

        async def attempt(reval: bool) -> bytes:
            inode = await self._walk(path, reval=reval)
            if inode.pages is not None:
                return inode.pages
            self.requests["readlink"] += 1
            with errnos():
                target = await self._filesystem.readlink(inode.number)
            await trio.lowlevel.checkpoint()
            if self.keeps_listings:
                inode.pages = target
            return target

        return await self._retry(attempt)

    async def read(self, handle: KernelHandle, offset: int = 0, size: int = 1 << 20) -> bytes:
        """pread(2), through the page cache."""
        inode = handle.inode
        if handle.is_direct:
            self.requests["read"] += 1
            with errnos():
                return self._files.read(handle.handle, offset, size)
        end = (await self.fstat(inode)).size
        if inode.pages is None:
            self.requests["read"] += 1
            with errnos():
                data = self._files.read(handle.handle, 0, 1 << 20)
            inode.pages = data[:end]
        return inode.pages[:end][offset : offset + size]

    async def write(self, handle: KernelHandle, offset: int, data: bytes) -> int:
        """pwrite(2), or write(2) with O_APPEND."""
        inode = handle.inode
        if handle.flags & os.O_APPEND:
            offset = (await self.fstat(inode)).size
        self.requests["write"] += 1
        with errnos():
            written = await self._files.write(handle.handle, offset, data)
        if inode.pages is not None and not handle.is_direct:
            pages = inode.pages.ljust(offset, b"\0")
            inode.pages = pages[:offset] + data + pages[offset + len(data) :]
        self._stale(inode)
        return written

    async def truncate(self, inode: KernelInode, size: int, *, by_path: bool = False) -> None:
        """ftruncate(2), or truncate(2) of a path that has been walked."""
        self.requests["setattr"] += 1
        with errnos():
            answer = await self._filesystem.setattr(
                inode.number, Change(size=size), by_path=by_path
            )
        pages = inode.pages
        self._receive(answer, None)
        inode.pages = None if pages is None else pages[:size].ljust(size, b"\0")

    async def flush(self, handle: KernelHandle) -> None:
        """What each close(2) sends, and fsync(2) too."""
        self.requests["flush"] += 1
        with errnos():
            await self._files.flush(handle.handle)

    async def release(self, handle: KernelHandle) -> None:
        """What the last close sends; nobody hears of its error."""
        self.requests["release"] += 1
        try:
            await self._files.release(handle.handle)
        except EtcdfsError:
            pass
        finally:
            handle.inode.opens -= 1

    async def close(self, handle: KernelHandle) -> None:
        """close(2) of the only descriptor."""
        try:
            await self.flush(handle)
        finally:
            await self.release(handle)

    # --- changing names ---------------------------------------------------------------------

    async def _walk_directory(self, path: Path, *, reval: bool = False) -> KernelInode:
        inode = await self._walk(path, reval=reval)
        if inode.number != ROOT_INODE and not inode.is_directory:
            raise fail(errno.ENOTDIR)
        return inode

    async def mkdir(
        self, path: Path, mode: int | None = None, caller: Caller | None = None
    ) -> None:
        """mkdir(2)."""
        await self._make(
            path, lambda parent, name: self._filesystem.mkdir(parent, name, mode, caller)
        )

    async def mknod(self, path: Path, mode: int = 0o644, caller: Caller | None = None) -> None:
        """mknod(2) of a regular file."""
        kind = 0o100000 | mode
        await self._make(
            path, lambda parent, name: self._filesystem.mknod(parent, name, kind, caller)
        )

    async def _make(self, path: Path, make: Callable[[int, bytes], Awaitable[Attributes]]) -> None:
        directory = await self._walk_directory(path[:-1])
        async with directory.lock.held(exclusive=True):
            if await self._lookup(directory, path[-1], locked=True) is not None:
                raise fail(errno.EEXIST)
            self.requests["mkdir"] += 1
            try:
                with errnos():
                    answer = await make(directory.number, path[-1])
            except OSError as exc:
                if exc.errno == errno.EEXIST:
                    self._drop(directory, path[-1])
                raise
            await trio.lowlevel.checkpoint()
            self._made(directory, path[-1], answer)

    async def unlink(self, path: Path) -> None:
        """unlink(2)."""
        await self._remove(path, self._filesystem.unlink, directory=False)

    async def rmdir(self, path: Path) -> None:
        """rmdir(2)."""
        await self._remove(path, self._filesystem.rmdir, directory=True)

    async def _remove(
        self, path: Path, remove: Callable[[int, bytes], Awaitable[None]], *, directory: bool
    ) -> None:
        parent = await self._walk_directory(path[:-1])
        async with parent.lock.held(exclusive=True):
            inode = await self._lookup(parent, path[-1], locked=True)
            if inode is None:
                raise fail(errno.ENOENT)
            if directory != inode.is_directory:
                raise fail(errno.ENOTDIR if directory else errno.EISDIR)
            async with inode.lock.held(exclusive=True):
                self.requests["unlink"] += 1
                try:
                    with errnos():
                        await remove(parent.number, path[-1])
                except OSError as exc:
                    if exc.errno == errno.ENOENT:
                        self._drop(parent, path[-1])
                    raise
                await trio.lowlevel.checkpoint()
                self._unlinked(inode)
                self._drop(parent, path[-1])
                self._dir_changed(parent)

    def _unlinked(self, inode: KernelInode) -> None:
        self._stale(inode)

    async def rename(self, old: Path, new: Path, flags: int = 0) -> None:
        """renameat2(2)."""
        source = await self._walk_directory(old[:-1])
        target = await self._walk_directory(new[:-1])
        first, second = sorted((source, target), key=lambda inode: inode.number)
        async with first.lock.held(exclusive=True):
            if second is first:
                await self._rename(source, old, target, new, flags)
            else:
                async with second.lock.held(exclusive=True):
                    await self._rename(source, old, target, new, flags)

    async def _rename(
        self, source: KernelInode, old_path: Path, target: KernelInode, new_path: Path, flags: int
    ) -> None:
        old, new = old_path[-1], new_path[-1]
        inode = await self._lookup(source, old, locked=True)
        if inode is None:
            raise fail(errno.ENOENT)
        replaced = await self._lookup(target, new, locked=True)
        if replaced is inode:
            return
        _check_not_below(old_path, new_path, flags)
        _check_kinds(inode, replaced, flags)
        self.requests["rename"] += 1
        try:
            with errnos():
                await self._filesystem.rename(source.number, old, target.number, new, flags)
        except OSError as exc:
            if exc.errno == errno.ENOENT:
                self._drop(source, old)
                self._drop(target, new)
            raise
        await trio.lowlevel.checkpoint()
        for changed in (inode, replaced):
            if changed is not None:
                self._stale(changed)
        self._dir_changed(source)
        self._dir_changed(target)
        if flags == RENAME_EXCHANGE:
            self._exchange((source.number, old), (target.number, new))
            return
        # d_move: the dentry keeps the time it was given at its old name.
        moved = self._dentries.pop((source.number, old), None)
        if moved is not None:
            self._dentries[target.number, new] = moved

    def _exchange(self, *names: tuple[int, bytes]) -> None:
        """d_exchange."""
        first, second = (self._dentries.pop(name, None) for name in names)
        for name, dentry in zip(names, (second, first), strict=True):
            if dentry is not None:
                self._dentries[name] = dentry


def _check_kinds(inode: KernelInode, replaced: KernelInode | None, flags: int) -> None:
    """Refuse what the kernel finds when it knows both (fs/namei.c, do_renameat2, vfs_rename)."""
    if replaced is None:
        if flags == RENAME_EXCHANGE:
            raise fail(errno.ENOENT)
    elif flags == RENAME_NOREPLACE:
        raise fail(errno.EEXIST)
    elif not flags and replaced.is_directory != inode.is_directory:
        raise fail(errno.EISDIR if replaced.is_directory else errno.ENOTDIR)


def _check_not_below(old: Path, new: Path, flags: int) -> None:
    """Refuse what the kernel finds when it takes the locks (fs/namei.c, lock_rename)."""
    if new[: len(old)] == old:
        raise fail(errno.EINVAL)
    if old[: len(new)] == new:
        raise fail(errno.EINVAL if flags == RENAME_EXCHANGE else errno.ENOTEMPTY)


@dataclass(slots=True)
class FakeMount:
    """Everything between a store and a kernel that are both fakes."""

    store: FakeStore
    kernel: FakeKernel
    tree: Tree
    value_cache: ValueCache
    view: Mirror | Uncached
    writeback: Writeback
    files: Handles
    filesystem: Filesystem

    @property
    def mirror(self) -> Mirror:
        assert isinstance(self.view, Mirror)
        return self.view

    async def start(self, nursery: trio.Nursery) -> None:
        """Start the kernel, and list and watch if there is a mirror."""
        nursery.start_soon(self.kernel.run)
        if isinstance(self.view, Mirror):
            await nursery.start(self.view.run, lambda _keys, _size: None)
            if self.view.stored_records is not None:
                await nursery.start(self.view.stored_records.run)
            nursery.start_soon(watch_over, self.view)

    def check_invariants(self) -> None:
        self.tree.check_invariants()
        self.value_cache.check_invariants()


def make_mount(store: FakeStore, *, clock: Clock | None = None, **options: Any) -> FakeMount:
    """Put a mount together, by the code that production uses; from within trio.

    Its options are those of a mount; a few have other defaults, where tests want that.
    """
    usual = {"cache": True, "cache_size": 1 << 20, "audit_interval_s": 0.0, "uid": 7, "gid": 8}
    kernel = FakeKernel()
    made = Components(
        MountOptions(**{"mountpoint": "/mnt", **usual, **options}),
        store,
        kernel,
        statistics=dict,
        clock=clock or _trio_clock,
    )
    kernel.mount(
        made.filesystem,
        made.files,
        keep_cache=made.options.cache,
        keeps_listings=made.options.kernel_lifetime_s > 0,
    )
    return FakeMount(
        store,
        kernel,
        made.tree,
        made.value_cache,
        made.view,
        made.writeback,
        made.files,
        made.filesystem,
    )


@asynccontextmanager
async def open_mount(store: FakeStore, **options: Any) -> AsyncIterator[FakeMount]:
    """Run a mount, made by `make_mount`, as long as the context lasts."""
    mount = make_mount(store, **options)
    async with trio.open_nursery() as nursery:
        await mount.start(nursery)
        yield mount
        mount.check_invariants()
        nursery.cancel_scope.cancel()


def _trio_clock() -> int:
    return int(trio.current_time() * 1e9)


def _is_shown(directory: KernelInode, attributes: Attributes) -> bool:
    """Say whether the listing that is kept is shown, as the directory has these attributes."""
    listing = directory.listing
    return (
        listing is not None
        and listing.is_complete
        and (listing.mtime_ns, listing.changes) == (attributes.mtime_ns, directory.changes)
    )


def _same(cached: Attributes, true: Attributes, path: Path) -> None:
    seen = (cached.inode, cached.mode, cached.nlink, cached.size, cached.mtime_ns)
    wanted = (true.inode, true.mode, true.nlink, true.size, true.mtime_ns)
    assert seen == wanted, f"{path}: cached attributes {seen}, true {wanted}"
