"""What the rules of the machine stand on: the two trees, etcd, and how a test chooses among them.

Knows: which paths and files there are to choose from, what a change by another client is on tmpfs,
and what must hold after each step and at the end. Does not know: the calls.

Concurrency: plain blocking calls.
"""

import contextlib
import itertools
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.mount.lab import Lab, Pool, memory_directory
from tests.mount.machine.keyspace import RECORD_KEYS, problems
from tests.mount.machine.twins import (
    Descriptor,
    Slot,
    StoredRecord,
    Twins,
    drop_caches,
    outcome,
    walk,
)
from tests.support.churn import until

# --- what differs, and why --------------------------------------------------------------------

DIFFERENCES: Final = {
    "link": ("EPERM", "a key has one name"),
    "mknod": ("EPERM", "etcd is no place to hand out devices"),
    "fallocate": ("ENOTSUP", "pyfuse3 has no handler"),
    "O_TMPFILE": ("ENOTSUP", "pyfuse3 has no handler"),
    "SEEK_HOLE": (None, "holes take space: there is none before the end"),
    "ESTALE": ("ESTALE", "another client changed what was partly overwritten (B15)"),
    "unchanged": (None, "what is written as it was is no change, so that mtime may stay (B12)"),
}
"""The errno in the mount, and the reason. Nothing else may differ."""

# --- what there is to choose from -------------------------------------------------------------

NAMES: Final = (b"a", b"b", b"a.b", b"a-b", b"\xff\xfe")
SLOTS: Final = 4
MOSTLY: Final = 47
SIZES: Final = (0, 1, 3, 7, 100, 4095, 4096, 5000)
OLD_TIMES: Final = (1_000_000_000_123_456_789, 1_111_111_111_000_000_001, 1_222_222_222 * 10**9)

any_choices = st.integers(0, 63)
any_names = st.sampled_from(NAMES)
any_paths = st.lists(any_names, min_size=1, max_size=3).map(b"/".join)
any_sizes = st.sampled_from(SIZES)
any_modes = st.sampled_from([0o644, 0o600, 0o755, 0o000, 0o444, 0o2755, 0o1777, 0o4711, 0o700])
any_targets = st.sampled_from([b"a", b"b", b"a/b", b"./b", b"missing", b"a-b/a/b"])
any_flags = st.builds(
    lambda access, extra: access | extra,
    st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR]),
    st.sampled_from(
        [
            0,
            0,
            os.O_CREAT,
            os.O_CREAT,
            os.O_CREAT | os.O_EXCL,
            os.O_CREAT | os.O_TRUNC,
            os.O_TRUNC,
            os.O_APPEND,
            os.O_APPEND | os.O_CREAT,
            os.O_SYNC | os.O_CREAT,
            os.O_DSYNC,
            os.O_DIRECTORY,
            os.O_NOFOLLOW,
            os.O_CREAT | os.O_NOFOLLOW | os.O_TRUNC,
        ]
    ),
)


@dataclass(frozen=True)
class Where:
    """A way to choose a path: one there is, a new one in a directory there is, or any."""

    choice: int
    kind: str
    path: bytes


any_where = st.builds(
    Where, any_choices, st.sampled_from(["known", "known", "known", "new", "new", "any"]), any_paths
)


class Ground(RuleBasedStateMachine):
    """Both trees and etcd. The test sets what it works with."""

    pool: ClassVar[Pool]
    etcd_binary: ClassVar[Path]
    mode: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        try:
            self._stack.enter_context(self.pool.watched())
            self._begin()
        except BaseException:
            self._stack.close()
            raise

    def _begin(self) -> None:
        etcd = self.pool.etcd(self.etcd_binary)
        mounted = self.pool.mounted(self.etcd_binary, self.mode)
        self.lab: Lab = self._stack.enter_context(self.pool.lab(etcd, mounted))
        self.client = self.lab.client
        other = self.pool.mounted(self.etcd_binary, "--cache", "--log-level", "info")
        other.wait(self.client.revision())
        self.other = other
        self.elsewhere = StoredRecord(os.fsencode(other.path / self.lab.path.name), 0)
        home = self._stack.enter_context(memory_directory())
        (home / "twin").mkdir(mode=0o755)
        self.staging = os.fsencode(home / "staging")
        self.twins = Twins.of(self.lab.path, home / "twin")
        self.twins.hears_late = self.mode == "--no-cache"
        self._stack.callback(self._clear)
        self.serial = itertools.count(1)
        self.marked: set[int] = set()
        self.deleted: dict[bytes, int] = {}
        self.looks_always = False

    def _clear(self) -> None:
        self.twins.close()
        self.client.delete_below(self.lab.prefix)
        self.client.delete_below(RECORD_KEYS + self.lab.prefix)

    @initialize(always=st.booleans(), files=st.integers(0, 3), is_foreign=st.booleans())
    def begin(self, always: bool, files: int, is_foreign: bool) -> None:
        """Begin with some files, made here or by another client."""
        for name in (b"a", b"b/a", b"a-b/b/a")[:files]:
            data = self.data(10)
            if is_foreign:
                self.lab.put(name, data)
                self.replace_value(name, data)
                continue
            self.write_new(name, data)

    def write_new(self, path: bytes, data: bytes) -> None:
        def call(side: StoredRecord) -> None:
            os.makedirs(os.path.dirname(side.path(path)), exist_ok=True)
            write_file(side.path(path), data)

        self.twins.same(("write", path), call)

    # --- choosing -------------------------------------------------------------------------------

    def pick(self, where: Where) -> bytes:
        if where.kind == "known":
            known = self.twins.paths()
            return known[where.choice % len(known)] if known else where.path[:1]
        if where.kind == "new":
            twin = self.twins.twin
            known = [p for p in self.twins.paths() if os.path.isdir(twin.path(p))]
            above = [b"", *known][where.choice % (len(known) + 1)]
            return os.path.join(above, NAMES[where.choice % len(NAMES)])
        return where.path

    def slot(self, choice: int, *, old: bool = False) -> Slot:
        """Choose what is open, with `old` one that another client has replaced, too."""
        usable = [slot for slot in self.twins.slots if old or not slot.is_overtaken]
        if not usable or choice > MOSTLY:
            files = [p for p in self.twins.paths() if self.kind(p) == stat.S_IFREG]
            path = files[choice % len(files)] if files else b"open.%d" % next(self.serial)
            self.open_at(path, os.O_RDWR | os.O_CREAT | os.O_APPEND * (choice % 3 == 0), 0o640)
            usable = self.twins.slots[-1:]
        return usable[choice % len(usable)]

    def data(self, size: int) -> bytes:
        """Return bytes that differ from others, as far as so many can."""
        serial = next(self.serial)
        return bytes((serial * 7 + at) % 255 + 1 for at in range(size))

    def at(self, path: bytes) -> bytes:
        return self.twins.twin.path(path)

    def kind(self, path: bytes) -> int:
        """Return the type of what is at a path, links not followed; 0 for nothing."""
        try:
            return stat.S_IFMT(os.lstat(self.at(path)).st_mode)
        except OSError:
            return 0

    def open_at(self, path: bytes, flags: int, mode: int) -> None:
        self.note_unchanged(path, is_cut=bool(flags & os.O_TRUNC), size=0)

        def call(side: StoredRecord) -> Descriptor:
            # O_NONBLOCK: a FIFO would wait for somebody.
            return Descriptor(os.open(side.path(path), flags | os.O_NONBLOCK, mode))

        opened = self.twins.same(("open", path, oct(flags), oct(mode)), call)
        if opened is None:
            return
        fds = opened[0].fd, opened[1].fd
        found = os.fstat(fds[1])
        self.twins.slots.append(Slot(fds, found.st_ino, flags))
        if stat.S_ISFIFO(found.st_mode):
            self.close_slot(self.twins.slots[-1])

    def close_slot(self, slot: Slot) -> None:
        self.twins.slots.remove(slot)
        self.twins.same(("close", slot), lambda s: os.close(slot.fds[s.at]))

    def sync(self, slot: Slot, call: Callable[[int], None] = os.fsync) -> None:
        self.twins.same(("fsync", slot), lambda s: call(slot.fds[s.at]))

    def content(self, slot: Slot) -> bytes | None:
        """Return what is in an open file; None for a directory."""
        if not stat.S_ISREG(os.fstat(slot.fds[1]).st_mode):
            return None
        with open(f"/proc/self/fd/{slot.fds[1]}", "rb", buffering=0) as file:
            return file.read()

    def note_same(self, slot: Slot, before: bytes | None) -> None:
        """Differs: `unchanged`."""
        if before is not None and before == self.content(slot):
            self.twins.untimed.add(slot.inode)

    def note_unchanged(self, path: bytes, *, is_cut: bool, size: int) -> None:
        """Differs: `unchanged`."""
        with contextlib.suppress(OSError):
            found = os.stat(self.at(path))
            if is_cut and found.st_size == size:
                self.twins.untimed.add(found.st_ino)

    def refuses(self, name: str, call: Callable[[StoredRecord], Any]) -> None:
        expected, _reason = DIFFERENCES[name]
        assert expected is not None
        self.twins.refuses(name, call, expected)

    # --- other clients --------------------------------------------------------------------------

    def publish(self) -> None:
        """Bring to etcd what was written so far: others do not know of it else."""
        for slot in self.twins.slots:
            if not slot.is_overtaken:
                self.sync(slot)

    def is_real(self, path: bytes) -> bool:
        """Whether all above a path are directories, or are not there."""
        above = os.path.dirname(path)
        while above:
            if self.kind(above) not in {0, stat.S_IFDIR}:
                return False
            above = os.path.dirname(above)
        return True

    def is_open(self, *paths: bytes) -> bool:
        """Whether anything at or below these paths is open."""
        opened = {slot.inode for slot in self.twins.slots}
        for path in paths:
            below = (
                [os.path.join(path, p) for p in walk(StoredRecord(self.at(path), 1))]
                if (self.kind(path) == stat.S_IFDIR)
                else []
            )
            for name in (path, *below):
                with contextlib.suppress(OSError):
                    if os.lstat(self.at(name)).st_ino in opened:
                        return True
        return False

    def replace(self, path: bytes, make: Callable[[bytes], None]) -> None:
        """Do on tmpfs what a put by another client is: another file under that name.

        It has what attributes there were; times of the directory change with a new name only.
        """
        at, above = self.at(path), os.path.dirname(self.at(path))
        make(self.staging)
        os.makedirs(above, 0o755, exist_ok=True)
        times = os.stat(above)
        found = None
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(at)
        if found is None:
            os.rename(self.staging, at)
            return
        if not stat.S_ISLNK(found.st_mode):
            for name in os.listxattr(at):
                os.setxattr(self.staging, name, os.getxattr(at, name))
            os.chown(self.staging, found.st_uid, found.st_gid)
            os.chmod(self.staging, stat.S_IMODE(found.st_mode))
        else:
            os.lchown(self.staging, found.st_uid, found.st_gid)
        os.rename(self.staging, at)
        os.utime(above, ns=(times.st_atime_ns, times.st_mtime_ns))
        for slot in self.twins.slots:
            slot.is_overtaken |= slot.inode == found.st_ino

    def replace_value(self, path: bytes, value: bytes) -> None:
        if self.kind(path) == stat.S_IFLNK:
            self.replace(path, lambda at: os.symlink(value, at))
        else:
            self.replace(path, lambda at: write_file(at, value))

    def vanish(self, path: bytes) -> None:
        """Take away the directories that another client's deletion has taken away."""
        while path and not self.client.below(self.lab.key(path) + b"/"):
            if self.kind(path) == stat.S_IFDIR:
                os.rmdir(self.at(path))
            path = os.path.dirname(path)

    def elsewhere_same(self, what: str, call: Callable[[StoredRecord], Any]) -> bool:
        self.other.wait(self.client.revision())
        there, here = outcome(call, self.elsewhere), outcome(call, self.twins.twin)
        if there[0] != here[0]:
            self.twins.differ(f"{what}: {there} in the second mount, {here} on tmpfs")
        return here[0] is None

    # --- what must hold -------------------------------------------------------------------------

    @invariant()
    def alike(self) -> None:
        while len(self.twins.slots) > SLOTS:
            self.close_slot(self.twins.slots[0])
        if self.looks_always:
            self.twins.look()

    @rule()
    def look(self) -> None:
        self.twins.look()

    def teardown(self) -> None:
        with self._stack:
            if not self.twins.has_differed:
                self.finish()

    def finish(self) -> None:
        """Close everything; then etcd holds what there is to see, and the mount nothing old."""
        self.twins.look()
        while self.twins.slots:
            self.close_slot(self.twins.slots[0])
        self.twins.look()
        found = problems(
            self.client,
            self.lab.prefix,
            self.twins.twin,
            untimed=self.twins.untimed,
            marked=self.marked,
            deleted=self.deleted,
        )
        for problem in found:
            self.twins.differ(problem)
        if os.geteuid() == 0:
            drop_caches(self.lab.mounted.path)
            until(lambda: self.lab.mounted.statistics()["tree"]["old_versions"] == 0)
        assert self.lab.mounted.statistics()["open_files"] == 0


def path_at(side: StoredRecord, path: bytes) -> Path:
    return Path(os.fsdecode(side.path(path)))


def user_names(names: list[str]) -> list[str]:
    return sorted(name for name in names if name.startswith("user."))


def times_of(found: os.stat_result) -> tuple[int, int]:
    return found.st_atime_ns, found.st_mtime_ns


def write_file(path: bytes, data: bytes, mode: int = 0o644) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def read_file(path: bytes) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()
