"""Directories and names, as functions of a path: on tmpfs, with and without the mirror."""

import ctypes
import errno
import os
import stat
from pathlib import Path

import pytest

from tests.mount.lab import sh

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

RENAME_NOREPLACE = 1
_AT_FDCWD = -100
_LIBC = ctypes.CDLL(None, use_errno=True)


def renameat2(old: Path, new: Path, flags: int) -> None:
    """Call renameat2(2), which Python does not have."""
    if _LIBC.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(old))


def tree_of(directory: Path) -> dict[str, bytes | None]:
    """Return every path below a directory, with its content; None for directories."""
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_bytes()
        for path in directory.rglob("*")
    }


def test_an_empty_directory(place: Path) -> None:
    (place / "d").mkdir()
    assert os.listdir(place) == ["d"]
    assert os.listdir(place / "d") == []
    found = (place / "d").stat()
    assert stat.S_ISDIR(found.st_mode)
    assert found.st_nlink == 2


@pytest.mark.oldest_and_newest_etcd
def test_directories_in_directories(place: Path) -> None:
    deep = place.joinpath(*(f"d{n}" for n in range(20)))
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"deep")
    (place / "d0" / "file").write_bytes(b"shallow")
    assert sorted(os.listdir(place / "d0")) == ["d1", "file"]
    assert (place / "d0").stat().st_nlink == 3
    assert sh(place, "find . -type f | sort | xargs cat") == "deepshallow"
    assert (deep / ".." / ".." / "d18" / "d19" / "file").read_bytes() == b"deep"


def test_mkdir_where_something_is(place: Path) -> None:
    (place / "d").mkdir()
    (place / "f").touch()
    for name in ("d", "f"):
        with pytest.raises(FileExistsError):
            (place / name).mkdir()
    with pytest.raises(FileNotFoundError):
        (place / "missing" / "d").mkdir()


def test_rmdir(place: Path) -> None:
    (place / "d" / "e").mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"):
        (place / "d").rmdir()
    (place / "d" / "e").rmdir()
    assert os.listdir(place / "d") == []
    (place / "d").rmdir()
    assert os.listdir(place) == []
    with pytest.raises(FileNotFoundError):
        (place / "d").rmdir()


def test_rmdir_of_a_directory_with_a_file(place: Path) -> None:
    (place / "d").mkdir()
    (place / "d" / "f").write_bytes(b"value")
    with pytest.raises(OSError, match="not empty") as caught:
        (place / "d").rmdir()
    assert caught.value.errno == errno.ENOTEMPTY
    assert (place / "d" / "f").read_bytes() == b"value"


def test_rmdir_of_a_directory_with_an_unclosed_file(place: Path) -> None:
    (place / "d").mkdir()
    with (place / "d" / "f").open("wb") as opened:
        with pytest.raises(OSError, match="not empty"):
            (place / "d").rmdir()
        opened.write(b"value")
    assert (place / "d" / "f").read_bytes() == b"value"


def test_a_directory_stays_when_its_last_file_goes(place: Path) -> None:
    (place / "d" / "e").mkdir(parents=True)
    (place / "d" / "e" / "f").touch()
    (place / "d" / "e" / "f").unlink()
    assert os.listdir(place / "d" / "e") == []
    (place / "d" / "e").rmdir()
    assert os.listdir(place / "d") == []


def test_unlink(place: Path) -> None:
    (place / "f").touch()
    (place / "f").unlink()
    assert not (place / "f").exists()
    with pytest.raises(FileNotFoundError):
        (place / "f").unlink()
    (place / "d").mkdir()
    with pytest.raises(IsADirectoryError):
        (place / "d").unlink()


def test_removed_names_can_be_taken_again(place: Path) -> None:
    for _ in range(3):
        (place / "name").write_bytes(b"file")
        (place / "name").unlink()
        (place / "name").mkdir()
        (place / "name" / "f").touch()
        (place / "name" / "f").unlink()
        (place / "name").rmdir()
    assert os.listdir(place) == []


def test_a_working_directory_that_goes(place: Path) -> None:
    out = sh(place, "mkdir d; cd d; rmdir ../d; touch f 2>/dev/null || echo refused; ls -A | wc -l")
    assert out.split() == ["refused", "0"]


# --- renaming -------------------------------------------------------------------------------


@pytest.mark.oldest_and_newest_etcd
def test_rename_to_a_new_name(place: Path) -> None:
    (place / "old").write_bytes(b"value")
    inode = (place / "old").stat().st_ino
    (place / "old").rename(place / "new")
    assert tree_of(place) == {"new": b"value"}
    assert (place / "new").stat().st_ino == inode


def test_rename_into_another_directory(place: Path) -> None:
    (place / "a").mkdir()
    (place / "b").mkdir()
    (place / "a" / "f").write_bytes(b"value")
    (place / "a" / "f").rename(place / "b" / "g")
    assert tree_of(place) == {"a": None, "b": None, "b/g": b"value"}


def test_rename_over_a_file(place: Path) -> None:
    (place / "a").write_bytes(b"a")
    (place / "b").write_bytes(b"longer b")
    (place / "a").rename(place / "b")
    assert tree_of(place) == {"b": b"a"}


def test_rename_to_itself(place: Path) -> None:
    (place / "a").write_bytes(b"a")
    (place / "a").rename(place / "a")
    assert tree_of(place) == {"a": b"a"}


def test_rename_of_an_unclosed_file(place: Path) -> None:
    (place / "b").write_bytes(b"b")
    with (place / "a").open("wb", buffering=0) as opened:
        opened.write(b"written")
        (place / "a").rename(place / "b")
    assert tree_of(place) == {"b": b"written"}


def test_rename_over_an_unclosed_file(place: Path) -> None:
    (place / "a").write_bytes(b"a")
    with (place / "b").open("wb", buffering=0) as opened:
        opened.write(b"never published")
        (place / "a").rename(place / "b")
    assert tree_of(place) == {"b": b"a"}


def test_rename_without_replacing(place: Path) -> None:
    (place / "a").write_bytes(b"a")
    (place / "b").write_bytes(b"b")
    with pytest.raises(FileExistsError):
        renameat2(place / "a", place / "b", RENAME_NOREPLACE)
    assert tree_of(place) == {"a": b"a", "b": b"b"}
    renameat2(place / "a", place / "c", RENAME_NOREPLACE)
    assert tree_of(place) == {"b": b"b", "c": b"a"}
    sh(place, "mv -n b c")
    assert tree_of(place)["c"] == b"a"


def test_rename_that_cannot_be(place: Path) -> None:
    (place / "f").write_bytes(b"f")
    (place / "d").mkdir()
    with pytest.raises(FileNotFoundError):
        (place / "missing").rename(place / "f")
    with pytest.raises(FileNotFoundError):
        (place / "f").rename(place / "missing" / "f")
    with pytest.raises(IsADirectoryError):
        (place / "f").rename(place / "d")
    with pytest.raises(NotADirectoryError):
        (place / "f").rename(place / "f" / "g")
    assert tree_of(place) == {"f": b"f", "d": None}


def test_mv_moves_a_whole_directory(place: Path) -> None:
    sh(place, "mkdir -p a/b; echo 1 > a/one; echo 2 > a/b/two; mv a c; mkdir d; mv c d")
    assert tree_of(place) == {
        "d": None,
        "d/c": None,
        "d/c/one": b"1\n",
        "d/c/b": None,
        "d/c/b/two": b"2\n",
    }


# --- tools ----------------------------------------------------------------------------------


@pytest.mark.oldest_and_newest_etcd
def test_ls(place: Path) -> None:
    sh(place, "mkdir d; echo hello > f; : > .hidden")
    assert sh(place, "ls -A").split() == [".hidden", "d", "f"]
    assert sh(place, "ls -a").split()[:2] == [".", ".."]
    lines = sh(place, "ls -lan").splitlines()
    assert {line.split()[-1]: line[0] for line in lines[1:]} == {
        ".": "d",
        "..": "d",
        ".hidden": "-",
        "d": "d",
        "f": "-",
    }
    assert [line.split()[4] for line in lines if line.endswith(" f")] == ["6"]
    assert len({line.split()[0] for line in sh(place, "ls -Ai").splitlines()}) == 3


@pytest.mark.oldest_and_newest_etcd
def test_cp_find_and_rm(place: Path) -> None:
    sh(place, "mkdir -p a/b/c; echo 1 > a/1; echo 2 > a/b/2; : > a/b/c/3; cp -r a z; diff -r a z")
    assert sh(place, "find z | sort").split() == [
        "z",
        "z/1",
        "z/b",
        "z/b/2",
        "z/b/c",
        "z/b/c/3",
    ]
    assert sh(place, "find . -name '[0-9]' -newermt 2000-01-01 -size -10 | wc -l").strip() == "6"
    assert sh(place, "grep -rl 2 . | sort").split() == ["./a/b/2", "./z/b/2"]
    sh(place, "rm -r a; rm -rf z/b")
    assert tree_of(place) == {"z": None, "z/1": b"1\n"}
    sh(place, "rm -rf z")
    assert os.listdir(place) == []


def test_b10_a_listing_is_complete_and_has_each_name_once(place: Path) -> None:
    names = [f"{n:04}-{'x' * 200}" for n in range(100)]  # several READDIRs
    for name in names:
        (place / name).touch()
    assert sorted(os.listdir(place)) == names
    with os.scandir(place) as entries:
        assert {entry.name for entry in entries if entry.is_file()} == set(names)


def test_a_listing_while_its_files_are_removed(place: Path) -> None:
    for n in range(100):
        (place / f"{n:04}-{'x' * 200}").touch()
    seen = []
    with os.scandir(place) as entries:
        for entry in entries:
            seen.append(entry.name)
            (place / entry.name).unlink()
    assert len(set(seen)) == len(seen) == 100
    assert os.listdir(place) == []


def test_b114_statfs(place: Path) -> None:
    space = os.statvfs(place)
    assert space.f_namemax == 255
    assert space.f_bsize >= 512
    assert space.f_frsize >= 512
    assert 0 < space.f_bavail <= space.f_bfree <= space.f_blocks
    assert 0 < space.f_ffree <= space.f_files
    sh(place, "df . > /dev/null; df -i . > /dev/null; stat -f . > /dev/null")


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        b"foo",
        b"a name with blanks",
        "grün".encode(),
        b"\xff\xfe not UTF-8 \x80",
        b"new\nline",
        b"\x01\x7f",
        b"-rf",
        b"...",
        b".hidden",
        b"%",
        b"%41",
        b"100%",
        b"%home%me%file",
        b"%=abc",
        b"x" * 255,
        b"%" * 255,
        b"\xff" * 255,
        b"'\"\\$`*?[]{}|&;<>()",
    ],
)
def test_b9_any_name_will_do(place: Path, name: bytes) -> None:
    raw = os.fsencode(place)
    path = raw + b"/" + name
    with open(path, "wb") as opened:
        opened.write(b"value")
    assert os.listdir(raw) == [name]
    with open(path, "rb") as opened:
        assert opened.read() == b"value"
    os.rename(path, raw + b"/other")
    os.rename(raw + b"/other", path)
    os.unlink(path)
    os.mkdir(path)
    with open(path + b"/" + name, "wb") as opened:
        opened.write(b"below")
    assert os.listdir(path) == [name]
    os.unlink(path + b"/" + name)
    os.rmdir(path)
    assert os.listdir(raw) == []


def test_a_name_too_long(place: Path) -> None:
    long = place / ("x" * 256)
    (place / "f").touch()
    for attempt in (
        lambda: long.write_bytes(b""),
        long.mkdir,
        long.stat,
        long.unlink,
        lambda: (place / "f").rename(long),
    ):
        with pytest.raises(OSError, match="too long") as caught:
            attempt()
        assert caught.value.errno == errno.ENAMETOOLONG
    assert os.listdir(place) == ["f"]


def test_neighbours(place: Path) -> None:
    (place / "foo").mkdir()
    (place / "foo" / "x").write_bytes(b"foo/x")
    for name in ("foo-bar", "foo.conf", "foo2", "fo", "foo ", "foo0"):
        (place / name).write_bytes(name.encode())
    assert sorted(os.listdir(place)) == ["fo", "foo", "foo ", "foo-bar", "foo.conf", "foo0", "foo2"]
    assert os.listdir(place / "foo") == ["x"]
    (place / "foo" / "x").unlink()
    (place / "foo").rmdir()
    assert not (place / "foo").exists()
    assert (place / "foo-bar").read_bytes() == b"foo-bar"
