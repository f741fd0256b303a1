"""The calls that programs of this mount make, and the same on tmpfs.

Knows: one rule for each family of system calls. Does not know: etcd.

Concurrency: plain blocking calls.
"""

import mmap
import os
import stat
from functools import partial

from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.mount.machine.ground import (
    OLD_TIMES,
    Ground,
    Where,
    any_choices,
    any_flags,
    any_modes,
    any_sizes,
    any_targets,
    any_where,
    path_at,
    times_of,
    user_names,
)
from tests.mount.machine.twins import Slot, StoredRecord, outcome
from tests.mount.posix.calls import fallocate, renameat2


class LocalRules(Ground):
    """Open files, names and attributes."""

    # --- open files -----------------------------------------------------------------------------

    @rule(where=any_where, flags=any_flags, mode=any_modes)
    def open(self, where: Where, flags: int, mode: int) -> None:
        self.open_at(self.pick(where), flags, mode)

    @rule(choice=any_choices)
    def close(self, choice: int) -> None:
        self.close_slot(self.slot(choice, old=True))

    @rule(choice=any_choices)
    def dup(self, choice: int) -> None:
        slot = self.slot(choice, old=True)
        fds = os.dup(slot.fds[0]), os.dup(slot.fds[1])
        self.twins.slots.append(Slot(fds, slot.inode, slot.flags, slot.is_overtaken))
        self.close_slot(slot)  # so that what is shared is used on

    @rule(choice=any_choices, offset=any_sizes, size=any_sizes, positioned=st.booleans())
    def read(self, choice: int, offset: int, size: int, positioned: bool) -> None:
        slot = self.slot(choice, old=True)
        if positioned:
            self.twins.same("pread", lambda s: os.pread(slot.fds[s.at], size, offset))
        else:
            self.twins.same("read", lambda s: os.read(slot.fds[s.at], size))

    @rule(choice=any_choices, offset=st.none() | any_sizes, size=any_sizes)
    def write(self, choice: int, offset: int | None, size: int) -> None:
        slot = self.slot(choice)
        data = self.data(size)
        before = self.content(slot)
        if offset is None:
            self.twins.same("write", lambda s: os.write(slot.fds[s.at], data))
        else:
            self.twins.same("pwrite", lambda s: os.pwrite(slot.fds[s.at], data, offset))
        self.note_same(slot, before)

    @rule(choice=any_choices, offset=st.integers(-5, 5000), whence=st.sampled_from([0, 1, 2]))
    def lseek(self, choice: int, offset: int, whence: int) -> None:
        slot = self.slot(choice, old=True)
        if not stat.S_ISDIR(os.fstat(slot.fds[1]).st_mode):
            self.twins.same("lseek", lambda s: os.lseek(slot.fds[s.at], offset, whence))

    @rule(choice=any_choices, offset=any_sizes)
    def seek_data(self, choice: int, offset: int) -> None:
        """`SEEK_HOLE` differs."""
        slot = self.slot(choice)
        found = os.fstat(slot.fds[1])
        if not stat.S_ISREG(found.st_mode):
            return
        for whence, expected in ((os.SEEK_DATA, offset), (os.SEEK_HOLE, found.st_size)):
            there = outcome(partial(self.seek_in_mount, slot, offset, whence), self.twins.mount)
            right = (None, expected) if offset < found.st_size else ("ENXIO", None)
            if there != right:
                self.twins.differ(f"lseek {whence}: {there} instead of {right}")
            os.lseek(slot.fds[1], os.lseek(slot.fds[0], 0, os.SEEK_CUR), os.SEEK_SET)

    @staticmethod
    def seek_in_mount(slot: Slot, offset: int, whence: int, side: StoredRecord) -> int:
        return os.lseek(slot.fds[side.at], offset, whence)

    @rule(choice=any_choices, size=any_sizes)
    def ftruncate(self, choice: int, size: int) -> None:
        slot = self.slot(choice)
        before = self.content(slot)
        self.twins.same("ftruncate", lambda s: os.ftruncate(slot.fds[s.at], size))
        self.note_same(slot, before)

    @rule(choice=any_choices, only_data=st.booleans())
    def fsync(self, choice: int, only_data: bool) -> None:
        self.sync(self.slot(choice), os.fdatasync if only_data else os.fsync)

    @rule(choice=any_choices, offset=any_sizes, size=any_sizes, writes=st.booleans())
    def map(self, choice: int, offset: int, size: int, writes: bool) -> None:
        slot = self.slot(choice)
        found = os.fstat(slot.fds[1])
        if not stat.S_ISREG(found.st_mode):
            return
        data = self.data(size)
        end = min(found.st_size, offset + size)
        before = self.content(slot)
        flags = mmap.PROT_READ | (mmap.PROT_WRITE if writes else 0)

        def call(side: StoredRecord) -> bytes:
            length = max(1, found.st_size)
            with mmap.mmap(slot.fds[side.at], length, mmap.MAP_SHARED, flags) as memory:
                seen = memory[: found.st_size]
                if writes and offset < end:
                    memory[offset:end] = data[: end - offset]
                    memory.flush()
            return seen

        if found.st_size:
            self.twins.same(("mmap", slot, writes), call)
            self.note_same(slot, before)

    @rule(
        source=any_choices,
        into=any_choices,
        count=any_sizes,
        offsets=st.tuples(st.none() | any_sizes, st.none() | any_sizes),
    )
    def copy_file_range(
        self, source: int, into: int, count: int, offsets: tuple[int | None, int | None]
    ) -> None:
        written = self.slot(into)
        read = self.slot(source, old=True)
        before = self.content(written)

        def call(side: StoredRecord) -> int:
            fds = read.fds[side.at], written.fds[side.at]
            return os.copy_file_range(*fds, count, offsets[0], offsets[1])

        self.twins.same(("copy_file_range", read, written, count, offsets), call)
        self.note_same(written, before)

    @rule(choice=any_choices, offset=any_sizes, size=any_sizes, own=st.booleans())
    def allocate(self, choice: int, offset: int, size: int, own: bool) -> None:
        """`fallocate` differs; what glibc makes of it does not."""
        slot = self.slot(choice)
        is_file = stat.S_ISREG(os.fstat(slot.fds[1]).st_mode)
        if own and is_file and slot.is_writable and size:
            self.refuses("fallocate", lambda s: fallocate(slot.fds[s.at], 0, offset, size))
        elif is_file and not slot.flags & os.O_APPEND:  # glibc's way is EBADF then
            before = self.content(slot)
            self.twins.same("allocate", lambda s: os.posix_fallocate(slot.fds[s.at], offset, size))
            self.note_same(slot, before)

    # --- names ----------------------------------------------------------------------------------

    @rule(where=any_where, mode=any_modes)
    def mkdir(self, where: Where, mode: int) -> None:
        path = self.pick(where)
        if self.twins.same(("mkdir", path), lambda s: os.mkdir(s.path(path), mode)):
            self.marked.add(os.stat(self.at(path)).st_ino)

    @rule(where=any_where)
    def rmdir(self, where: Where) -> None:
        path = self.pick(where)
        self.twins.same(("rmdir", path), lambda s: os.rmdir(s.path(path)))

    @rule(where=any_where)
    def unlink(self, where: Where) -> None:
        path = self.pick(where)
        self.twins.same(("unlink", path), lambda s: os.unlink(s.path(path)))

    @rule(source=any_where, new=any_where, flags=st.sampled_from([0, 0, 0, 1, 2, 2]))
    def rename(self, source: Where, new: Where, flags: int) -> None:
        self.move(self.pick(source), self.pick(new), flags)

    def move(self, old: bytes, new: bytes, flags: int) -> None:
        def call(side: StoredRecord) -> None:
            renameat2(path_at(side, old), path_at(side, new), flags)

        self.twins.same(("rename", old, new, flags), call)

    @rule(where=any_where, link=any_targets)
    def symlink(self, where: Where, link: bytes) -> None:
        path = self.pick(where)
        self.twins.same(("symlink", path), lambda s: os.symlink(link, s.path(path)))

    @rule(where=any_where, mode=any_modes)
    def mkfifo(self, where: Where, mode: int) -> None:
        path = self.pick(where)
        self.twins.same(("mkfifo", path), lambda s: os.mkfifo(s.path(path), mode))

    @rule(where=any_where, size=any_sizes)
    def truncate(self, where: Where, size: int) -> None:
        path = self.pick(where)
        self.note_unchanged(path, is_cut=True, size=size)
        if self.kind(path) != stat.S_IFIFO:
            self.twins.same(("truncate", path), lambda s: os.truncate(s.path(path), size))

    @rule(where=any_where)
    def see(self, where: Where) -> None:
        path = self.pick(where)
        self.twins.same("listdir", lambda s: sorted(os.listdir(s.path(path))))
        self.twins.same("readlink", lambda s: os.readlink(s.path(path)))
        self.twins.same("stat", lambda s: stat.S_IFMT(os.stat(s.path(path)).st_mode))
        self.twins.same("listxattr", lambda s: user_names(os.listxattr(s.path(path))))

    @rule(where=any_where)
    def refused(self, where: Where) -> None:
        """`link`, `mknod` and `O_TMPFILE` differ."""
        path = self.pick(where)
        at = self.twins.mount.path(path)
        new = self.twins.mount.path(b"new")
        if self.kind(path) == stat.S_IFREG:
            self.refuses("link", lambda _: os.link(at, new))
        if self.kind(path) == stat.S_IFDIR:
            device = stat.S_IFCHR | 0o600, os.makedev(1, 3)
            self.refuses("mknod", lambda _: os.mknod(os.path.join(at, b"new"), *device))
            self.refuses("O_TMPFILE", lambda _: os.open(at, os.O_TMPFILE | os.O_RDWR))

    # --- attributes -----------------------------------------------------------------------------

    @rule(where=any_where, mode=any_modes)
    def chmod(self, where: Where, mode: int) -> None:
        path = self.pick(where)
        self.twins.same(("chmod", path), lambda s: os.chmod(s.path(path), mode))

    @rule(choice=any_choices, mode=any_modes, time=st.sampled_from(OLD_TIMES))
    def change_open(self, choice: int, mode: int, time: int) -> None:
        slot = self.slot(choice)
        if mode % 2:
            self.twins.same("fchmod", lambda s: os.fchmod(slot.fds[s.at], mode))
        elif self.twins.same("futimens", lambda s: os.utime(slot.fds[s.at], ns=(time, time))):
            self.twins.untimed.discard(slot.inode)

    @rule(
        where=any_where, ids=st.tuples(st.sampled_from([-1, 0, 1000]), st.sampled_from([-1, 0, 7]))
    )
    def chown(self, where: Where, ids: tuple[int, int]) -> None:
        path = self.pick(where)
        self.twins.same(("lchown", path), lambda s: os.lchown(s.path(path), *ids))

    @rule(where=any_where, times=st.tuples(st.sampled_from(OLD_TIMES), st.sampled_from(OLD_TIMES)))
    def utimens(self, where: Where, times: tuple[int, int]) -> None:
        path = self.pick(where)
        done = self.twins.same(("utimens", path), lambda s: os.utime(s.path(path), ns=times))
        if done:
            self.twins.untimed.discard(os.stat(self.at(path)).st_ino)
            self.twins.same("times", lambda s: times_of(os.stat(s.path(path))))

    @rule(
        where=any_where,
        name=st.sampled_from(["user.a", "user.b", "user.\u00e9"]),
        value=st.sampled_from([b"", b"one", b"\0\xff", b"x" * 300]),
        flags=st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]),
    )
    def setxattr(self, where: Where, name: str, value: bytes, flags: int) -> None:
        path = self.pick(where)

        def call(side: StoredRecord) -> None:
            os.setxattr(side.path(path), name, value, flags)

        self.twins.same(("setxattr", path, name, flags), call)

    @rule(where=any_where, name=st.sampled_from(["user.a", "user.b"]))
    def removexattr(self, where: Where, name: str) -> None:
        path = self.pick(where)
        self.twins.same(("getxattr", path), lambda s: os.getxattr(s.path(path), name))
        self.twins.same(("removexattr", path), lambda s: os.removexattr(s.path(path), name))
