"""Readers and writers at the same time: nothing torn, nothing going back, nothing lost."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.mount.client import Client
from tests.mount.lab import Lab

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

UPDATES = 250


@contextmanager
def writing(lab: Lab, write: Callable[[Client, int], object]) -> Iterator[threading.Event]:
    """Have another client write `UPDATES` times during the body; the event says that it is done."""
    done = threading.Event()

    def run() -> None:
        try:
            with closing(Client(lab.etcd.endpoint)) as client:
                for n in range(1, UPDATES + 1):
                    write(client, n)
        finally:
            done.set()

    with ThreadPoolExecutor(1) as executor:
        future: Future[None] = executor.submit(run)
        yield done
        future.result()


def value_of(number: int) -> bytes:
    """Return a value that shows when it is torn: one byte, in a length that goes with it."""
    return b"%d\n" % number + bytes((number % 251,)) * (1000 + number * 37 % 12_000)


@pytest.mark.oldest_and_newest_etcd
def test_b29_b21_nothing_torn_and_nothing_older(lab: Lab) -> None:
    file = lab.path / "file"
    lab.put("file", value_of(0))
    last = reads = 0
    with writing(lab, lambda client, n: client.put(lab.key("file"), value_of(n))) as done:
        while not done.is_set():
            value = file.read_bytes()
            number = int(value[: value.index(b"\n")])
            assert value == value_of(number), "torn"
            assert number >= last, "older than what was read before"
            last = number
            reads += 1
    assert reads
    lab.shown(lab.client.revision())
    assert file.read_bytes() == value_of(UPDATES)


def test_b29_a_file_that_is_replaced_all_the_time_is_always_there(lab: Lab) -> None:
    lab.put("file", b"0")
    with writing(lab, lambda client, n: client.put(lab.key("file"), b"%d" % n)) as done:
        last = (0, 0)
        while not done.is_set():
            found = (lab.path / "file").stat()
            assert os.listdir(lab.path) == ["file"]
            assert found.st_mtime_ns >= last[0]
            last = (found.st_mtime_ns, found.st_size)


@pytest.mark.oldest_and_newest_etcd
def test_b36_two_keys_of_one_transaction_are_never_inverted(cached: Lab) -> None:
    """Whoever has read the new value of one never reads the old one of the other."""
    pair = [cached.key("one/a"), cached.key("two/b")]

    def write(client: Client, n: int) -> None:
        client.put_all([(key, b"%d" % n) for key in pair])

    write(cached.client, 0)
    cached.shown(cached.client.revision())
    paths = [cached.path / "one" / "a", cached.path / "two" / "b"]
    pairs = 0
    with writing(cached, write) as done:
        while not done.is_set():
            first, second = (paths[0], paths[1]) if pairs % 2 else (paths[1], paths[0])
            seen = int(first.read_bytes())
            assert int(second.read_bytes()) >= seen
            pairs += 1
    assert pairs


def test_b36_names_that_come_and_go_together(cached: Lab) -> None:
    """A key moves between two names; it is never at neither, and never at both."""
    names = [cached.key("here"), cached.key("there")]
    cached.put("here", b"")

    def write(client: Client, n: int) -> None:
        client.change_all([(names[n % 2], b"%d" % n)], [names[(n + 1) % 2]])

    with writing(cached, write) as done:
        while not done.is_set():
            assert os.listdir(cached.path) in (["here"], ["there"])


@pytest.mark.oldest_and_newest_etcd
def test_b14_two_mounts_append_and_no_line_is_lost(cached: Lab, other: Lab) -> None:
    def append(path: Path, who: str) -> None:
        for n in range(40):
            with path.open("ab", buffering=0) as opened:
                opened.write(b"%s %d\n" % (who.encode(), n))

    (cached.path / "log").touch()
    other.shown(cached.client.revision())
    with ThreadPoolExecutor(3) as executor:
        tasks = [
            executor.submit(append, cached.path / "log", "a"),
            executor.submit(append, other.path / "log", "b"),
            executor.submit(append, other.path / "log", "c"),
        ]
        for task in tasks:
            task.result()
    found = cached.value("log")
    assert found is not None
    lines = found.decode().splitlines()
    assert sorted(lines) == sorted(f"{who} {n}" for who in "abc" for n in range(40))
    for who in "abc":  # and each one's own lines in their order
        own = [line for line in lines if line.startswith(who)]
        assert own == [f"{who} {n}" for n in range(40)]
    for lab in (cached, other):
        lab.shown(cached.client.revision())
    assert (other.path / "log").read_bytes() == (cached.path / "log").read_bytes() == found


def test_b16_of_many_that_claim_a_name_one_wins(cached: Lab, other: Lab) -> None:
    def claim(path: Path) -> bool:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(6) as executor:
        for n in range(10):
            paths = [lab.path / f"lock{n}" for lab in (cached, other) * 3]
            assert sum(executor.map(claim, paths)) == 1


def test_b21_of_many_that_move_a_file_one_wins(cached: Lab, other: Lab) -> None:
    def move(old_and_new: tuple[Path, Path]) -> bool:
        try:
            old_and_new[0].rename(old_and_new[1])
        except FileNotFoundError:
            return False
        return True

    with ThreadPoolExecutor(4) as executor:
        for n in range(10):
            (cached.path / f"f{n}").write_bytes(b"value")
            other.shown(cached.client.revision())
            moves = [
                (lab.path / f"f{n}", lab.path / f"g{n}-{mover}")
                for mover, lab in enumerate((cached, other) * 2)
            ]
            assert sum(executor.map(move, moves)) == 1
    assert len(cached.own_keys()) == 10


def test_a_busy_directory_does_not_hang(cached: Lab, other: Lab) -> None:
    """Calls that hold a directory's lock against notices that want it."""

    def work(lab: Lab, who: str) -> None:
        for n in range(25):
            path = lab.path / f"{who}{n % 4}"
            path.write_bytes(b"%d" % n)
            path.rename(lab.path / f"shared{n % 3}")
            os.listdir(lab.path)
            (lab.path / f"d{who}").mkdir()
            (lab.path / f"d{who}").rmdir()

    with ThreadPoolExecutor(4) as executor:
        workers = ((cached, "a"), (cached, "b"), (other, "c"), (other, "e"))
        tasks = [executor.submit(work, lab, who) for lab, who in workers]
        for task in tasks:
            task.result()
    for lab in (cached, other):
        lab.shown(cached.client.revision())
        assert sorted(os.listdir(lab.path)) == sorted(os.fsdecode(key) for key in cached.own_keys())
