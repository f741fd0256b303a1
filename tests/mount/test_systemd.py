"""The unit under a systemd, on a machine of the test's own: all of it, confinement included."""

import json
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from etcdfs.daemon.kernel_threads import may_look
from tests.support.churn import until
from tests.support.etcd_process import EtcdProcess
from tests.support.nobody import needs_root
from tests.support.private_root import PrivateRoot

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.etcd,
    needs_root,
    pytest.mark.skipif(not Path("/lib/systemd/systemd").exists(), reason="no systemd"),
]

UNIT = "etcdfs@mnt-etcd.service"
DROP_IN = f"""
[Unit]
DefaultDependencies=no
Wants=
After=
[Service]
Environment=PYTHONPATH={":".join(sys.path)}
StandardError=file:/run/etcdfs.log
RestartSec=100ms
WatchdogSec=5
TimeoutAbortSec=1
"""

SIGNAL_AND_WAIT = """
import os, select, sys
pid, number = map(int, sys.argv[1:])
poll = select.poll()
poll.register(os.pidfd_open(pid), select.POLLIN)
os.kill(pid, number)
poll.poll()
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[PrivateRoot]:
    with PrivateRoot(boots=True) as machine:
        machine.run(
            f"""
            "$1" install-helper
            mkdir -p /mnt/etcd /etc/etcdfs /etc/systemd/system/{UNIT}.d
            echo "$2" >/etc/systemd/system/{UNIT}.d/test.conf
            systemctl daemon-reload
            """,
            str(Path(sys.executable).with_name("etcdfs")),
            DROP_IN,
        )
        yield machine


def configure(machine: PrivateRoot, **options: str) -> None:
    lines = "\n".join(f"ETCDFS_{name.upper()}={value}" for name, value in options.items())
    machine.run('echo "$1" >/etc/etcdfs/mnt-etcd.conf', lines)


def shown(machine: PrivateRoot, *properties: str) -> list[str]:
    return [machine.run(f"systemctl show -P {name} {UNIT}").strip() for name in properties]


def is_running_anew(machine: PrivateRoot, before: str, *, restarts: int) -> bool:
    after, times, state = shown(machine, "MainPID", "NRestarts", "ActiveState")
    return after != before and int(times) >= restarts and state == "active"


def test_b92_a_service_of_systemd(machine: PrivateRoot, shared_etcd: EtcdProcess) -> None:
    configure(machine, endpoints=shared_etcd.client_url)
    # It has started when the mount is usable.
    machine.run(f"systemctl start {UNIT}; echo value >/mnt/etcd/test-systemd")
    assert shared_etcd.etcdctl("get", "--print-value-only", "/test-systemd") == b"value\n\n"
    status, state = shown(machine, "StatusText", "ActiveState")
    assert state == "active"
    assert status.startswith(("Mounted", "Revision "))

    # Before systemd 253 a reload may be over before the daemon has said that it begins.
    machine.run(f"systemctl reload {UNIT}")
    until(lambda: "SIGHUP: reading certificates" in machine.run("cat /run/etcdfs.log"))

    # One that dies is started again, and one that hangs.
    for number, sent in enumerate((signal.SIGKILL, signal.SIGSTOP), 1):
        (before,) = shown(machine, "MainPID")
        machine.run(f'"$1" -c "$2" {before} {sent:d}', sys.executable, SIGNAL_AND_WAIT)
        # systemd may not have heard yet that it is dead: to start it would be nothing to do.
        until(partial(is_running_anew, machine, before, restarts=number))
        assert machine.run("cat /mnt/etcd/test-systemd") == "value\n"

    # It stops with all that was written published.
    machine.run(
        f"""
        exec 3>/mnt/etcd/test-systemd; echo last >&3
        systemctl stop {UNIT}
        """
    )
    assert shown(machine, "Result", "ActiveState") == ["success", "inactive"]
    assert machine.run("ls /mnt/etcd") == ""
    assert shared_etcd.etcdctl("get", "--print-value-only", "/test-systemd") == b"last\n\n"


def test_b92_a_service_starts_with_its_last_state_while_etcd_is_away(
    machine: PrivateRoot, own_etcd: EtcdProcess
) -> None:
    configure(machine, endpoints=own_etcd.client_url, wait_for_etcd="0", timeout="1")
    machine.run(f"systemctl start {UNIT}; echo value >/mnt/etcd/kept; systemctl stop {UNIT}")
    own_etcd.kill()
    machine.run(f"systemctl start {UNIT}")
    assert machine.run("cat /mnt/etcd/kept") == "value\n"
    assert machine.attempt("echo new >/mnt/etcd/kept").returncode != 0
    own_etcd.start()
    machine.run(f"systemctl stop {UNIT}")


_PATH_UNITS = """
[Path]
{kind}=/mnt/etcd/path-units/{name}
Unit=reload@{kind}.service
[Unit]
DefaultDependencies=no
"""

_RELOADER = """
[Unit]
DefaultDependencies=no
StartLimitIntervalSec=0
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'cat /mnt/etcd/path-units/* >/run/reloaded-%i'
"""


_WHAT_IS_THERE = f"""
head /mnt/etcd/path-units/* /run/reloaded-* || true
systemctl --no-pager status {UNIT} 'on-*' 'reload@*' || true
tail -n 20 /run/etcdfs.log; cat /mnt/etcd/.etcdfs/status
"""


@pytest.mark.parametrize("name", ["conf", ""], ids=["file", "directory"])
def test_b128_path_units_start_what_waits_for_a_change(
    machine: PrivateRoot, shared_etcd: EtcdProcess, name: str
) -> None:
    configure(machine, endpoints=shared_etcd.client_url)
    shared_etcd.etcdctl("put", "/path-units/conf", "0")
    shared_etcd.etcdctl("put", "/.etcdfs/attrs//path-units/conf", '{"mode":"0644","uid":1}')
    kinds = ("PathChanged", "PathModified")
    machine.run(f"systemctl start {UNIT}")
    for kind in kinds:
        unit = _PATH_UNITS.format(kind=kind, name=name)
        machine.run(f'echo "$1" >/etc/systemd/system/on-{kind}.path', unit)
    machine.run(
        """
        echo "$1" >/etc/systemd/system/reload@.service
        systemctl daemon-reload; systemctl start on-PathChanged.path on-PathModified.path
        """,
        _RELOADER,
    )

    def is_reloaded(kind: str, value: str) -> bool:
        return machine.run(f"cat /run/reloaded-{kind} || true") == value

    try:
        for value in ("1", "22", "333"):
            shared_etcd.etcdctl("put", "/path-units/conf", value)
            for kind in kinds:
                until(partial(is_reloaded, kind, value))
    except AssertionError as exc:
        exc.add_note(machine.run(_WHAT_IS_THERE))
        raise
    finally:
        machine.run(f"systemctl stop on-PathChanged.path on-PathModified.path {UNIT}")


def test_b94_the_journal_has_events_with_their_figures(
    machine: PrivateRoot, shared_etcd: EtcdProcess
) -> None:
    configure(machine, endpoints=shared_etcd.client_url, log_format="journal", prefix="/journal")
    machine.run(
        f"""
        systemctl start systemd-journald.socket systemd-journald.service {UNIT}
        systemctl stop {UNIT}
        journalctl --sync
        """
    )
    told = machine.run("journalctl -o json ETCDFS_MOUNTPOINT=/mnt/etcd")
    lines = [json.loads(line) for line in told.splitlines()]
    events = [line for line in lines if "ETCDFS_EVENT" in line]
    assert [event["ETCDFS_EVENT"] for event in events] == [*("synced", "mounted", "unmounted")]
    assert events[0]["ETCDFS_KEYS"] == "0"
    assert {event["_SYSTEMD_UNIT"] for event in events} == {UNIT}
    assert {event["PRIORITY"] for event in events} == {"6"}


def test_b93_a_line_of_fstab_is_a_mount_of_systemd(
    machine: PrivateRoot, shared_etcd: EtcdProcess
) -> None:
    """At boot it is systemd that reads fstab; the daemon outlives the command that started it."""
    shared_etcd.etcdctl("put", "/fstab/test-systemd", "value")
    line = f"{shared_etcd.endpoint}/fstab /mnt/fstab etcdfs cache,_netdev,nofail,noauto 0 0"
    machine.run(
        """
        mkdir /mnt/fstab; echo "$1" >>/etc/fstab
        systemctl set-environment PYTHONPATH="$PYTHONPATH"
        systemctl daemon-reload; systemctl start mnt-fstab.mount
        """,
        line,
    )
    state, kind = (
        machine.run(f"systemctl show -P {name} mnt-fstab.mount") for name in ("ActiveState", "Type")
    )
    assert (state, kind) == ("active\n", "fuse.etcdfs\n")
    assert machine.run("cat /mnt/fstab/test-systemd") == "value"
    assert machine.run("systemctl stop mnt-fstab.mount; ls /mnt/fstab") == ""


@pytest.mark.skipif(not may_look(), reason="the kernel does not tell us who has a file open")
def test_b44_a_read_only_service_sees_what_is_open(
    machine: PrivateRoot, shared_etcd: EtcdProcess
) -> None:
    """No filter of system calls is in the way, and no right is missing for another user's file."""
    configure(machine, endpoints=shared_etcd.client_url, read_only="true")
    shared_etcd.etcdctl("put", "/theirs", "0")
    shared_etcd.etcdctl("put", "/.etcdfs/attrs//theirs", '{"mode":"0600","uid":1}')
    machine.run(f"systemctl start {UNIT}")
    try:
        status = json.loads(machine.run("cat /mnt/etcd/.etcdfs/status"))
        assert "NO_OPEN" in status["fast_path"]
        shown_by = set()
        for value in ("1", "22", "333"):
            told = shared_etcd.etcdctl("put", "/theirs", value, "--write-out=json")
            # Not by reading it: what somebody reads at that moment is open.
            revision = json.loads(told)["header"]["revision"]
            machine.run(f"getfattr -n user.etcdfs.wait.{revision} /mnt/etcd")
            assert machine.run("cat /mnt/etcd/theirs") == value
            shown_by.add(machine.run("stat -c %i /mnt/etcd/theirs"))
        assert len(shown_by) == 1, "what is not known to be closed gets another inode"
    finally:
        machine.run(f"systemctl stop {UNIT}")
