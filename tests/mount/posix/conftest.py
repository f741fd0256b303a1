"""The POSIX suite: every test is a function of a directory, and runs in three of them.

Fixtures:
    place: A fresh directory on tmpfs, in a cached and in an uncached mount, in turn. Other users
        are let in (`--allow-other`) when the tests run as root.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.mount.lab import MODES, Pool, memory_directory

PENDING: Final = {
    "test_a_directory_is_renamed": "directories are not renamed yet",
    "test_a_directory_moves_to_another": "directories are not renamed yet",
    "test_two_names_are_exchanged": "RENAME_EXCHANGE is not there yet",
    "test_calls_that_cannot_be[rename]": "directories are not renamed yet",
    "test_chmod": "attributes do not follow a rename yet",
    "test_utimens": "with --no-cache, utimensat of an unpublished write is lost",
    "test_who_makes_it_owns_it": "attributes do not follow a rename yet",
    "test_a_sticky_directory": "attributes do not follow a rename yet",
}
"""What does not work in a mount yet, and why. Empty when the issue is done."""


@pytest.fixture(params=("tmpfs", *MODES))
def place(
    request: pytest.FixtureRequest, pool: Pool, etcd_binary: Path, watched: None
) -> Iterator[Path]:
    if request.param == "tmpfs":
        with memory_directory() as directory:
            yield directory
        return
    name = request.node.name.replace(f"{request.param}-", "")
    for pending in (name, name.split("[")[0]):
        if pending in PENDING:
            request.applymarker(pytest.mark.xfail(reason=PENDING[pending], strict=False))
    shared = ("--allow-other",) if os.geteuid() == 0 else ()
    mounted = pool.mounted(etcd_binary, request.param, *shared)
    with pool.lab(pool.etcd(etcd_binary), mounted) as lab:
        yield lab.path
