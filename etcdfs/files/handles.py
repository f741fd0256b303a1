"""Open files: handles, reading, writing, and when a write buffer is written back.

Knows: the life of a handle from open to release, and the write buffer that all writers of a file
share. Does not know: names and directories, how a write buffer reaches etcd.

Concurrency: trio thread. `read` never awaits, so that no READ is in flight across an `await`
while the kernel holds the page lock.
"""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, NewType, final

from etcdfs.errors import BadHandleError, CallerError, EtcdfsError, ReadOnlyError
from etcdfs.files.write_buffer import WriteBuffer, WriteBufferQuota
from etcdfs.files.writeback import Writeback
from etcdfs.tree.inodes import NOT_IN_ETCD, Cached, File
from etcdfs.tree.value_cache import ValueCache
from etcdfs.tree.view import View

Handle = NewType("Handle", int)

STORE_MAX: Final = 128 * 1024
"""Bytes of a value that the kernel is given at open: as many as it asks for in one READ."""

PAGE: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class OpenFile:
    """One open file description.

    Attributes:
        file: What is read and written.
        inode: The one that the kernel has open. Not the file's own if that superseded it.
        readable, writable, append: How it was opened.
        publishes: Whether it is writable; or it made the file, which its close must put into etcd.
        keeps_pages: Whether what the kernel has cached of the inode is this version's.
    """

    file: File
    inode: int
    readable: bool
    writable: bool
    append: bool
    publishes: bool
    uid: int
    keeps_pages: bool

    @property
    def is_direct(self) -> bool:
        """Whether the kernel must ask for each byte: its pages are those of another version."""
        return self.inode != self.file.inode


@final
class Handles:
    """All open files of the mount, by handle."""

    def __init__(
        self,
        view: View,
        value_cache: ValueCache,
        writeback: Writeback,
        buffers: WriteBufferQuota,
        *,
        read_only: bool,
    ) -> None:
        # --- dependencies
        self._view = view
        self._value_cache = value_cache
        self._writeback = writeback
        self.buffers = buffers
        self.locks = writeback.locks
        # --- constants
        self._read_only = read_only
        # --- mutable state
        self._open: dict[Handle, OpenFile] = {}
        self._kept: set[File] = set()  # those without a name or a handle that the kernel holds
        self._leaving: set[File] = set()  # those whose last writer is being released
        self._next = 1

    def __len__(self) -> int:
        return len(self._open)

    # --- opening ----------------------------------------------------------------------------

    async def open(
        self, file: File, flags: int, inode: int | None = None, *, uid: int = 0
    ) -> Handle:
        """Open a file for a user, by its own inode or another one that it answers for.

        Raises:
            StaleError: It is an old version, of which the value is nowhere to be had.
            ReadOnlyError: It is opened for writing on a read-only mount.
            StoreError: Its value is not here and cannot be fetched.
        """
        changes = may_change(flags)
        if changes and self._read_only:
            msg = f"inode {file.inode}: the mount is read-only"
            raise ReadOnlyError(msg)
        self._pin(file)  # keeps it while we wait, and what it is
        file.pages_invalidated = False
        try:
            await self._load(file)
            if flags & os.O_TRUNC:
                async with self.locks.held(file):
                    self._buffer(file).truncate(0, self._now(file))
        except BaseException:
            self._unpin(file)
            raise
        return self._add(file, flags, inode or file.inode, uid, publishes=changes)

    def open_new(self, file: File, flags: int, uid: int = 0) -> Handle:
        """Open a file that was just made here; its content is whatever is written."""
        self._pin(file)
        file.pages_pushed = True  # it keeps what is written
        if file.key_state is None:
            buffer = WriteBuffer(b"", whole=True)
            buffer.is_bare = buffer.is_added = not flags & os.O_TRUNC
            buffer.changed_ns = buffer.mtime_ns = file.mtime_ns
            file.buffer = buffer
        else:
            file.value = b""
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        return self._add(file, flags, file.inode, uid, publishes=writable or file.key_state is None)

    async def _load(self, file: File) -> None:
        # Even a file that is about to be emptied: whether anything changes is decided against it.
        if file.value is None and file.buffer is None:
            # checkpoint: another open may have pinned it, or a writer made a write buffer
            value = await self._view.value(file)
            if file.value is None:
                file.value = value

    def _add(self, file: File, flags: int, inode: int, uid: int, *, publishes: bool) -> Handle:
        handle = Handle(self._next)
        self._next += 1
        access = flags & os.O_ACCMODE
        if file.pages is None and inode == file.inode:
            file.pages = file.version
        self._open[handle] = OpenFile(
            file,
            inode,
            access != os.O_WRONLY,
            access != os.O_RDONLY,
            bool(flags & os.O_APPEND),
            publishes,
            uid,
            keeps_pages=file.pages == file.version,
        )
        if inode != file.inode:
            self._note_newcomers(inode)
        return handle

    def how(self, handle: int) -> OpenFile:
        """Return how a file was opened.

        Raises:
            BadHandleError: It is not open.
        """
        return self._opened(handle)

    def to_store(self, handle: int) -> bytes | None:
        """Return what the kernel is to be given together with a handle; None: nothing.

        It is given a value once, and only with the one handle that there is of a version: nobody
        can be reading it then, and the kernel need not wait for a page.
        """
        opened = self._opened(handle)
        file = opened.file
        is_alone = file.handles == 1 and opened.readable and file.buffer is None
        is_alone = is_alone and opened.keeps_pages and not opened.is_direct
        if file.pages_pushed or not is_alone or not file.value or len(file.value) > STORE_MAX:
            return None
        file.pages_pushed = True
        return file.value

    # --- using ------------------------------------------------------------------------------

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """Return up to `size` bytes at `offset`; fewer only at the end of the file.

        Raises:
            StoreError: What is known must not be shown; see `View.check`.
        """
        self._view.check()
        file = self._opened(handle).file
        if isinstance(file.buffer, WriteBuffer):
            return file.buffer.read(offset, size)
        if file.value is None:
            msg = f"inode {file.inode} has no value loaded"
            raise BadHandleError(msg)
        return file.value[offset : offset + size]

    async def write(self, handle: int, offset: int, data: bytes) -> int:
        """Write into the write buffer; nothing reaches etcd before flush or fsync.

        Raises:
            FileTooLargeError: The value would not fit into etcd; this write did nothing, and
                what was written before is not written back: half a value is none.
            BufferShareError: Nor would all that the user has written fit into memory.
            BufferFullError: Nor all that all users have.
        """
        opened = self._opened(handle)
        if not opened.writable:
            msg = f"inode {opened.file.inode} is not open for writing"
            raise BadHandleError(msg)
        file = opened.file
        async with self.locks.held(file):
            buffer = self._buffer(file)
            is_mapped = (
                opened.append
                and self._may_be_mapped(opened)
                and _may_be_of_map(offset, len(data), len(buffer))
            )
            append = opened.append and not is_mapped
            end = buffer.end_of_write(offset, len(data), append=append)
            try:
                if end > len(buffer):
                    self._writeback.check_size(file, end)
                self.buffers.take(file, opened.uid, end)
            except CallerError:
                buffer.is_torn = True
                raise
            buffer.write(
                offset,
                data,
                append=append,
                now_ns=self._now(file),
                blind=not opened.readable and not is_mapped,
            )
            buffer.unreported.add(handle)
        if opened.is_direct:
            self._view.invalidate(self._unseen(opened))
        return len(data)

    def _unseen(self, opened: OpenFile) -> set[Cached]:
        """Return what the kernel does not know that a write through a handle has changed."""
        listing = self._view.update.tree.listing_of(opened.file)
        return {listing._replace(pages=True)}

    async def truncate(self, file: File, size: int, uid: int = 0, *, by_path: bool = False) -> None:
        """Cut or extend a file; published at once unless a writer will publish it.

        By its path, that is one who has written already. Through a descriptor (ftruncate(2)), it
        is whoever has it.
        """
        if self._read_only:
            msg = f"inode {file.inode}: the mount is read-only"
            raise ReadOnlyError(msg)
        self._pin(file)
        try:
            await self._load(file)
            async with self.locks.held(file):
                self._writeback.check_size(file, size)
                buffer = self._buffer(file)
                is_alone = not self._has_writer(file) or (by_path and not buffer.is_dirty)
                self.buffers.take(file, uid, size)
                if size != len(buffer) or buffer.is_torn:
                    buffer.truncate(size, self._now(file))
            if is_alone:
                await self._write_back_alone(file)
        finally:
            self._unpin(file)

    async def _write_back_alone(self, file: File) -> None:
        try:
            await self.write_back(file)
        except EtcdfsError:
            self._drop_buffer(file)  # nobody is left who could try again
            raise

    async def flush(self, handle: int, is_held: Callable[[], bool] = lambda: False) -> None:
        """Publish what was written, if anything was (close(2), fsync(2)).

        A shell's `echo x > file` opens, duplicates the descriptor, closes one and writes to the
        other: as long as its opener still holds one (`is_held`), an empty write buffer is not yet what
        the file is meant to be.

        Raises:
            EtcdfsError: As `Writeback.write_back`.
        """
        opened = self._opened(handle)
        buffer = opened.file.buffer
        if not opened.publishes or buffer is None:
            return  # a reader's close publishes nobody else's writes
        if isinstance(buffer, WriteBuffer) and not len(buffer) and is_held():
            return
        try:
            await self._writeback.write_back(opened.file)
        except EtcdfsError:
            if isinstance(buffer, WriteBuffer):
                buffer.is_refused = True
                if not is_held():  # else it may be a child's close, who wrote nothing
                    buffer.unreported.discard(handle)
            raise
        self._drop_clean_buffer(opened.file)
        if opened.is_direct:
            await self._view.invalidate_first(self._unseen(opened))

    def may_wait_to_release(self, handle: int) -> bool:
        """Say whether a release may have something to publish."""
        opened = self._opened(handle)
        return opened.publishes and opened.file.buffer is not None

    async def release(self, handle: int) -> None:
        """Close for good; what a memory map wrote after the last flush is written back now.

        Not what that flush could not publish: its caller was told that it failed, and must not
        find it done after all.

        Raises:
            EtcdfsError: As `Writeback.write_back`; nobody is told by the kernel.
        """
        opened = self._opened(handle)
        del self._open[Handle(handle)]
        try:
            refused = _is_refused(opened.file)
            if opened.publishes and not refused and not self._has_writeback(opened.file):
                self._leaving.add(opened.file)
                await self.write_back(opened.file)
        finally:
            self._leaving.discard(opened.file)
            if opened.is_direct:
                self._note_newcomers(opened.inode)
            elif opened.file.handles == 1:
                # The kernel has opened it since its version changed, if that was of another one,
                # and what it had cached was invalidated then; what was read after that is of this one.
                opened.file.pages = opened.file.version
            self._unpin(opened.file, opened.uid)

    def forgotten(self) -> None:
        """Note that the kernel has forgotten some inodes: what was kept for them need not be."""
        for file in [file for file in self._kept if not (file.lookups or file.handles)]:
            self._kept.discard(file)
            file.value = None
            self.buffers.give_back(file)

    def _note_newcomers(self, inode: int) -> None:
        """Note which version those have open who opened an inode past its own: the last of them.

        Its attributes are that version's as long as nobody has its own open.
        """
        node = self._view.update.tree.node(inode)
        if isinstance(node, File):
            theirs = [o.file for o in self._open.values() if o.inode == inode and o.is_direct]
            node.reopened = theirs[-1] if theirs else None

    async def write_back(self, file: File) -> None:
        """Publish a file's write buffer although nobody flushes it (before a rename)."""
        await self._writeback.write_back(file)
        self._drop_clean_buffer(file)

    def keep(self, file: File) -> None:
        """Keep the value of a file that is about to lose its name, while the kernel holds it."""
        key = self._view.update.tree.key_of(file)
        if file.value is None and file.key_state is not None and key is not None and file.lookups:
            file.value = self._value_cache.get(key, file.key_state.mod_revision)

    def give_up(
        self, keys: Collection[bytes | None], prefixes: Sequence[bytes | None] = ()
    ) -> None:
        """Note that names were taken away or replaced: no old version takes them again.

        Not by other clients but by this mount; the names of some keys, and all below some prefixes.
        Nothing in etcd may tell its late flush of that: what was put over a key by a rename is
        of the same incarnation, and what could not be made was never there.
        """
        below = tuple(prefix for prefix in prefixes if prefix is not None)
        for opened in self._open.values():
            lost = opened.file.lost_key
            if lost is not None and (lost in keys or lost.startswith(below)):
                opened.file.gone = True

    @property
    def max_file_size(self) -> int:
        """See `Writeback.max_file_size`."""
        return self._writeback.max_file_size

    def set_times(self, file: File, mtime_ns: int, atime_ns: int | None, *, keep: bool) -> None:
        """Show the times of unpublished writes as utimens(2) sets them.

        With `keep` they go to etcd along with what was written.
        """
        file.mtime_ns = mtime_ns
        if isinstance(file.buffer, WriteBuffer):
            file.buffer.mtime_ns = mtime_ns
            file.buffer.times = (mtime_ns, atime_ns) if keep else None

    async def flush_all(self) -> list[tuple[File, EtcdfsError]]:
        """Publish every write buffer, as at unmount; return the failures.

        Not what a flush could not publish, as in `release`.
        """
        failures: list[tuple[File, EtcdfsError]] = []
        for file in self._published():
            if _is_refused(file):
                continue
            try:
                await self.write_back(file)
            except EtcdfsError as exc:
                failures.append((file, exc))
        return failures

    def unpublished(self) -> list[bytes]:
        """Return the keys that are open with writes of which neither etcd nor an errno told."""
        lost = [
            f for f in self._published() if isinstance(f.buffer, WriteBuffer) and f.buffer.is_dirty
        ]
        keys = [self._view.update.tree.key_of(f) for f in lost if not _is_refused(f)]
        return sorted(key for key in keys if key is not None)

    # --- helpers ----------------------------------------------------------------------------

    def _opened(self, handle: int) -> OpenFile:
        opened = self._open.get(Handle(handle))
        if opened is None:
            msg = f"handle {handle} is not open"
            raise BadHandleError(msg)
        return opened

    def _buffer(self, file: File) -> WriteBuffer:
        if not isinstance(file.buffer, WriteBuffer):
            file.buffer = WriteBuffer(file.value or b"", whole=file.key_state is None)
        return file.buffer

    def _drop_clean_buffer(self, file: File) -> None:
        if isinstance(file.buffer, WriteBuffer) and not file.buffer.is_dirty:
            file.value = file.buffer.base
            file.buffer = None
            if self._view.update.tree.key_of(file) is not None:
                self.buffers.give_back(file)  # else nobody but its openers has it

    def _drop_buffer(self, file: File) -> None:
        file.buffer = None
        self.buffers.give_back(file)

    def _published(self) -> set[File]:
        """Return the files of which somebody may have written what etcd does not have."""
        return self._leaving | {o.file for o in self._open.values() if o.publishes}

    def _has_writer(self, file: File) -> bool:
        return any(o.file is file and o.writable for o in self._open.values())

    def _has_writeback(self, file: File) -> bool:
        return any(o.file is file and o.publishes for o in self._open.values())

    def _may_be_mapped(self, opened: OpenFile) -> bool:
        """Tell whether a write through a handle may be of a map that changes what it has open.

        That needs a descriptor that reads and writes (mmap(2), EACCES), whose handle stays for as
        long as the map does.
        """
        others = (o for o in self._open.values() if o.inode == opened.inode and not o.is_direct)
        return not opened.is_direct and any(o.readable and o.writable for o in others)

    def _now(self, file: File) -> int:
        return max(self._view.update.tree.clock(), file.mtime_ns + 1)

    def _pin(self, file: File) -> None:
        file.handles += 1
        self._view.update.tree.disturb(file)

    def _unpin(self, file: File, uid: int = 0) -> None:
        file.handles -= 1
        if file.handles:
            return
        if file.removed and file.lookups and self._keep_last(file, uid):
            file.buffer = None
        else:
            file.value = None
            self._drop_buffer(file)
        self._view.update.tree.prune(file)

    def _keep_last(self, file: File, uid: int) -> bool:
        """Let a file without a name stay what was written last, while the kernel holds it.

        As long as there is room: whoever holds it by O_PATH may open it again.
        """
        if isinstance(file.buffer, WriteBuffer):
            file.value = file.buffer.value
            file.key_state = (file.key_state or NOT_IN_ETCD)._replace(size=len(file.value))
        try:
            self.buffers.take(file, uid, len(file.value or b""))
        except CallerError:
            return False
        self._kept.add(file)
        return True


def may_change(flags: int) -> bool:
    """Say whether a file is opened to be changed.

    Linux empties one that is opened for reading with O_TRUNC, too (open(2), BUGS).
    """
    return flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)


def _is_refused(file: File) -> bool:
    """Say whether a write buffer could not be written back, and all who wrote to it were told."""
    buffer = file.buffer
    return isinstance(buffer, WriteBuffer) and buffer.is_refused and not buffer.unreported


def _may_be_of_map(offset: int, size: int, length: int) -> bool:
    """Tell whether a write through an O_APPEND handle is of pages that a memory map has changed.

    The kernel writes them back through any handle that can write. pyfuse3 does not tell us that it
    does; but these are whole pages, or end where the file does, and an append is behind that,
    unless the kernel does not know yet what others have appended.
    """
    end = offset + size
    return offset % PAGE == 0 and end <= length and (end % PAGE == 0 or end == length)
