"""Each option of `etcdfs mount` that changes what the mount does, on a real mount."""

import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.mount.lab import MODES, Lab, Pool

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

NOBODY = 65534


@pytest.mark.parametrize("mode", MODES)
def test_b100_a_read_only_mount(pool: Pool, cached: Lab, mode: str) -> None:
    cached.put("file", b"value")
    cached.put("d/file", b"value")
    before = cached.client.revision()
    with pool.private(cached.etcd, mode, "--read-only") as mounted:
        path = mounted.path / cached.path.name
        file = path / "file"
        assert file.read_bytes() == b"value"
        for attempt in (
            lambda: file.write_bytes(b"x"),
            lambda: file.open("r+b"),
            (path / "new").touch,
            lambda: os.open(path / "new", os.O_CREAT | os.O_EXCL),
            lambda: os.truncate(file, 1),
            file.unlink,
            lambda: file.rename(path / "other"),
            (path / "e").mkdir,
            (path / "d").rmdir,
            lambda: file.chmod(0o600),
            lambda: os.utime(file),
        ):
            with pytest.raises(OSError, match="Read-only") as caught:
                attempt()
            assert caught.value.errno == errno.EROFS
        revision = cached.client.put(cached.key("file"), b"changed")
        mounted.wait(revision)
        assert file.read_bytes() == b"changed"
    assert revision == before + 1


@pytest.mark.parametrize("mode", MODES)
def test_owner_and_modes(pool: Pool, cached: Lab, mode: str) -> None:
    cached.put("file", b"value")
    options = ("--uid", "12", "--gid", "34", "--file-mode", "0666", "--dir-mode", "0777")
    with pool.private(cached.etcd, mode, *options, "--umask", "0027") as mounted:
        path = mounted.path / cached.path.name
        (path / "new").touch()
        for found, mode_bits in (
            (path.stat(), stat.S_IFDIR | 0o750),
            ((path / "file").stat(), stat.S_IFREG | 0o640),
        ):
            assert (found.st_uid, found.st_gid) == (12, 34)
            assert found.st_mode == mode_bits
        made = (path / "new").stat()
        assert (made.st_uid, made.st_gid) == (os.getuid(), os.getgid())
        assert made.st_mode == stat.S_IFREG | 0o644, "as whoever made it said"


def as_nobody(script: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["/bin/sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        user=NOBODY,
        group=NOBODY,
        extra_groups=(),
        cwd="/",
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_is_let_in_by_allow_other(pool: Pool, lab: Lab) -> None:
    lab.put("file", b"value")
    with pool.private(lab.etcd, "--cache", "--allow-other") as mounted:
        mounted.path.parent.chmod(0o755)
        path = mounted.path / lab.path.name
        assert as_nobody(f"cat {path}/file").stdout == "value"
        (path / "secret").write_bytes(b"secret")
        (path / "secret").chmod(0o600)
        for script in (f"cat {path}/secret", f"echo x > {path}/file", f"rm -f {path}/file"):
            done = as_nobody(script)
            assert done.returncode != 0
            assert "denied" in done.stderr
        assert lab.value("file") == b"value"
    with pool.private(lab.etcd, "--cache") as mounted:
        mounted.path.parent.chmod(0o755)
        assert "denied" in as_nobody(f"ls {mounted.path}").stderr


def test_b41_the_kernel_may_be_told_to_keep_nothing(pool: Pool, cached: Lab) -> None:
    cached.put("file", b"value")
    with pool.private(cached.etcd, "--cache", "--kernel-timeout", "0") as mounted:
        path = mounted.path / cached.path.name
        (path / "file").stat()
        with mounted.counting() as requests:
            for _ in range(10):
                (path / "file").stat()
                assert not (path / "missing").exists()
        assert requests["lookup"] >= 20
        mounted.wait(cached.client.put(cached.key("file"), b"changed"))
        assert (path / "file").read_bytes() == b"changed"


def test_a_write_does_not_wait_for_a_late_watch_beyond_the_settle_timeout(
    pool: Pool, cached: Lab
) -> None:
    with pool.private(cached.etcd, "--cache", "--settle-timeout", "0.000001") as mounted:
        mounted.expect_log("s late")
        path = mounted.path / cached.path.name
        for n in range(30):
            (path / "file").write_bytes(b"%d" % n)
            assert (path / "file").read_bytes() == b"%d" % n
            (path / "other").write_bytes(b"%d" % n)
            (path / "other").rename(path / "moved")
            assert sorted(os.listdir(path)) == ["file", "moved"]
        assert mounted.statistics()["mirror"]["ahead"] > 0
        mounted.wait(cached.client.revision())
        assert (path / "moved").read_bytes() == (path / "file").read_bytes() == b"29"


def test_the_mount_is_shown_as_what_it_is(pool: Pool, cached: Lab) -> None:
    mounts = Path("/proc/mounts").read_text()
    (line,) = (m for m in mounts.splitlines() if f" {cached.mounted.path} " in m)
    source, _, kind, options = line.split()[:4]
    assert kind == "fuse.etcdfs"
    assert source == f"{cached.etcd.endpoint}/"
    assert {"rw", "nosuid", "nodev", "default_permissions"} <= set(options.split(","))
