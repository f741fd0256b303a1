"""What a mount keeps after its work: nothing."""

import contextlib
import os
from pathlib import Path

import pytest
from aetcd import rpc

from tests.mount.client import Client
from tests.mount.lab import Pool
from tests.mount.load import kv
from tests.mount.test_outages import eventually
from tests.support.churn import CENSUS_DIRECTORY, CENSUS_VARIABLE, Census, churn
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

WARM_UP = 2
DEADLINES = 1100
MOMENT = 300  # objects; each round makes thousands
UNPUBLISHED_SIZE = 1_500_000
SHARE = 64 << 20  # of `--write-buffer`, for one user
LAST = 16  # dentries of the last changes: as many after 40 rounds as after 10
INODES = 2  # the root, and the directory that all rounds are in


@pytest.mark.parametrize(("mode", "rounds"), [("--cache", 10), ("--no-cache", 3)])
def test_b110_what_is_gone_leaves_nothing_in_the_daemon(
    pool: Pool,
    own_etcd: EtcdProcess,
    mode: str,
    rounds: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(CENSUS_DIRECTORY)
    monkeypatch.setenv(CENSUS_VARIABLE, str(tmp_path / "census"))
    # Coverage keeps a tracer for each thread that ever was, and gRPC's come and go.
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
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
    # Bounded by itself: the table of missing names, the values in memory, times of revisions.
    bounded = (
        "Tree._negatives",
        "RevisionTimes._runs",
        "Times._kept",
        "Applier._past",
        "ValueCache.",
        "Operations.requests",
        "KernelCache._stir",  # one task, which waits there or looks
        "_ReadLock._waiting",  # the tasks that wait for requests, of which pyfuse3 has a number
    )
    tables = after["tables"] - before["tables"]
    assert {name: n for name, n in tables.items() if not name.startswith(bounded)} == {}
    types = after["types"] - before["types"]
    dentries = types.pop("etcdfs.tree.inodes.Dentry", 0) - tables["Tree._negatives"]
    assert dentries <= LAST, "those of the last changes, however many rounds there were"
    assert types.pop("etcdfs.keyspace.revision_times.Run", 0) <= tables["RevisionTimes._runs"]
    # trio keeps up to a thousand deadlines that are past, each a scope in a tuple.
    for of_deadlines in ("trio.CancelScope", "builtins.tuple"):
        assert types.pop(of_deadlines, 0) < DEADLINES
    # Libraries hold some things of the last moment's work.
    assert {name: n for name, n in types.items() if name.startswith("etcdfs")} == {}
    assert types.total() < MOMENT


MIB = 1 << 20


def peak(mounted: Mounted) -> int:
    """Return the most memory that a daemon has had, in bytes."""
    lines = Path(f"/proc/{mounted.daemon}/status").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(found.split()[1]) * 1024


def test_b49_values_that_are_not_kept_take_no_memory_while_they_are_listed(
    pool: Pool, own_etcd: EtcdProcess
) -> None:
    options = ("--cache", "--cache-size", "1M")
    with pool.private(own_etcd, *options) as mounted:
        empty = peak(mounted)
    with kv(own_etcd) as etcd:
        for n in range(150):  # small ones first, so that much is asked for at a time
            etcd.Put(rpc.PutRequest(key=b"/a%03d" % n, value=b"small"))
        for n in range(160):
            etcd.Put(rpc.PutRequest(key=b"/b%03d" % n, value=bytes(1_400_000)))
    with pool.private(own_etcd, *options) as mounted:
        full = peak(mounted)
        assert len((mounted.path / "b159").read_bytes()) == 1_400_000
    assert full - empty < 160 * MIB, f"{(full - empty) // MIB} MiB for 213 MiB of values"


def test_b18_unpublished_files_take_only_so_much_memory(pool: Pool, own_etcd: EtcdProcess) -> None:
    with pool.private(own_etcd, "--cache", "--cache-size", "1M") as mounted:
        before = resident(mounted)
        with contextlib.ExitStack() as stack:
            fd, size = -1, UNPUBLISHED_SIZE
            while size == UNPUBLISHED_SIZE:
                name = str(mounted.statistics()["open_files"])
                fd = os.open(mounted.path / name, os.O_WRONLY | os.O_CREAT)
                stack.callback(os.close, fd)
                size = os.write(fd, bytes(UNPUBLISHED_SIZE))
            with pytest.raises(OSError, match="quota"):
                os.write(fd, bytes(UNPUBLISHED_SIZE - size))
            held = mounted.statistics()["write_buffer"]
            assert SHARE - UNPUBLISHED_SIZE < held["size"] <= SHARE
            assert resident(mounted) - before < 2 * SHARE
            os.ftruncate(fd, 0)  # or its close would say that half of it is missing
        eventually(lambda: mounted.statistics()["write_buffer"]["files"] == 0)
        assert resident(mounted) - before < SHARE // 4


def resident(mounted: Mounted) -> int:
    """Return the bytes of memory that a daemon has."""
    lines = Path("/proc", str(mounted.daemon), "status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))
