"""The command on real mounts: what it says, what it leaves behind, how it ends."""

import contextlib
import errno
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdfs.cli.argv import likely_mountpoint
from etcdfs.process.logs import LINES_MAX
from etcdfs.process.mountpoint import claimed, find_mounted
from etcdfs.process.processes import find_daemon, find_server
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import COMMAND, run_etcdfs
from tests.support.nobody import needs_root, public_directory, running_as_nobody

pytestmark = [pytest.mark.fuse, pytest.mark.etcd]

_TIMEOUT_S = 30
MODES = ("--cache", "--no-cache")
_SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"


@pytest.fixture
def home() -> Iterator[Path]:
    """Return a fresh directory; what is mounted below it is taken away in the end."""
    home = Path(tempfile.mkdtemp(prefix="etcdfs-test-cli-"))
    try:
        yield home
    finally:
        for path in home.iterdir():
            clear(str(path))
        shutil.rmtree(home)


@pytest.fixture
def mnt(home: Path) -> Path:
    """Return an empty directory to mount over."""
    mnt = home / "mnt"
    mnt.mkdir()
    return mnt


def clear(path: str) -> None:
    """End the daemon of a mountpoint, and take away what it leaves."""
    pid = find_daemon(path)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if find_mounted(path) is not None:
        run("fusermount3", "-uz", path)


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, check=False, text=True, timeout=_TIMEOUT_S)


def mount(mnt: Path, *options: str, **environment: str) -> str:
    """Run `etcdfs mount`, which must do well; return what it printed."""
    done = run_etcdfs("mount", str(mnt), *options, **environment)
    said = r"etcdfs: embedded etcd 3\.\d+\.\d+.*\n" if "--embedded" in options else ""
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(said, done.stderr)
    assert os.path.ismount(mnt.resolve())
    return done.stdout


def umount(mnt: Path, but_for: int | None = None) -> None:
    """Run `etcdfs umount`, which must do well and leave nothing, but for an earlier daemon."""
    done = run_etcdfs("umount", str(mnt))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not os.path.ismount(mnt)
    assert find_daemon(str(mnt)) == but_for


def refused(done: "subprocess.CompletedProcess[str]", code: int, complaint: str) -> None:
    """Check a failure: its status, and one line that says why."""
    assert (done.returncode, done.stdout) == (code, ""), done
    assert done.stderr.startswith("etcdfs: ")
    assert done.stderr.count("\n") == 1
    assert complaint in done.stderr


def kill(mnt: Path) -> None:
    """Kill the daemon; what it leaves answers "Transport endpoint is not connected"."""
    pid = find_daemon(str(mnt))
    assert pid is not None
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pidfd)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        mnt.stat()


def wait_for_end(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(_TIMEOUT_S * 1000), "the daemon lives on"
    os.close(pidfd)


# --- mounting and unmounting ----------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_mount_is_usable_when_it_returns(shared_etcd: EtcdProcess, mnt: Path, mode: str) -> None:
    assert mount(mnt, mode, "--endpoints", shared_etcd.client_url) == ""
    (mnt / "test-cli").write_text("value")
    assert shared_etcd.etcdctl("get", "/test-cli") == b"/test-cli\nvalue\n"
    umount(mnt)


def test_original_form(shared_etcd: EtcdProcess, mnt: Path) -> None:
    done = run_etcdfs(str(mnt), shared_etcd.client_url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.path.ismount(mnt)
    umount(mnt)


def test_endpoints_of_etcdctl(shared_etcd: EtcdProcess, mnt: Path) -> None:
    mount(mnt, ETCDCTL_ENDPOINTS=shared_etcd.client_url)
    umount(mnt)


@pytest.mark.parametrize("command", [("fusermount3", "-u"), ("umount",)])
def test_other_commands_unmount_too(
    shared_etcd: EtcdProcess, mnt: Path, command: tuple[str, ...]
) -> None:
    if command == ("umount",) and os.geteuid() != 0:
        pytest.skip("umount(8) is for root")
    mount(mnt, "--endpoints", shared_etcd.client_url)
    pid = find_daemon(str(mnt))
    assert pid is not None
    pidfd = os.pidfd_open(pid)
    assert run(*command, str(mnt)).returncode == 0
    wait_for_end(pidfd)


@pytest.mark.parametrize("name", ["with blank", "back\\slash", "new\nline", "ümlaut", "\udcff"])
def test_mountpoints_of_any_name(shared_etcd: EtcdProcess, home: Path, name: str) -> None:
    mnt = home / name
    mnt.mkdir()
    mount(mnt, "--endpoints", shared_etcd.client_url)
    umount(mnt)


def test_mountpoint_by_a_relative_path_and_a_link(
    shared_etcd: EtcdProcess, mnt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mnt.parent)
    Path("link").symlink_to("mnt")
    mount(Path("link"), "--endpoints", shared_etcd.client_url)
    assert os.path.ismount(mnt)
    umount(Path("mnt"))


def test_the_daemon_holds_on_to_nothing_of_its_parent(
    shared_etcd: EtcdProcess, mnt: Path, home: Path
) -> None:
    with (home / "held").open("wb") as held:
        done = subprocess.run(
            [*COMMAND, "mount", str(mnt), "--endpoints", shared_etcd.client_url],
            check=True,
            cwd=home,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=(held.fileno(),),
            stdin=subprocess.PIPE,
            timeout=_TIMEOUT_S,
        )
    assert done.returncode == 0
    process = Path(f"/proc/{find_daemon(str(mnt))}")
    assert os.readlink(process / "cwd") == "/"
    open_files = [os.readlink(fd) for fd in (process / "fd").iterdir()]
    assert str(home / "held") not in open_files
    assert [os.readlink(process / "fd" / fd) for fd in "02"] == [os.devnull] * 2
    umount(mnt)


@pytest.mark.parametrize("wrong", [("--timeout", "soon"), ("--frobnicate",), ("-o", "frobnicate")])
def test_a_daemon_that_is_not_wanted_is_gone(mnt: Path, wrong: tuple[str, ...]) -> None:
    """The daemon is started before the command line is read, see `etcdfs.process.spawn`."""
    done = run_etcdfs("mount", str(mnt), *wrong)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert find_daemon(str(mnt)) is None


def test_a_daemon_started_for_the_wrong_place_is_gone(shared_etcd: EtcdProcess, mnt: Path) -> None:
    elsewhere = str(mnt.parent / "elsewhere")
    options = ("--endpoints", shared_etcd.client_url, "--prefix", elsewhere)
    assert likely_mountpoint(["mount", "--cache", str(mnt), *options]) == elsewhere
    done = run_etcdfs("mount", "--cache", str(mnt), *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert find_daemon(elsewhere) is None
    umount(mnt)


def test_the_mount_table_names_it(shared_etcd: EtcdProcess, mnt: Path) -> None:
    """By all its members and the prefix, as fstab would."""
    members = f"{shared_etcd.endpoint},localhost:{shared_etcd.endpoint.port}"
    mount(mnt, "--endpoints", members, "--prefix", "/p")
    mounted = find_mounted(str(mnt))
    assert mounted is not None
    assert (mounted.type, mounted.source) == ("fuse.etcdfs", f"{members}/p")


def test_options_reach_the_mount(shared_etcd: EtcdProcess, mnt: Path) -> None:
    listed = "ro,noexec,nosuid,nodev,allow_other,uid=7,gid=8,dir-mode=711,_netdev"
    mount(mnt, "-o", f"endpoints={shared_etcd.client_url},{listed}")
    status = mnt.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (7, 8, 0o711)
    flags = os.statvfs(mnt).f_flag
    assert flags & os.ST_RDONLY
    assert flags & os.ST_NOEXEC
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        (mnt / "new").touch()


def test_a_log_file_is_appended_to(shared_etcd: EtcdProcess, mnt: Path, home: Path) -> None:
    (home / "log").write_text("before\n")
    for _ in range(2):
        mount(mnt, "--endpoints", shared_etcd.client_url, "--log-file", str(home / "log"))
        umount(mnt)
    log = (home / "log").read_text()
    assert log.startswith("before\n")
    assert log.count(f" INFO __main__: mounted {mnt}\n") == 2


def test_b104_a_log_that_is_gone_does_not_end_the_mount(
    shared_etcd: EtcdProcess, mnt: Path, home: Path
) -> None:
    logs = home / "logs"
    logs.mkdir()
    options = ("--log-file", str(logs / "log"), "--log-level", "debug")
    mount(mnt, "--endpoints", shared_etcd.client_url, *options)
    (logs / "log").unlink()
    logs.rmdir()
    assert not (mnt / "missing").exists()
    (mnt / "test-cli").write_text("still here")
    logs.mkdir()
    assert not (mnt / "missing").exists()
    assert "missing" in (logs / "log").read_text()
    umount(mnt)


def test_links_are_not_followed_with_nosymfollow(shared_etcd: EtcdProcess, mnt: Path) -> None:
    options = ("-o", "nosymfollow", "--endpoints", shared_etcd.client_url)
    done = run_etcdfs("mount", str(mnt), *options)
    if done.returncode and os.geteuid() != 0:  # libfuse before 3.17
        refused(done, 41, "nosymfollow")
        return
    assert (done.returncode, done.stderr) == (0, "")
    (mnt / "link").symlink_to("/etc/hostname")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        (mnt / "link").read_bytes()
    (mnt / "link").unlink()
    assert {"nosuid", "nodev"} <= set(run("findmnt", "-no", "OPTIONS", str(mnt)).stdout.split(","))
    umount(mnt)


@pytest.mark.parametrize("mode", MODES)
def test_b104_a_log_whose_path_comes_to_lead_into_the_mount(
    shared_etcd: EtcdProcess, mnt: Path, home: Path, mode: str
) -> None:
    def point_to(target: Path) -> None:
        (home / "new").symlink_to(target)
        (home / "new").rename(home / "logs")

    (home / "elsewhere").mkdir()
    point_to(home / "elsewhere")
    options = ("--log-file", str(home / "logs" / "log"), "--log-level", "debug", mode)
    mount(mnt, "--endpoints", shared_etcd.client_url, *options)
    daemon = find_daemon(str(mnt))
    assert daemon is not None
    watchdog = threading.Timer(_TIMEOUT_S, os.kill, (daemon, signal.SIGKILL))
    watchdog.start()
    inside = mnt / f"test-log{mode}"
    inside.mkdir()
    point_to(inside)
    for n in range(100):
        assert not (mnt / f"missing{n}").exists()
    assert list(inside.iterdir()) == []
    point_to(home / "elsewhere")
    umount(mnt)
    watchdog.cancel()


def test_b104_a_log_inside_the_mountpoint_is_refused(mnt: Path, home: Path) -> None:
    (home / "link").symlink_to(mnt)
    for path in (mnt / "log", home / "link" / "log"):
        refused(run_etcdfs("mount", str(mnt), "--log-file", str(path)), 2, "inside the mountpoint")


def test_b105_what_is_printed_does_not_rule_the_terminal(home: Path) -> None:
    refused(run_etcdfs("mount", str(home / "\x1b[2J\u202e")), 10, r"/\x1b[2J\u202e does not exist")


@contextlib.contextmanager
def killed_after(bound_s: float, daemon: "subprocess.Popen[str]") -> Iterator[None]:
    """Kill a daemon that takes too long: a call that hangs in its mount cannot be ended else."""
    watchdog = threading.Timer(bound_s, daemon.kill)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


def test_b106_a_log_that_nobody_reads_does_not_hold_the_mount_up(
    shared_etcd: EtcdProcess, mnt: Path
) -> None:
    """In the foreground stderr may be a pipe, whose reader stops."""
    options = ("--cache", "--log-level", "debug", "--endpoints", shared_etcd.client_url)
    with foreground(mnt, *options) as daemon, killed_after(_TIMEOUT_S, daemon):
        assert daemon.stderr is not None
        lines = 2 * LINES_MAX
        for n in range(lines):  # each is a line of the log
            with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
                os.getxattr(mnt, f"user.missing{n}")
        (mnt / "test-cli").write_text("still here")
        assert (mnt / "test-cli").read_text() == "still here"
        daemon.send_signal(signal.SIGTERM)
        said = daemon.stderr.read()
        assert daemon.wait(_TIMEOUT_S) == 0
    assert not os.path.ismount(mnt)
    lost = sum(int(n) for n in re.findall(r" (\d+) line\(s\) of the log were lost", said))
    assert lost
    assert said.count("missing") + lost >= lines


def test_it_may_be_started_without_descriptors(shared_etcd: EtcdProcess, mnt: Path) -> None:
    script = 'exec "$@" 0<&- 1>&- 2>&-'
    done = run(
        *("/bin/sh", "-c", script, "sh", *COMMAND, "mount", str(mnt)),
        *("--endpoints", shared_etcd.client_url),
    )
    assert done.returncode == 0
    (mnt / "test-cli").write_text("value")
    umount(mnt)


@pytest.mark.skipif(shutil.which("mount.fuse3", path=_SBIN) is None, reason="no mount.fuse3")
def test_it_is_mounted_as_fstab_would(shared_etcd: EtcdProcess, mnt: Path, home: Path) -> None:
    (home / "bin").mkdir()
    program = home / "bin" / "etcdfs"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["mount.fuse3", f"{shared_etcd.endpoint}/app", mnt, "-o", "cache,nofail", "-t", "etcdfs"],
        capture_output=True,
        check=False,
        env={**os.environ, "PATH": f"{home / 'bin'}:{_SBIN}"},
        text=True,
        timeout=_TIMEOUT_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    mounted = find_mounted(str(mnt))
    assert mounted is not None
    # What fstab calls it, so that `mount -a` finds it mounted.
    assert (mounted.type, mounted.source) == ("fuse.etcdfs", f"{shared_etcd.endpoint}/app")
    (mnt / "fstab").write_text("value")
    assert shared_etcd.etcdctl("get", "/app/fstab") == b"/app/fstab\nvalue\n"
    umount(mnt)


# --- refusing to mount ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "complaint"),
    [
        ("missing", 10, "does not exist"),
        ("file", 11, "is not a directory"),
        ("full", 12, "is not empty"),
    ],
)
def test_a_bad_mountpoint_is_refused(home: Path, name: str, code: int, complaint: str) -> None:
    (home / "file").touch()
    (home / "full" / "of").mkdir(parents=True)
    refused(run_etcdfs("mount", str(home / name)), code, complaint)


def test_a_second_mount_is_refused(shared_etcd: EtcdProcess, mnt: Path) -> None:
    mount(mnt, "--endpoints", shared_etcd.client_url)
    again = run_etcdfs("mount", str(mnt), "--endpoints", shared_etcd.client_url)
    refused(again, 13, f"etcdfs is mounted on {mnt} already")
    umount(mnt)


def test_a_bad_prefix_is_refused(shared_etcd: EtcdProcess, mnt: Path) -> None:
    done = run_etcdfs("mount", str(mnt), "--endpoints", shared_etcd.client_url, "--prefix", "a//b")
    refused(done, 30, "empty component")


@pytest.mark.parametrize("mode", MODES)
def test_an_etcd_that_is_not_there_is_refused(mnt: Path, mode: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        endpoint = f"127.0.0.1:{nobody.getsockname()[1]}"
        done = run_etcdfs("mount", str(mnt), mode, "--endpoints", endpoint, "--timeout", "1")
    refused(done, 20, endpoint)
    assert not os.path.ismount(mnt)
    assert find_daemon(str(mnt)) is None


@pytest.mark.parametrize("mode", MODES)
def test_an_etcd_that_does_not_answer_is_refused(
    own_etcd: EtcdProcess, mnt: Path, mode: str
) -> None:
    own_etcd.pause()
    done = run_etcdfs("mount", str(mnt), mode, "--endpoints", own_etcd.client_url, "--timeout", "1")
    own_etcd.resume()
    refused(done, 20, "")
    assert not os.path.ismount(mnt)
    assert find_daemon(str(mnt)) is None


def test_a_kernel_that_refuses_is_reported(shared_etcd: EtcdProcess, mnt: Path) -> None:
    endpoint = ("--endpoints", shared_etcd.client_url)
    done = run_etcdfs("mount", str(mnt), *endpoint, "-o", "max_read=nonsense")
    refused(done, 41, "max_read=nonsense")  # libfuse says why, on stderr only
    assert not os.path.ismount(mnt)


def test_b101_of_many_mounts_on_one_directory_one_succeeds(
    shared_etcd: EtcdProcess, mnt: Path
) -> None:
    command = [*COMMAND, "mount", str(mnt), "--cache", "--endpoints", shared_etcd.client_url]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCD")}
    pipe = subprocess.PIPE
    racers = [
        subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
        for _ in range(4)
    ]
    said = [racer.communicate(timeout=_TIMEOUT_S)[1] for racer in racers]
    assert sorted(racer.returncode for racer in racers) == [0, 13, 13, 13], said
    umount(mnt)  # and nothing is below it


def test_b101_a_directory_that_another_daemon_is_about_to_mount_on(
    shared_etcd: EtcdProcess, mnt: Path
) -> None:
    with claimed(str(mnt)):  # as a daemon does while it still loads
        done = run_etcdfs("mount", str(mnt), "--endpoints", shared_etcd.client_url)
    refused(done, 13, "another etcdfs is about to mount")
    assert not os.path.ismount(mnt)


# --- others, and what they have of a mount --------------------------------------------------

_IMPOSTOR = """
ctypes.CDLL(None).prctl(15, sys.argv[1].encode(), 0, 0, 0)  # PR_SET_NAME
fcntl.flock(os.open(sys.argv[4], os.O_RDONLY), fcntl.LOCK_SH)
print("up", flush=True)
signal.pause()
"""


@needs_root
def test_b102_another_user_can_neither_hold_a_mount_up_nor_keep_it_away(
    shared_etcd: EtcdProcess,
) -> None:
    with public_directory() as home:
        mnt = home / "mnt"
        mnt.mkdir()
        mount(mnt, "--endpoints", shared_etcd.client_url)
        mounted = find_mounted(str(mnt))
        assert mounted is not None
        like_it = (f"etcdfs {mounted.device}", "-m", "etcdfs.daemon.main", str(mnt))
        kill(mnt)
        run("fusermount3", "-uz", str(mnt))
        with running_as_nobody(_IMPOSTOR, *like_it):
            mount(mnt, "--endpoints", shared_etcd.client_url)
            mounted = find_mounted(str(mnt))
            assert mounted is not None
            server = find_server(mounted.path, mounted.device, os.geteuid())
            assert server is not None
            pidfd = os.pidfd_open(server)
            os.kill(server, signal.SIGKILL)
            wait_for_end(pidfd)
            done = run_etcdfs("mount", str(mnt), "--endpoints", shared_etcd.client_url)
            assert (done.returncode, "left a stale mount" in done.stderr) == (0, True)
            done = run_etcdfs("umount", str(mnt))
            assert (done.returncode, done.stderr) == (0, "")


_CONTAINER = """
mount --bind "$1" "$2" && echo ready
while read -r command; do eval "$command"; done
"""


@needs_root
@pytest.mark.parametrize("mode", MODES)
def test_b103_what_a_container_holds_is_served_on_and_the_mountpoint_is_free(
    shared_etcd: EtcdProcess, mnt: Path, home: Path, mode: str
) -> None:
    (home / "copy").mkdir()
    options = (mode, "--endpoints", shared_etcd.client_url)
    mount(mnt, *options)
    (mnt / "file").write_text("held")
    first = find_daemon(str(mnt))
    assert first is not None
    pidfd = os.pidfd_open(first)
    command = ["unshare", "--mount", "--propagation=private", "sh", "-c", _CONTAINER, "sh"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, str(mnt), str(home / "copy")], stdin=pipe, stdout=pipe, text=True
    ) as container:
        assert container.stdin is not None
        assert container.stdout is not None

        def inside(script: str) -> str:
            assert container.stdin is not None
            assert container.stdout is not None
            container.stdin.write(f"{script}; echo .\n")
            container.stdin.flush()
            return container.stdout.readline()

        assert container.stdout.readline() == "ready\n"
        # The container has a copy of the mountpoint as well, as Docker's have not.
        assert inside(f'umount -l "{mnt}"') == ".\n"
        done = run_etcdfs("umount", str(mnt))
        assert (done.returncode, done.stderr.count("\n")) == (0, 1)
        assert f"(process {first}) goes on serving" in done.stderr
        assert not os.path.ismount(mnt)
        mount(mnt, *options)
        assert (mnt / "file").read_text() == "held"
        assert inside(f'cat "{home}/copy/file"') == "held.\n"
        umount(mnt, but_for=first)
        mount(mnt, *options)
        os.kill(first, signal.SIGTERM)  # takes away its own mount, of which only the copy is left
        wait_for_end(pidfd)
        assert (mnt / "file").read_text() == "held"
        assert "not connected" in inside(f'cat "{home}/copy/file" 2>&1')
        container.stdin.close()
    umount(mnt)


@needs_root
def test_b103_a_daemon_ends_with_the_last_copy_of_its_mount(
    shared_etcd: EtcdProcess, mnt: Path, home: Path
) -> None:
    (home / "copy").mkdir()
    mount(mnt, "--endpoints", shared_etcd.client_url)
    daemon = find_daemon(str(mnt))
    assert daemon is not None
    pidfd = os.pidfd_open(daemon)
    assert run("mount", "--bind", str(mnt), str(home / "copy")).returncode == 0
    done = run_etcdfs("umount", str(mnt))
    assert "goes on serving" in done.stderr
    assert run("umount", str(home / "copy")).returncode == 0
    wait_for_end(pidfd)


def test_b91_a_lazy_unmount_frees_the_place_and_serves_who_is_inside(
    shared_etcd: EtcdProcess, mnt: Path
) -> None:
    mount(mnt, "--endpoints", shared_etcd.client_url)
    with (mnt / "test-lazy").open("w") as inside:
        refused(run_etcdfs("umount", str(mnt)), 15, "is busy: a program has a file open")
        daemon = find_daemon(str(mnt))
        assert daemon is not None
        pidfd = os.pidfd_open(daemon)
        done = run_etcdfs("umount", "--lazy", str(mnt))
        assert (done.returncode, done.stderr.count("\n")) == (0, 1)
        assert f"(process {daemon}) goes on serving those who are inside" in done.stderr
        assert not os.path.ismount(mnt)
        inside.write("published all the same")
    wait_for_end(pidfd)
    got = shared_etcd.etcdctl("get", "--print-value-only", "/test-lazy")
    assert got.decode() == "published all the same\n"


def test_b91_a_lazy_unmount_of_what_nobody_uses_is_an_ordinary_one(
    shared_etcd: EtcdProcess, mnt: Path
) -> None:
    mount(mnt, "--endpoints", shared_etcd.client_url)
    done = run_etcdfs("umount", "--lazy", str(mnt))
    assert (done.returncode, done.stderr) == (0, "")
    assert find_daemon(str(mnt)) is None


def test_without_dev_fuse_it_is_refused(mnt: Path) -> None:
    def hidden(*command: str) -> "subprocess.CompletedProcess[str]":
        script = 'mount -t tmpfs none /dev && exec "$@"'
        return run("unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", *command)

    if hidden("true").returncode != 0:
        pytest.skip("unshare(1) is not allowed here")
    refused(hidden(*COMMAND, "mount", str(mnt)), 40, "there is no /dev/fuse")


# --- stale mounts ---------------------------------------------------------------------------


def test_a_stale_mount_is_cleared_by_the_next_mount(shared_etcd: EtcdProcess, mnt: Path) -> None:
    endpoint = ("--endpoints", shared_etcd.client_url)
    mount(mnt, *endpoint)
    kill(mnt)
    done = run_etcdfs("mount", str(mnt), *endpoint)
    assert done.returncode == 0
    assert (
        f"etcdfs: a killed daemon left a stale mount on {mnt}, which is to be replaced"
        in done.stderr
    )
    assert done.stderr.count("\n") == 1
    (mnt / "test-cli").write_text("alive")
    umount(mnt)


def test_b96_a_mount_that_fails_leaves_the_stale_one_so_that_nothing_looks_empty(
    shared_etcd: EtcdProcess, mnt: Path
) -> None:
    mount(mnt, "--endpoints", shared_etcd.client_url)
    kill(mnt)
    done = run_etcdfs("mount", str(mnt), "--endpoints", "127.0.0.1:1", "--timeout", "1")
    assert done.returncode == 20
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.listdir(mnt)
    umount(mnt)


def test_a_stale_mount_is_cleared_by_umount(shared_etcd: EtcdProcess, mnt: Path) -> None:
    mount(mnt, "--endpoints", shared_etcd.client_url)
    fd = os.open(mnt, os.O_RDONLY)  # not even an open file keeps it
    kill(mnt)
    umount(mnt)
    os.close(fd)


# --- refusing to unmount --------------------------------------------------------------------


def test_umount_of_nothing_is_refused(mnt: Path) -> None:
    refused(run_etcdfs("umount", str(mnt)), 14, "nothing is mounted")
    refused(run_etcdfs("umount", "/proc"), 14, "is not etcdfs, but proc")


def test_umount_of_a_busy_mount_is_refused(shared_etcd: EtcdProcess, mnt: Path) -> None:
    mount(mnt, "--endpoints", shared_etcd.client_url)
    with (mnt / "test-cli").open("w") as file:
        refused(run_etcdfs("umount", str(mnt)), 15, "is busy")
        file.write("still here")
    assert (mnt / "test-cli").read_text() == "still here"
    umount(mnt)


# --- in the foreground ----------------------------------------------------------------------


@contextlib.contextmanager
def foreground(mnt: Path, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """Run `etcdfs mount --foreground`; yields once it says that it has mounted."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCD")}
    command = [*COMMAND, "mount", str(mnt), "--foreground", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if line.endswith(f" mounted {mnt}\n"):
                    break
            else:
                pytest.fail(f"did not mount: {lines}")
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("mode", MODES)
def test_a_signal_publishes_unmounts_and_ends_well(
    shared_etcd: EtcdProcess, mnt: Path, mode: str, number: int
) -> None:
    with foreground(mnt, mode, "--endpoints", shared_etcd.client_url) as daemon:
        fd = os.open(mnt / "test-cli", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(fd, f"{mode} {number}".encode())  # not yet closed: not yet in etcd
        daemon.send_signal(number)
        assert daemon.wait(_TIMEOUT_S) == 0
        with contextlib.suppress(OSError):
            os.close(fd)
    assert not os.path.ismount(mnt)
    assert shared_etcd.etcdctl("get", "--print-value-only", "/test-cli").decode() == (
        f"{mode} {number}\n"
    )


def test_b89_a_terminal_that_closes_ends_the_mount_in_order(
    shared_etcd: EtcdProcess, mnt: Path
) -> None:
    command = [*COMMAND, "mount", str(mnt), "--foreground", "--endpoints", shared_etcd.client_url]
    ours, theirs = pty.openpty()
    daemon = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = b""
    while f" mounted {mnt}".encode() not in said:
        said += os.read(ours, 4096)
    fd = os.open(mnt / "test-cli", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(fd, b"not yet closed")
    os.close(ours)
    assert daemon.wait(_TIMEOUT_S) == 0
    with contextlib.suppress(OSError):
        os.close(fd)
    assert not os.path.ismount(mnt)
    got = shared_etcd.etcdctl("get", "--print-value-only", "/test-cli")
    assert got.decode() == "not yet closed\n"


def test_unmounting_ends_the_foreground_well(shared_etcd: EtcdProcess, mnt: Path) -> None:
    with foreground(mnt, "--endpoints", shared_etcd.client_url) as daemon:
        umount(mnt)
        assert daemon.wait(_TIMEOUT_S) == 0


def test_systemd_is_told_when_the_mount_is_usable(
    shared_etcd: EtcdProcess, mnt: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(home / "notify"))
        manager.settimeout(_TIMEOUT_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(home / "notify"))
        with foreground(mnt, "--cache", "--endpoints", shared_etcd.client_url) as daemon:
            while not (state := manager.recv(4096)).startswith(b"READY=1\n"):
                assert b"STATUS=Loading" in state
            assert os.path.ismount(mnt)
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(_TIMEOUT_S) == 0


def test_a_failure_in_the_foreground_is_one_line_after_the_log(mnt: Path, home: Path) -> None:
    options = ("--endpoints", "127.0.0.1:1", "--timeout", "1", "--log-file", str(home / "log"))
    refused(run_etcdfs("mount", str(mnt), "--foreground", *options), 20, "127.0.0.1:1")


# --- embedded -------------------------------------------------------------------------------


def test_embedded_from_mount_to_unmount(mnt: Path, home: Path, etcd_binary: Path) -> None:
    environment = {"PATH": f"{etcd_binary.parent}:{os.environ['PATH']}"}
    options = ("--embedded", "--data-dir", str(home / "data"), "--cache")
    url = mount(mnt, *options, **environment).strip()
    assert url == f"unix://{home}/data/client:0"
    (mnt / "file").write_text("kept")
    got = run("env", "ETCDCTL_API=3", "etcdctl", "--endpoints", url, "get", "/file")
    assert got.stdout == "/file\nkept\n"
    (home / "second").mkdir()
    mount(home / "second", "--endpoints", url)
    assert (home / "second" / "file").read_text() == "kept"
    umount(home / "second")
    umount(mnt)
    assert not (home / "data" / "client:0").exists()
    mount(mnt, *options, **environment)
    assert (mnt / "file").read_text() == "kept"
    umount(mnt)


def test_embedded_data_is_for_one_at_a_time(mnt: Path, home: Path) -> None:
    (home / "second").mkdir()
    options = ("--embedded", "--data-dir", str(home / "data"))
    mount(mnt, *options)
    refused(run_etcdfs("mount", str(home / "second"), *options), 51, "in use by another etcdfs")
    umount(mnt)
