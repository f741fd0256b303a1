"""`etcdfs status`, on mounts that are well, hang, or are dead."""

import json
import os
import signal
import subprocess

import pytest

import etcdfs.cli.status
from etcdfs.cli.status import Answer, ask
from tests.mount.lab import Lab, Pool
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import COMMAND, run_etcdfs

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]


def test_it_says_how_a_mount_is(lab: Lab) -> None:
    root = str(lab.mounted.path)
    done = run_etcdfs("status", root)
    assert (done.returncode, done.stderr) == (0, "")
    assert root in done.stdout
    assert str(lab.etcd.endpoint) in done.stdout
    done = run_etcdfs("status", "--json", root)
    assert json.loads(done.stdout)["mount"]["mountpoint"] == root


def test_without_a_mountpoint_it_says_so_of_all(lab: Lab) -> None:
    done = run_etcdfs("status", "--json")  # others' mounts may not answer
    found = {one["mountpoint"]: one["status"] for one in json.loads(done.stdout)}
    assert found[str(lab.mounted.path)]["mount"]["pid"] == lab.mounted.daemon


def test_it_goes_on_until_it_is_interrupted(cached: Lab) -> None:
    command = [*COMMAND, "status", str(cached.mounted.path), "--json", "--watch"]
    with subprocess.Popen(
        [*command, "--interval", "0.1"], stdout=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout is not None
        ups = [json.loads(watching.stdout.readline())["mount"]["uptime_s"] for _ in range(3)]
        assert ups[0] < ups[1] < ups[2]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == 0


def test_a_mount_that_does_not_answer_is_not_waited_for(
    pool: Pool, own_etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pool.private(own_etcd, "--cache", "--no-control-dir") as mounted:
        path = str(mounted.path)
        (well,) = ask(path)
        assert well.status is not None
        monkeypatch.setattr(etcdfs.cli.status, "ANSWER_TIMEOUT_S", 0.3)
        os.kill(mounted.daemon, signal.SIGSTOP)
        try:
            assert ask(path) == [Answer(mountpoint=path, error="no answer within 0.3 s")]
        finally:
            os.kill(mounted.daemon, signal.SIGCONT)
        os.kill(mounted.daemon, signal.SIGKILL)
        done = run_etcdfs("status", path)
        assert done.returncode == 16
        assert done.stderr == f"etcdfs: {path}: its daemon is gone; etcdfs umount clears it\n"
        assert run_etcdfs("umount", path).returncode == 0
        done = run_etcdfs("status", path)
        assert (done.returncode, done.stderr) == (14, f"etcdfs: no etcdfs is mounted on {path}\n")
