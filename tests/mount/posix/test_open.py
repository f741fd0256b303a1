"""open(2): what each flag promises, and what an open file is after its name has gone."""

import os
import stat
from pathlib import Path
from typing import Final

import pytest

from tests.mount.posix.calls import errno_of, in_child, opened

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

RW, W, R, CREAT, EXCL = os.O_RDWR, os.O_WRONLY, os.O_RDONLY, os.O_CREAT, os.O_EXCL
PROC_FD: Final = Path("/proc/self/fd")


def test_o_creat_makes_once(place: Path) -> None:
    with opened(place / "f", W | CREAT) as fd:
        os.write(fd, b"one")
    with opened(place / "f", W | CREAT) as fd:
        os.write(fd, b"tw")
    assert (place / "f").read_bytes() == b"twe"


def test_o_creat_for_reading(place: Path) -> None:
    with opened(place / "f", R | CREAT) as fd:
        assert os.read(fd, 10) == b""
        assert errno_of(lambda: os.write(fd, b"x")) == "EBADF"
    assert (place / "f").read_bytes() == b""


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o444])
def test_the_mode_of_a_new_file_does_not_bind_its_maker(place: Path, mode: int) -> None:
    with opened(place / "f", RW | CREAT | EXCL, mode) as fd:
        os.write(fd, b"written")
        assert os.pread(fd, 10, 0) == b"written"
    assert (place / "f").stat().st_size == 7


def test_o_trunc_with_o_creat_empties(place: Path) -> None:
    (place / "f").write_bytes(b"old")
    with opened(place / "f", R | os.O_TRUNC) as fd:  # unspecified by POSIX; Linux truncates
        assert os.fstat(fd).st_size == 0
    assert (place / "f").read_bytes() == b""


def test_o_directory(place: Path) -> None:
    with opened(place, R | os.O_DIRECTORY) as directory:
        fd = os.open("f", W | CREAT, dir_fd=directory)
        os.close(fd)
        assert os.listdir(directory) == ["f"]
        os.mkdir("d", dir_fd=directory)
        os.rename("f", "d/g", src_dir_fd=directory, dst_dir_fd=directory)
        assert os.stat("d/g", dir_fd=directory).st_size == 0
        os.unlink("d/g", dir_fd=directory)
        os.rmdir("d", dir_fd=directory)
        os.fsync(directory)
    assert os.listdir(place) == []


def test_o_path(place: Path) -> None:
    (place / "f").write_bytes(b"value")
    with opened(place / "f", os.O_PATH) as fd:
        assert os.fstat(fd).st_size == 5
        assert (PROC_FD / str(fd)).read_bytes() == b"value"
        (place / "f").rename(place / "g")
        assert os.readlink(PROC_FD / str(fd)) == str(place / "g")
        os.unlink(place / "g")
        assert os.fstat(fd).st_nlink == 0
    with opened(place, os.O_PATH) as fd:
        assert os.listdir(PROC_FD / str(fd)) == []


def test_o_nofollow_opens_what_is_no_link(place: Path) -> None:
    (place / "f").write_bytes(b"value")
    with opened(place / "f", R | os.O_NOFOLLOW) as fd:
        assert os.read(fd, 10) == b"value"


def test_o_tmpfile(place: Path) -> None:
    """Or EOPNOTSUPP, as open(2) allows; Python's tempfile knows how to do without."""

    def make() -> None:
        with opened(place, RW | os.O_TMPFILE, 0o600) as fd:
            os.write(fd, b"x")
            assert os.fstat(fd).st_nlink == 0

    assert errno_of(make) in {None, "ENOTSUP"}
    assert os.listdir(place) == []


def test_an_open_file_keeps_its_access_when_the_mode_changes(place: Path) -> None:
    with opened(place / "f", RW | CREAT) as fd:
        os.fchmod(fd, 0)
        os.write(fd, b"value")
        assert os.pread(fd, 10, 0) == b"value"
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0


# --- after the name has gone ----------------------------------------------------------------


@pytest.mark.parametrize("how", ["unlinked", "replaced", "replaced by itself anew"])
@pytest.mark.parametrize("when", ["before writing", "after writing", "after fsync"])
def test_an_open_file_without_a_name(place: Path, how: str, when: str) -> None:
    (place / "f").write_bytes(b"old")
    (place / "g").write_bytes(b"other")

    def take_name() -> None:
        if how == "replaced":
            (place / "g").rename(place / "f")
            return
        (place / "f").unlink()
        if how == "replaced by itself anew":
            (place / "f").write_bytes(b"other")

    with opened(place / "f", RW) as fd:
        if when == "before writing":
            take_name()
        os.write(fd, b"new value")
        if when == "after fsync":
            os.fsync(fd)
        if when != "before writing":
            take_name()
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 100, 0) == b"new value"
        os.ftruncate(fd, 5)
        os.pwrite(fd, b"!", 20)
        os.fsync(fd)
        assert os.pread(fd, 100, 0) == b"new v" + bytes(15) + b"!"
        assert os.fstat(fd).st_size == 21
        again = PROC_FD / str(fd)
        assert again.read_bytes() == b"new v" + bytes(15) + b"!"
    if how == "unlinked":
        assert os.listdir(place) == ["g"]
    else:
        assert (place / "f").read_bytes() == b"other"


def test_an_open_file_keeps_its_changes_through_renames(place: Path) -> None:
    (place / "d").mkdir()
    with opened(place / "f", RW | CREAT) as fd:
        os.write(fd, b"one ")
        (place / "f").rename(place / "d" / "g")
        os.write(fd, b"two ")
        (place / "d" / "g").rename(place / "f")
        os.write(fd, b"three")
        os.fsync(fd)
        assert (place / "f").read_bytes() == b"one two three"
        assert os.fstat(fd).st_nlink == 1
        assert os.fstat(fd).st_ino == (place / "f").stat().st_ino
    assert os.listdir(place / "d") == []
    assert (place / "f").read_bytes() == b"one two three"


def test_a_removed_directory_that_is_open(place: Path) -> None:
    (place / "d").mkdir()
    with opened(place / "d", R | os.O_DIRECTORY) as fd:
        (place / "d").rmdir()
        assert os.fstat(fd).st_nlink == 0
        assert errno_of(lambda: os.open("f", W | CREAT, dir_fd=fd)) == "ENOENT"
        assert errno_of(lambda: os.mkdir("d", dir_fd=fd)) == "ENOENT"
        assert errno_of(lambda: os.stat("f", dir_fd=fd)) == "ENOENT"
        assert os.listdir(fd) == []
        (place / "d").mkdir()
        assert errno_of(lambda: os.open("f", W | CREAT, dir_fd=fd)) == "ENOENT"
    assert os.listdir(place / "d") == []


# --- working directory ----------------------------------------------------------------------


def test_chdir_and_getcwd(place: Path) -> None:
    (place / "d" / "e").mkdir(parents=True)

    def walk() -> list[str]:
        found = []
        os.chdir(place / "d" / "e")
        found.append(os.getcwd())
        os.chdir("..")
        found.append(os.getcwd())
        with opened("e", R | os.O_DIRECTORY) as fd:
            os.fchdir(fd)
        found.append(os.getcwd())
        Path("f").write_bytes(b"relative")
        Path("f").unlink()
        os.rmdir("../e")
        return [*found, errno_of(os.getcwd) or "", errno_of(Path("f").touch) or ""]

    d, e = str(place / "d"), str(place / "d" / "e")
    assert in_child(walk) == [e, d, e, "ENOENT", "ENOENT"]
    assert os.listdir(place / "d") == []
