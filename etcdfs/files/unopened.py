"""Files that the kernel opens without asking: how they are read, and when they follow their keys.

On a mount that is only read from, the kernel may open files by itself. Then nobody knows which
version somebody has open, until it matters: when another client has changed the key of a file that
the kernel holds. Is it not open, it follows its key, in the same step as all else
(`etcdfs.mirror.applier`). Is it, or if that cannot be found out, the name gets another inode, and
the file stays the version that it was.

Most such files are forgotten as soon as they are closed. One that is held otherwise as well, by a
bind mount say, is to follow once it is closed: it is looked at again, less and less often, and
becomes the newest version in place. What is asked of its attributes waits meanwhile, so that
whoever opens it has not read anything before it is decided.

Knows: which version an inode shows. Does not know: how it is found out whether one is open, why a
file has lost its name.

Concurrency: trio thread; `run` is the one task that has files follow. A READ never waits for
what is decided: the kernel holds a lock on the page, for which who finds out might have to wait.
"""

from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol, final

import trio
from cachetools import LRUCache

from etcdfs.admission import about_to_wait
from etcdfs.errors import EtcdfsError, IsADirectoryFileError
from etcdfs.files.handles import STORE_MAX
from etcdfs.files.walks import Walks
from etcdfs.tree.inodes import Cached, Content, Directory, File, Inode, take_over
from etcdfs.tree.tree import Tree
from etcdfs.tree.view import View

FORGET_S: Final = 0.02
"""How long the kernel may take to forget a file that is closed; mostly 1 ms."""

LOOK_MAX_S: Final = 2.0
"""The longest pause between two looks at a file that is open; each takes about 50 us."""

LARGE_BYTES: Final = 32 << 20
"""Values that are being read and that the value cache has no room for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnopenedStatistics:
    """Old versions that the kernel holds, where it opens files without asking.

    Attributes:
        held: How many there are.
        behind: Those of them that do not show what their key holds now: they are open.
        looks: Times that it was looked whether they are open still.
        followed: Times that one became the newest version.
    """

    held: int
    behind: int
    looks: int
    followed: int


class KernelCache(Protocol):
    """The kernel's caches; see `etcdfs.mirror.invalidator`."""

    unopened: set[Inode]

    def submit(self, cached: Collection[Cached], done: Callable[[], None] | None = None) -> None:
        """Have the kernel forget; call `done` on the trio thread afterwards."""
        ...


@dataclass(slots=True)
class _Look:
    """When a file is looked at next, after which pause, and what it was behind of then."""

    at: float
    pause_s: float = FORGET_S
    decided: int = 0


@final
class UnopenedFiles:
    """All files of a mount, if the kernel opens them without asking."""

    def __init__(
        self,
        view: View,
        tree: Tree,
        kernel: KernelCache,
        advanced: Callable[[], Awaitable[None]],
    ) -> None:
        """Make one; `advanced` returns when something is published."""
        # --- dependencies
        self._view = view
        self._tree = tree
        self._kernel = kernel
        self._advanced = advanced
        self.walks: Walks | None = None
        # --- mutable state
        self._large: LRUCache[tuple[Inode, int], bytes] = LRUCache(LARGE_BYTES, getsizeof=len)
        self._looks: dict[File, _Look] = {}
        self._deciding: set[Inode] = set()
        self._read: set[Inode] = set()  # of those, what was read
        self._pinned: set[tuple[File, int]] = set()  # versions whose value was asked for
        self._decided = trio.Event()
        self._count = self._followed = 0

    # --- reading ----------------------------------------------------------------------------

    async def read(self, inode: int, offset: int, size: int) -> bytes:
        """Return up to `size` bytes at `offset` of the version that an inode is.

        Raises:
            IsADirectoryFileError: It is a directory.
            StaleError: It is not known, or an old version of which the value is nowhere to be had.
            StoreError: Its value is not here and cannot be fetched, or must not be shown.
        """
        self._view.check()
        file = self._tree.node(inode)
        if isinstance(file, Directory):
            msg = f"inode {inode} is a directory"
            raise IsADirectoryFileError(msg)
        version, value = file.version, await self._value(file)
        while version != file.version:  # it has followed its key meanwhile
            version, value = file.version, await self._value(file)
        if self.walks is not None and not file.pages_pushed:
            self.walks.note(file)
        if file.inode in self._tree.unseen.deciding:
            self._tree.unseen.opened.add(file.inode)
        if file.inode in self._deciding:
            self._read.add(file.inode)
        return value[offset : offset + size]

    async def _value(self, file: File) -> bytes:
        name = (file.inode, file.version)
        value = self._large.get(name)
        if value is None:
            value = await self._view.value(file)
            with suppress(ValueError):  # it is larger than all that may be kept
                if len(value) > STORE_MAX:
                    self._large[name] = value
        return value

    async def decided(self, inode: Inode) -> None:
        """Return when it is decided which version a file without a name is, from then on."""
        while inode in self._deciding:
            about_to_wait()
            await self._decided.wait()

    # --- following --------------------------------------------------------------------------

    async def settled(self, revision: int) -> None:
        """Return when each file that is held shows what its key held, or is known to be open."""
        while any(
            self._look_of(file).decided < min(target.version, revision)
            for file, target in self._behind()
            if file.version < revision
        ):
            await self._decided.wait()

    def statistics(self) -> UnopenedStatistics:
        """Count what is held."""
        return UnopenedStatistics(
            held=len(self._tree.unseen.superseded),
            behind=len(self._behind()),
            looks=self._count,
            followed=self._followed,
        )

    async def run(self) -> None:
        """Look after what is held, for ever."""
        while True:
            superseded = self._tree.unseen.superseded
            self._looks = {file: look for file, look in self._looks.items() if file in superseded}
            self._pinned = {pin for pin in self._pinned if pin[0] in superseded}
            self._follow_attributes()
            for file in [file for file in superseded if file.value is None]:
                await self._pin(file)
            due, next_s = self._due(trio.current_time())
            if due:
                await self._look_at(due)
                continue
            self._wake()  # some may have been forgotten
            with trio.move_on_at(next_s):
                await self._advanced()

    def _follow_attributes(self) -> None:
        for file in self._tree.unseen.superseded:
            target = self._tree.successor(file)
            is_same = target is not None and target.version == file.version
            if target is not None and is_same and target.stored_record != file.stored_record:
                take_over(file, target)

    # --- looking ----------------------------------------------------------------------------

    def _behind(self) -> list[tuple[File, File]]:
        """Return the files that do not show what their key holds, each with what does."""
        found = ((file, self._tree.successor(file)) for file in self._tree.unseen.superseded)
        return [(file, to) for file, to in found if to is not None and to.version != file.version]

    def _due(self, now: float) -> tuple[list[File], float]:
        """Return the files that are to be looked at, and when others will be."""
        due: list[File] = []
        next_s = float("inf")
        for file, target in self._behind():
            look = self._look_of(file)
            if target.version != look.decided:
                look.at = min(look.at, now + FORGET_S)
            if look.at <= now:
                due.append(file)
            else:
                next_s = min(next_s, look.at)
        return due, next_s

    def _look_of(self, file: File) -> _Look:
        return self._looks.setdefault(file, _Look(trio.current_time() + FORGET_S))

    async def _look_at(self, files: list[File]) -> None:
        """Have those files follow that nobody has open."""
        targets = {file: target.version for file, target in self._behind()}
        self._deciding = {file.inode for file in files}
        self._read.clear()
        self._kernel.unopened -= self._deciding
        done = trio.Event()
        try:
            self._kernel.submit([Content(file.inode, None) for file in files], done.set)
            await done.wait()  # in about a second, whatever is stuck
            # checkpoint: a batch may have been published, or be about to be
            for file in files:
                closed = file.inode in self._kernel.unopened and file.inode not in self._read
                if closed and file.inode not in self._tree.unseen.deciding:
                    self._follow(file)
        finally:
            self._kernel.unopened -= self._deciding - self._tree.unseen.deciding
            self._deciding = set()
            self._wake()
        now = trio.current_time()
        for file in files:
            look = self._look_of(file)
            look.decided = targets.get(file, 0)
            look.pause_s = min(2 * look.pause_s, LOOK_MAX_S)
            look.at = now + look.pause_s
        self._count += 1

    def _wake(self) -> None:
        self._decided.set()
        self._decided = trio.Event()

    def _follow(self, file: File) -> None:
        target = self._tree.successor(file) if file in self._tree.unseen.superseded else None
        if target is not None:
            take_over(file, target)
            self._looks.pop(file, None)
            self._followed += 1

    async def _pin(self, file: File) -> None:
        """Have the value of a version that may be open, if it was not in memory."""
        if (file, file.version) in self._pinned:
            return
        self._pinned.add((file, file.version))
        with suppress(EtcdfsError):  # whoever reads it is told
            version, value = file.version, await self._view.value(file)
            if file in self._tree.unseen.superseded and file.version == version:
                file.value = value
