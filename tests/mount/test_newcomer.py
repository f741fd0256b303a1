"""From nothing to a mount in fstab of a cluster with TLS and passwords, by the manual pages alone.

Each line that a newcomer would copy is taken from the pages. The machine has a network of its own,
in which the three members have the names and the port that the pages use.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.nobody import needs_root
from tests.support.private_root import PrivateRoot
from tests.support.secured import Authority

pytestmark = [pytest.mark.fuse, pytest.mark.etcd, needs_root, pytest.mark.programs("ip")]

MEMBERS = "abc"
PASSWORD = "a word with spaces"
ETCDFS = str(Path(sys.executable).with_name("etcdfs"))
PAGE = (Path(__file__).parents[2] / "docs/man/mount.etcdfs.md").read_text()
FSTAB, SERVICE = re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


class Site:
    """The machine, and on it the cluster."""

    def __init__(self, machine: PrivateRoot, binary: Path, home: Path) -> None:
        self._machine = machine
        self._binary = binary
        self._home = home
        self._members: dict[str, subprocess.Popen[bytes]] = {}
        authority = Authority(home / "authority")
        self._cacert = authority.cacert
        self._cert, self._key = authority.issue("member", *MEMBERS)
        hosts = "\n".join(f"10.77.0.{n} {name}" for n, name in enumerate(MEMBERS, 1))
        self.run(
            """
            for n in 1 2 3; do ip addr add 10.77.0.$n/32 dev lo; done
            echo "$1" >>/etc/hosts
            """,
            hosts,
        )
        for name in MEMBERS:
            self.start(name)

    def start(self, name: str) -> None:
        cluster = ",".join(f"{other}=http://{other}:2380" for other in MEMBERS)
        number = MEMBERS.index(name) + 1
        self._members[name] = subprocess.Popen(
            self._machine.command(
                str(self._binary),
                f"--name={name}",
                f"--data-dir={self._home / name}",
                f"--cert-file={self._cert}",
                f"--key-file={self._key}",
                f"--listen-client-urls=https://10.77.0.{number}:2379",
                f"--advertise-client-urls=https://{name}:2379",
                f"--listen-peer-urls=http://10.77.0.{number}:2380",
                f"--initial-advertise-peer-urls=http://{name}:2380",
                f"--initial-cluster={cluster}",
            ),
            stderr=subprocess.DEVNULL,
        )

    def stop(self, name: str) -> None:
        process = self._members.pop(name)
        process.terminate()
        process.wait()

    def close(self) -> None:
        for name in list(self._members):
            self.stop(name)

    def run(self, script: str, *arguments: str) -> str:
        return self._machine.run(script, *arguments)

    def etcdctl(self, *arguments: str, user: str = "") -> str:
        """Ask the members; the first question waits until they have found one another."""
        endpoints = ",".join(f"https://{name}:2379" for name in self._members)
        options = [f"--endpoints={endpoints}", f"--cacert={self._cacert}", "--dial-timeout=30s"]
        options += ["--command-timeout=30s", *([f"--user={user}"] if user else [])]
        return self.run('ETCDCTL_API=3 etcdctl "$@"', *options, *arguments)


@pytest.fixture
def site(etcd_binary: Path, tmp_path: Path) -> Iterator[Site]:
    with PrivateRoot(network=True) as machine:
        site = Site(machine, etcd_binary, tmp_path)
        try:
            yield site
        finally:
            site.close()


def test_a_newcomer_mounts_a_secured_cluster_in_fstab(site: Site, tmp_path: Path) -> None:
    for command in (
        ("put", "--", "/app/before", "value"),
        ("user", "add", "root:root"),
        ("user", "grant-role", "root", "root"),
        ("user", "add", f"app:{PASSWORD}"),
        ("role", "add", "app"),
        ("role", "grant-permission", "--prefix=true", "app", "readwrite", "/app/"),
        ("role", "grant-permission", "--prefix=true", "app", "readwrite", "/.etcdfs/"),
        ("user", "grant-role", "app", "app"),
        ("auth", "enable"),
    ):
        site.etcdctl(*command)
    site.run(
        """
        "$1" install-helper
        mkdir -p /mnt/etcd /etc/etcdfs
        cp "$2" /etc/etcdfs/ca.pem
        (umask 077; echo "$3" >/etc/etcdfs/password)
        """,
        ETCDFS,
        str(tmp_path / "authority" / "ca.pem"),
        PASSWORD,
    )

    # Mounted at boot, by the line of the page, as it is.
    site.run('printf "%s" "$1" >>/etc/fstab; mount -a; mount -a', FSTAB)
    assert site.run("findmnt -no SOURCE /mnt/etcd") == f"{FSTAB.split()[0]}\n"
    assert site.run("cat /mnt/etcd/before; echo after >/mnt/etcd/after") == "value"
    got = site.etcdctl("get", "--print-value-only", "/app/after", user="root:root")
    assert got == "after\n\n"
    site.stop("a")
    site.run("echo again >/mnt/etcd/after; sync /mnt/etcd/after; umount /mnt/etcd")
    got = site.etcdctl("get", "--print-value-only", "/app/after", user="root:root")
    assert got == "again\n\n"

    # As a service, with the file of the page; there is no systemd here to read it.
    options = re.findall(r"^(ETCDFS_\w+)=(.*)$", SERVICE, re.MULTILINE)
    assert [name for name, _ in options][:2] == ["ETCDFS_ENDPOINTS", "ETCDFS_PREFIX"]
    variables = [f"{name}={value}" for name, value in options]
    site.run('env "$@" mount /mnt/etcd', *variables, "ETCDFS_CACHE=true", ETCDFS)
    assert site.run('cat /mnt/etcd/after; "$1" umount /mnt/etcd', ETCDFS) == "again\n"
