"""A mount under load, in the small; `load` has the functions, which take any size."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness.bare import ETCD_ARGUMENTS
from tests.mount import load
from tests.mount.lab import Pool
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


def test_b31_a_burst_of_changes(etcd: EtcdProcess, mounted: Mounted) -> None:
    load.burst(etcd, mounted, keys=2000, rounds=3)


def test_b31_a_hot_key(etcd: EtcdProcess, mounted: Mounted) -> None:
    load.hot_key(etcd, mounted, updates=1500)


def test_b31_a_thousand_keys_in_one_revision(etcd: EtcdProcess, mounted: Mounted) -> None:
    load.large_transactions(etcd, mounted, keys=1000, times=3)


def test_b31_a_storm_of_readers(etcd: EtcdProcess, mounted: Mounted) -> None:
    load.reader_storm(etcd, mounted, processes=32, reads=40, updates=200)
