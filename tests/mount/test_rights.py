"""Roles that reach the keys of a mount, but not, or not always, their attributes."""

import contextlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.mount.lab import MODES, Pool, sh
from tests.mount.posix.calls import errno_of
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted
from tests.support.secured import ROOT_PASSWORD, add_user, switch_users_on

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

ATTRIBUTES = "/.etcdfs/attrs//app/"
PATIENCE_S = 30.0
MANY = 130
FIXED = {(3, 4): 42, (3, 5): 28, (3, 6): 9}


@pytest.fixture
def etcd(etcd_binary: Path, watched: None) -> Iterator[EtcdProcess]:
    """An etcd with a user who may do all in /app/, and nothing yet with its attributes."""
    with EtcdProcess(etcd_binary, "--bcrypt-cost=4") as etcd:
        add_user(etcd, "app", "secret", ("readwrite", b"/app/"))
        switch_users_on(etcd)
        yield etcd


@pytest.fixture
def owner(pool: Pool, etcd: EtcdProcess) -> Iterator[Mounted]:
    """The mount of somebody who may do everything."""
    user = f"--user=root:{ROOT_PASSWORD}"
    with pool.private(etcd, "--cache", "--prefix=/app", user) as mounted:
        yield mounted


@contextlib.contextmanager
def mounted_as_app(pool: Pool, etcd: EtcdProcess, *options: str) -> Iterator[Mounted]:
    with pool.private(etcd, *options, "--prefix=/app", "--user=app:secret") as mounted:
        yield mounted


def allow(etcd: EtcdProcess, kind: str) -> None:
    etcd.etcdctl("role", "grant-permission", "--prefix=true", "app", kind, ATTRIBUTES)


def forbid(etcd: EtcdProcess) -> None:
    etcd.etcdctl("role", "revoke-permission", "--prefix=true", "app", ATTRIBUTES)


def make(mounted: Mounted, name: str, mode: int) -> int:
    """Make a file, and return the revision that it was made in."""
    descriptor = os.open(mounted.path / name, os.O_CREAT | os.O_WRONLY, mode)
    os.write(descriptor, b"value")
    os.close(descriptor)
    return int(os.getxattr(mounted.path / name, "user.etcd.mod_revision"))


def everything(etcd: EtcdProcess) -> list[str]:
    return etcd.etcdctl("get", "--keys-only", "--prefix", "/").decode().split()


def is_old(etcd: EtcdProcess) -> bool:
    """Say whether an etcd looks at no rights within nested transactions (GHSA-rfx7-8w68-q57q)."""
    status = json.loads(etcd.etcdctl("endpoint", "status", "-w", "json"))
    major, minor, patch = map(int, status[0]["Status"]["version"].split("."))
    return patch < FIXED.get((major, minor), 0)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def modes_of(path: Path, *names: str) -> list[int]:
    return [mode_of(path / name) for name in names]


def until(is_so: Callable[[], bool]) -> None:
    """Wait for what no event tells: that etcd has been asked again."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.1)):
        if is_so():
            return
        pause.wait(0.1)
    assert is_so()


def is_readable(mounted: Mounted) -> bool:
    return bool(mounted.statistics()["attributes"]["readable"])


@pytest.mark.parametrize("mode", MODES)
def test_b71_what_cannot_be_read_is_closed_until_it_can(
    pool: Pool, etcd: EtcdProcess, owner: Mounted, mode: str
) -> None:
    """A role is narrowed, and widened again, while somebody makes and closes files."""
    allow(etcd, "readwrite")
    make(owner, "secret", 0o600)
    make(owner, "public", 0o644)
    with mounted_as_app(pool, etcd, mode) as mounted:
        mounted.expect_log("attributes cannot be read")
        modes = partial(modes_of, mounted.path)
        assert modes("secret", "public") == [0o600, 0o644]
        forbid(etcd)
        mounted.wait(make(owner, "new", 0o600))
        assert modes("secret", "public", "new") == [0o600, 0o600, 0o600]
        assert not is_readable(mounted)
        assert stat.S_IMODE(mounted.path.stat().st_mode) == 0o700
        (owner.path / "public").chmod(0o640)
        mounted.wait(make(owner, "open", 0o644))
        assert modes("public", "open") == [0o600, 0o600]
        assert (mounted.path / "open").read_text() == "value"
        allow(etcd, "readwrite")
        until(lambda: modes("public", "open", "new", "secret") == [0o640, 0o644, 0o600, 0o600])
        assert is_readable(mounted)
        (mounted.path / "open").chmod(0o604)
        until(lambda: mode_of(owner.path / "open") == 0o604)
        assert mounted.log.count("attributes cannot be read") == 1


@pytest.mark.parametrize("mode", MODES)
def test_b71_who_may_not_write_attributes_sees_them_all_the_same(
    pool: Pool, etcd: EtcdProcess, owner: Mounted, mode: str
) -> None:
    allow(etcd, "read")
    make(owner, "one", 0o600)
    with mounted_as_app(pool, etcd, mode) as mounted:
        mounted.expect_log("attributes cannot be written", "permission denied")
        modes = partial(modes_of, mounted.path)
        os.mkdir(mounted.path / "d", 0o700)
        sh(mounted.path, "echo 1 > own; mkdir e; echo 2 > e/f; mv e g; mv own g/; touch g/own")
        sh(mounted.path, "umask 077; echo 3 > closed; set -C; echo 4 > claimed; cat closed claimed")
        assert errno_of(lambda: os.chmod(mounted.path / "g/own", 0o600)) == "EPERM"
        assert errno_of(lambda: os.symlink("to", mounted.path / "l")) == "EPERM"
        mounted.wait(make(owner, "two", 0o600))
        assert modes("one", "two", "d", "g/own") == [0o600, 0o600, 0o755, 0o644]
        assert errno_of(lambda: os.rename(mounted.path / "one", mounted.path / "g/one")) == "EACCES"
        assert mode_of(owner.path / "one") == 0o600
        found = mounted.statistics()["attributes"]
        assert (found["readable"], found["writable"]) == (True, False)
        assert mounted.log.count("attributes cannot be written") == 1
        (mounted.path / "two").unlink()
        allow(etcd, "readwrite")
        (mounted.path / "g/own").chmod(0o600)
        (mounted.path / "one").rename(mounted.path / "g/one")
        assert modes("g/own", "g/one") == [0o600, 0o600]
        assert mounted.statistics()["attributes"]["writable"]
    # What a role may not delete is void, and says nothing of what is made later.
    (owner.path / "two").write_text("open")
    assert mode_of(owner.path / "two") == 0o644


@pytest.mark.oldest_and_newest_etcd
def test_b118_roles_hold_for_what_takes_nested_transactions(
    pool: Pool, etcd: EtcdProcess, owner: Mounted
) -> None:
    """More than 128 operations are nested; old releases check no rights in there (GHSA-rfx7)."""
    etcd.etcdctl("role", "revoke-permission", "--prefix=true", "app", "/app/")
    etcd.etcdctl("role", "grant-permission", "--prefix=true", "app", "read", "/app/")
    etcd.etcdctl("role", "grant-permission", "--prefix=true", "app", "readwrite", "/app/in/")
    allow(etcd, "read")
    sh(owner.path, f"mkdir -p in/open in/closed out; touch $(seq -f in/open/%g {MANY})")
    sh(owner.path, f"umask 077; cd in/closed; touch $(seq {MANY})")
    with mounted_as_app(pool, etcd, "--cache") as mounted:
        mounted.expect_log("permission denied", "attributes cannot be written")

        def move(name: str, to: str) -> str | None:
            mounted.wait(int(os.getxattr(owner.path / "in", "user.etcd.mod_revision")))
            before = everything(etcd)
            failed = errno_of(partial(os.rename, mounted.path / name, mounted.path / to))
            gone = sum(key.startswith(f"/app/{name}/") for key in everything(etcd))
            assert gone == (MANY + 1 if failed else 0), "half of it has moved"
            assert not failed or everything(etcd) == before
            return failed

        assert move("in/closed", "in/elsewhere") == "EACCES", "its attributes would be lost"
        assert move("in/open", "in/moved") is None
        assert move("in/moved", "out/moved") == (None if is_old(etcd) else "EACCES")


@pytest.mark.parametrize("noticed_by", ["--cache", "--cache --audit-interval=1", "--no-cache"])
def test_b119_a_changed_password_takes_no_attributes_away(
    pool: Pool, etcd: EtcdProcess, owner: Mounted, tmp_path: Path, noticed_by: str
) -> None:
    """Of those who come before the password file has it, all are refused, and nothing is open."""
    allow(etcd, "readwrite")
    password = tmp_path / "password"
    password.write_text("secret")
    make(owner, "one", 0o600)
    options = (*noticed_by.split(), f"--password-file={password}")
    with pool.private(etcd, *options, "--prefix=/app", "--user=app") as mounted:
        mounted.expect_log("is not let in", "permission", "denied", "nothing is shown")
        assert mode_of(mounted.path / "one") == 0o600
        etcd.etcdctl("user", "passwd", "--interactive=false", "app", stdin=b"new\n")
        make(owner, "during", 0o600)
        if "audit" in noticed_by:
            until(lambda: errno_of(partial(os.stat, mounted.path / "one")) == "EACCES")
        else:
            assert errno_of((mounted.path / "own").touch) == "EACCES"
        password.write_text("new")
        until(lambda: errno_of((mounted.path / "own").touch) is None)
        mounted.wait(make(owner, "after", 0o600))
        until(lambda: errno_of(partial(os.stat, mounted.path / "after")) is None)
        assert modes_of(mounted.path, "one", "during", "after") == [0o600] * 3
        (mounted.path / "own").chmod(0o600)
        found = mounted.statistics()["attributes"]
        assert (found["readable"], found["writable"], found["closings"]) == (True, True, 0)
