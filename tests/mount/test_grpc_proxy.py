"""Mounts behind etcd's own proxy: the member has one client, however many there are."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.mount.lab import MODES
from tests.support.etcd_process import EtcdProcess
from tests.support.grpc_proxy import grpc_proxy
from tests.support.mounted import Mounted

pytestmark = [pytest.mark.fuse, pytest.mark.etcd]

MOUNTS = 3


@pytest.fixture
def proxy(etcd_binary: Path, own_etcd: EtcdProcess) -> Iterator[str]:
    with grpc_proxy(etcd_binary, own_etcd) as url:
        yield url


def connections(etcd: EtcdProcess) -> int:
    """Return how many sockets of clients the member has open."""
    sockets = 0
    for fd in Path(f"/proc/{etcd.pid}/fd").iterdir():
        sockets += os.readlink(fd).startswith("socket:")
    return sockets


def test_mounts_behind_a_proxy_are_one_client_of_the_member(
    own_etcd: EtcdProcess, proxy: str
) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(Mounted(own_etcd, "--cache", via=proxy))
        alone = connections(own_etcd)
        others = (Mounted(own_etcd, "--cache", via=proxy) for _ in range(MOUNTS - 1))
        mounts = [first, *map(stack.enter_context, others)]
        assert connections(own_etcd) == alone
        for number, mounted in enumerate(mounts):
            (mounted.path / f"of-{number}").write_text(str(number))
        revision = mounts[0].put("/last", "value")
        for mounted in mounts:
            mounted.wait(revision)
            names = {path.name for path in mounted.path.iterdir()}
            assert names == {"last", *(f"of-{number}" for number in range(MOUNTS))}
            assert (mounted.path / "last").read_text() == "value"


@pytest.mark.parametrize("mode", MODES)
def test_everything_else_works_through_a_proxy(
    own_etcd: EtcdProcess, proxy: str, mode: str
) -> None:
    with Mounted(own_etcd, mode, via=proxy) as mounted:
        directory = mounted.path / "d"
        directory.mkdir()
        with (directory / "log").open("a") as log:
            log.write("one\n")
        with (directory / "log").open("a") as log:
            log.write("two\n")
        (directory / "log").chmod(0o600)
        directory.rename(mounted.path / "e")
        moved = mounted.path / "e" / "log"
        assert moved.read_text() == "one\ntwo\n"
        assert moved.stat().st_mode & 0o777 == 0o600
        os.setxattr(moved, "user.etcd.ttl", b"1000")
        assert 0 < int(os.getxattr(moved, "user.etcd.ttl")) <= 1000
        mounted.delete("/e/log")
        assert not moved.exists()
