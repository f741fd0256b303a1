"""Who watches a mount, and who mounts it, need not be root."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.lab import Pool
from tests.mount.test_watching_programs import Listener, running
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import COMMAND
from tests.support.nobody import NOBODY, needs_root
from tests.support.private_root import PrivateRoot

pytestmark = [pytest.mark.etcd, pytest.mark.fuse, needs_root]

_WATCH = """
import os, sys
sys.path[:0] = sys.argv[1].split(":")
from pathlib import Path
from tests.support.watcher import Watcher
user, *paths = sys.argv[2:]
os.setgroups([])
os.setgid(int(user))
os.setuid(int(user))
with Watcher(*map(Path, paths)) as watcher:
    print("watching", os.getuid(), flush=True)
    while True:
        before = len(watcher.seen)
        watcher._read(60)
        print(*watcher.seen[before:], sep="\\n", flush=True)
"""
"""Tells each event as it comes."""

_SETUP = f"""
mknod -m 666 "$HOME/fuse" c 10 229
mount --bind "$HOME/fuse" /dev/fuse
mkdir "$HOME/root" "$HOME/root.work"
mount -t overlay overlay -o "lowerdir=/root,upperdir=$HOME/root,workdir=$HOME/root.work" /root
chmod 711 /root
echo user_allow_other >>/etc/fuse.conf
mkdir -m 711 /mnt/own
mkdir /mnt/own/etcd; chown {NOBODY}:{NOBODY} /mnt/own/etcd
"""
"""Where everybody may mount, as on most machines; and read the interpreter, wherever it is."""


@pytest.fixture(scope="module")
def machine() -> Iterator[PrivateRoot]:
    with PrivateRoot() as machine:
        machine.run(_SETUP, HOME=str(machine.home))
        yield machine


def watch(path: Path | str, user: int = NOBODY) -> list[str]:
    return [sys.executable, "-I", "-c", _WATCH, os.pathsep.join(sys.path), str(user), str(path)]


@contextmanager
def mounted_by_nobody(machine: PrivateRoot, etcd: EtcdProcess, *options: str) -> Iterator[str]:
    """Mount as that user; yield what the command says."""
    mount = ("mount", "/mnt/own/etcd", "--endpoints", etcd.client_url, *options)
    script = f'exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups "$@"'
    done = machine.attempt(script, *COMMAND, *mount)
    assert done.returncode == 0, done.stderr
    try:
        assert f"user_id={NOBODY}," in machine.run("grep /mnt/own/etcd /proc/self/mountinfo")
        yield done.stdout + done.stderr
    finally:
        machine.run(f"{script} /mnt/own/etcd", "fusermount3", "-u")


def test_b132_who_watches_as_another_user_is_seen(own_etcd: EtcdProcess, pool: Pool) -> None:
    with pool.private(own_etcd, "--cache", "--allow-other") as mounted:
        mounted.path.parent.chmod(0o711)
        mounted.put("/d/f", b"1")
        with running(*watch(mounted.path / "d")) as heard:
            heard.until(f"watching {NOBODY}")
            mounted.put("/d/f", b"2")
            heard.until("CLOSE_WRITE f")
            mounted.put("/d/new", b"")
            heard.until("CREATE new")


def test_b133_a_user_without_rights_hears_all_on_a_mount_of_his_own(
    machine: PrivateRoot, own_etcd: EtcdProcess
) -> None:
    own_etcd.etcdctl("put", "/d/f", "1")
    with (
        mounted_by_nobody(machine, own_etcd, "--cache") as said,
        running(*machine.command(*watch("/mnt/own/etcd/d"))) as heard,
    ):
        assert "does nothing" not in said
        heard.until(f"watching {NOBODY}")
        _hears_what_others_do(own_etcd, heard)


def test_b133_others_hear_of_what_the_user_who_mounts_may_write_to(
    machine: PrivateRoot, own_etcd: EtcdProcess
) -> None:
    own_etcd.etcdctl("put", "/d/f", "1")
    own_etcd.etcdctl("put", "/d/protected", "1")
    own_etcd.etcdctl("put", "/.etcdfs/attrs//d/protected", '{"mode":"0644","uid":1}')
    with (
        mounted_by_nobody(machine, own_etcd, "--cache", "--allow-other"),
        running(*machine.command(*watch("/mnt/own/etcd/d", user=0))) as heard,
    ):
        heard.until("watching 0")
        own_etcd.etcdctl("put", "/d/protected", "2")
        _hears_what_others_do(own_etcd, heard)
        own_etcd.etcdctl("del", "/d/protected")
        heard.until("DELETE protected")
        told = machine.run("getfattr --only-values -n user.etcdfs.statistics /mnt/own/etcd")
        assert json.loads(told)["inotify"]["dropped"] == 1
    assert not any("protected" in line for line in heard.passed if "DELETE" not in line)


def _hears_what_others_do(etcd: EtcdProcess, heard: Listener) -> None:
    etcd.etcdctl("put", "/d/f", "2")
    heard.until("CLOSE_WRITE f")
    etcd.etcdctl("put", "/d/new", "1")
    heard.until("CREATE new")
    heard.until("CLOSE_WRITE new")
    etcd.etcdctl("del", "/d/new")
    heard.until("DELETE new")
    etcd.etcdctl("put", "/.etcdfs/attrs//d/f", '{"mode":"0600","uid":1}')
    heard.until("ATTRIB f")


def test_b133_a_read_only_mount_of_such_a_user_says_that_it_hears_nothing(
    machine: PrivateRoot, own_etcd: EtcdProcess
) -> None:
    with mounted_by_nobody(machine, own_etcd, "--cache", "--read-only") as said:
        lines = [line for line in said.splitlines() if "--inotify does nothing here" in line]
        assert len(lines) == 1
        assert "only root can raise events on a read-only mount" in lines[0]
