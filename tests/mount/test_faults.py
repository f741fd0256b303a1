"""What becomes of a mount when etcd, the daemon or etcdfs itself fails."""

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from etcdfs.errors import UnpublishedError
from etcdfs.files.handles import STORE_MAX
from etcdfs.options import LogSettings, MountOptions
from etcdfs.process.startup_protocol import Handover, Ready, read_reports, send_handover
from tests.mount.client import Client
from tests.mount.lab import MODES, Lab, Pool, sh
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import run_etcdfs

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

_PATIENCE_S = 30.0
_MAIN = "from etcdfs.daemon.main import main"


@contextlib.contextmanager
def ended(pid: int) -> Iterator[None]:
    """Check that a process that is not our child ends during the body, or soon after."""
    pidfd = os.pidfd_open(pid)
    try:
        yield
        readable, _, _ = select.select([pidfd], [], [], _PATIENCE_S)
        assert readable, "the daemon did not end"
    finally:
        os.close(pidfd)


@dataclass(frozen=True)
class Daemon:
    """A daemon that is a child of ours, so that its exit code can be seen."""

    process: "subprocess.Popen[bytes]"
    path: Path
    log_file: Path


@contextlib.contextmanager
def daemon(
    etcd: EtcdProcess,
    *,
    cache: bool,
    program: str = _MAIN,
    **fields: Any,
) -> Iterator[Daemon]:
    """Start the daemon as `etcdfs mount` does, but from a Python program that may patch it.

    `fields` are further ones of `MountOptions`.
    """
    home = Path(tempfile.mkdtemp(prefix="etcdfs-test-daemon-"))
    path = home / "mnt"
    path.mkdir()
    options = MountOptions(mountpoint=str(path), endpoints=(etcd.endpoint,), cache=cache, **fields)
    settings = LogSettings(level="info", file=str(home / "log"))
    options_fd = send_handover(Handover(options=options, log=settings))
    status_read, status_write = os.pipe()
    code = f"import sys\n{program}\nsys.exit(main())"
    process = subprocess.Popen(
        [
            *(sys.executable, "-P", "-c", code, str(path)),
            *("--options-fd", str(options_fd), "--status-fd", str(status_write)),
        ],
        pass_fds=(options_fd, status_write),
    )
    os.close(options_fd)
    os.close(status_write)
    try:
        with os.fdopen(status_read, "rb") as reports:
            *_, last = read_reports(reports)
        assert isinstance(last, Ready), last
        yield Daemon(process, path, home / "log")
    finally:
        subprocess.run(["fusermount3", "-uz", path], capture_output=True, check=False)
        process.kill()
        process.wait(_PATIENCE_S)
        sh(Path("/"), f"rm -rf {home}")


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def write_once(path: Path) -> None:
    with path.open("r+b", buffering=0) as opened:
        opened.write(b"x")


# --- the end of a mount ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_b96_a_killed_daemon_and_the_next_mount(pool: Pool, cached: Lab, mode: str) -> None:
    with pool.private(cached.etcd, mode) as mounted:
        path = mounted.path / cached.path.name / "file"
        path.write_bytes(b"published")
        fd = os.open(path, os.O_RDONLY)
        daemon_pid = mounted.daemon
        with ended(daemon_pid):
            os.kill(daemon_pid, signal.SIGKILL)
        for attempt in (path.read_bytes, lambda: os.listdir(mounted.path)):
            with pytest.raises(OSError, match="not connected") as caught:
                attempt()
            assert caught.value.errno == errno.ENOTCONN
        done = run_etcdfs(
            *("mount", str(mounted.path), "--endpoints", cached.etcd.client_url, mode),
            *("--log-file", str(mounted.log_file)),
        )
        assert done.returncode == 0, done.stderr
        assert path.read_bytes() == b"published"
        mounted.expect_log("cleared the stale mount")
        with contextlib.suppress(OSError):
            os.close(fd)


@pytest.mark.parametrize("mode", MODES)
def test_b89_sigterm_publishes_unmounts_and_exits_0(cached: Lab, mode: str) -> None:
    with daemon(cached.etcd, cache=mode == "--cache") as running:
        fd = os.open(running.path / cached.path.name / "file", os.O_CREAT | os.O_WRONLY)
        os.write(fd, b"not yet closed")
        assert cached.value("file") is None
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(_PATIENCE_S) == 0
        assert cached.value("file") == b"not yet closed"
        assert not os.path.ismount(running.path)
        assert "could not" not in running.log_file.read_text()
        with contextlib.suppress(OSError):
            os.close(fd)


_ON_A_TERMINAL = """
import fcntl, os, pty, termios
os.setsid()
terminal = pty.openpty()
fcntl.ioctl(terminal[1], termios.TIOCSCTTY, 0)
"""


@pytest.mark.parametrize(
    ("number", "program"), [(signal.SIGINT, ""), (signal.SIGHUP, _ON_A_TERMINAL)]
)
def test_b89_sigint_and_the_end_of_a_terminal_likewise(
    lab: Lab, number: signal.Signals, program: str
) -> None:
    with daemon(lab.etcd, cache=True, program=f"{program}\n{_MAIN}") as running:
        fd = os.open(running.path / lab.path.name / "file", os.O_CREAT | os.O_WRONLY)
        os.write(fd, b"not yet closed")
        running.process.send_signal(number)
        assert running.process.wait(_PATIENCE_S) == 0
        assert lab.value("file") == b"not yet closed"
        assert not os.path.ismount(running.path)
        with contextlib.suppress(OSError):
            os.close(fd)


def test_b89_sighup_is_not_heard_under_nohup(lab: Lab) -> None:
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    with daemon(lab.etcd, cache=True, program=f"{program}\n{_MAIN}") as running:
        running.process.send_signal(signal.SIGHUP)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(_PATIENCE_S) == 0
        assert "SIGHUP" not in running.log_file.read_text()


@pytest.mark.parametrize("mode", MODES)
def test_b95_an_end_that_loses_something_says_so(own_etcd: EtcdProcess, mode: str) -> None:
    with daemon(own_etcd, cache=mode == "--cache", timeout_s=0.5) as running:
        fds = [os.open(running.path / name, os.O_CREAT | os.O_WRONLY) for name in "ab"]
        for fd in fds:
            os.write(fd, b"not yet closed")
        own_etcd.pause()
        with pytest.raises(OSError, match=os.strerror(errno.ETIMEDOUT)):
            os.close(fds[0])  # whoever wrote this one knows
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(_PATIENCE_S) == UnpublishedError.exit_code
        own_etcd.resume()
        assert not os.path.ismount(running.path)
        log = running.log_file.read_text()
        assert (
            " ERROR etcdfs.daemon.main: what was written to /b and not yet closed is lost\n" in log
        )
        assert "written to /a" not in log
        with contextlib.suppress(OSError):
            os.close(fds[1])


@pytest.mark.parametrize("command", ["umount", "fusermount3 -u", "fusermount3 -uz"])
def test_b89_plain_unmounting_ends_the_daemon(pool: Pool, lab: Lab, command: str) -> None:
    with pool.private(lab.etcd, "--cache") as mounted:
        (mounted.path / lab.path.name / "file").write_bytes(command.encode())
        with ended(mounted.daemon):
            sh(Path("/"), f"{command} {mounted.path}")
        assert not os.path.ismount(mounted.path)
        assert lab.value("file") == command.encode()


_CRASHING = """
from etcdfs.daemon import main as daemon
from etcdfs.daemon.main import main

async def crash(mirror):
    found = None
    while found is None:
        await mirror.advanced()
        found = mirror.update.tree.find(CRASH_KEY)
    raise ZeroDivisionError("planted")

daemon.watch_over = crash
"""


def test_b96_a_daemon_that_crashes_unmounts_nothing(cached: Lab) -> None:
    program = f"CRASH_KEY = {cached.key('file')!r}\n{_CRASHING}"
    with daemon(cached.etcd, cache=True, program=program) as running:
        assert cached.path.name in os.listdir(running.path)
        cached.put("file", b"value")
        assert running.process.wait(_PATIENCE_S) == 1
        with pytest.raises(OSError, match="not connected"):
            os.listdir(running.path)


def test_b99_a_daemon_that_dies_in_a_library_leaves_a_word(cached: Lab) -> None:
    with daemon(cached.etcd, cache=True) as running:
        running.process.send_signal(signal.SIGSEGV)
        assert running.process.wait(_PATIENCE_S) == -signal.SIGSEGV
        assert "Fatal Python error: Segmentation fault" in running.log_file.read_text()


# --- etcdfs' own mistakes -------------------------------------------------------------------

_PLANTED = """
from etcdfs.vfs.filesystem import Filesystem
from etcdfs.daemon.main import main
from etcdfs.files.handles import Handles

async def planted(*_arguments, **_options):
    raise ZeroDivisionError("planted")

def planted_now(*_arguments, **_options):
    raise ZeroDivisionError("planted")

for name in ("mkdir", "unlink", "rename", "statfs", "create", "rmdir"):
    setattr(Filesystem, name, planted)
Filesystem.readdir = Filesystem.readdir_by_inode = planted
Handles.read = planted_now
Handles.write = planted
"""


@pytest.mark.parametrize("mode", MODES)
def test_b98_a_bug_is_eio_and_a_traceback_and_the_mount_lives(cached: Lab, mode: str) -> None:
    cached.put("file", b"value")
    cached.put("large", b"v" * (STORE_MAX + 1))  # the small one comes with its open
    with daemon(cached.etcd, cache=mode == "--cache", program=_PLANTED) as running:
        path = running.path / cached.path.name
        for attempt in (
            lambda: os.mkdir(path / "d"),
            lambda: os.rmdir(path),
            lambda: os.unlink(path / "file"),
            lambda: os.rename(path / "file", path / "other"),
            lambda: os.statvfs(path),
            lambda: os.open(path / "new", os.O_CREAT | os.O_WRONLY),
            lambda: os.listdir(path),
            (path / "large").read_bytes,
            lambda: write_once(path / "file"),
        ):
            with pytest.raises(OSError, match="Input/output error") as caught:
                attempt()
            assert caught.value.errno == errno.EIO
            assert (path / "file").stat().st_size == 5
        log = running.log_file.read_text()
        assert log.count("ZeroDivisionError: planted") >= 9
        assert "mkdir failed; this is a bug of etcdfs" in log
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(_PATIENCE_S) == 0


# --- etcd is away ---------------------------------------------------------------------------


@pytest.mark.oldest_and_newest_etcd
def test_b73_while_etcd_does_not_answer(pool: Pool, own_etcd: EtcdProcess) -> None:
    with pool.private(own_etcd, "--cache", "--timeout", "0.5") as mounted:
        file = mounted.path / "d" / "file"
        mounted.put("/d/file", "value")
        mounted.put("/d/other", "not read before")
        assert file.read_bytes() == b"value"
        mounted.expect_log("")
        own_etcd.pause()
        try:
            with at_most(5):
                assert file.read_bytes() == b"value"
                assert (mounted.path / "d" / "other").read_bytes() == b"not read before"
                assert sorted(os.listdir(mounted.path / "d")) == ["file", "other"]
                assert not (mounted.path / "d" / "missing").exists()
                assert os.statvfs(mounted.path).f_namemax == 255
            for attempt in (
                lambda: file.write_bytes(b"new value"),
                lambda: (mounted.path / "new").write_bytes(b"new"),
                (mounted.path / "made").mkdir,
                file.unlink,
                lambda: file.rename(mounted.path / "moved"),
                lambda: os.close(os.open(mounted.path / "lock", os.O_CREAT | os.O_EXCL)),
            ):
                with at_most(5), pytest.raises(OSError, match=r"timed out|Input/output") as caught:
                    attempt()
                assert caught.value.errno in {errno.ETIMEDOUT, errno.EIO}
            assert file.read_bytes() == b"value"
        finally:
            own_etcd.resume()
        _check_recovered(own_etcd, mounted.path)


def _check_recovered(etcd: EtcdProcess, path: Path) -> None:
    """Check that the mount shows what etcd holds, whatever became of the writes that failed."""
    with contextlib.closing(Client(etcd.endpoint)) as client:
        revision = client.put(b"/again", b"here")
        for _ in range(5):  # each wait is bounded by the mount's --timeout
            with contextlib.suppress(TimeoutError):
                os.getxattr(path, f"user.etcdfs.wait.{revision}")
                break
        assert (path / "again").read_bytes() == b"here"
        (path / "again").write_bytes(b"and written")
        found = client.get(b"/again")
        assert found is not None
        assert found.value == b"and written"
        for entry in client.below(b"/"):
            if not entry.key.endswith(b"/"):
                assert Path(os.fsdecode(os.fsencode(path) + entry.key)).read_bytes() == entry.value


@pytest.mark.oldest_and_newest_etcd
def test_b73_without_the_mirror_while_etcd_does_not_answer(
    pool: Pool, own_etcd: EtcdProcess
) -> None:
    with pool.private(own_etcd, "--no-cache", "--timeout", "0.5") as mounted:
        mounted.put("/file", "value")
        file = mounted.path / "file"
        assert file.read_bytes() == b"value"
        mounted.expect_log("")
        own_etcd.pause()
        try:
            for attempt in (
                file.read_bytes,
                file.stat,
                (mounted.path / "missing").stat,
                lambda: os.listdir(mounted.path),
                lambda: file.write_bytes(b"x"),
                (mounted.path / "made").mkdir,
            ):
                with at_most(4), pytest.raises(OSError, match=r"timed out|Input/output"):
                    attempt()
        finally:
            own_etcd.resume()
        _check_recovered(own_etcd, mounted.path)


def test_b73_etcd_is_down_and_comes_back(pool: Pool, own_etcd: EtcdProcess) -> None:
    with pool.private(own_etcd, "--cache", "--timeout", "2") as mounted:
        mounted.put("/file", "value")
        mounted.expect_log("")
        own_etcd.kill()
        assert (mounted.path / "file").read_bytes() == b"value"
        assert os.listdir(mounted.path) == ["file"]
        with at_most(10), pytest.raises(OSError, match=r"timed out|Input/output"):
            (mounted.path / "file").write_bytes(b"new")
        assert (mounted.path / "file").read_bytes() == b"value"
        own_etcd.start()
        _check_recovered(own_etcd, mounted.path)


@pytest.mark.oldest_and_newest_etcd
@pytest.mark.parametrize("compacted", [False, True], ids=["resumed", "compacted"])
def test_b75_changes_made_while_disconnected_are_seen(
    pool: Pool, own_etcd: EtcdProcess, *, compacted: bool
) -> None:
    """The daemon stands still while etcd restarts, so that it misses everything.

    Nothing of the mount may be open in this process meanwhile: starting a program closes it in
    the child, which waits for the daemon.
    """
    with (
        pool.private(own_etcd, "--cache", "--timeout", "10") as mounted,
        contextlib.closing(Client(own_etcd.endpoint)) as client,
    ):
        client.put_all([(b"/d/%d" % n, b"old") for n in range(20)])
        mounted.wait(client.revision())
        for n in range(20):
            assert (mounted.path / "d" / f"{n}").read_bytes() == b"old"
        assert not (mounted.path / "new").exists()
        unchanged = (mounted.path / "d" / "19").stat()
        mounted.expect_log("etcdfs.mirror.watch_session")
        daemon_pid = mounted.daemon
        os.kill(daemon_pid, signal.SIGSTOP)
        try:
            own_etcd.restart()
            client.close()  # its connection is gone; the next call makes another
            client.put(b"/d/0", b"changed")
            client.delete(b"/d/1")
            client.delete(b"/d/2")
            client.put(b"/d/2", b"made anew")
            revision = client.put(b"/new/file", b"new")
            if compacted:
                client.compact(revision)
        finally:
            os.kill(daemon_pid, signal.SIGCONT)
        mounted.wait(revision)
        assert (mounted.path / "d" / "0").read_bytes() == b"changed"
        assert not (mounted.path / "d" / "1").exists()
        assert (mounted.path / "d" / "2").read_bytes() == b"made anew"
        assert (mounted.path / "new" / "file").read_bytes() == b"new"
        assert len(os.listdir(mounted.path / "d")) == 19
        after = (mounted.path / "d" / "19").stat()
        assert (after.st_ino, after.st_mtime_ns) == (unchanged.st_ino, unchanged.st_mtime_ns)
        assert mounted.statistics()["mirror"]["listed_keys"] == (20 if compacted else 0)


_UNMOUNTED_MEANWHILE = """
import logging, subprocess
from functools import partial
import trio
from etcdfs.fuse.operations import Operations
from etcdfs.daemon.main import main
quick = Operations.release
async def release(self, fh):
    await trio.to_thread.run_sync(partial(subprocess.run, ["fusermount3", "-u", sys.argv[1]]))
    await quick(self, fh)
Operations.release = release
logging.getLogger("pyfuse3").setLevel(logging.DEBUG)
"""


def test_an_answer_that_nobody_waits_for_any_more_is_no_error(own_etcd: EtcdProcess) -> None:
    """Nobody waits for a RELEASE: the mount may be gone before its answer."""
    with daemon(own_etcd, cache=True, program=_UNMOUNTED_MEANWHILE) as running:
        (running.path / "f").write_bytes(b"x")
        assert running.process.wait(_PATIENCE_S) == 0
        log = running.log_file.read_text()
    assert " DEBUG pyfuse3: fuse_release(): fuse_reply_* failed with No such file" in log
    assert " ERROR " not in log
