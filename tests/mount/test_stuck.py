"""What one user does to a mount must not stop the others: directories whose lock is not let go."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from etcdfs.process.mountpoint import find_mounted
from etcdfs.process.processes import find_daemon
from tests.mount.lab import MODES, Pool
from tests.support.churn import until
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted
from tests.support.stuck_reader import StuckReader

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

STUCK = "the kernel may go on showing what is old"
LEFT = "a thread waits in the kernel"
SHARED = ("--allow-other",) if os.geteuid() == 0 else ()


@contextlib.contextmanager
def shared(pool: Pool, etcd: EtcdProcess, mode: str) -> Iterator[Mounted]:
    """Yield a mount that everybody may use."""
    with pool.private(etcd, mode, *SHARED) as mounted:
        mounted.path.parent.chmod(0o711)
        yield mounted


def read(mounted: Mounted, *names: str) -> list[bytes]:
    return [(mounted.path / name).read_bytes() for name in names]


def stale_s(mounted: Mounted) -> Any:
    return mounted.statistics()["staleness"]["stale_s"]


def is_in_its_place(mounted: Mounted) -> bool:
    return find_mounted(str(mounted.path)) is not None


@pytest.mark.parametrize("mode", MODES)
def test_b107_a_directory_that_is_held_stops_no_other(
    own_etcd: EtcdProcess, pool: Pool, mode: str
) -> None:
    with shared(pool, own_etcd, mode) as mounted:
        for name in ("held/f", "held/gone", "d/f"):
            mounted.put(f"/{name}", b"1")
        assert read(mounted, "held/f", "held/gone", "d/f") == [b"1", b"1", b"1"]
        with StuckReader(mounted.path / "held") as reader:
            mounted.expect_log(STUCK)
            mounted.delete("/held/gone")  # a name goes under its directory's lock only
            mounted.put("/held/f", b"2")
            for value in (b"2", b"3", b"4"):
                mounted.put("/d/f", value)
                assert read(mounted, "d/f") == [value]
            (mounted.path / "d/mine").write_bytes(b"5")
            assert read(mounted, "d/mine") == [b"5"]
            if mode == "--cache":
                assert stale_s(mounted) >= 1
                assert mounted.statistics()["kernel"]["stuck"] == 1
                assert "directory b'held' (inode" in mounted.log
                assert mounted.log.count(STUCK) == 1
            reader.invalidate()
        (mounted.path / "held/mine").touch()  # waits for the lock behind whoever waits already
        assert not (mounted.path / "held/gone").exists()
        assert read(mounted, "held/f") == [b"2"]
        if mode == "--cache":
            until(lambda: stale_s(mounted) == 0)
            assert mounted.statistics()["kernel"]["stuck"] == 0
            mounted.put("/held/f", b"3")
            assert read(mounted, "held/f") == [b"3"]
            with mounted.counting() as counted:
                assert read(mounted, "held/f", "held/f") == [b"3", b"3"]
            assert not counted["lookup"], "it is cached again"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can free those who wait in a mount")
def test_b108_a_daemon_ends_although_a_directory_is_held(own_etcd: EtcdProcess, pool: Pool) -> None:
    with shared(pool, own_etcd, "--cache") as mounted:
        mounted.expect_log(STUCK, LEFT, "has not let go of a lock")
        mounted.put("/held/f", b"1")
        mounted.put("/held/gone", b"1")
        assert read(mounted, "held/f", "held/gone") == [b"1", b"1"]
        inside = os.open(mounted.path, os.O_PATH)
        try:
            with StuckReader(mounted.path / "held"):
                mounted.delete("/held/gone")
                mounted.put("/held/f", b"2")
                (mounted.path / "mine").write_bytes(b"3")
                daemon = mounted.daemon
                os.kill(daemon, signal.SIGTERM)
                until(lambda: not is_in_its_place(mounted))
                until(lambda: find_daemon(str(mounted.path)) is None)
                assert LEFT in mounted.log
                with pytest.raises(OSError, match="not connected"):
                    os.stat("held", dir_fd=inside)
                # Nothing that it had is still in the way.
                again = Mounted(own_etcd, "--cache")
                with again:
                    assert read(again, "held/f", "mine") == [b"2", b"3"]
        finally:
            os.close(inside)
        until(lambda: not os.path.exists(f"/proc/{daemon}"))
