"""What is wrong with this machine, as far as a mount needs it.

Knows: /dev/fuse, fusermount3, /etc/fuse.conf, the kernel, libfuse and what it is asked for beyond
pyfuse3, inotify's events, and mounts whose daemon is gone. Does not know: etcd.

Concurrency: plain calls that wait for nobody; no mounted directory is touched.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from etcdfs.errors import FuseMissingError
from etcdfs.fuse import fastpath
from etcdfs.fuse.procfs import sees_all_watches
from etcdfs.options import MountOptions
from etcdfs.process.mountpoint import check_fuse, find_mounts
from etcdfs.process.processes import find_server

FUSE_CONF: Final = Path("/etc/fuse.conf")
KERNEL_MIN: Final = (5, 4)
"""The oldest kernel that is worked with; older ones have FUSE without what a mirror needs."""

CLONE_MIN: Final = (5, 12)
"""The first that can make a clone of a read-only mount writable (mount_setattr(2))."""

STATUS: Final = Path("/proc/self/status")
_CAP_SYS_ADMIN: Final = 21


class Level(Enum):
    """What a finding means; the value is what a person sees."""

    OK = "ok"
    NOTE = "note"  # worth knowing
    PROBLEM = "PROBLEM"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the checklist."""

    level: Level
    check: str
    message: str


def check_machine(options: MountOptions, *, kernel: str, fuse_conf: Path) -> Iterator[Finding]:
    """Check what can be checked without etcd.

    Args:
        options: What the mount is, or would be, told.
        kernel: Its release, as uname(2) has it.
        fuse_conf: The file that fusermount3 reads.
    """
    try:
        check_fuse()
    except FuseMissingError as exc:
        yield Finding(Level.PROBLEM, "fuse", str(exc))
    else:
        yield Finding(Level.OK, "fuse", "/dev/fuse can be opened")
    if _is_older(kernel, KERNEL_MIN):
        wanted = ".".join(map(str, KERNEL_MIN))
        yield Finding(Level.PROBLEM, "kernel", f"Linux {kernel} is older than {wanted}")
    else:
        yield Finding(Level.OK, "kernel", f"Linux {kernel}")
    if options.allow_other and os.geteuid() != 0 and not _allows_others(fuse_conf):
        yield Finding(
            Level.PROBLEM,
            "allow_other",
            f"{fuse_conf} does not say user_allow_other: --allow-other is refused",
        )
    yield from _check_libfuse(options)
    yield from _check_inotify(options, can_clone=_can_clone(kernel))
    yield from _check_mounts()


def _check_libfuse(options: MountOptions) -> Iterator[Finding]:
    release = fastpath.libfuse_release()
    if release is None:
        yield Finding(Level.PROBLEM, "libfuse", "there is no libfuse3 on this machine")
        return
    yield Finding(Level.OK, "libfuse", f"libfuse {release}")
    if options.fast_path == "off":
        return
    if not fastpath.why_not:
        yield Finding(Level.OK, "fast path", "there is one")
        return
    level = Level.PROBLEM if options.fast_path == "on" else Level.NOTE
    yield Finding(level, "fast path", f"there is none: {fastpath.why_not}")


def _check_inotify(options: MountOptions, *, can_clone: bool) -> Iterator[Finding]:
    """See whether those who watch files can hear of other clients, as `--inotify` has it."""
    is_wanted = options.inotify == "on"
    if options.inotify == "off" or not (options.cache or is_wanted):
        return
    wanted = Level.PROBLEM if is_wanted else Level.NOTE
    if not options.cache:
        yield Finding(wanted, "inotify", "without --cache nobody hears of other clients")
    elif can_clone:
        yield Finding(Level.OK, "inotify", "other clients' changes raise events")
    elif options.read_only:
        yield Finding(wanted, "inotify", "only root can raise events on a read-only mount")
    else:
        yield Finding(
            Level.NOTE, "inotify", "events make the mount busy for moments: umount may fail once"
        )
    if (
        options.cache
        and options.inotify == "auto"
        and not sees_all_watches(allow_other=options.allow_other)
    ):
        yield Finding(Level.NOTE, "inotify", "who watches cannot be seen: each change is replayed")


def _is_older(kernel: str, wanted: tuple[int, int]) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", kernel)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < wanted


def _can_clone(kernel: str) -> bool:
    """Say whether a mount has a clone, by which events are raised without it being busy."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", STATUS.read_text(), re.MULTILINE)
    may = found is not None and bool(int(found[1], 16) & 1 << _CAP_SYS_ADMIN)
    return may and not _is_older(kernel, CLONE_MIN)


def _allows_others(fuse_conf: Path) -> bool:
    try:
        lines = fuse_conf.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _check_mounts() -> Iterator[Finding]:
    for mounted in find_mounts():
        if not mounted.ours:
            continue
        if find_server(mounted.path, mounted.device, mounted.owner) is None:
            yield Finding(
                Level.PROBLEM,
                "mounts",
                f"the daemon of {mounted.path} is gone; etcdfs umount {mounted.path} clears it",
            )
        else:
            yield Finding(Level.OK, "mounts", f"{mounted.path} has its daemon")
