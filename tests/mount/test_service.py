"""A mount as a service: what the service manager hears, and what SIGHUP does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from etcdfs.cli.install import DATA
from etcdfs.daemon.kernel_threads import may_look
from tests.mount.client import Client
from tests.mount.lab import MODES
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import COMMAND, Mounted
from tests.support.nobody import needs_root, public_directory, run_as_nobody

pytestmark = [pytest.mark.fuse, pytest.mark.etcd]

TIMEOUT_S = 30
WATCHDOG_US = 200_000


_DENY_WRITE_EXECUTE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(65, 1, 0, 0, 0)  # PR_SET_MDWE, on Linux 6.3 or later
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Manager:
    """A service manager that starts one mount, and listens."""

    def __init__(self, home: Path) -> None:
        self.mountpoint = home / "mnt"
        self.mountpoint.mkdir()
        self.log = home / "log"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(home / "notify"))
        self._socket.settimeout(TIMEOUT_S)

    @contextmanager
    def started(
        self, *options: str, confine: tuple[str, ...] = ()
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """Start the mount; like every service without a terminal."""
        command = [*COMMAND, "mount", str(self.mountpoint), "--foreground", *options]
        notify = {"NOTIFY_SOCKET": self._socket.getsockname(), "WATCHDOG_USEC": str(WATCHDOG_US)}
        with subprocess.Popen(
            [*confine, *command, "--log-file", str(self.log)],
            env=os.environ | notify,
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()
                subprocess.run(["fusermount3", "-uzq", self.mountpoint], check=False)
                self._socket.close()

    def hear(self, *wanted: str) -> str:
        """Return the first word that begins with one of these."""
        while not (word := self._socket.recv(4096).decode()).startswith(wanted):
            pass
        return word


@pytest.mark.parametrize("mode", MODES)
def test_b92_a_service_from_start_to_end(
    shared_etcd: EtcdProcess, tmp_path: Path, mode: str
) -> None:
    manager = Manager(tmp_path)
    with manager.started("--endpoints", shared_etcd.client_url, mode) as daemon:
        manager.hear("READY=1\n")
        assert os.path.ismount(manager.mountpoint)
        status = "every operation asks etcd" if mode == "--no-cache" else ", 0 s behind"
        assert manager.hear("WATCHDOG=1\nSTATUS=").endswith(status)
        manager.hear("WATCHDOG=1")
        (tmp_path / "log").rename(tmp_path / "log.1")
        daemon.send_signal(signal.SIGHUP)
        manager.hear("RELOADING=1\nMONOTONIC_USEC=")
        manager.hear("READY=1")
        assert manager.log.read_text().endswith(
            "SIGHUP: reading certificates and the password again\n"
        )
        (manager.mountpoint / "test-service").write_text(mode)
        daemon.send_signal(signal.SIGTERM)
        manager.hear("STOPPING=1\n")
        assert daemon.wait(TIMEOUT_S) == 0
    assert not os.path.ismount(manager.mountpoint)


def test_b92_the_status_tells_how_far_behind_it_is(own_etcd: EtcdProcess, tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    with manager.started("--endpoints", own_etcd.client_url, "--cache"):
        manager.hear("READY=1\n")
        revision = int(own_etcd.etcdctl("put", "/a", "1") and 2)
        manager.hear(f"WATCHDOG=1\nSTATUS=Revision {revision}, 0 s behind")
        own_etcd.kill()
        while not manager.hear("WATCHDOG=1\nSTATUS=").endswith("; etcd is silent"):
            pass


def test_b90_what_cannot_be_read_again_leaves_all_as_it_was(
    own_etcd: EtcdProcess, tmp_path: Path
) -> None:
    manager = Manager(tmp_path)
    with manager.started("--endpoints", own_etcd.client_url, "--cache", "--timeout", "1") as daemon:
        manager.hear("READY=1\n")
        own_etcd.kill()
        daemon.send_signal(signal.SIGHUP)
        manager.hear("RELOADING=1\n")
        manager.hear("READY=1")
        assert " WARNING " in manager.log.read_text()
        assert "the connection to etcd stays as it was: " in manager.log.read_text()
        own_etcd.start()
        (manager.mountpoint / "a").write_text("1")


@needs_root
@pytest.mark.programs("setpriv")
def test_b92_the_unit_leaves_a_mount_the_rights_that_it_needs(
    shared_etcd: EtcdProcess,
) -> None:
    """Of what the unit takes away, the capabilities, and to write what is run then."""
    confine = confinement()
    with public_directory() as home:
        manager = Manager(home)
        options = ("--endpoints", shared_etcd.client_url, "--cache", "--allow-other")
        with manager.started(*options, confine=confine) as daemon:
            manager.hear("READY=1\n")
            place = manager.mountpoint / "confined"
            place.mkdir()
            place.chmod(0o777)
            run_as_nobody("os.system('echo value > ' + sys.argv[1])", str(place / "file"))
            # Whose redirection it is, only CAP_SYS_PTRACE shows; without it there are two versions.
            assert os.getxattr(place / "file", "user.etcd.version") == b"1"
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(TIMEOUT_S) == 0


@needs_root
@pytest.mark.programs("setpriv")
@pytest.mark.skipif(not may_look(), reason="the kernel does not tell us who has a file open")
def test_b44_the_unit_lets_a_read_only_mount_see_what_is_open(shared_etcd: EtcdProcess) -> None:
    with public_directory() as home:
        manager = Manager(home)
        # Files of another user: a lease on one takes CAP_LEASE.
        options = (
            "--endpoints",
            shared_etcd.client_url,
            "--cache",
            "--read-only",
            "--uid",
            "65534",
        )
        with manager.started(*options, "--file-mode", "600", confine=confinement()):
            manager.hear("READY=1\n")
            path = manager.mountpoint / "opened" / "by-whom"
            inodes = set()
            with closing(Client(shared_etcd.endpoint)) as client:
                for value in (b"1", b"2", b"3"):
                    revision = client.put(b"/opened/by-whom", value)
                    os.getxattr(manager.mountpoint, f"user.etcdfs.wait.{revision}")
                    assert path.read_bytes() == value
                    inodes.add(path.stat().st_ino)
            assert len(inodes) == 1, "one that is not known to be closed gets another"


def confinement() -> tuple[str, ...]:
    """Return what starts a program with the rights that the unit leaves it."""
    unit = (DATA / "lib/systemd/system/etcdfs@.service").read_text()
    assert "\nNoNewPrivileges=yes\n" in unit
    assert "\nMemoryDenyWriteExecute=yes\n" in unit
    (kept,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    bounds = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in kept.split())])
    return (
        *("setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set={bounds}"),
        *(sys.executable, "-c", _DENY_WRITE_EXECUTE),
    )


def test_b94_the_life_of_a_mount_in_its_log(own_etcd: EtcdProcess) -> None:
    with Mounted(own_etcd, "--cache", "--log-format", "json") as mounted:
        own_etcd.kill()
        own_etcd.start()
        revision = mounted.put("/a", "1")
        mounted.close()
    lines = [json.loads(line) for line in mounted.log.splitlines()]
    assert {line["mountpoint"] for line in lines} == {str(mounted.path)}
    events = [(line["event"], line) for line in lines if "event" in line]
    names = [name for name, _ in events]
    assert names[:3] == ["synced", "mounted", "lost"]
    assert names[-2:] == ["regained", "unmounted"]
    assert set(names[3:-2]) <= {"lost"}
    told = dict(reversed(events))
    assert told["synced"]["keys"] == 0
    assert told["lost"]["attempt"] == 1
    assert told["regained"]["seconds"] > 0
    assert told["regained"]["revision"] == revision - 1


def test_b94_no_line_of_the_log_has_a_value_or_a_password(own_etcd: EtcdProcess) -> None:
    options = ("--cache", "--log-level", "debug", "--timeout", "1")
    with Mounted(own_etcd, *options, "--user", "me:hush-hush") as mounted:
        mounted.expect_log("")
        (mounted.path / "ours").write_text("not-for-the-log")
        mounted.put("/theirs", "not-for-the-log")
        assert (mounted.path / "theirs").read_text() == "not-for-the-log"
        os.setxattr(mounted.path / "ours", "user.note", b"not-for-the-log")
        own_etcd.kill()
        with pytest.raises(OSError, match=r".+"):
            (mounted.path / "ours").write_text("not-for-the-log")
        own_etcd.start()
        mounted.put("/theirs", "not-for-the-log again")
        mounted.close()
    assert mounted.log.count("\n") > 5
    assert "not-for-the-log" not in mounted.log
    assert "hush-hush" not in mounted.log
