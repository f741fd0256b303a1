"""mount(8), umount(8) and fstab with the helper, on a machine of the test's own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdfs.cli.install import DATA
from tests.support.etcd_process import EtcdProcess
from tests.support.nobody import needs_root
from tests.support.private_root import PrivateRoot

pytestmark = [pytest.mark.fuse, pytest.mark.etcd, needs_root]

INSTALL = f"{Path(sys.executable).with_name('etcdfs')} install-helper"


@pytest.fixture(scope="module")
def machine() -> Iterator[PrivateRoot]:
    with PrivateRoot() as machine:
        installed = machine.run(INSTALL)
        assert "installed /sbin/mount.etcdfs\n" in installed
        yield machine


def test_b93_mount_finds_the_helper(machine: PrivateRoot, shared_etcd: EtcdProcess) -> None:
    machine.run(
        """
        mkdir /mnt/a
        mount -t etcdfs -o cache,prefix=/helper,endpoints="$1" etcd /mnt/a
        echo value >/mnt/a/file
        """,
        shared_etcd.client_url,
    )
    assert shared_etcd.etcdctl("get", "/helper/file") == b"/helper/file\nvalue\n\n"
    assert machine.run("findmnt -no FSTYPE,SOURCE /mnt/a").split() == ["fuse.etcdfs", "etcd"]
    busy = machine.attempt("cd /mnt/a; umount /mnt/a")
    assert (busy.returncode, "busy" in busy.stderr) == (32, True)
    assert machine.run("umount /mnt/a; ls /mnt/a") == ""


def test_b93_a_line_of_fstab_is_mounted_once(
    machine: PrivateRoot, shared_etcd: EtcdProcess
) -> None:
    """With the options that mount(8) adds, and those that mean something to systemd only."""
    options = "cache,user,_netdev,nofail,x-systemd.mount-timeout=30"
    machine.run(
        """
        mkdir /mnt/b
        echo "$1/fstab /mnt/b etcdfs $2 0 0" >/etc/fstab
        mount --fake /mnt/b
        mount -a
        mount -a
        echo value >/mnt/b/file
        """,
        str(shared_etcd.endpoint),
        options,
    )
    assert machine.run("findmnt -no SOURCE,OPTIONS /mnt/b").splitlines() == [
        f"{shared_etcd.endpoint}/fstab rw,nosuid,nodev,noexec,relatime,"
        "user_id=0,group_id=0,default_permissions"
    ]
    assert shared_etcd.etcdctl("get", "/fstab/file") == b"/fstab/file\nvalue\n\n"
    machine.run("umount /mnt/b")


def test_read_only_by_mount(machine: PrivateRoot, shared_etcd: EtcdProcess) -> None:
    machine.run("mkdir /mnt/c; mount -rt etcdfs $1 /mnt/c", str(shared_etcd.endpoint))
    refused = machine.attempt("echo x >/mnt/c/file")
    assert "Read-only" in refused.stderr
    machine.run("umount /mnt/c")


def test_a_failure_is_one_line_and_our_status(machine: PrivateRoot) -> None:
    failed = machine.attempt("mkdir /mnt/d; mount -t etcdfs -o timeout=1 127.0.0.1:1 /mnt/d")
    assert failed.returncode == 20
    assert failed.stderr.startswith("etcdfs: ")
    assert failed.stderr.count("\n") == 1
    refused = machine.attempt("mount -t etcdfs -o remount,ro etcd /mnt/d")
    assert (refused.returncode, "unmount and mount again" in refused.stderr) == (2, True)


@pytest.mark.programs("man")
def test_the_manual_is_found_where_the_command_is(machine: PrivateRoot) -> None:
    for path in sorted((DATA / "share/man").rglob("*.[18]")):
        found = machine.run('realpath "$(man -w "$1")"', path.stem)
        assert found == f"/usr/local/share/man/{path.parent.name}/{path.name}\n"


def test_it_is_removed_again() -> None:
    with PrivateRoot() as machine:
        before = machine.run("find /usr/local /usr/sbin | sort")
        machine.run(INSTALL)
        machine.run("mount -V; mount.etcdfs --help")
        machine.run(f"{INSTALL} --remove")
        left = set(machine.run("find /usr/local /usr/sbin -type f -o -type l | sort").split())
        assert left <= set(before.split())
