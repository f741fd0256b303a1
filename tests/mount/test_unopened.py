"""Read-only mounts whose files the kernel opens without asking: what that costs, and what is shown."""

import mmap
import os
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from etcdfs.daemon.kernel_threads import may_look
from tests.mount import test_coherence
from tests.mount.client import Client
from tests.mount.conftest import options_for
from tests.mount.lab import Lab, Pool
from tests.mount.machine.twins import drop_caches
from tests.mount.posix.calls import errno_of, opened
from tests.mount.test_fast_path import needs_fast_path
from tests.mount.test_held import Container, Hold, by_handle, container, handle_of, hold, needs_root
from tests.mount.test_requests import TIMES, put_all, read_once, requests_of
from tests.support.etcd_process import EtcdProcess

__all__ = ["container", "hold"]

needs_to_look = pytest.mark.skipif(
    not may_look(), reason="the kernel does not tell us who has a file open"
)
pytestmark = [pytest.mark.etcd, pytest.mark.fuse, needs_fast_path, needs_root, needs_to_look]

MANY = 300


@pytest.fixture
def read(request: pytest.FixtureRequest, pool: Pool, etcd_binary: Path, cached: Lab) -> Lab:
    """Return the same directory as `cached`'s in a mount that is read only."""
    options = ("--read-only", "--kernel-timeout", "600", *options_for(request))
    mounted = pool.mounted(etcd_binary, "--cache", *options)
    mounted.wait(cached.client.revision())
    assert "NO_OPEN" in mounted.statistics()["fast_path"]
    path = mounted.path / cached.path.name
    return Lab(cached.etcd, cached.client, mounted, path, cached.prefix)


# --- what it costs --------------------------------------------------------------------------


@pytest.mark.counts_requests
def test_b43_what_is_read_again_costs_nothing(read: Lab) -> None:
    put_all(read, [("d/file", b"value" * 1000), ("d/other", b"")])
    path, directory = read.path / "d/file", read.path / "d"
    lines = b"value" * 1000

    def use_it() -> None:
        for _ in range(TIMES // 20):
            assert read_once(path) == lines
            assert path.stat().st_size == len(lines)
            assert not (directory / "missing").exists()
            assert os.access(path, os.R_OK)
            assert sorted(os.listdir(directory)) == ["file", "other"]
            assert errno_of(lambda: os.getxattr(path, "security.missing")) == "ENOTSUP"

    use_it()
    assert not requests_of(read, use_it)
    read.put("d/file", b"another")
    assert read_once(path) == b"another"


@pytest.mark.counts_requests
def test_b43_a_link_that_is_read_again_costs_nothing(read: Lab, cached: Lab) -> None:
    (cached.path / "link").symlink_to("target")
    read.shown(read.client.revision())
    assert (read.path / "link").readlink() == Path("target")
    assert not requests_of(read, lambda: [(read.path / "link").readlink() for _ in range(10)])


@pytest.mark.counts_requests
def test_b43_many_files_cost_a_request_each_at_most(read: Lab) -> None:
    put_all(read, [(f"d/{number:04d}", b"value %d" % number) for number in range(MANY)])

    def read_all() -> None:
        command = ["grep", "-rhc", "value", str(read.path)]
        found = subprocess.run(command, capture_output=True, check=True)
        assert found.stdout == b"1\n" * MANY

    def cost() -> "Counter[str]":
        requests = requests_of(read, read_all)
        del requests["statfs"]  # fts(3) asks what file system it is in; nothing keeps that
        return requests

    first, second, third = cost(), cost(), cost()
    assert first.total() <= 1.1 * MANY
    # A READ makes the atime unknown to Linux (fuse_invalidate_atime), and so does a READDIR; what
    # was handed over before it was asked for does not.
    assert second.keys() <= {"getattr"}
    assert second.total() <= first["read"] + 2
    assert not third


@pytest.mark.counts_requests
def test_b43_reading_between_changes_costs_nothing(read: Lab) -> None:
    path = read.path / "file"
    for number in range(20):
        value = b"%d" % number * (1 + 300 * number)
        read.put("file", value)
        assert read_once(path) == value
        assert not requests_of(read, lambda: [read_once(path) for _ in range(50)])


@pytest.mark.parametrize(
    "options",
    [
        ("--read-only", "--max-stale", "100"),
        ("--read-only", "--consistency", "linearizable"),
        ("--read-only", "--kernel-timeout", "0"),
        ("--read-only", "--fast-path", "off"),
        (),
    ],
)
def test_b43_where_an_answer_is_to_be_asked_for_each_open_asks(
    pool: Pool, cached: Lab, options: tuple[str, ...]
) -> None:
    cached.put("file", b"value")
    with pool.private(cached.etcd, "--cache", *options) as mounted:
        path = mounted.path / cached.path.name / "file"
        assert read_once(path) == b"value"
        with mounted.counting() as requests:
            assert read_once(path) == b"value"
        assert requests["open"] == 1


# --- what is shown --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "promise",
    [
        test_coherence.test_b28_a_remote_put_is_seen_by_every_call,
        test_coherence.test_b28_a_value_of_the_same_size_is_seen,
        test_coherence.test_b28_a_name_known_to_be_missing_appears,
        test_coherence.test_b28_a_directory_known_to_be_missing_appears,
        test_coherence.test_b28_listings_follow,
        test_coherence.test_b28_link_counts_and_times_of_directories_follow,
        test_coherence.test_b28_a_file_becomes_a_directory_and_back,
        test_coherence.test_b28_many_changes_at_once,
        test_coherence.test_b29_an_open_file_keeps_its_version,
        test_coherence.test_b29_a_memory_map_keeps_its_version,
        test_coherence.test_b29_a_remote_change_of_nothing_is_a_new_version,
    ],
    ids=lambda promise: str(promise.__name__),
)
def test_b45_what_other_mounts_promise(read: Lab, promise: Callable[[Lab], None]) -> None:
    promise(read)


def test_b45_a_revision_that_changes_very_many_files_that_the_kernel_has(
    pool: Pool, etcd_binary: Path
) -> None:
    names = [f"/d/{number:04d}" for number in range(1500)]
    with (
        EtcdProcess(etcd_binary, "--max-txn-ops", "2000") as etcd,
        closing(Client(etcd.endpoint)) as client,
        pool.private(etcd, "--cache", "--read-only") as mounted,
    ):
        paths = [Path(f"{mounted.path}{name}") for name in names]
        mounted.wait(client.put_all((name.encode(), b"old value") for name in names))
        assert {path.read_bytes() for path in paths} == {b"old value"}
        with opened(paths[7], os.O_RDONLY) as fd:
            mounted.wait(client.put_all((name.encode(), b"new") for name in names))
            assert {path.read_bytes() for path in paths} == {b"new"}
            assert os.pread(fd, 100, 0) == b"old value"
            mounted.wait(client.delete_below(b"/d/"))
            assert os.pread(fd, 100, 0) == b"old value"
            assert os.fstat(fd).st_size == len(b"old value")
            assert not (mounted.path / "d").exists()


CHANGES = 400
PATTERN = 8


def value_of(number: int) -> bytes:
    return b"%08d" % number * (1 + number % PATTERN * 400)


def read_whole(path: Path) -> int:
    """Read a file in pieces; return which value it has.

    O_NONBLOCK: an open that comes upon a lease of ours would fail (EAGAIN).
    """
    with opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        size = os.fstat(fd).st_size
        value = b"".join(iter(lambda: os.read(fd, 4096), b""))
    assert len(value) == size, "torn"
    assert value == value_of(int(value[:8])), "torn"
    return int(value[:8])


def read_on(
    paths: tuple[Path, Path], stop: threading.Event, rounds: list[int], reader: int
) -> None:
    """Read two files that change together, until told to stop; count how often."""
    last = 0
    while not stop.is_set():
        first, second = map(read_whole, paths)
        assert last <= first, "gone back"
        assert first <= second, "inverted"
        last = second
        rounds[reader] += 1


def test_b45_readers_under_a_writer_that_never_stops(read: Lab) -> None:
    paths = read.path / "one", read.path / "two"

    def put(number: int) -> int:
        return read.client.put_all((read.key(p.name), value_of(number)) for p in paths)

    revision = read.shown(put(0))
    stop = threading.Event()
    rounds, number = [0] * 4, 0
    with ThreadPoolExecutor(4) as threads, read.mounted.counting() as requests:
        readers = [
            threads.submit(read_on, paths, stop, rounds, reader) for reader in range(len(rounds))
        ]
        try:
            # It goes on until each has read often, however busy the machine is.
            while number < CHANGES or min(rounds) < CHANGES // 4:
                number += 1
                revision = put(number)
                if any(reader.done() for reader in readers):
                    break  # it has found something
        finally:
            stop.set()
        for reader in readers:
            reader.result()
        read.shown(revision)
    assert not requests["open"]
    assert list(map(read_whole, paths)) == [number, number]


# --- what is open ---------------------------------------------------------------------------


def test_b44_what_is_open_keeps_its_version(read: Lab) -> None:
    file, old = read.path / "file", b"one" * 100_000
    read.put("file", old)
    with opened(file, os.O_RDONLY) as fd, opened(file, os.O_RDONLY) as mapped:
        assert os.read(fd, 10) == b"oneoneoneo"
        with mmap.mmap(mapped, 0, access=mmap.ACCESS_READ) as pages:
            os.close(os.dup(mapped))
            for value in (b"two", b"three" * 100_000, b""):
                read.put("file", value)
                assert file.read_bytes() == value
                assert os.fstat(fd).st_size == len(old)
                assert os.fstat(fd).st_nlink == 0
                assert pages[:] == old
            read.client.compact(read.client.revision())
            read.delete("file")
            assert not file.exists()
            drop_caches(read.mounted.path)
            assert os.pread(fd, 1 << 20, 0) == old


def test_b44_wherever_the_descriptor_is(read: Lab) -> None:
    """On its way through a socket, in no process; only mapped; held by the kernel."""
    file = read.path / "file"
    read.put("file", b"one" * 5000)
    here, there = socket.socketpair()
    with here, there:
        with opened(file, os.O_RDONLY) as fd:
            socket.send_fds(here, [b"-"], [fd])
        for value in (b"two", b"three"):
            read.put("file", value)
            assert file.read_bytes() == value
        _, fds, _, _ = socket.recv_fds(there, 1, 1)
        assert os.read(fds[0], 20_000) == b"one" * 5000
        os.close(fds[0])
    with opened(file, os.O_RDONLY) as fd:
        pages = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    with pages:
        read.put("file", b"FOUR!")
        assert pages[:] == b"three"
        assert file.read_bytes() == b"FOUR!"


def test_b44_a_value_that_memory_has_no_room_for(pool: Pool, cached: Lab) -> None:
    with pool.private(cached.etcd, "--cache", "--read-only", "--cache-size", "0") as mounted:
        path = mounted.path / cached.path.name / "file"
        old = os.urandom(1_000_000)
        mounted.wait(cached.client.put(cached.key("file"), old))
        asked = mounted.statistics()["store"]["ranges"]
        with opened(path, os.O_RDONLY) as fd:
            assert b"".join(iter(lambda: os.read(fd, 65_536), b"")) == old
            assert mounted.statistics()["store"]["ranges"] <= asked + 3
            mounted.wait(cached.client.put(cached.key("file"), b"new"))
            cached.client.compact(cached.client.revision())
            drop_caches(mounted.path)
            assert os.pread(fd, 1 << 20, 0) == old
            assert path.read_bytes() == b"new"


# --- what is held and not open --------------------------------------------------------------


def test_b44_what_is_held_and_not_open_follows_its_key(read: Lab, hold: Hold) -> None:
    file = read.path / "file"
    read.put("file", b"one")
    with hold(file) as held:
        inode = held.stat().st_ino
        assert held.read_bytes() == b"one"
        for value in (b"two", b"longer than before" * 1000, b"", b"3", b"3"):
            read.put("file", value)
            assert held.stat().st_size == len(value)
            assert held.read_bytes() == value
            assert file.read_bytes() == value
        read.delete("file")
        assert not file.exists()
        assert held.read_bytes() == b"3"
        read.put("file", b"made anew")
        assert held.read_bytes() == file.read_bytes() == b"made anew"
        assert held.stat().st_ino == file.stat().st_ino == inode


def test_b44_what_is_held_follows_once_nobody_has_it_open(read: Lab, hold: Hold) -> None:
    read.put("file", b"one" * 5000)
    with hold(read.path / "file") as held:
        with opened(held, os.O_RDONLY) as fd:
            assert os.read(fd, 5) == b"oneon"
            read.put("file", b"two")
            assert os.pread(fd, 20_000, 0) == held.read_bytes() == b"one" * 5000
            assert (read.path / "file").read_bytes() == b"two"
        for value in (b"three", b"four" * 3000, b""):
            read.put("file", value)
            assert held.read_bytes() == (read.path / "file").read_bytes() == value
            assert held.stat().st_size == len(value)


def test_b44_readers_of_what_is_held_see_one_version(read: Lab, hold: Hold) -> None:
    stop = threading.Event()
    wrong: list[bytes] = []
    read.put("file", b"0" * 3000)

    def look(path: Path) -> None:
        while not stop.is_set():
            with opened(path, os.O_RDONLY) as fd:
                size = os.fstat(fd).st_size
                found = b"".join(iter(lambda: os.read(fd, 1000), b""))
                if len(set(found)) != 1 or len(found) != size:
                    wrong.append(found)

    with hold(read.path / "file") as held:
        threads = [threading.Thread(target=look, args=(p,)) for p in (held, read.path / "file")]
        for thread in threads:
            thread.start()
        try:
            for number in range(100):
                value = b"%d" % (number % 10) * (2000 + 100 * number)
                read.client.put(read.key("file"), value)
                read.mounted.wait(read.client.revision())
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not wrong
        read.put("file", b"last")
        assert held.read_bytes() == b"last"


def test_b44_what_is_mounted_on_a_file_stays(read: Lab, container: Container) -> None:
    read.put("conf", b"in etcd")
    (container.home / "local").write_text("local")
    container.sh('mount --bind "$1" "$2"', container.home / "local", read.path / "conf")
    for value in (b"changed", b"changed again"):
        read.put("conf", value)
        assert (read.path / "conf").read_bytes() == value
        assert container.sh('cat "$1/conf"', read.path) == "local"


def test_b44_an_overlay_above_the_mount_follows(read: Lab, container: Container) -> None:
    read.put("d/file", b"one")
    for name in ("upper", "work", "merged"):
        (container.home / name).mkdir()
    container.sh(
        'cd "$2"; mount -t tmpfs none upper; mkdir upper/u upper/w;'
        ' mount -t overlay overlay -o "lowerdir=$1,upperdir=upper/u,workdir=upper/w" merged',
        read.path / "d",
        container.home,
    )
    for value in ("one", "two and more", "3"):
        read.put("d/file", value.encode())
        assert container.sh('cat "$1/file"', container.home / "merged") == value


def test_b44_a_file_handle_leads_to_what_is_there(read: Lab) -> None:
    top = read.mounted.path
    read.put("d/file", b"one")
    handle = handle_of(read.path / "d/file")
    for value in (b"one", b"two", b"three"):
        read.put("d/file", value)
        assert by_handle(top, handle) == value
        drop_caches(top)
        assert by_handle(top, handle) == value
    read.delete("d/file")
    drop_caches(top)
    assert errno_of(lambda: by_handle(top, handle)) == "ESTALE"
