"""Which calls bring what is written to etcd, who shares it until then, and what if etcd is full."""

import fcntl
import mmap
import os
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from tests.mount.client import Client, ClientError
from tests.mount.lab import MODES, Lab, Pool, sh
from tests.mount.posix.calls import Child, errno_of, in_child, opened
from tests.support.etcd_process import EtcdProcess

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

RW, W, CREAT = os.O_RDWR, os.O_WRONLY, os.O_CREAT


# --- synchronous writes ---------------------------------------------------------------------


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC], ids=["O_SYNC", "O_DSYNC"])
def test_b122_a_synchronous_write_is_in_etcd_when_it_returns(lab: Lab, flag: int) -> None:
    fd = os.open(lab.path / "f", RW | CREAT | flag)
    os.write(fd, b"one")
    assert (lab.value("f"), lab.version("f")) == (b"one", 1)
    os.write(fd, b"two" * 100_000)
    assert (lab.value("f"), lab.version("f")) == (b"one" + b"two" * 100_000, 2)
    os.pwrite(fd, b"ONE", 0)
    os.writev(fd, [b"a", b"b"])
    assert lab.version("f") == 4
    lab.put("f", b"theirs")
    assert errno_of(lambda: os.pwrite(fd, b"mine", 1)) == "ESTALE"
    assert errno_of(lambda: os.close(fd)) == "ESTALE"
    assert lab.value("f") == b"theirs"


@pytest.mark.parametrize("sync", [os.fsync, os.fdatasync])
def test_b122_a_synced_file_is_in_etcd(lab: Lab, sync: Callable[[int], None]) -> None:
    with opened(lab.path / "f", W | CREAT) as fd:
        for version, value in enumerate((b"one", b"two"), 1):
            os.write(fd, value)
            sync(fd)
            assert lab.version("f") == version
            sync(fd)
        assert (lab.value("f"), lab.version("f")) == (b"onetwo", 2)


def test_b122_a_synced_map_is_in_etcd(lab: Lab) -> None:
    (lab.path / "f").write_bytes(b"0123456789")
    with opened(lab.path / "f", RW) as fd, mmap.mmap(fd, 10) as mapped:
        mapped[0:2] = b"ab"
        mapped.flush()
        assert lab.value("f") == b"ab23456789"
        mapped[2:4] = b"cd"
        assert lab.value("f") == b"ab23456789"
    assert lab.value("f") == b"abcd456789"


def test_b122_a_map_of_a_file_that_another_client_changes_keeps_its_version(lab: Lab) -> None:
    lab.put("f", b"0123456789")
    with opened(lab.path / "f", RW) as fd, mmap.mmap(fd, 10) as mapped:
        lab.put("f", b"theirs")
        assert mapped[:] == b"0123456789"
        mapped[0:1] = b"x"
        assert errno_of(mapped.flush) == "ESTALE"
        assert lab.value("f") == b"theirs"
        assert errno_of(lambda: os.fsync(fd)) == "ESTALE"
        os.ftruncate(fd, 0)  # replacing the whole is no conflict: the last writer wins
    assert lab.value("f") == b""


# --- several writers ------------------------------------------------------------------------


def test_b123_all_writers_of_one_mount_share_what_is_unpublished(lab: Lab) -> None:
    (lab.path / "f").write_bytes(b"0123456789")
    with opened(lab.path / "f", RW) as one, opened(lab.path / "f", W) as two:
        os.pwrite(one, b"a", 0)
        os.pwrite(two, b"z", 9)
        assert (lab.path / "f").read_bytes() == b"a12345678z"
        assert lab.version("f") == 1
        os.fsync(two)
        assert (lab.value("f"), lab.version("f")) == (b"a12345678z", 2)
    assert lab.version("f") == 2


def test_b14_appends_of_many_processes_through_two_mounts(cached: Lab, other: Lab) -> None:
    """All lines are there, none is broken, and each writer's are in its order."""
    lines = 8

    def append(path: Path, name: int) -> Callable[[], None]:
        def run() -> None:
            for n in range(lines):
                with opened(path / "log", W | CREAT | os.O_APPEND) as fd:
                    os.write(fd, b"%d %d %s\n" % (name, n, b"x" * 50))

        return run

    children = [Child(append(lab.path, n)) for n, lab in enumerate((cached, other) * 2)]
    for child in children:
        child.result()
    found = [line.split() for line in (cached.value("log") or b"").splitlines()]
    assert {len(line) for line in found} == {3}
    assert {line[2] for line in found} == {b"x" * 50}
    for name in range(4):
        assert [int(n) for w, n, _ in found if int(w) == name] == list(range(lines))


def test_b124_locks_hold_within_a_mount_and_not_between_mounts(cached: Lab, other: Lab) -> None:
    cached.put("f", b"")
    other.mounted.wait(cached.client.revision())
    for lock in (fcntl.flock, fcntl.lockf):
        with opened(cached.path / "f", RW) as fd, opened(cached.path / "f", RW) as same:
            lock(fd, fcntl.LOCK_EX)
            again = in_child(partial(errno_of, partial(lock, same, fcntl.LOCK_EX | fcntl.LOCK_NB)))
            assert again == "EAGAIN"
            with opened(other.path / "f", RW) as far:
                lock(far, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- names ----------------------------------------------------------------------------------


def test_b19_removed_files_leave_nothing_in_etcd(lab: Lab) -> None:
    """No .fuse_hidden, no marker, nothing: not while they are open, nor after."""
    fds = []
    for name in ("a", "b", "c"):
        fd = os.open(lab.path / name, RW | CREAT)
        os.write(fd, b"value")
        os.fsync(fd)
        fds.append(fd)
    (lab.path / "a").unlink()
    (lab.path / "b").rename(lab.path / "c")
    lab.delete("c")
    assert lab.own_keys() == []
    for fd in fds:
        os.write(fd, b" and more")
        os.fsync(fd)
        assert os.pread(fd, 100, 0) == b"value and more"
    assert lab.own_keys() == []
    assert os.listdir(lab.path) == []
    for fd in fds:
        os.close(fd)
    assert lab.own_keys() == []


def test_b19_a_file_renamed_by_another_client_while_open(lab: Lab) -> None:
    """Other clients have no rename: it is a put and a delete, and the open file was deleted."""
    (lab.path / "f").write_bytes(b"value")
    with opened(lab.path / "f", RW) as fd:
        lab.shown(lab.client.change_all([(lab.key("g"), b"value")], [lab.key("f")]))
        os.write(fd, b"VALUE")
        assert os.pread(fd, 10, 0) == b"VALUE"
    assert lab.own_keys() == [b"g"]
    assert lab.value("g") == b"value"


# --- etcd is full ---------------------------------------------------------------------------

QUOTA = 2 * 1024 * 1024


def fill(client: Client) -> None:
    """Put keys until etcd raises its alarm."""
    for n in range(100):
        try:
            client.put(b"/ballast/%d" % n, bytes(256 * 1024))
        except ClientError:
            return
    pytest.fail("etcd took more than its quota")


def make_room(etcd: EtcdProcess, client: Client) -> None:
    client.compact(client.delete_below(b"/ballast/"))
    etcd.etcdctl("defrag")
    etcd.etcdctl("alarm", "disarm")


@pytest.mark.parametrize("mode", MODES)
def test_b125_a_full_etcd_is_enospc_and_nothing_changes(
    pool: Pool, etcd_binary: Path, watched: None, mode: str
) -> None:
    with (
        EtcdProcess(etcd_binary, f"--quota-backend-bytes={QUOTA}") as etcd,
        pool.private(etcd, mode) as mounted,
        closing(Client(etcd.endpoint)) as client,
    ):
        mounted.expect_log("")
        (mounted.path / "f").write_bytes(b"old value")
        fd = os.open(mounted.path / "f", RW)
        fill(client)
        os.write(fd, b"new")
        for call in (
            lambda: os.fsync(fd),
            lambda: os.close(fd),
            lambda: (mounted.path / "g").write_bytes(b"value"),
            (mounted.path / "d").mkdir,
            lambda: os.truncate(mounted.path / "f", 1),
            lambda: os.close(os.open(mounted.path / "x", W | CREAT | os.O_EXCL)),
        ):
            assert errno_of(call) == "ENOSPC"
        assert (mounted.path / "f").read_bytes() == b"old value"
        assert not (mounted.path / "g").exists()
        make_room(etcd, client)
        mounted.wait(client.revision())
        (mounted.path / "f").write_bytes(b"again")
        found = client.get(b"/f")
        assert found is not None
        assert found.value == b"again"
        assert sorted(os.listdir(mounted.path)) == ["f"]


def test_b17_what_is_too_large_says_so_at_the_call_that_makes_it_so(lab: Lab) -> None:
    (lab.path / "f").write_bytes(b"value")
    with opened(lab.path / "f", RW) as fd:
        assert errno_of(lambda: os.ftruncate(fd, 1 << 40)) == "EFBIG"
        assert errno_of(lambda: os.posix_fallocate(fd, 0, 1 << 24)) == "EFBIG"
        os.ftruncate(fd, 5)
        with mmap.mmap(fd, 5) as mapped:
            mapped[0:1] = b"V"
    assert lab.value("f") == b"Value"
    sh(lab.path, "dd if=/dev/zero of=big bs=1M count=4 2>/dev/null && exit 1; test ! -e big")
