"""The mountpoint, on made-up mount tables and with a made-up fusermount3: nothing is mounted."""

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import etcdfs.process.mountpoint
import etcdfs.process.processes
from etcdfs.errors import (
    AlreadyMountedError,
    CommandError,
    FuseMissingError,
    MountpointMissingError,
    MountpointNotADirectoryError,
    MountpointNotEmptyError,
    NotMountedError,
    UnmountError,
)
from etcdfs.process.mountpoint import (
    Mounted,
    check_fuse,
    claimed,
    clear_dead,
    parse_mountinfo,
    prepare,
    resolve,
    unmount,
)
from etcdfs.process.processes import find_daemon, find_server
from tests.support.nobody import needs_root, public_directory, running_as_nobody

STALE = (
    "a killed daemon left a stale mount on %s, which is to be replaced; if nobody killed "
    "it, its log or the kernel's tells whether memory ran out"
)

TABLE = rb"""22 28 0:21 / /proc rw,nosuid,nodev - proc proc rw
28 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
90 28 0:50 / /mnt/a\040b rw,nosuid master:3 shared:4 - fuse.etcdfs etcd:\134x rw,user_id=0
91 28 0:51 / /mnt/a\040b rw,nosuid - fuse.sshfs host: rw,user_id=0
"""


def escaped(path: str) -> bytes:
    """Return a field as the kernel writes it (mangle in fs/proc_namespace.c)."""
    return b"".join(
        b"\\%03o" % byte if byte in b" \t\n\\" else bytes((byte,)) for byte in os.fsencode(path)
    )


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a mount table of our own; nothing is mounted in it."""
    table = tmp_path / "mountinfo"
    table.write_bytes(b"28 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n")
    monkeypatch.setattr(etcdfs.process.mountpoint, "_MOUNTINFO", table)
    monkeypatch.setattr(etcdfs.process.mountpoint, "_DEVICE", Path("/dev/null"))
    monkeypatch.setattr(
        etcdfs.process.mountpoint, "mount_tables", lambda: iter([table.read_bytes()])
    )
    for place in ("_RUN", "_TMP"):
        monkeypatch.setattr(etcdfs.process.mountpoint, place, tmp_path)
    return table


@pytest.fixture
def place(tmp_path: Path) -> str:
    """Return an empty directory."""
    place = tmp_path / "place"
    place.mkdir()
    return str(place)


def enter(table: Path, path: str, kind: str = "fuse.etcdfs") -> None:
    """Write a mount into the table."""
    options = f"rw,user_id={os.geteuid()},group_id=0".encode()
    line = b"90 28 0:50 / %b rw - %b etcd %b\n" % (escaped(path), kind.encode(), options)
    table.write_bytes(table.read_bytes() + line)


@pytest.fixture
def fusermount3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Path) -> Path:
    """Put a fusermount3 on PATH that notes its arguments and unmounts everything of ours."""
    return install(tmp_path, monkeypatch, f'sed -i /fuse.etcdfs/d "{table}"')


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Put a fusermount3 on PATH; return the file in which it notes its arguments."""
    home = tmp_path / "bin"
    home.mkdir()
    program = home / "fusermount3"
    notes = tmp_path / "notes"
    program.write_text(f'#!/bin/sh\necho "$@" >> "{notes}"\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(home), prepend=":")
    return notes


@contextlib.contextmanager
def daemon(
    mountpoint: str,
    ends_after: Path | None = None,
    *,
    device: str = "0:50",
    module: str = "etcdfs.daemon.main",
) -> Iterator[int]:
    """Run a process that looks like the daemon of a mountpoint; it may end after a FIFO opens."""
    code = "import sys; from etcdfs.process.processes import take_name; "
    code += f"take_name({device!r}); print(flush=True); open(sys.argv[1]).read()"
    arguments = [str(ends_after or "/dev/stdin"), "-m", module, mountpoint, "--x"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


# --- looking --------------------------------------------------------------------------------


def test_mountinfo_is_understood() -> None:
    mounts = list(parse_mountinfo(TABLE))
    assert [m.path for m in mounts] == ["/proc", "/", "/mnt/a b", "/mnt/a b"]
    assert mounts[2] == Mounted(
        path="/mnt/a b", type="fuse.etcdfs", source="etcd:\\x", device="0:50", owner=0
    )
    assert mounts[1].owner is None
    assert [m.ours for m in mounts] == [False, False, True, False]


@given(st.binary(min_size=1).filter(lambda raw: b"\0" not in raw))
def test_mountinfo_has_any_path(raw: bytes) -> None:
    path = "/" + os.fsdecode(raw)
    line = b"90 28 0:50 / %b rw - fuse.etcdfs etcd rw\n" % escaped(path)
    assert [m.path for m in parse_mountinfo(line)] == [path]


def test_own_mountinfo_is_understood() -> None:
    assert etcdfs.process.mountpoint.find_mounted("/proc") is not None


def test_resolve_follows_links_and_dots(table: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(place)
    (tmp_path / "up").symlink_to(tmp_path.parent)
    assert resolve(str(tmp_path / "link")) == place
    assert resolve(f"{place}/../place/") == place
    assert resolve(str(tmp_path / "up" / tmp_path.name / "place")) == place
    assert resolve(str(tmp_path / "missing")) == str(tmp_path / "missing")


def test_resolve_does_not_touch_what_is_mounted(
    table: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(table, place)
    touched = []
    lstat = os.lstat

    def spy(path: str, **options: int) -> os.stat_result:
        touched.append(str(path))
        return lstat(path, **options)

    monkeypatch.setattr(os, "lstat", spy)
    assert resolve(place) == place
    assert place not in touched


def test_daemon_is_found_by_its_command_line(place: str) -> None:
    with daemon(place) as pid:
        assert find_daemon(place) == pid
        assert find_daemon(place + "x") is None
    assert find_daemon(place) is None


def test_a_daemon_from_before_an_upgrade_is_found(place: str) -> None:
    """Its module had another name, and it goes on until it is unmounted."""
    with daemon(place, module="etcdfs.mount") as pid:
        assert find_server(place, "0:50", os.getuid()) == pid


def test_a_daemon_in_another_container_is_not_ours(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with daemon(place):
        monkeypatch.setattr(etcdfs.process.processes, "_MOUNT_NAMESPACE", Path("/proc/self/ns/net"))
        assert find_daemon(place) is None


def test_the_daemon_of_a_mount_is_told_from_another_of_its_mountpoint(place: str) -> None:
    me = os.geteuid()
    with daemon(place, device="0:49"), daemon(place, device="0:1234567890") as pid:
        assert find_server(place, "0:50", me) is None
        assert find_server(place, "0:1234567890", me) == pid
        assert find_server(place, "0:1234567890", None) == pid
        assert find_server(place, "0:1234567890", me + 1) is None


def test_b102_what_does_not_run_python_is_no_daemon(place: str) -> None:
    script = "printf 'etcdfs 0:50' > /proc/self/comm; echo; read line"
    command = ["sh", "-c", script, "-m", "etcdfs.daemon.main", place]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        assert find_daemon(place) == process.pid
        assert find_server(place, "0:50", os.geteuid()) is None
        process.stdin.close()


_IMPOSTOR = """
ctypes.CDLL(None).prctl(15, b"etcdfs 0:50", 0, 0, 0)  # PR_SET_NAME
print("up", flush=True)
signal.pause()
"""


@needs_root
@pytest.mark.expect_log(STALE)
def test_b102_another_users_process_is_no_daemon(
    table: Path, place: str, fusermount3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(table, place)
    with running_as_nobody(_IMPOSTOR, "-m", "etcdfs.daemon.main", place) as impostor:
        assert find_daemon(place) == impostor.pid
        unmount(place, timeout_s=0)
        enter(table, place)
        monkeypatch.setattr(etcdfs.process.mountpoint, "_is_dead", lambda path: path == place)
        prepare(place)
    assert fusermount3.read_text() == f"-u -- {place}\n"


def test_a_mountpoint_that_leads_nowhere_is_refused(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(MountpointMissingError, match="Too many levels of symbolic links"):
        resolve(str(tmp_path / "loop"))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(MountpointMissingError, match="No such file or directory"):
        resolve("here")


# --- before mounting ------------------------------------------------------------------------


def test_an_empty_directory_can_be_mounted_over(table: Path, place: str) -> None:
    prepare(place)


@pytest.mark.parametrize(
    ("path", "error", "complaint"),
    [
        ("missing", MountpointMissingError, "does not exist"),
        ("file", MountpointNotADirectoryError, "is not a directory"),
        ("file/below", MountpointMissingError, "below a file"),
        ("full", MountpointNotEmptyError, "is not empty"),
        ("n" * 300, MountpointMissingError, "File name too long"),
    ],
)
def test_other_mountpoints_are_refused(
    table: Path, tmp_path: Path, path: str, error: type[CommandError], complaint: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full" / "of").mkdir(parents=True)
    with pytest.raises(error, match=complaint):
        prepare(str(tmp_path / path))


def test_a_mount_of_others_is_refused(table: Path, place: str) -> None:
    enter(table, place, "ext4")
    with pytest.raises(AlreadyMountedError, match="ext4"):
        prepare(place)


def test_a_live_mount_of_ours_is_refused_untouched(table: Path, place: str) -> None:
    enter(table, place)
    with daemon(place), pytest.raises(AlreadyMountedError, match=r"mounted on .* already"):
        prepare(place)


def test_a_mount_of_ours_that_answers_is_refused(table: Path, place: str) -> None:
    enter(table, place)  # its daemon may be in another container
    with pytest.raises(AlreadyMountedError, match=r"mounted on .* already"):
        prepare(place)


@pytest.mark.expect_log(STALE)
def test_a_stale_mount_stays_until_its_successor_is_about_to_mount(
    table: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = install(tmp_path, monkeypatch, f'sed -i /fuse.etcdfs/d "{table}"')
    enter(table, place)
    monkeypatch.setattr(etcdfs.process.mountpoint, "_is_dead", lambda path: path == place)
    prepare(place)
    with claimed(place) as claim:
        assert not notes.exists()
        claim.check()
    assert notes.read_text() == f"-uz -- {place}\n"


def test_what_is_below_a_stale_mount_is_not_hidden(
    table: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, f'sed -i /fuse.etcdfs/d "{table}"')
    enter(table, place)
    monkeypatch.setattr(etcdfs.process.mountpoint, "_is_dead", lambda path: path == place)
    Path(place, "file").touch()
    with claimed(place) as claim, pytest.raises(MountpointNotEmptyError):
        claim.check()


def test_clear_dead_leaves_what_lives(
    table: Path, place: str, fusermount3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear_dead(place)
    enter(table, place)
    clear_dead(place)
    with daemon(place):
        clear_dead(place)
    assert not fusermount3.exists()
    monkeypatch.setattr(etcdfs.process.mountpoint, "_is_dead", lambda path: path == place)
    clear_dead(place)
    assert fusermount3.read_text() == f"-uz -- {place}\n"


def test_without_the_device_nothing_is_mounted(tmp_path: Path) -> None:
    with pytest.raises(FuseMissingError, match="modprobe fuse"):
        check_fuse(tmp_path / "fuse")


def test_with_a_device_that_cannot_be_opened_nothing_is_mounted(tmp_path: Path) -> None:
    with pytest.raises(FuseMissingError, match="cannot be opened: Is a directory"):
        check_fuse(tmp_path)


def test_only_root_does_without_fusermount3(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    check_fuse(Path("/dev/null"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(FuseMissingError, match="fusermount3"):
        check_fuse(Path("/dev/null"))


def test_a_mountpoint_is_claimed_by_one_daemon_at_a_time(table: Path, place: str) -> None:
    with claimed(place) as claim:
        with pytest.raises(AlreadyMountedError, match="another etcdfs is about to mount"):
            claimed(place).__enter__()
        enter(table, place)
        with pytest.raises(AlreadyMountedError, match="etcdfs is mounted on"):
            claim.check()
        table.write_bytes(TABLE)
        claim.release()
        with claimed(place):
            pass


@needs_root
def test_b102_a_lock_on_the_mountpoint_is_no_claim(table: Path) -> None:
    code = (
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print('locked', flush=True)"
    )
    with public_directory() as place, running_as_nobody(f"{code}; signal.pause()", str(place)):
        with pytest.raises(BlockingIOError):
            fcntl.flock(os.open(place, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        with claimed(str(place)):
            pass


def test_b102_claims_are_where_others_cannot_go(
    table: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user, claims in ((0, tmp_path / "etcdfs"), (1000, tmp_path / "etcdfs-1000")):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        with contextlib.suppress(PermissionError):
            etcdfs.process.mountpoint._lock_directory()
        assert claims.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("planted", ["wide", "link"])
def test_b102_a_directory_that_somebody_else_has_made_is_not_used(
    table: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    claims = tmp_path / ("etcdfs" if os.geteuid() == 0 else f"etcdfs-{os.geteuid()}")
    if planted == "wide":
        claims.mkdir()
        claims.chmod(0o755)
    else:
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        claims.symlink_to("elsewhere")
    with claimed(place):
        pass
    assert list(claims.iterdir()) == []


def test_what_was_mounted_meanwhile_cannot_be_claimed(
    table: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = etcdfs.process.mountpoint._lock

    def slower(path: str) -> int | None:
        enter(table, path)
        return lock(path)

    monkeypatch.setattr(etcdfs.process.mountpoint, "_lock", slower)
    with pytest.raises(AlreadyMountedError, match="etcdfs is mounted on"):
        claimed(place).__enter__()


def test_a_claim_does_not_need_locks(
    table: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(place):
        pass


# --- taking away ----------------------------------------------------------------------------


def test_unmount_waits_for_the_daemon(
    table: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    notes = install(tmp_path, monkeypatch, f'sed -i /fuse.etcdfs/d "{table}"; : > "{fifo}"')
    enter(table, place)
    with daemon(place, ends_after=fifo):
        unmount(place, timeout_s=30)
        assert find_daemon(place) is None
    assert notes.read_text() == f"-u -- {place}\n"


@pytest.mark.expect_log(
    "%s is free; its daemon (process %d) goes on serving a copy of the mount, as a container has it"
)
def test_unmount_does_not_wait_for_what_is_mounted_elsewhere(
    table: Path, place: str, fusermount3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(table, place)
    elsewhere = table.read_bytes()
    monkeypatch.setattr(etcdfs.process.mountpoint, "mount_tables", lambda: iter([TABLE, elsewhere]))
    with daemon(place):
        unmount(place, timeout_s=30)


def test_unmount_does_not_wait_for_ever(table: Path, place: str, fusermount3: Path) -> None:
    enter(table, place)
    with daemon(place) as pid, pytest.raises(UnmountError, match=rf"process {pid}.*within 0.05 s"):
        unmount(place, timeout_s=0.05)


def test_unmount_of_a_dead_mount_is_lazy(
    table: Path, place: str, fusermount3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(table, place)
    monkeypatch.setattr(etcdfs.process.mountpoint, "_is_dead", lambda path: path == place)
    unmount(place, timeout_s=1)
    assert fusermount3.read_text() == f"-uz -- {place}\n"


def test_unmount_wants_a_mount_of_ours(table: Path, place: str) -> None:
    with pytest.raises(NotMountedError, match="nothing is mounted"):
        unmount(place, timeout_s=1)
    enter(table, place, "fuse.sshfs")
    with pytest.raises(NotMountedError, match=r"is not etcdfs, but fuse\.sshfs"):
        unmount(place, timeout_s=1)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("fusermount3: failed to unmount /x: Device or resource busy", "is busy: a program"),
        ("fusermount3: entry for /x not found in /etc/mtab", "unmounted: .* not found"),
        ("", "no reason given"),
    ],
)
def test_unmount_says_why_not(
    table: Path,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    complaint: str,
) -> None:
    install(tmp_path, monkeypatch, f'echo "{said}" >&2; exit 1')
    enter(table, place)
    with daemon(place), pytest.raises(UnmountError, match=complaint):
        unmount(place, timeout_s=1)


@pytest.mark.expect_log("%s is free; its daemon (process %d) goes on serving those who are inside")
def test_a_lazy_unmount_is_one_only_if_it_must_be(
    table: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'echo "$*" >>"$0.notes"; [ "$1" != -u ] || { echo busy >&2; exit 1; }'
    install(tmp_path, monkeypatch, script)
    enter(table, place)
    with daemon(place):
        unmount(place, timeout_s=1, lazy=True)
    notes = tmp_path / "bin" / "fusermount3.notes"
    assert notes.read_text() == f"-u -- {place}\n-uz -- {place}\n"


def test_unmount_uses_umount_where_fusermount3_is_missing(
    table: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = install(tmp_path, monkeypatch, f'sed -i /fuse.etcdfs/d "{table}"')
    (tmp_path / "bin" / "fusermount3").rename(tmp_path / "bin" / "umount")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    enter(table, place)
    unmount(place, timeout_s=1)
    assert notes.read_text() == f"-- {place}\n"
