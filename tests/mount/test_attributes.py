"""Attributes in etcd: where they are, who sees them, and what becomes of them."""

import errno
import json
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from etcdfs.keyspace.attribute_records import record_key
from tests.mount.lab import MODES, PATIENCE_S, Lab, Pool, sh
from tests.mount.posix.calls import errno_of

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users")

LONG_AGO = 981_173_106_789_000_001


@contextmanager
def revisions(lab: Lab, expected: int) -> Iterator[None]:
    """Check how many revisions the body costs."""
    before = lab.client.revision()
    yield
    assert lab.client.revision() - before == expected


def record(lab: Lab, name: str) -> dict[str, Any] | None:
    """Return the record of a path below the lab's, None without one."""
    found = lab.client.get(record_key(lab.key(name)))
    return None if found is None else json.loads(found.value)


def records(lab: Lab) -> list[bytes]:
    start = record_key(lab.prefix)
    return [found.key.removeprefix(start) for found in lab.client.below(start)]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def seen(path: Path) -> tuple[int, int, int, int]:
    found = os.lstat(path)
    return found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns


@contextmanager
def mounted_at(pool: Pool, lab: Lab, *options: str) -> Iterator[Path]:
    """Mount the lab's directory alone, so that its record keys are outside of the prefix."""
    with pool.private(lab.etcd, *options, "--prefix", lab.prefix.decode()) as mounted:
        yield mounted.path


def change_all(path: Path) -> None:
    (path / "file").write_bytes(b"value")
    (path / "file").chmod(0o4750)
    os.utime(path / "file", ns=(LONG_AGO, LONG_AGO))
    os.setxattr(path / "file", "user.a", b"one")
    os.mkdir(path / "d", 0o700)
    os.utime(path / "d", ns=(LONG_AGO, LONG_AGO))
    os.symlink("file", path / "link")
    os.utime(path / "link", ns=(LONG_AGO, LONG_AGO), follow_symlinks=False)
    if os.geteuid() == 0:
        for name in ("file", "d", "link"):
            os.lchown(path / name, 12, 34)
        (path / "file").chmod(0o4750)


# --- everywhere, and later ------------------------------------------------------------------


@pytest.mark.oldest_and_newest_etcd
def test_b52_every_mount_sees_the_same_and_so_does_the_next(pool: Pool, cached: Lab) -> None:
    change_all(cached.path)
    names = ("file", "d", "link")
    original = [seen(cached.path / name) for name in names]
    assert [found[3] for found in original] == [LONG_AGO] * 3
    assert original[0][0] == stat.S_IFREG | 0o4750
    inside = cached.prefix.decode()
    for options, below in (
        (("--no-cache",), inside.strip("/")),
        (("--cache", "--prefix", inside), "."),
        (("--cache", "--prefix", ""), f"%={inside}"),
    ):
        with pool.private(cached.etcd, *options) as mounted:
            path = mounted.path / below
            assert [seen(path / name) for name in names] == original, options
            assert os.getxattr(path / "file", "user.a") == b"one"
            assert os.readlink(path / "link") == "file"
            assert sorted(
                (e.name, e.stat(follow_symlinks=False).st_mode) for e in os.scandir(path)
            ) == [
                ("d", original[1][0]),
                ("file", original[0][0]),
                ("link", original[2][0]),
            ]


@pytest.mark.parametrize("mode", MODES)
def test_b52_changes_arrive_at_other_mounts(pool: Pool, cached: Lab, mode: str) -> None:
    with mounted_at(pool, cached, mode) as path:
        for here, there in ((cached.path, path), (path, cached.path)):
            change_all(here)
            _until(partial(_same, here, there))
            (here / "file").chmod(0o640)
            (here / "d").chmod(0o750)
            _until(partial(_same, here, there))
            sh(here, "rm -r *")
            _until(partial(_is_empty, there))


def _is_empty(path: Path) -> bool:
    return not os.listdir(path)


def _same(here: Path, there: Path) -> bool:
    try:
        return [seen(here / n) for n in ("file", "d", "link")] == [
            seen(there / n) for n in ("file", "d", "link")
        ]
    except FileNotFoundError:
        return False


def _until(condition: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(1000):
        if condition():
            return
        done.wait(0.01)  # nothing says when a mount with another prefix has caught up
    assert condition()


def test_b52_each_change_is_one_revision_and_none_if_nothing_changes(lab: Lab) -> None:
    file = lab.path / "file"
    file.write_bytes(b"value")
    with revisions(lab, 1):
        file.chmod(0o600)
    with revisions(lab, 0):
        file.chmod(0o600)
    with revisions(lab, 1):
        os.utime(file, ns=(5, 7))
    with revisions(lab, 0):
        os.utime(file, ns=(5, 7))
    with revisions(lab, 1):
        os.setxattr(file, "user.a", b"1")
    with revisions(lab, 1):
        sh(lab.path, "umask 077; echo x > secret")
    with revisions(lab, 1):
        os.mkdir(lab.path / "d", 0o700)
    with revisions(lab, 1):
        os.symlink("x", lab.path / "link")
    with revisions(lab, 1):
        os.mkfifo(lab.path / "fifo")
    with revisions(lab, 1):
        sh(lab.path, "touch new")
    with revisions(lab, 5):
        sh(lab.path, "rm link fifo secret new; rmdir d")


def test_b54_what_is_the_default_is_not_kept(lab: Lab) -> None:
    sh(lab.path, "echo x > file; mkdir d; touch new; : > empty; echo y >> file; truncate -s 1 file")
    assert records(lab) == []
    (lab.path / "file").chmod(0o600)
    (lab.path / "d").chmod(0o700)
    os.setxattr(lab.path / "new", "user.a", b"1")
    assert records(lab) == [b"d/", b"file", b"new"]
    assert record(lab, "file") == {"mode": "0600"}
    (lab.path / "file").chmod(0o644)
    (lab.path / "d").chmod(0o755)
    os.removexattr(lab.path / "new", "user.a")
    assert records(lab) == []
    sh(lab.path, "touch file; echo z > file")
    assert records(lab) == [], "a time that no longer holds is not kept either"


def test_b54_attributes_go_with_what_they_belong_to(lab: Lab) -> None:
    change_all(lab.path)
    assert records(lab) == [b"d/", b"file", b"link"]
    sh(lab.path, "rm file link; rmdir d")
    assert records(lab) == []
    assert os.listdir(lab.path) == []


def test_b54_a_directory_without_a_marker_gets_one(lab: Lab) -> None:
    lab.put("d/file", b"value")
    with revisions(lab, 1):
        (lab.path / "d").chmod(0o700)
    assert lab.value("d/") == b""
    assert mode_of(lab.path / "d") == 0o700
    lab.delete("d/")
    lab.shown(lab.client.revision())
    assert mode_of(lab.path / "d") == 0o755, "without its marker it has none"


# --- other clients --------------------------------------------------------------------------


def test_b55_other_clients_content_keeps_the_mode(lab: Lab) -> None:
    file = lab.path / "file"
    file.write_bytes(b"value")
    file.chmod(0o600)
    os.utime(file, ns=(LONG_AGO, LONG_AGO))
    lab.put("file", b"other")
    assert file.read_bytes() == b"other"
    assert mode_of(file) == 0o600
    assert file.stat().st_mtime_ns > LONG_AGO


def test_b55_a_key_made_anew_has_no_attributes(lab: Lab) -> None:
    change_all(lab.path)
    for name in ("file", "link"):
        lab.delete(name)
        lab.put(name, b"new")
        assert (lab.path / name).read_bytes() == b"new"
        assert mode_of(lab.path / name) == 0o644
        assert os.lstat(lab.path / name).st_mtime_ns > LONG_AGO
    lab.delete("d/")
    lab.put("d/", b"")
    assert mode_of(lab.path / "d") == 0o755
    (lab.path / "file").chmod(0o640)
    assert record(lab, "file") == {"mode": "0640"}, "nothing comes back from the dead"


def test_b55_a_key_that_was_deleted_and_is_made_here(lab: Lab) -> None:
    file = lab.path / "file"
    file.write_bytes(b"value")
    file.chmod(0o600)
    lab.delete("file")
    with revisions(lab, 1):
        sh(lab.path, "echo x > file")
    assert mode_of(file) == 0o644
    lab.delete("file")
    with revisions(lab, 1):
        sh(lab.path, "umask 077; echo x > file")
    assert mode_of(file) == 0o600


@pytest.mark.oldest_and_newest_etcd
def test_b56_void_side_keys_are_swept_out(pool: Pool, cached: Lab) -> None:
    with pool.private(cached.etcd, "--cache", "--audit-interval", "0.2") as tidy:
        for name in ("gone", "anew", "kept"):
            (cached.path / name).touch()
            (cached.path / name).chmod(0o600)
        cached.client.delete(cached.key("gone"))
        cached.client.delete(cached.key("anew"))
        tidy.wait(cached.put("anew", b"value"))
        _until(lambda: records(cached) == [b"kept"])
        assert mode_of(tidy.path / cached.path.name / "kept") == 0o600
        assert mode_of(tidy.path / cached.path.name / "anew") == 0o644


def test_b55_people_can_change_records_too(lab: Lab) -> None:
    lab.put("file", b"target")
    inode = os.lstat(lab.path / "file").st_ino
    lab.shown(lab.client.put(record_key(lab.key("file")), b'{"mode":"0400","new":[1]}'))
    assert mode_of(lab.path / "file") == 0o400
    assert os.lstat(lab.path / "file").st_ino == inode
    (lab.path / "file").chmod(0o440)
    assert record(lab, "file") == {"mode": "0440", "new": [1]}
    lab.shown(lab.client.put(record_key(lab.key("file")), b'{"type":"symlink"}'))
    assert os.readlink(lab.path / "file") == "target"
    lab.shown(lab.client.delete(record_key(lab.key("file"))))
    assert (lab.path / "file").read_bytes() == b"target"


def test_b57_the_value_of_a_symlink_is_its_target(lab: Lab) -> None:
    os.symlink("here", lab.path / "link")
    assert lab.value("link") == b"here"
    assert record(lab, "link") == {"type": "symlink"}
    lab.put("link", b"there")
    assert os.readlink(lab.path / "link") == "there"
    assert os.lstat(lab.path / "link").st_size == 5


@root_only
def test_b58_devices_and_hard_links_are_refused(lab: Lab) -> None:
    with revisions(lab, 1):
        (lab.path / "file").touch()
    with revisions(lab, 0):
        for kind in (stat.S_IFCHR, stat.S_IFBLK):
            make = partial(os.mknod, lab.path / "dev", kind | 0o600, os.makedev(1, 3))
            assert errno_of(make) == "EPERM"
        assert errno_of(lambda: os.link(lab.path / "file", lab.path / "hard")) == "EPERM"
    assert os.listdir(lab.path) == ["file"]


# --- extended attributes --------------------------------------------------------------------


def test_b60_other_name_spaces_are_refused(lab: Lab) -> None:
    (lab.path / "file").touch()
    # Version 2; the owner, the group, the rest, each with what it may (posix_acl_xattr.h).
    acl = struct.pack("<I" + "HHI" * 3, 2, 1, 6, 0, 4, 4, 0, 32, 4, 0)
    for name in ("trusted.a", "security.a", "system.posix_acl_access"):
        number = errno_of(partial(os.setxattr, lab.path / "file", name, acl))
        assert number in {"ENOTSUP", "EOPNOTSUPP"}, name
    assert records(lab) == []


def test_b60_xattrs_that_do_not_fit(lab: Lab) -> None:
    (lab.path / "file").touch()
    for n in range(2):
        os.setxattr(lab.path / "file", f"user.{n}", bytes(65536))
    errnos = [
        errno_of(partial(os.setxattr, lab.path / "file", f"user.{n}", bytes(65536)))
        for n in range(2, 5)
    ]
    assert errnos[-1] == "ENOSPC"
    assert os.getxattr(lab.path / "file", "user.0") == bytes(65536)


@pytest.mark.oldest_and_newest_etcd
def test_b61_what_etcd_knows_of_a_key(lab: Lab) -> None:
    (lab.path / "file").write_bytes(b"value")
    created = lab.client.revision()
    lab.put("file", b"other")

    def fact(name: str, path: str = "file") -> str:
        return os.getxattr(lab.path / path, f"user.etcd.{name}").decode()

    assert fact("key").encode() == lab.key("file")
    assert fact("create_revision") == str(created)
    assert fact("mod_revision") == str(created + 1)
    assert fact("version") == "2"
    for missing in ("lease", "ttl", "other"):
        assert errno_of(partial(fact, missing)) == "ENODATA"
    assert os.listxattr(lab.path / "file") == [], "or cp and rsync would copy them"
    (lab.path / "d").mkdir()
    assert fact("key", "d").encode() == lab.key("d/")
    lab.put("implied/file", b"")
    assert errno_of(lambda: fact("key", "implied")) == "ENODATA"
    for name in ("key", "version", "mod_revision"):
        path = lab.path / "file"
        assert errno_of(partial(os.setxattr, path, f"user.etcd.{name}", b"1")) == "EPERM"
        assert errno_of(partial(os.removexattr, path, f"user.etcd.{name}")) == "EPERM"


# --- races, rights, options -----------------------------------------------------------------


def test_b64_concurrent_changes_are_all_kept(pool: Pool, cached: Lab) -> None:
    cached.put("file", b"value")
    with (
        mounted_at(pool, cached, "--cache") as first,
        mounted_at(pool, cached, "--no-cache") as other,
    ):
        places = [cached.path, first, other]
        failures: list[OSError] = []

        def change(place: Path, number: int) -> None:
            try:
                for n in range(15):
                    os.setxattr(place / "file", f"user.{number}-{n}", b"%d" % n)
            except OSError as exc:
                failures.append(exc)

        threads = [
            threading.Thread(target=change, args=(place, number))
            for number, place in enumerate(places)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        expected = sorted(f"user.{number}-{n}" for number in range(3) for n in range(15))
        assert sorted(os.listxattr(other / "file")) == expected
        found = record(cached, "file")
        assert found is not None
        assert sorted(found["xattrs"]) == expected


def test_b64_of_many_that_create_or_replace_an_xattr_one_wins(pool: Pool, cached: Lab) -> None:
    """And chmod, chown and utimens meanwhile lose nothing either."""
    rounds, threads = 12, 4
    cached.put("file", b"value")
    with mounted_at(pool, cached, "--cache") as first, mounted_at(pool, cached) as other:
        files = [(first, other)[number % 2] / "file" for number in range(threads)]
        start, won = threading.Barrier(threads + 1), list[tuple[int, int]]()
        failed: list[int] = []

        def claim(file: Path, number: int) -> None:
            for n in range(rounds):
                start.wait(PATIENCE_S)
                try:
                    os.setxattr(file, f"user.{n}", b"%d" % number, os.XATTR_CREATE)
                    won.append((n, number))
                except OSError as exc:
                    failed.append(exc.errno or 0)

        def change() -> None:
            for n in range(rounds):
                start.wait(PATIENCE_S)
                os.chmod(first / "file", 0o600 + n % 8)
                os.utime(other / "file", ns=(n, n))
                os.chown(first / "file", 1000 + n, -1)

        run_together(change, *(partial(claim, file, n) for n, file in enumerate(files)))
        assert sorted(n for n, _ in won) == list(range(rounds))
        assert failed == [errno.EEXIST] * (threads - 1) * rounds
        for n, number in won:
            assert os.getxattr(other / "file", f"user.{n}") == b"%d" % number
        last = rounds - 1
        assert mode_of(other / "file") == 0o600 + last % 8
        found = (other / "file").stat()
        assert (found.st_uid, found.st_mtime_ns) == (1000 + last, last)


def test_b64_replacing_an_xattr_never_makes_it(pool: Pool, cached: Lab) -> None:
    rounds = 20
    cached.put("file", b"value")
    with mounted_at(pool, cached, "--cache") as first, mounted_at(pool, cached) as other:
        left: list[int] = []
        start = threading.Barrier(2)

        def replace() -> None:
            for _ in range(rounds):
                start.wait(PATIENCE_S)
                with suppress(OSError):
                    os.setxattr(first / "file", "user.x", b"new", os.XATTR_REPLACE)
                start.wait(PATIENCE_S)

        def remove() -> None:
            for n in range(rounds):
                os.setxattr(other / "file", "user.x", b"old")
                start.wait(PATIENCE_S)
                os.removexattr(other / "file", "user.x")
                start.wait(PATIENCE_S)
                if os.listxattr(other / "file"):
                    left.append(n)

        run_together(replace, remove)
        assert left == []


def run_together(*functions: Callable[[], object]) -> None:
    with ThreadPoolExecutor(len(functions)) as executor:
        for future in [executor.submit(function) for function in functions]:
            future.result(PATIENCE_S)


def test_b53_nobody_sees_another_mode_first(pool: Pool, cached: Lab) -> None:
    """The record keys of the second mount come by a watch of their own."""
    with mounted_at(pool, cached, "--cache") as path:
        wrong: list[tuple[str, int]] = []
        stop = threading.Event()

        def look() -> None:
            while not stop.is_set():
                for entry in os.scandir(path):
                    mode = stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode)
                    if mode not in (0o600, 0o700, 0o777):
                        wrong.append((entry.name, mode))

        looking = threading.Thread(target=look)
        looking.start()
        for n in range(40):
            sh_free(cached.path, n)
        stop.set()
        looking.join()
        assert wrong == []


def sh_free(path: Path, n: int) -> None:
    """Make a file, a directory and a link that are not what the defaults say."""
    fd = os.open(path / f"f{n}", os.O_CREAT | os.O_WRONLY, 0o600)
    os.write(fd, b"x")
    os.close(fd)
    os.close(os.open(path / f"x{n}", os.O_CREAT | os.O_EXCL, 0o600))
    os.mkdir(path / f"d{n}", 0o700)
    os.symlink("x", path / f"l{n}")


def test_b68_side_keys_are_not_shown(pool: Pool, lab: Lab) -> None:
    (lab.path / "file").touch()
    (lab.path / "file").chmod(0o600)
    root = lab.mounted.path
    assert not (root / "%=.etcdfs").exists()
    lab.shown(lab.client.put(b"/.etcdfs/other", b"value"))
    try:
        assert os.listdir(root / "%=.etcdfs") == ["other"]
        assert (root / "%=.etcdfs/other").read_bytes() == b"value"
        for hidden in ("attrs", "attrs/%="):
            assert errno_of(partial(os.stat, root / "%=.etcdfs" / hidden)) == "ENOENT"
        with revisions(lab, 0):
            assert errno_of(lambda: os.mkdir(root / "%=.etcdfs/attrs")) == "EPERM"
    finally:
        lab.shown(lab.client.delete(b"/.etcdfs/other"))
    assert not (root / "%=.etcdfs").exists()


@pytest.mark.parametrize("mode", MODES)
def test_b69_without_attributes_there_is_nothing_but_keys(
    pool: Pool, cached: Lab, mode: str
) -> None:
    change_all(cached.path)
    with pool.private(cached.etcd, mode, "--no-attrs") as mounted:
        path = mounted.path / cached.path.name
        assert [mode_of(path / n) for n in ("file", "d", "link")] == [0o644, 0o755, 0o644]
        with revisions(cached, 0):
            assert errno_of(lambda: os.chmod(path / "file", 0o600)) == "EPERM"
            assert errno_of(lambda: os.chmod(path / "d", 0o700)) == "EPERM"
            if os.geteuid() == 0:
                assert errno_of(lambda: os.chown(path / "file", 12, 34)) == "EPERM"
            assert errno_of(lambda: os.symlink("x", path / "new")) == "EPERM"
            assert errno_of(lambda: os.mkfifo(path / "new")) == "EPERM"
            assert errno_of(lambda: os.setxattr(path / "file", "user.a", b"1")) == "ENOTSUP"
            assert errno_of(lambda: os.getxattr(path / "file", "user.a")) == "ENODATA"
            os.chmod(path / "file", 0o644)
            os.chown(path / "file", os.getuid(), os.getgid())
            os.utime(path / "file", ns=(LONG_AGO, LONG_AGO))
            assert (path / "file").stat().st_mtime_ns == LONG_AGO
        before = records(cached)
        sh(path, "umask 077; echo x > new; mkdir newd; cp -p file copy; touch -d @5 copy; rm copy")
        assert mode_of(path / "new") == 0o644, "it would protect nothing"
        assert records(cached) == before
        assert os.getxattr(path / "file", "user.etcd.version") == b"1"


def test_attributes_are_one_command_of_etcdctl(lab: Lab) -> None:
    """docs/semantics.md: people read them."""
    (lab.path / "file").touch()
    (lab.path / "file").chmod(0o640)
    key = record_key(lab.key("file")).decode()
    assert lab.etcd.etcdctl("get", "--print-value-only", key).strip() == b'{"mode":"0640"}'


@pytest.mark.parametrize("how", ["deleted", "made anew"])
def test_b19_an_open_file_that_another_client_deleted_keeps_its_own_attributes(
    lab: Lab, how: str
) -> None:
    calls: list[Callable[[int], None]] = [
        lambda fd: os.fchmod(fd, 0o600),
        lambda fd: os.fchown(fd, 1000, 7) if os.geteuid() == 0 else None,
        lambda fd: os.utime(fd, ns=(1, 2)),
        lambda fd: os.setxattr(fd, "user.a", b"value"),
    ]
    for number, call in enumerate(calls):
        name = f"file{number}"
        lab.put(name, b"value")
        with (lab.path / name).open("rb") as opened:
            revision = lab.client.delete(lab.key(name))
            if how == "made anew":
                revision = lab.client.put(lab.key(name), b"other")
            call(opened.fileno())
            lab.shown(revision)
            assert opened.read() == b"value"
            assert os.fstat(opened.fileno()).st_nlink == 0
        assert (lab.path / name).exists() == (how == "made anew")
    assert lab.client.below(b"/.etcdfs/attrs/" + lab.prefix) == []
