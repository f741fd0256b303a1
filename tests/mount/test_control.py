"""The control directory: what a mount says of itself, through a real kernel."""

import json
import mmap
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.mount.lab import MODES, Lab, Pool, sh
from tests.mount.posix.calls import errno_of, opened
from tests.mount.test_outages import eventually
from tests.support.etcd_process import EtcdProcess, free_port
from tests.support.mounted import Mounted, run_etcdfs
from tests.support.nobody import needs_root, run_as_nobody

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

NAMES = ["config", "metrics", "revision", "status"]


def revision(mounted: Mounted) -> int:
    return int((mounted.path / ".etcdfs/revision").read_bytes())


def test_b111_the_control_directory_is_there_and_in_no_listing(lab: Lab) -> None:
    root = lab.mounted.path
    assert ".etcdfs" not in os.listdir(root)
    assert sh(root, "find . -maxdepth 1 -name .etcdfs") == ""
    assert sorted(os.listdir(root / ".etcdfs")) == NAMES
    assert sh(root, "cat .etcdfs/* | wc -c") != "0\n"
    assert sh(root / ".etcdfs", "ls -la . .. && getfattr -d . status") != ""
    status = json.loads((root / ".etcdfs/status").read_bytes())
    assert status.keys() == lab.mounted.statistics().keys()
    assert status["mount"]["mountpoint"] == str(root)
    config = json.loads((root / ".etcdfs/config").read_bytes())
    assert config["cache"] == (status["mount"]["mode"] == "cache")
    metrics = (root / ".etcdfs/metrics").read_text()
    assert {f.name for f in text_string_to_metric_families(metrics)} > {"etcdfs_mount_info"}


def test_b111_each_open_makes_it_anew(lab: Lab) -> None:
    lab.put("file", b"1")
    before = lab.mounted.statistics()["requests"]["getattr"]
    with (lab.mounted.path / ".etcdfs/revision").open("rb", buffering=0) as file:
        shown = int(file.read())
        lab.path.joinpath("made").write_bytes(b"x")
        file.seek(0)
        assert int(file.read()) == shown, "what is open is of one moment"
    assert revision(lab.mounted) > shown
    if lab.mounted.statistics().get("mirror"):
        assert revision(lab.mounted) == lab.mounted.statistics()["mirror"]["revision"]
    os.stat(lab.mounted.path / ".etcdfs/status")
    assert lab.mounted.statistics()["requests"]["getattr"] > before


def test_b111_a_file_is_all_of_its_size_and_stays_as_it_was(lab: Lab) -> None:
    control = lab.mounted.path / ".etcdfs"
    assert int(sh(control, "wc -c <status")) > 1000
    assert json.loads(sh(control, "tail -c +1 status"))
    with opened(control / "status", os.O_RDONLY) as fd:
        shown = os.pread(fd, 1 << 20, 0)
        assert os.fstat(fd).st_size == len(shown)
        with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as mapped:
            lab.put("file", b"1")
            revision(lab.mounted)
            os.listdir(control)
            assert mapped[:] == shown == os.pread(fd, 1 << 20, 0)


def test_b111_nothing_can_be_made_or_changed_in_it(lab: Lab) -> None:
    control = lab.mounted.path / ".etcdfs"
    file = lab.path / "file"
    file.write_bytes(b"x")
    calls: list[Callable[[], object]] = [
        lambda: (control / "new").write_bytes(b""),
        lambda: (control / "status").write_bytes(b""),
        (control / "new").mkdir,
        lambda: (control / "new").symlink_to("x"),
        (control / "status").unlink,
        lambda: (control / "status").rename(lab.path / "away"),
        lambda: (control / "status").chmod(0o777),
        lambda: file.rename(control / "file"),
        lambda: os.link(file, control / "file"),
        lambda: os.setxattr(control / "status", "user.x", b"1"),
        lambda: os.truncate(control / "status", 0),
        control.rmdir,
        lambda: control.rename(lab.path / "away"),
        lambda: lab.path.rename(control),
    ]
    for call in calls:
        assert errno_of(call) == "EPERM"
    assert errno_of(control.mkdir) == "EEXIST"
    assert sorted(os.listdir(control)) == NAMES
    assert lab.own_keys() == [b"file"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("option", [[], ["--no-control-dir"]])
def test_b111_a_key_of_that_name_wins_nothing(
    pool: Pool, own_etcd: EtcdProcess, mode: str, option: list[str]
) -> None:
    own_etcd.etcdctl("put", "/app/.etcdfs/status", "a key")
    with pool.private(own_etcd, mode, "--prefix", "/app", *option) as mounted:
        assert os.listdir(mounted.path) == ["%=.etcdfs"]
        assert (mounted.path / "%=.etcdfs/status").read_bytes() == b"a key"
        control = mounted.path / ".etcdfs"
        assert control.exists() == (not option)
        if option:
            assert errno_of(control.mkdir) == "EPERM"
        else:
            assert json.loads((control / "status").read_bytes())["mount"]["prefix"] == "/app/"


@pytest.mark.parametrize("mode", MODES)
def test_b111_it_answers_while_etcd_does_not(pool: Pool, own_etcd: EtcdProcess, mode: str) -> None:
    options = ("--max-stale", "0.1", "--timeout", "0.5", "--watch-timeout", "0.3")
    with pool.private(own_etcd, mode, *options) as mounted:
        mounted.expect_log("")
        last = mounted.put("/file", "x")
        (mounted.path / "file").read_bytes()
        own_etcd.pause()
        # Without a cache, nobody notices but who asks.
        eventually(lambda: errno_of((mounted.path / "file").read_bytes) in {"EIO", "ETIMEDOUT"})
        status = json.loads((mounted.path / ".etcdfs/status").read_bytes())
        assert status["log"]["warnings"] > 0
        assert status["log"]["last_problem"]
        if mode == "--cache":
            assert not status["staleness"]["connected"]
            assert "not been heard" in status["staleness"]["refused"]
            assert "etcdfs_reads_suspended 1.0" in (mounted.path / ".etcdfs/metrics").read_text()
        assert revision(mounted) == last
        assert json.loads((mounted.path / ".etcdfs/config").read_bytes())["max_stale_s"] == 0.1
        own_etcd.resume()


@pytest.fixture
def shared(pool: Pool, own_etcd: EtcdProcess) -> Iterator[Path]:
    """Yield a mount that other users are let into."""
    with pool.private(own_etcd, "--cache", "--allow-other") as mounted:
        mounted.path.parent.chmod(0o755)
        mounted.put("/file", "for all")
        yield mounted.path


@needs_root
def test_b112_only_who_mounted_and_root_are_told(shared: Path) -> None:
    said = run_as_nobody(
        """
root = sys.argv[1]
print(open(f"{root}/file").read())
for attempt in (
    lambda: os.listdir(f"{root}/.etcdfs"),
    lambda: open(f"{root}/.etcdfs/status").read(),
    lambda: os.getxattr(root, "user.etcdfs.statistics"),
):
    try:
        print(attempt())
    except PermissionError as exc:
        print("refused")
print(os.getxattr(root, "user.etcdfs.wait.1").decode())
""",
        str(shared),
    )
    assert said.split("\n") == ["for all", "refused", "refused", "refused", "1", ""]
    assert json.loads((shared / ".etcdfs/status").read_bytes())["mirror"]["revision"] > 1
    assert os.getxattr(shared, "user.etcdfs.statistics")


@pytest.mark.parametrize("mode", MODES)
def test_b113_metrics_and_health_by_http(pool: Pool, own_etcd: EtcdProcess, mode: str) -> None:
    port = free_port()
    options = ("--max-stale", "0.1", "--timeout", "0.5", "--watch-timeout", "0.3")
    listen = ("--metrics-listen", str(port))
    with pool.private(own_etcd, mode, *options, *listen) as mounted:
        mounted.expect_log("")
        assert (mounted.path / ".etcdfs/metrics").exists()
        status, metrics = fetched(port, "metrics")
        assert status == 200
        assert f'mountpoint="{mounted.path}"' in metrics
        eventually(lambda: fetched(port, "healthz")[0] == 200)  # a busy machine is late, too
        own_etcd.pause()
        if mode == "--cache":
            eventually(lambda: fetched(port, "healthz")[0] == 503)
            assert "nothing is shown" in fetched(port, "healthz")[1]
            own_etcd.resume()
            eventually(lambda: fetched(port, "healthz")[0] == 200)
        else:
            assert fetched(port, "healthz")[0] == 200
            own_etcd.resume()


def test_an_address_that_is_taken_is_a_status_and_no_mount(
    own_etcd: EtcdProcess, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        endpoints = ("--endpoints", own_etcd.client_url)
        done = run_etcdfs("mount", str(tmp_path), *endpoints, "--metrics-listen", str(port))
    assert done.returncode == 62
    assert f"nobody can listen on 127.0.0.1:{port}: Address already in use" in done.stderr
    assert not os.path.ismount(tmp_path)


def fetched(port: int, page: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.read().decode()
