"""Which errno each call fails with, and that nothing has changed then. One line, one case.

The scene of every family: a file `f`, a directory `d` with a file `d/f`, an empty directory `e`;
`missing` is not there, `LONG` has 256 bytes.
"""

import mmap
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.mount.posix.calls import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    errno_of,
    opened,
    renameat2,
)

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

LONG = "x" * 256
DEEP = "/".join(["y" * 200] * 25)  # more than PATH_MAX
R, W, RW = os.O_RDONLY, os.O_WRONLY, os.O_RDWR
CREAT, EXCL, TRUNC, DIR, NOFOLLOW = (
    os.O_CREAT,
    os.O_EXCL,
    os.O_TRUNC,
    os.O_DIRECTORY,
    os.O_NOFOLLOW,
)

Call = Callable[[Path], object]


def use(path: Path, flags: int, call: Callable[[int], object]) -> object:
    with opened(path, flags) as fd:
        return call(fd)


FAMILIES: dict[str, dict[str, tuple[Call, str]]] = {
    "open": {
        "open missing": (lambda p: os.open(p / "missing", R), "ENOENT"),
        "open missing for writing": (lambda p: os.open(p / "missing", W | TRUNC), "ENOENT"),
        "open below missing": (lambda p: os.open(p / "missing" / "x", R | CREAT), "ENOENT"),
        "open the empty path": (lambda _: os.open("", R), "ENOENT"),
        "open below a file": (lambda p: os.open(p / "f" / "x", R), "ENOTDIR"),
        "create below a file": (lambda p: os.open(p / "f" / "x", W | CREAT), "ENOTDIR"),
        "open f/": (lambda p: os.open(f"{p}/f/", R), "ENOTDIR"),
        "create missing/": (lambda p: os.open(f"{p}/missing/", W | CREAT), "EISDIR"),
        "open a file as directory": (lambda p: os.open(p / "f", R | DIR), "ENOTDIR"),
        "open a directory for writing": (lambda p: os.open(p / "d", W), "EISDIR"),
        "open a directory read-write": (lambda p: os.open(p / "d", RW), "EISDIR"),
        "create over a directory": (lambda p: os.open(p / "d", R | CREAT), "EISDIR"),
        "truncate a directory by open": (lambda p: os.open(p / "d", W | TRUNC), "EISDIR"),
        "O_EXCL over a file": (lambda p: os.open(p / "f", W | CREAT | EXCL), "EEXIST"),
        "O_EXCL over a directory": (lambda p: os.open(p / "d", W | CREAT | EXCL), "EEXIST"),
        "O_CREAT with O_DIRECTORY": (lambda p: os.open(p / "f", R | CREAT | DIR), "EINVAL"),
        "open too long": (lambda p: os.open(p / LONG, R), "ENAMETOOLONG"),
        "create too long": (lambda p: os.open(p / LONG, W | CREAT), "ENAMETOOLONG"),
        "O_EXCL too long": (lambda p: os.open(p / LONG, W | CREAT | EXCL), "ENAMETOOLONG"),
        "open a path too long": (lambda p: os.open(p / DEEP, R), "ENAMETOOLONG"),
    },
    "data": {
        "read a descriptor for writing": (
            lambda p: use(p / "f", W, lambda fd: os.read(fd, 1)),
            "EBADF",
        ),
        "write a descriptor for reading": (
            lambda p: use(p / "f", R, lambda fd: os.write(fd, b"x")),
            "EBADF",
        ),
        "pwrite a descriptor for reading": (
            lambda p: use(p / "f", R, lambda fd: os.pwrite(fd, b"x", 1)),
            "EBADF",
        ),
        "read an O_PATH": (lambda p: use(p / "f", os.O_PATH, lambda fd: os.read(fd, 1)), "EBADF"),
        "chmod an O_PATH": (
            lambda p: use(p / "f", os.O_PATH, lambda fd: os.fchmod(fd, 0)),
            "EBADF",
        ),
        "read a directory": (lambda p: use(p / "d", R, lambda fd: os.read(fd, 1)), "EISDIR"),
        "pread before the start": (
            lambda p: use(p / "f", R, lambda fd: os.pread(fd, 1, -1)),
            "EINVAL",
        ),
        "pwrite before the start": (
            lambda p: use(p / "f", W, lambda fd: os.pwrite(fd, b"x", -1)),
            "EINVAL",
        ),
        "seek before the start": (
            lambda p: use(p / "f", R, lambda fd: os.lseek(fd, -1, os.SEEK_SET)),
            "EINVAL",
        ),
        "seek before the start, from the end": (
            lambda p: use(p / "f", R, lambda fd: os.lseek(fd, -11, os.SEEK_END)),
            "EINVAL",
        ),
        "seek nowhere": (lambda p: use(p / "f", R, lambda fd: os.lseek(fd, 0, 99)), "EINVAL"),
        "seek data at the end": (
            lambda p: use(p / "f", R, lambda fd: os.lseek(fd, 10, os.SEEK_DATA)),
            "ENXIO",
        ),
        "seek a hole past the end": (
            lambda p: use(p / "f", R, lambda fd: os.lseek(fd, 11, os.SEEK_HOLE)),
            "ENXIO",
        ),
        "ftruncate a descriptor for reading": (
            lambda p: use(p / "f", R, lambda fd: os.ftruncate(fd, 1)),
            "EINVAL",
        ),
        "ftruncate to less than nothing": (
            lambda p: use(p / "f", W, lambda fd: os.ftruncate(fd, -1)),
            "EINVAL",
        ),
        "map shared for writing without the right": (
            lambda p: use(p / "f", R, lambda fd: mmap.mmap(fd, 10)),
            "EACCES",
        ),
        "map what cannot be read": (
            lambda p: use(p / "f", W, lambda fd: mmap.mmap(fd, 10, prot=mmap.PROT_READ)),
            "EACCES",
        ),
        "sendfile to a descriptor for reading": (
            lambda p: use(p / "f", R, lambda fd: os.sendfile(fd, fd, 0, 10)),
            "EBADF",
        ),
        "copy a range within a file onto itself": (
            lambda p: use(p / "f", RW, lambda fd: os.copy_file_range(fd, fd, 5, 0, 2)),
            "EINVAL",
        ),
        "copy a range into an O_APPEND": (
            lambda p: use(
                p / "f", RW | os.O_APPEND, lambda fd: os.copy_file_range(fd, fd, 2, 0, 5)
            ),
            "EBADF",
        ),
    },
    "truncate": {
        "truncate missing": (lambda p: os.truncate(p / "missing", 1), "ENOENT"),
        "truncate below a file": (lambda p: os.truncate(p / "f" / "x", 1), "ENOTDIR"),
        "truncate a directory": (lambda p: os.truncate(p / "d", 0), "EISDIR"),
        "truncate to less than nothing": (lambda p: os.truncate(p / "f", -1), "EINVAL"),
        "truncate too long": (lambda p: os.truncate(p / LONG, 1), "ENAMETOOLONG"),
    },
    "stat": {
        "stat missing": (lambda p: os.stat(p / "missing"), "ENOENT"),
        "stat below a file": (lambda p: os.stat(p / "f" / "x"), "ENOTDIR"),
        "stat f/": (lambda p: os.stat(f"{p}/f/"), "ENOTDIR"),
        "stat f/.": (lambda p: os.stat(f"{p}/f/."), "ENOTDIR"),
        "stat too long": (lambda p: os.stat(p / LONG), "ENAMETOOLONG"),
        "stat a path too long": (lambda p: os.stat(p / DEEP), "ENAMETOOLONG"),
        "chdir to a file": (lambda p: os.chdir(p / "f"), "ENOTDIR"),
        "chdir to missing": (lambda p: os.chdir(p / "missing"), "ENOENT"),
        "readlink of a file": (lambda p: os.readlink(p / "f"), "EINVAL"),
        "readlink of a directory": (lambda p: os.readlink(p / "d"), "EINVAL"),
        "readlink of missing": (lambda p: os.readlink(p / "missing"), "ENOENT"),
        "list a file": (lambda p: os.listdir(p / "f"), "ENOTDIR"),
        "list missing": (lambda p: os.listdir(p / "missing"), "ENOENT"),
        "statvfs of missing": (lambda p: os.statvfs(p / "missing"), "ENOENT"),
    },
    "attributes": {
        "chmod missing": (lambda p: os.chmod(p / "missing", 0o600), "ENOENT"),
        "chmod below a file": (lambda p: os.chmod(p / "f" / "x", 0o600), "ENOTDIR"),
        "chmod too long": (lambda p: os.chmod(p / LONG, 0o600), "ENAMETOOLONG"),
        "chown missing": (lambda p: os.chown(p / "missing", -1, -1), "ENOENT"),
        "chown below a file": (lambda p: os.chown(p / "f" / "x", 0, 0), "ENOTDIR"),
        "utime of missing": (lambda p: os.utime(p / "missing"), "ENOENT"),
        "utime below a file": (lambda p: os.utime(p / "f" / "x"), "ENOTDIR"),
        "getxattr that is not there": (lambda p: os.getxattr(p / "f", "user.x"), "ENODATA"),
        "getxattr of missing": (lambda p: os.getxattr(p / "missing", "user.x"), "ENOENT"),
        "getxattr of no namespace": (lambda p: os.getxattr(p / "f", "nonsense.x"), "ENOTSUP"),
        "listxattr of missing": (lambda p: os.listxattr(p / "missing"), "ENOENT"),
    },
    "mkdir_rmdir": {
        "mkdir over a file": (lambda p: os.mkdir(p / "f"), "EEXIST"),
        "mkdir over a directory": (lambda p: os.mkdir(p / "d"), "EEXIST"),
        "mkdir .": (lambda p: os.mkdir(f"{p}/d/."), "EEXIST"),
        "mkdir ..": (lambda p: os.mkdir(f"{p}/d/.."), "EEXIST"),
        "mkdir below missing": (lambda p: os.mkdir(p / "missing" / "x"), "ENOENT"),
        "mkdir below a file": (lambda p: os.mkdir(p / "f" / "x"), "ENOTDIR"),
        "mkdir too long": (lambda p: os.mkdir(p / LONG), "ENAMETOOLONG"),
        "mkdir a path too long": (lambda p: os.mkdir(p / DEEP), "ENAMETOOLONG"),
        "rmdir missing": (lambda p: os.rmdir(p / "missing"), "ENOENT"),
        "rmdir a file": (lambda p: os.rmdir(p / "f"), "ENOTDIR"),
        "rmdir below a file": (lambda p: os.rmdir(p / "f" / "x"), "ENOTDIR"),
        "rmdir not empty": (lambda p: os.rmdir(p / "d"), "ENOTEMPTY"),
        "rmdir .": (lambda p: os.rmdir(f"{p}/e/."), "EINVAL"),
        "rmdir ..": (lambda p: os.rmdir(f"{p}/e/.."), "ENOTEMPTY"),
        "rmdir too long": (lambda p: os.rmdir(p / LONG), "ENAMETOOLONG"),
    },
    "mknod": {
        "mknod over a file": (lambda p: os.mknod(p / "f", stat.S_IFREG | 0o644), "EEXIST"),
        "mknod over a directory": (lambda p: os.mknod(p / "d", stat.S_IFREG | 0o644), "EEXIST"),
        "mknod below missing": (lambda p: os.mknod(p / "missing" / "x"), "ENOENT"),
        "mknod below a file": (lambda p: os.mknod(p / "f" / "x"), "ENOTDIR"),
        "mknod too long": (lambda p: os.mknod(p / LONG), "ENAMETOOLONG"),
        "mkfifo over a file": (lambda p: os.mkfifo(p / "f"), "EEXIST"),
    },
    "unlink": {
        "unlink missing": (lambda p: os.unlink(p / "missing"), "ENOENT"),
        "unlink a directory": (lambda p: os.unlink(p / "e"), "EISDIR"),
        "unlink below a file": (lambda p: os.unlink(p / "f" / "x"), "ENOTDIR"),
        "unlink f/": (lambda p: os.unlink(f"{p}/f/"), "ENOTDIR"),
        "unlink too long": (lambda p: os.unlink(p / LONG), "ENAMETOOLONG"),
    },
    "link_symlink": {
        "link missing": (lambda p: os.link(p / "missing", p / "x"), "ENOENT"),
        "link a directory": (lambda p: os.link(p / "d", p / "x"), "EPERM"),
        "link over a file": (lambda p: os.link(p / "d" / "f", p / "f"), "EEXIST"),
        "link to too long": (lambda p: os.link(p / "f", p / LONG), "ENAMETOOLONG"),
        "symlink over a file": (lambda p: os.symlink("f", p / "f"), "EEXIST"),
        "symlink over a directory": (lambda p: os.symlink("f", p / "d"), "EEXIST"),
        "symlink below missing": (lambda p: os.symlink("f", p / "missing" / "x"), "ENOENT"),
        "symlink below a file": (lambda p: os.symlink("f", p / "f" / "x"), "ENOTDIR"),
        "symlink too long": (lambda p: os.symlink("f", p / LONG), "ENAMETOOLONG"),
        "symlink to nothing": (lambda p: os.symlink("", p / "x"), "ENOENT"),
    },
    "rename": {
        "rename missing": (lambda p: os.rename(p / "missing", p / "x"), "ENOENT"),
        "rename missing to itself": (lambda p: os.rename(p / "missing", p / "missing"), "ENOENT"),
        "rename to below missing": (lambda p: os.rename(p / "f", p / "missing" / "x"), "ENOENT"),
        "rename from below a file": (lambda p: os.rename(p / "f" / "x", p / "x"), "ENOTDIR"),
        "rename to below a file": (lambda p: os.rename(p / "d", p / "f" / "x"), "ENOTDIR"),
        "rename a file over a directory": (lambda p: os.rename(p / "f", p / "e"), "EISDIR"),
        "rename a directory over a file": (lambda p: os.rename(p / "e", p / "f"), "ENOTDIR"),
        "rename over a full directory": (lambda p: os.rename(p / "e", p / "d"), "ENOTEMPTY"),
        "rename into itself": (lambda p: os.rename(p / "d", p / "d" / "x"), "EINVAL"),
        "rename deep into itself": (lambda p: os.rename(p, p / "d" / "x"), "EINVAL"),
        "rename over an ancestor": (lambda p: os.rename(p / "d" / "f", p / "d"), "ENOTEMPTY"),
        "rename to .": (lambda p: os.rename(p / "e", f"{p}/d/."), "EBUSY"),
        "rename ..": (lambda p: os.rename(f"{p}/d/..", p / "x"), "EBUSY"),
        "rename a file to x/": (lambda p: os.rename(p / "f", f"{p}/x/"), "ENOTDIR"),
        "rename to too long": (lambda p: os.rename(p / "f", p / LONG), "ENAMETOOLONG"),
        "rename from too long": (lambda p: os.rename(p / LONG, p / "x"), "ENAMETOOLONG"),
        "rename to another file system": (lambda p: os.rename(p / "f", "/proc/x"), "EXDEV"),
        "rename without replacing": (
            lambda p: renameat2(p / "f", p / "d" / "f", RENAME_NOREPLACE),
            "EEXIST",
        ),
        "rename without replacing a directory": (
            lambda p: renameat2(p / "e", p / "d", RENAME_NOREPLACE),
            "EEXIST",
        ),
        "exchange with missing": (
            lambda p: renameat2(p / "f", p / "missing", RENAME_EXCHANGE),
            "ENOENT",
        ),
        "exchange without replacing": (
            lambda p: renameat2(p / "f", p / "d" / "f", RENAME_EXCHANGE | RENAME_NOREPLACE),
            "EINVAL",
        ),
        "exchange with what is below": (
            lambda p: renameat2(p / "d", p / "d" / "f", RENAME_EXCHANGE),
            "EINVAL",
        ),
        "rename with unknown flags": (lambda p: renameat2(p / "f", p / "x", 1 << 20), "EINVAL"),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_that_cannot_be(place: Path, family: str) -> None:
    (place / "f").write_bytes(b"0123456789")
    (place / "d").mkdir()
    (place / "d" / "f").write_bytes(b"below")
    (place / "e").mkdir()
    expected = {name: number for name, (_, number) in FAMILIES[family].items()}
    found = {name: errno_of(partial(call, place)) for name, (call, _) in FAMILIES[family].items()}
    assert found == expected
    assert sorted(os.listdir(place)) == ["d", "e", "f"]
    assert (place / "f").read_bytes() == b"0123456789"
    assert os.listdir(place / "d") == ["f"]
    assert os.listdir(place / "e") == []
