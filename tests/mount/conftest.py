"""Mounts for tests: shared ones, one directory of keys for each test.

Fixtures:
    place: A fresh directory on tmpfs, in a cached and in an uncached mount, in turn: for tests
        that are functions of a path. That they pass on tmpfs, too, keeps them honest.
    lab: A fresh directory in a cached and in an uncached mount, in turn, with its etcd.
    cached: The same, in a cached mount only.
    other: A second cached mount of the same etcd.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.lab import LONG_S, MODES, PATIENCE_S, Lab, Pool, memory_directory
from tests.support.etcd_process import EtcdProcess


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture
def watched(request: pytest.FixtureRequest, pool: Pool) -> Iterator[None]:
    many_calls = request.node.get_closest_marker("many_calls") is not None
    with pool.watched(LONG_S if many_calls else PATIENCE_S):
        yield


@pytest.fixture
def shared_etcd(pool: Pool, etcd_binary: Path, watched: None) -> EtcdProcess:
    return pool.etcd(etcd_binary)


@pytest.fixture
def own_etcd(etcd_binary: Path, watched: None) -> Iterator[EtcdProcess]:
    with EtcdProcess(etcd_binary) as etcd:
        yield etcd


@pytest.fixture(params=("tmpfs", *MODES))
def place(
    request: pytest.FixtureRequest, pool: Pool, etcd_binary: Path, watched: None
) -> Iterator[Path]:
    if request.param == "tmpfs":
        with memory_directory() as directory:
            yield directory
        return
    mounted = pool.mounted(etcd_binary, request.param)
    with pool.lab(pool.etcd(etcd_binary), mounted) as lab:
        yield lab.path


@pytest.fixture(params=MODES)
def lab(
    request: pytest.FixtureRequest, pool: Pool, etcd_binary: Path, watched: None
) -> Iterator[Lab]:
    mounted = pool.mounted(etcd_binary, request.param)
    with pool.lab(pool.etcd(etcd_binary), mounted) as lab:
        yield lab


@pytest.fixture
def cached(pool: Pool, etcd_binary: Path, watched: None) -> Iterator[Lab]:
    mounted = pool.mounted(etcd_binary, "--cache")
    with pool.lab(pool.etcd(etcd_binary), mounted) as lab:
        yield lab


@pytest.fixture
def other(pool: Pool, etcd_binary: Path, cached: Lab) -> Lab:
    """Return the same directory as `cached`'s in a second mount."""
    mounted = pool.mounted(etcd_binary, "--cache", "--log-level", "info")
    mounted.wait(cached.client.revision())
    path = mounted.path / cached.path.name
    return Lab(cached.etcd, cached.client, mounted, path, cached.prefix)
