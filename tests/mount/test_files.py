"""Contents of files, as functions of a path: the same on tmpfs, with and without the mirror."""

import errno
import os
import stat
from pathlib import Path

import pytest

from tests.mount.lab import sh

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]


def read_at(path: Path, offset: int, size: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def write_all(path: Path, flags: int, *pieces: bytes) -> None:
    fd = os.open(path, flags, 0o644)
    try:
        for piece in pieces:
            assert os.write(fd, piece) == len(piece)
    finally:
        os.close(fd)


@pytest.mark.oldest_and_newest_etcd
@pytest.mark.parametrize(
    "value",
    [b"", b"x", b"\0", bytes(range(256)) * 3, b"a\n" * 2048, os.urandom(4097), os.urandom(300_000)],
    ids=["empty", "one", "nul", "binary", "page", "page+1", "large"],
)
def test_what_was_written_is_read(place: Path, value: bytes) -> None:
    file = place / "file"
    file.write_bytes(value)
    assert file.read_bytes() == value
    found = file.stat()
    assert stat.S_ISREG(found.st_mode)
    assert (found.st_size, found.st_nlink) == (len(value), 1)


def test_a_new_value_replaces_the_old_one_whole(place: Path) -> None:
    file = place / "file"
    for value in (b"long " * 1000, b"short", b"", b"long again " * 2000):
        file.write_bytes(value)
        assert file.read_bytes() == value
        assert file.stat().st_size == len(value)


def test_many_small_writes_make_one_value(place: Path) -> None:
    write_all(place / "file", os.O_CREAT | os.O_WRONLY, *(b"%d\n" % n for n in range(300)))
    assert (place / "file").read_bytes() == b"".join(b"%d\n" % n for n in range(300))


def test_reading_beyond_the_end_reads_nothing(place: Path) -> None:
    (place / "file").write_bytes(b"0123456789")
    assert read_at(place / "file", 7, 100) == b"789"
    assert read_at(place / "file", 10, 1) == b""
    assert read_at(place / "file", 1 << 40, 1) == b""


def test_append(place: Path) -> None:
    file = place / "file"
    for piece in (b"one\n", b"two\n", b"three\n"):
        write_all(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND, piece)
    assert file.read_bytes() == b"one\ntwo\nthree\n"


def test_append_ignores_the_position(place: Path) -> None:
    file = place / "file"
    file.write_bytes(b"old")
    fd = os.open(file, os.O_RDWR | os.O_APPEND)
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, b"+new")
    assert os.lseek(fd, 0, os.SEEK_CUR) == 7
    assert os.pread(fd, 100, 0) == b"old+new"
    os.close(fd)
    assert file.read_bytes() == b"old+new"


def test_overwriting_a_part(place: Path) -> None:
    file = place / "file"
    file.write_bytes(b"0123456789")
    fd = os.open(file, os.O_RDWR)
    os.pwrite(fd, b"ab", 3)
    assert os.pread(fd, 100, 0) == b"012ab56789"
    os.close(fd)
    assert file.read_bytes() == b"012ab56789"


def test_a_hole_reads_as_nul(place: Path) -> None:
    fd = os.open(place / "file", os.O_CREAT | os.O_RDWR, 0o644)
    os.pwrite(fd, b"end", 10_000)
    os.pwrite(fd, b"begin", 0)
    os.close(fd)
    assert (place / "file").read_bytes() == b"begin" + bytes(9_995) + b"end"


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 5000])
def test_truncate(place: Path, size: int) -> None:
    file = place / "file"
    file.write_bytes(b"0123456789")
    os.truncate(file, size)
    assert file.stat().st_size == size
    assert file.read_bytes() == b"0123456789"[:size].ljust(size, b"\0")


def test_ftruncate_of_an_open_file(place: Path) -> None:
    file = place / "file"
    file.write_bytes(b"0123456789")
    fd = os.open(file, os.O_RDWR)
    os.ftruncate(fd, 4)
    assert os.fstat(fd).st_size == 4
    assert os.pread(fd, 100, 0) == b"0123"
    os.pwrite(fd, b"x", 6)
    os.close(fd)
    assert file.read_bytes() == b"0123\0\0x"


def test_open_modes_are_kept(place: Path) -> None:
    file = place / "file"
    file.write_bytes(b"value")
    reader = os.open(file, os.O_RDONLY)
    writer = os.open(file, os.O_WRONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(reader, b"x")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.read(writer, 1)
    os.close(reader)
    os.close(writer)


def test_writers_and_readers_of_one_mount_see_each_other_at_once(place: Path) -> None:
    file = place / "file"
    file.write_bytes(b"0123456789")
    with file.open("r+b", buffering=0) as one, file.open("r+b", buffering=0) as two:
        one.write(b"ab")
        assert two.read(4) == b"ab23"
        two.write(b"cd")
        assert os.pread(one.fileno(), 100, 0) == b"ab23cd6789"
        assert file.stat().st_size == 10
        two.seek(0, os.SEEK_END)
        two.write(b"!")
        assert file.stat().st_size == 11
    assert file.read_bytes() == b"ab23cd6789!"


def test_an_unclosed_file_has_its_name_and_its_content(place: Path) -> None:
    with (place / "file").open("wb", buffering=0) as writer:
        writer.write(b"not yet closed")
        assert os.listdir(place) == ["file"]
        assert (place / "file").stat().st_size == 14
        assert (place / "file").read_bytes() == b"not yet closed"


def test_o_excl_makes_and_refuses(place: Path) -> None:
    write_all(place / "file", os.O_CREAT | os.O_EXCL | os.O_WRONLY, b"first")
    with pytest.raises(FileExistsError):
        os.open(place / "file", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    (place / "directory").mkdir()
    with pytest.raises(FileExistsError):
        os.open(place / "directory", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    assert (place / "file").read_bytes() == b"first"


def test_o_creat_opens_what_is_there(place: Path) -> None:
    (place / "file").write_bytes(b"old")
    write_all(place / "file", os.O_CREAT | os.O_WRONLY, b"n")
    assert (place / "file").read_bytes() == b"nld"


def test_mknod_makes_an_empty_file(place: Path) -> None:
    os.mknod(place / "file", stat.S_IFREG | 0o644)
    assert (place / "file").read_bytes() == b""
    with pytest.raises(FileExistsError):
        os.mknod(place / "file", stat.S_IFREG | 0o644)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC])
def test_opening_what_is_not_there(place: Path, flags: int) -> None:
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            os.open(place / "missing", flags)


def test_opening_a_directory_for_writing(place: Path) -> None:
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_TRUNC):
        with pytest.raises(IsADirectoryError):
            os.open(place, flags)


def test_a_file_is_no_directory(place: Path) -> None:
    (place / "file").write_bytes(b"value")
    for attempt in (
        lambda: os.listdir(place / "file"),
        (place / "file" / "below").read_bytes,
        lambda: (place / "file" / "below").write_bytes(b""),
        (place / "file" / "below").mkdir,
        (place / "file").rmdir,
    ):
        with pytest.raises(NotADirectoryError):
            attempt()
    assert (place / "file").read_bytes() == b"value"


def test_an_unlinked_file_is_used_by_who_has_it_open(place: Path) -> None:
    file = place / "file"
    file.write_bytes(b"value")
    with file.open("r+b", buffering=0) as opened:
        file.unlink()
        assert not file.exists()
        assert os.fstat(opened.fileno()).st_nlink == 0
        assert opened.read() == b"value"
        opened.write(b" and more")
        assert os.pread(opened.fileno(), 100, 0) == b"value and more"
        os.fsync(opened.fileno())
    assert not file.exists()
    assert os.listdir(place) == []


def test_an_unlinked_file_that_was_never_closed(place: Path) -> None:
    file = place / "file"
    with file.open("wb", buffering=0) as opened:
        opened.write(b"value")
        file.unlink()
        assert os.fstat(opened.fileno()).st_size == 5
    assert os.listdir(place) == []


def test_a_name_taken_again_while_the_old_file_is_open(place: Path) -> None:
    file = place / "file"
    file.write_bytes(b"old")
    with file.open("r+b", buffering=0) as opened:
        file.unlink()
        file.write_bytes(b"new")
        opened.write(b"OLD!")
        assert os.pread(opened.fileno(), 100, 0) == b"OLD!"
    assert file.read_bytes() == b"new"


def test_a_renamed_file_is_written_under_its_new_name(place: Path) -> None:
    with (place / "old").open("wb", buffering=0) as opened:
        opened.write(b"one ")
        (place / "old").rename(place / "new")
        opened.write(b"two")
        assert (place / "new").read_bytes() == b"one two"
    assert os.listdir(place) == ["new"]
    assert (place / "new").read_bytes() == b"one two"


def test_a_replaced_file_is_read_by_who_has_it_open(place: Path) -> None:
    (place / "file").write_bytes(b"old")
    (place / "next").write_bytes(b"next value")
    with (place / "file").open("r+b", buffering=0) as opened:
        (place / "next").rename(place / "file")
        assert opened.read() == b"old"
        assert os.fstat(opened.fileno()).st_nlink == 0
        opened.write(b" is gone")
    assert (place / "file").read_bytes() == b"next value"
    assert os.listdir(place) == ["file"]


def test_times_follow_the_content(place: Path) -> None:
    file = place / "file"
    file.write_bytes(b"one")
    first = file.stat()
    assert file.read_bytes() == b"one"
    assert file.stat().st_mtime_ns == first.st_mtime_ns
    write_all(file, os.O_WRONLY, b"two")
    second = file.stat()
    assert second.st_mtime_ns > first.st_mtime_ns
    assert second.st_ctime_ns >= second.st_mtime_ns
    assert second.st_ino == first.st_ino
    os.utime(file, ns=(1_000_000_001, 2_000_000_002))
    assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (1_000_000_001, 2_000_000_002)


def test_chmod_is_kept(place: Path) -> None:
    file = place / "file"
    file.write_bytes(b"value")
    file.chmod(0o640)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    file.write_bytes(b"changed")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_fsync_and_friends(place: Path) -> None:
    with (place / "file").open("wb", buffering=0) as opened:
        opened.write(b"one")
        os.fsync(opened.fileno())
        opened.write(b"two")
        os.fdatasync(opened.fileno())
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    os.close(directory)
    assert (place / "file").read_bytes() == b"onetwo"


def test_an_unsupported_kind_of_node_is_refused(place: Path) -> None:
    if place.is_relative_to("/dev/shm"):
        pytest.skip("tmpfs has them")
    for kind in (stat.S_IFCHR, stat.S_IFBLK):
        with pytest.raises(PermissionError) as caught:
            os.mknod(place / "node", kind | 0o644)
        assert caught.value.errno == errno.EPERM
    (place / "file").touch()
    with pytest.raises(PermissionError):
        os.link(place / "file", place / "link")
    assert os.listdir(place) == ["file"]


@pytest.mark.oldest_and_newest_etcd
def test_shell_redirections(place: Path) -> None:
    sh(place, "echo one > file; echo two >> file; echo three >> file")
    assert (place / "file").read_text() == "one\ntwo\nthree\n"
    assert sh(place, "cat file; wc -l < file").split() == ["one", "two", "three", "3"]
    sh(place, "sed -i s/two/2/ file")
    assert (place / "file").read_text() == "one\n2\nthree\n"
    sh(place, "sort -r file -o file; : > empty; tee copy < file > /dev/null; truncate -s 3 copy")
    assert (place / "file").read_text() == "three\none\n2\n"
    assert (place / "copy").read_text() == "thr"
    assert sorted(os.listdir(place)) == ["copy", "empty", "file"]
    sh(place, "dd if=/dev/zero of=file bs=4k count=10 status=none; cmp -n 40960 file /dev/zero")
    sh(place, "exec 3<> file; echo abc >&3; exec 3>&-; head -c 4 file | grep -q abc; rm file")
    assert sorted(os.listdir(place)) == ["copy", "empty"]


def test_python_text_files(place: Path) -> None:
    file = place / "file"
    with file.open("w", encoding="utf-8") as opened:
        opened.write("grün\n")
        opened.writelines(["eins\n", "zwei\n"])
    with file.open("a", encoding="utf-8") as opened:
        opened.write("drei\n")
    with file.open("r+", encoding="utf-8") as opened:
        assert opened.readline() == "grün\n"
        assert opened.read() == "eins\nzwei\ndrei\n"
    with file.open("x+" if not file.exists() else "r", encoding="utf-8") as opened:
        assert len(opened.readlines()) == 4
