"""What the kernel keeps by the fast path, and that nothing that it keeps is older than it may be."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import etcdfs
from etcdfs.daemon.kernel_threads import may_look
from etcdfs.fuse.fastpath import Feature
from tests.mount.lab import Lab, Pool
from tests.mount.machine.twins import drop_caches
from tests.mount.posix.calls import opened
from tests.mount.test_requests import put_all, requests_of
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import run_etcdfs

needs_fast_path = pytest.mark.skipif(
    importlib.util.find_spec("etcdfs.fuse._fastpath") is None and not os.environ.get("CI"),
    reason="the library of the fast path is not compiled here",
)
pytestmark = [pytest.mark.etcd, pytest.mark.fuse, pytest.mark.counts_requests]

ALL = [str(feature.name) for feature in Feature]
WRITABLE = [name for name in ALL if name != "NO_OPEN"]
MANY = 1000  # more names than one answer holds


def names_of(count: int) -> list[str]:
    return [f"name-{number:04d}" for number in range(count)]


# --- what it costs --------------------------------------------------------------------------


@needs_fast_path
def test_b42_a_listing_that_is_kept_costs_nothing(cached: Lab) -> None:
    for number, count in enumerate((0, 3, MANY)):
        directory = cached.path / str(number)
        put_all(cached, [(f"{number}/{name}", b"") for name in ("", *names_of(count))])
        for _ in range(2):  # opendir(3) calls fstat(2): the atime is another one after the first
            assert sorted(os.listdir(directory)) == names_of(count)

        def list_it(directory: Path = directory) -> None:
            for _ in range(10):
                os.listdir(directory)

        assert not requests_of(cached, list_it)
        assert sorted(os.listdir(directory)) == names_of(count)


@needs_fast_path
def test_b42_the_target_of_a_link_that_is_kept_costs_nothing(cached: Lab) -> None:
    link = cached.path / "link"
    link.symlink_to("target")
    assert link.readlink() == Path("target")
    assert not requests_of(cached, lambda: [link.readlink() for _ in range(10)])


@needs_fast_path
def test_a_reader_asks_once_and_a_writer_tells_when_it_closes(lab: Lab) -> None:
    file = lab.path / "file"
    file.write_bytes(b"value")

    def open_and_close(flags: int) -> None:
        with opened(file, flags):
            pass

    assert not requests_of(lab, lambda: open_and_close(os.O_RDONLY))["flush"]
    assert requests_of(lab, lambda: open_and_close(os.O_RDWR))["flush"] == 1


@needs_fast_path
def test_a_write_does_not_wake_python_for_security_capability(lab: Lab) -> None:
    file = lab.path / "file"
    found = requests_of(lab, lambda: file.write_bytes(b"value"))
    assert not found["getxattr"]
    assert found["write"] == 1
    with pytest.raises(OSError, match="not supported"):
        os.getxattr(file, "security.capability")


# --- what is shown --------------------------------------------------------------------------


def test_b46_whatever_changes_a_listing_is_seen_by_the_next_one(cached: Lab) -> None:
    directory = cached.path / "d"
    directory.mkdir()
    shown: set[str] = set()

    def check() -> None:
        for _ in range(2):
            assert set(os.listdir(directory)) == shown

    def make(name: str, how: Callable[[str], object]) -> None:
        how(name)
        shown.add(name)
        check()

    check()
    make("put", lambda name: cached.put(f"d/{name}", b"value"))
    make("written", lambda name: (directory / name).write_bytes(b"value"))
    make("made", lambda name: (directory / name).mkdir())
    make("below", lambda name: cached.put(f"d/{name}/deep", b"value"))
    make("link", lambda name: (directory / name).symlink_to("put"))
    (directory / "put").rename(directory / "moved")
    shown.symmetric_difference_update({"put", "moved"})
    check()
    cached.delete("d/written")
    cached.delete("d/below/deep")
    (directory / "moved").unlink()
    shown.difference_update({"written", "below", "moved"})
    check()


@pytest.mark.parametrize("options", [("--cache",), ("--cache", "--no-attrs")])
def test_b46_a_listing_goes_by_no_time_that_was_set_back(
    pool: Pool, shared_etcd: EtcdProcess, etcd_binary: Path, options: tuple[str, ...]
) -> None:
    with pool.lab(shared_etcd, pool.mounted(etcd_binary, *options)) as lab:
        directory = lab.path / "d"
        lab.put("d/one", b"")
        os.utime(directory, ns=(10**18, 10**18))
        assert os.listdir(directory) == ["one"]
        lab.put("d/two", b"")
        os.utime(directory, ns=(10**18, 10**18))
        assert sorted(os.listdir(directory)) == ["one", "two"]


def test_b46_nor_by_one_that_another_mount_set_back(cached: Lab, other: Lab) -> None:
    wanted: list[str] = []
    for name in ("one", "two"):
        wanted.append(name)
        other.shown(cached.put(f"d/{name}", b""))
        os.utime(other.path / "d", ns=(10**18, 10**18))
        cached.shown(cached.client.revision())
        for _ in range(2):
            assert sorted(os.listdir(cached.path / "d")) == wanted


def test_b46_a_listing_that_was_not_read_to_its_end_is_completed(cached: Lab) -> None:
    put_all(cached, [(name, b"") for name in names_of(MANY)])
    with os.scandir(cached.path) as entries:
        first = next(entries).name
    cached.delete(first)
    cached.put("another", b"")
    wanted = {*names_of(MANY), "another"} - {first}
    for _ in range(2):
        assert set(os.listdir(cached.path)) == wanted


@pytest.mark.skipif(os.geteuid() != 0, reason="caches are dropped by root")
def test_b46_what_memory_had_no_room_for_is_asked_for_again(cached: Lab) -> None:
    put_all(cached, [(name, b"") for name in names_of(MANY)])
    for number in range(3):
        assert sorted(os.listdir(cached.path)) == names_of(MANY)
        drop_caches(cached.mounted.path)
        with os.scandir(cached.path) as entries:
            next(entries)
            drop_caches(cached.mounted.path)
            cached.put(f"new-{number}", b"")
        assert f"new-{number}" in os.listdir(cached.path)
        cached.delete(f"new-{number}")


def test_b46_a_new_target_of_a_link_is_seen_at_once(cached: Lab) -> None:
    link = cached.path / "link"
    link.symlink_to("target")
    for number in range(20):
        target = "x" * number + str(number)
        assert link.readlink() != Path(target)
        cached.put("link", target.encode())
        assert link.readlink() == Path(target)
        assert link.lstat().st_size == len(target)


# --- what the caller said -------------------------------------------------------------------


@needs_fast_path
def test_b65_a_time_is_the_files_own_if_it_was_not_said(lab: Lab) -> None:
    """However long ago the write was, and even if it is the very moment that was said."""
    records = b"/.etcdfs/attrs/" + lab.prefix
    with opened(lab.path / "now", os.O_CREAT | os.O_WRONLY) as fd:
        os.write(fd, b"value")
        os.utime(fd)
    assert not lab.client.below(records)
    with opened(lab.path / "said", os.O_CREAT | os.O_WRONLY) as fd:
        os.write(fd, b"value")
        said_ns = os.fstat(fd).st_mtime_ns
        os.utime(fd, ns=(said_ns, said_ns))
    assert [found.key for found in lab.client.below(records)] == [records + b"said"]
    assert (lab.path / "said").stat().st_mtime_ns == said_ns


@needs_fast_path
def test_b65_conditions_on_an_attribute_are_one_request(lab: Lab) -> None:
    file = lab.path / "file"
    file.write_bytes(b"value")

    def set_it(name: str, flags: int) -> None:
        os.setxattr(file, name, b"100", flags)

    for name in ("user.own", "user.etcd.ttl"):
        with pytest.raises(OSError, match="No data"):
            set_it(name, os.XATTR_REPLACE)
        found = requests_of(lab, lambda name=name: set_it(name, os.XATTR_CREATE))  # type: ignore[misc]
        assert (found["setxattr"], found["getxattr"]) == (1, 0)
        with pytest.raises(FileExistsError):
            set_it(name, os.XATTR_CREATE)
        set_it(name, os.XATTR_REPLACE)


# --- with and without -----------------------------------------------------------------------


@needs_fast_path
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--cache",), WRITABLE),
        (("--cache", "--fast-path", "on"), WRITABLE),
        (("--cache", "--read-only"), ALL if may_look() else WRITABLE),
        (("--cache", "--read-only", "--inotify", "off"), ALL if may_look() else WRITABLE),
        (("--cache", "--read-only", "--max-stale", "100"), WRITABLE),
        (("--cache", "--fast-path", "off"), []),
        (("--no-cache",), ["EXACT", "NOFLUSH"]),
        (("--cache", "--consistency", "linearizable"), ["EXACT", "NOFLUSH"]),
        (("--cache", "--kernel-timeout", "0"), ["EXACT", "NOFLUSH"]),
    ],
)
def test_b97_the_fast_path_is_on_where_answers_may_be_kept(
    pool: Pool, shared_etcd: EtcdProcess, options: tuple[str, ...], wanted: list[str]
) -> None:
    with pool.private(shared_etcd, *options) as mounted:
        assert mounted.statistics()["fast_path"] == wanted
        os.listdir(mounted.path)
        assert mounted.statistics()["requests"].get("opendir", 0) == ("LISTINGS" not in wanted)


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which etcdfs has no library, as where there was no compiler."""
    source = Path(etcdfs.__file__).parent
    shutil.copytree(source, tmp_path / "etcdfs", ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}


def test_b97_without_its_library_a_mount_does_without_and_says_so(
    pool: Pool, shared_etcd: EtcdProcess, bare: dict[str, str]
) -> None:
    with pool.private(shared_etcd, "--cache", environment=bare) as mounted:
        assert mounted.statistics()["fast_path"] == []
        key = f"/{pool.name()}"
        mounted.put(key, b"value")
        assert key.removeprefix("/") in os.listdir(mounted.path)
        assert (mounted.path / key.removeprefix("/")).read_bytes() == b"value"
        assert mounted.log.count("no fast path: No module named") == 1


def test_b97_a_mount_that_must_have_it_is_refused_without(
    shared_etcd: EtcdProcess, bare: dict[str, str], tmp_path: Path
) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    options = ("--endpoints", shared_etcd.client_url, "--cache", "--fast-path", "on")
    done = run_etcdfs("mount", str(mountpoint), *options, **bare)
    assert done.returncode == 41
    assert done.stderr.startswith("etcdfs: --fast-path on: No module named")
    assert done.stderr.count("\n") == 1
    assert not os.path.ismount(mountpoint)
