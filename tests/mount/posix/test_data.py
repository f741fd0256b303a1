"""The content of files: read, write and their kin at every offset, holes, sizes, maps."""

import mmap
import os
import random
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, final

import pytest

from tests.mount.posix.calls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    errno_of,
    fallocate,
    in_child,
    opened,
)

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

RW, W, R, CREAT = os.O_RDWR, os.O_WRONLY, os.O_RDONLY, os.O_CREAT
PAGE: Final = 4096
DIGITS: Final = b"0123456789"
OFFSETS: Final = (0, 1, 9, 10, 11, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE - 5)


@pytest.fixture
def file(place: Path) -> Path:
    (place / "file").write_bytes(DIGITS)
    return place / "file"


def patched(old: bytes, offset: int, data: bytes) -> bytes:
    """Return `old` with `data` at `offset`, NUL in between."""
    new = bytearray(max(len(old), offset + len(data)))
    new[: len(old)] = old
    new[offset : offset + len(data)] = data
    return bytes(new)


# --- reading and writing --------------------------------------------------------------------


def test_pwrite_and_pread_at_every_offset(file: Path) -> None:
    expected = DIGITS
    for offset in OFFSETS:
        data = b"<%d>" % offset
        expected = patched(expected, offset, data)
        with opened(file, RW) as fd:
            os.lseek(fd, 3, os.SEEK_SET)
            assert os.pwrite(fd, data, offset) == len(data)
            assert os.pread(fd, 100, offset) == expected[offset : offset + 100]
            assert os.fstat(fd).st_size == len(expected)
            assert os.lseek(fd, 0, os.SEEK_CUR) == 3
        assert file.read_bytes() == expected


def test_vectors_are_read_and_written_as_one(file: Path) -> None:
    with opened(file, RW) as fd:
        assert os.writev(fd, [b"a", b"", b"bc"]) == 3
        assert os.pwritev(fd, [b"X", b"YZ"], 8) == 3
        one, two, three = bytearray(2), bytearray(4), bytearray(100)
        assert os.readv(fd, [one, two]) == 6
        assert os.preadv(fd, [three], 7) == 4
        assert (bytes(one), bytes(two), bytes(three[:4])) == (b"34", b"5678"[:2] + b"7X", b"7XYZ")
    assert file.read_bytes() == b"abc34567XYZ"


def test_nothing_written_is_nothing_changed(file: Path) -> None:
    with opened(file, RW) as fd:
        assert os.write(fd, b"") == 0
        assert os.pwrite(fd, b"", 100) == 0
        assert os.read(fd, 0) == b""
    assert file.read_bytes() == DIGITS


@pytest.mark.parametrize("gap", [1, PAGE - 10, PAGE, 100_000])
def test_a_hole_reads_as_nul(file: Path, gap: int) -> None:
    with opened(file, RW) as fd:
        os.lseek(fd, gap, os.SEEK_END)
        os.write(fd, b"end")
        os.lseek(fd, 0, os.SEEK_SET)
        assert os.read(fd, gap + 100) == DIGITS + bytes(gap) + b"end"
    assert file.read_bytes() == DIGITS + bytes(gap) + b"end"


def test_what_was_cut_off_does_not_come_back(file: Path) -> None:
    file.write_bytes(b"x" * 3 * PAGE)
    os.truncate(file, 10)
    os.truncate(file, 2 * PAGE)
    assert file.read_bytes() == b"x" * 10 + bytes(2 * PAGE - 10)
    with opened(file, RW) as fd:
        os.ftruncate(fd, 5)
        os.pwrite(fd, b"y", 3 * PAGE)
        assert os.pread(fd, 4 * PAGE, 0) == b"x" * 5 + bytes(3 * PAGE - 5) + b"y"


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC, os.O_DIRECT, os.O_NOATIME], ids=str)
def test_flags_that_change_how_not_what(file: Path, flag: int) -> None:
    with opened(file, RW | flag) as fd:
        assert os.pread(fd, 100, 0) == DIGITS
        os.pwrite(fd, b"ab", 3)
        os.pwrite(fd, b"end", PAGE)
        assert os.pread(fd, 10, 0) == b"012ab56789"
    assert file.read_bytes() == patched(b"012ab56789", PAGE, b"end")


def test_direct_and_cached_writers_agree(file: Path) -> None:
    with opened(file, RW) as cached, opened(file, RW | os.O_DIRECT) as direct:
        assert os.pread(cached, 10, 0) == DIGITS
        os.pwrite(direct, b"direct", 0)
        assert os.pread(cached, 10, 0) == b"direct6789"
        os.pwrite(cached, b"cached", 4)
        assert os.pread(direct, 10, 0) == b"direcached"[:4] + b"cached"
    assert file.read_bytes() == b"direcached"


def test_o_append(file: Path) -> None:
    with opened(file, RW | os.O_APPEND) as fd, opened(file, RW) as other:
        os.write(fd, b"+one")
        assert os.lseek(fd, 0, os.SEEK_CUR) == 14
        os.pwrite(other, b"+two", 14)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"+three")
        # Linux appends with pwrite(2), too (its BUGS).
        os.pwrite(fd, b"+four", 0)
        assert os.pread(fd, 100, 0) == DIGITS + b"+one+two+three+four"
        os.ftruncate(fd, 4)
        os.write(fd, b"!")
    assert file.read_bytes() == b"0123!"


def test_o_trunc(file: Path) -> None:
    with opened(file, RW) as reader:
        with opened(file, W | os.O_TRUNC) as fd:
            assert os.fstat(reader).st_size == 0
            assert os.read(reader, 10) == b""
            os.write(fd, b"new")
        assert os.read(reader, 10) == b"new"
    with opened(file, R | os.O_CREAT):
        assert file.read_bytes() == b"new"


# --- sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 10, 11, PAGE, PAGE + 1, 100_000])
def test_truncate_both_ways(file: Path, size: int) -> None:
    os.truncate(file, size)
    assert file.read_bytes() == DIGITS[:size].ljust(size, b"\0")
    with opened(file, RW) as fd:
        os.ftruncate(fd, 5)
        assert os.fstat(fd).st_size == 5
        os.ftruncate(fd, 20)
        assert os.pread(fd, 100, 0) == DIGITS[: min(5, size)].ljust(20, b"\0")
    assert file.stat().st_size == 20


def test_seek(file: Path) -> None:
    with opened(file, R) as fd:
        assert os.lseek(fd, 4, os.SEEK_SET) == 4
        assert os.lseek(fd, 2, os.SEEK_CUR) == 6
        assert os.lseek(fd, -1, os.SEEK_END) == 9
        assert os.lseek(fd, 1000, os.SEEK_SET) == 1000
        assert os.read(fd, 1) == b""
        assert os.lseek(fd, 3, os.SEEK_DATA) == 3
        assert os.lseek(fd, 3, os.SEEK_HOLE) == 10


def test_posix_fallocate(file: Path) -> None:
    with opened(file, RW) as fd:
        os.posix_fallocate(fd, 0, 5)
        assert os.fstat(fd).st_size == 10
        os.posix_fallocate(fd, 8, 5000)
        assert os.fstat(fd).st_size == 5008
    assert file.read_bytes() == DIGITS + bytes(4998)


def test_fallocate(file: Path) -> None:
    """Or EOPNOTSUPP, as fallocate(2) allows: the content is the same."""
    with opened(file, RW) as fd:
        supported = errno_of(lambda: fallocate(fd, 0, 0, 20))
        assert supported in {None, "ENOTSUP"}
        assert os.fstat(fd).st_size == (20 if supported is None else 10)
        for mode in (FALLOC_FL_KEEP_SIZE, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE):
            assert errno_of(partial(fallocate, fd, mode, 100, 20)) == supported
        assert errno_of(lambda: fallocate(fd, 0, 0, 0)) == "EINVAL"
    assert file.read_bytes().rstrip(b"\0") == DIGITS


def test_a_file_size_limit_of_the_process(file: Path) -> None:
    def write() -> list[object]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        with opened(file, RW) as fd:
            return [
                os.pwrite(fd, b"x" * 15, 10),
                errno_of(lambda: os.pwrite(fd, b"x", 20)),
                errno_of(lambda: os.ftruncate(fd, 21)),
                errno_of(lambda: os.truncate(file, 21)),
            ]

    assert in_child(write) == [10, "EFBIG", "EFBIG", "EFBIG"]
    assert file.read_bytes() == DIGITS + b"x" * 10


def test_a_process_over_its_limit_gets_sigxfsz(file: Path) -> None:
    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        os.truncate(file, 11)

    assert in_child(write) == -signal.SIGXFSZ
    assert file.read_bytes() == DIGITS


# --- copying --------------------------------------------------------------------------------


def test_copy_file_range(place: Path, file: Path) -> None:
    with opened(file, R) as source, opened(place / "copy", RW | CREAT) as target:
        assert os.copy_file_range(source, target, 5, offset_src=2, offset_dst=3) == 5
        assert os.copy_file_range(source, target, 100) == 10
        assert os.copy_file_range(source, target, 100) == 0
        assert os.lseek(target, 0, os.SEEK_CUR) == 10
        assert os.pread(target, 100, 0) == DIGITS
    with opened(file, RW) as fd:
        assert os.copy_file_range(fd, fd, 3, offset_src=0, offset_dst=20) == 3
    assert file.read_bytes() == patched(DIGITS, 20, b"012")


def test_sendfile(place: Path, file: Path) -> None:
    with opened(file, R) as source, opened(place / "copy", RW | CREAT) as target:
        assert os.sendfile(target, source, 4, 100) == 6
        assert os.sendfile(target, source, 0, 2) == 2
    assert (place / "copy").read_bytes() == b"45678901"


def test_splice(place: Path, file: Path) -> None:
    out_end, in_end = os.pipe()
    with opened(file, R) as source, opened(place / "copy", RW | CREAT) as target:
        assert os.splice(source, in_end, 100) == 10
        assert os.splice(out_end, target, 10, offset_dst=1) == 10
    os.close(out_end)
    os.close(in_end)
    assert (place / "copy").read_bytes() == b"\0" + DIGITS


# --- maps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["msync", "munmap", "closed before", "exit"])
def test_a_shared_map_writes_the_file(file: Path, ending: str) -> None:
    def write() -> None:
        with opened(file, RW) as fd:
            mapped = mmap.mmap(fd, 10)
            if ending != "closed before":
                mapped[3:5] = b"XY"
                assert os.pread(fd, 10, 0) == b"012XY56789"
                assert file.read_bytes() == b"012XY56789"
        mapped[3:5] = b"XY"
        if ending == "msync":
            mapped.flush()
            assert file.read_bytes() == b"012XY56789"
        if ending != "exit":
            mapped.close()

    in_child(write)
    assert file.read_bytes() == b"012XY56789"


def test_a_shared_map_sees_writes(file: Path) -> None:
    with opened(file, RW) as fd, mmap.mmap(fd, 10, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == DIGITS
        os.pwrite(fd, b"ab", 4)
        assert mapped[:] == b"0123ab6789"
        with opened(file, W) as other:
            os.pwrite(other, b"cd", 8)
        assert mapped[:] == b"0123ab67cd"


def test_two_maps_share_their_pages(file: Path) -> None:
    with (
        opened(file, RW) as one,
        opened(file, RW) as two,
        mmap.mmap(one, 10) as first,
        mmap.mmap(two, 10) as second,
    ):
        first[0:1] = b"a"
        second[9:10] = b"z"
        assert first[:] == second[:] == b"a12345678z"
    assert file.read_bytes() == b"a12345678z"


@pytest.mark.parametrize("flags", [RW | os.O_APPEND, W | os.O_APPEND])
def test_a_shared_map_of_what_is_open_for_appending(file: Path, flags: int) -> None:
    """The kernel may write pages back through any handle; they are not appended."""
    size = 2 * PAGE + 10
    file.write_bytes(DIGITS.ljust(size, b"."))
    with opened(file, flags) as appending, opened(file, RW) as fd:
        mapped = appending if flags & RW else fd
        with mmap.mmap(mapped, size) as memory:
            memory[1] = memory[PAGE] = memory[size - 1] = ord("!")
            memory.flush()
        os.write(appending, b"more")
    expected = bytearray(DIGITS.ljust(size, b"."))
    expected[1] = expected[PAGE] = expected[size - 1] = ord("!")
    assert file.read_bytes() == bytes(expected) + b"more"


def test_a_private_map_keeps_its_writes(file: Path) -> None:
    with opened(file, R) as fd, mmap.mmap(fd, 10, access=mmap.ACCESS_COPY) as mapped:
        mapped[0:2] = b"ab"
        assert mapped[:] == b"ab23456789"
    assert file.read_bytes() == DIGITS


def test_a_map_outlives_close_and_unlink(file: Path) -> None:
    with opened(file, RW) as fd:
        mapped = mmap.mmap(fd, 10)
    file.unlink()
    mapped[0:1] = b"x"
    assert mapped[:] == b"x123456789"
    mapped.flush()
    mapped.close()
    assert not file.exists()


def test_a_map_past_the_end_is_nul_and_stays_out_of_the_file(file: Path) -> None:
    with opened(file, RW) as fd, mmap.mmap(fd, 0) as mapped:
        assert len(mapped) == 10
    with opened(file, RW) as fd:
        os.ftruncate(fd, 20)
        with mmap.mmap(fd, 20) as mapped:
            mapped[15:20] = b"after"
            os.ftruncate(fd, 12)
            os.ftruncate(fd, 20)
            assert mapped[:] == DIGITS + bytes(10)
    assert file.read_bytes() == DIGITS + bytes(10)


# --- many operations, against a model -------------------------------------------------------


@final
class Exerciser:
    """Random reads, writes, truncations and maps of one file, checked against plain bytes."""

    SIZE_MAX = 5 * PAGE

    def __init__(self, path: Path, seed: int) -> None:
        self._path = path
        self._random = random.Random(seed)
        self._model = bytearray()
        self._fd = os.open(path, RW | CREAT)
        self.done: list[str] = []

    def run(self, steps: int) -> None:
        operations: tuple[Callable[[], None], ...] = (
            self.write,
            self.write,
            self.map_write,
            self.read,
            self.map_read,
            self.truncate,
            self.append,
            self.copy,
            self.sync,
            self.open_again,
        )
        for _ in range(steps):
            self._random.choice(operations)()
            assert os.fstat(self._fd).st_size == len(self._model), self.done
        os.close(self._fd)
        assert self._path.read_bytes() == self._model, self.done

    def write(self) -> None:
        offset, data = self._some()
        self._note("write", offset, len(data))
        assert os.pwrite(self._fd, data, offset) == len(data)
        self._patch(offset, data)

    def append(self) -> None:
        _, data = self._some()
        data = data[: self.SIZE_MAX - len(self._model)]
        self._note("append", len(self._model), len(data))
        with opened(self._path, W | os.O_APPEND) as fd:
            os.write(fd, data)
        self._patch(len(self._model), data)

    def read(self) -> None:
        offset, data = self._some()
        self._note("read", offset, len(data))
        found = os.pread(self._fd, len(data), offset)
        assert found == self._model[offset : offset + len(data)], self.done

    def map_read(self) -> None:
        if self._model:
            self._note("map_read", 0, len(self._model))
            with mmap.mmap(self._fd, len(self._model), prot=mmap.PROT_READ) as mapped:
                assert mapped[:] == self._model, self.done

    def map_write(self) -> None:
        if not self._model:
            return
        offset, data = self._some()
        offset = min(offset, len(self._model) - 1)
        data = data[: len(self._model) - offset]
        self._note("map_write", offset, len(data))
        with mmap.mmap(self._fd, len(self._model)) as mapped:
            mapped[offset : offset + len(data)] = data
        self._patch(offset, data)

    def truncate(self) -> None:
        size = self._random.randrange(self.SIZE_MAX)
        self._note("truncate", size, 0)
        if self._random.random() < 0.5:
            os.ftruncate(self._fd, size)
        else:
            os.truncate(self._path, size)
        del self._model[size:]
        self._model.extend(bytes(size - len(self._model)))

    def copy(self) -> None:
        half = len(self._model) // 2
        self._note("copy", 0, half)
        if half:
            count = os.copy_file_range(self._fd, self._fd, half, offset_src=0, offset_dst=half)
            self._patch(half, bytes(self._model[:count]))

    def sync(self) -> None:
        self._note("sync", 0, 0)
        os.fsync(self._fd)

    def open_again(self) -> None:
        self._note("open", 0, 0)
        os.close(self._fd)
        self._fd = os.open(self._path, RW)

    def _some(self) -> tuple[int, bytes]:
        offset = self._random.randrange(self.SIZE_MAX)
        size = min(self._random.randrange(1, 2 * PAGE), self.SIZE_MAX - offset)
        return offset, self._random.randbytes(size)

    def _patch(self, offset: int, data: bytes) -> None:
        self._model[:] = patched(bytes(self._model), offset, data)

    def _note(self, name: str, offset: int, size: int) -> None:
        self.done.append(f"{name}({offset}, {size})")


@pytest.mark.parametrize("seed", range(3))
def test_many_operations_on_one_file(place: Path, seed: int) -> None:
    Exerciser(place / "file", seed).run(150)
