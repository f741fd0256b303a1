"""Mounts for tests: shared ones, one directory of keys for each test.

Fixtures:
    place: A fresh directory on tmpfs, in a cached and in an uncached mount, in turn: for tests
        that are functions of a path. That they pass on tmpfs, too, keeps them honest.
    lab: A fresh directory in a cached and in an uncached mount, in turn, with its etcd.
    cached: The same, in a cached mount only.
    other: A second cached mount of the same etcd.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from etcdfs.fuse.procfs import sees_all_watches
from tests.mount.lab import LONG_S, MODES, PATIENCE_S, Lab, Pool, memory_directory
from tests.support.etcd_process import EtcdProcess
from tests.support.profile import NIGHTLY


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run what is for two releases of etcd and both modes in two of the four ways.

    By turns, so that over all tests each mode meets each release. At night all four run.
    """
    ways = {item: way for item in items if (way := _way(item)) is not None}
    releases = defaultdict(set)
    for way in ways.values():
        releases[way.test].add(way.release)
    left_out = {
        item
        for item, way in ways.items()
        if len(releases[way.test]) > 1 and (way.release + way.mode + len(way.test)) % 2
    }
    if left_out and not NIGHTLY:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


class _Way(NamedTuple):
    """One way to run a test: which release of etcd, which kind of mount."""

    test: str
    release: int
    mode: int


def _way(item: pytest.Item) -> _Way | None:
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return None
    release = item.callspec.indices.get("etcd_binary")
    modes = [index for index, mode in enumerate(MODES) if mode in item.callspec.params.values()]
    return None if release is None or not modes else _Way(item.originalname, release, modes[0])


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


def options_for(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Return the options that a test's marks ask for."""
    counts = request.node.get_closest_marker("counts_requests") is not None
    # In a container everybody may watch, so that every change raises events.
    asked = "--inotify" in os.environ.get("MOUNT_OPTIONS", "")
    raises_all = asked or not sees_all_watches(allow_other=False)
    return ("--inotify", "off") if counts and raises_all else ()


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
    mounted = pool.mounted(etcd_binary, request.param, *options_for(request))
    with pool.lab(pool.etcd(etcd_binary), mounted) as lab:
        yield lab


@pytest.fixture
def cached(
    request: pytest.FixtureRequest, pool: Pool, etcd_binary: Path, watched: None
) -> Iterator[Lab]:
    mounted = pool.mounted(etcd_binary, "--cache", *options_for(request))
    with pool.lab(pool.etcd(etcd_binary), mounted) as lab:
        yield lab


@pytest.fixture
def other(pool: Pool, etcd_binary: Path, cached: Lab) -> Lab:
    """Return the same directory as `cached`'s in a second mount."""
    mounted = pool.mounted(etcd_binary, "--cache", "--log-level", "info")
    mounted.wait(cached.client.revision())
    path = mounted.path / cached.path.name
    return Lab(cached.etcd, cached.client, mounted, path, cached.prefix)
