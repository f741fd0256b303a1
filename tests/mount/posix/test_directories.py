"""Directories: names, listings, renames, link counts."""

import os
import stat
from functools import partial
from pathlib import Path

import pytest

from tests.mount.posix.calls import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    DirectoryStream,
    errno_of,
    opened,
    renameat2,
)

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

DOTS = {".", ".."}


def tree_of(directory: Path) -> dict[str, bytes | None]:
    """Return every path below a directory, with its content; None for directories."""
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_bytes()
        for path in directory.rglob("*")
    }


# --- listings -------------------------------------------------------------------------------


def many(place: Path, count: int = 60) -> set[str]:
    names = {f"{n:03}-{'x' * 200}" for n in range(count)}  # more than one READDIR
    for name in names:
        (place / name).touch()
    return names


def test_telldir_and_seekdir(place: Path) -> None:
    names = many(place)
    stream = DirectoryStream(place)
    first = [stream.read() for _ in range(20)]
    position = stream.tell()
    rest = stream.rest()
    assert set(first) | set(rest) == names | DOTS
    assert len(first) + len(rest) == len(names) + 2
    stream.seek(position)
    assert stream.rest() == rest
    stream.rewind()
    assert stream.rest() == [*first, *rest]
    stream.close()


def test_rewinddir_shows_what_has_changed(place: Path) -> None:
    (place / "a").touch()
    stream = DirectoryStream(place)
    assert set(stream.rest()) == {"a"} | DOTS
    (place / "a").unlink()
    (place / "b").touch()
    stream.rewind()
    assert set(stream.rest()) == {"b"} | DOTS
    stream.close()


def test_a_listing_under_changes_has_what_stayed_once(place: Path) -> None:
    """What comes or goes meanwhile may be there or not (readdir(3))."""
    names = many(place)
    stream = DirectoryStream(place)
    seen = [stream.read() for _ in range(10)]
    going = sorted(names)[::2]
    for name in going:
        (place / name).unlink()
    coming = {f"new{n}-{'y' * 200}" for n in range(20)}
    for name in coming:
        (place / name).touch()
    seen += stream.rest()
    stream.close()
    assert len(seen) == len(set(seen))
    assert names - set(going) <= set(seen) <= names | coming | DOTS
    assert set(os.listdir(place)) == names - set(going) | coming


def test_types_and_inodes_of_a_listing(place: Path) -> None:
    (place / "d").mkdir()
    (place / "f").touch()
    with os.scandir(place) as entries:
        found = {entry.name: (entry.is_dir(), entry.inode()) for entry in entries}
    assert found == {
        "d": (True, (place / "d").stat().st_ino),
        "f": (False, (place / "f").stat().st_ino),
    }


def test_dots(place: Path) -> None:
    (place / "d").mkdir()
    (place / "d" / "e").mkdir()
    for path in ("d/.", "d/e/..", "d/e/../.", "d/e/../../d"):
        assert (place / path).samefile(place / "d")
    assert os.stat(f"{place}/d/e/../../d/.").st_ino == (place / "d").stat().st_ino


# --- link counts and times ------------------------------------------------------------------


def test_link_counts(place: Path) -> None:
    def links() -> int:
        return place.stat().st_nlink

    before = links()
    (place / "d").mkdir()
    (place / "f").touch()
    assert links() == before + 1
    assert (place / "d").stat().st_nlink == 2
    assert (place / "f").stat().st_nlink == 1
    (place / "d" / "e").mkdir()
    assert (place / "d").stat().st_nlink == 3
    (place / "d" / "e").rmdir()
    assert (place / "d").stat().st_nlink == 2
    (place / "d").rmdir()
    assert links() == before


@pytest.mark.parametrize("change", ["create", "mkdir", "unlink", "rmdir", "rename"])
def test_a_directory_changes_its_times_with_its_names(place: Path, change: str) -> None:
    (place / "f").touch()
    (place / "e").mkdir()
    os.utime(place, ns=(1, 1))
    before = place.stat()
    match change:
        case "create":
            (place / "new").touch()
        case "mkdir":
            (place / "new").mkdir()
        case "unlink":
            (place / "f").unlink()
        case "rmdir":
            (place / "e").rmdir()
        case _:
            (place / "f").rename(place / "new")
    after = place.stat()
    assert after.st_mtime_ns > before.st_mtime_ns
    assert after.st_ctime_ns >= before.st_ctime_ns


# --- renaming -------------------------------------------------------------------------------


@pytest.mark.parametrize("over", [False, True], ids=["new name", "empty directory"])
def test_a_directory_is_renamed(place: Path, over: bool) -> None:
    (place / "a" / "b").mkdir(parents=True)
    (place / "a" / "b" / "f").write_bytes(b"deep")
    (place / "a" / "empty").mkdir()
    if over:
        (place / "z").mkdir()
    inodes = {(place / "a" / name).stat().st_ino for name in ("", "b", "b/f")}
    with opened(place / "a" / "b" / "f", os.O_RDWR) as fd:
        os.rename(place / "a", place / "z")
        os.write(fd, b"DEEP and more")
    assert tree_of(place) == {
        "z": None,
        "z/b": None,
        "z/b/f": b"DEEP and more",
        "z/empty": None,
    }
    assert {(place / "z" / name).stat().st_ino for name in ("", "b", "b/f")} == inodes


def test_a_directory_moves_to_another(place: Path) -> None:
    (place / "a" / "b").mkdir(parents=True)
    (place / "c").mkdir()
    (place / "a" / "b" / "f").write_bytes(b"f")
    os.rename(place / "a" / "b", place / "c" / "d")
    assert tree_of(place) == {"a": None, "c": None, "c/d": None, "c/d/f": b"f"}
    assert (place / "a").stat().st_nlink == 2
    assert (place / "c").stat().st_nlink == 3
    assert (place / "c" / "d" / "..").samefile(place / "c")


def test_two_names_are_exchanged(place: Path) -> None:
    (place / "f").write_bytes(b"f")
    (place / "d").mkdir()
    (place / "d" / "g").write_bytes(b"g")
    inodes = [(place / name).stat().st_ino for name in ("f", "d")]
    renameat2(place / "f", place / "d", RENAME_EXCHANGE)
    assert tree_of(place) == {"d": b"f", "f": None, "f/g": b"g"}
    assert [(place / name).stat().st_ino for name in ("d", "f")] == inodes
    renameat2(place / "d", place / "f" / "g", RENAME_EXCHANGE)
    assert tree_of(place) == {"d": b"g", "f": None, "f/g": b"f"}


def test_a_file_takes_its_open_descriptor_along(place: Path) -> None:
    (place / "a").write_bytes(b"a")
    (place / "b").write_bytes(b"b")
    with opened(place / "a", os.O_RDWR) as a, opened(place / "b", os.O_RDWR) as b:
        os.rename(place / "a", place / "b")
        assert (os.fstat(a).st_nlink, os.fstat(b).st_nlink) == (1, 0)
        os.pwrite(a, b"A", 0)
        os.pwrite(b, b"B", 0)
        assert os.pread(b, 9, 0) == b"B"
    assert tree_of(place) == {"b": b"A"}


def test_renaming_to_oneself_changes_nothing(place: Path) -> None:
    (place / "d").mkdir()
    (place / "f").write_bytes(b"f")
    for name in ("d", "f"):
        os.rename(place / name, place / name)
        assert (
            errno_of(partial(renameat2, place / name, place / name, RENAME_NOREPLACE)) == "EEXIST"
        )
    assert tree_of(place) == {"d": None, "f": b"f"}


def test_replacing_by_rename_is_never_seen_missing(place: Path) -> None:
    """The way every editor and configuration manager saves."""
    for n in range(20):
        (place / "new").write_bytes(b"%d" % n)
        os.rename(place / "new", place / "file")
        assert (place / "file").read_bytes() == b"%d" % n
    assert os.listdir(place) == ["file"]


def test_deep_trees(place: Path) -> None:
    deep = place
    for n in range(30):
        deep /= f"{n}-{'d' * 30}"
        deep.mkdir()
    (deep / "f").write_bytes(b"deep")
    assert stat.S_ISREG((deep / "f").stat().st_mode)
    assert (deep / "f").read_bytes() == b"deep"
    (deep / "f").unlink()
    while deep != place:
        deep.rmdir()
        deep = deep.parent
    assert os.listdir(place) == []
