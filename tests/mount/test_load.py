"""A mount under load, in the small; `load` has the functions, which take any size."""

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.bare import ETCD_ARGUMENTS
from tests.mount import load
from tests.mount.client import Client
from tests.mount.lab import Pool
from tests.mount.test_faults import daemon
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted

pytestmark = [pytest.mark.etcd, pytest.mark.fuse, pytest.mark.slow]


@pytest.fixture
def etcd(etcd_binary: Path, watched: None) -> Iterator[EtcdProcess]:
    with EtcdProcess(etcd_binary, *ETCD_ARGUMENTS) as etcd:
        yield etcd


@pytest.fixture
def mounted(pool: Pool, etcd: EtcdProcess) -> Iterator[Mounted]:
    with pool.private(etcd, "--cache") as mounted:
        yield mounted


def test_b50_a_burst_of_changes(etcd: EtcdProcess, mounted: Mounted) -> None:
    load.burst(etcd, mounted, keys=2000, rounds=3)


def test_b50_a_hot_key(etcd: EtcdProcess, mounted: Mounted) -> None:
    load.hot_key(etcd, mounted, updates=1500)


def test_b50_a_thousand_keys_in_one_revision(etcd: EtcdProcess, mounted: Mounted) -> None:
    load.large_transactions(etcd, mounted, keys=1000, times=3)


def test_b50_a_storm_of_readers(etcd: EtcdProcess, mounted: Mounted) -> None:
    load.reader_storm(etcd, mounted, processes=32, reads=40, updates=200)


_SLOW_KERNEL = """
import time
import pyfuse3
from etcdfs.daemon.main import main
for name in ("invalidate_entry", "invalidate_inode"):
    def slowly(*arguments, quick=getattr(pyfuse3, name), **named):
        time.sleep(0.02)
        return quick(*arguments, **named)
    setattr(pyfuse3, name, slowly)
"""


def test_b50_a_kernel_that_lets_go_slowly(etcd: EtcdProcess, watched: None) -> None:
    """What comes meanwhile is merged by key; others are answered; nothing old is shown after."""
    keys, rounds = 20, 100
    with (
        daemon(etcd, cache=True, program=_SLOW_KERNEL) as running,
        closing(Client(etcd.endpoint)) as client,
    ):

        def mirror() -> Any:
            return json.loads(os.getxattr(running.path, "user.etcdfs.statistics"))["mirror"]

        names = [b"/slow/%d" % n for n in range(keys)]
        shown(running.path, client.put_all([*((name, b"0") for name in names), (b"/other", b"x")]))
        files = [running.path / os.fsdecode(name[1:]) for name in names]
        before = mirror()
        revision = 0
        for number in range(1, rounds + 1):
            for file in files[:3]:
                file.read_bytes()  # the kernel knows them, and has to be told
            revision = client.put_all((name, b"%d" % number) for name in names)
            assert (running.path / "other").read_bytes() == b"x"
        shown(running.path, revision)
        assert [file.read_bytes() for file in files] == [b"%d" % rounds] * keys
        after = mirror()
        assert after["events"] - before["events"] == keys * rounds
        assert after["collapsed"] > before["collapsed"]


def shown(path: Path, revision: int) -> None:
    os.getxattr(path, f"user.etcdfs.wait.{revision}")
