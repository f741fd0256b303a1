"""Modes, owners, times, links and extended attributes, as the manual pages have them."""

import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.lab import sh
from tests.mount.posix.calls import NOBODY, as_user, errno_of, opened

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users")

_REALTIME_COARSE = 5  # include/uapi/linux/time.h; Python lacks it
SECOND = 10**9
LONG_AGO = 981_173_106 * SECOND + 789_000_001
EARLIER = 1_000_000_000 * SECOND + 1


def mode_of(path: Path | str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def _tick() -> None:
    """Return when the clock that Linux takes times of files from has moved on (4 ms or so)."""
    before = time.clock_gettime_ns(_REALTIME_COARSE)
    while time.clock_gettime_ns(_REALTIME_COARSE) == before:
        pass


def times_of(path: Path | str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_atime_ns, found.st_mtime_ns


# --- modes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o000, 0o600, 0o644, 0o755, 0o777])
def test_b52_chmod(place: Path, mode: int) -> None:
    file = place / "file"
    file.write_bytes(b"value")
    before = file.stat()
    file.chmod(mode)
    assert mode_of(file) == mode
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (5, before.st_mtime_ns)
    directory = place / "directory"
    directory.mkdir()
    directory.chmod(mode)
    assert mode_of(directory) == mode
    directory.chmod(0o755)


def test_b52_fchmod_of_what_is_being_written(place: Path) -> None:
    with opened(place / "new", os.O_CREAT | os.O_WRONLY) as fd:
        os.write(fd, b"value")
        os.fchmod(fd, 0o600)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == mode_of(place / "new") == 0o600
        os.write(fd, b"more")
    assert mode_of(place / "new") == 0o600
    assert (place / "new").read_bytes() == b"valuemore"


def test_b52_fchmod_after_unlink_is_the_open_files_alone(place: Path) -> None:
    with opened(place / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.fsync(fd)
        (place / "file").unlink()
        os.fchmod(fd, 0o600)
        os.utime(fd, ns=(1, 2))
        found = os.fstat(fd)
        assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o600, 2)
        (place / "file").touch(mode=0o640)
        assert mode_of(place / "file") == 0o640


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_b53_umask(place: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        os.close(os.open(place / "plain", os.O_CREAT | os.O_WRONLY, 0o666))
        os.close(os.open(place / "exclusive", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o777))
        os.mkdir(place / "directory", 0o777)
        os.mknod(place / "node", 0o666)
        os.mkfifo(place / "fifo", 0o666)
    finally:
        os.umask(old)
    for name, mode in (
        ("plain", 0o666),
        ("exclusive", 0o777),
        ("directory", 0o777),
        ("node", 0o666),
        ("fifo", 0o666),
    ):
        assert mode_of(place / name) == mode & ~umask, name


def test_b53_a_mode_that_forbids_writing_is_for_later_opens(place: Path) -> None:
    with opened(place / "file", os.O_CREAT | os.O_WRONLY, 0o400) as fd:
        os.write(fd, b"value")
    assert mode_of(place / "file") == 0o400
    assert (place / "file").read_bytes() == b"value"


def test_b53_opening_what_is_there_leaves_its_mode(place: Path) -> None:
    (place / "file").touch(mode=0o600)
    with opened(place / "file", os.O_CREAT | os.O_WRONLY, 0o666) as fd:
        os.write(fd, b"value")
    assert mode_of(place / "file") == 0o600


@root_only
def test_b53_the_caller_owns_what_it_makes(place: Path) -> None:
    place.chmod(0o777)

    def make() -> None:
        Path("file").write_bytes(b"value")
        os.close(os.open("exclusive", os.O_CREAT | os.O_EXCL))
        os.mkdir("directory")
        os.symlink("target", "link")
        os.mkfifo("fifo")

    as_user(place, make, uid=1234, gid=4321)
    for name in ("file", "exclusive", "directory", "link", "fifo"):
        found = os.lstat(place / name)
        assert (found.st_uid, found.st_gid) == (1234, 4321), name


@root_only
def test_b53_a_directory_with_the_set_group_id_bit_gives_its_group(place: Path) -> None:
    (place / "shared").mkdir()
    os.chown(place / "shared", 0, 77)
    (place / "shared").chmod(0o2775)
    (place / "shared/file").touch()
    (place / "shared/below").mkdir()
    (place / "shared/below/file").touch()
    os.symlink("file", place / "shared/link")
    for name in ("file", "below", "below/file", "link"):
        assert os.lstat(place / "shared" / name).st_gid == 77, name
    assert mode_of(place / "shared/below") == 0o2755
    assert mode_of(place / "shared/file") == 0o644


# --- owners ---------------------------------------------------------------------------------


@root_only
def test_b52_chown(place: Path) -> None:
    (place / "file").touch()
    os.chown(place / "file", 12, 34)
    os.chown(place / "file", 56, -1)
    found = (place / "file").stat()
    assert (found.st_uid, found.st_gid) == (56, 34)
    os.chown(place / "file", -1, 78)
    assert ((place / "file").stat().st_uid, (place / "file").stat().st_gid) == (56, 78)
    os.symlink("missing", place / "link")
    os.lchown(place / "link", 12, 34)
    assert os.lstat(place / "link").st_uid == 12
    os.mkdir(place / "d")
    os.chown(place / "d", 12, 34)
    assert (place / "d").stat().st_gid == 34


@root_only
@pytest.mark.parametrize("how", ["write", "truncate", "chown"])
def test_b67_another_users_change_takes_setuid_and_setgid(place: Path, how: str) -> None:
    place.chmod(0o777)
    file = place / "file"
    file.write_bytes(b"value")
    os.chown(file, NOBODY, NOBODY)
    file.chmod(0o6777)
    assert mode_of(file) == 0o6777

    def change() -> None:
        if how == "write":
            with opened("file", os.O_WRONLY) as fd:
                os.write(fd, b"V")
        elif how == "truncate":
            os.truncate("file", 1)
        else:
            os.chown("file", -1, NOBODY)

    as_user(place, change)
    assert mode_of(file) == 0o777


@root_only
def test_b67_setgid_of_a_group_one_is_not_in(place: Path) -> None:
    place.chmod(0o777)
    (place / "file").touch()
    os.chown(place / "file", NOBODY, 77)
    as_user(place, lambda: os.chmod("file", 0o2755))
    assert mode_of(place / "file") == 0o755


def _refusals(place: Path) -> dict[str, Callable[[], object]]:
    return {
        "EPERM chmod": lambda: os.chmod("roots", 0o777),
        "EPERM chown": lambda: os.chown("roots", NOBODY, NOBODY),
        "EPERM own to other": lambda: os.chown("own", 0, -1),
        "EPERM own to other group": lambda: os.chown("own", -1, 77),
        "EPERM utime": lambda: os.utime("roots", (1, 1)),
        "EACCES utime now": lambda: os.utime("roots"),
        "EACCES open for writing": lambda: open("roots", "r+b"),
        "EACCES open for reading": lambda: open("secret", "rb"),
        "EACCES truncate": lambda: os.truncate("roots", 0),
        "EACCES list": lambda: os.listdir("closed"),
        "EACCES search": lambda: os.stat("closed/file"),
        "EACCES create": lambda: os.mknod("readable/new"),
        "EACCES mkdir": lambda: os.mkdir("readable/new"),
        "EACCES symlink": lambda: os.symlink("x", "readable/new"),
        "EACCES unlink": lambda: os.unlink("readable/file"),
        "EACCES rename": lambda: os.rename("readable/file", "own2"),
        "EACCES setxattr": lambda: os.setxattr("roots", "user.a", b"1"),
        "EACCES getxattr": lambda: os.getxattr("secret", "user.a"),
        "EPERM sticky unlink": lambda: os.unlink("sticky/roots"),
        "EPERM sticky rename": lambda: os.rename("sticky/roots", "sticky/new"),
    }


@root_only
def test_b67_what_others_may_not_do(place: Path) -> None:
    place.chmod(0o777)
    for name, mode in (("closed", 0o700), ("readable", 0o755), ("sticky", 0o1777)):
        (place / name).mkdir()
        (place / name).chmod(mode)
    for name in ("closed/file", "readable/file", "sticky/roots", "sticky/own", "roots", "own"):
        (place / name).write_bytes(b"value")
    (place / "secret").touch(mode=0o600)
    os.chown(place / "own", NOBODY, NOBODY)
    os.chown(place / "sticky/own", NOBODY, NOBODY)

    def attempts() -> list[str]:
        return [f"{errno_of(call)} {what.split(' ', 1)[1]}" for what, call in expected.items()]

    expected = _refusals(place)
    assert as_user(place, attempts) == list(expected)
    assert (place / "roots").read_bytes() == (place / "readable/file").read_bytes() == b"value"

    def allowed() -> None:
        os.chmod("own", 0o600)
        os.utime("own", (1, 1))
        os.unlink("sticky/own")
        os.rename("own", "moved")
        os.listdir("readable")

    as_user(place, allowed)
    assert (place / "moved").read_bytes() == b"value"
    assert os.stat(place / "moved").st_uid == NOBODY, "a rename takes the owner along"
    assert mode_of(place / "moved") == 0o600


# --- times ----------------------------------------------------------------------------------


def test_b52_utimensat(place: Path) -> None:
    (place / "file").write_bytes(b"value")
    (place / "directory").mkdir()
    os.symlink("missing", place / "link")
    for name in ("file", "directory", "link"):
        os.utime(place / name, ns=(EARLIER, LONG_AGO), follow_symlinks=False)
        assert times_of(place / name) == (EARLIER, LONG_AGO), name
    os.utime(place / "file", ns=(0, -1))
    assert times_of(place / "file")[1] in (-1, 0)  # before 1970 is not for every filesystem
    sh(place, "touch -d @5.25 file; touch -a -d @6 file")
    assert times_of(place / "file") == (6 * SECOND, 5 * SECOND + SECOND // 4)
    sh(place, "touch -m -d @7 file")
    assert times_of(place / "file") == (6 * SECOND, 7 * SECOND)


def test_b52_futimens_of_what_is_being_written(place: Path) -> None:
    with opened(place / "file", os.O_CREAT | os.O_WRONLY) as fd:
        os.write(fd, b"value")
        os.utime(fd, ns=(EARLIER, LONG_AGO))
    assert times_of(place / "file") == (EARLIER, LONG_AGO)
    with opened(place / "file", os.O_WRONLY | os.O_APPEND) as fd:
        os.utime(fd, ns=(EARLIER, LONG_AGO))
        os.write(fd, b"more")
    assert times_of(place / "file")[1] > LONG_AGO, "what is written after that counts"


def test_b66_what_touches_mtime_and_ctime(place: Path) -> None:
    file = place / "file"
    file.write_bytes(b"value")

    def touched(change: Callable[[], object], path: Path) -> str:
        before = path.stat()
        _tick()
        change()
        after = path.stat()
        return ("m" if after.st_mtime_ns > before.st_mtime_ns else "-") + (
            "c" if after.st_ctime_ns > before.st_ctime_ns else "-"
        )

    assert touched(lambda: file.write_bytes(b"other"), file) == "mc"
    assert touched(lambda: os.truncate(file, 2), file) == "mc"
    assert touched(lambda: file.chmod(0o600), file) == "-c"
    assert touched(lambda: file.chmod(0o600), file) == "-c", "even if it changes nothing"
    assert touched(lambda: os.chown(file, os.getuid(), os.getgid()), file) == "-c"
    assert touched(lambda: os.utime(file), file) == "mc"
    assert touched(lambda: os.setxattr(file, "user.a", b"1"), file) == "-c"
    assert touched(lambda: os.removexattr(file, "user.a"), file) == "-c"
    assert touched(file.read_bytes, file) == "--"
    assert touched(file.stat, file) == "--"
    assert touched(lambda: os.rename(file, place / "moved"), place) == "mc"
    assert touched(lambda: os.mkdir(place / "d"), place) == "mc"
    assert touched((place / "d/f").touch, place) == "--"
    assert touched((place / "d/g").touch, place / "d") == "mc"
    assert touched(lambda: (place / "d/g").chmod(0o600), place / "d") == "--"
    assert touched((place / "d/g").unlink, place / "d") == "mc"
    assert touched(lambda: os.symlink("x", place / "d/l"), place / "d") == "mc"
    assert touched(lambda: os.listdir(place), place) == "--"


# --- links and special files ----------------------------------------------------------------


@pytest.mark.parametrize("target", ["file", "missing", "/", "../x/./y", "a" * 255, "/x" * 2047])
def test_b57_symlink(place: Path, target: str) -> None:
    os.symlink(target, place / "link")
    assert os.readlink(place / "link") == target
    found = os.lstat(place / "link")
    assert stat.S_ISLNK(found.st_mode)
    assert found.st_size == len(target)
    assert stat.S_IMODE(found.st_mode) == 0o777
    (place / "link").unlink()
    assert os.listdir(place) == []


def test_b57_symlinks_are_followed(place: Path) -> None:
    (place / "d").mkdir()
    os.symlink("d/file", place / "link")
    os.symlink("d", place / "to-d")
    os.symlink("loop", place / "loop")
    assert errno_of((place / "link").read_bytes) == "ENOENT"
    (place / "link").write_bytes(b"value")
    assert (place / "d/file").read_bytes() == (place / "to-d/file").read_bytes() == b"value"
    assert errno_of((place / "loop").read_bytes) == "ELOOP"
    flags = os.O_RDONLY | os.O_NOFOLLOW
    assert errno_of(lambda: os.open(place / "link", flags)) == "ELOOP"
    os.chmod(place / "link", 0o600)
    assert mode_of(place / "d/file") == 0o600
    assert mode_of(place / "link") == 0o777
    assert errno_of(lambda: os.symlink("x", place / "link")) == "EEXIST"
    assert errno_of(lambda: os.symlink("x", place / "to-d")) == "EEXIST"
    assert errno_of(lambda: os.readlink(place / "d")) == "EINVAL"
    assert errno_of(lambda: os.readlink(place / "d/file")) == "EINVAL"
    assert errno_of(lambda: os.symlink("", place / "empty")) == "ENOENT"
    assert errno_of(lambda: os.symlink("x" * 5000, place / "long")) == "ENAMETOOLONG"
    assert errno_of(lambda: os.rmdir(place / "to-d")) == "ENOTDIR"
    assert errno_of(lambda: os.mkdir(place / "link")) == "EEXIST"
    assert (place / "to-d").resolve() == (place / "d").resolve()
    (place / "to-d").unlink()
    assert (place / "d/file").exists()


def test_b57_symlinks_can_be_replaced(place: Path) -> None:
    sh(place, "ln -s a link; ln -sfn b link; test $(readlink link) = b")
    sh(place, "echo x > file; mv file link; test ! -L link; test $(cat link) = x")
    sh(place, "ln -s c other; mv other link; test -L link; test $(readlink link) = c")
    assert os.listdir(place) == ["link"]


def test_b58_a_fifo_carries_what_is_written_to_it(place: Path) -> None:
    os.mkfifo(place / "fifo", 0o600)
    assert stat.S_ISFIFO(os.lstat(place / "fifo").st_mode)
    assert mode_of(place / "fifo") == 0o600
    assert sh(place, "echo through > fifo & cat fifo; wait") == "through\n"
    (place / "fifo").unlink()


def test_b58_a_socket_is_a_place_to_meet(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)  # a socket's path has 108 bytes at most
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        assert stat.S_ISSOCK(os.lstat("socket").st_mode)
        server.listen()
        client.connect("socket")
        client.sendall(b"hello")
        accepted, _ = server.accept()
        with accepted:
            assert accepted.recv(10) == b"hello"
    os.unlink("socket")


# --- extended attributes --------------------------------------------------------------------


def test_b60_user_xattrs(place: Path) -> None:
    (place / "file").write_bytes(b"value")
    (place / "directory").mkdir()
    for path in (place / "file", place / "directory"):
        assert os.listxattr(path) == []
        os.setxattr(path, "user.a", b"one")
        os.setxattr(path, "user.bytes", bytes(range(256)))
        os.setxattr(path, "user.empty", b"")
        os.setxattr(path, "user.a", b"two")
        assert sorted(os.listxattr(path)) == ["user.a", "user.bytes", "user.empty"]
        assert os.getxattr(path, "user.a") == b"two"
        assert os.getxattr(path, "user.bytes") == bytes(range(256))
        assert os.getxattr(path, "user.empty") == b""
        os.removexattr(path, "user.bytes")
        assert sorted(os.listxattr(path)) == ["user.a", "user.empty"]
    assert (place / "file").read_bytes() == b"value"


def test_b60_errnos_of_xattrs(place: Path) -> None:
    file = place / "file"
    file.touch()
    os.symlink("file", place / "link")
    os.setxattr(file, "user.a", b"value", os.XATTR_CREATE)
    assert errno_of(lambda: os.setxattr(file, "user.a", b"", os.XATTR_CREATE)) == "EEXIST"
    assert errno_of(lambda: os.setxattr(file, "user.b", b"", os.XATTR_REPLACE)) == "ENODATA"
    os.setxattr(file, "user.a", b"other", os.XATTR_REPLACE)
    assert errno_of(lambda: os.getxattr(file, "user.b")) == "ENODATA"
    assert errno_of(lambda: os.removexattr(file, "user.b")) == "ENODATA"
    assert errno_of(lambda: os.setxattr(file, "other.a", b"")) == "ENOTSUP"
    assert errno_of(lambda: os.setxattr(file, "user." + "n" * 251, b"")) == "ERANGE"
    assert errno_of(lambda: os.setxattr(file, "user.c", bytes(65537))) == "E2BIG"
    link = place / "link"
    set_on_link = errno_of(lambda: os.setxattr(link, "user.a", b"", follow_symlinks=False))
    assert set_on_link == "EPERM"
    assert os.getxattr(link, "user.a") == b"other"
    assert os.listxattr(file) == ["user.a"]


def test_b60_xattrs_of_what_is_being_written(place: Path) -> None:
    with opened(place / "file", os.O_CREAT | os.O_WRONLY) as fd:
        os.write(fd, b"value")
        os.setxattr(fd, "user.a", b"one")
        assert os.getxattr(fd, "user.a") == b"one"
    assert os.getxattr(place / "file", "user.a") == b"one"
    assert (place / "file").read_bytes() == b"value"


# --- tools ----------------------------------------------------------------------------------

MAKE = """
mkdir -p tree/sub tree/empty
echo one > tree/one; echo two > tree/sub/two; : > tree/zero
chmod 600 tree/one; chmod 755 tree/sub/two; chmod 700 tree/sub
ln -s sub/two tree/link; ln -s /nowhere tree/dangling; mkfifo tree/fifo
touch -h -d @1000000000.5 tree/link tree/dangling
touch -d @981173106.25 tree/one tree/sub/two tree/zero tree/fifo
touch -d @981173107.75 tree/sub tree/empty tree
"""
LIST = "cd {}; find . -printf '%p %y %m %U %G %T@ %l\\n' | sort"


@pytest.mark.parametrize(
    ("copy", "tool"),
    [
        ("cp -a tree copy", "cp"),
        ("tar --format=posix -cf - tree | (mkdir x; cd x; tar -xpf -); mv x/tree copy", "tar"),
        ('rsync -a tree/ copy/; test -z "$(rsync -ai tree/ copy/)"', "rsync"),
        ("cd tree; find . | cpio --quiet -pdm ../copy", "cpio"),
    ],
    ids=["cp", "tar", "rsync", "cpio"],
)
def test_b72_copies_keep_modes_times_and_links(place: Path, copy: str, tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"there is no {tool}")
    sh(place, MAKE)
    original = sh(place, LIST.format("tree"))
    sh(place, copy)
    copied = sh(place, LIST.format("copy"))
    if tool == "cpio":  # whole seconds, and not those of links
        assert [line.split()[:3] for line in copied.splitlines()] == [
            line.split()[:3] for line in original.splitlines()
        ]
    else:
        assert copied == original
    assert sh(place, LIST.format("tree")) == original


def test_b72_install_and_mktemp(place: Path) -> None:
    sh(place, "echo x > src; install -m 0750 -D src a/b/dst; mktemp -p . t.XXXXXX")
    assert mode_of(place / "a/b/dst") == 0o750
    (temporary,) = (name for name in os.listdir(place) if name.startswith("t."))
    assert mode_of(place / temporary) == 0o600
    done = subprocess.run(
        ["/bin/sh", "-c", "echo 'echo run' > script; chmod +x script; ./script"],
        cwd=place,
        capture_output=True,
        check=True,
        timeout=30,
    )
    assert done.stdout == b"run\n"
