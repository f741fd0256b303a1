"""The directory that is mounted over: whether it can be, what is there, how it is taken away.

Knows: /proc/self/mountinfo, fusermount3, and when a mount counts as dead. Does not know: pyfuse3,
and what the mount shows.

A mount whose daemon hangs blocks whoever touches it, for good: nothing here touches a mounted
directory before it is known that no daemon of ours serves it. The daemon is watched through a
pidfd, so that its end is heard of without polling.

Concurrency: plain blocking calls of the command line, each bounded.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from etcdfs.errors import (
    AlreadyMountedError,
    FuseMissingError,
    FuseRefusedError,
    MountpointMissingError,
    MountpointNotADirectoryError,
    MountpointNotEmptyError,
    NotMountedError,
    UnmountError,
)
from etcdfs.process.processes import find_server, has_ended, mount_tables

log = logging.getLogger(__name__)

SUBTYPE: Final = "etcdfs"
"""Mount with `subtype=` this: /proc/mounts then shows the type `fuse.etcdfs`."""

_TYPE: Final = f"fuse.{SUBTYPE}"
_DEVICE: Final = Path("/dev/fuse")
_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_CONNECTIONS: Final = Path("/sys/fs/fuse/connections")
_SYS_MOUNT_SETATTR: Final = 442  # on every architecture that Linux was ported to of late
_AT_FDCWD: Final = -100
_MOUNT_ATTR_NOSYMFOLLOW: Final = 0x200000
_MNT_FORCE: Final = 1  # mount(2); Python has neither
_MNT_DETACH: Final = 2
_COMMAND_TIMEOUT_S: Final = 30.0
_RUN: Final = Path("/run")
_TMP: Final = Path("/tmp")  # noqa: S108 -- what is in it is checked
_LOCK_NAME: Final = 32  # digits; all of them would do as well
_OWNER: Final = re.compile(rb"(?:^|,)user_id=([0-9]+)(?:,|$)")
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mounted:
    """What is mounted at a place.

    Attributes:
        path: The absolute path of the mountpoint.
        type: The file system type, `fuse.etcdfs` for ours.
        source: What is mounted, as mount(8) shows it.
        device: `MAJOR:MINOR`, the file system's own.
        owner: The user who mounted it, if it is of FUSE.
    """

    path: str
    type: str
    source: str
    device: str
    owner: int | None = None

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
        kind, source, options = after.split(b" ")[:3]
        owner = _OWNER.search(options)
        yield Mounted(
            path=_unescape(path),
            type=_unescape(kind),
            source=_unescape(source),
            device=device.decode(),
            owner=None if owner is None else int(owner[1]),
        )


def _unescape(field: bytes) -> str:
    r"""Return a field of mountinfo; blanks and backslashes in it are octal (`\040`)."""
    return os.fsdecode(_OCTAL.sub(lambda match: bytes((int(match[1], 8),)), field))


def find_mounted(path: str) -> Mounted | None:
    """Return what is mounted at an absolute path, the topmost; None if nothing is."""
    return next((m for m in reversed(find_mounts()) if m.path == path), None)


def find_mounts() -> list[Mounted]:
    """Return all mounts that this process sees, the oldest first."""
    return list(parse_mountinfo(_MOUNTINFO.read_bytes()))


def is_there(mounted: Mounted) -> bool:
    """Tell whether a mount is what stands at its place: it, and no other that was made since."""
    found = find_mounted(mounted.path)
    return found is not None and found.device == mounted.device


def is_mounted_over(device: int, path: bytes) -> bool:
    """Say whether something is mounted at or below a path of a file system (`app/conf`, say).

    In any container that we may look into.
    """
    wanted = b"/" + path
    number = f"{os.major(device)}:{os.minor(device)}".encode()
    return any(
        (covered + b"/").startswith(wanted + b"/")
        for table in mount_tables()
        for covered in _covered(table, number)
    )


def _covered(table: bytes, device: bytes) -> Iterator[bytes]:
    """Yield the paths of a device's file system on which something is mounted."""
    rows = [line.split(b" ", 5) for line in table.splitlines()]
    own = {row[0]: (_path(row[3]), _path(row[4])) for row in rows if row[2] == device}
    for _, parent, _, _, point, _ in rows:
        if parent in own:
            root, at = own[parent]
            yield root.rstrip(b"/") + _path(point)[len(at.rstrip(b"/")) :]


def _path(field: bytes) -> bytes:
    return os.fsencode(_unescape(field))


def open_root(path: str, device: int) -> int:
    """Open the root of a mount, for paths below it (O_PATH).

    Raises:
        FileNotFoundError: Something else stands there.
        OSError: It cannot be reached.
    """
    root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if os.fstat(root).st_dev != device:
        os.close(root)
        raise FileNotFoundError(errno.ENOENT, "another file system stands there", path)
    return root


def resolve(path: str) -> str:
    """Return the absolute path of a mountpoint, without touching what is mounted there.

    Raises:
        MountpointMissingError: It leads nowhere: a loop of links, or no current directory.
    """
    try:
        return _resolve(Path(path))
    except OSError as exc:
        raise MountpointMissingError(
            f"the mountpoint {path} cannot be reached: {exc.strerror}"
        ) from None


def _resolve(given: Path) -> str:
    # `..` cannot be left for later: it means the parent of what a symbolic link points to.
    if given.name not in {"", ".."}:
        lexical = str(Path(_real(given.parent)) / given.name)
        if find_mounted(lexical) is not None:
            return lexical
    return _real(given)


def _real(path: Path) -> str:
    """Return a path without links; a loop is an error in every Python, what is missing is not."""
    try:
        return os.path.realpath(path, strict=True)
    except (FileNotFoundError, NotADirectoryError):
        return os.path.realpath(path)


# --- before mounting ------------------------------------------------------------------------


def prepare(mountpoint: str) -> None:
    """Make sure that a directory can be mounted over, as far as can be told; say what is there.

    What a killed daemon left stays until its successor is about to mount (`Claim.check`): for as
    long as that reads keys, or waits for etcd, an empty directory would look like deleted files.

    Args:
        mountpoint: As `resolve` returns it.

    Raises:
        CommandError: It cannot; the class says why.
    """
    if _find_stale(mountpoint) is not None:
        log.warning(
            "a killed daemon left a stale mount on %s, which is to be replaced; if nobody killed "
            "it, its log or the kernel's tells whether memory ran out",
            mountpoint,
        )
    check_fuse(_DEVICE)


@final
class Claim:
    """The right to mount on a directory. Owned by whoever claimed it, until it is mounted."""

    def __init__(self, mountpoint: str, fd: int | None) -> None:
        self._mountpoint = mountpoint
        self._fd = fd

    def check(self) -> None:
        """Make sure, just before mounting, that nobody else has; clear what a killed daemon left.

        Raises:
            AlreadyMountedError: Somebody has.
            CommandError: What is below the stale mount cannot be mounted over.
        """
        stale = _find_stale(self._mountpoint)
        if stale is not None:
            _unmount(stale.path, lazy=True)
            log.info("cleared the stale mount on %s", stale.path)
            _check_directory(stale.path)

    def release(self) -> None:
        """Let others look for themselves: it is mounted, or will not be."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@contextlib.contextmanager
def claimed(mountpoint: str) -> Iterator[Claim]:
    """Prepare a mountpoint, and keep other daemons off it until the claim is released.

    Two that mount on one directory would both succeed, one hidden below the other.

    Raises:
        CommandError: As `prepare`; or another daemon was quicker.
    """
    _find_stale(mountpoint)
    check_fuse(_DEVICE)
    claim = Claim(mountpoint, _lock(mountpoint))
    try:
        _find_stale(mountpoint)  # another daemon may have mounted, and released its claim
        yield claim
    finally:
        claim.release()


def _lock(mountpoint: str) -> int | None:
    """Lock the claim to a mountpoint; return the descriptor that holds it, None without locks.

    It is in a directory of our own: the mountpoint itself can be locked by whoever may read it,
    and that for as long as they like. The kernel takes the lock away with the process.
    """
    name = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:_LOCK_NAME]
    try:
        directory = _lock_directory()
        fd = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        log.info("%s cannot be claimed: %s", mountpoint, exc)
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise AlreadyMountedError(f"another etcdfs is about to mount on {mountpoint}") from None
    except OSError as exc:  # a file system without locks
        log.info("%s cannot be claimed: %s", mountpoint, exc)
    return fd


def _lock_directory() -> Path:
    """Return the directory of this user's claims, which nobody else can enter.

    Raises:
        OSError: There can be none; somebody else may have made it.
    """
    user = os.geteuid()
    # The same in every session, so no matter of the environment.
    directory = _RUN / "etcdfs" if user == 0 else _TMP / f"etcdfs-{user}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != user or stat.S_IMODE(status.st_mode) & 0o077 or directory.is_symlink():
        raise PermissionError(errno.EPERM, "it is open to others", str(directory))
    return directory


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


def _find_stale(mountpoint: str) -> Mounted | None:
    """Return the dead mount of ours that is in the way; None if nothing is.

    Raises:
        AlreadyMountedError: What is mounted is alive, or is not ours.
        CommandError: Nothing is mounted, and the directory cannot be mounted over.
    """
    mounted = find_mounted(mountpoint)
    if mounted is None:
        _check_directory(mountpoint)
    elif not mounted.ours:
        raise AlreadyMountedError(f"{mountpoint} is a mountpoint already ({mounted.type})")
    elif not _is_stale(mounted):
        raise AlreadyMountedError(f"etcdfs is mounted on {mountpoint} already")
    return mounted


def _is_stale(mounted: Mounted) -> bool:
    return mounted.ours and _find_server(mounted) is None and _is_dead(mounted.path)


def clear_dead(mountpoint: str) -> None:
    """Take a mount of ours away if its daemon is dead; otherwise do nothing.

    Raises:
        UnmountError: It could not be taken away.
    """
    mounted = find_mounted(mountpoint)
    if mounted is not None and _is_stale(mounted):
        _unmount(mountpoint, lazy=True)


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


# --- while mounting -------------------------------------------------------------------------


def can_forbid_links() -> bool:
    """Tell whether `forbid_links` can be used: by root, on Linux 5.12 or later."""
    return os.geteuid() == 0 and _set_nosymfollow(-1, "nowhere") == errno.EBADF


def forbid_links(mountpoint: str) -> None:
    """Have symbolic links not followed in a mount of ours, as mount(8)'s nosymfollow means.

    libfuse knows the option from 3.17 on only. No request to the file system comes of this.

    Raises:
        FuseRefusedError: The kernel does not do it.
    """
    failure = _set_nosymfollow(_AT_FDCWD, mountpoint)
    if failure:
        raise FuseRefusedError(f"nosymfollow cannot be set: {os.strerror(failure)}")


def _set_nosymfollow(directory: int, path: str) -> int:
    """Call mount_setattr(2), for which Python has no function; return its errno, 0 if it did it."""
    attributes = struct.pack("=4Q", _MOUNT_ATTR_NOSYMFOLLOW, 0, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (directory, os.fsencode(path), 0, attributes, ctypes.c_size_t(len(attributes)))
    return ctypes.get_errno() if libc.syscall(_SYS_MOUNT_SETATTR, *arguments) else 0


# --- taking away ----------------------------------------------------------------------------


def unmount(mountpoint: str, timeout_s: float, *, lazy: bool = False) -> None:
    """Unmount and wait until the daemon has ended; a dead mount is cleared.

    Args:
        mountpoint: As `resolve` returns it.
        timeout_s: Bound of the wait.
        lazy: Free the mountpoint even where programs are inside, which go on there; the daemon
            ends with the last of them, and is not waited for.

    Raises:
        NotMountedError: No mount of ours is there.
        UnmountError: It is busy, not permitted, or the daemon did not end in time.
    """
    mounted = find_mounted(mountpoint)
    if mounted is None:
        raise NotMountedError(f"nothing is mounted on {mountpoint}")
    if not mounted.ours:
        raise NotMountedError(f"what is mounted on {mountpoint} is not etcdfs, but {mounted.type}")
    with _watched_server(mounted) as daemon:
        if daemon is None:
            _unmount(mountpoint, lazy=_is_dead(mountpoint))
            return
        pid, pidfd = daemon
        if not _is_unmounted(mountpoint, lazy=False):
            if not lazy:
                raise UnmountError(
                    f"{mountpoint} is busy: a program has a file open or its working directory"
                    " there; --lazy frees it all the same"
                )
            _unmount(mountpoint, lazy=True)
            log.warning(
                "%s is free; its daemon (process %d) goes on serving those who are inside",
                mountpoint,
                pid,
            )
            return
        if _is_held(mounted):
            log.warning(
                "%s is free; its daemon (process %d) goes on serving a copy of the mount, "
                "as a container has it",
                mountpoint,
                pid,
            )
        elif not has_ended(pidfd, timeout_s):
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
    if not is_there(mounted):
        return
    if os.geteuid() == 0:
        # Not by umount(8), which looks at the place before.
        libc = ctypes.CDLL(None, use_errno=True)
        libc.umount2(os.fsencode(mounted.path), _MNT_FORCE | _MNT_DETACH)
        return
    try:
        _unmount(mounted.path, lazy=True)
    except UnmountError as exc:
        log.warning("%s", exc)


def _is_held(mounted: Mounted) -> bool:
    """Tell whether a file system that was unmounted here is still mounted somewhere else."""
    copies = (m.device for table in mount_tables() for m in parse_mountinfo(table))
    return mounted.device in copies


@contextlib.contextmanager
def _watched_server(mounted: Mounted) -> Iterator[tuple[int, int] | None]:
    """Find the daemon and yield its process id and a pidfd; None if there is none."""
    pid = _find_server(mounted)
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


def _find_server(mounted: Mounted) -> int | None:
    return find_server(mounted.path, mounted.device, mounted.owner)


def _unmount(path: str, *, lazy: bool) -> None:
    """Take a mount away.

    Raises:
        UnmountError: It stayed.
    """
    if not _is_unmounted(path, lazy=lazy):
        raise UnmountError(f"{path} is busy")


def _is_unmounted(path: str, *, lazy: bool) -> bool:
    """Take a mount away with fusermount3, or with umount(8) where that is missing.

    Returns:
        False when it is busy, and stayed.

    Raises:
        UnmountError: It stayed for another reason.
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
    said = done.stderr.strip()
    if done.returncode == 0:
        return True
    if "busy" in said:
        return False
    reason = said.splitlines()[-1] if said else "no reason given"
    raise UnmountError(f"{path} could not be unmounted: {reason}")
