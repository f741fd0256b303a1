"""What a mount keeps after its work: nothing."""

import contextlib
from pathlib import Path

import pytest

from tests.mount.client import Client
from tests.mount.lab import Pool
from tests.support.churn import CENSUS_DIRECTORY, CENSUS_VARIABLE, Census, churn
from tests.support.etcd_process import EtcdProcess

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

WARM_UP = 2
DEADLINES = 1100
MOMENT = 300  # objects; each round makes thousands
INODES = 2  # the root, and the directory that all rounds are in


@pytest.mark.parametrize(("mode", "rounds"), [("--cache", 10), ("--no-cache", 3)])
def test_b66_what_is_gone_leaves_nothing_in_the_daemon(
    pool: Pool,
    own_etcd: EtcdProcess,
    mode: str,
    rounds: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(CENSUS_DIRECTORY)
    monkeypatch.setenv(CENSUS_VARIABLE, str(tmp_path / "census"))
    with (
        pool.private(own_etcd, mode) as mounted,
        contextlib.closing(Client(own_etcd.endpoint)) as client,
    ):
        census = Census(mounted, tmp_path / "census")
        churn(mounted, client, WARM_UP)
        before = census.settled(INODES)
        churn(mounted, client, rounds, first=WARM_UP)
        after = census.settled(INODES)
    assert (after["fds"], after["open_files"]) == (before["fds"], 0)
    # Bounded by itself: the table of missing names, and the values in memory.
    bounded = (
        "Tree._negatives",
        "Times._kept",
        "Applier._past",
        "Contents.",
        "_CountingLru.",
        "Operations.requests",
    )
    tables = after["tables"] - before["tables"]
    assert {name: n for name, n in tables.items() if not name.startswith(bounded)} == {}
    types = after["types"] - before["types"]
    assert types.pop("etcdfs.cached.Entry", 0) <= tables["Tree._negatives"]
    # trio keeps up to a thousand deadlines that are past, each a scope in a tuple.
    for of_deadlines in ("trio.CancelScope", "builtins.tuple"):
        assert types.pop(of_deadlines, 0) < DEADLINES
    # Libraries hold some things of the last moment's work.
    assert {name: n for name, n in types.items() if name.startswith("etcdfs")} == {}
    assert types.total() < MOMENT
