"""Several processes on one file: shared offsets, appends, locks, races."""

import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.mount.posix.calls import Child, errno_of, in_child, opened

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

RW, W, R, CREAT, EXCL = os.O_RDWR, os.O_WRONLY, os.O_RDONLY, os.O_CREAT, os.O_EXCL
F_OFD_SETLK: Final = 37  # include/uapi/asm-generic/fcntl.h


def test_dup_and_fork_share_the_offset(place: Path) -> None:
    with opened(place / "f", RW | CREAT) as fd:
        copy = os.dup(fd)
        os.write(fd, b"one ")
        os.write(copy, b"two ")
        os.close(copy)
        in_child(lambda: os.write(fd, b"three"))
        assert os.lseek(fd, 0, os.SEEK_CUR) == 13
        os.lseek(fd, 4, os.SEEK_SET)
        assert in_child(lambda: os.read(fd, 4)) == b"two "
        assert os.read(fd, 100) == b"three"
    assert (place / "f").read_bytes() == b"one two three"


def test_two_openings_have_two_offsets(place: Path) -> None:
    with opened(place / "f", RW | CREAT) as one, opened(place / "f", RW) as two:
        os.write(one, b"abc")
        os.write(two, b"X")
        assert os.lseek(one, 0, os.SEEK_CUR) == 3
        assert os.lseek(two, 0, os.SEEK_CUR) == 1
    assert (place / "f").read_bytes() == b"Xbc"


def test_writers_share_one_buffer(place: Path) -> None:
    """Each writes its own part; whoever closes first takes nothing from the others."""
    (place / "f").write_bytes(b"-" * 400)

    def write(number: int) -> Callable[[], None]:
        def run() -> None:
            with opened(place / "f", W) as fd:
                for at in range(100):
                    os.pwrite(fd, b"%d" % number, 4 * at + number)

        return run

    with opened(place / "f", RW):
        for child in [Child(write(number)) for number in range(4)]:
            child.result()
    assert (place / "f").read_bytes() == b"0123" * 100


@pytest.mark.parametrize("held", [True, False], ids=["open throughout", "opened each time"])
def test_appends_of_many_processes(place: Path, held: bool) -> None:
    """Every line is there, whole, and each writer's in its order."""
    writers, lines = 4, 12

    def write(name: int) -> Callable[[], None]:
        def run() -> None:
            for number in range(0, lines, lines if held else 1):
                with opened(place / "log", W | CREAT | os.O_APPEND) as fd:
                    for n in range(number, number + (lines if held else 1)):
                        os.write(fd, b"%d %d %s\n" % (name, n, b"x" * 50))

        return run

    for child in [Child(write(name)) for name in range(writers)]:
        child.result()
    found = [line.split() for line in (place / "log").read_bytes().splitlines()]
    assert len(found) == writers * lines
    assert {line[2] for line in found} == {b"x" * 50}
    for name in range(writers):
        assert [int(n) for w, n, _ in found if int(w) == name] == list(range(lines))


def attempt(call: Callable[[], Any]) -> Callable[[], str | None]:
    return lambda: errno_of(call)


@pytest.mark.parametrize("call", ["open", "mkdir", "rename", "unlink", "rmdir"])
def test_one_of_many_wins(place: Path, call: str) -> None:
    (place / "victim").touch()
    (place / "directory").mkdir()
    calls: dict[str, Callable[[], Any]] = {
        "open": lambda: os.close(os.open(place / "new", W | CREAT | EXCL)),
        "mkdir": lambda: os.mkdir(place / "new"),
        "rename": lambda: os.rename(place / "victim", place / f"by{os.getpid()}"),
        "unlink": lambda: os.unlink(place / "victim"),
        "rmdir": lambda: os.rmdir(place / "directory"),
    }
    found = [child.result() for child in [Child(attempt(calls[call])) for _ in range(8)]]
    assert found.count(None) == 1
    losers = "EEXIST" if call in {"open", "mkdir"} else "ENOENT"
    assert found.count(losers) == 7


# --- locks ----------------------------------------------------------------------------------


def test_flock(place: Path) -> None:
    (place / "f").touch()
    with opened(place / "f", RW) as one, opened(place / "f", R) as two:
        fcntl.flock(one, fcntl.LOCK_SH)
        fcntl.flock(two, fcntl.LOCK_SH)
        assert errno_of(lambda: fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)) == "EAGAIN"
        fcntl.flock(two, fcntl.LOCK_UN)
        fcntl.flock(one, fcntl.LOCK_EX)
        again = attempt(lambda: fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB))
        assert in_child(again) == "EAGAIN"
        # The lock belongs to the open file, which a child shares.
        assert in_child(attempt(lambda: fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB))) is None
    with opened(place / "f", RW) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_posix_locks(place: Path) -> None:
    (place / "f").write_bytes(b"0123456789")
    with opened(place / "f", RW) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX, 4, 2)

        def try_lock(start: int, length: int) -> Callable[[], str | None]:
            return attempt(lambda: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start))

        assert [in_child(try_lock(*area)) for area in [(0, 2), (2, 1), (5, 1), (6, 0)]] == [
            None,
            "EAGAIN",
            "EAGAIN",
            None,
        ]
        with opened(place / "f", R):
            pass  # closing any descriptor of the file drops the process's locks (fcntl(2))
        assert in_child(try_lock(2, 4)) is None


def test_getlk_tells_who_holds_it(place: Path) -> None:
    with opened(place / "f", RW | CREAT) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX)
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = in_child(lambda: fcntl.fcntl(fd, fcntl.F_GETLK, asked))
        kind, _, _, _, pid = struct.unpack("hhqqi4x", answer)
        assert (kind, pid) == (fcntl.F_WRLCK, os.getpid())


def test_locks_of_open_files(place: Path) -> None:
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with opened(place / "f", RW | CREAT) as one, opened(place / "f", RW) as two:
        fcntl.fcntl(one, F_OFD_SETLK, lock)
        assert errno_of(lambda: fcntl.fcntl(two, F_OFD_SETLK, lock)) == "EAGAIN"


def test_a_lock_guards_a_counter(place: Path) -> None:
    (place / "n").write_bytes(b"0")

    def count() -> None:
        for _ in range(5):
            with opened(place / "lock", RW | CREAT) as guard:
                fcntl.lockf(guard, fcntl.LOCK_EX)
                number = int((place / "n").read_bytes())
                (place / "n").write_bytes(b"%d" % (number + 1))

    for child in [Child(count) for _ in range(4)]:
        child.result()
    assert (place / "n").read_bytes() == b"20"
