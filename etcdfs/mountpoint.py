"""The directory that is mounted over: whether it can be, what is there, how it is taken away.

What this room knows: /proc/self/mountinfo, fusermount3, and how to find the daemon of a mount.
What it must not know: pyfuse3, and what the mount shows.

A mount whose daemon hangs blocks whoever touches it, for good: nothing here touches a mounted
directory before it is known that no daemon of ours serves it. The daemon is found by its
command line in /proc, which needs no runtime files that could be stale, and is watched through
a pidfd, so that its end is heard of without polling.

Concurrency: plain blocking calls of the command line, each bounded.
"""

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import re
import select
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from etcdfs.errors import (
    AlreadyMountedError,
    FuseMissingError,
    MountpointMissingError,
    MountpointNotADirectoryError,
    MountpointNotEmptyError,
    NotMountedError,
    UnmountError,
)
from etcdfs.spawn import DAEMON_MODULE

log = logging.getLogger(__name__)

SUBTYPE: Final = "etcdfs"
"""Mount with `subtype=` this: /proc/mounts then shows the type `fuse.etcdfs`."""

_TYPE: Final = f"fuse.{SUBTYPE}"
_DEVICE: Final = Path("/dev/fuse")
_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_MOUNT_NAMESPACE: Final = Path("/proc/self/ns/mnt")
_CONNECTIONS: Final = Path("/sys/fs/fuse/connections")
_MNT_FORCE: Final = 1  # mount(2); Python has neither
_MNT_DETACH: Final = 2
_COMMAND_TIMEOUT_S: Final = 30.0
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mounted:
    """What is mounted at a place.

    Attributes:
        path: The absolute path of the mountpoint.
        type: The file system type, `fuse.etcdfs` for ours.
        source: What is mounted, as mount(8) shows it.
        device: `MAJOR:MINOR`, the file system's own.
    """

    path: str
    type: str
    source: str
    device: str

    @property
    def ours(self) -> bool:
        """Tell whether etcdfs mounted it."""
        return self.type == _TYPE


# --- looking --------------------------------------------------------------------------------


def parse_mountinfo(text: bytes) -> Iterator[Mounted]:
    """Yield the mounts of /proc/self/mountinfo (proc(5)), oldest first."""
    for line in text.removesuffix(b"\n").split(b"\n"):
        before, _, after = line.partition(b" - ")
        device, _, path = before.split(b" ")[2:5]
        kind, source = after.split(b" ")[:2]
        yield Mounted(
            path=_unescape(path),
            type=_unescape(kind),
            source=_unescape(source),
            device=device.decode(),
        )


def _unescape(field: bytes) -> str:
    r"""Return a field of mountinfo; blanks and backslashes in it are octal (`\040`)."""
    return os.fsdecode(_OCTAL.sub(lambda match: bytes((int(match[1], 8),)), field))


def find_mounted(path: str) -> Mounted | None:
    """Return what is mounted at an absolute path, the topmost; None if nothing is."""
    mounts = parse_mountinfo(_MOUNTINFO.read_bytes())
    return next((m for m in reversed(list(mounts)) if m.path == path), None)


def resolve(path: str) -> str:
    """Return the absolute path of a mountpoint, without touching what is mounted there.

    Raises:
        MountpointMissingError: It leads nowhere: a loop of links, or no current directory.
    """
    try:
        return _resolve(Path(path))
    except RuntimeError:  # pathlib's, up to Python 3.12
        why = os.strerror(errno.ELOOP)
    except OSError as exc:
        why = exc.strerror or str(exc)
    raise MountpointMissingError(f"the mountpoint {path} cannot be reached: {why}")


def _resolve(given: Path) -> str:
    # `..` cannot be left for later: it means the parent of what a symbolic link points to.
    if given.name not in {"", ".."}:
        lexical = str(given.parent.resolve() / given.name)
        if find_mounted(lexical) is not None:
            return lexical
    return str(given.resolve())


def find_daemon(mountpoint: str, but_for: int | None = None) -> int | None:
    """Return the process id of the daemon that serves a mountpoint; None if there is none.

    This process does not count: it may be a daemon that is about to mount; nor does `but_for`,
    which this process may have started.

    Processes of other users are found too, unless /proc hides them (its option `hidepid`).
    """
    wanted = [b"-m", DAEMON_MODULE.encode(), os.fsencode(mountpoint)]
    not_these = {str(os.getpid()), str(but_for)}
    with os.scandir("/proc") as entries:
        for entry in entries:
            if (
                entry.name.isdigit()
                and entry.name not in not_these
                and _has_arguments(Path(entry.path), wanted)
                and _shares_mounts(Path(entry.path))
            ):
                return int(entry.name)
    return None


def _has_arguments(process: Path, wanted: list[bytes]) -> bool:
    """Tell whether a process was started with these arguments, in a row."""
    try:
        arguments = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:  # it ended meanwhile, or is hidden
        return False
    return any(arguments[i : i + len(wanted)] == wanted for i in range(1, len(arguments)))


def _shares_mounts(process: Path) -> bool:
    """Tell whether a process sees the mounts that we see, not those of a container.

    Another user's process does not say (ptrace(2), access mode checking); most likely it does.
    """
    try:
        return (process / "ns" / "mnt").readlink() == _MOUNT_NAMESPACE.readlink()
    except OSError:
        return True


# --- before mounting ------------------------------------------------------------------------


def prepare(mountpoint: str, early: int | None = None) -> None:
    """Make sure that a directory can be mounted over; clear what a killed daemon left there.

    Args:
        mountpoint: As `resolve` returns it.
        early: A daemon that waits for its options, which may be to mount there.

    Raises:
        CommandError: It cannot; the class says why.
    """
    mounted = find_mounted(mountpoint)
    if mounted is not None:
        _clear_if_stale(mounted, early)
    _check_directory(mountpoint)
    check_fuse(_DEVICE)


@contextlib.contextmanager
def claimed(mountpoint: str) -> Iterator[None]:
    """Prepare a mountpoint, and keep other daemons off it while the body runs.

    Two that mount on one directory would both succeed, one hidden below the other. The lock is
    on the directory itself, and the kernel takes it away with the process.

    Raises:
        CommandError: As `prepare`; or another daemon was quicker.
    """
    prepare(mountpoint)
    try:
        fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise MountpointMissingError(
            f"the mountpoint {mountpoint} cannot be used: {exc.strerror}"
        ) from None
    try:
        _lock(fd, mountpoint)
        # What was opened may be the root of a mount that was made meanwhile.
        if find_mounted(mountpoint) is not None:
            raise AlreadyMountedError(f"{mountpoint} is a mountpoint already")
        yield
    finally:
        os.close(fd)


def _lock(fd: int, mountpoint: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AlreadyMountedError(f"another etcdfs is about to mount on {mountpoint}") from None
    except OSError as exc:  # a file system without locks
        log.debug("%s cannot be locked: %s", mountpoint, exc)


def check_fuse(device: Path = _DEVICE) -> None:
    """Make sure that this process can mount by FUSE.

    Raises:
        FuseMissingError: The device or, for anybody but root, fusermount3 is missing.
    """
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise FuseMissingError(
            f"there is no {device}: load the kernel module (modprobe fuse), "
            f"or give the container the device (--device {device})"
        ) from None
    except OSError as exc:
        raise FuseMissingError(f"{device} cannot be opened: {exc.strerror}") from None
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise FuseMissingError("there is no fusermount3 on PATH: install the package fuse3")


def _clear_if_stale(mounted: Mounted, early: int | None = None) -> None:
    """Take a dead mount of ours away; anything else that is mounted stays.

    Raises:
        AlreadyMountedError: It is alive, or is not ours.
        UnmountError: It is dead and could not be taken away.
    """
    path = mounted.path
    if not mounted.ours:
        raise AlreadyMountedError(f"{path} is a mountpoint already ({mounted.type})")
    if find_daemon(path, early) is not None or not _is_dead(path):
        raise AlreadyMountedError(f"etcdfs is mounted on {path} already")
    _unmount(path, lazy=True)
    log.warning("cleared the stale mount that a killed daemon left on %s", path)


def clear_dead(mountpoint: str) -> None:
    """Take a mount of ours away if its daemon is dead; otherwise do nothing.

    Raises:
        UnmountError: It could not be taken away.
    """
    mounted = find_mounted(mountpoint)
    if mounted is not None and mounted.ours and find_daemon(mountpoint) is None:
        with contextlib.suppress(AlreadyMountedError):
            _clear_if_stale(mounted)


def _is_dead(path: str) -> bool:
    """Tell whether a mount has lost its daemon. Only asked when no daemon of ours is found.

    statfs is a question that the kernel passes on each time; a stat it may still answer from
    the attributes that the dead daemon let it keep.
    """
    try:
        os.statvfs(path)
    except OSError as exc:
        return exc.errno in {errno.ENOTCONN, errno.ECONNABORTED}
    return False


def _check_directory(mountpoint: str) -> None:
    try:
        if not stat.S_ISDIR(Path(mountpoint).stat().st_mode):
            raise MountpointNotADirectoryError(f"the mountpoint {mountpoint} is not a directory")
        with os.scandir(mountpoint) as entries:
            first = next(entries, None)
    except FileNotFoundError:
        raise MountpointMissingError(f"the mountpoint {mountpoint} does not exist") from None
    except NotADirectoryError:
        raise MountpointMissingError(f"the mountpoint {mountpoint} is below a file") from None
    except OSError as exc:
        raise MountpointMissingError(
            f"the mountpoint {mountpoint} cannot be used: {exc.strerror}"
        ) from None
    if first is not None:
        raise MountpointNotEmptyError(f"the mountpoint {mountpoint} is not empty")


# --- taking away ----------------------------------------------------------------------------


def unmount(mountpoint: str, timeout_s: float) -> None:
    """Unmount and wait until the daemon has ended; a dead mount is cleared.

    Args:
        mountpoint: As `resolve` returns it.
        timeout_s: Bound of the wait.

    Raises:
        NotMountedError: No mount of ours is there.
        UnmountError: It is busy, not permitted, or the daemon did not end in time.
    """
    mounted = find_mounted(mountpoint)
    if mounted is None:
        raise NotMountedError(f"nothing is mounted on {mountpoint}")
    if not mounted.ours:
        raise NotMountedError(f"what is mounted on {mountpoint} is not etcdfs, but {mounted.type}")
    with _watched_daemon(mountpoint) as daemon:
        if daemon is None:
            _unmount(mountpoint, lazy=_is_dead(mountpoint))
            return
        pid, pidfd = daemon
        _unmount(mountpoint, lazy=False)
        if not has_ended(pidfd, timeout_s):
            raise UnmountError(
                f"{mountpoint} is unmounted, but its daemon (process {pid}) "
                f"did not end within {timeout_s:g} s; a container may have a copy of the mount"
            )


def tear_down(mounted: Mounted) -> None:
    """Take a mount of this process away whoever is in it, and have all that wait in it go on.

    Only the last is sure to happen for everybody: unmounting leaves alone who is in it already,
    and whoever waits there may be waiting for this very process. Neither waits for anybody.
    """
    _, _, minor = mounted.device.partition(":")
    with contextlib.suppress(OSError):  # it is mounted where systemd is; the mount's owner may
        (_CONNECTIONS / minor / "abort").write_text("1")
    if os.geteuid() == 0:
        # Not by umount(8), which looks at the place before.
        libc = ctypes.CDLL(None, use_errno=True)
        libc.umount2(os.fsencode(mounted.path), _MNT_FORCE | _MNT_DETACH)
        return
    try:
        _unmount(mounted.path, lazy=True)
    except UnmountError as exc:
        log.warning("%s", exc)


@contextlib.contextmanager
def _watched_daemon(mountpoint: str) -> Iterator[tuple[int, int] | None]:
    """Find the daemon and yield its process id and a pidfd; None if there is none."""
    pid = find_daemon(mountpoint)
    try:
        pidfd = None if pid is None else os.pidfd_open(pid)
    except ProcessLookupError:
        pidfd = None
    if pid is None or pidfd is None:
        yield None
        return
    try:
        yield pid, pidfd
    finally:
        os.close(pidfd)


def has_ended(pidfd: int, timeout_s: float) -> bool:
    """Wait for the end of a process (pidfd_open(2): it is readable then)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _unmount(path: str, *, lazy: bool) -> None:
    """Take a mount away with fusermount3, or with umount(8) where that is missing.

    Raises:
        UnmountError: It stayed.
    """
    if shutil.which("fusermount3") is not None:
        command = ["fusermount3", "-uz" if lazy else "-u", "--", path]
    else:
        command = ["umount", *(["-l"] if lazy else []), "--", path]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=_COMMAND_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise UnmountError(f"{path} could not be unmounted: {exc}") from None
    if done.returncode != 0:
        raise UnmountError(_why_unmount_failed(path, done.stderr.strip()))


def _why_unmount_failed(path: str, said: str) -> str:
    if "busy" in said:
        return f"{path} is busy: a program has a file open or its working directory there"
    return f"{path} could not be unmounted: {said.splitlines()[-1] if said else 'no reason given'}"
