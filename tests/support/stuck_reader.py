"""A user who reads directories and does not go on, for as long as he likes.

Knows: getdents(2) holds the lock of a directory while it copies the entries, and copying waits
where the memory is a page of a file that nobody delivers: here one of a FUSE file system of the
attacker's own, mounted as any user may. Who waits in such a page can be killed; who waits for the
lock can not.

Concurrency: a process of its own, as an unprivileged user where the tests run as root; in it one
trio loop and a thread for each directory.
"""

import ctypes
import errno
import mmap
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FileNameT, FlagT, FUSEError, InodeT

NOBODY: Final = 65534
PATIENCE_S: Final = 20.0

_SIZE: Final = 64 * 1024
_FIRST: Final = 2  # inode numbers of the files; 1 is the directory
_SYS_GETDENTS64: Final = {"x86_64": 217, "aarch64": 61}


@final
class StuckReader:
    """The attacker. A context manager; inside, it holds the locks of all `directories`."""

    def __init__(self, *directories: Path) -> None:
        self._home = tempfile.mkdtemp(prefix="etcdfs-test-stuck-")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, self._home, *map(str, directories)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )
        except BaseException:
            shutil.rmtree(self._home)
            raise
        self._count = len(directories)

    def __enter__(self) -> "StuckReader":
        try:
            self._hear("held", self._count)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        # Not by a signal: a process that dies closes the files that it should serve itself.
        self._process.communicate(timeout=PATIENCE_S)
        subprocess.run(
            ["fusermount3", "-uz", self._home],
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
        os.rmdir(self._home)

    def invalidate(self) -> None:
        """Have it go on; return when it has let go of all locks."""
        assert self._process.stdin is not None
        print("go on", file=self._process.stdin, flush=True)
        self._hear("read", self._count)

    def _hear(self, word: str, times: int) -> None:
        assert self._process.stdout is not None
        for _ in range(times):
            heard = self._process.stdout.readline().strip()
            assert heard == word, f"the stuck reader said {heard!r}, not {word!r}"


# --- the attacker's process -----------------------------------------------------------------


def _say(word: str) -> None:
    os.write(1, f"{word}\n".encode())


class _Withholding(pyfuse3.Operations):
    """Files whose pages do not come before they may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_come = trio.Event()

    async def getattr(
        self, inode: InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> EntryAttributes:
        attributes = EntryAttributes()
        attributes.st_ino = inode
        is_root = inode == pyfuse3.ROOT_INODE
        attributes.st_mode = pyfuse3.ModeT(
            stat.S_IFDIR | 0o755 if is_root else stat.S_IFREG | 0o644
        )
        attributes.st_size = 0 if is_root else _SIZE
        return attributes

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        if not name.isdigit():
            raise FUSEError(errno.ENOENT)
        return await self.getattr(InodeT(_FIRST + int(name)))

    async def open(self, inode: InodeT, flags: FlagT, ctx: pyfuse3.RequestContext) -> FileInfo:
        return FileInfo(fh=FileHandleT(inode))

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        if not self.may_come.is_set():
            _say("held")
        await self.may_come.wait()
        return bytes(size)


def _read_directory(directory: int, page: int) -> None:
    """Read a directory into the pages of a file."""
    with mmap.mmap(page, _SIZE, access=mmap.ACCESS_COPY) as pages:
        buffer = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        libc = ctypes.CDLL(None, use_errno=True)
        number = _SYS_GETDENTS64[os.uname().machine]
        read = libc.syscall(ctypes.c_long(number), directory, ctypes.c_void_p(buffer), _SIZE // 2)
    _say("read" if read > 0 else os.strerror(ctypes.get_errno()))


def _open_pages(home: str, directories: Sequence[str]) -> list[threading.Thread]:
    reading = []
    for number, path in enumerate(directories):
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        page = os.open(f"{home}/{number}", os.O_RDONLY)
        reading.append(threading.Thread(target=_read_directory, args=(directory, page)))
        reading[-1].start()
    return reading


async def _attack(operations: _Withholding, home: str, directories: Sequence[str]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        reading = await trio.to_thread.run_sync(_open_pages, home, directories)
        await trio.to_thread.run_sync(sys.stdin.readline)
        operations.may_come.set()
        for thread in reading:
            await trio.to_thread.run_sync(thread.join)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


def main(home: str, *directories: str) -> None:
    operations = _Withholding()
    options = {"fsname=stuck-reader"}
    is_root = os.geteuid() == 0
    if is_root:  # not every machine lets everybody open /dev/fuse
        options.add("allow_other")
    pyfuse3.init(operations, home, options)
    if is_root:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    trio.run(_attack, operations, home, directories)


if __name__ == "__main__":
    main(*sys.argv[1:])
