"""Mounts of several members, by TLS, and as a user (docs/operations.md, "Connecting")."""

import errno
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.mount.lab import MODES, Pool, sh
from tests.support.cluster import Cluster
from tests.support.etcd_process import EtcdProcess, find_etcds
from tests.support.mounted import Mounted, run_etcdfs
from tests.support.secured import (
    Authority,
    add_user,
    short_tokens,
    switch_users_on,
)

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

FAILOVER = ("trying again", "flush: ")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def tls(authority: Authority) -> dict[str, str]:
    """Return the environment that etcdctl would have."""
    return {
        "ETCDCTL_CACERT": str(authority.cacert),
        "ETCDCTL_CERT": str(authority.home / "client.pem"),
        "ETCDCTL_KEY": str(authority.home / "client.key"),
    }


@pytest.fixture(scope="module")
def guarded(authority: Authority) -> Iterator[EtcdProcess]:
    """An etcd with TLS both ways, and with users who have /app/ alone."""
    *_, binary = find_etcds().values()
    with EtcdProcess(binary, *short_tokens(), secured=authority.secured(ask_clients=True)) as etcd:
        add_user(etcd, "app", "top secret", ("readwrite", b"/app/"))
        add_user(etcd, "reader", "dull secret", ("read", b"/app/"))
        add_user(etcd, "changing", "top secret", ("readwrite", b"/app/"))
        switch_users_on(etcd)
        yield etcd


@pytest.fixture
def secured(guarded: EtcdProcess, watched: None) -> EtcdProcess:
    """The same, with nothing in it but /app/a."""
    guarded.etcdctl("del", "--prefix", "/")
    guarded.etcdctl("put", "/app/a", "1")
    return guarded


@pytest.mark.parametrize("mode", MODES)
def test_b70_where_roles_do_not_reach_the_side_keys_content_works(
    pool: Pool, etcd_binary: Path, watched: None, mode: str
) -> None:
    """As etcd itself refuses it: nothing is kept or open, nobody is told else, and once is said."""
    with EtcdProcess(etcd_binary, "--bcrypt-cost=4") as etcd:
        add_user(etcd, "app", "secret", ("readwrite", b"/app/"))
        etcd.etcdctl("put", "/app/a", "1")
        etcd.etcdctl("put", "/.etcdfs/attrs//app/a", '{"mode":"0600"}')
        switch_users_on(etcd)
        with pool.private(etcd, mode, "--prefix=/app", "--user=app:secret") as mounted:
            mounted.expect_log("attributes cannot be")
            a = mounted.path / "a"
            assert (a.read_text(), a.stat().st_mode & 0o7777) == ("1", 0o600)

            def make_link() -> None:
                (mounted.path / "link").symlink_to("a")

            for change in (
                partial(a.chmod, 0o640),
                partial(os.chown, a, 1, 1),
                make_link,
                partial(os.mkfifo, mounted.path / "fifo"),
            ):
                with pytest.raises(PermissionError) as caught:
                    change()
                assert caught.value.errno == errno.EPERM
            with pytest.raises(OSError, match=os.strerror(errno.ENOTSUP)):
                os.setxattr(a, "user.x", b"1")
            sh(
                mounted.path,
                "echo 2 >a; echo 3 >>a; mkdir -p d/e; cp a d/e/; mv d f; rm f/e/a; rmdir f/e",
            )
            assert sorted(os.listdir(mounted.path)) == ["a", "f"]
            assert mounted.log.count("attributes cannot be read") == 1
            assert mounted.log.count("attributes cannot be written") == 1
        flags = (mode, "--prefix=/app", "--user=app:secret", "--no-attrs")
        with pool.private(etcd, *flags) as mounted:
            assert (mounted.path / "a").stat().st_mode & 0o7777 == 0o644
        assert etcd.etcdctl("get", "--print-value-only", "/app/a") == b"2\n3\n\n"
        found = etcd.etcdctl("get", "--keys-only", "--prefix", "/.etcdfs/")
        assert found.split() == [b"/.etcdfs/attrs//app/a"]


@pytest.mark.parametrize("mode", MODES)
def test_b116_a_user_may_mount_what_its_role_covers(
    secured: EtcdProcess, tls: dict[str, str], mode: str
) -> None:
    """Every call stays within the prefix, and no secret is in sight of others."""
    flags, said = ["--user=app:top secret"], dict[str, str]()
    if mode == "--cache":
        flags, said = [], {"ETCDCTL_USER": "app", "ETCDCTL_PASSWORD": "top secret"}
    with Mounted(
        secured,
        mode,
        "--prefix=/app",
        "--audit-interval=1",
        *flags,
        **said,
        **tls,
    ) as mounted:
        # Attributes are kept elsewhere, where its role does not reach.
        mounted.expect_log("attributes cannot be")
        assert (mounted.path / "a").read_text() == "1"
        sh(
            mounted.path,
            """
            echo x >f; echo y >>f; mkdir -p d/e; mv f d/f; [ "$(cat d/f)" = "x
y" ]
            mv d/f g; rmdir d/e d; rm g; [ "$(ls)" = a ]; df . >&2; stat . >&2
            """,
        )
        assert mounted.statistics()["store"]["transactions"]
        for file in ("cmdline", "environ"):
            shown = Path(f"/proc/{mounted.daemon}/{file}").read_bytes()
            assert b"secret" not in shown
        assert "secret" not in mounted.log


def test_b117_a_user_that_may_only_read(
    secured: EtcdProcess, tmp_path: Path, tls: dict[str, str]
) -> None:
    password = tmp_path / "password"
    password.write_text("dull secret\n")
    with Mounted(
        secured,
        "--no-cache",
        "--prefix=/app",
        "--user=reader",
        f"--password-file={password}",
        **tls,
    ) as mounted:
        assert (mounted.path / "a").read_text() == "1"
        mounted.expect_log("permission denied")
        for change in (
            lambda: (mounted.path / "a").write_text("2"),
            (mounted.path / "d").mkdir,
            (mounted.path / "a").unlink,
            lambda: (mounted.path / "a").rename(mounted.path / "b"),
        ):
            with pytest.raises(PermissionError):
                change()
        assert (mounted.path / "a").read_text() == "1"
        assert os.listdir(mounted.path) == ["a"]


def test_b119_a_changed_password_refuses_and_the_changed_file_lets_in_again(
    secured: EtcdProcess, tmp_path: Path, tls: dict[str, str]
) -> None:
    password = tmp_path / "password"
    password.write_text("top secret")
    with Mounted(
        secured,
        "--cache",
        "--prefix=/app",
        "--user=changing",
        f"--password-file={password}",
        **tls,
    ) as mounted:
        mounted.expect_log("is not let in", "permission", "denied")
        (mounted.path / "a").write_text("2")
        secured.etcdctl("user", "passwd", "--interactive=false", "changing", stdin=b"new\n")
        with pytest.raises(PermissionError):
            (mounted.path / "d").mkdir()
        password.write_text("new")
        (mounted.path / "a").write_text("4")
        assert (mounted.path / "a").read_text() == "4"
    assert secured.etcdctl("get", "--print-value-only", "/app/a") == b"4\n"


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"ETCDCTL_CACERT": "/nowhere"}, 23, "/nowhere: No such file or directory"),
        ({"ETCDCTL_CACERT": ""}, 23, "not trusted"),
        ({"ETCDCTL_USER": "app:wrong"}, 24, "the user 'app' is not let in"),
        ({"ETCDCTL_USER": ""}, 21, "permission denied"),
        ({"ETCDFS_PREFIX": "/other", "ETCDFS_CACHE": "1"}, 21, "permission denied"),
    ],
)
def test_b120_who_is_not_trusted_is_told_in_one_line(
    secured: EtcdProcess,
    tmp_path: Path,
    tls: dict[str, str],
    change: dict[str, str],
    code: int,
    said: str,
) -> None:
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    environment = {**tls, "ETCDCTL_USER": "app:top secret", "ETCDFS_PREFIX": "/app"}
    environment = {name: value for name, value in {**environment, **change}.items() if value}
    done = run_etcdfs("mount", str(mnt), "--endpoints", secured.client_url, **environment)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
    assert not os.path.ismount(mnt)


@pytest.mark.parametrize(
    ("mode", "how"), [("--cache", "kill"), ("--cache", "pause"), ("--no-cache", "pause")]
)
def test_b115_a_member_that_fails_is_replaced_by_another(
    etcd_binary: Path, watched: None, mode: str, how: str
) -> None:
    """A mount goes on through reads, writes and the watch, whichever member is lost."""
    with (
        Cluster(etcd_binary) as cluster,
        Mounted(cluster.members[0], mode, "--timeout=10", via=cluster.client_urls) as mounted,
    ):
        mounted.expect_log(*FAILOVER)
        (mounted.path / "a").write_text("1")
        lost, *others = cluster.members
        getattr(lost, how)()
        if mode == "--no-cache":
            assert (mounted.path / "a").read_text() == "1"
        try:
            (mounted.path / "a").write_text("2")
        except TimeoutError:  # the answer was lost: it is not written twice by itself
            (mounted.path / "a").write_text("2")
        assert (mounted.path / "a").read_text() == "2"
        found = json.loads(others[0].etcdctl("put", "/b", "foreign", "--write-out=json"))
        if mode == "--cache":
            mounted.wait(int(found["header"]["revision"]))
        assert (mounted.path / "b").read_text() == "foreign"
        lost.resume()
