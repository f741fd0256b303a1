"""What is wrong with this machine, as far as a mount needs it.

Knows: /dev/fuse, fusermount3, /etc/fuse.conf, the kernel, and mounts whose daemon is gone. Does
not know: etcd.

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
from etcdfs.options import MountOptions
from etcdfs.process.mountpoint import check_fuse, find_mounts
from etcdfs.process.processes import find_server

FUSE_CONF: Final = Path("/etc/fuse.conf")
KERNEL_MIN: Final = (5, 4)
"""The oldest kernel that is worked with; older ones have FUSE without what a mirror needs."""


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
    numbers = re.match(r"(\d+)\.(\d+)", kernel)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < KERNEL_MIN:
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
    yield from _check_mounts()


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
