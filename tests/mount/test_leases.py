"""Files that expire: `user.etcd.ttl`, the leases behind it, and who may set it."""

import os
import threading
from functools import partial

import pytest

from tests.mount.lab import MODES, Lab, Pool
from tests.mount.posix.calls import NOBODY, as_user, errno_of

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users")

LONG_AGO = 981_173_106_789_000_001


@pytest.mark.oldest_and_newest_etcd
def test_b62_a_ttl_is_a_lease(lab: Lab) -> None:
    file = lab.path / "file"
    file.write_bytes(b"value")
    os.utime(file, ns=(LONG_AGO, LONG_AGO))
    before = file.stat()
    os.setxattr(file, "user.etcd.ttl", b"600")
    lease = os.getxattr(file, "user.etcd.lease").decode()
    assert 0 < int(os.getxattr(file, "user.etcd.ttl")) <= 600
    told = lab.etcd.etcdctl("lease", "timetolive", lease, "--keys")
    assert lab.key("file") in told
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    with file.open("ab") as opened:
        opened.write(b"more")
    assert os.getxattr(file, "user.etcd.lease").decode() == lease, "a write keeps the lease"
    os.removexattr(file, "user.etcd.ttl")
    assert errno_of(lambda: os.getxattr(file, "user.etcd.ttl")) == "ENODATA"
    assert errno_of(lambda: os.removexattr(file, "user.etcd.ttl")) == "ENODATA"
    assert file.read_bytes() == b"valuemore"
    for wrong in (b"", b"soon", b"0", b"-1", b"1.5", b"9000000001", b"9" * 20, b"9" * 5000):
        assert errno_of(partial(os.setxattr, file, "user.etcd.ttl", wrong)) == "EINVAL"
    assert errno_of(lambda: os.setxattr(lab.path, "user.etcd.ttl", b"9")) == "EPERM"


@pytest.mark.oldest_and_newest_etcd
def test_b62_a_lease_that_holds_nothing_any_more_is_ended(lab: Lab) -> None:
    """By whatever the file loses it; but not if somebody has put another key on it."""

    def leases() -> set[str]:
        listed = lab.etcd.etcdctl("lease", "list").decode().split()
        return {word for word in listed if len(word) == 16} - before

    before: set[str] = set()
    before = leases()
    file, other = lab.path / "file", lab.path / "other"
    for ttl in (b"9000000000", b"600", b"00000000600"):
        file.write_bytes(b"value")
        for _ in range(3):
            os.setxattr(file, "user.etcd.ttl", ttl)
    assert len(leases()) == 1
    os.removexattr(file, "user.etcd.ttl")
    os.setxattr(file, "user.etcd.ttl", b"600")
    file.unlink()
    assert leases() == set()
    for path in (file, other):
        path.write_bytes(b"value")
        os.setxattr(path, "user.etcd.ttl", b"600")
    other.rename(file)
    kept = os.getxattr(file, "user.etcd.lease").decode()
    lab.etcd.etcdctl("put", f"--lease={kept}", lab.key("more").decode(), "value")
    file.unlink()
    assert kept in leases()
    assert lab.value("more") == b"value"
    lab.etcd.etcdctl("lease", "revoke", kept)
    assert leases() == set()


def expire(name: str) -> list[str | None]:
    return [
        errno_of(lambda: os.setxattr(name, "user.etcd.ttl", b"500")),
        errno_of(lambda: os.removexattr(name, "user.etcd.ttl")),
    ]


@root_only
def test_b62_a_file_lasts_as_long_as_its_owner_says(pool: Pool, cached: Lab) -> None:
    """To let a file expire is to delete it: whoever may write to it may not do that."""
    for mode in MODES:
        with pool.private(cached.etcd, mode, "--allow-other") as mounted:
            directory = mounted.path / cached.path.name
            file = directory / f"file{mode}"
            attempts = partial(expire, file.name)
            file.write_bytes(b"value")
            file.chmod(0o666)
            os.setxattr(file, "user.etcd.ttl", b"600")
            assert as_user(directory, attempts) == ["EPERM", "EPERM"]
            assert 0 < int(os.getxattr(file, "user.etcd.ttl")) <= 600
            os.chown(file, NOBODY, NOBODY)
            assert as_user(directory, attempts) == [None, None]


def test_b62_an_expired_key_disappears(lab: Lab) -> None:
    file = lab.path / "file"
    file.write_bytes(b"value")
    os.setxattr(file, "user.etcd.ttl", b"600")
    lab.etcd.etcdctl("lease", "revoke", os.getxattr(file, "user.etcd.lease").decode())
    lab.shown(lab.client.revision())
    assert not file.exists()
    file.write_bytes(b"again")
    os.setxattr(file, "user.etcd.ttl", b"1")
    gone = threading.Event()
    while file.exists():  # nothing says when etcd has found it to be over
        gone.wait(0.05)
