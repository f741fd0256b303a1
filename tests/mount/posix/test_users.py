"""Attributes and permissions: who may do what, as root and as a user without any right."""

import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from tests.mount.posix.calls import NOBODY, as_user, errno_of, opened

pytestmark = [
    pytest.mark.etcd,
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root"),
]

RW, W, R, CREAT = os.O_RDWR, os.O_WRONLY, os.O_RDONLY, os.O_CREAT
OTHER: Final = 1234


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def owner_of(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid


def open_and_close(path: str, flags: int) -> None:
    os.close(os.open(path, flags))


def make_two() -> None:
    Path("f").touch()
    os.mkdir("d")


# --- what is stored -------------------------------------------------------------------------


def test_stat_and_its_family_agree(place: Path) -> None:
    (place / "f").write_bytes(b"value")
    (place / "f").chmod(0o640)
    with opened(place / "f", R) as fd:
        found = os.fstat(fd)
        for other in (os.stat(place / "f"), os.lstat(place / "f"), os.stat(fd)):
            assert other == found
    with opened(place, R | os.O_DIRECTORY) as directory:
        assert os.stat("f", dir_fd=directory, follow_symlinks=False) == found
    assert (found.st_size, stat.S_IMODE(found.st_mode), found.st_nlink) == (5, 0o640, 1)
    assert found.st_dev == place.stat().st_dev


@pytest.mark.parametrize("mode", [0o000, 0o600, 0o755, 0o1777, 0o4711, 0o2755])
def test_chmod(place: Path, mode: int) -> None:
    (place / "f").write_bytes(b"value")
    (place / "d").mkdir()
    for name in ("f", "d"):
        before = (place / name).stat()
        (place / name).chmod(mode)
        assert mode_of(place / name) == mode
        assert (place / name).stat().st_ctime_ns > before.st_ctime_ns
        assert (place / name).stat().st_mtime_ns == before.st_mtime_ns
    (place / "f").rename(place / "g")
    assert mode_of(place / "g") == mode


def test_umask(place: Path) -> None:
    old = os.umask(0o027)
    try:
        os.close(os.open(place / "f", W | CREAT, 0o666))
        os.mkdir(place / "d", 0o777)
        os.mknod(place / "n", stat.S_IFREG | 0o666)
    finally:
        os.umask(old)
    assert [mode_of(place / name) for name in "fdn"] == [0o640, 0o750, 0o640]


def test_chown(place: Path) -> None:
    (place / "f").touch()
    (place / "d").mkdir()
    for name in ("f", "d"):
        os.chown(place / name, OTHER, NOBODY)
        assert owner_of(place / name) == (OTHER, NOBODY)
        os.chown(place / name, -1, 7)
        assert owner_of(place / name) == (OTHER, 7)
        os.lchown(place / name, 8, -1)
        assert owner_of(place / name) == (8, 7)


def test_utimens(place: Path) -> None:
    (place / "f").touch()
    times = (1_000_000_001, 2_000_000_002)
    for target in (place / "f", place):
        os.utime(target, ns=times)
        found = target.stat()
        assert (found.st_atime_ns, found.st_mtime_ns) == times
    os.utime(place / "f")
    assert (place / "f").stat().st_mtime_ns > 2_000_000_002
    with opened(place / "f", RW) as fd:
        os.write(fd, b"written")
        os.utime(fd, ns=times)
        assert os.fstat(fd).st_mtime_ns == times[1]
    assert (place / "f").stat().st_mtime_ns == times[1]


def test_writing_clears_set_id_bits(place: Path) -> None:
    place.chmod(0o777)
    (place / "f").write_bytes(b"value")
    (place / "f").chmod(0o6777)
    as_user(place, lambda: Path("f").write_bytes(b"changed"))
    assert mode_of(place / "f") == 0o777
    (place / "f").chmod(0o6777)
    os.chown(place / "f", OTHER, OTHER)
    assert mode_of(place / "f") in {0o777, 0o6777}  # root may keep them (chown(2))


def test_a_set_gid_directory_hands_its_group_down(place: Path) -> None:
    os.chown(place, -1, OTHER)
    place.chmod(0o2777)
    as_user(place, make_two)
    assert owner_of(place / "f") == (NOBODY, OTHER)
    assert owner_of(place / "d") == (NOBODY, OTHER)
    assert mode_of(place / "d") & stat.S_ISGID


# --- who may --------------------------------------------------------------------------------

Setup = Callable[[Path], object]
ROOT_ONLY: Final[dict[str, tuple[Callable[[], object], str]]] = {
    "read": (lambda: Path("secret").read_bytes(), "EACCES"),
    "write": (lambda: os.open("secret", W), "EACCES"),
    "append": (lambda: os.open("readable", W | os.O_APPEND), "EACCES"),
    "truncate by open": (lambda: os.open("readable", R | os.O_TRUNC), "EACCES"),
    "truncate": (lambda: os.truncate("readable", 0), "EACCES"),
    "create": (lambda: os.open("new", W | CREAT), "EACCES"),
    "mkdir": (lambda: os.mkdir("new"), "EACCES"),
    "mkfifo": (lambda: os.mkfifo("new"), "EACCES"),
    "symlink": (lambda: os.symlink("x", "new"), "EACCES"),
    "unlink": (lambda: os.unlink("readable"), "EACCES"),
    "rmdir": (lambda: os.rmdir("closed"), "EACCES"),
    "rename": (lambda: os.rename("readable", "new"), "EACCES"),
    "search": (lambda: os.stat("closed/f"), "EACCES"),
    "search and open": (lambda: os.open("closed/f", R), "EACCES"),
    "list": (lambda: os.listdir("closed"), "EACCES"),
    "enter": (lambda: os.chdir("closed"), "EACCES"),
    "chmod": (lambda: os.chmod("readable", 0o666), "EPERM"),
    "chown": (lambda: os.chown("readable", NOBODY, -1), "EPERM"),
    "chgrp": (lambda: os.chown("readable", -1, NOBODY), "EPERM"),
    "utime": (lambda: os.utime("readable", ns=(1, 1)), "EPERM"),
    "touch": (lambda: os.utime("readable"), "EACCES"),
    "set an attribute": (lambda: os.setxattr("readable", "user.x", b"1"), "EACCES"),
}


def test_a_user_without_rights(place: Path) -> None:
    (place / "secret").write_bytes(b"secret")
    (place / "secret").chmod(0o600)
    (place / "readable").write_bytes(b"readable")
    (place / "readable").chmod(0o644)
    (place / "closed").mkdir()
    (place / "closed" / "f").touch()
    (place / "closed").chmod(0o700)
    place.chmod(0o755)
    expected = {name: number for name, (_, number) in ROOT_ONLY.items()}
    found = as_user(place, lambda: {name: errno_of(call) for name, (call, _) in ROOT_ONLY.items()})
    assert found == expected
    assert as_user(place, lambda: Path("readable").read_bytes()) == b"readable"
    assert sorted(os.listdir(place)) == ["closed", "readable", "secret"]
    assert (place / "readable").read_bytes() == b"readable"


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "allowed"),
    [
        (0o400, NOBODY, OTHER, "r"),
        (0o200, NOBODY, OTHER, "w"),
        (0o040, OTHER, NOBODY, "r"),
        (0o020, OTHER, NOBODY, "w"),
        (0o004, OTHER, OTHER, "r"),
        (0o002, OTHER, OTHER, "w"),
        (0o066, NOBODY, NOBODY, ""),  # the owner's bits decide for the owner
        (0o606, OTHER, NOBODY, ""),  # and the group's for the group
    ],
)
def test_which_bits_decide(place: Path, mode: int, uid: int, gid: int, allowed: str) -> None:
    (place / "f").write_bytes(b"value")
    os.chown(place / "f", uid, gid)
    (place / "f").chmod(mode)
    place.chmod(0o755)

    def attempt() -> dict[str, tuple[str | None, bool]]:
        return {
            name: (errno_of(partial(open_and_close, "f", flags)), os.access("f", access))
            for name, flags, access in (("r", R, os.R_OK), ("w", W, os.W_OK))
        }

    expected = {name: (None, True) if name in allowed else ("EACCES", False) for name in ("r", "w")}
    assert as_user(place, attempt) == expected


def test_access_as_root(place: Path) -> None:
    (place / "f").touch()
    (place / "f").chmod(0)
    assert os.access(place / "f", os.R_OK | os.W_OK)
    assert not os.access(place / "f", os.X_OK)
    assert not os.access(place / "missing", os.F_OK)
    (place / "f").chmod(0o100)
    assert os.access(place / "f", os.X_OK)


def test_who_makes_it_owns_it(place: Path) -> None:
    place.chmod(0o777)

    def make() -> None:
        Path("f").write_bytes(b"mine")
        os.mkdir("d", 0o700)
        Path("d/g").touch()
        os.chmod("f", 0o600)
        os.utime("f", ns=(1, 2))
        Path("f").rename("g")

    as_user(place, make)
    assert owner_of(place / "g") == owner_of(place / "d") == (NOBODY, NOBODY)
    assert (mode_of(place / "g"), mode_of(place / "d")) == (0o600, 0o700)
    assert (place / "g").read_bytes() == b"mine"
    assert as_user(place, lambda: errno_of(Path("g").read_bytes), uid=OTHER, gid=OTHER) == "EACCES"


def test_a_sticky_directory(place: Path) -> None:
    place.chmod(0o1777)
    as_user(place, make_two)

    def attempt() -> list[str | None]:
        return [
            errno_of(lambda: os.unlink("f")),
            errno_of(lambda: os.rename("f", "g")),
            errno_of(lambda: os.rmdir("d")),
        ]

    denied = as_user(place, attempt, uid=OTHER, gid=OTHER)
    assert [number in {"EPERM", "EACCES"} for number in denied] == [True] * 3
    assert as_user(place, lambda: errno_of(lambda: os.rename("f", "g"))) is None
    assert as_user(place, lambda: errno_of(lambda: os.unlink("g"))) is None
    assert as_user(place, lambda: errno_of(lambda: os.rmdir("d"))) is None
