"""The POSIX suite: every test is a function of a directory, and runs in three of them.

Fixtures:
    place: A fresh directory on tmpfs, in a cached and in an uncached mount, in turn. Other users
        are let in (`--allow-other`) when the tests run as root.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.lab import MODES, Pool, memory_directory


@pytest.fixture(params=("tmpfs", *MODES))
def place(
    request: pytest.FixtureRequest, pool: Pool, etcd_binary: Path, watched: None
) -> Iterator[Path]:
    if request.param == "tmpfs":
        with memory_directory() as directory:
            yield directory
        return
    shared = ("--allow-other",) if os.geteuid() == 0 else ()
    mounted = pool.mounted(etcd_binary, request.param, *shared)
    with pool.lab(pool.etcd(etcd_binary), mounted) as lab:
        yield lab.path
