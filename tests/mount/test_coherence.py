"""What readers see of other clients' changes, and when.

`lab.put` and `lab.delete` return once the mount has shown the revision: from then on nothing may
answer older state. Everything here runs with and without the mirror unless it is about the mirror.
"""

import errno
import mmap
import os

import pytest

from tests.mount.lab import Lab, Pool, sh
from tests.mount.posix.calls import opened

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]


@pytest.mark.oldest_and_newest_etcd
def test_b28_a_remote_put_is_seen_by_every_call(lab: Lab) -> None:
    file = lab.path / "file"
    lab.put("file", b"one")
    for n in range(10):
        value = b"value number %d" % 10**n
        assert file.read_bytes() != value
        lab.put("file", value)
        assert file.stat().st_size == len(value)
        assert file.read_bytes() == value
        assert os.listdir(lab.path) == ["file"]
        with os.scandir(lab.path) as entries:
            assert [entry.stat().st_size for entry in entries] == [len(value)]


@pytest.mark.oldest_and_newest_etcd
def test_b28_a_value_of_the_same_size_is_seen(lab: Lab) -> None:
    file = lab.path / "file"
    for n in range(10):
        lab.put("file", b"%d" % n * 5000)
        assert file.read_bytes() == b"%d" % n * 5000


@pytest.mark.oldest_and_newest_etcd
def test_b28_a_name_known_to_be_missing_appears(lab: Lab) -> None:
    for n in range(10):
        path = lab.path / f"file{n}"
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                path.stat()
        lab.put(f"file{n}", b"here")
        assert path.read_bytes() == b"here"
        lab.delete(f"file{n}")
        with pytest.raises(FileNotFoundError):
            path.stat()
        assert os.listdir(lab.path) == []


def test_b28_a_directory_known_to_be_missing_appears(lab: Lab) -> None:
    assert not (lab.path / "a").exists()
    with pytest.raises(FileNotFoundError):
        (lab.path / "a" / "b" / "file").stat()
    lab.put("a/b/file", b"here")
    assert (lab.path / "a" / "b" / "file").read_bytes() == b"here"
    lab.delete("a/b/file")
    with pytest.raises(FileNotFoundError):
        (lab.path / "a" / "b" / "file").stat()
    with pytest.raises(FileNotFoundError):
        (lab.path / "a").stat()


@pytest.mark.oldest_and_newest_etcd
def test_b28_listings_follow(lab: Lab) -> None:
    expected: set[str] = set()
    for n in range(15):
        name = f"file{n}"
        expected.add(name)
        lab.put(name, b"")
        assert set(os.listdir(lab.path)) == expected
        if n % 3 == 2:
            expected.remove(name)
            lab.delete(name)
            assert set(os.listdir(lab.path)) == expected


def test_b28_link_counts_and_times_of_directories_follow(lab: Lab) -> None:
    before = lab.path.stat()
    lab.put("d/file", b"")
    after = lab.path.stat()
    assert (before.st_nlink, after.st_nlink) in {(2, 3), (2, 2)}
    if lab.mounted.statistics().get("mirror"):
        assert after.st_nlink == 3
        assert after.st_mtime_ns > before.st_mtime_ns
        lab.delete("d/file")
        assert lab.path.stat().st_nlink == 2


def test_a_link_count_is_of_the_subdirectories_that_were_seen(lab: Lab) -> None:
    lab.put("d/e/f", b"")
    directory = lab.path / "d"
    mirrored = bool(lab.mounted.statistics().get("mirror"))
    assert directory.stat().st_nlink == (3 if mirrored else 2)
    found = sh(lab.path, "find . | sort").split()  # trusts no link count
    assert found == [".", "./d", "./d/e", "./d/e/f"]
    assert directory.stat().st_nlink == 3


def test_b28_a_file_becomes_a_directory_and_back(lab: Lab) -> None:
    for n in range(5):
        lab.put("name", b"file %d" % n)
        assert (lab.path / "name").read_bytes() == b"file %d" % n
        lab.shown(lab.client.change_all([(lab.key("name/below"), b"x")], [lab.key("name")]))
        assert (lab.path / "name").is_dir()
        assert os.listdir(lab.path / "name") == ["below"]
        with pytest.raises(IsADirectoryError):
            (lab.path / "name").read_bytes()
        lab.shown(lab.client.change_all([(lab.key("name"), b"y")], [lab.key("name/below")]))
        assert (lab.path / "name").read_bytes() == b"y"
        with pytest.raises(NotADirectoryError):
            (lab.path / "name" / "below").stat()


def test_b28_many_changes_at_once(lab: Lab) -> None:
    lab.shown(lab.client.put_all([(lab.key(f"d{n % 7}/f{n}"), b"one") for n in range(100)]))
    assert {len(os.listdir(lab.path / f"d{n}")) for n in range(7)} == {14, 15}
    lab.shown(lab.client.delete_below(lab.key("d")))
    assert os.listdir(lab.path) == []


def test_b28_a_program_that_stays_in_a_directory_that_goes(lab: Lab) -> None:
    lab.put("d/file", b"value")
    directory = os.open(lab.path / "d", os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert os.listdir(directory) == ["file"]
        lab.delete("d/file")
        assert not (lab.path / "d").exists()
        with pytest.raises(FileNotFoundError):
            os.stat("file", dir_fd=directory)
        with pytest.raises(FileNotFoundError):
            os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
        assert lab.own_keys() == []
    finally:
        os.close(directory)


# --- versions -------------------------------------------------------------------------------


@pytest.mark.oldest_and_newest_etcd
def test_b29_an_open_file_keeps_its_version(lab: Lab) -> None:
    old = os.urandom(200_000)
    lab.put("file", old)
    fd = os.open(lab.path / "file", os.O_RDONLY)
    try:
        assert os.pread(fd, 10, 0) == old[:10]
        lab.put("file", b"new")
        lab.put("file", b"newer")
        assert os.fstat(fd).st_size == len(old)
        assert b"".join(iter(lambda: os.read(fd, 9999), b"")) == old
        assert (lab.path / "file").read_bytes() == b"newer"
        lab.delete("file")
        assert os.pread(fd, 10, 100_000) == old[100_000:100_010]
        assert os.fstat(fd).st_nlink == 0
    finally:
        os.close(fd)


@pytest.mark.parametrize("how", ["delete", "replace"])
def test_b29_what_is_open_and_has_no_name_any_more_has_no_links(lab: Lab, how: str) -> None:
    lab.put("d/file", b"value")
    with (
        opened(lab.path / "d/file", os.O_RDONLY) as file,
        opened(lab.path / "d", os.O_RDONLY | os.O_DIRECTORY) as directory,
    ):
        assert os.fstat(file).st_nlink == 1
        assert os.fstat(directory).st_nlink == 2
        if how == "delete":
            lab.delete("d/file")
        else:
            lab.put("d/file", b"other")
        assert os.fstat(file).st_nlink == 0
        assert os.fstat(directory).st_nlink == (0 if how == "delete" else 2)


def test_b29_a_memory_map_keeps_its_version(lab: Lab) -> None:
    lab.put("file", b"old value " * 1000)
    with (lab.path / "file").open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        lab.put("file", b"NEW VALUE " * 1000)
        assert mapped[:] == b"old value " * 1000
        mapped.close()


def test_b29_own_changes_keep_the_inode_and_remote_ones_do_not(lab: Lab) -> None:
    file = lab.path / "file"
    file.write_bytes(b"one")
    with file.open("rb") as opened:
        inode = file.stat().st_ino
        for value in (b"two", b"three"):
            file.write_bytes(value)
            assert file.stat().st_ino == inode
        with file.open("ab") as appending:
            appending.write(b"four")
        file.rename(lab.path / "other")
        assert (lab.path / "other").stat().st_ino == inode
        assert opened.read() == b"threefour"
        lab.put("other", b"remote")
        assert (lab.path / "other").stat().st_ino != inode
        assert os.fstat(opened.fileno()).st_ino == inode


def test_b29_a_remote_change_of_nothing_is_a_new_version(lab: Lab) -> None:
    lab.put("file", b"same")
    before = (lab.path / "file").stat()
    lab.put("file", b"same")
    after = (lab.path / "file").stat()
    assert after.st_mtime_ns >= before.st_mtime_ns
    assert (lab.path / "file").read_bytes() == b"same"


def test_b37_own_changes_are_seen_when_the_call_returns(lab: Lab) -> None:
    for n in range(30):
        file = lab.path / f"file{n % 3}"
        file.write_bytes(b"%d" % n)
        assert file.read_bytes() == b"%d" % n
        assert lab.value(file.name) == b"%d" % n
        if n % 5 == 4:
            file.unlink()
            assert not file.exists()
            assert file.name not in os.listdir(lab.path)
            assert lab.value(file.name) is None


def test_b37_own_and_remote_changes_in_turn(lab: Lab) -> None:
    file = lab.path / "file"
    for n in range(20):
        file.write_bytes(b"mine %d" % n)
        assert file.read_bytes() == b"mine %d" % n
        lab.put("file", b"theirs %d" % n)
        assert file.read_bytes() == b"theirs %d" % n


def test_b38_mtime_changes_exactly_with_the_content(lab: Lab) -> None:
    file = lab.path / "file"
    lab.put("file", b"0")
    last = file.stat().st_mtime_ns
    for n in range(1, 6):
        file.read_bytes()
        os.listdir(lab.path)
        lab.put("neighbour", b"%d" % n)
        assert file.stat().st_mtime_ns == last
        if n % 2:
            lab.put("file", b"%d" % n)
        else:
            file.write_bytes(b"%d" % n)
        assert file.stat().st_mtime_ns > last
        last = file.stat().st_mtime_ns
        with file.open("rb") as opened:
            assert os.fstat(opened.fileno()).st_mtime_ns == last


# --- the mirror -----------------------------------------------------------------------------


@pytest.mark.counts_requests
@pytest.mark.oldest_and_newest_etcd
def test_b41_what_is_known_costs_no_request(cached: Lab) -> None:
    file = cached.path / "file"
    missing = cached.path / "missing"
    cached.put("file", os.urandom(10_000))
    fd = os.open(file, os.O_RDONLY)
    os.pread(fd, 10_000, 0)
    file.stat()  # after the read, which sets the atime
    assert not missing.exists()
    with cached.mounted.counting() as requests:
        for _ in range(1000):
            os.stat(file)
            os.pread(fd, 4096, 5000)
            assert not os.path.exists(missing)
    os.close(fd)
    assert not requests


def test_b41_reading_again_costs_no_read_and_asks_etcd_nothing(cached: Lab) -> None:
    file = cached.path / "file"
    file.write_bytes(os.urandom(100_000))
    file.read_bytes()
    before = cached.mounted.statistics()["store"]
    with cached.mounted.counting() as requests:
        for _ in range(20):
            file.read_bytes()
            os.listdir(cached.path)
    assert requests["read"] == 0
    assert requests["lookup"] == 0
    assert cached.mounted.statistics()["store"] == before


def test_b41_own_writes_are_not_fetched_back(cached: Lab) -> None:
    before = cached.mounted.statistics()["store"]["ranges"]
    for n in range(5):
        (cached.path / "file").write_bytes(b"%d" % n)
        assert (cached.path / "file").read_bytes() == b"%d" % n
    assert cached.mounted.statistics()["store"]["ranges"] == before


def test_b47_without_the_mirror_every_call_asks_etcd(pool: Pool, cached: Lab) -> None:
    """No waiting here: the put is seen by the very next call."""
    with pool.private(cached.etcd, "--no-cache") as mounted:
        path = mounted.path / cached.path.name
        for n in range(20):
            cached.client.put(cached.key("file"), b"%d" % n)
            assert (path / "file").read_bytes() == b"%d" % n
            cached.client.put(cached.key(f"new{n}"), b"")
            assert len(os.listdir(path)) == n + 2
            cached.client.delete(cached.key(f"gone{n}"))
            cached.client.delete(cached.key("file"))
            with pytest.raises(FileNotFoundError):
                (path / "file").stat()


@pytest.mark.oldest_and_newest_etcd
def test_b48_evicted_values_are_fetched_at_their_revision(pool: Pool, cached: Lab) -> None:
    values = {f"file{n}": os.urandom(20_000) for n in range(10)}
    cached.client.put_all([(cached.key(name), value) for name, value in values.items()])
    with pool.private(cached.etcd, "--cache", "--cache-size", "50K") as mounted:
        path = mounted.path / cached.path.name
        for _ in range(2):
            for name, value in values.items():
                assert (path / name).read_bytes() == value
        assert mounted.statistics()["value_cache"]["size"] <= 50 * 1024
        fd = os.open(path / "file0", os.O_RDONLY)
        revision = cached.client.put(cached.key("file0"), b"new")
        cached.client.compact(revision)
        mounted.wait(revision)
        for name in list(values)[1:]:
            (path / name).read_bytes()
        assert os.pread(fd, 20_000, 0) == values["file0"]
        os.close(fd)
        assert (path / "file0").read_bytes() == b"new"


def test_b48_a_cache_of_nothing_works(pool: Pool, cached: Lab) -> None:
    with pool.private(cached.etcd, "--cache", "--cache-size", "0") as mounted:
        path = mounted.path / cached.path.name
        for n in range(5):
            (path / "file").write_bytes(b"mine %d" % n)
            assert (path / "file").read_bytes() == b"mine %d" % n
            mounted.wait(cached.client.put(cached.key("file"), b"theirs %d" % n))
            assert (path / "file").read_bytes() == b"theirs %d" % n
            with (path / "file").open("ab") as opened:
                opened.write(b"!")
            assert cached.value("file") == b"theirs %d!" % n


# --- two mounts -----------------------------------------------------------------------------


def test_two_mounts_see_each_other(cached: Lab, other: Lab) -> None:
    for n in range(10):
        writer, reader = (cached, other) if n % 2 else (other, cached)
        (writer.path / "file").write_bytes(b"%d" % n)
        (writer.path / f"new{n}").mkdir()
        reader.shown(cached.client.revision())
        assert (reader.path / "file").read_bytes() == b"%d" % n
        assert (reader.path / f"new{n}").is_dir()
        (reader.path / f"new{n}").rmdir()
        writer.shown(cached.client.revision())
        assert not (writer.path / f"new{n}").exists()


def test_waiting_for_a_revision_that_does_not_come(pool: Pool, cached: Lab) -> None:
    with pool.private(cached.etcd, "--cache", "--timeout", "0.5") as mounted:
        mounted.expect_log("was not reached")
        with pytest.raises(OSError, match="timed out") as caught:
            mounted.wait(1 << 60)
        assert caught.value.errno == errno.ETIMEDOUT
